"""The tables of a study, once as HTML and once as Markdown, from the same cells."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsynd.study.plots import label_of
from tsynd.study.statistics import mean_interval, smallest_p
from tsynd.study.summary import (
    Measure,
    Row,
    all_measures,
    arms_of,
    attack_measures,
    clean_measures,
    condition_measures,
    difference,
    headline,
    quality_of,
    sizes_of,
    values,
)

__all__ = [
    "Table",
    "attack_table",
    "clean_table",
    "condition_table",
    "difference_tables",
    "masked_gradients",
    "quality_table",
    "score_table",
    "to_csv",
    "to_html",
    "to_latex",
    "to_markdown",
]


@dataclass(frozen=True)
class Table:
    """Plain text cells; ``marks`` colours some of them.

    Attributes:
        title: of the table.
        head: column titles, the first that of the row names.
        rows: of as many texts.
        marks: (row, column) → ``up`` or ``down``.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: dict[tuple[int, int], str]


def _minus(text: str) -> str:
    """A number with the minus sign of print, and ± before one that rounds to nothing."""
    nothing = text[0] in "+-" and not text.partition(" ")[0].strip("+-0.")
    return f"±{text[1:]}" if nothing else text.replace("-", "−")


def _value(mean: float, half: float, measure: Measure) -> str:
    if math.isnan(mean):
        return "–"
    scale, digits = (100, 1) if measure.percent else (1, 3)
    text = f"{scale * mean:.{digits}f}"
    return _minus(text if math.isnan(half) else f"{text} ± {scale * half:.{digits}f}")


def score_table(rows: Sequence[Row], size: int, brief: bool = False) -> Table:
    """Mean ± 95 % interval over the seeds, and what the training cost; ``brief``: the headline's means."""
    measures, lines = (headline if brief else all_measures)(rows), []
    for arm in arms_of(rows):
        cells = [row for row in rows if row["arm"] == arm and row["size"] == size]
        if not cells:
            continue
        found = [mean_interval(list(values(rows, arm, size, m.key).values())) for m in measures]
        texts = [_value(mean, math.nan if brief else half, m) for (mean, half), m in zip(found, measures, strict=True)]
        if brief:
            lines.append((label_of(arm), *texts))
            continue
        seconds = sum(row["seconds"]["training"] for row in cells) / len(cells)
        share = sum(row["training"]["augmentation_share"] for row in cells) / len(cells)
        lines.append((label_of(arm), str(len(cells)), *texts, f"{seconds:.0f} s", f"{100 * share:.0f} %"))
    units = [m.title + (" %" if m.percent else "") + (" ↓" if not m.up else "") for m in measures]
    head = ("Arm", *units) if brief else ("Arm", "Seeds", *units, "Training", "of it extra images")
    return Table(f"{size} labelled images", head, tuple(lines), {})


def _plain_table(rows: Sequence[Row], size: int, measures: Sequence[Measure], title: str) -> Table:
    lines = []
    for arm in arms_of(rows):
        found = [list(values(rows, arm, size, measure.key).values()) for measure in measures]
        if any(found):
            texts = [_value(*mean_interval(one), m) for one, m in zip(found, measures, strict=True)]
            lines.append((label_of(arm), *texts))
    head = ("Arm", *(m.title + (" %" if m.percent else "") for m in measures))
    return Table(f"{title}, {size} labelled images", head, tuple(lines) if measures else (), {})


def clean_table(rows: Sequence[Row], size: int) -> Table:
    """More scores of clean images; no lines where there is none."""
    return _plain_table(rows, size, clean_measures(rows), "Clean images")


def attack_table(rows: Sequence[Row], size: int) -> Table:
    """Balanced accuracy under every attack; no lines where there was none."""
    return _plain_table(rows, size, attack_measures(rows), "Attacks")


def condition_table(rows: Sequence[Row], size: int) -> Table:
    """Balanced accuracy under every kind of disturbance, mean over severities; no lines where there was none."""
    return _plain_table(rows, size, condition_measures(rows), "Disturbances")


RIVALS = ("real", "standard", "randaugment", "adversarial", "trades", "random")
"""What arms are compared with: what users would choose instead, and noise."""


def difference_tables(rows: Sequence[Row]) -> list[Table]:
    """Paired differences against :data:`RIVALS`, by size and, with several sizes, over all of them."""
    sizes = sizes_of(rows)
    groups = [([size], f"{size} labelled images") for size in sizes]
    groups += [(sizes, f"all sizes together ({', '.join(map(str, sizes))})")] if len(sizes) > 1 else []
    arms, tables = arms_of(rows), []
    for against in [arm for arm in RIVALS if arm in arms]:
        for chosen, name in groups:
            table = _differences(rows, against, chosen, name)
            tables += [table] if table.rows else []
    return tables


def _differences(rows: Sequence[Row], against: str, sizes: Sequence[int], name: str) -> Table:
    measures = headline(rows)
    lines: list[tuple[str, ...]] = []
    marks: dict[tuple[int, int], str] = {}
    for arm in arms_of(rows):
        found = [difference(rows, arm, against, sizes, measure.key) for measure in measures]
        if arm == against or not found or not found[0].pairs:
            continue
        line = [label_of(arm), str(found[0].pairs)]
        for one, measure in zip(found, measures, strict=True):
            scale, digits = (100, 1) if measure.percent else (1, 3)
            text = "–" if math.isnan(one.mean) else _minus(f"{scale * one.mean:+.{digits}f}")
            text += "" if math.isnan(one.half_width) else f" ± {scale * one.half_width:.{digits}f}"
            if one.half_width < abs(one.mean) and smallest_p(one.pairs) <= 0.05:
                marks[len(lines), len(line)] = "up" if (one.mean > 0) == measure.up else "down"
            line += [text, _p(one.p, one.pairs)]
        lines.append(tuple(line))
    head = ("Arm", "Pairs", *(text for m in measures for text in (m.title, "p")))
    return Table(f"Less {label_of(against)}, {name}", head, tuple(lines), marks)


def _p(p: float, pairs: int) -> str:
    if math.isnan(p):
        return "–"
    text = f"{p:.2g}" if p >= 0.001 else "< .001"
    return f"{text}*" if p <= smallest_p(pairs) * (1 + 1e-9) and pairs > 1 else text


_QUALITY = (
    ("MI, nats", "uncertainty", 1, 4),
    ("MI of recon­structions", "uncertainty_reconstruction", 1, 4),
    ("Label kept %", "label_kept", 100, 0),
    ("To source", "to_source", 1, 3),
    ("To nearest", "nearest", 1, 3),
    ("of held-out", "", 1, 2),
    ("Source nearest %", "source_is_nearest", 100, 0),
    ("KID", "kid", 1, 3),
    ("FID", "fid", 1, 2),
    ("Cosine MI, entropy", "gradient_cosine", 1, 2),
)


def quality_table(rows: Sequence[Row], size: int) -> Table:
    """Synthetic images against the finished classifiers, mean ± 95 % interval over the seeds."""
    lines: list[tuple[str, ...]] = []
    for arm in arms_of(rows):
        if found := quality_of(rows, arm, size):
            held_out = found["nearest_held_out"][0]
            found[""] = (found["nearest"][0] / held_out if held_out else math.nan, math.nan)
            lines.append((label_of(arm), *(_quality(found.get(key), scale, n) for _, key, scale, n in _QUALITY)))
    if lines:  # real against real: all arms of a seed have the same training images
        first = next(arm for arm in arms_of(rows) if quality_of(rows, arm, size))
        real = quality_of(rows, first, size)
        texts = [_quality(real.get(f"{key}_train"), scale, digits) for _, key, scale, digits in _QUALITY]
        lines.append(("real training images", *texts))
    return Table(f"{size} labelled images", ("Arm", *(title for title, *_ in _QUALITY)), tuple(lines), {})


def _quality(found: tuple[float, float] | None, scale: int, digits: int) -> str:
    if found is None or math.isnan(found[0]):
        return "–"
    half = "" if math.isnan(found[1]) else f" ± {scale * found[1]:.{digits}f}"
    return _minus(f"{scale * found[0]:.{digits}f}{half}")


def masked_gradients(rows: Sequence[Row], margin: float = 0.02) -> list[str]:
    """Arms that Square, which needs no gradient, hurts clearly more than PGD does on the same images."""
    found = []
    for arm in arms_of(rows):
        gaps = [
            scores["gradient_accuracy"] - scores["accuracy"]
            for row in rows
            if row["arm"] == arm
            for scores in row["scores"].values()
            if scores.get("gradient_accuracy") is not None
        ]
        if gaps and sum(gaps) / len(gaps) > margin:
            found.append(arm)
    return found


def to_html(table: Table) -> str:
    """The table in a card."""
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in table.head)
    lines = []
    for i, row in enumerate(table.rows):
        cells = f'<th scope="row">{html.escape(row[0])}</th>'
        for j, text in enumerate(row[1:], 1):
            mark = table.marks.get((i, j))
            cells += f"<td{f' class={mark!r}' if mark else ''}>{html.escape(text)}</td>"
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<figure class="card wide"><figcaption><b>{html.escape(table.title)}</b></figcaption><table class="cells">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></figure>"
    )


def to_markdown(table: Table) -> str:
    """The table as GitHub reads it."""
    lines = [f"**{table.title}**", "", "| " + " | ".join(table.head) + " |", "|---" * len(table.head) + "|"]
    lines += ["| " + " | ".join(text.replace("*", "\\*") for text in row) + " |" for row in table.rows]
    return "\n".join(lines).replace("­", "") + "\n"


def to_latex(table: Table) -> str:
    """The table for a paper, with booktabs."""
    escape = str.maketrans(
        {**{c: f"\\{c}" for c in "&%$#_"}, "−": "$-$", "±": r"$\pm$", "↓": r"$\downarrow$", "\u00ad": ""}
    )
    head, *rows = (" & ".join(text.translate(escape) for text in row) + r" \\" for row in (table.head, *table.rows))
    columns = "l" + "r" * (len(table.head) - 1)
    lines = [f"% {table.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """Every score of every cell, one a line."""
    lines = ["data,size,seed,arm,condition,score,value"]
    for row in rows:
        name = f'"{row.get("data", "")}",{row["size"]},{row["seed"]},"{row["arm"]}"'
        lines += [
            f"{name},{condition},{score},{'' if value is None else value}"
            for condition, scores in row["scores"].items()
            for score, value in scores.items()
        ]
    return "\n".join(lines) + "\n"
