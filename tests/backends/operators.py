"""What the TVM backend must compute as eager torch does: operators by family, as small functions of shared inputs.

A family is compiled as one model that returns a dict, so that 200 operators cost a dozen compilations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def _seeded(*shape: int, low: float = -2.0, high: float = 2.0) -> Tensor:
    return torch.empty(shape).uniform_(low, high, generator=torch.Generator().manual_seed(sum(shape)))


X = _seeded(2, 6, 5, 8)
Y = _seeded(2, 6, 5, 8) * 0.7 + 0.1
POSITIVE = _seeded(2, 6, low=0.1, high=3.0)
INTEGERS = torch.tensor([[-7, -2, 0, 3], [5, 4, -1, 9]])
DIVISORS = torch.tensor([[2, -3, 4, 5], [-2, 3, -4, 7]])

UNARY: dict[str, Function] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("abs", "ceil", "cos", "cosh", "erf", "exp", "expm1", "floor", "neg", "relu", "round", "sigmoid"),
            *("sign", "sin", "sinh", "square", "tan", "tanh", "trunc", "asinh", "atan", "isnan", "isinf", "rad2deg"),
        )
    },
    **{
        name: getattr(F, name)
        for name in (
            *("silu", "hardswish", "hardsigmoid", "mish", "logsigmoid", "softplus", "selu", "elu", "celu", "relu6"),
            *("gelu", "hardtanh", "leaky_relu", "softshrink", "softsign", "tanhshrink", "hardshrink"),
        )
    },
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu_alpha": lambda x: F.elu(x, 0.3),
    "celu_alpha": lambda x: F.celu(x, 0.3),
    "leaky_slope": lambda x: F.leaky_relu(x, 0.2),
    "softplus_beta": lambda x: F.softplus(x, beta=3, threshold=2),
    "threshold": lambda x: F.threshold(x, 0.3, -5.0),
    "hardtanh_range": lambda x: F.hardtanh(x, -0.2, 0.7),
    "clamp": lambda x: x.clamp(-0.5, 1),
    "clamp_min": lambda x: x.clamp(min=0.25),
    "clamp_max": lambda x: x.clamp_max(0.25),
    "glu": lambda x: F.glu(x, 1),
    "prelu": lambda x: F.prelu(x, torch.linspace(-0.5, 0.5, 6)),
    "prelu_one": lambda x: F.prelu(x, torch.tensor([0.3])),
    "asin": lambda x: torch.asin(x / 3),
    "acos": lambda x: torch.acos(x / 3),
    "atanh": lambda x: torch.atanh(x / 3),
    "small_expm1": lambda x: torch.expm1(x * 1e-5),
    "to_double": lambda x: x.double() * 3,
    "to_int": lambda x: (x * 3).int(),
    "to_bool": lambda x: x.round().bool(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "nan_to_num": torch.nan_to_num,
    "pow_square": lambda x: x**2,
    "pow_cube": lambda x: x**3,
    "pow_minus": lambda x: x**-1,
    "reciprocal": lambda x: (x + 5).reciprocal(),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(-1),
}

POSITIVE_UNARY: dict[str, Function] = {
    **{name: getattr(torch, name) for name in ("log", "log2", "log10", "log1p", "rsqrt", "sqrt")},
    "acosh": lambda x: torch.acosh(x + 1),
    "pow_half": lambda x: x**0.5,
    "pow_odd": lambda x: x**1.7,
    "pow_scalar": lambda x: 1.5**x,
    "pow_tensor": lambda x: x ** (x - 1),
    "logit": lambda x: torch.logit(x / 4),
}

BINARY: dict[str, Function] = {
    **{
        name: getattr(torch, name)
        for name in (
            *("add", "sub", "mul", "div", "maximum", "minimum", "atan2", "fmod", "remainder", "floor_divide", "hypot"),
            *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logaddexp"),
        )
    },
    "add_alpha": lambda x, y: torch.add(x, y, alpha=2.5),
    "sub_alpha": lambda x, y: torch.sub(x, y, alpha=-0.5),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=2) + (1 - x),
    "div_floor": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "div_trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "scalars": lambda x, y: (x + 1) * 2 / 3 - 4 + 5 / (y + 9),
    "broadcast": lambda x, y: x * y[0, 0, 0] + y[:, :1, :1, :1],
    "where": lambda x, y: torch.where(x > y, x, y * 2),
    "where_scalar": lambda x, y: torch.where(x > y, 1.0, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -3.5),
    "comparison_scalar": lambda x, y: (x > 0.5) & (y != 0) | ~(x <= -1) ^ (y > 1),
    "clamp_tensor": lambda x, y: torch.clamp(x, min=y),
    "mixed_dtypes": lambda x, y: x.double() + y,
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.5),
    "addcdiv": lambda x, y: torch.addcdiv(x, x, y + 5, value=0.5),
}

INTEGER: dict[str, Function] = {
    "add": lambda a, b: a + b * 3 - 1,
    "true_div": lambda a, b: a / b,
    "floor_div": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "trunc_div": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "remainder": torch.remainder,
    "remainder_scalar": lambda a, b: a % 4 + a.remainder(-3),
    "fmod": torch.fmod,
    "bitwise": lambda a, b: (a & b) | (a ^ 5) | ~b,
    "compare": lambda a, b: a > b,
    "compare_float": lambda a, b: a > 0.5,
    "square": lambda a, b: a**2,
    "sum": lambda a, b: a.sum(1),
    "sum_int32": lambda a, b: a.int().sum(),
    "sum_bool": lambda a, b: (a > b).sum(0),
    "bool_arithmetic": lambda a, b: (a > 0) + (b > 0),
    "mean": lambda a, b: a.float().mean(),
    "max": lambda a, b: a.max(),
    "cumsum": lambda a, b: a.cumsum(1),
    "cumsum_bool": lambda a, b: (a > 0).cumsum(1),
    "sqrt": lambda a, b: torch.sqrt(a.abs()),
    "narrow_dtypes": lambda a, b: a.to(torch.int8) + b.to(torch.int8),
    "uint8": lambda a, b: a.abs().to(torch.uint8) * 3,
    "clamp": lambda a, b: a.clamp(-1, 4),
    "where": lambda a, b: torch.where(a > 0, a, 7),
    "any": lambda a, b: (a > 8).any(1),
    "all": lambda a, b: (a > -3).all(),
    "logical_not": lambda a, b: torch.logical_not(a),
    "one_hot": lambda a, b: F.one_hot(a.clamp(0, 3), 4),
}

REDUCE: dict[str, Function] = {
    "sum": lambda x: x.sum(),
    "sum_dims": lambda x: x.sum((1, -1)),
    "mean": lambda x: x.mean(),
    "mean_keep": lambda x: x.mean((2, 3), keepdim=True),
    "prod": lambda x: x.prod(2),
    "amax": lambda x: x.amax((1, 2)),
    "amin": lambda x: x.amin(-1, keepdim=True),
    "max": lambda x: x.max(),
    "max_dim": lambda x: tuple(x.max(1)),
    "min_dim": lambda x: tuple(x.min(-1, keepdim=True)),
    "argmax": lambda x: x.argmax(),
    "argmax_dim": lambda x: x.argmax(2),
    "argmin_keep": lambda x: x.argmin(1, keepdim=True),
    "argmax_ties": lambda x: (x > 0).int().argmax(-1),
    "var": lambda x: x.var(1),
    "var_biased": lambda x: x.var((2, 3), unbiased=False, keepdim=True),
    "std": lambda x: x.std(-1),
    "var_mean": lambda x: torch.var_mean(x, 1),
    "logsumexp": lambda x: x.logsumexp((1, 2)),
    "norm": lambda x: x.norm(dim=1),
    "vector_norm_1": lambda x: torch.linalg.vector_norm(x, 1, dim=-1),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(-1),
    "topk": lambda x: tuple(x.topk(3, -1)),
    "topk_smallest": lambda x: tuple(x.topk(2, 1, largest=False)),
    "sort": lambda x: tuple(x.sort(1)),
    "argsort": lambda x: x.argsort(-1, descending=True),
    "any": lambda x: (x > 1.9).any(1),
    "all": lambda x: (x > -1.9).all(-1, keepdim=True),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(1), dim=1),
}

MOVE: dict[str, Function] = {
    "view": lambda x: x.view(2, 30, 8),
    "reshape": lambda x: x.transpose(1, 2).reshape(10, -1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "squeeze": lambda x: x[:, :1].squeeze(1).unsqueeze(-1),
    "permute": lambda x: x.permute(0, 2, -1, 1),
    "transpose": lambda x: x.transpose(-1, 1),
    "movedim": lambda x: torch.movedim(x, (0, 1), (2, 0)),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "t": lambda x: x[0, 0].t(),
    "slice": lambda x: x[:, 1:-1, ::2, -3:],
    "slice_beyond": lambda x: x[:, 2:100, -100:3],
    "select": lambda x: x[:, -1],
    "narrow": lambda x: x.narrow(3, 2, 4),
    "split": lambda x: tuple(x.split(4, 1)),
    "split_sizes": lambda x: tuple(x.split([1, 3, 4], 3)),
    "chunk": lambda x: tuple(x.chunk(4, 3)),
    "chunk_uneven": lambda x: tuple(x.chunk(3, 2)),
    "unbind": lambda x: tuple(x.unbind(2)),
    "cat": lambda x: torch.cat([x, x[:, :2] * 2], 1),
    "cat_last": lambda x: torch.cat([x, x], -1),
    "stack": lambda x: torch.stack([x, x * 2], 2),
    "repeat": lambda x: x.repeat(2, 1, 3, 1),
    "repeat_rank": lambda x: x.repeat(2, 1, 1, 2, 1),
    "tile": lambda x: x.tile(2, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "flip": lambda x: x.flip((1, -1)),
    "roll": lambda x: x.roll((1, -2), (1, 3)),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=1.5),
    "pad_negative": lambda x: F.pad(x, (-1, 2, 1, -2)),
    "pad_reflect": lambda x: F.pad(x, (2, 1, 1, 3), mode="reflect"),
    "pad_replicate": lambda x: F.pad(x, (2, 1, 4, 0), mode="replicate"),
    "pad_circular": lambda x: F.pad(x, (2, 1, 1, 2), mode="circular"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4], 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[:, :, :4], 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 3),
    "tril": lambda x: x.tril(1),
    "triu": lambda x: x.triu(-1),
    "diagonal": lambda x: x.diagonal(0, -2, -1),
    "unfold": lambda x: F.unfold(x, 3, padding=1, stride=2),
    "tensor_unfold": lambda x: x.unfold(3, 3, 2),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, :, 0], indexing="ij"),
    "like": lambda x: torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2.5) + x.new_ones(8),
    "arange": lambda x: torch.arange(2, 18, 2) + torch.arange(0.5, 4.5, 0.5) + torch.arange(8),
    "eye": lambda x: torch.eye(5, 8) + torch.linspace(0, 1, 8),
    "rot90": lambda x: x.rot90(1, (2, 3)),
}

INDEX: dict[str, Function] = {
    "index_select": lambda x: x.index_select(1, torch.tensor([5, 0, 2])),
    "gather": lambda x: x.gather(1, torch.tensor([3, 0, 5, 1]).view(1, 4, 1, 1).expand(2, 4, 5, 8)),
    "take_along": lambda x: torch.take_along_dim(x, x.argsort(2), 2),
    "index_one": lambda x: x[:, torch.tensor([1, -1, 2])],
    "index_pair": lambda x: x[:, torch.tensor([1, -1, 2]), torch.tensor([0, 4, -2])],
    "index_apart": lambda x: x[:, torch.tensor([1, -1, 2]), :, torch.tensor([0, 4, -2])],
    "index_grid": lambda x: x[:, torch.tensor([[1], [2]]), torch.tensor([0, 4, 3])],
    "index_first": lambda x: x[torch.tensor([1, 0, 1])],
    "index_none": lambda x: x[:, None, ..., 0],
    "embedding": lambda x: F.embedding(torch.tensor([[1, 4], [0, 3]]), x[0, 0]),
    "scatter": lambda x: x.scatter(1, torch.tensor([2, 0]).view(1, 2, 1, 1).expand(2, 2, 5, 8), x * 2),
    "scatter_value": lambda x: x.scatter(2, torch.zeros(2, 6, 1, 8, dtype=torch.long), 7.0),
    "scatter_add": lambda x: x.scatter_add(1, torch.zeros(2, 6, 5, 8, dtype=torch.long), x),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2] * 3, 1, 1, 5, 2),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 3, 1, -2),
    "diff": lambda x: x.diff(dim=1),
}

MATMUL: dict[str, Function] = {
    "linear": lambda x, y: F.linear(x, y[0, 0], y[0, 0, :, 0]),
    "matmul": lambda x, y: x @ y.transpose(-1, -2),
    "matmul_broadcast": lambda x, y: x @ y[0, 0].t(),
    "matmul_vector": lambda x, y: x @ y[0, 0, 0],
    "mm": lambda x, y: torch.mm(x[0, 0], y[0, 0].t()),
    "bmm": lambda x, y: torch.bmm(x[0], y[0].transpose(1, 2)),
    "addmm": lambda x, y: torch.addmm(x[0, 0, :, :5], x[0, 0], y[0, 0].t(), beta=0.5, alpha=2),
    "baddbmm": lambda x, y: torch.baddbmm(x[0, :, :, :5], x[0], y[0].transpose(1, 2), beta=2),
    "dot": lambda x, y: torch.dot(x[0, 0, 0], y[0, 0, 0]),
    "mv": lambda x, y: torch.mv(x[0, 0], y[0, 0, 0]),
    "outer": lambda x, y: torch.outer(x[0, 0, 0], y[0, 0, 0]),
    "einsum": lambda x, y: torch.einsum("bchw,bkhw->bck", x, y),
    "einsum_diagonal": lambda x, y: torch.einsum("bchw,bchw->bh", x, y),
    "sdpa": F.scaled_dot_product_attention,
}
MATMUL["sdpa"] = lambda x, y: F.scaled_dot_product_attention(x, y, x)
MATMUL["sdpa_causal"] = lambda x, y: F.scaled_dot_product_attention(x, y, x, is_causal=True)
MATMUL["sdpa_scale"] = lambda x, y: F.scaled_dot_product_attention(x, y, x, scale=0.3)
MATMUL["sdpa_mask"] = lambda x, y: F.scaled_dot_product_attention(x, y, x, x[..., :5] > 0)
MATMUL["sdpa_bias"] = lambda x, y: F.scaled_dot_product_attention(x, y, x, y[..., :5])
MATMUL["sdpa_masked_row"] = lambda x, y: F.scaled_dot_product_attention(x, y, x, torch.ones(5, 5).tril(-1).bool())
MATMUL["sdpa_gqa"] = lambda x, y: F.scaled_dot_product_attention(x, y[:, :2], x[:, :2], enable_gqa=True)
MATMUL["sdpa_longer"] = lambda x, y: F.scaled_dot_product_attention(x[:, :, :2], y, x, is_causal=True)

SIGNAL = _seeded(2, 6, 13)
VOLUME = _seeded(1, 4, 5, 6, 7)
_W1, _W3 = _seeded(8, 6, 3), _seeded(8, 2, 2, 3, 2)
_W2, _WG, _WD = _seeded(8, 6, 3, 3), _seeded(9, 2, 3, 2), _seeded(12, 1, 3, 3)
_WT, _WTG = _seeded(6, 4, 3, 3), _seeded(6, 2, 3, 2)

_P0 = _seeded(4, 6, 2, 4)
_P1 = _seeded(8, 6, 1, 1)
_P2 = _seeded(6, 4, 3)
_P3 = _seeded(4, 2, 2, 2, 2)
_P4 = _seeded(8)

CONV: dict[str, Function] = {
    "conv1d": lambda x, s, v: F.conv1d(s, _W1, torch.arange(8.0), stride=2, padding=1),
    "conv1d_dilated": lambda x, s, v: F.conv1d(s, _W1, dilation=3),
    "conv2d": lambda x, s, v: F.conv2d(x, _W2, torch.arange(8.0), padding=1),
    "conv2d_stride": lambda x, s, v: F.conv2d(x, _W2, stride=(2, 3), padding=(0, 2)),
    "conv2d_stride_pointwise": lambda x, s, v: F.conv2d(x, _P1, torch.arange(8.0), stride=(2, 3)),
    "conv2d_stride_pointwise_padded": lambda x, s, v: F.conv2d(x, _P1, stride=2, padding=1),
    "conv2d_same": lambda x, s, v: F.conv2d(x, _P0, padding="same"),
    "conv2d_valid": lambda x, s, v: F.conv2d(x, _W2, padding="valid", dilation=(2, 1)),
    "conv2d_grouped": lambda x, s, v: F.conv2d(x, _WG, groups=3, padding=1),
    "conv2d_depthwise": lambda x, s, v: F.conv2d(x, _WD, groups=6, padding=1, stride=2),
    "conv2d_pointwise": lambda x, s, v: F.conv2d(x, _P1),
    "conv2d_unbatched": lambda x, s, v: F.conv2d(x[0], _W2),
    "conv3d": lambda x, s, v: F.conv3d(v, _W3, groups=2, padding=1, stride=(1, 2, 1)),
    "transposed1d": lambda x, s, v: F.conv_transpose1d(s, _P2, stride=2, padding=1, output_padding=1),
    "transposed2d": lambda x, s, v: F.conv_transpose2d(x, _WT, torch.arange(4.0), stride=2, padding=1),
    "transposed2d_grouped": lambda x, s, v: F.conv_transpose2d(x, _WTG, groups=3, stride=(2, 3), output_padding=1),
    "transposed2d_dilated": lambda x, s, v: F.conv_transpose2d(x, _WT, dilation=2, padding=3),
    "transposed3d": lambda x, s, v: F.conv_transpose3d(v, _P3, stride=2),
}

POOL: dict[str, Function] = {
    "max1d": lambda x, s, v: F.max_pool1d(s, 3, 2, 1),
    "max2d": lambda x, s, v: F.max_pool2d(x, 2),
    "max2d_ceil": lambda x, s, v: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    "max2d_dilated": lambda x, s, v: F.max_pool2d(x, 2, 1, dilation=(2, 3)),
    "max3d": lambda x, s, v: F.max_pool3d(v, 2, 2),
    "avg1d": lambda x, s, v: F.avg_pool1d(s, 3, 2, 1),
    "avg2d": lambda x, s, v: F.avg_pool2d(x, 2),
    "avg2d_ceil": lambda x, s, v: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    "avg2d_ceil_exclude": lambda x, s, v: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "avg2d_exclude": lambda x, s, v: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "avg2d_divisor": lambda x, s, v: F.avg_pool2d(x, 2, divisor_override=3),
    "avg3d": lambda x, s, v: F.avg_pool3d(v, 2, 1, 1),
    "adaptive1d": lambda x, s, v: F.adaptive_avg_pool1d(s, 5),
    "adaptive2d": lambda x, s, v: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive2d_global": lambda x, s, v: F.adaptive_avg_pool2d(x, 1),
    "adaptive2d_none": lambda x, s, v: F.adaptive_avg_pool2d(x, (None, 3)),
    "adaptive2d_larger": lambda x, s, v: F.adaptive_avg_pool2d(x, (7, 11)),
    "adaptive3d": lambda x, s, v: F.adaptive_avg_pool3d(v, (2, 3, 4)),
    "adaptive_max": lambda x, s, v: F.adaptive_max_pool2d(x, (3, 5)),
    "lp": lambda x, s, v: F.lp_pool2d(x.abs(), 2, 2),
    "nearest": lambda x, s, v: F.interpolate(x, scale_factor=2),
    "nearest_size": lambda x, s, v: F.interpolate(x, size=(7, 3)),
    "nearest_exact": lambda x, s, v: F.interpolate(x, size=(7, 3), mode="nearest-exact"),
    "nearest1d": lambda x, s, v: F.interpolate(s, size=20),
    "nearest3d": lambda x, s, v: F.interpolate(v, scale_factor=(1, 2, 1.5)),
    "bilinear": lambda x, s, v: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bilinear_corners": lambda x, s, v: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=True),
    "bilinear_factor": lambda x, s, v: F.interpolate(x, scale_factor=1.7, mode="bilinear"),
    "bilinear_antialias": lambda x, s, v: F.interpolate(x, size=(3, 4), mode="bilinear", antialias=True),
    "bicubic": lambda x, s, v: F.interpolate(x, size=(9, 13), mode="bicubic"),
    "linear": lambda x, s, v: F.interpolate(s, size=20, mode="linear"),
    "trilinear": lambda x, s, v: F.interpolate(v, size=(3, 8, 9), mode="trilinear"),
}

_SCALE, _SHIFT = _seeded(6), _seeded(6)
_VARIANCE = _SCALE.abs() + 0.1

NORM: dict[str, Function] = {
    "layer": lambda x: F.layer_norm(x, (8,), _P4, _P4),
    "layer_two": lambda x: F.layer_norm(x + 50, (5, 8)),
    "rms": lambda x: F.rms_norm(x, (8,), _P4),
    "rms_eps": lambda x: F.rms_norm(x, (5, 8), eps=0.1),
    "group": lambda x: F.group_norm(x, 3, _SCALE, _SHIFT),
    "group_plain": lambda x: F.group_norm(x + 20, 2, eps=1e-3),
    "instance": lambda x: F.instance_norm(x, weight=_SCALE, bias=_SHIFT),
    "batch": lambda x: F.batch_norm(x, _SHIFT, _VARIANCE, _SCALE, _SHIFT),
    "batch_plain": lambda x: F.batch_norm(x, _SHIFT, _VARIANCE, eps=1e-2),
    "local_response": lambda x: F.local_response_norm(x, 3),
}
