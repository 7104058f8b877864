"""Test of a classifier: clean, disturbed and attacked images, and how much its uncertainty can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches, check_task, parts
from tsynd.evaluation.attacks import Attack, check_robustness, parse_attacks, perturb
from tsynd.evaluation.metrics import errors, scores, uncertainty_scores
from tsynd.evaluation.shifts import Condition, gaussian_noise, rotation, shifts
from tsynd.models.classifier import as_classifier
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.utils.device import place
from tsynd.utils.errors import InputError

__all__ = [
    "CONDITIONS",
    "Condition",
    "check_task",
    "choose_conditions",
    "evaluate",
    "evaluate_uncertainty",
    "gaussian_noise",
    "rotation",
    "scores",
]


Metric: TypeAlias = Callable[[Tensor, Tensor], Any]
"""(probabilities [N, K], labels) → number."""


def _clean(images: Tensor, indices: Tensor, seed: int) -> Tensor:
    return images


CONDITIONS: Mapping[str, Condition] = {"clean": _clean, "noise": gaussian_noise, "rotation": rotation, **shifts()}
"""Name → disturbance: ``clean``; ``KIND:SEVERITY`` of ``tsynd.evaluation.shifts.SHIFTS``; and two of fixed
strength, ``noise`` (σ = 0.05) and ``rotation`` (±15°).
``functools.partial(gaussian_noise, sigma=0.2)`` makes another."""


def choose_conditions(names: Sequence[str] | Mapping[str, Condition]) -> dict[str, Condition]:
    """Conditions by their names; ``shifts`` stands for all kinds in all severities.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(names, Mapping):
        return dict(names)
    chosen: dict[str, Condition] = {}
    for name in names:
        if name == "shifts":
            chosen |= shifts()
        elif name in CONDITIONS:
            chosen[name] = CONDITIONS[name]
        else:
            plain = [known for known in CONDITIONS if ":" not in known]
            raise InputError(
                f"conditions: got {name!r}, wanted some of {', '.join(plain)}, shifts, or KIND:SEVERITY"
                f" with KIND one of {', '.join(dict.fromkeys(known.split(':')[0] for known in shifts()))}"
            )
    return chosen


def evaluate(
    classifier: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    conditions: Sequence[str] | Mapping[str, Condition] = ("clean", "noise", "rotation"),
    attacks: Sequence[str] = (),
    attack_images: int | None = 256,
    query_images: int | None = 64,
    seed: int = 0,
    batch_size: int = 512,
    device: torch.device | str | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, dict[str, float]]:
    """Score a deterministic classifier (eval mode, no dropout) on disturbed and on attacked copies of ``data``.

    The disturbance of an image depends on ``seed`` and its index alone, not on the batch size or the classifier.

    Args:
        classifier: images [B, C, H, W] in [0, 1] → logits [B, K]; its modes are restored.
        data: labelled images, as :class:`tsynd.data.dataset.LabelledBatches` reads them.
        task: "multiclass" or "multilabel".
        conditions: names from ``CONDITIONS``, ``shifts`` for all of its kinds and severities, or a mapping
            name → function.
        attacks: as ``pgd:2/255`` or ``pgd``, see :func:`tsynd.evaluation.attacks.parse_attacks`.
        attack_images: how many images FGSM and PGD attack, spread evenly over the classes; None is all.
        query_images: how many of those Square attacks, which needs far more passes; None is all.
        seed: fixes the disturbances and the attacks' random choices.
        batch_size: images at a time; fewer where they are large.
        device: where to run; the classifier's own device by default, and it is moved if another is named.
        metrics: name → (probabilities [N, K], labels) → number, reported beside the scores of every condition.

    Returns:
        condition or attack (as ``pgd:2/255``) → {"balanced_accuracy", "accuracy", "auroc", "ece", "nll"}, see
        :func:`tsynd.evaluation.metrics.scores`. An attack's scores also have ``images``, how many were attacked;
        Square's have ``gradient_accuracy`` where PGD ran at its budget: PGD's accuracy on the same images. A Square
        that leaves a clearly lower accuracy than PGD is a sign of masked gradients.

    Raises:
        InputError: an unknown task, condition or attack, or data that do not fit the classifier.
        MissingExtraError: a package that a condition or an attack needs is not installed.
    """
    check_task(task)
    counts = {"batch_size": batch_size, "attack_images": attack_images, "query_images": query_images}
    for name, value in counts.items():
        if not (value is None and name != "batch_size") and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: got {value!r}, wanted an integer of 1 or more")
    chosen, wanted = choose_conditions(conditions), parse_attacks(attacks)
    if wanted:
        check_robustness()
    batches = LabelledBatches(data, task=task, name="data", by_index=True)
    classifier = as_classifier(classifier)
    target = place(device, classifier)
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    results: dict[str, dict[str, float]] = {}
    try:
        with torch.no_grad():
            classes = classifier(batches.first.to(target)).shape[1]
            labels = batches.labels(classes)
            for name, disturb in chosen.items():
                logits = [
                    classifier(disturb(batches.at(indices).images.to(target), indices, seed)).cpu()
                    for indices in batches.chunks(batch_size)
                ]
                whole = torch.cat(logits).float()
                results[name] = scores(whole, labels, task)
                chances = whole.softmax(1) if task == "multiclass" else whole.sigmoid()
                results[name] |= {own: float(metric(chances, labels)) for own, metric in (metrics or {}).items()}
        if wanted:
            pool = spread_indices(labels, attack_images)
            few = pool[spread_indices(labels[pool], query_images)]
            results |= _attacked(classifier, batches, labels, wanted, {"square": few}, pool, task, seed, target)
    finally:
        for module, training in modes.items():
            module.training = training
    return results


def spread_indices(labels: Tensor, count: int | None) -> Tensor:
    """``count`` indices, evenly spaced in the order of the classes, so that these keep their shares; all if None."""
    order = labels.argsort(stable=True) if labels.ndim == 1 else torch.arange(len(labels))
    if count is None or count >= len(order):
        return order.msort()
    return order[(torch.arange(count) * len(order)) // count].msort()


def _attacked(
    classifier: nn.Module,
    batches: LabelledBatches,
    labels: Tensor,
    attacks: Sequence[Attack],
    subsets: Mapping[str, Tensor],
    pool: Tensor,
    task: str,
    seed: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    broken: dict[str, Tensor] = {}
    for attack in sorted(attacks, key=lambda a: a.kind == "square"):  # after PGD, to be compared with it
        indices = subsets.get(attack.kind, pool)
        truth = labels[indices]
        found = perturb(
            classifier, batches.at(indices).images.to(device), truth.to(device), attack, task=task, seed=seed
        )
        with torch.no_grad():
            logits = torch.cat([classifier(part).cpu() for part in parts(found)])
        results[attack.name] = scores(logits, truth, task) | {"images": len(indices)}
        broken[attack.name] = errors(logits, truth, task)
        rival = broken.get(attack.name.replace("square", "pgd"))
        if attack.kind == "square" and rival is not None:
            right = ~rival[torch.isin(pool, indices)]
            results[attack.name]["gradient_accuracy"] = float(right.double().mean())
    return results


def evaluate_uncertainty(
    classifier: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    objective: str = "mutual_information",
    samples: int = 32,
    masks: str = "shared",
    seed: int = 0,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """How well the dropout posterior's uncertainty finds the deterministic classifier's errors on clean images.

    Args:
        classifier: with an active dropout; its modes are restored.
        data: labelled images, as :class:`tsynd.data.dataset.LabelledBatches` reads them.
        task: "multiclass" or "multilabel"; an image of several labels is wrong where any of them is.
        objective: ``mutual_information`` or ``entropy``.
        samples: T, posterior samples.
        masks: ``shared`` or ``independent``.
        seed: of the samples.
        batch_size: images at a time; fewer where they are large.
        device: as in :func:`evaluate`.

    Returns:
        See :func:`tsynd.evaluation.metrics.uncertainty_scores`.

    Raises:
        InputError: no active dropout, or data that do not fit the classifier.
    """
    check_task(task)
    batches = LabelledBatches(data, task=task, name="data", by_index=True)
    classifier = as_classifier(classifier)
    target = place(device, classifier)
    posterior = MCDropout(classifier, samples, masks, seed)
    values, logits = [], []
    with posterior.frozen(), torch.no_grad():
        for indices in batches.chunks(batch_size):
            images = batches.at(indices).images.to(target)
            values.append(posterior.uncertainty(images, indices.to(target), objective, task).cpu())
            logits.append(classifier(images).float().cpu())
    outputs = torch.cat(logits)
    labels = batches.labels(outputs.shape[1])
    return uncertainty_scores(torch.cat(values), errors(outputs, labels, task))
