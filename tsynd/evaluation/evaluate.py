"""Test of a classifier: clean, disturbed and attacked images, and how much its uncertainty can be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches, check_task, parts
from tsynd.evaluation.attacks import Attack, check_robustness, parse_attacks, perturb
from tsynd.evaluation.corruptions import MEDMNIST_C
from tsynd.evaluation.metrics import (
    conformal_coverage,
    conformal_limit,
    conformal_size,
    errors,
    scores,
    survival,
    uncertainty_scores,
)
from tsynd.evaluation.shifts import SEVERITIES, SHIFTS, Condition, gaussian_noise, rotation
from tsynd.models.classifier import ClassifierAdapter, logits_of
from tsynd.models.held import evaluating
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.utils.calls import call_of, is_call
from tsynd.utils.device import device_of, place
from tsynd.utils.errors import InputError, check_whole

__all__ = [
    "CONDITIONS",
    "FAMILIES",
    "Condition",
    "check_task",
    "choose_conditions",
    "conformal_metrics",
    "evaluate",
    "evaluate_uncertainty",
    "gaussian_noise",
    "predictions",
    "rotation",
    "score_predictions",
    "scores",
]


Metric: TypeAlias = Callable[[Tensor, Tensor], Any]
"""(probabilities [N, K], labels) → number."""


def _clean(images: Tensor, indices: Tensor, seed: int) -> Tensor:
    return images


FAMILIES: Mapping[str, Mapping[str, tuple[Condition, ...]]] = {"shifts": SHIFTS, "medmnist_c": MEDMNIST_C}
"""Name → kinds of disturbance, each in five severities: our seven, and the thirteen of MedMNIST-C."""


def _all_of(family: str, severity: str = "") -> dict[str, Condition]:
    return {
        f"{kind}:{number}": condition
        for kind, conditions in FAMILIES[family].items()
        for number, condition in zip(SEVERITIES, conditions, strict=True)
        if severity in ("", str(number))
    }


CONDITIONS: Mapping[str, Condition] = {
    "clean": _clean,
    "noise": gaussian_noise,
    "rotation": rotation,
    **_all_of("shifts"),
    **_all_of("medmnist_c"),
}
"""Name → disturbance: ``clean``; ``KIND:SEVERITY`` of :data:`FAMILIES`; and two of fixed strength, ``noise``
(σ = 0.05) and ``rotation`` (±15°). ``functools.partial(gaussian_noise, sigma=0.2)`` makes another."""


def choose_conditions(names: Sequence[str] | Mapping[str, Condition]) -> dict[str, Condition]:
    """Conditions by their names; a family's name stands for all of its kinds and severities, ``FAMILY:3`` for one.

    ``MODULE:FUNCTION`` is a function of yours, as :data:`Condition`; the function's name is the condition's.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(names, Mapping):
        return dict(names)
    chosen: dict[str, Condition] = {}
    for name in names:
        family, _, severity = str(name).partition(":")
        found = _all_of(family, severity) if family in FAMILIES else {}
        if found:
            chosen |= found
        elif name in CONDITIONS:
            chosen[name] = CONDITIONS[name]
        elif is_call(str(name)):
            own = str(name).partition(":")[2]
            if own in CONDITIONS or own in chosen:
                raise InputError(f"conditions: got {name!r}, wanted another name: there is a condition {own!r}")
            chosen[own] = call_of(str(name), "conditions")
        else:
            plain = [known for known in CONDITIONS if ":" not in known]
            kinds = [kind for kinds in FAMILIES.values() for kind in kinds]
            raise InputError(
                f"conditions: got {name!r}, wanted some of {', '.join([*plain, *FAMILIES])}, FAMILY:SEVERITY, or"
                f" KIND:SEVERITY with KIND one of {', '.join(kinds)}; or MODULE:FUNCTION"
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
    queries: int = 100,
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
        conditions: names as :func:`choose_conditions` takes them, or a mapping name → function.
        attacks: as ``pgd:2/255`` or ``pgd``, see :func:`tsynd.evaluation.attacks.parse_attacks`.
        attack_images: how many images are attacked by gradient, spread evenly over the classes; None is all.
        query_images: how many of those Square attacks, which needs far more passes; None is all.
        queries: how many of them for each of these.
        seed: fixes the disturbances and the attacks' random choices.
        batch_size: images at a time; fewer where they are large.
        device: where to run; the classifier's own device by default, and it is moved if another is named.
        metrics: name → (probabilities [N, K], labels) → number, reported beside the scores of every condition.

    Returns:
        condition or attack (as ``pgd:2/255``) → {"balanced_accuracy", "accuracy", "auroc", "ece", "nll"}, see
        :func:`tsynd.evaluation.metrics.scores`. An attack's scores also have ``images``, how many were attacked.
        Square's have ``gradient_accuracy`` where a PGD ran at its budget: what the gradients left on the same images.
        A Square that leaves clearly less is a sign of masked gradients.
        DeepFool's have ``distance``: the median Euclidean length of its perturbations, 0 for wrong predictions.
        Where several attacks ran at one budget, ``worst:BUDGET`` counts an image of those that all of them attacked
        as right where it is under each.

    Raises:
        InputError: an unknown task, condition or attack, or data that do not fit the classifier.
        MissingExtraError: a package that a condition or an attack needs is not installed.
    """
    check_task(task)
    counts = {"batch_size": batch_size, "queries": queries, "attack_images": attack_images}
    for name, value in {**counts, "query_images": query_images}.items():
        check_whole(name, value, optional=name.endswith("_images"))
    chosen, wanted = choose_conditions(conditions), parse_attacks(attacks)
    check_robustness(wanted)
    batches, classifier, target = _opened(classifier, data, task, device)
    with evaluating(classifier):
        classes, found = _logits(classifier, batches, chosen, seed, batch_size, target)
        labels = batches.labels(classes)
        results = score_predictions(found, labels, task, metrics)
        if wanted:
            pool = spread_indices(labels, attack_images)
            subsets = {"square": pool[spread_indices(labels[pool], query_images)]}
            attacked = _Attacked(classifier, batches, labels, task, seed)
            for attack in sorted(wanted, key=lambda a: a.kind == "square"):  # after PGD, to be compared with it
                attacked.add(attack, subsets.get(attack.kind, pool), queries, target)
            results |= attacked.results | attacked.worst()
    return results


def _opened(
    classifier: nn.Module, data: Any, task: str, device: torch.device | str | None
) -> tuple[LabelledBatches, ClassifierAdapter, torch.device]:
    """Data and classifier as they are used here, and where."""
    batches, network = LabelledBatches(data, task=task, name="data", by_index=True), logits_of(classifier)
    return batches, network, place(device, network)


@torch.no_grad()
def _logits(
    classifier: ClassifierAdapter,
    batches: LabelledBatches,
    conditions: Mapping[str, Condition],
    seed: int,
    batch_size: int,
    device: torch.device,
) -> tuple[int, dict[str, Tensor]]:
    """Number of classes, and condition → logits [N, C] float32."""
    classifier.look(batches.at(torch.arange(min(2, len(batches)))).images.to(device))
    classes = classifier(batches.first.to(device)).shape[1]
    found = {}
    for name, disturb in conditions.items():
        parts_of_it = [
            classifier(disturb(batches.at(indices).images.to(device), indices, seed)).cpu()
            for indices in batches.chunks(batch_size)
        ]
        found[name] = torch.cat(parts_of_it).float()
    return classes, found


def predictions(
    classifier: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    conditions: Sequence[str] | Mapping[str, Condition] = ("clean",),
    seed: int = 0,
    batch_size: int = 512,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """What :func:`evaluate` scores, arguments as there: condition → logits [N, C] float32, on the CPU."""
    batches, network, target = _opened(classifier, data, task, device)
    with evaluating(network):
        return _logits(network, batches, choose_conditions(conditions), seed, batch_size, target)[1]


def score_predictions(
    logits: Mapping[str, Tensor], labels: Tensor, task: str, metrics: Mapping[str, Metric] | None = None
) -> dict[str, dict[str, float]]:
    """What :func:`evaluate` says of the conditions, from what :func:`predictions` gave and the labels."""
    results = {}
    for name, one in logits.items():
        chances = one.softmax(1) if task == "multiclass" else one.sigmoid()
        own = {key: float(metric(chances, labels)) for key, metric in (metrics or {}).items()}
        results[name] = scores(one, labels, task) | own
    return results


def spread_indices(labels: Tensor, count: int | None) -> Tensor:
    """``count`` indices, evenly spaced in the order of the classes, so that these keep their shares; all if None."""
    order = labels.argsort(stable=True) if labels.ndim == 1 else torch.arange(len(labels))
    if count is None or count >= len(order):
        return order.msort()
    return order[(torch.arange(count) * len(order)) // count].msort()


def conformal_metrics(classifier: nn.Module, data: Any, *, batch_size: int = 512) -> dict[str, Metric]:
    """Coverage and size of conformal sets as ``metrics`` for :func:`evaluate`; of several classes, one right.

    Args:
        classifier: as in :func:`evaluate`, on its device.
        data: labelled images that were not trained on, by which the sets' limit is set: 90 % of images of their kind
            will be covered.
        batch_size: images at a time.

    Returns:
        ``conformal_coverage`` and ``conformal_size``, see :func:`tsynd.evaluation.metrics.conformal_limit`.
    """
    batches, network = LabelledBatches(data, by_index=True), logits_of(classifier)
    with evaluating(network):
        classes, found = _logits(network, batches, {"clean": _clean}, 0, batch_size, device_of(classifier))
    limit = conformal_limit(found["clean"].softmax(1), batches.labels(classes))
    return {
        "conformal_coverage": partial(conformal_coverage, limit=limit),
        "conformal_size": partial(conformal_size, limit=limit),
    }


class _Attacked:
    """The scores of attacks, one after another, and what is right under all of them."""

    def __init__(self, classifier: nn.Module, batches: LabelledBatches, labels: Tensor, task: str, seed: int) -> None:
        self.classifier, self.batches, self.labels, self.task, self.seed = classifier, batches, labels, task, seed
        self.results: dict[str, dict[str, float]] = {}
        self._right: dict[float, list[tuple[str, dict[int, bool]]]] = {}  # budget → kind and image → right

    def add(self, attack: Attack, indices: Tensor, queries: int, device: torch.device) -> None:
        """Attack these images and score what is left."""
        truth, images = self.labels[indices], self.batches.at(indices).images.to(device)
        steps = queries if attack.kind == "square" else None
        found = perturb(self.classifier, images, truth.to(device), attack, task=self.task, seed=self.seed, steps=steps)
        with torch.no_grad():
            logits = torch.cat([self.classifier(part).cpu() for part in parts(found)])
        result = scores(logits, truth, self.task) | {"images": len(indices)}
        right = ~errors(logits, truth, self.task)
        others = self._right.setdefault(attack.budget, [])
        if attack.kind == "deepfool":
            length = (found - images).flatten(1).norm(dim=1).cpu()
            result["distance"] = float(torch.where(right, math.inf, length).median())
        elif attack.kind == "square":
            rivals = [left for kind, left in others if kind.endswith("pgd")]
            if rivals:
                survived = [all(left[index] for left in rivals) for index in indices.tolist()]
                result["gradient_accuracy"] = sum(survived) / len(survived)
        others.append((attack.kind, dict(zip(indices.tolist(), right.tolist(), strict=True))))
        self.results[attack.name] = result

    def worst(self) -> dict[str, dict[str, float]]:
        """What survives all attacks of a budget, where there are several."""
        found: dict[str, dict[str, float]] = {}
        for budget, attacks in self._right.items():
            if len(attacks) > 1 and math.isfinite(budget):
                images = sorted(set.intersection(*(set(right) for _, right in attacks)))
                right = torch.tensor([all(one[index] for _, one in attacks) for index in images])
                found[Attack("worst", budget).name] = survival(right, self.labels[images], self.task)
        return found


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
    batches, classifier, target = _opened(classifier, data, task, device)
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
