"""The order of weights in memory, changed for a while."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from tsynd.models.held import Held

__all__ = ["channels_last", "contiguous"]

_data = Held("data")


def channels_last(*modules: nn.Module) -> AbstractContextManager[None]:
    """Inside, the modules' 4-D and 5-D weights lie in channels-last order; the convolutions' results follow them.

    Values, parameters and their identity stay; afterwards the weights' own memory is back.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [p for module in modules for p in module.parameters() if p.dim() in layouts]
    return _data(weights, lambda data: data.contiguous(memory_format=layouts[data.dim()]))


def contiguous(*modules: nn.Module) -> AbstractContextManager[None]:
    """Inside, the modules' weights lie in torch's plain order; afterwards their own memory is back.

    Copies: what is contiguous in both orders, as a 1 x 1 kernel is, would keep the other order's strides.
    """
    weights = [p for module in modules for p in module.parameters()]
    return _data(weights, lambda data: data.clone(memory_format=torch.contiguous_format))
