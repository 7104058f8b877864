"""What the cells of a study say together: means over seeds, paired differences, and both as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsynd.evaluation.shifts import SEVERITIES, SHIFTS
from tsynd.study.arms import ARMS
from tsynd.study.statistics import mean_interval, sign_flip_p

__all__ = [
    "Difference",
    "Measure",
    "arms_of",
    "attack_budgets",
    "difference",
    "headline",
    "measure_of",
    "quality_of",
    "severity_curve",
    "shifted_accuracy",
    "sizes_of",
    "values",
]

Row = dict[str, Any]
"""One cell's results."""


@dataclass(frozen=True)
class Measure:
    """A number of a cell.

    Attributes:
        key: ``clean``, ``shifted``, an attack's name, or a score of clean images (``ece``, ``nll``, ...).
        title: for people.
        percent: whether it is a share, shown in percent.
        up: whether more is better.
    """

    key: str
    title: str
    percent: bool = True
    up: bool = True


_FIXED = (
    Measure("clean", "Clean"),
    Measure("shifted", "Shifted"),
    Measure("auroc", "AUROC"),
    Measure("ece", "Calibration error", up=False),
    Measure("nll", "NLL", percent=False, up=False),
    Measure("error_auroc", "Error detection"),
)


def headline(rows: Sequence[Row]) -> list[Measure]:
    """The measures that lead: balanced accuracy on clean, shifted and PGD-attacked images, as far as there are."""
    found = [measure for measure in _FIXED[:2] if any(math.isfinite(measure_of(row, measure.key)) for row in rows)]
    budgets = attack_budgets(rows, "pgd")
    if budgets:
        middle = min(budgets, key=lambda name: abs(budgets[name] - 2 / 255))
        found.append(Measure(middle, f"PGD-20, {middle.split(':')[1]}"))
    return found


def all_measures(rows: Sequence[Row]) -> list[Measure]:
    """The headline and the other scores of clean images."""
    return [*headline(rows), *_FIXED[2:]]


def measure_of(row: Row, key: str) -> float:
    """One measure of one cell; NaN where it is not defined or was not measured."""
    scores = row["scores"]
    if key == "shifted":
        return shifted_accuracy(scores)
    if key == "error_auroc":
        return _number(row["uncertainty"][key])
    if key in ("accuracy", "auroc", "ece", "nll"):
        return _number(scores["clean"][key])
    return _number(scores.get(key, {}).get("balanced_accuracy"))


def shifted_accuracy(scores: dict[str, dict[str, Any]]) -> float:
    """Balanced accuracy, mean over kinds of shift and within each over its severities; NaN where one is missing."""
    kinds = []
    for kind in SHIFTS:
        found = [_number(scores[name]["balanced_accuracy"]) for name in scores if name.startswith(f"{kind}:")]
        if found:
            kinds.append(float(np.mean(found)))
    return float(np.mean(kinds)) if kinds else math.nan


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """All train sizes, ascending."""
    return sorted({row["size"] for row in rows})


def arms_of(rows: Sequence[Row]) -> list[str]:
    """All arms: ``real`` first, then in the order of :data:`tsynd.study.arms.ARMS`, variants behind their kind."""
    return sorted({row["arm"] for row in rows}, key=lambda arm: (ARMS.index(arm.split(",")[0]), arm))


def values(rows: Sequence[Row], arm: str, size: int, key: str) -> dict[int, float]:
    """Seed → measure, where it is finite."""
    found = {row["seed"]: measure_of(row, key) for row in rows if row["arm"] == arm and row["size"] == size}
    return {seed: value for seed, value in sorted(found.items()) if math.isfinite(value)}


@dataclass(frozen=True)
class Difference:
    """An arm less another over the same (size, seed) pairs.

    Attributes:
        mean: of the differences.
        half_width: of its 95 % t interval, NaN for fewer than two pairs.
        p: of the two-sided sign-flip test.
        pairs: how many.
    """

    mean: float
    half_width: float
    p: float
    pairs: int


def difference(rows: Sequence[Row], arm: str, against: str, sizes: Sequence[int], key: str) -> Difference:
    """Paired difference of a measure, over the seeds that both arms have, of one size or of several together.

    The interval and the test take the pairs for independent; those of several sizes share seeds and test images.
    """
    pairs = []
    for size in sizes:
        ours, theirs = values(rows, arm, size, key), values(rows, against, size, key)
        pairs += [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    mean, half = mean_interval(pairs)
    return Difference(mean, half, sign_flip_p(pairs), len(pairs))


def attack_budgets(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Attack's name → budget in [0, 1], ascending."""
    names = {name for row in rows for name in row["scores"] if name.startswith(f"{kind}:")}
    budgets = {}
    for name in names:
        top, _, bottom = name.split(":")[1].partition("/")
        budgets[name] = float(top) / float(bottom or 1)
    return dict(sorted(budgets.items(), key=lambda item: item[1]))


def severity_curve(rows: Sequence[Row], arm: str, size: int, kind: str) -> list[float]:
    """Balanced accuracy, mean over seeds, on clean images and at the five severities of a kind of shift."""
    names = ["clean", *(f"{kind}:{severity}" for severity in SEVERITIES)]
    return [mean_interval(list(values(rows, arm, size, name).values()))[0] for name in names]


def quality_of(rows: Sequence[Row], arm: str, size: int) -> dict[str, float]:
    """Image quality of a generative arm, mean over seeds; empty for the others."""
    found = [row["quality"] for row in rows if row["arm"] == arm and row["size"] == size and row["quality"]]
    if not found:
        return {}
    return {key: float(np.mean([_number(quality[key]) for quality in found])) for key in found[0]}
