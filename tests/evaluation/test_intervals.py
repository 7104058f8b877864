"""Bootstrap intervals: their coverage, their pairing, their values against the metrics, and when they say nothing."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("torchmetrics")

from tsynd.evaluation.intervals import Bootstrap
from tsynd.evaluation.metrics import scores


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_first_draw_is_the_metric(task):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 3, generator=generator).round(decimals=1)  # with ties
    labels = torch.randint(3, (90,), generator=generator)
    if task == "multilabel":
        labels = torch.randint(2, (90, 3), generator=generator).float()
    found, wanted = Bootstrap(labels, task, draws=3).scores(logits), scores(logits, labels, task)
    for name, values in found.items():
        assert float(values[0]) == pytest.approx(wanted[name], abs=1e-6)


def simulated(count, generator, gain):
    """Two classifiers of two classes, right where a common difficulty allows; the second a little more often."""
    labels = torch.arange(2 * count) % 2
    hard = torch.rand(2 * count, generator=generator)
    own = torch.rand(2 * count, 2, generator=generator) * 0.2
    right = torch.stack([hard + own[:, 0] < 0.8, hard + own[:, 1] < 0.8 + gain], 1)
    answers = torch.where(right, labels[:, None], 1 - labels[:, None])
    return labels, [torch.nn.functional.one_hot(answer, 2).float() for answer in answers.T]


def test_coverage_of_a_paired_change():
    """Of nominal 95 % intervals from 300 images a class, 92 to 98 % hold the true gain."""
    generator = torch.Generator().manual_seed(3)
    # P(hard + u / 5 < t) of uniform hard and u is t - 0.1 inside, so the gain is that of the threshold
    held, runs = 0, 500
    for _ in range(runs):
        labels, (real, ours) = simulated(300, generator, 0.04)
        bootstrap = Bootstrap(labels, draws=400)
        change = bootstrap.scores(ours)["balanced_accuracy"] - bootstrap.scores(real)["balanced_accuracy"]
        interval = Bootstrap.interval(change)
        held += interval[1] <= 0.04 <= interval[2]
    assert 0.92 <= held / runs <= 0.98


def test_groups_widen_the_interval():
    """Ten copies of every image say no more than the images."""
    generator = torch.Generator().manual_seed(1)
    labels, (real, _) = simulated(30, generator, 0.0)
    copies = [part.repeat_interleave(10, 0) for part in (labels, real)]
    groups = torch.arange(60).repeat_interleave(10)
    widths = []
    for bootstrap, logits in (
        (Bootstrap(labels), real),
        (Bootstrap(copies[0], groups=groups), copies[1]),
        (Bootstrap(copies[0]), copies[1]),
    ):
        interval = Bootstrap.interval(bootstrap.scores(logits)["balanced_accuracy"])
        widths.append(interval[2] - interval[1])
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    assert widths[2] == pytest.approx(widths[0] / math.sqrt(10), rel=0.2)


def test_few_images_of_a_class_are_not_enough():
    labels = torch.tensor([0] * 2 + [1] * 100)
    assert not Bootstrap(labels).enough
    assert Bootstrap(torch.arange(40) % 2).enough
    assert not Bootstrap(torch.arange(40) % 2, groups=torch.arange(40) // 8).enough  # five patients
    assert not Bootstrap((torch.arange(40)[:, None] < torch.tensor([20, 3])).float(), "multilabel").enough
