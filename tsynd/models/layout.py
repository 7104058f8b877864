"""The order of weights in memory, changed for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["channels_last", "contiguous"]


@contextmanager
def _rearranged(parameters: list[nn.Parameter], rearrange: Callable[[Tensor], Tensor]) -> Iterator[None]:
    kept = [(p, p.data) for p in parameters]
    try:
        for parameter, data in kept:
            parameter.data = rearrange(data)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def channels_last(*modules: nn.Module) -> AbstractContextManager[None]:
    """Inside, the modules' 4-D and 5-D weights lie in channels-last order; the convolutions' results follow them.

    Values, parameters and their identity stay; afterwards the weights' own memory is back.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [p for module in modules for p in module.parameters() if p.dim() in layouts]
    return _rearranged(weights, lambda data: data.contiguous(memory_format=layouts[data.dim()]))


def contiguous(*modules: nn.Module) -> AbstractContextManager[None]:
    """Inside, the modules' weights lie in torch's plain order; afterwards their own memory is back.

    Copies: what is contiguous in both orders, as a 1 x 1 kernel is, would keep the other order's strides.
    """
    weights = [p for module in modules for p in module.parameters()]
    return _rearranged(weights, lambda data: data.clone(memory_format=torch.contiguous_format))
