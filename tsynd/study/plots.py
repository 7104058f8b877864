"""The plots of a study, as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tsynd.evaluation.attacks import KINDS
from tsynd.evaluation.evaluate import FAMILIES
from tsynd.report.plots import INK, SOFT, inline_svg, quiet_axis
from tsynd.study.statistics import mean_interval
from tsynd.study.summary import Measure, Row, arms_of, attack_budgets, severities_of, severity_curve, sizes_of, values
from tsynd.utils.errors import require

__all__ = ["budget_plot", "dot_plot", "label_of", "selective_plot", "severity_plot", "size_plot"]

# Okabe & Ito's colours, told apart by colour-blind readers too; markers and dashes say the same again
_STYLES: dict[str, tuple[str, str, str]] = {
    "real": (INK, "o", "-"),
    "reconstruction": ("#8a8f98", "s", "--"),
    "random": ("#e69f00", "^", "--"),
    "entropy": ("#3fa7e0", "D", "-"),
    "mutual_information": ("#d55e00", "o", "-"),
    "loss": ("#cc79a7", "v", "-"),
    "expected_information": ("#b3202a", "p", "-"),
    "adversarial": ("#009e73", "P", ":"),
    "trades": ("#0072b2", "*", ":"),
    "standard": ("#a6761d", "<", ":"),
    "randaugment": ("#8067d6", "X", ":"),
}
_OWN_COLOURS = ("#5b5ea6", "#0f9aa8", "#9b2335", "#7a8b00")
_MORE_MARKERS = "ovs^DPX*<>"
_TITLES = {"jpeg": "JPEG", "fgsm": "FGSM", "pgd": "PGD-20", "apgd": "AutoPGD", "square": "Square (no gradient)"}
_NAMES = {"real": "real only", "randaugment": "RandAugment", "trades": "TRADES"}


def label_of(arm: str) -> str:
    """An arm's name for people."""
    head, *options = arm.split(",")
    if ":" in head:
        return f"{head.partition(':')[2]} ({', '.join(options)})" if options else head.partition(":")[2]
    name = " + ".join(_NAMES.get(kind, kind.replace("_", " ")) for kind in head.split("+"))
    return f"{name} ({', '.join(options).replace('_', ' ')})" if options else name


def _style(arm: str, arms: Sequence[str]) -> dict[str, Any]:
    """Of the arm's kind; of several in turn the last one's, with other dashes."""
    head = arm.split(",")[0]
    kind = head.split("+")[-1]
    own = [other for other in arms if ":" in other.split(",")[0]]
    usual = (_OWN_COLOURS[own.index(arm) % len(_OWN_COLOURS)], "d", "-.") if arm in own else (INK, "h", "-")
    colour, marker, dashes = _STYLES.get(kind, usual)
    brothers = [other for other in arms if other.split(",")[0].split("+")[-1] == kind]
    place = brothers.index(arm)
    if place:  # variants of one kind: the same colour, another marker and dashes
        marker, dashes = _MORE_MARKERS[place % len(_MORE_MARKERS)], ("--", ":", "-.")[place % 3]
    return {"color": colour, "marker": marker, "linestyle": dashes, "markersize": 4.5, "linewidth": 1.5}


def _title_of(kind: str) -> str:
    return _TITLES.get(kind, kind.replace("_", " ").capitalize())


def _grid(columns: int, rows: int, height: float, **options: Any) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "cli").Figure(figsize=(9.6, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        quiet_axis(axis)
        axis.grid(axis="y", color=SOFT, alpha=0.18, linewidth=0.7)
    return figure, axes


def _legend(figure: Any, axes: Any, arms: Sequence[str]) -> None:
    handles, names = axes.flat[0].get_legend_handles_labels()
    columns = min(len(arms), 4)
    figure.tight_layout(pad=0.4, w_pad=1.2, h_pad=1.2)
    rows = math.ceil(len(names) / columns)
    height = figure.get_size_inches()[1]
    figure.subplots_adjust(bottom=figure.subplotpars.bottom + (0.24 * rows + 0.05) / height)
    figure.legend(
        handles, names, loc="lower center", ncols=columns, fontsize=9.5, frameon=False, labelcolor=INK, handlelength=2.6
    )


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=10.5, color=INK, loc="left")


def _interval(mean: float, half: float, top: float) -> tuple[float, float]:
    """How far an interval reaches below and above its mean, cut to the range [0, top] of what is measured."""
    half = 0.0 if math.isnan(half) else half
    return min(half, max(mean, 0.0)), min(half, max(top - mean, 0.0))


def _widen(axis: Any, least: float) -> None:
    """Show at least so much of the scale, so that a difference of nothing does not fill the page."""
    low, high = axis.get_xlim()
    if high - low < least:
        axis.set_xlim((low + high - least) / 2, (low + high + least) / 2)
    axis.locator_params(axis="x", nbins=4)


def dot_plot(rows: Sequence[Row], measures: Sequence[Measure], size: int, key: str) -> str:
    """Every seed's value, their mean and its 95 % interval, by arm; one panel per measure."""
    arms = arms_of(rows)
    figure, axes = _grid(len(measures), 1, 0.9 + 0.34 * len(arms), sharey=True)
    places = np.arange(len(arms))[::-1]
    for axis, measure in zip(axes[0], measures, strict=True):
        scale = 100 if measure.percent else 1
        for place, arm in zip(places, arms, strict=True):
            found = [scale * value for value in values(rows, arm, size, measure.key).values()]
            if not found:
                continue
            mean, half = mean_interval(found)
            style = _style(arm, arms)
            axis.plot(found, [place - 0.2] * len(found), ".", color=style["color"], alpha=0.55, markersize=5)
            low, high = _interval(mean, half, scale if measure.percent else math.inf)
            axis.errorbar(
                mean, place + 0.06, xerr=[[low], [high]], color=style["color"], marker=style["marker"],
                markersize=6, capsize=3, linewidth=1.6,
            )  # fmt: skip
            if arm == "real":
                axis.axvline(mean, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        _widen(axis, 5.0 if measure.percent else 0.1)
        _title(axis, f"{measure.title}{' [%]' if measure.percent else ''}")
        axis.grid(axis="x", color=SOFT, alpha=0.18, linewidth=0.7)
        axis.grid(visible=False, axis="y")
        axis.set_ylim(-0.6, len(arms) - 0.4)
    axes[0][0].set_yticks(places, [label_of(arm) for arm in arms])
    axes[0][0].tick_params(axis="y", labelcolor=INK, labelsize=9.5)
    figure.tight_layout(pad=0.4, w_pad=1.4)
    seeds = len({row["seed"] for row in rows if row["size"] == size})
    dots = f"Small dots are the {seeds} seeds, the large mark is their mean with its 95 % interval. "
    return inline_svg(
        figure,
        key,
        f"{size} labelled images",
        f"{dots if seeds > 1 else ''}The dotted line is the mean of real only.",
        f"Balanced accuracy by arm with {size} labelled images",
    )


def size_plot(rows: Sequence[Row], measures: Sequence[Measure], key: str) -> str:
    """Means over seeds against the train size; one panel per measure."""
    arms, sizes = arms_of(rows), sizes_of(rows)
    figure, axes = _grid(len(measures), 1, 3.4)
    for axis, measure in zip(axes[0], measures, strict=True):
        scale = 100 if measure.percent else 1
        for arm in arms:
            means = [mean_interval(list(values(rows, arm, size, measure.key).values()))[0] for size in sizes]
            axis.plot(sizes, scale * np.array(means), label=label_of(arm), **_style(arm, arms))
        axis.set_xscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("labelled training images", fontsize=9.5, color=INK)
        _title(axis, f"{measure.title}{' [%]' if measure.percent else ''}")
    _legend(figure, axes, arms)
    caption = "Mean over seeds; logarithmic size axis. Seeds and intervals stand in the plots below."
    return inline_svg(figure, key, "By number of labels", caption, "Balanced accuracy against train size")


def severity_plot(rows: Sequence[Row], size: int, family: str, key: str) -> str:
    """Balanced accuracy against severity; one panel per kind of a family that was measured, nothing for none."""
    arms = arms_of(rows)
    kinds = [kind for kind in FAMILIES[family] if severities_of(rows, kind)]
    if not kinds:
        return ""
    columns = min(4, len(kinds))
    figure, axes = _grid(
        columns, math.ceil(len(kinds) / columns), 2.25 * math.ceil(len(kinds) / columns) + 0.6, sharey=True
    )
    for axis, kind in zip(axes.flat, kinds, strict=False):
        places = [0, *severities_of(rows, kind)]
        for arm in arms:
            curve = 100 * np.array(severity_curve(rows, arm, size, kind))
            axis.plot(places, curve, label=label_of(arm), **_style(arm, arms))
        axis.set_xticks(places, ["clean", *map(str, places[1:])])
        _title(axis, _title_of(kind))
    for axis in list(axes.flat)[len(kinds) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("balanced accuracy [%]", fontsize=9.5, color=INK)
    _legend(figure, axes, arms)
    caption = f"{size} labelled images, mean over seeds. Severities are listed in the method's part below."
    title = {"shifts": "By severity of the shift", "medmnist_c": "By severity of MedMNIST-C's corruptions"}[family]
    return inline_svg(figure, key, title, caption, "Balanced accuracy against severity")


def budget_plot(rows: Sequence[Row], size: int, key: str) -> str:
    """Balanced accuracy against the attack's budget; one panel per attack of several budgets, nothing for none."""
    arms = arms_of(rows)
    kinds = [kind for kind in KINDS if len(attack_budgets(rows, kind)) > 1]
    if not kinds:
        return ""
    figure, axes = _grid(len(kinds), 1, 3.3, sharey=True)
    for axis, kind in zip(axes[0], kinds, strict=False):
        budgets = attack_budgets(rows, kind)
        for arm in arms:
            clean = mean_interval(list(values(rows, arm, size, "clean").values()))[0]
            means = [mean_interval(list(values(rows, arm, size, name).values()))[0] for name in budgets]
            places = [0, *(255 * budget for budget in budgets.values())]
            axis.plot(places, 100 * np.array([clean, *means]), label=label_of(arm), **_style(arm, arms))
        axis.set_xticks(places, [f"{place:.3g}" for place in places])
        axis.set_xlabel("budget [1/255 of the intensity range]", fontsize=9.5, color=INK)
        _title(axis, _title_of(kind))
    axes[0][0].set_ylabel("balanced accuracy [%]", fontsize=9.5, color=INK)
    _legend(figure, axes, arms)
    caption = f"{size} labelled images, mean over seeds; budget 0 is all clean images, the others a fixed part of them."
    return inline_svg(figure, key, "By budget of the attack", caption, "Balanced accuracy against attack budget")


def selective_plot(rows: Sequence[Row], size: int, key: str) -> str:
    """Accuracy on the least uncertain share of the images."""
    arms = arms_of(rows)
    figure, axes = _grid(1, 1, 3.6)
    for arm in arms:
        found = [row["uncertainty"] for row in rows if row["arm"] == arm and row["size"] == size]
        if found:
            mean = 100 * np.mean([one["selective_accuracy"] for one in found], axis=0)
            coverage = 100 * np.array(found[0]["coverage"])
            axes[0][0].plot(coverage, mean, label=label_of(arm), markevery=4, **_style(arm, arms))
    axes[0][0].set_xlabel("images kept, the least uncertain first [%]", fontsize=9.5, color=INK)
    axes[0][0].set_ylabel("accuracy [%]", fontsize=9.5, color=INK)
    _legend(figure, axes, arms)
    caption = (
        f"{size} labelled images, mean over seeds: accuracy when the images of highest mutual information are left to "
        "a person. Clean images."
    )
    return inline_svg(figure, key, "Selective accuracy", html.escape(caption), "Selective accuracy against coverage")
