"""A progress bar where rich is installed, silence elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(text: str, total: int, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Show progress on the terminal's error stream.

    Args:
        text: what is being done.
        total: number of units.
        shown: False gives a bar that does nothing.

    Yields:
        A function to call with the units done since the last call and a short note.
    """
    if shown:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
        except ImportError:
            shown = False
    if not shown:
        yield lambda done, note: None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(text, total=total, note="")
        yield lambda done, note: bar.update(task, advance=done, note=note)
