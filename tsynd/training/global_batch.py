"""One batch over several processes that computes what one process would with the whole of it.

A process holds some rows of the batch. Inside :class:`GlobalBatch`, batch norm takes its statistics over all processes,
and whatever is random per image (dropout of any kind, ``rand``, ``randn``, ``rand_like``, ``randn_like`` with an image
per row) is drawn for the whole batch from a generator that all processes share, each keeping its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["GlobalBatch", "batch_variance", "sum_over_processes"]


class _Sum(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every process's result depends on every process's input."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of a tensor over all processes, differentiable."""
    return cast("Tensor", _Sum.apply(x))  # type: ignore[no-untyped-call]


class GlobalBatch(TorchFunctionMode):
    """Inside, tensors with one row per image of this process stand for those rows of a larger batch.

    Args:
        rows: int64 [n], which rows of the whole batch this process holds, ascending.
        total: rows of the whole batch.
    """

    active: ClassVar[GlobalBatch | None] = None

    def __init__(self, rows: Tensor, total: int) -> None:
        super().__init__()
        self.rows, self.total = rows, total
        self._before: GlobalBatch | None = None

    def __enter__(self) -> GlobalBatch:
        self._before, GlobalBatch.active = GlobalBatch.active, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        GlobalBatch.active = self._before
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PER_IMAGE and args[0].dim() and len(args[0]) == len(self.rows):
            return self._whole(func, args[0], *args[1:], **kwargs)
        if func in _DRAWN:
            size, drawn = self._size(args, kwargs)
            if size and size[0] == len(self.rows):
                return func([self.total, *size[1:]], **drawn)[self._at(drawn.get("device"))]
        if func is functional.batch_norm:
            return _batch_norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _at(self, device: Any) -> Tensor:
        return self.rows if device is None else self.rows.to(device)

    def _whole(self, func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Call with the whole batch's shape and keep this process's rows; the others' are zeros."""
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        wide = last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous()
        whole = torch.zeros((self.total, *x.shape[1:]), dtype=x.dtype, device=x.device)
        whole = whole.contiguous(memory_format=last if last is not None and wide else torch.contiguous_format)
        rows = self._at(x.device)
        return func(whole.index_copy_(0, rows, x), *args, **kwargs)[rows]

    @staticmethod
    def _size(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        rest = dict(kwargs)
        given = rest.pop("size", args[0] if args and isinstance(args[0], (tuple, list, torch.Size)) else args)
        return list(given), rest


_PER_IMAGE = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
    torch.rand_like,
    torch.randn_like,
}
_DRAWN = {torch.rand, torch.randn}


def _batch_norm(
    func: Callable[..., Any],
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Batch norm with the statistics of all processes' rows; as given outside training."""
    if not training:
        return func(x, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x if x.dtype == torch.float64 else x.float()
    local = torch.cat([wide.sum(axes), wide.new_tensor([x.numel() / x.shape[1]])])
    sums = sum_over_processes(local)
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = sum_over_processes(centred.square().sum(axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * (count / (count - 1).clamp_min(1))).to(running_var), momentum)
    out = centred * (variance + eps).rsqrt().view(shape)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    return out.to(x.dtype)


def batch_variance(x: Tensor) -> Tensor:
    """Unbiased variance [D] of the rows of [B, D]; inside a :class:`GlobalBatch` of all processes' rows."""
    if GlobalBatch.active is None:
        return x.var(0)
    total = GlobalBatch.active.total
    mean = sum_over_processes(x.sum(0)) / total
    return sum_over_processes((x - mean).square().sum(0)) / (total - 1)
