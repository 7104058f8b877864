"""The folder of a job in stages: what it belongs to and how far it has come, so that it can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError
from tsynd.utils.fingerprint import differences

__all__ = ["Job"]


class Job:
    """An output folder that belongs to one set of settings and remembers its finished stages.

    Args:
        folder: new, empty, or that of the same job interrupted.
        fingerprint: everything that decides the result, JSON-able.

    Raises:
        InputError: the folder holds something else, or a job with another fingerprint, or cannot be written to.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        self._path = folder / "job.json"
        self._state: dict[str, Any] = {"fingerprint": fingerprint, "stages": {}}
        if self._path.exists():
            self._resume(fingerprint)
        elif folder.exists() and any(folder.iterdir()):
            raise InputError(f"output: {folder} is not empty and holds no tsynd run, wanted a new or empty folder")
        self._write()

    def _resume(self, fingerprint: dict[str, Any]) -> None:
        try:
            state = json.loads(self._path.read_text())
            then: dict[str, Any] = state["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"output: {self._path} cannot be read ({type(error).__name__}); delete it") from None
        if changes := differences(then, fingerprint):
            raise InputError(
                f"output: {self.folder} holds a run with other settings ({changes}); wanted another folder"
            )
        self._state = state

    def _write(self) -> None:
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps(self._state, indent=1))

    def stage(self, name: str, file: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """Make a file unless an earlier call of the same job did; return what ``make`` said about it."""
        path = self.folder / file
        known: dict[str, Any] | None = self._state["stages"].get(name)
        if known is not None and path.exists():
            return known
        start = time.perf_counter()
        facts = make(path)
        facts["seconds"] = round(time.perf_counter() - start, 2)
        self._state["stages"][name] = facts
        self._write()
        return facts

    @property
    def seconds(self) -> dict[str, float]:
        """Time of every stage."""
        return {name: facts["seconds"] for name, facts in self._state["stages"].items()}
