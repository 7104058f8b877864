"""Hashes of content and of settings, and what tells two jobs apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from tsynd.utils.version import __version__

__all__ = [
    "differences",
    "fingerprint",
    "hash_file",
    "hash_parts",
    "is_sealed",
    "plain_settings",
    "read_sealed",
    "seal",
]


_BLOCK = 2**20


def hash_parts(*parts: str | bytes | memoryview) -> str:
    """SHA-256 of the parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        size = content.nbytes if isinstance(content, memoryview) else len(content)
        digest.update(f"{size}:".encode())
        digest.update(content)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def plain_settings(settings: Any) -> dict[str, Any]:
    """A dataclass with a field ``reading`` of this kind as a JSON-able dict; ``reading`` only where it is not as usual.

    So a job of before the options were there can still be resumed.
    """
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(settings).items() if key != "reading"}
    return values | ({"reading": given} if (given := settings.reading.given()) else {})


def fingerprint(settings: Any, data: Sequence[Tensor], **parts: Any) -> dict[str, Any]:
    """What a job belongs to: the version, the content of its data and its settings.

    Args:
        settings: see :func:`plain_settings`.
        data: tensors on the CPU; shape, type and content count.
        parts: more, JSON-able; they go before settings of the same name.
    """
    content: list[str | memoryview] = []
    for tensor in data:
        content += [f"{tensor.dtype} {list(tensor.shape)}", tensor.contiguous().numpy().data]
    return {"tsynd": __version__, "data": hash_parts(*content)[:16], **plain_settings(settings), **parts}


def differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """``KEY THEN → NOW, ...`` for what differs between two fingerprints, as JSON reads them; empty for the same."""
    now = json.loads(json.dumps(now))
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return ", ".join(f"{key} {then.get(key)!r} → {now.get(key)!r}" for key in keys)


def _digest_of(content: dict[str, Any]) -> str:
    return hash_parts(json.dumps({key: value for key, value in content.items() if key != "digest"}, sort_keys=True))


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """A JSON-able object with a digest of its own, for files that are read back to go on from."""
    return content | {"digest": _digest_of(content)}


def is_sealed(content: Any) -> bool:
    """Whether what was read is what :func:`seal` gave."""
    return isinstance(content, dict) and content.get("digest") == _digest_of(content)


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What :func:`seal` gave, from a JSON file; None where there is none, or a damaged one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if is_sealed(content) else None
