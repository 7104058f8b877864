"""The work of a study: training the shared autoencoders, and training and testing one cell."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import DataSource, LabelledImages, parts
from tsynd.data.load import load_data
from tsynd.data.readers.options import ReadOptions
from tsynd.evaluation.evaluate import (
    choose_conditions,
    conformal_metrics,
    evaluate,
    evaluate_uncertainty,
    predictions,
    score_predictions,
    spread_indices,
)
from tsynd.evaluation.image_quality import (
    distribution_distances,
    gradient_cosine,
    memorisation,
    penultimate_features,
    reconstruction_error,
)
from tsynd.evaluation.metrics import errors
from tsynd.evaluation.shifts import Condition
from tsynd.jobs.steps import fit_autoencoder_step, fit_classifier_step
from tsynd.models.checkpoint import load_model
from tsynd.models.sources import parse_source, trusted
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.study.arms import Arm, Base, parse_arm
from tsynd.study.settings import (
    Cell,
    Workplace,
    autoencoder_path,
    by_class,
    cell_path,
    classifier_path,
    make_augmentation,
    predictions_path,
    samples_path,
)
from tsynd.training.extra_images import as_parts
from tsynd.training.loop import FitReport
from tsynd.training.recipe import IN_PLACE
from tsynd.training.rounds import OfflineRounds
from tsynd.utils.atomic import atomic_path, save_npz
from tsynd.utils.calls import is_call
from tsynd.utils.fingerprint import hash_file, seal

__all__ = ["plain", "run_cell", "train_autoencoder"]

EXAMPLES = 8
_COSINE_IMAGES = 64
_MOST_IMAGES = 500  # of the synthetic set whose quality is measured
_REMEMBERED_BYTES = 2**29
_SPACING = 10_007  # between the augmentation's seeds: its call n uses seed + n
_FRESH = 1_000_003  # far from the augmentation's seeds, so that its images are not judged by samples they climbed


@functools.lru_cache(maxsize=2)
def _load(data: str, size: int, seed: int, reading: ReadOptions) -> DataSource:
    return load_data(data, train_size=size, seed=seed, **reading.given())


def train_autoencoder(place: Workplace, size: int, seed: int) -> None:
    """Train and save the autoencoder of a size and seed."""
    settings = place.settings
    fit_autoencoder_step(
        _load(place.data, size, seed, settings.reading),
        autoencoder_path(place, size, seed),
        seed=seed,
        which=settings.autoencoder_data,
        network=settings.autoencoder_options(),
        iterations=settings.autoencoder_iterations,
        device=place.device,
        progress=False,
    )


def run_cell(place: Workplace, cell: Cell) -> dict[str, Any]:
    """Train and test one cell and write its results; the autoencoder and the cell ``real`` are there already.

    Returns:
        What the cell's file holds, see ``docs/experiment.md``.
    """
    settings, arm = place.settings, parse_arm(cell.arm)
    source = _load(place.data, cell.size, cell.seed, settings.reading)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    autoencoder = None
    if is_call(settings.autoencoder.split(",")[0]):  # the study names it, so its file may
        trusted(parse_source(settings.autoencoder))
    if arm.generative:
        autoencoder = load_model(autoencoder_path(place, cell.size, cell.seed), device=place.device)
    model, report = _train(place, cell, arm, autoencoder, source)
    seconds["training"] = time.perf_counter() - start

    start = time.perf_counter()
    tested = getattr(source, settings.split)
    conformal = source.task == "multiclass" and settings.split == "test" and len(source.val) > 0
    logits = predictions(
        model,
        tested,
        task=source.task,
        conditions=_remembered(settings.conditions, tested),
        batch_size=64,  # what stays in cache is faster
    )
    metrics = conformal_metrics(model, source.val) if conformal else None
    scores = score_predictions(logits, tested.labels, source.task, metrics)
    chances = {name: one.softmax(1) if source.task == "multiclass" else one.sigmoid() for name, one in logits.items()}
    save_npz(predictions_path(place, cell), labels=tested.labels, **chances)
    seconds["conditions"] = time.perf_counter() - start

    start = time.perf_counter()
    scores |= evaluate(
        model,
        tested,
        task=source.task,
        conditions=(),
        attacks=settings.attacks,
        attack_images=settings.attack_images,
        query_images=settings.query_images,
        queries=settings.queries,
    )
    seconds["attacks"] = time.perf_counter() - start

    start = time.perf_counter()
    trust = evaluate_uncertainty(
        model, tested, task=source.task, samples=settings.uncertainty_samples, masks=settings.masks, seed=_FRESH
    )
    seconds["uncertainty"] = time.perf_counter() - start

    start = time.perf_counter()
    quality = None if autoencoder is None else _quality(place, cell, arm, autoencoder, model, source, tested)
    seconds["quality"] = time.perf_counter() - start
    result: dict[str, Any] = {
        **asdict(cell),
        "data": source.name,
        "class_names": list(source.class_names),
        "scores": scores,
        "uncertainty": trust,
        "quality": quality,
        "training": _training_facts(report),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "predictions": hash_file(predictions_path(place, cell)),
        **({"code": arm.code} if arm.own else {}),
    }
    result = dict(plain(result))
    with atomic_path(cell_path(place, cell)) as temporary:
        temporary.write_text(json.dumps(seal(result), allow_nan=False) + "\n", encoding="utf-8")
    return result


def _train(place: Workplace, cell: Cell, arm: Arm, autoencoder: Any, source: DataSource) -> tuple[nn.Module, FitReport]:
    settings = place.settings
    training: dict[str, Any] = {
        "iterations": settings.iterations,
        "augmentation_weight": settings.augmentation_weight,
        "warmup_fraction": settings.warmup_fraction,
        **arm.training,
    }
    base = training.pop("base", settings.base)
    augmentation = make_augmentation(arm, autoencoder, settings, source.task, _SPACING * cell.seed)
    rounds, folder = settings.rounds_of_training(), place.folder / "rounds" / cell.name
    if rounds and augmentation is not None:
        augmentation = OfflineRounds(source.train, augmentation, rounds=rounds, folder=folder)
    trained = fit_classifier_step(
        source,
        classifier_path(place, cell),
        seed=cell.seed,  # the same first weights in all arms
        network=settings.classifier_options(),
        features=place.folder / "features",
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        augmentation=augmentation,
        transform=None if base is None else Base(base, _SPACING * cell.seed + IN_PLACE),
        device=place.device,
        progress=False,
        **training,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return trained


def _training_facts(report: FitReport) -> dict[str, Any]:
    losses = torch.tensor(report.losses)
    curve = [float(part.mean()) for part in losses.tensor_split(min(30, len(losses)))]
    return {
        "iterations": report.iterations,
        "final_loss": float(losses[-max(1, len(losses) // 10) :].mean()),
        "loss_curve": [round(value, 5) for value in curve],
        "augmentation_share": round(report.augmentation_share, 4),
    }


def plain(value: Any) -> Any:
    """The same with None for numbers that are not finite: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Remembered:
    """A condition that disturbs a test set once per process: it is the same for every arm."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.made: dict[tuple[int, int, int], Tensor] = {}

    def __call__(self, images: Tensor, indices: Tensor, seed: int) -> Tensor:
        # chunks of a test set are runs of indices: the first and the number name them
        key = (int(indices[0]), len(indices), seed)
        if key not in self.made:
            self.made[key] = self.condition(images, indices, seed).cpu()
        return self.made[key].to(images.device)


_memory: dict[str, dict[str, Condition]] = {}


def _remembered(names: tuple[str, ...], tested: LabelledImages) -> dict[str, Condition]:
    """The conditions for one test set, with a memory where all their images fit into half a gibibyte."""
    chosen = choose_conditions(names)
    if 4 * tested.images.numel() * len(chosen) > _REMEMBERED_BYTES:
        return chosen
    key = hashlib.sha256(tested.images.contiguous().numpy().tobytes()).hexdigest() + " ".join(names)
    if key not in _memory:
        _memory.clear()  # one set at a time
        _memory[key] = {name: _Remembered(condition) for name, condition in chosen.items()}
    return _memory[key]


def _quality(
    place: Workplace,
    cell: Cell,
    arm: Arm,
    autoencoder: Any,
    model: nn.Module,
    source: DataSource,
    tested: LabelledImages,
) -> dict[str, Any] | None:
    """Measure images made of the training images against the finished classifier, and keep a few.

    None for an arm of one's own that does not give an image of every image.
    """
    device = torch.device(place.device)
    augmentation = make_augmentation(
        arm.latent(), autoencoder, place.settings, source.task, _SPACING * cell.seed + _FRESH
    )
    chosen = spread_indices(source.train.labels, _MOST_IMAGES)
    train, labels = (part.to(device) for part in source.train.batch(chosen))
    augmentation.prepare(parts(train))
    augmentation.set_progress(1.0)
    given = []
    for rows in torch.split(torch.arange(len(train)), place.settings.batch_size):
        augmentation.set_ids(chosen[rows])
        made_of = as_parts(augmentation(model, train[rows.to(device)], labels[rows.to(device)]))
        given += [part.images.detach() for part in made_of]
    made = torch.cat(given).to(train).clamp(0, 1)
    if made.shape != train.shape:
        return None
    with torch.no_grad():
        start = torch.cat([autoencoder.decode(autoencoder.encode(x)).clamp(0, 1) for x in parts(train)])
    posterior = MCDropout(model, place.settings.uncertainty_samples, place.settings.masks, _FRESH)
    with posterior.frozen(), torch.no_grad():
        ids = torch.arange(len(train), device=device)
        kept = [_predicts(model, images, labels, source.task) for images in (start, made)]
        sure = [posterior.uncertainty(images, ids, "mutual_information", source.task).cpu() for images in (start, made)]
    examples = by_class(labels.cpu(), spread_indices(labels.cpu(), EXAMPLES))
    save_npz(
        samples_path(place, cell),
        **{
            name: (images[examples.to(device)] * 255).round().byte()
            for name, images in (("source", train), ("reconstruction", start), ("made", made))
        },
        labels=labels[examples.to(device)],
        before=sure[0][examples],
        after=sure[1][examples],
    )
    real = load_model(classifier_path(place, Cell(cell.size, cell.seed, "real")), device=device)
    held_out = tested.pixels().to(device)
    features = [penultimate_features(real, images) for images in (made, train, held_out)]
    distances = distribution_distances(features[0], features[2])
    baseline = distribution_distances(features[1], features[2])
    return {
        "images": len(made),
        "reconstruction_error_train": reconstruction_error(autoencoder, train),
        f"reconstruction_error_{place.settings.split}": reconstruction_error(autoencoder, held_out),
        **memorisation(made.cpu(), train.cpu(), held_out.cpu()),
        **distances,
        "kid_train": baseline["kid"],
        "fid_train": baseline["fid"],
        "uncertainty_reconstruction": float(sure[0].mean()),
        "uncertainty": float(sure[1].mean()),
        "gradient_cosine": gradient_cosine(posterior, autoencoder, train[:_COSINE_IMAGES], source.task),
        "label_kept_reconstruction": kept[0],
        "label_kept": kept[1],
    }


def _predicts(model: nn.Module, images: Tensor, labels: Tensor, task: str) -> float:
    logits = torch.cat([model(part) for part in parts(images)])
    return float((~errors(logits, labels, task)).double().mean())
