"""What a derivative or an operator of ours becomes when a program is recorded for ONNX: plain tensor operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from tsynd import ops, reference
from tsynd.errors import InputError
from tsynd.export.convolutions import Convolutions

__all__ = ["decompositions"]

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
            _aten.log1p.default: _log1p,
            _aten.expm1.default: _expm1,
            _ours.ascend_.default: reference.ascend_,
            _ours.head_uncertainty.default: _pair(reference.head_uncertainty),
            _ours.logits_uncertainty.default: _pair(reference.logits_uncertainty),
            _ours.dropout_mask.default: _mask,
            _ours.dropout_expand.default: _expand,
            _ours.dropout_gather.default: _gather,
        }
    )
    return table


def _log1p(x: Tensor) -> Tensor:
    # the file format has neither of the two; in double the plain formula keeps what float32 can hold
    return (x.double() + 1).log().to(x.dtype)


def _expm1(x: Tensor) -> Tensor:
    return (x.double().exp() - 1).to(x.dtype)


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


def _max_pool_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
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
