"""Files that appear whole or not at all, and folders that one process writes to at a time."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from tsynd.utils.errors import InputError

try:
    import fcntl
except ImportError:  # not on POSIX: no locks there
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock", "atomic_path", "check_writable", "clear_leftovers", "durable", "save_npz"]

# .NAME-MACHINE-PROCESS-RANDOM.SUFFIX; before 0.2 without an owner
_TEMPORARY = re.compile(r"\.(?P<name>.+?)(?:-(?P<machine>[0-9a-f]{8})-(?P<process>\d+))?-[0-9a-f]{8}(?:\.\w+)?")
_FOREIGN_SECONDS = 86400.0  # what another machine left is believed dead after a day


@cache
def _machine() -> str:
    """Where process numbers mean the same: a machine since it started, or a container on it."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text(encoding="utf-8"))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files in a folder that processes left which live no longer; what is being written stays.

    Args:
        folder: not searched further down.
        name: of the file to come, without its suffix; None takes all.
    """
    with suppress(OSError):
        for path in [*folder.iterdir()]:
            match = _TEMPORARY.fullmatch(path.name)
            if match is None or (name is not None and match["name"] != name):
                continue
            with suppress(OSError):
                if match["machine"] is None:
                    dead = name is not None
                elif match["machine"] == _machine():
                    dead = not _lives(int(match["process"]))
                else:
                    dead = time.time() - path.stat().st_mtime > _FOREIGN_SECONDS
                if dead:
                    _remove(path)


class FolderLock:
    """One process works in a folder at a time; the system gives the lock back however that process ends.

    Args:
        folder: made where it is not there.

    Raises:
        InputError: another process works there (its number and machine are named), or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        check_writable(self._path)
        self._handle: int | None = None
        while self._handle is None:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if fcntl is not None:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                    os.close(handle)
                    raise InputError(
                        f"output: {owner} is at work in {folder}; wanted one process at a time: wait for it, or take "
                        "another folder"
                    ) from None
                # a file system without locks
            try:
                same = os.path.samestat(os.fstat(handle), os.stat(self._path))
            except FileNotFoundError:
                same = False
            if same:
                self._handle = handle
            else:  # the owner before took the file away in between
                os.close(handle)
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def close(self) -> None:
        """Give the folder back."""
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


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
        _remove(temporary)


@contextmanager
def durable(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write as by :func:`atomic_path`, whose content is on the disk before it takes its name."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def save_npz(path: str | Path, /, **arrays: object) -> None:
    """Write tensors, arrays or sequences as a compressed .npz, whole or not at all.

    Raises:
        InputError: an array would need pickle, or the folder cannot be written to.
    """
    plain = {k: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in arrays.items()}
    if bad := [key for key, array in plain.items() if array.dtype.hasobject]:
        raise InputError(f"{bad[0]}: an array of Python objects; wanted numbers or strings")
    with durable(path) as file:
        np.savez_compressed(file, **plain)  # type: ignore[arg-type]
