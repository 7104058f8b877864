"""Files to go on from: nested values with tensors in them, as one safetensors file with a digest of its content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsynd.utils.atomic import durable
from tsynd.utils.errors import require
from tsynd.utils.fingerprint import hash_parts

__all__ = ["hash_tensors", "read_tensors", "write_tensors"]

_TENSOR = "tensor:"


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, texts, lists and dictionaries; the old file stays until the new one is on the disk."""
    held: dict[str, Tensor] = {}
    about = json.dumps(_put(content, "", held))
    saved: bytes = require("safetensors.torch", "models").save(
        held, metadata={"content": about, "digest": hash_parts(about, hash_tensors(held))}
    )
    with durable(path) as file:
        file.write(saved)


def read_tensors(path: Path) -> dict[str, Any] | None:
    """What was written; None where there is nothing, or it is damaged."""
    if not path.is_file():
        return None
    library = require("safetensors", "models")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if about.get("digest") != hash_parts(about.get("content", ""), hash_tensors(held)):
            return None
        return dict(_take(json.loads(about["content"]), held))
    except (library.SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def hash_tensors(held: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in the order of the names."""
    parts: list[str | memoryview] = []
    for name in sorted(held):
        value = held[name].detach().cpu().contiguous().reshape(-1)
        parts += [f"{name} {value.dtype} {list(held[name].shape)}", value.view(torch.uint8).numpy().data]
    return hash_parts(*parts)


def _put(value: Any, name: str, held: dict[str, Tensor]) -> Any:
    """The value with its tensors put among those that are held, and their names in their places."""
    if isinstance(value, Tensor):
        while name in held:
            name += "_"
        held[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return _TENSOR + name
    start = f"{name}." if name else ""
    if isinstance(value, dict):
        return {key: _put(item, f"{start}{key}", held) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_put(item, f"{start}{index}", held) for index, item in enumerate(value)]
    return value


def _take(value: Any, held: dict[str, Tensor]) -> Any:
    """What was given to :func:`_put`."""
    if isinstance(value, str) and value.startswith(_TENSOR):
        return held[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _take(item, held) for key, item in value.items()}
    return [_take(item, held) for item in value] if isinstance(value, list) else value
