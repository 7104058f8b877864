"""Progress on the error stream: a bar on a terminal where rich is installed, else a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress_bar", "say"]

FIRST, EVERY = 3.0, 10.0
"""Seconds until the first plain line, with an estimate of all, and between two later ones."""

Report = Callable[[int, str], None]


def say(lines: Iterable[str], shown: bool = True) -> None:
    """Write lines to the error stream."""
    if shown:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(text: str, total: int, shown: bool = True) -> Iterator[Report]:
    """Show progress on the error stream.

    Args:
        text: what is being done.
        total: number of units.
        shown: False gives a bar that does nothing.

    Yields:
        A function to call with the units done since the last call and a short note; with the note ``resumed`` they were
        done before, and tell nothing of the pace.
    """
    if not shown:
        yield lambda done, note: None
        return
    bar = _rich_bar()
    if bar is None:
        with _Lines(text, total) as lines:
            yield lines.report
        return
    with bar:
        task = bar.add_task(text, total=total, note="")
        yield lambda done, note: bar.update(task, advance=done, note=note)


def _rich_bar() -> Any:
    """A bar for a terminal or a notebook; None elsewhere."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return None
    times = progress.TimeElapsedColumn(), progress.TimeRemainingColumn()
    columns = "{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), *times, "{task.fields[note]}"
    return progress.Progress(*columns, console=console)


class _Lines:
    """Lines for a log, written by a thread of its own: also while one unit takes minutes."""

    def __init__(self, text: str, total: int) -> None:
        self.text, self.total, self.done, self.before, self.note = text, total, 0, 0, ""
        self._stream, self._said = sys.stderr, False
        self._over = threading.Event()
        self._start = time.monotonic()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def report(self, done: int, note: str) -> None:
        self.done, self.note = self.done + done, note
        self.before += done if note == "resumed" else 0

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._said:
            self._say()

    def _speak(self) -> None:
        wait = FIRST
        while not self._over.wait(wait):
            self._say()
            wait = EVERY

    def _say(self) -> None:
        self._said, done, passed = True, self.done, time.monotonic() - self._start
        new = done - self.before
        left = f", about {_span(passed * (self.total - done) / new)} left" if new and done < self.total else ""
        note = f"; {self.note}" if self.note else ""
        print(f"{self.text}: {done} of {self.total} in {_span(passed)}{left}{note}", file=self._stream, flush=True)


def _span(seconds: float) -> str:
    """A time in the two largest units that fit: ``40 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
