"""Windows and Fourier transforms. Complex numbers are pairs in a last axis of size two."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.frontends.onnx.dtypes import to_dtype
from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.values import refuse


def _window(name: str, make: Callable[[int, bool], Tensor]) -> None:
    def run(size: int, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
        return make(size, bool(periodic)).to(to_dtype(output_datatype))

    operator(name, since=17)(run)


_window("HannWindow", lambda n, periodic: torch.hann_window(n, periodic, dtype=torch.float64))
_window(
    "HammingWindow",
    lambda n, periodic: torch.hamming_window(n, periodic, alpha=25 / 46, beta=21 / 46, dtype=torch.float64),
)
_window("BlackmanWindow", lambda n, periodic: torch.blackman_window(n, periodic, dtype=torch.float64))


@operator("DFT", since=17, until=19)
def dft_attribute(
    x: Tensor, dft_length: int | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Tensor:
    return dft(x, dft_length, axis, inverse=inverse, onesided=onesided)


@operator("DFT", since=20)
def dft(
    x: Tensor, dft_length: int | None = None, axis: int | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """x [..., 1] real or [..., 2] complex; the inverse is divided by the length."""
    axis = (-2 if axis is None else axis) % x.ndim
    if axis == x.ndim - 1:
        raise refuse("the transform along the axis of real and imaginary parts")
    values = torch.view_as_complex(x.contiguous()) if x.shape[-1] == 2 else x[..., 0]
    if inverse and onesided:
        real: Tensor = torch.fft.irfft(values, dft_length, axis)
        return real.unsqueeze(-1)
    result = (torch.fft.ifft if inverse else torch.fft.fft)(values, dft_length, axis)
    if onesided:
        result = result.narrow(axis, 0, result.shape[axis] // 2 + 1)
    return torch.view_as_real(result)


@operator("STFT", since=17)
def stft(
    signal: Tensor, frame_step: int, window: Tensor | None = None, frame_length: int | None = None, *, onesided: int = 1
) -> Tensor:
    """signal [batch, time, 1 or 2] -> [batch, frames, bins, 2]."""
    length = frame_length if frame_length is not None else window.shape[0] if window is not None else None
    if length is None:
        raise refuse("neither a window nor a frame length is given")
    values = torch.view_as_complex(signal.contiguous()) if signal.ndim == 3 and signal.shape[-1] == 2 else signal
    values = values.squeeze(-1) if values.ndim == 3 else values
    frames = values.unfold(1, length, frame_step)
    result = torch.fft.fft(frames if window is None else frames * window)
    if onesided:
        result = result.narrow(-1, 0, length // 2 + 1)
    return torch.view_as_real(result)
