"""What a derivative or an operator of ours becomes when a program is recorded for ONNX: plain tensor operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from tsynd.ops import operators as ops
from tsynd.ops import reference
from tsynd.utils.errors import InputError

__all__ = ["Convolutions", "decompositions"]

_aten = torch.ops.aten
_ours = torch.ops.tsynd


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator overload -> function of plainer operators, for ``make_fx``."""
    convolutions = Convolutions()
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    for known in (_aten._prelu_kernel.default, _aten.pixel_shuffle.default):  # the format has them
        table.pop(known, None)
    table.update(get_decompositions([_aten.native_group_norm, _aten.native_layer_norm, _aten.gelu, _aten.silu]))
    table.update(
        {
            _aten.convolution.default: convolutions.forward,
            _aten.convolution_backward.default: convolutions.backward,
            _aten.threshold_backward.default: _threshold_backward,
            _aten._prelu_kernel_backward.default: _prelu_backward,
            _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
            _aten.avg_pool2d_backward.default: _average_pool_backward,
            _aten._adaptive_avg_pool2d.default: _adaptive_pool,
            _aten._adaptive_avg_pool2d_backward.default: _adaptive_pool_backward,
            _aten.upsample_nearest2d.default: _nearest,
            _aten.upsample_nearest2d.vec: _nearest_vec,
            _aten.upsample_nearest2d_backward.default: _nearest_backward,
            # the format has neither of the two; in double the plain formula keeps what float32 can hold
            _aten.log1p.default: lambda x: (x.double() + 1).log().to(x.dtype),
            _aten.expm1.default: lambda x: (x.double().exp() - 1).to(x.dtype),
            _ours.ascend_.default: reference.ascend_,
            _ours.head_uncertainty.default: _pair(reference.head_uncertainty),
            _ours.logits_uncertainty.default: _pair(reference.logits_uncertainty),
            _ours.dropout_mask.default: _mask,
            _ours.dropout_expand.default: _expand,
            _ours.dropout_gather.default: _gather,
        }
    )
    return table


def _pair(twin: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        value, gradient = twin(*arguments)
        return value.float(), gradient

    return run


def _mask(units: int, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    """The mask itself, as a constant: shared masks depend on nothing that the program is given."""
    if sample_ids.shape[0] != 1:
        raise InputError("masks: got 'independent', wanted 'shared': a mask per image cannot be a constant of a file")
    with _disable_current_modes():
        return ops.dropout_mask(units, p, samples, seed, layer, torch.zeros(1, dtype=torch.int64))


def _scale(units: int, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor) -> Tensor:
    mask = _mask(units, p, samples, seed, layer, sample_ids)
    with _disable_current_modes():
        return mask.unsqueeze(-1).float() * (256.0 / reference.keep_count(p))


def _expand(
    x: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    spread = x.reshape(samples, -1, *x.shape[1:]) if passes else x.unsqueeze(0)
    return (spread * _scale(x.shape[1], p, samples, seed, layer, sample_ids)).flatten(0, 1)


def _gather(
    gradient: Tensor, p: float, samples: int, seed: int, layer: int, sample_ids: Tensor, passes: bool = False
) -> Tensor:
    spread = gradient.reshape(samples, -1, *gradient.shape[1:])
    masked = spread * _scale(gradient.shape[1], p, samples, seed, layer, sample_ids)
    return masked.flatten(0, 1) if passes else masked.sum(0)


# Products with 0 and 1 instead of a choice: onnxruntime's Where, and casts of truths, take several times as long.


def _positive(x: Tensor) -> Tensor:
    """1 where x > 0 (by more than 1e-38), else 0; a NaN stays one."""
    return (x * 3e38).clamp(0, 1)


def _threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    return gradient * _positive(x - threshold if threshold else x)


def _prelu_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    positive = _positive(x)
    return gradient * (positive * (1 - weight) + weight), torch.zeros_like(weight)


def _max_pool_backward(gradient: Tensor, x: Tensor, *pooling: Any) -> Tensor:
    indices = pooling[-1]  # behind kernel, stride, padding, dilation and ceil_mode
    flat = torch.zeros_like(x).flatten(2)
    return flat.scatter_add(2, indices.flatten(2), gradient.flatten(2)).reshape(x.shape)


def _separable(pool: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Matrix [out, size] of a linear map along one axis, found by mapping the unit vectors."""
    with _disable_current_modes():
        return pool(torch.eye(size)[None, :, :, None])[0, :, :, 0].t().contiguous()


def _along(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A matrix [height, out] along the third axis and one [width, out] along the fourth."""
    batch, channels, height, width = x.shape
    # plain products of matrices: matmul of more axes would take the batch size for a constant
    across = (x.reshape(-1, width) @ columns).reshape(batch, channels, height, -1).transpose(2, 3)
    both = (across.reshape(-1, height) @ rows).reshape(batch, channels, columns.shape[1], -1)
    return both.transpose(2, 3)


def _average_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    include_pad: bool,
    divisor: int | None,
) -> Tensor:
    stride = stride or kernel

    def axis(i: int) -> Tensor:
        def pool(eye: Tensor) -> Tensor:
            return functional.avg_pool2d(eye, (kernel[i], 1), (stride[i], 1), (padding[i], 0), ceil_mode, include_pad)

        return _separable(pool, x.shape[2 + i])

    back = _along(gradient, axis(0), axis(1))
    return back if divisor is None else back * (kernel[0] * kernel[1] / divisor)


def _adaptive_matrices(x: Tensor, sizes: Any) -> tuple[Tensor, Tensor]:
    def axis(size: int, out: int) -> Tensor:
        return _separable(lambda eye: functional.adaptive_avg_pool2d(eye, (out, 1)), size)

    return axis(x.shape[-2], sizes[0]), axis(x.shape[-1], sizes[1])


def _adaptive_pool(x: Tensor, sizes: list[int]) -> Tensor:
    rows, columns = _adaptive_matrices(x, sizes)
    return _along(x, rows.t(), columns.t())


def _adaptive_pool_backward(gradient: Tensor, x: Tensor) -> Tensor:
    rows, columns = _adaptive_matrices(x, gradient.shape[-2:])
    return _along(gradient, rows, columns)


def _factors(small: Any, large: Any) -> tuple[int, int]:
    if large[0] % small[0] or large[1] % small[1]:
        raise InputError(f"upsampling: got {list(small)} to {list(large)}, wanted whole factors")
    return large[0] // small[0], large[1] // small[1]


def _nearest(x: Tensor, sizes: Any, scale_h: float | None = None, scale_w: float | None = None) -> Tensor:
    batch, channels, height, width = x.shape
    down, right = _factors((height, width), sizes)
    spread = x.reshape(batch, channels, height, 1, width, 1).expand(batch, channels, height, down, width, right)
    return spread.reshape(batch, channels, height * down, width * right)


def _nearest_vec(x: Tensor, sizes: Any, scales: Any) -> Tensor:
    if sizes is None:
        sizes = [int(x.shape[2 + i] * scales[i]) for i in range(2)]
    return _nearest(x, sizes)


def _nearest_backward(
    gradient: Tensor, sizes: Any, input_size: Any, scale_h: float | None = None, scale_w: float | None = None
) -> Tensor:
    batch, channels, height, width = input_size
    down, right = _factors((height, width), sizes)
    return gradient.reshape(batch, channels, height, down, width, right).sum((3, 5))


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
