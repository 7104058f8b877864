"""Devices, checked once."""

from __future__ import annotations

import torch

from tsynd.utils.errors import InputError

__all__ = ["resolve_device"]


def resolve_device(device: torch.device | str) -> torch.device:
    """The device, tried once.

    Raises:
        InputError: it does not exist or cannot be used here.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device: got {str(device)!r}, which cannot be used here: {reason}") from None
    return target
