"""Scores of predictions, by torchmetrics: how right, how calibrated, and how telling the uncertainty is."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tsynd.utils.errors import require

__all__ = [
    "COVERAGE",
    "SCORES",
    "conformal_coverage",
    "conformal_limit",
    "conformal_size",
    "errors",
    "scores",
    "survival",
    "uncertainty_scores",
]

SCORES = ("balanced_accuracy", "accuracy", "auroc", "ece", "nll", "f1", "average_precision", "sensitivity_at_90")
"""The keys of :func:`scores`, besides ``recall:0``, ``recall:1``, ... of the classes."""

COVERAGE = tuple(round(0.05 * k, 2) for k in range(1, 21))
"""Shares of the images, the least uncertain first, at which selective accuracy is given."""

_BINS = 15
_SPECIFICITY = 0.9


def scores(logits: Tensor, labels: Tensor, task: str = "multiclass") -> dict[str, float]:
    """Scores of predictions: how many are right, how well they rank, and how far their probabilities can be believed.

    Multiclass: balanced accuracy is the mean recall and ``auroc`` the mean one-vs-rest area over the classes
    that occur; ``ece`` is the expected calibration error of the predicted class's probability (15 bins of equal
    width, mean absolute gap weighted by the bins' counts); ``nll`` is the mean of −log p(label) in nats.
    Multilabel: balanced accuracy is the mean over labels of (sensitivity + specificity) / 2 at probability 0.5,
    accuracy the share of right 0/1 answers, ``auroc`` the mean area over the labels; labels with one value only
    are left out of both. ``ece`` is that of the probability of "present" over all answers, ``nll`` the mean binary
    one over all answers. A score that is defined nowhere is NaN.

    Of the same classes or labels: ``f1`` is the mean F1; ``average_precision`` the mean area under the precision-recall
    curve and ``sensitivity_at_90`` the mean largest sensitivity at a specificity of 90 % or more, one class against the
    rest, but class 1 alone where there are two; ``recall:K`` the share of class K that is found.

    Args:
        logits: [N, C].
        labels: int64 [N], or 0/1 [N, C] for multilabel.
        task: "multiclass" or "multilabel".
    """
    metrics = require("torchmetrics.functional.classification", "train")
    logits, count = logits.float(), logits.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchmetrics warns of absent classes, which are left out below
        if task == "multiclass":
            chances = logits.softmax(1)
            present = torch.bincount(labels, minlength=count) > 0
            judged = present & (present.sum() > 1)  # an area needs images outside the class too
            recalls = found = metrics.multiclass_accuracy(logits, labels, num_classes=count, average=None)
            f1 = metrics.multiclass_f1_score(logits, labels, num_classes=count, average=None)
            precision = metrics.multiclass_average_precision(chances, labels, num_classes=count, average=None)
            sensitivity, _ = metrics.multiclass_sensitivity_at_specificity(chances, labels, count, _SPECIFICITY)
            areas = metrics.multiclass_auroc(chances, labels, num_classes=count, average=None)
            accuracy = metrics.multiclass_accuracy(logits, labels, num_classes=count, average="micro")
            ece = metrics.multiclass_calibration_error(chances, labels, num_classes=count, n_bins=_BINS)
            nll = functional.cross_entropy(logits, labels)
        else:
            truth, chances = labels.long(), logits.sigmoid()
            present = judged = truth.amin(0) != truth.amax(0)
            found = metrics.multilabel_recall(chances, truth, num_labels=count, average=None)
            f1 = metrics.multilabel_f1_score(chances, truth, num_labels=count, average=None)
            precision = metrics.multilabel_average_precision(chances, truth, num_labels=count, average=None)
            sensitivity, _ = metrics.multilabel_sensitivity_at_specificity(chances, truth, count, _SPECIFICITY)
            recalls = (found + metrics.multilabel_specificity(chances, truth, count, average=None)) / 2
            areas = metrics.multilabel_auroc(chances, truth, num_labels=count, average=None)
            accuracy = metrics.multilabel_accuracy(chances, truth, num_labels=count, average="micro")
            ece = metrics.binary_calibration_error(chances.flatten(), truth.flatten(), n_bins=_BINS)
            nll = functional.binary_cross_entropy_with_logits(logits, truth.float())
    ranked = judged & (torch.arange(count) == 1) if task == "multiclass" and count == 2 else judged
    return {
        "balanced_accuracy": float(recalls.reshape(-1)[present].mean()),
        "accuracy": float(accuracy),
        "auroc": _mean(areas, judged),
        "ece": float(ece),
        "nll": float(nll),
        "f1": _mean(f1, present),
        "average_precision": _mean(precision, ranked),
        "sensitivity_at_90": _mean(torch.as_tensor(sensitivity), ranked),
        **{f"recall:{k}": float(found.reshape(-1)[k]) for k in range(count) if bool(present[k])},
    }


def _mean(values: Tensor, chosen: Tensor) -> float:
    return float(values.reshape(-1)[chosen].mean()) if bool(chosen.any()) else math.nan


def errors(logits: Tensor, labels: Tensor, task: str = "multiclass") -> Tensor:
    """Which predictions are wrong, bool [N]; of several labels, whether any is (arguments as :func:`scores`)."""
    if task == "multiclass":
        return logits.argmax(1) != labels
    return ((logits > 0) != (labels > 0.5)).any(1)


def survival(right: Tensor, labels: Tensor, task: str = "multiclass") -> dict[str, float]:
    """Accuracy and balanced accuracy of what is only known to be right or wrong.

    Args:
        right: bool [N]; of several labels, whether all are.
        labels: int64 [N], or 0/1 [N, C] for multilabel, where both are the share of right images.
        task: "multiclass" or "multilabel".
    """
    each = [right] if task == "multilabel" else [right[labels == label] for label in sorted(set(labels.tolist()))]
    recalls = [float(part.double().mean()) for part in each]
    share = float(right.double().mean())
    return {"balanced_accuracy": sum(recalls) / len(recalls), "accuracy": share, "images": len(right)}


def conformal_limit(chances: Tensor, labels: Tensor, error: float = 0.1) -> float:
    """Least probability of a class that belongs to the conformal set (split conformal prediction, Vovk et al. 2005).

    Sets of all classes of at least this probability hold the right one for a share of 1 − ``error`` of new images,
    whatever the classifier, as long as these are of the kind of the calibration images.

    Args:
        chances: [N, C], probabilities of calibration images.
        labels: int64 [N].
        error: share of images whose set may miss the right class.

    Returns:
        A probability; 0 where N is too small for that error.
    """
    own = chances.gather(1, labels[:, None])[:, 0].sort().values
    rank = math.floor(error * (len(own) + 1))
    return float(own[rank - 1]) if rank else 0.0


def conformal_coverage(chances: Tensor, labels: Tensor, limit: float) -> float:
    """Share of images whose conformal set holds the right class: of probabilities [N, C] and labels int64 [N]."""
    return float((chances >= limit).gather(1, labels[:, None]).double().mean())


def conformal_size(chances: Tensor, labels: Tensor, limit: float) -> float:
    """Mean number of classes in the conformal sets of probabilities [N, C]."""
    return float((chances >= limit).sum(1).double().mean())


def uncertainty_scores(uncertainty: Tensor, wrong: Tensor) -> dict[str, Any]:
    """How well an uncertainty tells wrong predictions from right ones.

    Args:
        uncertainty: [N], finite, higher for what should be mistrusted.
        wrong: bool [N].

    Returns:
        ``error_auroc``: area under the ROC curve of finding the wrong predictions by their uncertainty (0.5 is
        chance; NaN where all or none are wrong). ``coverage``: :data:`COVERAGE`, and ``selective_accuracy`` the
        accuracy on that share of the images, the least uncertain first. ``aurc``: area under the risk-coverage
        curve, the mean over k of the error rate among the k least uncertain images (Geifman & El-Yaniv, 2017); lower
        is better. ``mean_uncertainty`` and ``error_rate``.
    """
    metrics = require("torchmetrics.functional.classification", "train")
    uncertainty, wrong = uncertainty.detach().cpu().double(), wrong.detach().cpu()
    count = len(wrong)
    area = math.nan
    if 0 < int(wrong.sum()) < count:
        # torchmetrics takes scores outside [0, 1] for logits; the area knows no scale
        area = float(metrics.binary_auroc(uncertainty / uncertainty.max().clamp_min(1e-30), wrong.long()))
    risk = wrong[uncertainty.argsort(stable=True)].double().cumsum(0) / torch.arange(1, count + 1)
    at = [min(max(round(share * count), 1), count) - 1 for share in COVERAGE]
    return {
        "error_auroc": area,
        "aurc": float(risk.mean()),
        "mean_uncertainty": float(uncertainty.mean()),
        "error_rate": float(wrong.double().mean()),
        "coverage": list(COVERAGE),
        "selective_accuracy": [1 - float(risk[k]) for k in at],
    }
