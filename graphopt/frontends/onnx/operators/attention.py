"""Attention and rotary embeddings, as torch's `scaled_dot_product_attention` wherever it says the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.frontends.onnx.dtypes import to_dtype
from graphopt.frontends.onnx.registry import Outputs, operator
from graphopt.frontends.onnx.values import refuse


def _heads(x: Tensor, count: int | None) -> Tensor:
    """[batch, length, heads * size] as [batch, heads, length, size]."""
    if x.ndim == 4:
        return x
    if not count:
        raise refuse("three-dimensional inputs need 'q_num_heads' and 'kv_num_heads'")
    heads: Tensor = x.unflatten(-1, (count, -1))
    return heads.transpose(1, 2)


@dataclass(frozen=True)
class _Limits:
    """Which keys a query sees by position: query i is at position `offset + i`."""

    causal: bool
    left: int
    right: int
    offset: int | Tensor

    @property
    def triangular(self) -> bool:
        """Whether query i sees keys 0 to i, which torch calls causal."""
        return self.causal and self.left < 0 and isinstance(self.offset, int) and self.offset == 0

    def mask(self, queries: int, keys: int) -> Tensor | None:
        if not self.causal and self.left < 0 and self.right < 0:
            return None
        place = torch.arange(queries).unsqueeze(1)  # [queries, 1]
        place = place + (self.offset.reshape(-1, 1, 1, 1) if isinstance(self.offset, Tensor) else self.offset)
        key = torch.arange(keys)
        seen = torch.ones([queries, keys], dtype=torch.bool)
        if self.causal:
            seen = key <= place
        if self.left >= 0:
            seen = seen & (key >= place - self.left)
        return seen & (key <= place + self.right) if self.right >= 0 else seen


def _combined(mask: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """A boolean mask (True: attend) or a float one (added), and the boolean one by position."""
    if mask is None or seen is None:
        return seen if mask is None else mask
    if mask.dtype is torch.bool:
        return mask & seen
    return torch.where(seen, mask, float("-inf"))


def _extended(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask shorter than the keys hides the rest."""
    if mask is None or (isinstance(mask.shape[-1], int) and mask.shape[-1] in (1, keys)):
        return mask
    missing = keys - mask.shape[-1]
    if mask.dtype is torch.bool:
        return F.pad(mask, (0, missing), value=False)
    return F.pad(mask, (0, missing), value=float("-inf"))


@operator("Attention", since=23, until=23)
def attention_without_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    outputs: Outputs,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Tensor, ...]:
    return attention(
        q, k, v, attn_mask, past_key, past_value, outputs=outputs, is_causal=is_causal,
        kv_num_heads=kv_num_heads, q_num_heads=q_num_heads, qk_matmul_output_mode=qk_matmul_output_mode,
        scale=scale, softcap=softcap, softmax_precision=softmax_precision,
    )  # fmt: skip


@operator("Attention", since=24)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    outputs: Outputs,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> tuple[Tensor, ...]:
    """q [B, H, S, D], k and v [B, H_kv, T, D], or [B, S, H * D] each; past keys and values go in front."""
    packed = q.ndim == 3
    q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    offset: int | Tensor = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    queries, keys = q.shape[2], k.shape[2]
    mask = _extended(attn_mask, keys)
    if nonpad_kv_seqlen is not None:
        valid = torch.arange(keys) < nonpad_kv_seqlen.reshape(-1, 1, 1, 1)
        mask = _combined(mask, valid)
        offset = nonpad_kv_seqlen - queries
    limits = _Limits(bool(is_causal), left_window_size, right_window_size, offset)
    factor = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    if softcap == 0.0 and outputs < 4 and softmax_precision in (None, 1, 10, 16):
        made = [_whole(q, k, v, mask, limits, factor)]
    else:
        precision = q.dtype if softmax_precision is None else to_dtype(softmax_precision)
        seen = _combined(mask, limits.mask(queries, keys))
        made = list(_explicit(q, k, v, seen, factor, softcap, precision, qk_matmul_output_mode))
    y = made[0].transpose(1, 2).flatten(2) if packed else made[0]
    return (y, k, v, *made[1:])


def _whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, limits: _Limits, factor: float) -> Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    if limits.triangular and mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=factor, enable_gqa=grouped)
    seen = _combined(mask, limits.mask(q.shape[2], k.shape[2]))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=factor, enable_gqa=grouped)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: float,
    softcap: float,
    precision: torch.dtype,
    mode: int,
) -> tuple[Tensor, Tensor]:
    """Step by step, for a soft cap or the scores; `mode` says which: raw, capped, masked, or after the softmax."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    root = math.sqrt(factor)
    stages = [(q * root) @ (k * root).transpose(-1, -2)]
    stages.append(softcap * torch.tanh(stages[0] / softcap) if softcap else stages[0])
    hidden = None
    if mask is None:
        stages.append(stages[1])
    elif mask.dtype is torch.bool:
        hidden = ~mask
        stages.append(stages[1].masked_fill(hidden, float("-inf")))
    else:
        stages.append(stages[1] + mask)
    weights = torch.softmax(stages[2].to(precision), -1).to(q.dtype)
    if mask is not None:  # a query that sees no key gives zero, not NaN
        weights = torch.where((stages[2] == float("-inf")).all(-1, keepdim=True), 0.0, weights)
    stages.append(weights)
    return weights @ v, stages[mode]


@operator("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Rotate pairs of features: halves, or neighbours when `interleaved`. x [B, H, S, D] or [B, S, H * D]."""
    packed = x.ndim == 3
    x4 = _heads(x, num_heads)
    size = rotary_embedding_dim or x4.shape[-1]
    turned, rest = x4[..., :size], x4[..., size:]
    cos = cos_cache if position_ids is None else cos_cache[position_ids]
    sin = sin_cache if position_ids is None else sin_cache[position_ids]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, S, size / 2]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        y = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = torch.cat([y, rest], -1) if rotary_embedding_dim else y
    return y.transpose(1, 2).flatten(2) if packed else y


@operator("LinearAttention", since=27)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """The recurrence S' = exp(g) S + b k (v - exp(g) S^T k), y = scale q^T S', step by step; [B, T, H * D] each.

    `linear` and `gated` leave out the correction by S^T k, `linear` and `delta` the decay g.
    """
    if update_rule not in ("linear", "gated", "delta", "gated_delta"):
        raise refuse(f"attribute 'update_rule'='{update_rule}' is not handled")
    steps = query.shape[1]
    if not isinstance(steps, int) or steps > 64:
        raise refuse(f"a recurrence over {steps} steps; up to 64 are unrolled")
    group = q_num_heads // kv_num_heads
    q, k, v = _heads(query, q_num_heads), _heads(key, kv_num_heads), _heads(value, kv_num_heads)
    factor = scale or 1.0 / math.sqrt(q.shape[-1])
    q, k, v = q.float(), k.float(), v.float()  # the state is kept in float32
    state = None if past_state is None else past_state.float()
    if state is None:
        state = torch.zeros([q.shape[0], kv_num_heads, k.shape[-1], v.shape[-1]], dtype=q.dtype)
    fade = None if decay is None or "gated" not in update_rule else torch.exp(_heads(decay, kv_num_heads).float())
    rate = None if beta is None or "delta" not in update_rule else beta.transpose(1, 2).float()  # [B, H or 1, T]
    ys = []
    for t in range(steps):
        state = state if fade is None else state * fade[:, :, t].unsqueeze(-1)
        new = v[:, :, t]
        if rate is not None:
            new = rate[:, :, t].unsqueeze(-1) * (new - (k[:, :, t].unsqueeze(-2) @ state).squeeze(-2))
        state = state + k[:, :, t].unsqueeze(-1) * new.unsqueeze(-2)
        seen = state.repeat_interleave(group, 1) if group > 1 else state
        ys.append((q[:, :, t].unsqueeze(-2) @ seen).squeeze(-2) * factor)
    state_dtype = query.dtype if past_state is None else past_state.dtype
    return torch.stack(ys, 1).flatten(2).to(query.dtype), state.to(state_dtype)
