"""What the cells of a study say together: means over seeds, paired differences, and both as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tsynd.evaluation.attacks import KINDS
from tsynd.evaluation.evaluate import CONDITIONS, FAMILIES
from tsynd.evaluation.metrics import SCORES
from tsynd.evaluation.shifts import SEVERITIES
from tsynd.study.arms import ARMS
from tsynd.study.statistics import mean_interval, sign_flip_p

__all__ = [
    "Difference",
    "Measure",
    "all_measures",
    "arms_of",
    "attack_budgets",
    "attack_measures",
    "clean_measures",
    "condition_measures",
    "difference",
    "family_accuracy",
    "headline",
    "measure_of",
    "quality_of",
    "severities_of",
    "severity_curve",
    "sizes_of",
    "values",
]

Row = dict[str, Any]
"""One cell's results."""


@dataclass(frozen=True)
class Measure:
    """A number of a cell.

    Attributes:
        key: ``clean``, a family of disturbances, one kind (``blur:``), an attack's name, or a score of clean images
            (``ece``, ``nll``, ...).
        title: for people.
        percent: whether it is a share, shown in percent.
        up: whether more is better.
    """

    key: str
    title: str
    percent: bool = True
    up: bool = True


_CLEAN = Measure("clean", "Clean")
_FAMILIES = (Measure("shifts", "Shifted"), Measure("medmnist_c", "MedMNIST-C"))
_NLL = Measure("nll", "NLL", percent=False, up=False)
_OTHERS = (
    Measure("auroc", "AUROC"),
    Measure("ece", "Calibration error", up=False),
    Measure("conformal_coverage", "Conformal coverage"),
    Measure("conformal_size", "Conformal set size", percent=False, up=False),
    Measure("error_auroc", "Error detection"),
    Measure("aurc", "Area under selective risk", percent=False, up=False),
)
_MORE = (
    Measure("f1", "F1"),
    Measure("average_precision", "Average precision"),
    Measure("sensitivity_at_90", "Sensitivity at 90 % specificity"),
)
_MOST_CLASSES = 12  # whose recalls a table shows; the others' are in results.csv
_ATTACKS = {"pgd": "PGD-20", "apgd": "AutoPGD", "worst": "Worst attack"}


def _measured(rows: Sequence[Row], measures: Iterable[Measure]) -> list[Measure]:
    return [measure for measure in measures if any(math.isfinite(measure_of(row, measure.key)) for row in rows)]


def headline(rows: Sequence[Row]) -> list[Measure]:
    """The measures that lead, as far as there are: balanced accuracy here, elsewhere, disturbed, attacked; NLL."""
    attacked = []
    for kind, title in _ATTACKS.items():
        budgets = attack_budgets(rows, kind)
        if budgets:
            middle = min(budgets, key=lambda name: abs(budgets[name] - 2 / 255))
            attacked.append(Measure(middle, f"{title}, {middle.split(':')[1]}"))
    places = dict.fromkeys(name for row in rows for name in row["scores"] if name.startswith("at:"))
    elsewhere = [Measure(name, f"At {name[3:]}") for name in places]
    return _measured(rows, [_CLEAN, *elsewhere, *_FAMILIES, *attacked, _NLL])


def all_measures(rows: Sequence[Row]) -> list[Measure]:
    """The headline, and what else says how far a classifier can be trusted on clean images."""
    return [*headline(rows), *_measured(rows, _OTHERS)]


def clean_measures(rows: Sequence[Row]) -> list[Measure]:
    """More scores of clean images, the recall of each class, and one's own metrics."""
    known = {*SCORES, "images", *(measure.key for measure in _OTHERS)}
    names = dict.fromkeys(name for row in rows for name in row["scores"]["clean"] if name not in known)
    classes = rows[0].get("class_names", []) if rows else []
    recalls = [Measure(f"recall:{k}", f"Recall of {name}") for k, name in enumerate(classes[:_MOST_CLASSES])]
    own = [Measure(name, name.replace("_", " "), percent=False) for name in names if not name.startswith("recall:")]
    return _measured(rows, [*_MORE, *recalls, *own])


def attack_measures(rows: Sequence[Row]) -> list[Measure]:
    """Balanced accuracy under every attack that was run, and the distance that DeepFool needs."""
    kinds = (*KINDS, "worst")
    names = {name for row in rows for name in row["scores"] if name.split(":")[0] in kinds and name != "deepfool"}
    order = sorted(names, key=lambda name: (kinds.index(name.split(":")[0]), _budget(name)))
    distance = Measure("distance", "DeepFool distance", percent=False)
    own = [Measure(name, name) for name in _own_names(rows, attacks=True)]
    return _measured(rows, [*(Measure(name, name) for name in order), distance, *own])


def _own_names(rows: Sequence[Row], attacks: bool) -> list[str]:
    """Names of the user's own conditions, or attacks: these say how many images they took."""
    known = {"deepfool", *CONDITIONS}
    names = {
        name: "images" in scores
        for row in rows
        for name, scores in row["scores"].items()
        if ":" not in name and name not in known
    }
    return [name for name, attacked in names.items() if attacked == attacks]


def condition_measures(rows: Sequence[Row]) -> list[Measure]:
    """Balanced accuracy under every kind of disturbance that was measured, mean over its severities."""
    names = [kind for family in FAMILIES.values() for kind in family]
    alone = [name for name in ("noise", "rotation") if any(name in row["scores"] for row in rows)]
    return [
        *_measured(rows, [Measure(f"{name}:", name.replace("_", " ")) for name in names]),
        *(Measure(name, f"{name} (one strength)") for name in alone),
        *(Measure(name, name.replace("_", " ")) for name in _own_names(rows, attacks=False)),
    ]


def measure_of(row: Row, key: str) -> float:
    """One measure of one cell; NaN where it is not defined or was not measured."""
    scores = row["scores"]
    if key in FAMILIES:
        return family_accuracy(scores, key)
    if key.endswith(":"):
        return _kind_accuracy(scores, key[:-1])
    if key in ("error_auroc", "aurc"):
        return _number(row["uncertainty"].get(key))
    if key == "distance":
        return _number(scores.get("deepfool", {}).get(key))
    if key in scores["clean"]:
        return _number(scores["clean"][key])
    return _number(scores.get(key, {}).get("balanced_accuracy"))


def _kind_accuracy(scores: dict[str, dict[str, Any]], kind: str) -> float:
    found = [_number(scores[name]["balanced_accuracy"]) for name in scores if name.startswith(f"{kind}:")]
    return float(np.mean(found)) if found else math.nan


def family_accuracy(scores: dict[str, dict[str, Any]], family: str) -> float:
    """Balanced accuracy, mean over the kinds of a family that were measured and in each over its severities."""
    kinds = [_kind_accuracy(scores, kind) for kind in FAMILIES[family] if any(n.startswith(f"{kind}:") for n in scores)]
    return float(np.mean(kinds)) if kinds else math.nan


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """All train sizes, ascending."""
    return sorted({row["size"] for row in rows})


def arms_of(rows: Sequence[Row]) -> list[str]:
    """All arms: ``real`` first, then in the order of :data:`tsynd.study.arms.ARMS`, several in turn behind single ones,
    variants behind their kind, the recipe last."""

    def place(arm: str) -> tuple[Any, ...]:
        head = arm.split(",")[0]
        kinds = [head] if ":" in head else head.split("+")  # whose function may be gone
        return arm.startswith("recipe"), len(kinds), [ARMS.index(k) if k in ARMS else len(ARMS) for k in kinds], arm

    return sorted({row["arm"] for row in rows}, key=place)


def values(rows: Sequence[Row], arm: str, size: int, key: str) -> dict[tuple[str, int], float]:
    """Data set and seed → measure, where it is finite."""
    own = [row for row in rows if row["arm"] == arm and row["size"] == size]
    found = {(row.get("data", ""), row["seed"]): measure_of(row, key) for row in own}
    return {pair: value for pair, value in sorted(found.items()) if math.isfinite(value)}


@dataclass(frozen=True)
class Difference:
    """An arm less another over the same data set, size and seed.

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
        pairs += [ours[pair] - theirs[pair] for pair in ours if pair in theirs]
    mean, half = mean_interval(pairs)
    return Difference(mean, half, sign_flip_p(pairs), len(pairs))


def _budget(name: str) -> float:
    top, _, bottom = name.split(":")[1].partition("/")
    return float(top) / float(bottom or 1)


def attack_budgets(rows: Sequence[Row], kind: str) -> dict[str, float]:
    """Attack's name → budget in [0, 1], ascending."""
    names = {name for row in rows for name in row["scores"] if name.startswith(f"{kind}:")}
    return {name: _budget(name) for name in sorted(names, key=_budget)}


def severities_of(rows: Sequence[Row], kind: str) -> list[int]:
    """The severities of a kind of disturbance that were measured."""
    return [number for number in SEVERITIES if any(f"{kind}:{number}" in row["scores"] for row in rows)]


def severity_curve(rows: Sequence[Row], arm: str, size: int, kind: str) -> list[float]:
    """Balanced accuracy, mean over seeds, on clean images and at the measured severities of a kind of disturbance."""
    names = ["clean", *(f"{kind}:{severity}" for severity in severities_of(rows, kind))]
    return [mean_interval(list(values(rows, arm, size, name).values()))[0] for name in names]


def quality_of(rows: Sequence[Row], arm: str, size: int) -> dict[str, tuple[float, float]]:
    """Image quality of a generative arm, mean and half of its 95 % t interval over seeds; or empty."""
    chosen = [row["quality"] for row in rows if row["arm"] == arm and row["size"] == size and row["quality"]]
    found: dict[str, tuple[float, float]] = {}
    for key in chosen[0] if chosen else ():
        numbers = [_number(quality.get(key)) for quality in chosen]
        found[key] = mean_interval([number for number in numbers if math.isfinite(number)])
    return found
