"""The folder of a job in stages: what it belongs to and how far it has come, so that it can be resumed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tsynd.utils.atomic import FolderLock, atomic_path, clear_leftovers
from tsynd.utils.errors import InputError
from tsynd.utils.fingerprint import differences, hash_file, is_sealed, seal

__all__ = ["STATE", "Job"]

STATE = ".training"
"""Ends the name of a file in which an unfinished stage keeps its state, beside the file that it makes."""


class Job:
    """An output folder that belongs to one set of settings and remembers its finished stages.

    Use it in a ``with`` block: the folder is this process's until the block ends.

    Args:
        folder: new, empty, or that of the same job interrupted.
        fingerprint: everything that decides the result, JSON-able.
        alone: refuse a second process; False for the processes of one job but its first.

    Raises:
        InputError: the folder holds something else, a damaged job or one with another fingerprint, another process is
            at work there, or it cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], alone: bool = True) -> None:
        self.folder = folder
        self._path = folder / "job.json"
        self._state: dict[str, Any] = {"fingerprint": fingerprint, "stages": {}, "files": {}}
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output: {folder} is a file, wanted a new or empty folder")
        # what a killed process left is hidden
        if not self._path.exists() and folder.exists() and any(p.name[0] != "." for p in folder.iterdir()):
            raise InputError(f"output: {folder} is not empty and holds no tsynd run, wanted a new or empty folder")
        self._lock = FolderLock(folder) if alone else None
        try:
            if self._path.exists():
                self._resume(fingerprint)
            if alone:
                clear_leftovers(folder)
                self._write()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()

    def _resume(self, fingerprint: dict[str, Any]) -> None:
        try:
            state = json.loads(self._path.read_bytes())
            then: dict[str, Any] = state["fingerprint"]
            changes = differences(then, fingerprint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            state, changes = None, ""
        if changes:
            raise InputError(
                f"output: {self.folder} holds a run with other settings ({changes}); wanted another folder"
            )
        if not is_sealed(state):
            raise InputError(
                f"output: {self._path} is damaged, so what the folder holds cannot be trusted; delete the folder "
                f"{self.folder} and start again, or take another"
            )
        self._state = state

    def _write(self) -> None:
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(seal(self._state), indent=1), encoding="utf-8")

    def check_folder(self) -> None:
        """Raise :class:`InputError` where the folder was removed since the job began."""
        if not self._path.exists():
            raise InputError(f"output: {self.folder} was removed or emptied while the job was at work in it")

    def stage(self, name: str, file: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Make a file unless an earlier call of the same job did; return what ``make`` said about it.

        A file that is gone or not as it was written is made again, and so is what later stages made of it. A stage's
        state is removed when it is finished or made again.
        """
        self.check_folder()
        path = self.folder / file
        stages, files = self._state["stages"], self._state["files"]
        if name in stages:
            if files.get(name) == _hashes(path):
                known: dict[str, Any] = stages[name]
                return known
            warnings.warn(f"output: {path} is gone or damaged: made again, and what came after it", stacklevel=2)
            for later in [*stages][[*stages].index(name) :]:
                del stages[later]
                files.pop(later, None)
            for state in self.folder.glob(f"*{STATE}"):
                state.unlink()
            self._write()
        start = time.perf_counter()
        facts = make(path)
        facts["seconds"] = round(time.perf_counter() - start, 2)
        self.check_folder()
        path.with_suffix(STATE).unlink(missing_ok=True)
        stages[name], files[name] = facts, _hashes(path)
        self._write()
        return facts

    @property
    def seconds(self) -> dict[str, float]:
        """Time of every stage."""
        return {name: facts["seconds"] for name, facts in self._state["stages"].items()}


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a stage's file, and of the JSON beside it where there is one."""
    found = (one for one in dict.fromkeys((path, path.with_suffix(".json"))) if one.is_file())
    return {one.name: hash_file(one) for one in found}
