"""Tables and the plot of the benchmarks page, put between its markers."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.harness import Row, table
from tsynd.utils.atomic import atomic_path
from tsynd.utils.errors import InputError, require

__all__ = ["between", "plot", "suite_lines", "update"]


def update(page: Path, suite: str, rows: list[Row], summary: list[str]) -> None:
    """Put a suite's table and summary between its markers, and draw its plot.

    Args:
        page: a Markdown file; pictures go to ``images/`` beside it.
        suite: its name.
        rows: as measured.
        summary: lines below the table.

    Raises:
        InputError: the page has no such markers.
    """
    plot(page.parent / "images" / f"bench_{suite}.png", rows)
    text = between(page.read_text(encoding="utf-8"), suite, suite_lines(suite, rows, summary), page.name)
    with atomic_path(page) as temporary:
        temporary.write_text(text)


def suite_lines(suite: str, rows: list[Row], summary: list[str]) -> list[str]:
    """What stands between a suite's markers."""
    lines = [f"On {rows[0].machine}; {rows[0].dtype}.", "", *(f"- {line}" for line in summary), ""]
    return [*lines, f"![ratio to the floor](images/bench_{suite}.png)", "", *table(rows)]


def between(text: str, name: str, lines: list[str], page: str) -> str:
    """A page's text with what stands between ``<!-- name -->`` and ``<!-- end name -->`` replaced by the lines."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise InputError(f"docs: {page} lacks the markers <!-- {name} --> and <!-- end {name} -->")
    return pattern.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text)


def plot(path: Path, rows: list[Row]) -> None:
    """Ratio to the floor by shape, a mark a method, quantiles as lines."""
    figure = require("matplotlib.figure", "cli").Figure(figsize=(7.5, 3.6), layout="constrained")
    axes = figure.subplots()
    shapes = list(dict.fromkeys(row.shape for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    for number, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        at = [shapes.index(row.shape) + (number - (len(methods) - 1) / 2) * 0.7 / len(methods) for row in own]
        ratio = [row.over_floor for row in own]
        low = [max(0.0, row.over_floor * (1 - row.p20_ms / row.median_ms)) for row in own]
        high = [max(0.0, row.over_floor * (row.p80_ms / row.median_ms - 1)) for row in own]
        mark = "s" if method.startswith("tsynd") else "_" if method.startswith("floor") else "o"
        axes.errorbar(at, ratio, yerr=(low, high), fmt=mark, markersize=6, capsize=0, linewidth=1, label=method)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [shape.replace(" ", "\n", 1) for shape in shapes], fontsize=7)
    axes.set_ylabel("time / floor")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
