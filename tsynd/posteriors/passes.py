"""General tails a few images at a time: the memory of T passes over a batch does not grow with T or the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tsynd.posteriors.runner import measured

__all__ = ["Passes", "images_at_once", "passes_logits", "passes_uncertainty", "undivided"]

Passes = Callable[[slice, tuple[Tensor, ...]], Tensor]
"""(images' positions in the batch, their part of the inputs) -> logits [T, images, C]."""

# Values that the passes' inputs are expanded to at once. On a CPU about what its caches hold, on a GPU enough to
# fill it; all activations of a tail are a small multiple of that.
_CPU_VALUES, _CUDA_VALUES = 2**22, 2**26


_undivided: ContextVar[bool] = ContextVar("undivided", default=False)


@contextmanager
def undivided() -> Iterator[None]:
    """Inside, batches are not divided, so that a recording holds for any batch size."""
    token = _undivided.set(True)
    try:
        yield
    finally:
        _undivided.reset(token)


def images_at_once(inputs: tuple[Any, ...], samples: int, weight: int = 1) -> int | None:
    """How many images go through the T passes at once: a power of two, so that all parts of a batch are alike.

    None where batches are not to be divided.

    Args:
        inputs: what the passes start from; the whole batch at once unless all are tensors of one leading size.
        samples: T.
        weight: values that the passes hold per value of the inputs, in multiples of a common tail's.
    """
    if _undivided.get():
        return None
    if not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == len(inputs[0]) for x in inputs):
        return max(1, max((len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0), default=1))
    values = samples * weight * sum(x[0].numel() for x in inputs)
    budget = _CUDA_VALUES if inputs[0].is_cuda else _CPU_VALUES
    return int(min(len(inputs[0]), 2 ** max(0, (budget // values).bit_length() - 1)))


def passes_logits(run: Passes, inputs: tuple[Any, ...], at_once: int | None) -> Tensor:
    """Logits [T, B, C], differentiable; where a batch takes several parts, backward runs each of them again.

    Args:
        run: see :data:`Passes`.
        inputs: what the passes start from.
        at_once: see :func:`images_at_once`.
    """
    if at_once is None or len(parts := _parts(inputs, at_once)) == 1:
        return run(slice(None), inputs)
    if not torch.is_grad_enabled():
        return torch.cat([run(part, tuple(x[part] for x in inputs)) for part in parts], 1)
    logits = [
        checkpoint(run, part, tuple(x[part] for x in inputs), use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]
    return torch.cat(logits, 1)


def passes_uncertainty(run: Passes, inputs: tuple[Any, ...], at_once: int | None, objective: str, task: str) -> Tensor:
    """Uncertainty [B], its gradient with respect to the inputs made along with it, part by part.

    So one part's activations are held at once and nothing is run twice. No gradient flows to parameters.

    Args:
        run: see :data:`Passes`.
        inputs: what the passes start from.
        at_once: see :func:`images_at_once`.
        objective: as in :func:`tsynd.ops.logits_uncertainty`.
        task: as in :func:`tsynd.ops.logits_uncertainty`.
    """
    if at_once is None:
        return measured(run(slice(None), inputs), objective, task)[0]
    out: Tensor = _PassesUncertainty.apply(run, at_once, objective, task, *inputs)  # type: ignore[no-untyped-call]
    return out


def _parts(inputs: tuple[Any, ...], at_once: int) -> list[slice]:
    count = max((len(x) for x in inputs if isinstance(x, Tensor) and x.dim() > 0), default=0)
    return [slice(start, start + at_once) for start in range(0, max(1, count), at_once)]


class _PassesUncertainty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Passes, at_once: int, objective: str, task: str, *inputs: Any) -> Tensor:
        wanted = ctx.needs_input_grad[4:]
        parts, values = _parts(inputs, at_once), []
        slopes: list[list[Tensor]] = [[] for need in wanted if need]
        for part in parts:
            own = [x if len(parts) == 1 else x[part] for x in inputs]
            own = [x.detach() if isinstance(x, Tensor) else x for x in own]
            leaves = [x.requires_grad_(True) for x, need in zip(own, wanted, strict=True) if need]
            with torch.set_grad_enabled(bool(leaves)):
                logits = run(slice(None) if len(parts) == 1 else part, tuple(own))
            value, slope = measured(logits.detach(), objective, task)
            values.append(value)
            if slopes:
                found = torch.autograd.grad(logits, leaves, slope, allow_unused=True)
                for all_, leaf, gradient in zip(slopes, leaves, found, strict=True):
                    all_.append(torch.zeros_like(leaf) if gradient is None else gradient)
            del logits, slope
        ctx.needs = wanted
        ctx.save_for_backward(*(x[0] if len(x) == 1 else torch.cat(x) for x in slopes))
        return values[0] if len(values) == 1 else torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        slopes = iter(ctx.saved_tensors)
        scaled: list[Tensor | None] = []
        for need in ctx.needs:
            if not need:
                scaled.append(None)
                continue
            slope = next(slopes)
            scaled.append((slope * upstream.reshape([-1] + [1] * (slope.dim() - 1))).to(slope.dtype))
        return (None, None, None, None, *scaled)
