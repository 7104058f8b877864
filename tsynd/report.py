"""The report of a run: one HTML file that holds everything, and the picture for the README."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.errors import require
from tsynd.storage import atomic_path
from tsynd.synthesis import SynthesisResult

__all__ = ["draw_examples", "write_report"]

_BEFORE, _AFTER = "#7a8794", "#d1495b"

_STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #dfe5ea; --card: #ffffff; --page: #f4f6f8; --up: #1b7a4b;
        --down: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf0; --soft: #9aa7b4; --line: #37424e; --card: #1c242d; --page: #12181f; --up: #5cc98f;
          --down: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 2rem 1.2rem 4rem; font: 16px/1.55 system-ui, sans-serif;
       color: var(--ink); background: var(--page); }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { font-size: 1.08rem; } .soft { color: var(--soft); font-size: .92rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.plots figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .6rem; }
.plots img { width: 100%; height: auto; display: block; }
.examples { display: grid; grid-template-columns: repeat(2, 1fr); gap: .9rem; }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem .8rem; }
.example .strip { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .4rem; }
.example img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; display: block;
               border-radius: 4px; background: #000; }
.example .cap { text-align: center; font-size: clamp(.62rem, 1.55vw, .78rem); color: var(--soft);
                line-height: 1.3; margin-top: .2rem; }
.example .label { font-weight: 600; margin-bottom: .35rem; font-size: .92rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .38rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { font-size: .85rem; color: var(--soft); font-weight: 600; }
.up { color: var(--up); } .down { color: var(--down); }
details { margin-top: 2rem; } details table { font-size: .9rem; }
details td { text-align: left; word-break: break-word; }
@media (max-width: 700px) { .plots, .examples { grid-template-columns: 1fr; } }
@media print { body { background: #fff; max-width: none; } .example, figure { break-inside: avoid; } }
"""


def write_report(
    path: Path,
    metrics: dict[str, Any],
    result: SynthesisResult,
    sources: Tensor,
    reconstructions: Tensor,
    class_names: Sequence[str],
    fresh_before: Tensor,
    fresh_after: Tensor,
) -> Path:
    """Write one self-contained HTML file, whole or not at all.

    Args:
        path: of the file.
        metrics: what the run measured (``synthesis`` and ``evaluation`` are needed).
        result: the synthesis.
        sources: [N, C, H, W] in [0, 1], the real images.
        reconstructions: [N, C, H, W] in [0, 1].
        class_names: of the labels.
        fresh_before: [N], uncertainty of the reconstructions under samples that were not climbed on, in nats.
        fresh_after: [N], the same of the targeted images.

    Raises:
        InputError: the folder cannot be written to.
        MissingExtraError: matplotlib or pillow is not installed.
    """
    chosen = _spread(result.labels, fresh_after - fresh_before, 12)
    labels = _label_texts(result.labels, class_names, len(result))
    data = metrics.get("data", {})
    sections = [
        f"<h1>Targeted images for {html.escape(str(data.get('name', 'the data')))}</h1>",
        f'<p class="lead">{_summary(metrics)}</p>',
        "<h2>Examples</h2>",
        '<p class="soft">Source, its reconstruction by the autoencoder, the targeted image, and targeted minus '
        f"reconstruction (blue darker, red brighter; full colour is ±{_scale(result.images, reconstructions):.2f}). "
        "The number is the mutual information in nats. They are spread over the classes and from small to large gain, "
        "not picked for looks.</p>",
        '<div class="examples">'
        + "".join(
            _example(i, sources, reconstructions, result.images, labels[i], fresh_before, fresh_after) for i in chosen
        )
        + "</div>",
        "<h2>Uncertainty</h2>",
        '<div class="plots">'
        + _figure(_histogram(fresh_before, fresh_after), "Histogram of the uncertainty before and after")
        + _figure(_curves(result.trajectory), "Uncertainty at every step of the ascent")
        + "</div>",
        f'<p class="soft">{_status_text(metrics["synthesis"])}</p>',
        "<h2>Accuracy on test images</h2>",
        f'<div class="card">{_accuracy_table(metrics["evaluation"])}</div>',
        f'<p class="soft">{_limits(metrics)}</p>',
        "<h2>How to read this</h2>",
        "<p>Uncertainty here is epistemic: how much posterior samples of the classifier (dropout masks) disagree about "
        "an image. The ascent moves the image's latent code to where they disagree more, without leaving a small ball "
        "around it. Left histogram and the numbers under the examples are measured with fresh posterior samples, so "
        "they do not flatter the ascent; the curves on the right are of the samples it climbed on. <em>Real</em> was "
        "trained on the real images alone, <em>targeted</em> for the same number of optimiser steps with targeted "
        "images added to every batch after a warm-up.</p>",
        _details(metrics),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tsynd report</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def draw_examples(
    path: Path,
    sources: Tensor,
    reconstructions: Tensor,
    images: Tensor,
    before: Tensor,
    after: Tensor,
    labels: Sequence[str],
) -> Path:
    """Draw one row per image, with the report's four columns, as PNG.

    Args:
        path: of the PNG.
        sources: [n, C, H, W] in [0, 1].
        reconstructions: [n, C, H, W].
        images: [n, C, H, W], targeted.
        before: [n], uncertainty of the reconstructions in nats.
        after: [n], of the targeted images.
        labels: n texts.

    Raises:
        InputError: the folder cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    count = len(sources)
    figure = require("matplotlib.figure", "cli").Figure(figsize=(6.4, 1.68 * count + 0.3), facecolor="white")
    axes = figure.subplots(count, 4, squeeze=False)
    limit = _scale(images, reconstructions)
    titles = ("source", "reconstruction", "targeted", "difference")
    for row in range(count):
        pictures = [_rgb(x[row]) for x in (sources, reconstructions, images)]
        pictures.append(_diverging(images[row] - reconstructions[row], limit))
        notes = (labels[row], f"MI {float(before[row]):.4f}", f"MI {float(after[row]):.4f}", "")
        for axis, picture, note, title in zip(axes[row], pictures, notes, titles, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(note, fontsize=9)
            if row == 0:
                axis.set_title(title, fontsize=10)
    figure.tight_layout(pad=0.6)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    return Path(path)


def _spread(labels: Tensor | None, gain: Tensor, count: int) -> list[int]:
    """Indices over all classes and, within a class, from small to large gain."""
    if labels is None or labels.dim() != 1:
        groups = [torch.arange(len(gain))]
    else:
        groups = [(labels == c).nonzero()[:, 0] for c in torch.unique(labels)]
    chosen: list[int] = []
    for number, members in enumerate(groups):
        share = count // len(groups) + (number < count % len(groups))
        order = members[gain[members].argsort()]
        places = np.unique(np.linspace(0.1, 0.9, share) * (len(order) - 1)).round().astype(int) if share else []
        chosen += [int(order[place]) for place in np.unique(places)]
    return chosen[: max(count, 1)]


def _label_texts(labels: Tensor | None, names: Sequence[str], count: int) -> list[str]:
    if labels is None:
        return [""] * count
    if labels.dim() == 1:
        return [names[int(label)] for label in labels]
    return [", ".join(name for name, on in zip(names, row, strict=True) if on > 0.5) or "none" for row in labels]


def _points(x: float) -> str:
    return f"{100 * abs(x):.1f} points"


def _summary(metrics: dict[str, Any]) -> str:
    made, scores = metrics["synthesis"], metrics["evaluation"]
    times = made["uncertainty_after"] / max(made["uncertainty_before"], 1e-12)
    text = (
        f"{made['images']} real images were moved towards where the classifier is unsure: mean uncertainty rose from "
        f"{made['uncertainty_before']:.4f} to {made['uncertainty_after']:.4f} nats ({times:.1f}×), for "
        f"{100 * made['raised_fraction']:.1f} % of them. "
    )
    changes = []
    for condition, real in scores["real"].items():
        change = scores["targeted"][condition]["balanced_accuracy"] - real["balanced_accuracy"]
        where = f"on {html.escape(condition)} test images"
        if abs(change) < 5e-4:
            changes.append(f"changed nothing {where}")
        else:
            changes.append(f"{'gained' if change > 0 else 'lost'} {_points(change)} {where}")
    return text + "Training with such images " + ", ".join(changes) + " (balanced accuracy)."


def _limits(metrics: dict[str, Any]) -> str:
    tests = metrics.get("data", {}).get("test")
    text = "One run with one seed. "
    if tests:
        accuracy = metrics["evaluation"]["real"].get("clean", {}).get("accuracy", 0.5)
        half = 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 1e-4) / tests)
        text += (
            f"With {tests} test images the 95 % half-width of an accuracy is {100 * half:.1f} points, so smaller "
            "differences are within noise; how much another seed would change is not measured here."
        )
    return text


def _status_text(made: dict[str, Any]) -> str:
    words = {
        "raised": "raised",
        "unchanged": "left at the reconstruction because no step raised the uncertainty",
        "non_finite": "frozen at a value that was not finite",
        "label_limit": "stopped where the source label would have become too improbable",
    }
    parts = [f"{n} {words.get(name, name)}" for name, n in made.get("status", {}).items() if n]
    return f"Of {made['images']} images: {'; '.join(parts)}. {made['images_per_second']:.0f} images per second."


def _accuracy_table(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    kinds = (("balanced_accuracy", "balanced accuracy"), ("accuracy", "accuracy"), ("auroc", "AUROC"))
    head = "".join(f'<th colspan="3" scope="colgroup">{title}</th>' for _, title in kinds)
    sub = "<th>real</th><th>targeted</th><th>change</th>" * 3
    rows = []
    for condition, real in scores["real"].items():
        cells = []
        for key, _ in kinds:
            a, b = real[key], scores["targeted"][condition][key]
            mark = "up" if b > a else "down" if b < a else ""
            cells.append(f'<td>{100 * a:.1f}</td><td>{100 * b:.1f}</td><td class="{mark}">{100 * (b - a):+.1f}</td>')
        rows.append(f"<tr><td>{html.escape(condition)}</td>{''.join(cells)}</tr>")
    top = f'<tr><th rowspan="2">%</th>{head}</tr><tr>{sub}</tr>'
    return f"<table><thead>{top}</thead><tbody>{''.join(rows)}</tbody></table>"


def _details(metrics: dict[str, Any]) -> str:
    rows = []
    for part in ("data", "settings", "seconds", "machine"):
        for key, value in metrics.get(part, {}).items():
            rows.append(f"<tr><td>{part}</td><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>")
    rows.append(f"<tr><td>tsynd</td><td>version</td><td>{html.escape(str(metrics.get('version', '')))}</td></tr>")
    return f"<details><summary>Settings, times and machine</summary><table>{''.join(rows)}</table></details>"


def _scale(images: Tensor, reconstructions: Tensor) -> float:
    """Symmetric limit of the difference's colours: the 99.5 % quantile, so that one pixel does not grey out all."""
    difference = (images - reconstructions).abs().flatten()
    step = max(1, len(difference) // 100_000)
    return max(float(difference[::step].quantile(0.995)), 1e-3)


def _rgb(image: Tensor) -> np.ndarray[Any, Any]:
    x = image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)
    return (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _diverging(difference: Tensor, limit: float) -> np.ndarray[Any, Any]:
    """White at 0, red above, blue below, on the mean over channels."""
    x = (difference.mean(0) / limit).clamp(-1, 1)
    strong = torch.tensor([[178.0, 24.0, 43.0], [33.0, 102.0, 172.0]])
    colour = torch.where((x > 0)[..., None], strong[0], strong[1])
    return (255 + (colour - 255) * x.abs()[..., None]).round().byte().numpy()


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _png(pixels: np.ndarray[Any, Any]) -> str:
    buffer = io.BytesIO()
    require("PIL.Image", "data").fromarray(pixels).save(buffer, format="png")
    return _embed(buffer.getvalue())


def _example(
    index: int,
    sources: Tensor,
    reconstructions: Tensor,
    images: Tensor,
    label: str,
    before: Tensor,
    after: Tensor,
) -> str:
    limit = _scale(images, reconstructions)
    cells = (
        ("source", "", _rgb(sources[index])),
        ("reconstruction", f"{float(before[index]):.4f}", _rgb(reconstructions[index])),
        ("targeted", f"{float(after[index]):.4f}", _rgb(images[index])),
        ("difference", "", _diverging(images[index] - reconstructions[index], limit)),
    )
    strip = "".join(
        f'<div><img src="{_png(pixels)}" alt="{name} of image {index}"><div class="cap">{name}<br>{note or "&nbsp;"}'
        "</div></div>"
        for name, note, pixels in cells
    )
    title = html.escape(label) or "no label"
    return f'<div class="example"><div class="label">{title}</div><div class="strip">{strip}</div></div>'


def _figure(png: bytes, text: str) -> str:
    return f'<figure><img src="{_embed(png)}" alt="{text}"></figure>'


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "cli").Figure(figsize=(4.8, 3.3), facecolor="white")
    axis = figure.subplots()
    axis.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis


def _save(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, dpi=140, format="png")
    return buffer.getvalue()


def _histogram(before: Tensor, after: Tensor) -> bytes:
    figure, axis = _axes("Before and after, fresh samples", "uncertainty [nats]", "images")
    both = torch.cat([before, after]).numpy()
    low, high = np.quantile(both, 0.01), both.max()
    if low > 0 and high / low > 30:
        bins = np.geomspace(max(low, high * 1e-7), high * 1.0001, 31)
        axis.set_xscale("log")
    else:
        bins = np.linspace(both.min(), high + 1e-12, 31)
    for values, colour, name in ((before, _BEFORE, "reconstruction"), (after, _AFTER, "targeted")):
        axis.hist(values.numpy().clip(bins[0], bins[-1]), bins=bins, color=colour, alpha=0.65, label=name)
    axis.legend(fontsize=8, frameon=False)
    return _save(figure)


def _curves(trajectory: Tensor) -> bytes:
    figure, axis = _axes("Ascent, samples climbed on", "step", "uncertainty [nats]")
    values = trajectory.numpy()
    steps = np.arange(values.shape[1])
    for row in values[:: max(1, len(values) // 12)][:12]:
        axis.plot(steps, row, color=_BEFORE, lw=0.6, alpha=0.5)
    low, median, high = np.nanquantile(values, [0.1, 0.5, 0.9], axis=0)
    axis.fill_between(steps, low, high, color=_AFTER, alpha=0.2, lw=0, label="10–90 %")
    axis.plot(steps, median, color=_AFTER, lw=2, label="median")
    axis.set_xticks(steps)
    axis.legend(fontsize=8, frameon=False)
    return _save(figure)
