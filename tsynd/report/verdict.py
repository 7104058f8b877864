"""What a run can tell, in words, and what it cannot."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

__all__ = ["ARMS", "Interval", "elsewhere", "images_needed", "points", "range_text", "verdict"]

ARMS = {
    "real": "real images alone",
    "standard": "standard augmentation (turns, shifts, scales, flips)",
    "reconstruction": "reconstructions of the autoencoder",
    "targeted": "the extra images of this run",
}
"""Classifier → what it was trained with besides the real images."""

_SHOWN = {"noise": "noisy", "rotation": "rotated"}


class Interval(NamedTuple):
    """A score, or a change of one, and the bounds of its 95 % interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether it leaves out 0."""
        return self.low > 0 or self.high < 0


def images_needed(change: Interval, count: int) -> int | None:
    """About how many test images a change as large as this would need to leave out 0; None for no change at all.

    Args:
        change: measured on ``count`` images.
        count: of test images.
    """
    half = (change.high - change.low) / 2
    if not math.isfinite(half) or change.value == 0:
        return None
    return max(math.ceil(count * (half / abs(change.value)) ** 2), 1)


def points(share: float) -> str:
    """Percentage points with their sign; ±0.0 for what rounds to nothing."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "±0.0" if text[1:] == "0.0" else text


def range_text(interval: Interval) -> str:
    """The bounds in percentage points."""
    return f"{points(interval.low)} to {points(interval.high)}"


def _count(number: int) -> str:
    return "more than a million" if number > 10**6 else f"about {number:,}".replace(",", "\N{NO-BREAK SPACE}")


def _judge(change: Interval, comparison: dict[str, Any]) -> str:
    if not math.isfinite(change.value):
        return "could not be measured"
    if change.clear:
        verb = "gained" if change.value > 0 else "lost"
        return f"{verb} {points(change.value)[1:]} points (95 % interval {range_text(change)})"
    needed = images_needed(change, comparison["images"])
    text = f"changed by {points(change.value)} points, which is within noise (95 % interval {range_text(change)}"
    return text + (f"; a change of that size would need {_count(needed)} test images)" if needed else ")")


def verdict(comparison: dict[str, Any]) -> list[str]:
    """The first sentences of a run's report.

    Args:
        comparison: see :func:`tsynd.evaluation.intervals.compare`; its classifiers are those of :data:`ARMS`, the last
            one is judged.

    Returns:
        Plain texts: what can be told of balanced accuracy on clean images, against what, and under disturbances.
    """
    images, fewest, least = (comparison[key] for key in ("images", "fewest", "least"))
    unit = "patient" if comparison.get("groups") else "image"
    if fewest < least:
        return [
            f"This run cannot tell whether the extra images help: a class has only {fewest} test {unit}"
            f"{'' if fewest == 1 else 's'} of its own, and with fewer than {least} of every class no figure below says "
            f"anything. Some hundred test {unit}s of every class would."
        ]
    changes = {
        name: {condition: Interval(*scores["balanced_accuracy"]) for condition, scores in own.items()}
        for name, own in comparison["changes"].items()
    }
    first, *others = next(iter(changes.values())).items()
    texts = [
        f"In balanced accuracy on {images} {first[0]} test images, against {ARMS['real']}, training with the extra "
        f"images {_judge(first[1], comparison)}."
    ]
    if all(own[first[0]]["auroc"][1] <= 0.5 for own in comparison["scores"].values()):
        texts.insert(
            0,
            "None of these classifiers can be told from guessing yet (AUROC .5), so that changes between them say "
            "little: train longer (--iterations) or on more images.",
        )
    for name, own in list(changes.items())[1:]:
        change = own[first[0]]
        if change.clear:
            gap = f"{points(abs(change.value))[1:]} points {'more' if change.value > 0 else 'less'}"
            texts.append(f"That is {gap} than {ARMS[name]} ({range_text(change)}).")
        else:
            texts.append(f"It cannot be told from {ARMS[name]} ({range_text(change)}): a gain may be theirs.")
    if others:
        text = "; ".join(f"on {_SHOWN.get(name, name)} images it {_judge(one, comparison)}" for name, one in others)
        texts.append(f"O{text[1:]}.")
    return texts


def elsewhere(others: dict[str, Any]) -> list[str]:
    """A sentence for each test set from elsewhere: name → what :func:`tsynd.jobs.run.run` says of it."""
    texts = []
    for name, other in others.items():
        comparison = other["comparison"]
        change = Interval(*comparison["changes"]["real"]["clean"]["balanced_accuracy"])
        if comparison["fewest"] < comparison["least"]:
            texts.append(f"On {name} ({other['images']} images) nothing can be told: a class has too few images there.")
        else:
            judged = _judge(change, comparison)
            texts.append(f"On {name} ({other['images']} images) training with the extra images {judged}.")
    return texts
