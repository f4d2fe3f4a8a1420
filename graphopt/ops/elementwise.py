"""Element-wise operators: output element i depends on elements i of the operands, broadcast together."""

from __future__ import annotations

from graphopt.ops.axes import Broadcast
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]


def elementwise(work: int = 1, *, commutative: bool = False, operands: tuple[str, ...] = ()) -> OpInfo:
    return OpInfo(Kind.ELEMENTWISE, Broadcast(operands), work=work, commutative=commutative)


ARITHMETIC = """
    abs absolute neg negative positive sign sgn signbit square reciprocal floor ceil trunc fix frac round
    round.decimals relu relu6 threshold hardtanh leaky_relu hardshrink softshrink clamp clamp.Tensor clamp_min
    clamp_min.Tensor clamp_max clamp_max.Tensor clip clip.Tensor nan_to_num isnan isinf isfinite isposinf
    isneginf logical_not bitwise_not rad2deg deg2rad heaviside copysign.Tensor copysign.Scalar
    add.Scalar sub.Tensor sub.Scalar subtract.Tensor subtract.Scalar rsub.Tensor rsub.Scalar mul.Scalar
    multiply.Scalar div.Tensor div.Scalar div.Tensor_mode div.Scalar_mode divide.Tensor divide.Scalar
    divide.Tensor_mode divide.Scalar_mode true_divide.Tensor true_divide.Scalar floor_divide
    floor_divide.Scalar remainder.Tensor remainder.Scalar remainder.Scalar_Tensor fmod.Tensor fmod.Scalar
    bitwise_and.Scalar bitwise_and.Scalar_Tensor bitwise_or.Scalar bitwise_or.Scalar_Tensor bitwise_xor.Scalar
    bitwise_xor.Scalar_Tensor bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar
    bitwise_left_shift.Scalar_Tensor bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar
    bitwise_right_shift.Scalar_Tensor __and__.Scalar __or__.Scalar __xor__.Scalar __lshift__.Tensor
    __lshift__.Scalar __rshift__.Tensor __rshift__.Scalar
    eq.Scalar ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar
    less.Tensor less.Scalar less_equal.Tensor less_equal.Scalar greater.Tensor greater.Scalar
    greater_equal.Tensor greater_equal.Scalar not_equal.Scalar
    where.self where.ScalarSelf where.ScalarOther where.Scalar masked_fill.Scalar masked_fill.Tensor
"""
COMMUTATIVE = """
    add.Tensor mul.Tensor multiply.Tensor maximum minimum max.other min.other fmax fmin
    logical_and logical_or logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor
    __and__.Tensor __or__.Tensor __xor__.Tensor eq.Tensor ne.Tensor not_equal.Tensor gcd lcm
"""
TRANSCENDENTAL = """
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh
    arcsin arccos arctan arcsinh arccosh arctanh erf erfc erfinv lgamma digamma special_erf special_erfc
    special_erfinv special_exp2 special_expm1 special_log1p special_gammaln special_digamma special_psi i0
    special_i0 pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar float_power.Tensor_Scalar
    float_power.Tensor_Tensor float_power.Scalar atan2 arctan2
"""
TWO_STEPS = """
    lerp.Tensor lerp.Scalar addcmul addcdiv hardsigmoid elu celu selu sinc special_sinc isclose log_sigmoid
    ldexp.Tensor
"""
THREE_STEPS = """
    sigmoid special_expit hardswish softplus logit special_logit logaddexp logaddexp2 hypot xlogy.Tensor
    xlogy.Scalar_Self xlogy.Scalar_Other special_xlogy special_entr special_ndtr special_xlog1py
"""
SEVERAL_STEPS = {2: TWO_STEPS, 3: THREE_STEPS, 4: "silu", 5: "gelu mish"}
# The second tensor gives a dtype or a device, not values.
CASTS = "to.dtype to.dtype_layout to.device to.other type_as _to_copy"
QUANTIZATION = "fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine.tensor_qparams"

ROWS: dict[str, OpInfo] = {
    **rows(ARITHMETIC, elementwise()),
    **rows(COMMUTATIVE, elementwise(commutative=True)),
    **rows(TRANSCENDENTAL, elementwise()),
    **{name: info for work, names in SEVERAL_STEPS.items() for name, info in rows(names, elementwise(work)).items()},
    **rows(CASTS, OpInfo(Kind.ELEMENTWISE, Broadcast(("self",)), view=True)),
    **rows(QUANTIZATION, elementwise(4, operands=("self",))),
    **rows("fill.Scalar fill.Tensor", OpInfo(Kind.ELEMENTWISE, Broadcast())),
    **rows("prelu", OpInfo(Kind.ELEMENTWISE, Broadcast(("self",), per_channel=("weight",)), work=2)),
}
