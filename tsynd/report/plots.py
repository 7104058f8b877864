"""The pictures of a report: strips of images, the histogram and the ascent curves."""

from __future__ import annotations

import html
import io
import re
from typing import Any

import numpy as np
from torch import Tensor

from tsynd.report.pictures import nats
from tsynd.utils.errors import require

__all__ = ["INK", "SOFT", "curves", "histogram", "inline_svg", "quiet_axis"]

# stand-ins that matplotlib draws with and the page replaces, so that plots follow its light or dark scheme
INK, SOFT, _BEFORE, _AFTER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", _BEFORE: "var(--before)", _AFTER: "var(--after)"}


def _axes(x: str, y: str) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "cli").Figure(figsize=(4.8, 3.2))
    axis = figure.subplots()
    axis.set_xlabel(x, fontsize=10, color=INK)
    axis.set_ylabel(y, fontsize=10, color=INK)
    quiet_axis(axis)
    return figure, axis


def quiet_axis(axis: Any) -> None:
    """Soft ticks and spines, none above and on the right."""
    axis.tick_params(which="both", labelsize=9, color=SOFT, labelcolor=SOFT)
    axis.spines[:].set_color(SOFT)
    axis.spines[["top", "right"]].set_visible(False)


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
