"""The order of weights in memory, in copies: a network's own stay where they are for whoever else runs it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tsynd.fx.tracing import private_copy

__all__ = ["LaidOut", "Order", "channels_last", "contiguous"]

Order: TypeAlias = Callable[[Tensor], Tensor]
"""A weight -> itself, or a copy in another order."""


def channels_last(weight: Tensor) -> Tensor:
    """4-D and 5-D weights in channels-last order; the convolutions' results follow them."""
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    return weight if layout is None else weight.contiguous(memory_format=layout)


def contiguous(weight: Tensor) -> Tensor:
    """Torch's plain order, in its strides too: a 1 x 1 kernel is contiguous in both orders."""
    plain = torch.empty(weight.shape, device="meta").stride()
    return weight if weight.stride() == plain else weight.clone(memory_format=torch.contiguous_format)


class LaidOut:
    """A frozen network in modules of its own, whose weights lie in another order; buffers are shared.

    Args:
        network: stays as it is.
        order: see :data:`Order`.

    Attributes:
        module: computes what ``network`` does, with the weights as they were at the last :meth:`refresh`.
    """

    def __init__(self, network: nn.Module, order: Order) -> None:
        self.module: Any = private_copy(network)
        self._order = order
        parts = [part for part in self.module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        self._weights = [(part, part._parameters) for part in parts]
        self.refresh()

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        laid: dict[int, nn.Parameter | None] = {id(None): None}
        # looked at once: a thread that folds the same network puts other tensors in their place meanwhile
        held = [(part, dict(weights)) for part, weights in self._weights]
        for part, weights in held:
            for weight in weights.values():
                if weight is not None and id(weight) not in laid:
                    copied = self._order(weight.detach())
                    moved = copied.data_ptr() != weight.data_ptr() or copied.stride() != weight.stride()
                    laid[id(weight)] = nn.Parameter(copied, requires_grad=False) if moved else weight
            vars(part)["_parameters"] = {name: laid[id(weight)] for name, weight in weights.items()}
