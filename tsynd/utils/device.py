"""Devices, checked once."""

from __future__ import annotations

import torch
from torch import nn

from tsynd.utils.errors import InputError, first_line

__all__ = ["device_of", "out_of_memory", "place", "resolve_device"]

# how allocators and libraries say it: torch's and the C++ library's, oneDNN's, cuBLAS's and cuDNN's
_SHORT = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "could not create a primitive",
    "could not create a memory",
    "status_alloc_failed",
)


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device, tried once; None takes a GPU where there is one.

    Raises:
        InputError: it does not exist or cannot be used here.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: got {str(device)!r}, which cannot be used here: {first_line(error)}") from None
    return target


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, in the words of whichever library ran."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORT)


def device_of(*models: object) -> torch.device:
    """Where the first parameter of the modules among the models is; the CPU where there is none."""
    parameters = (p for model in models if isinstance(model, nn.Module) for p in model.parameters())
    return next((p.device for p in parameters), torch.device("cpu"))


def place(device: torch.device | str | None, *models: object) -> torch.device:
    """Move the modules among the models to a device, None: to that of the first, and tell which it is.

    Raises:
        InputError: the device cannot be used.
    """
    target = device_of(*models) if device is None else resolve_device(device)
    for model in models:
        if isinstance(model, nn.Module):
            model.to(target)
    return target
