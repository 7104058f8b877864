"""``python -m benchmarks.pages``: the tables of the benchmark and study pages, from the committed JSON alone."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.document import between, suite_lines
from benchmarks.harness import read_json
from tsynd.study.score_tables import (
    Table,
    attack_table,
    condition_table,
    difference_tables,
    quality_table,
    score_table,
    to_markdown,
)
from tsynd.study.summary import sizes_of
from tsynd.utils.atomic import atomic_path

__all__ = ["benchmark_page", "study_page"]

_ROOT = Path(__file__).resolve().parent.parent


def benchmark_page(text: str, results: Path) -> str:
    """The page's text with every suite's table made of the rows in ``results``."""
    rows = read_json(results)
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        summary = importlib.import_module(f"benchmarks.{suite}").summary(own)
        text = between(text, suite, suite_lines(suite, own, summary), "benchmarks.md")
    return text


def study_page(text: str, cells: Path) -> str:
    """The page's text with the study's tables made of the cells in a JSON-lines file, data set by data set."""
    rows = [json.loads(line) for line in cells.read_text(encoding="utf-8").splitlines()]
    sets = list(dict.fromkeys(row.get("data", "") for row in rows))
    parts: dict[str, list[Table]] = {"scores": [], "differences": [], "quality": []}
    if len(sets) > 1:
        parts["differences"] = [replace(table, title=f"All sets: {table.title}") for table in difference_tables(rows)]
    for name in sets:
        own = [row for row in rows if row.get("data", "") == name]
        sizes = sizes_of(own)
        made = {
            "scores": [make(own, size) for size in sizes for make in (score_table, condition_table, attack_table)],
            "differences": difference_tables(own),
            "quality": [quality_table(own, size) for size in sizes],
        }
        for part, tables in made.items():
            shown = [table for table in tables if table.rows]
            parts[part] += [replace(table, title=f"{name}: {table.title}") if name else table for table in shown]
    for part, tables in parts.items():
        text = between(text, part, ["\n".join(map(to_markdown, tables)).strip()], "study.md")
    return text


def main() -> None:
    """Rewrite both pages."""
    docs = _ROOT / "docs"
    for page, text in (
        (
            docs / "benchmarks.md",
            benchmark_page((docs / "benchmarks.md").read_text(), _ROOT / "benchmarks/results/cpu.json"),
        ),
        (docs / "study.md", study_page((docs / "study.md").read_text(), docs / "study.jsonl")),
    ):
        with atomic_path(page) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
