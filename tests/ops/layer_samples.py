"""Sample calls of layers, products, windows, reductions and the rest of the operator table."""

from __future__ import annotations

from typing import Any

import torch

from tests.ops.samples import IMAGE, VOLUME, Call, X, call, ints, t

NORM = (t(4), t(4), t(4), t(4))
LAYERS: dict[str, list[Call]] = {
    "batch_norm": [
        call(t(*IMAGE), *NORM, False, 0.1, 1e-3, False),
        call(t(*IMAGE), t(4), t(4), None, None, True, 0.1, 1e-3, False),
        call(t(2, 4), *NORM, False, 0.1, 1e-3, False),
    ],
    "instance_norm": [
        call(t(*IMAGE), t(4), t(4), None, None, True, 0.1, 1e-3, False),
        call(t(*IMAGE), *NORM, False, 0.1, 1e-3, False),
    ],
    "group_norm": [call(t(*IMAGE), 2, t(4), t(4))],
    "layer_norm": [call(t(*IMAGE), [8], t(8), t(8)), call(t(*IMAGE), [6, 8])],
    "rms_norm": [call(t(*IMAGE), [8], t(8)), call(t(*IMAGE), [6, 8])],
    "linear": [call(t(2, 3, 4), t(5, 4), t(5)), call(t(4), t(5, 4))],
    "conv1d": [call(t(*X), t(6, 2, 3), t(6), [2], [1], [1], 2), call(t(4, 6), t(6, 4, 3))],
    "conv1d.padding": [call(t(*X), t(6, 4, 3), None, [1], "same")],
    "conv2d": [
        call(t(*IMAGE), t(6, 2, 3, 3), t(6), [2, 1], [1, 0], [1, 2], 2),
        call(t(4, 6, 8), t(6, 4, 3, 3)),
    ],
    "conv2d.padding": [call(t(*IMAGE), t(6, 4, 3, 3), None, [1, 1], "same")],
    "conv3d": [call(t(*VOLUME), t(6, 4, 3, 3, 3), t(6), [1, 1, 1], [1, 1, 1])],
    "conv3d.padding": [call(t(*VOLUME), t(6, 4, 3, 3, 3), None, [1, 1, 1], "valid")],
    "conv_transpose1d": [call(t(*X), t(4, 3, 3), t(6), [2], [1], [1], 2)],
    "conv_transpose2d.input": [call(t(*IMAGE), t(4, 3, 3, 3), t(6), [2, 2], [1, 1], [1, 1], 2)],
    "conv_transpose3d.input": [call(t(*VOLUME), t(4, 3, 3, 3, 3))],
}

PRODUCTS: dict[str, list[Call]] = {
    "bilinear": [call(t(2, 3), t(2, 4), t(5, 3, 4))],
    "matmul": [
        call(t(2, 3, 4), t(4, 5)),
        call(t(6, 1, 3, 4), t(2, 4, 5)),
        call(t(4), t(4, 5)),
        call(t(2, 3, 4), t(4)),
        call(t(4), t(4)),
    ],
    "linalg_matmul": [call(t(2, 3, 4), t(4, 5))],
    "mm": [call(t(3, 4), t(4, 5))],
    "bmm": [call(t(2, 3, 4), t(2, 4, 5))],
    "addmm": [call(torch.zeros(5), t(3, 4), t(4, 5))],
    "baddbmm": [call(torch.zeros(3, 5), t(2, 3, 4), t(2, 4, 5))],
    "addbmm": [call(torch.zeros(3, 5), t(2, 3, 4), t(2, 4, 5))],
    "mv": [call(t(3, 4), t(4))],
    "addmv": [call(torch.zeros(3), t(3, 4), t(4))],
    "dot": [call(t(4), t(4))],
    "outer": [call(t(3), t(4))],
    "ger": [call(t(3), t(4))],
    "addr": [call(torch.zeros(3, 4), t(3), t(4))],
    "einsum": [
        call("bij, bjk -> bik", [t(2, 3, 4), t(2, 4, 5)]),
        call("...i,ji->...j", [t(2, 3, 4), t(5, 4)]),
        call("bhld,bhsd->bhls", [t(2, 3, 4, 5), t(2, 3, 6, 5)]),
    ],
    "tensordot": [call(t(2, 3, 4), t(4, 3, 5), [1, 2], [1, 0])],
}
ATTENTION: dict[str, list[Call]] = {
    "scaled_dot_product_attention": [
        call(t(2, 3, 4, 8), t(2, 3, 5, 8), t(2, 3, 5, 6)),
        call(t(2, 4, 6, 8), t(2, 2, 6, 8), t(2, 2, 6, 8), None, 0.0, True, enable_gqa=True),
    ],
}


def _pools(n: int) -> dict[str, list[Call]]:
    x = t(*{1: X, 2: IMAGE, 3: VOLUME}[n])
    sizes, scales = [3] * n, [2.0] * n
    window = call(x, [3] * n, [2] * n, [1] * n)
    found = {f"{kind}_pool{n}d": [window] for kind in ("avg", "max")}
    found[f"max_pool{n}d_with_indices"] = [window]
    found |= {f"adaptive_{kind}_pool{n}d": [call(x, sizes)] for kind in ("avg", "max")}
    for name in (f"upsample_nearest{n}d", f"_upsample_nearest_exact{n}d"):
        found |= {name: [call(x, sizes)], f"{name}.vec": [call(x, None, scales)]}
    smooth = {1: ["linear1d"], 2: ["bilinear2d", "bicubic2d"], 3: ["trilinear3d"]}[n]
    for name in [f"upsample_{kind}" for kind in smooth] + (
        ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"] if n == 2 else []
    ):
        found |= {name: [call(x, sizes, False)], f"{name}.vec": [call(x, None, False, scales)]}
    return found


WINDOWS: dict[str, list[Call]] = _pools(1) | _pools(2) | _pools(3)

_BY_DIM = """
    softmax.int log_softmax.int special_softmax special_log_softmax cumsum cumprod cummax cummin logcumsumexp
    sort argsort glu
"""
ALONG: dict[str, list[Call]] = {
    **{name: [call(t(*X), 1), call(t(*X), -1)] for name in _BY_DIM.split()},
    "_softmax": [call(t(*X), 1, False)],
    "_log_softmax": [call(t(*X), 1, False)],
    "sort.stable": [call(t(*X), stable=True, dim=1)],
    "argsort.stable": [call(t(*X), stable=True, dim=1)],
    "topk": [call(t(*X), 2, 1)],
    "msort": [call(t(*X))],
}

_LISTS = """
    sum.dim_IntList mean.dim nansum nanmean amax amin var.dim std.dim var_mean.dim std_mean.dim logsumexp
    special_logsumexp any.dims all.dims
"""
_ONE = "prod.dim_int max.dim min.dim argmax argmin any.dim all.dim median.dim nanmedian.dim mode"
_ALL = """
    var sum mean prod max min any all std var_mean std_mean median nanmedian norm.Scalar
"""
REDUCTIONS: dict[str, list[Call]] = {
    **{name: [call(t(*X), [1]), call(t(*X), [0, -1], keepdim=True), call(t(*X), [2, 0])] for name in _LISTS.split()},
    **{name: [call(t(*X), 1), call(t(*X), -1, True)] for name in _ONE.split()},
    **{name: [call(t(*X))] for name in _ALL.split()},
    "argmax": [call(t(*X), 1), call(t(*X))],
    "argmin": [call(t(*X), 1), call(t(*X))],
    "norm.ScalarOpt_dtype": [call(t(*X), 2, dtype=torch.float32)],
    **{
        f"{name}.correction": [call(t(*X), [1], correction=1), call(t(*X))]
        for name in ("var", "std", "var_mean", "std_mean")
    },
    "norm.ScalarOpt_dim": [call(t(*X), 2, [1]), call(t(*X), 2, []), call(t(*X), 1, [0], True)],
    "norm.ScalarOpt_dim_dtype": [call(t(*X), 2, [1], False, dtype=torch.float32)],
    "linalg_vector_norm": [call(t(*X), 2, [1]), call(t(*X)), call(t(*X), 2, [])],
    "aminmax": [call(t(*X), dim=1), call(t(*X))],
    "kthvalue": [call(t(*X), 2, 1)],
    "count_nonzero": [call(t(*X), 1), call(t(*X))],
    "count_nonzero.dim_IntList": [call(t(*X), [0, 1]), call(t(*X), [])],
}
for _name in ("sum.dim_IntList", "mean.dim", "amax", "amin", "var.dim", "std.dim", "nansum", "nanmean"):
    REDUCTIONS[_name] = [*REDUCTIONS[_name], call(t(*X), [])]
for _name in ("any.dims", "all.dims"):
    REDUCTIONS[_name] = [*REDUCTIONS[_name], call(t(*X), []), call(t(*X))]

_HIDDEN, _INSIDE = 3, 4


def _recurrent(gates: int) -> list[Any]:
    rows = gates * _HIDDEN
    return [t(rows, _INSIDE), t(rows, _HIDDEN), t(rows), t(rows)]


def _layer(gates: int, state: Any) -> Call:
    return call(t(5, 2, _INSIDE), state, _recurrent(gates), True, 1, 0.0, False, False, False)


_STATE = t(1, 2, _HIDDEN)
_PAIR = call(t(4, 3), t(4, 3))
_CLASSES = call(t(4, 3).log(), ints(0, 2, 1, 1))
OTHERS: dict[str, list[Call]] = {
    "lstm.input": [_layer(4, [_STATE, _STATE])],
    "gru.input": [_layer(3, _STATE)],
    "rnn_tanh.input": [_layer(1, _STATE)],
    "rnn_relu.input": [_layer(1, _STATE)],
    "lstm_cell": [call(t(2, _INSIDE), [t(2, _HIDDEN), t(2, _HIDDEN)], *_recurrent(4))],
    "gru_cell": [call(t(2, _INSIDE), t(2, _HIDDEN), *_recurrent(3))],
    "rnn_tanh_cell": [call(t(2, _INSIDE), t(2, _HIDDEN), *_recurrent(1))],
    "rnn_relu_cell": [call(t(2, _INSIDE), t(2, _HIDDEN), *_recurrent(1))],
    "one_hot": [call(ints(0, 2, 1), 3)],
    "take": [call(t(*X), ints(5, 7))],
    "masked_scatter": [call(t(*X), t(*X) > 0.5, t(*X))],
    "grid_sampler": [call(t(*IMAGE), t(2, 3, 3, 2), 0, 0, False)],
    "cosine_similarity": [_PAIR],
    "diff": [call(t(*X), 1, -1, t(2, 4, 1))],
    "embedding_bag.padding_idx": [call(t(5, 3), ints(1, 2, 4), ints(0, 2), False, 0, False, None, False, None)],
    **{name: [_PAIR] for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div")},
    **{name: [_PAIR] for name in ("binary_cross_entropy", "binary_cross_entropy_with_logits")},
    **{name: [_PAIR] for name in ("soft_margin_loss", "hinge_embedding_loss")},
    **{name: [_CLASSES] for name in ("cross_entropy_loss", "nll_loss", "nll_loss_nd")},
    "nll_loss2d": [call(t(2, 3, 4, 4), (t(2, 4, 4) * 3).long())],
    "poisson_nll_loss": [call(t(4, 3), t(4, 3), True, False, 1e-8, 1)],
    "margin_ranking_loss": [call(t(4), t(4) + 1, t(4))],
    "cosine_embedding_loss": [call(t(4, 3), t(4, 3), torch.ones(4))],
    "triplet_margin_loss": [call(t(4, 3), t(4, 3) + 1, t(4, 3) - 1)],
    "arange": [call(5)],
    "full": [call([2, 3], 7.0)],
    "zeros_like": [call(t(2, 3))],
    "new_zeros": [call(t(2, 3), [4])],
    "rand_like": [call(t(2, 3))],
}
