"""``python -m benchmarks.pages``: the tables of the benchmark and study pages, from the committed JSON alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from benchmarks.document import between, suite_lines
from benchmarks.harness import read_json
from benchmarks.pretrained_study import blur_table, score_tables
from benchmarks.study import against, draw, per_set
from tsynd.utils.atomic import atomic_path

__all__ = ["benchmark_page", "pretrained_page", "study_page"]

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
    """The page's text with the study's tables made of the cells in a JSON-lines file."""
    rows = [json.loads(line) for line in cells.read_text(encoding="utf-8").splitlines()]
    for part, lines in {"against": against(rows), "sets": per_set(rows)}.items():
        text = between(text, part, ["\n".join(lines).strip()], "study.md")
    return text


def pretrained_page(text: str, rows: Path) -> str:
    """The page's text with the tables of the study of a frozen encoder."""
    held = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    text = between(text, "scores", score_tables(held), "study_pretrained.md")
    return between(text, "blur", blur_table(held), "study_pretrained.md")


def main() -> None:
    """Rewrite the pages."""
    docs = _ROOT / "docs"
    rows = [json.loads(line) for line in (docs / "study.jsonl").read_text(encoding="utf-8").splitlines()]
    draw(rows, docs / "images/study.png")
    for page, text in (
        (
            docs / "benchmarks.md",
            benchmark_page((docs / "benchmarks.md").read_text(), _ROOT / "benchmarks/results/cpu.json"),
        ),
        (docs / "study.md", study_page((docs / "study.md").read_text(), docs / "study.jsonl")),
        (
            docs / "study_pretrained.md",
            pretrained_page((docs / "study_pretrained.md").read_text(), docs / "study_pretrained.jsonl"),
        ),
    ):
        with atomic_path(page) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
