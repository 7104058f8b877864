"""The pictures of a report: strips of images, the histogram and the ascent curves."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.errors import InputError, require
from tsynd.planes import PLANES, views
from tsynd.storage import atomic_path

__all__ = [
    "COLUMNS",
    "INK",
    "SOFT",
    "check_counts",
    "curves",
    "difference_scale",
    "draw_examples",
    "histogram",
    "inline_png",
    "inline_svg",
    "nats",
    "spread",
    "strip",
]

COLUMNS = ("source", "reconstruction", "targeted", "difference")
_RED, _BLUE = (178.0, 24.0, 43.0), (33.0, 102.0, 172.0)
# stand-ins that matplotlib draws with and the page replaces, so that plots follow its light or dark scheme
INK, SOFT, _BEFORE, _AFTER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", _BEFORE: "var(--before)", _AFTER: "var(--after)"}


def check_counts(count: int, **tensors: Tensor) -> None:
    """Raise :class:`InputError` unless every tensor has ``count`` rows, and that is at least one."""
    for name, tensor in tensors.items():
        if len(tensor) != count or count == 0:
            raise InputError(f"{name}: {len(tensor)} rows for {count} images, wanted as many and at least one")


def spread(labels: Tensor | None, gain: Tensor, count: int) -> list[int]:
    """``count`` indices, even over the classes (multilabel: the first positive label) and over each one's gains."""
    if labels is None:
        classes = torch.zeros(len(gain))
    else:
        classes = labels.cpu() if labels.dim() == 1 else torch.where(labels.any(1), labels.argmax(1), -1).cpu()
    groups = [(classes == c).nonzero()[:, 0] for c in torch.unique(classes)]
    if len(groups) > count:
        groups = [groups[int(i)] for i in np.linspace(0, len(groups) - 1, count)]
    shares = [0] * len(groups)
    while sum(shares) < min(count, sum(map(len, groups))):
        open_ = [g for g in range(len(groups)) if shares[g] < len(groups[g])]
        shares[min(open_, key=lambda g: shares[g])] += 1
    chosen = []
    for number, (members, share) in enumerate(zip(groups, shares, strict=True)):
        order = members[gain[members].argsort()]
        start = (number + 0.5) / len(groups)  # classes with one example each still differ in gain
        chosen += [int(order[int((k + start) / share * len(order))]) for k in range(share)]
    return chosen


def nats(value: Any) -> str:
    """An uncertainty as text, with the digits it needs."""
    x = float(value)
    return f"{x:.4f}" if x == 0 or abs(x) >= 0.001 or not math.isfinite(x) else f"{x:.1e}"


def _plain(text: str) -> str:
    """Text that matplotlib does not take for a formula, cut to fit beside a picture."""
    return (text if len(text) <= 22 else text[:21] + "…").replace("$", r"\$")


def difference_scale(difference: Tensor) -> float:
    """Symmetric limit of the difference's colours: the 99.5 % quantile, so that one pixel does not pale all others."""
    values = difference.mean(1).abs().flatten().nan_to_num().numpy()
    return max(float(np.quantile(values, 0.995)), 0.01)


def strip(stages: Iterable[Tensor], limit: float) -> list[np.ndarray[Any, Any]]:
    """Source, reconstruction, targeted and the difference of the last two, white at 0, as uint8 [H, W, 3]."""
    source, start, end = ((x if len(x) == 3 else x[:1].expand(3, -1, -1)).permute(1, 2, 0) for x in stages)
    x = ((end - start).mean(2) / limit).clamp(-1, 1).nan_to_num()[..., None]
    difference = 1 + (torch.where(x > 0, torch.tensor(_RED), torch.tensor(_BLUE)) / 255 - 1) * x.abs()
    return [(y.clamp(0, 1) * 255).round().byte().numpy() for y in (source, start, end, difference)]


def draw_examples(
    path: Path,
    sources: Tensor,
    reconstructions: Tensor,
    images: Tensor,
    before: Tensor,
    after: Tensor,
    labels: Sequence[str],
    count: int = 4,
) -> Path:
    """Draw one row per image (three per volume, see ``tsynd.planes``), with the report's four columns, as PNG.

    Args:
        path: of the PNG.
        sources: [n, C, H, W] or [n, C, D, H, W] in [0, 1].
        reconstructions: of the same shape.
        images: of the same shape, targeted.
        before: [n], uncertainty of the reconstructions in nats.
        after: [n], of the targeted images.
        labels: n texts.
        count: images; of more, these are spread over the gain from small to large.

    Returns:
        The path of the picture.

    Raises:
        InputError: sizes that do not belong together, or the folder cannot be written to.
        MissingExtraError: matplotlib is not installed.
    """
    stages = [x.detach().cpu() for x in (sources, reconstructions, images)]
    check_counts(len(labels), sources=stages[0], reconstructions=stages[1], images=stages[2])
    before, after = before[: len(labels)].detach().cpu(), after[: len(labels)].detach().cpu()
    rows = list(range(len(labels))) if len(labels) <= count else spread(None, after - before, count)
    limit = difference_scale(stages[2][rows] - stages[1][rows])
    shown = [(row, title, parts) for row in rows for title, parts in views([x[row] for x in stages])]
    figure = require("matplotlib.figure", "cli").Figure(figsize=(7.2, 1.86 * len(shown) + 0.35), facecolor="white")
    axes = figure.subplots(len(shown), 4, squeeze=False)
    for line, (row, title, parts) in zip(axes, shown, strict=True):
        last = not title or title.startswith(PLANES[-1])
        notes = ("", f"{nats(before[row])} nats", f"{nats(after[row])} nats", "") if last else [""] * 4
        for axis, picture, note in zip(line, strip(parts, limit), notes, strict=True):
            axis.imshow(picture, interpolation="nearest" if max(picture.shape) < 128 else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(note, fontsize=9, color="#444444", labelpad=3)
            axis.spines[:].set_color("#cccccc")
        text = f"{_plain(labels[row])}\n{title.split(',')[0]}" if title else _plain(labels[row])
        line[0].set_ylabel(text, fontsize=10, labelpad=6)
    for axis, title in zip(axes[0], (*COLUMNS[:3], f"difference (±{limit:.2f})"), strict=True):
        axis.set_title(title, fontsize=10, fontweight="bold", color="#222222")
    figure.tight_layout(pad=0.5, h_pad=0.6, w_pad=0.6)
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return Path(path)


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "cli").Figure(figsize=(4.8, 3.2))
    axis = figure.subplots()
    axis.set_xlabel(x, fontsize=10, color=INK)
    axis.set_ylabel(y, fontsize=10, color=INK)
    axis.tick_params(which="both", labelsize=9, color=SOFT, labelcolor=SOFT)
    axis.spines[:].set_color(SOFT)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def inline_png(pixels: np.ndarray[Any, Any]) -> str:
    """A picture, uint8 [H, W, 3], as the source of an HTML image."""
    buffer = io.BytesIO()
    require("PIL.Image", "cli").fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _svg(figure: Any, axis: Any, key: str, title: str, caption: str, alt: str) -> str:
    axis.legend(fontsize=9, frameon=False, labelcolor=INK)
    figure.tight_layout(pad=0.3)
    return inline_svg(figure, key, title, caption, alt)


def inline_svg(figure: Any, key: str, title: str, caption: str, alt: str) -> str:
    """A figure as inline SVG: the page's colours, ids of its own, no metadata or name spaces.

    Args:
        figure: matplotlib's, drawn with :data:`INK` and :data:`SOFT` where the page's colours shall stand.
        key: letters that no other figure of the page has; they go before its ids.
        title: HTML.
        caption: HTML.
        alt: text for who cannot see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{html.escape(alt)}">', text)
    ids: dict[str, int] = {}
    text = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', lambda m: f"{m[1]}{key}{ids.setdefault(m[2], len(ids))}", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return f'<figure class="card"><figcaption><b>{title}</b>{caption}</figcaption>{text}</figure>'


def _wide(values: np.ndarray[Any, Any]) -> bool:
    """Whether a logarithmic axis shows these better."""
    positive = values[values > 0]
    return len(positive) > 0.5 * values.size and bool(np.quantile(positive, 0.95) > 30 * np.quantile(positive, 0.05))


def histogram(before: Tensor, after: Tensor, short: str) -> str:
    """Uncertainty [N] before and after as inline SVG; ``short`` names the measure."""
    figure, axis = _axes(f"{short} [nats]", "images")
    kinds = [x[x.isfinite()].double().numpy() for x in (before, after)]
    both = np.concatenate([*kinds, np.zeros(0 if any(map(len, kinds)) else 1)])
    low, high, caption = float(both.min()), float(both.max()), ""
    if _wide(both):
        low = max(float(both[both > 0].min()), high * 1e-6)
        bins = np.geomspace(low, high, 31)
        axis.set_xscale("log")
        smaller = int((both < low).sum())
        caption = f" Logarithmic axis{f'; {smaller} smaller values stand in the first bin' if smaller else ''}."
    else:
        bins = np.linspace(low, high if high > low else low + 1e-3, 31)
    styles = ((_BEFORE, 0.45, "reconstruction"), (_AFTER, 0.35, "targeted"))
    for values, (colour, alpha, name) in zip(kinds, styles, strict=True):
        counts, _ = np.histogram(values.clip(bins[0], bins[-1]), bins)
        axis.stairs(counts, bins, fill=True, color=colour, alpha=alpha, label=name)
        axis.stairs(counts, bins, color=colour, linewidth=1.3)
    medians = [nats(np.median(values)) if len(values) else "unknown" for values in kinds]
    alt = f"Histogram of uncertainty: median {medians[0]} nats of reconstructions, {medians[1]} of targeted images"
    caption = f"Fresh samples. Median {medians[0]} → {medians[1]} nats.{caption}"
    return _svg(figure, axis, "h", "Before and after", caption, alt)


def curves(trajectory: Tensor, short: str) -> str:
    """Median, 10-90 % band and some single images of a trajectory [N, steps + 1], as inline SVG."""
    figure, axis = _axes("step", f"{short} [nats]")
    values = trajectory[trajectory.isfinite().all(1)].double().numpy()
    dropped = len(trajectory) - len(values)
    caption, alt = "Samples climbed on; thin lines are single images.", "Uncertainty by ascent step"
    if dropped:
        caption += f" {dropped} with a value that is not finite left out."
    if len(values):
        steps = np.arange(values.shape[1])
        low, median, high = np.quantile(values, [0.1, 0.5, 0.9], axis=0)
        order = values[:, -1].argsort()
        for row in values[order[np.unique(np.linspace(0, len(values) - 1, 10).astype(int))]]:
            axis.plot(steps, row, color=SOFT, linewidth=0.7, alpha=0.6)
        axis.fill_between(steps, low, high, color=_AFTER, alpha=0.2, linewidth=0, label="10–90 %")
        axis.plot(steps, median, color=_AFTER, linewidth=2, label="median")
        axis.set_xticks(steps[:: -(-len(steps) // 11)])
        if _wide(np.stack([low, high])):
            axis.set_yscale("log")
        alt += f": median from {nats(median[0])} to {nats(median[-1])} nats"
    return _svg(figure, axis, "c", "Along the ascent", caption, alt)
