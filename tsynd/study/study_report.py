"""The report of a study: one self-contained HTML page, and its tables as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.evaluation.attacks import KINDS
from tsynd.evaluation.evaluate import FAMILIES
from tsynd.report.page import write_page
from tsynd.report.pictures import centre, inline_png, nats
from tsynd.report.run_report import STYLE
from tsynd.report.verdict import points
from tsynd.study.plots import budget_plot, dot_plot, label_of, selective_plot, severity_plot, size_plot
from tsynd.study.score_tables import (
    RIVALS,
    Table,
    attack_table,
    clean_table,
    condition_table,
    difference_tables,
    masked_gradients,
    quality_table,
    score_table,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
)
from tsynd.study.settings import Cell, Workplace, read_arrays, samples_path
from tsynd.study.statistics import smallest_p
from tsynd.study.summary import Row, arms_of, difference, headline, severities_of, sizes_of
from tsynd.utils.atomic import atomic_path
from tsynd.utils.fingerprint import plain_settings

__all__ = ["lead", "write_study"]

_MORE_STYLE = """
body { max-width: 1120px; } .wide { overflow-x: auto; }
.cells { font-size: .88rem; overflow-wrap: normal; } .cells th[scope=col] { vertical-align: bottom; }
.cells td { white-space: nowrap; } .cells tbody th { font-weight: 500; white-space: nowrap; }
figure.card { margin: 0 0 1rem; } figure.card svg { display: block; width: 100%; height: auto; margin-top: .5rem; }
@media (max-width: 700px) { figure.card { overflow-x: auto; } figure.card svg { min-width: 620px; } }
figure.card figcaption b { display: block; color: var(--ink); font-size: 1rem; }
.row { display: grid; gap: .45rem; text-align: center; } .row img { display: block; width: 100%; aspect-ratio: 1;
  object-fit: contain; border: 1px solid var(--line); border-radius: 4px; }
.row img.small { image-rendering: pixelated; } .row .cap { font-size: .74rem; line-height: 1.3; margin-top: .2rem; }
.row .cap span { display: block; color: var(--ink); font-variant-numeric: tabular-nums; }
"""


def write_study(place: Workplace, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write ``report.html`` and ``results.md``, ``.csv`` and ``.tex`` into the study's folder.

    Args:
        place: the study's; its models and samples are shown.
        rows: all finished cells.
        facts: of data and machine, for the foot.
    """
    sizes = sizes_of(rows)
    tables = [table for size in sizes for table in _score_tables(rows, size)] + difference_tables(rows)
    texts = {"md": _markdown(rows, facts), "csv": to_csv(rows), "tex": "\n".join(map(to_latex, tables))}
    for ending, text in texts.items():  # before the figures
        with atomic_path(place.folder / f"results.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    measures = headline(rows)
    figures = [dot_plot(rows, measures, size, f"d{size}") for size in sizes]
    if len(sizes) > 1:
        figures.insert(0, size_plot(rows, measures, "s"))
    for size in sizes:
        figures += [severity_plot(rows, size, family, f"v{place}{size}") for place, family in enumerate(FAMILIES)]
        figures += [budget_plot(rows, size, f"b{size}"), selective_plot(rows, size, f"u{size}")]
    write_page(
        place.folder / "report.html",
        title=f"tsynd study: {facts['data']}",
        heading=f"Does targeted synthesis help on {facts['data']}?",
        style=STYLE + _MORE_STYLE,
        facts=_facts(rows, facts, place),
        lead=lead(rows),
        sections=[
            ("Scores by arm", "".join(figures)),
            ("All scores", _SCORES + "".join(to_html(one) for size in sizes for one in _score_tables(rows, size))),
            ("Paired differences", _DIFFERENCES + "".join(map(to_html, difference_tables(rows)))),
            ("Synthetic images", _quality(place, rows, facts)),
            ("Method and limits", _method(rows, facts, place)),
        ],
        details=("Settings and machine", _details(rows, facts, place)),
    )


_SCORES = """<p class="soft">Mean ± 95 % t interval over the seeds. ↓: less is better. Error detection: how well the
mutual information tells wrong predictions from right ones (area under the ROC curve, 50 % is chance).</p>
"""
_DIFFERENCES = """<p class="soft">In percentage points of balanced accuracy (NLL: nats), over pairs of equal size and
seed, with their 95 % t interval; coloured where that leaves out 0 and the pairs are enough for p < .05, which takes
six. p: exact paired permutation (sign-flip) test,
two-sided, not corrected for the number of comparisons; * marks the smallest value that so many pairs can give (5 pairs:
0.0625). Pairs of several sizes share test and training images, so that p over all sizes is optimistic.</p>
"""


def _quality(place: Workplace, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    tables = [table for table in (quality_table(rows, size) for size in sizes_of(rows)) if table.rows]
    return f"""<p class="soft">Made of training images against each arm's finished classifier, of the first seed; not
picked for looks. Below: mutual information in nats under samples that no ascent has seen.</p>
{_samples(place, rows, facts)}
<p class="soft">Mean ± 95 % t interval over the seeds. MI: mutual information of the synthetic images under the arm's
own classifier. Label kept: that classifier still predicts the source's label. Distances are root mean squared
differences of pixels: to the source; to the nearest training image, and that in units of a real held-out image's
distance (well below 1: close to a copy). KID and FID: distance to the {place.settings.split} images in the features of
real only; the row “real training images” is what real images of the same number get. Cosine: of the gradients of mutual
information and entropy.</p>
{"".join(map(to_html, tables))}"""


def lead(rows: Sequence[Row]) -> list[str]:
    """What the seeds can show, and what the targeted arm did against its controls."""
    return [*_power(rows), _summary(rows)]


def _power(rows: Sequence[Row]) -> list[str]:
    """Says where the seeds cannot show anything, and how many would."""
    pairs = min(len({row["seed"] for row in rows if row["size"] == size}) for size in sizes_of(rows))
    if smallest_p(pairs) <= 0.05:
        return []
    needed = next(n for n in range(2, 99) if smallest_p(n) <= 0.05)
    return [
        f"With {pairs} seed{'s' if pairs > 1 else ''} no difference at one size can reach p = .05 (the smallest p is "
        f"{smallest_p(pairs):.2g}): that takes {needed} seeds, and eight for p\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}.01."
    ]


def _facts(rows: Sequence[Row], facts: dict[str, Any], place: Workplace) -> list[str]:
    seeds = len({row["seed"] for row in rows})
    parts = [
        f"{', '.join(map(str, sizes_of(rows)))} labelled images",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        f"{facts['tested']} {place.settings.split} images",
        "×".join(map(str, facts["image_shape"])),
        f"{len(facts['class_names'])} classes ({facts['task']})",
        f"{place.settings.iterations} steps for every arm",
        f"tsynd {facts['version']}",
    ]
    return parts


def _score_tables(rows: Sequence[Row], size: int) -> list[Table]:
    """Everything that was measured at a size."""
    tables = [make(rows, size) for make in (score_table, clean_table, condition_table, attack_table)]
    return [table for table in tables if table.rows]


def _targeted(arms: Sequence[str]) -> str | None:
    """The arm that stands for targeting, if any was run."""
    kinds = ("recipe", "expected_information", "mutual_information", "entropy", "loss")
    order = [
        arm
        for kind in kinds
        for several in (True, False)
        for arm in arms
        if arm.split(",")[0].split("+")[-1] == kind and ("+" in arm) == several
    ]
    return order[0] if order else None


def _summary(rows: Sequence[Row]) -> str:
    """What the targeted arm did against its controls; a loss is named as plainly as a gain."""
    arms = arms_of(rows)
    targeted = _targeted(arms)
    if targeted is None:
        return "No targeted arm was run."
    sentences = []
    for against in [arm for arm in RIVALS if arm in arms]:
        texts = []
        for measure in [one for one in headline(rows) if one.percent]:
            found = difference(rows, targeted, against, sizes_of(rows), measure.key)
            if found.pairs:
                gain = points(found.mean)
                where = f"on {measure.title.lower()} images" if measure.key in ("clean", "shifts") else None
                where = where or (f"at {measure.title[3:]}" if measure.key[:3] == "at:" else f"on {measure.title}")
                surety = f"p = {found.p:.2g}, {found.pairs} pairs" if found.pairs > 1 else "one pair"
                clear = found.half_width < abs(found.mean) and smallest_p(found.pairs) <= 0.05
                surety += "" if clear else ", within noise"
                if len(sizes_of(rows)) > 1:  # a mean over sizes may hide a loss at one of them
                    each = [(n, difference(rows, targeted, against, [n], measure.key)) for n in sizes_of(rows)]
                    surety = (
                        ", ".join(f"{n} labels: {points(one.mean)}" for n, one in each if one.pairs) + f"; {surety}"
                    )
                texts.append(f"{gain} points {where} ({surety})")
        sentences += [f"against {label_of(against)}: {', '.join(texts)}"] if texts else []
    return f"Balanced accuracy of {label_of(targeted)} {'; '.join(sentences)}."


def _markdown(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    lines = [
        f"# Study on {_literal(str(facts['data']))}\n",
        "Balanced accuracy, AUROC and the like in percent, mean ± 95 % t interval.\n",
    ]
    lines += [to_markdown(table) for size in sizes_of(rows) for table in _score_tables(rows, size)]
    lines += [
        "Paired differences in percentage points of balanced accuracy (NLL: nats); p by the exact two-sided sign-flip "
        "test, uncorrected; \\* is the smallest p that so many pairs can give.\n"
    ]
    lines += [to_markdown(table) for table in difference_tables(rows)]
    lines += ["Synthetic images, mean ± 95 % t interval; KID and FID in the features of the real-only classifier.\n"]
    lines += [to_markdown(table) for table in (quality_table(rows, size) for size in sizes_of(rows)) if table.rows]
    return "\n".join(lines)


def _name(label: Tensor, names: Sequence[str]) -> str:
    if label.dim() == 0:
        return names[int(label)]
    return ", ".join(names[int(i)] for i in label.nonzero()[:, 0]) or "no finding"


def _picture(pixels: np.ndarray[Any, Any], title: str, note: str) -> str:
    kind = ' class="small"' if max(pixels.shape) < 128 else ""
    alt = html.escape(f"{title} {note}".strip(), quote=True)
    return (
        f'<div><img{kind} src="{inline_png(pixels)}" alt="{alt}"><div class="cap">{html.escape(title)}'
        f"<span>{html.escape(note) or '&nbsp;'}</span></div></div>"
    )


def _literal(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>()#+.!|~-])", r"\\\1", text)


def _rgb(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Uint8 [C, H, W], or the middle slice of [C, D, H, W], as [H, W, 3]."""
    image = centre(torch.from_numpy(image)).numpy()
    coloured = image if len(image) == 3 else image[:1].repeat(3, 0)
    return np.ascontiguousarray(coloured.transpose(1, 2, 0))


def _samples(place: Workplace, rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Source, reconstruction and each generative arm's image, of the largest size."""
    size = max(sizes_of(rows))
    first_seed = min(row["seed"] for row in rows if row["size"] == size)
    shown = {}
    for arm in arms_of(rows):
        samples = read_arrays(samples_path(place, Cell(size, first_seed, arm)))
        if samples is not None:
            shown[arm] = samples
    if not shown:
        return "<p>No arm made images.</p>"
    first, cards = next(iter(shown.values())), []
    moved = [arm for arm in shown if arm != "reconstruction"][:5]
    for i in range(len(first["source"])):
        pictures = [_picture(_rgb(first["source"][i]), "source", "")]
        pictures.append(_picture(_rgb(first["reconstruction"][i]), "reconstruction", ""))
        for arm in moved:
            pictures.append(_picture(_rgb(shown[arm]["made"][i]), label_of(arm), nats(shown[arm]["after"][i])))
        label = html.escape(_name(torch.from_numpy(first["labels"])[i], facts["class_names"]))
        style = f"grid-template-columns: repeat({len(pictures)}, minmax(0, 1fr))"
        cards.append(
            f'<div class="example"><b>{label}</b><div class="row" style="{style}">{"".join(pictures)}</div></div>'
        )
    return f'<div class="pair">{"".join(cards)}</div>'


def _method(rows: Sequence[Row], facts: dict[str, Any], place: Workplace) -> str:
    s = place.settings
    source = "every training image, without labels" if s.autoencoder_data == "all" else "the labelled images alone"
    strengths = "; ".join(
        f"{kind.replace('_', ' ')} " + ", ".join("/".join(f"{v:.3g}" for v in c.keywords.values()) for c in conditions)  # type: ignore[attr-defined]
        for kinds in FAMILIES.values()
        for kind, conditions in kinds.items()
        if severities_of(rows, kind)
    )
    texts = (
        "All arms of a size and seed share the labelled subset, the first weights, the batch order, the number of "
        f"optimiser steps and the autoencoder, which was trained on {source}. All but real only add {s.ratio:g} extra "
        f"image(s) per real one at the same steps, after {100 * s.warmup_fraction:.0f} % of them (unless an arm's name "
        "says otherwise).",
        "Disturbances are drawn per image and are the same for every arm. "
        + (f"Their strengths at severities 1 to 5: {strengths}. " if strengths else "")
        + "“Shifted” and “MedMNIST-C” are means over the kinds and severities that were measured.",
        "Conformal sets hold the right class for 90 % of images like the validation images, by which their limit is "
        "set. The cosine of the gradients of mutual information and entropy says whether the two objectives differ "
        "here: at 1 they are one direction.",
        _attack_text(rows, place),
        "Seeds differ in the labelled subset and in everything that is drawn, but share the scored images: the "
        "intervals say how much another training would change, not another hospital. Synthetic images are made to "
        "train on, not to diagnose from.",
    )
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)


def _attack_text(rows: Sequence[Row], place: Workplace) -> str:
    s, names = place.settings, {name.split(":")[0] for row in rows for name in row["scores"]}
    if not names & set(KINDS):
        return ""
    text = (
        "Attacks hit the deterministic network (no dropout) with full knowledge of it, on "
        f"{s.attack_images or 'all'} fixed images (Square: {s.query_images or 'all'}, {s.queries} queries each). "
    )
    masked = masked_gradients(rows)
    if masked:
        text += (
            f"Square, which needs no gradient, hurts {', '.join(map(label_of, masked))} more than the gradients do: a "
            "sign of masked gradients, so the figures of the other attacks flatter there. "
        )
    elif "square" in names:
        text += (
            "Square, which needs no gradient, was nowhere clearly stronger than the gradients: no sign of masked ones. "
        )
    return text + (
        f"The arms adversarial and TRADES train on PGD images of budget {255 * s.adversarial_budget:.3g}/255: on what "
        "these attacks test."
    )


def _details(rows: Sequence[Row], facts: dict[str, Any], place: Workplace) -> list[tuple[str, str, Any]]:
    cells = [("settings", key, value) for key, value in plain_settings(place.settings).items()]
    cells += [("facts", key, value) for key, value in facts.items()]
    total = sum(sum(row["seconds"].values()) for row in rows)
    return [*cells, ("facts", "time of all cells", f"{total / 60:.1f} min of one process")]
