"""A user's own file of weights, read into a network: safetensors, or an older PyTorch file without its pickled code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.utils.errors import InputError, require

__all__ = ["load_weights", "read_weights"]

_LEGACY = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name.

    Raises:
        InputError: a file that is missing, torn, or no weights.

    Warns:
        UserWarning: an older PyTorch file; it is read with ``weights_only=True``, which runs none of its code.
    """
    if not path.is_file():
        raise InputError(f"weights: {path}: no such file, wanted .safetensors or {', '.join(_LEGACY)}")
    if path.suffix == ".safetensors":
        library = require("safetensors", "models")
        try:
            held: Any = require("safetensors.torch", "models").load_file(str(path))
        except (library.SafetensorError, OSError) as error:
            raise InputError(f"weights: {path}: torn, or no safetensors file: {error}") from error
    elif path.suffix in _LEGACY:
        warnings.warn(
            f"{path.name}: an older PyTorch file, read with weights_only=True; safetensors files are checked and safer",
            stacklevel=2,
        )
        try:
            held = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split(".")[0].split())[:160]
            raise InputError(f"weights: {path}: torn, or not weights alone ({reason}); wanted a state_dict") from error
    else:
        raise InputError(f"weights: {path}: wanted a name that ends in .safetensors or {', '.join(_LEGACY)}")
    for key in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"weights: {path}: holds {type(held).__name__}, wanted tensors by name (a state_dict)")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in held):
            held = {key.removeprefix(prefix): value for key, value in held.items()}
    return dict(held)


def load_weights(network: nn.Module, path: Path) -> None:
    """Put a file's tensors into a network; all must be there and fit.

    Raises:
        InputError: names or shapes that are others than the network's, or values that are not finite.
    """
    held, wanted = read_weights(path), network.state_dict()
    missing = [key for key in wanted if key not in held]
    unknown = [key for key in held if key not in wanted]
    if missing or unknown:
        faults = [
            f"{len(keys)} {text} ({keys[0]}, ...)"
            for keys, text in ((missing, "missing"), (unknown, "unknown"))
            if keys
        ]
        raise InputError(f"weights: {path} is not of {type(network).__name__}: {' and '.join(faults)} of {len(wanted)}")
    for key, value in held.items():
        shape = list(wanted[key].shape)
        if list(value.shape) != shape:
            kind = type(network).__name__
            raise InputError(f"weights: {path}: {key} is {list(value.shape)}, wanted {shape} of the {kind}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(f"weights: {path}: {key} holds values that are not finite")
    network.load_state_dict(held)
