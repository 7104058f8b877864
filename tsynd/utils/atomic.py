"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from tsynd.utils.errors import InputError

__all__ = ["atomic_path", "check_writable", "save_npz"]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")


def check_writable(path: str | Path) -> None:
    """Make the folder of a file to come and try to write there, so that it fails before the work and not after.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    path = Path(path).expanduser()
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot write in its folder ({error.strerror})") from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write a file or folder at; renamed on success, else deleted.

    Missing parent folders are made. The temporary name keeps the suffix and starts with a dot.

    Raises:
        InputError: the folder cannot be written to, or `path` cannot be replaced.
    """
    path = Path(path).expanduser()
    check_writable(path)
    temporary = _temporary(path)
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be replaced ({error.strerror})") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def save_npz(path: str | Path, /, **arrays: object) -> None:
    """Write tensors, arrays or sequences as a compressed .npz, whole or not at all.

    Raises:
        InputError: an array would need pickle, or the folder cannot be written to.
    """
    plain = {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()}
    if bad := [key for key, array in plain.items() if array.dtype.hasobject]:
        raise InputError(f"{bad[0]}: an array of Python objects; wanted numbers or strings")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **plain)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
