"""How far scores would move with other test images: bootstrap over images, images of a group together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tsynd.evaluation.metrics import errors

__all__ = ["LEAST", "Bootstrap", "compare"]

LEAST = 10
"""Test images (or groups) that every class must have before an interval says anything."""


class Bootstrap:
    """The same draws of test images for every classifier, so that changes between them are paired.

    Draw 0 is the test set itself. Images are drawn with replacement, those of a group all together.

    Args:
        labels: int64 [N], or 0/1 [N, L] for multilabel.
        task: "multiclass" or "multilabel".
        groups: int64 [N], numbers that images of one patient share; None takes every image for its own.
        draws: how many.
        seed: of the draws.
    """

    def __init__(
        self, labels: Tensor, task: str = "multiclass", groups: Tensor | None = None, draws: int = 1000, seed: int = 0
    ) -> None:
        self.labels, self.task = labels, task
        count = len(labels)
        numbers = torch.arange(count) if groups is None else torch.unique(groups, return_inverse=True)[1]
        distinct = int(numbers.max()) + 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(distinct, (draws, distinct), generator=generator)
        counts = torch.zeros(draws, distinct, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(draws, distinct, dtype=torch.float64)
        )
        self.weights = torch.cat([torch.ones(1, count, dtype=torch.float64), counts[:, numbers]])
        if task == "multiclass":
            present = sorted(set(labels.tolist()))
            self._members = torch.stack([labels == label for label in present], 1)
        else:
            truth = labels > 0.5
            self._both = truth.any(0) & ~truth.all(0)
            self._members = torch.cat([truth[:, self._both], ~truth[:, self._both]], 1)
        own = [len(set(numbers[column].tolist())) for column in self._members.T]
        self.fewest = min(own, default=0)

    @property
    def enough(self) -> bool:
        """Whether every class (multilabel: presence and absence of every label) has :data:`LEAST` images or groups."""
        return self.fewest >= LEAST

    def scores(self, logits: Tensor) -> dict[str, Tensor]:
        """``balanced_accuracy``, ``accuracy`` and ``auroc`` of every draw, [draws + 1] each.

        Args:
            logits: [N, C] of one classifier.
        """
        if self.task == "multiclass":
            right = (~errors(logits, self.labels)).double()[:, None].expand(-1, self._members.shape[1])
            whole = right[:, 0]
        else:
            answers = (logits > 0) == (self.labels > 0.5)
            right, whole = answers[:, self._both].double().repeat(1, 2), answers.double().mean(1)
        members = self._members.double()
        recalls = (self.weights @ (members * right)) / (self.weights @ members)
        return {
            "balanced_accuracy": recalls.nanmean(1),
            "accuracy": (self.weights @ whole) / self.weights.sum(1),
            "auroc": self._areas(logits),
        }

    def _areas(self, logits: Tensor) -> Tensor:
        """Mean area under the one-vs-rest curves of the classes that occur, of every draw."""
        if self.task == "multiclass":
            columns = [
                (logits.float().softmax(1)[:, label], self.labels == label) for label in set(self.labels.tolist())
            ]
        else:
            truth = self.labels > 0.5
            columns = [(logits[:, k], truth[:, k]) for k in range(truth.shape[1])]
        areas = []
        for score, positive in columns:
            values, place = torch.unique(score, return_inverse=True)
            wide = [
                torch.zeros(len(self.weights), len(values), dtype=torch.float64).index_add_(
                    1, place, self.weights * part
                )
                for part in (positive, ~positive)
            ]
            below = wide[1].cumsum(1) - wide[1] / 2  # ties count half
            areas.append((wide[0] * below).sum(1) / (wide[0].sum(1) * wide[1].sum(1)))
        return torch.stack(areas, 1).nanmean(1)

    @staticmethod
    def interval(values: Tensor) -> tuple[float, float, float]:
        """Value and bounds of the 95 % interval of a score [draws + 1] or of a difference of two; NaN if undefined."""
        drawn = values[1:][values[1:].isfinite()]
        if not bool(values[0].isfinite()) or not len(drawn):
            return math.nan, math.nan, math.nan
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return float(values[0]), low, high


def compare(
    logits: Mapping[str, Mapping[str, Tensor]], labels: Tensor, task: str = "multiclass", groups: Tensor | None = None
) -> dict[str, Any]:
    """Scores of several classifiers with their intervals, and the paired changes between the last and the others.

    Args:
        logits: classifier → condition → [N, C], of the same test images in all.
        labels: int64 [N], or 0/1 [N, L] for multilabel.
        task: "multiclass" or "multilabel".
        groups: see :class:`Bootstrap`.

    Returns:
        JSON-able: ``scores``: classifier → condition → score → [value, low, high]; ``changes``: the same of the last
        classifier less each of the others; ``images`` and ``groups`` (None: unknown), how many; ``fewest`` and
        ``least``: see :attr:`Bootstrap.enough`.
    """
    bootstrap = Bootstrap(labels, task, groups)
    drawn = {name: {c: bootstrap.scores(one) for c, one in own.items()} for name, own in logits.items()}
    last = list(drawn)[-1]

    def intervals(own: Mapping[str, Mapping[str, Tensor]], less: Mapping[str, Mapping[str, Tensor]] | None) -> Any:
        return {
            condition: {
                score: list(Bootstrap.interval(values if less is None else values - less[condition][score]))
                for score, values in scores.items()
            }
            for condition, scores in own.items()
        }

    return {
        "scores": {name: intervals(own, None) for name, own in drawn.items()},
        "changes": {name: intervals(drawn[last], own) for name, own in drawn.items() if name != last},
        "images": len(labels),
        "groups": None if groups is None else len(set(groups.tolist())),
        "fewest": bootstrap.fewest,
        "least": LEAST,
    }
