"""Transposed convolutions and the input's derivative of a convolution, as plain convolutions.

onnxruntime's ConvTranspose takes up to fifteen times as long on a CPU as its Conv of the same arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Convolutions"]

_convolve = torch.ops.aten.convolution


class Convolutions:
    """Decompositions that share the rearranged weights of one recording."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> Any:
        """A transposed convolution in plain ones; NotImplemented (leave it as it is) for any other."""
        if not transposed:
            return NotImplemented
        return self._spread(x, weight, bias, stride, padding, dilation, output_padding, groups)

    def backward(
        self,
        gradient: Tensor,
        x: Tensor,
        weight: Tensor,
        bias_sizes: Any,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
        wanted: list[bool],
    ) -> tuple[Tensor | None, None, None]:
        """Parameters are frozen: the input's gradient alone, a convolution with ``transposed`` flipped."""
        if not wanted[0]:
            return None, None, None
        rank = len(stride)
        if transposed:
            return _convolve(gradient, weight, None, stride, padding, dilation, False, [0] * rank, groups), None, None
        rest = [
            x.shape[2 + i]
            - ((gradient.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight.shape[2 + i] - 1) + 1)
            for i in range(rank)
        ]
        back = self._spread(gradient, weight, None, stride, padding, dilation, rest, groups)
        if back is NotImplemented:
            back = _convolve(gradient, weight, None, stride, padding, dilation, True, rest, groups)
        return back, None, None

    def _spread(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        output_padding: list[int],
        groups: int,
    ) -> Any:
        """Transposed convolution of x [B, I, ...] with weight [I, O / groups, ...], or NotImplemented.

        With stride 1: a convolution with the weight mirrored. With stride s in 2-D: the outputs o = q s + r of each of
        the s x s remainders r are a convolution of their own; all are one with s * s times as many channels, which
        are then dealt out (Shi et al., 2016).
        """
        rank, kernel, step = len(stride), list(weight.shape[2:]), stride[0]
        if all(s == 1 for s in stride) and not any(output_padding):
            around = [dilation[i] * (kernel[i] - 1) - padding[i] for i in range(rank)]
            if min(around) < 0:
                return NotImplemented
            mirrored = self._rearranged(weight, _mirror, groups)
            return _convolve(x, mirrored, bias, stride, around, dilation, False, [0] * rank, groups)
        if rank != 2 or stride[1] != step or max(dilation) > 1 or groups > 1:
            return NotImplemented
        windows = [_window(kernel[i], step, padding[i]) for i in range(2)]
        dealt = self._rearranged(weight, _deal, step, *windows)
        biases = None if bias is None else self._rearranged(bias, Tensor.repeat_interleave, step * step)
        sizes = [(x.shape[2 + i] - 1) * step - 2 * padding[i] + kernel[i] + output_padding[i] for i in range(2)]
        pads = []
        for i, (first, taps) in enumerate(windows):
            last = -(-sizes[i] // step) - x.shape[2 + i] + first + len(taps[0]) - 1
            pads += [-first, last]
        around = [0, 0]
        if pads[0] == pads[1] >= 0 and pads[2] == pads[3] >= 0:
            around = [pads[0], pads[2]]
        else:
            x = torch.ops.aten.constant_pad_nd(x, [*pads[2:], *pads[:2]])
        phases = _convolve(x, dealt, biases, [1, 1], around, [1, 1], False, [0, 0], 1)
        full = torch.ops.aten.pixel_shuffle(phases, step)
        for i in range(2):
            if sizes[i] != full.shape[2 + i]:
                full = full.narrow(2 + i, 0, sizes[i])
        return full

    def _rearranged(self, weight: Tensor, make: Callable[..., Tensor], *how: Any) -> Tensor:
        """The rearranged weight as a constant of the program, made once."""
        key = (id(weight), make, *how)
        if key not in self._made:
            with _disable_current_modes():
                # the original is kept beside it: an id is unique among living objects only
                self._made[key] = (weight, make(weight.detach(), *how))
        return self._made[key][1]


def _mirror(weight: Tensor, groups: int) -> Tensor:
    """[I, O / groups, ...] -> [O, I / groups, ...], turned around."""
    split = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return split.flip(list(range(2, weight.dim()))).contiguous()


Window = tuple[int, tuple[tuple[int, ...], ...]]


def _window(kernel: int, step: int, padding: int) -> Window:
    """What output q step + r takes from along one axis: x[q + first], x[q + first + 1], ...

    Returns:
        First, and for each remainder r the kernel's tap at every place of the window (``kernel`` where there is none):
        input q + t meets tap r + padding - t step.
    """
    places = [t for r in range(step) for t in range(-kernel, kernel + padding) if 0 <= r + padding - t * step < kernel]
    first = min(places)
    taps = [[r + padding - t * step for t in range(first, max(places) + 1)] for r in range(step)]
    return first, tuple(tuple(k if 0 <= k < kernel else kernel for k in row) for row in taps)


def _deal(weight: Tensor, step: int, rows: Window, columns: Window) -> Tensor:
    """[I, O, h, w] -> [O * step * step, I, window, window]."""
    full = torch.nn.functional.pad(weight, (0, 1, 0, 1))  # the tap that is none
    picked = full[:, :, torch.tensor(rows[1])][..., torch.tensor(columns[1])]  # [I, O, step, rows, step, columns]
    return picked.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).contiguous()
