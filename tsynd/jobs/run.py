"""The main job: train on real images, synthesise, train again with targeted augmentation, test both, report."""

from __future__ import annotations

import json
import math
import platform
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsynd.data.dataset import DataSource, LabelledImages, at_once
from tsynd.data.external import External
from tsynd.data.load import load_data
from tsynd.data.readers.options import ReadOptions
from tsynd.evaluation.evaluate import predictions
from tsynd.evaluation.image_quality import POOR_RECONSTRUCTION, unexplained
from tsynd.evaluation.intervals import compare
from tsynd.evaluation.metrics import errors, scores
from tsynd.jobs.job import STATE, Job
from tsynd.jobs.steps import NetworkChoice, fit_autoencoder_step, fit_classifier_step, new_autoencoder, new_classifier
from tsynd.models.checkpoint import load_model
from tsynd.ops.reference import OBJECTIVES
from tsynd.report.pictures import draw_examples
from tsynd.report.run_report import write_report
from tsynd.synthesis.api import synthesize, uncertainty
from tsynd.synthesis.ascent import AscentSettings, Status
from tsynd.synthesis.result import SynthesisResult, load_result
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.extra_images import Alternation, Augmentation
from tsynd.training.loop import Checkpoint, Track, tracking_accelerator
from tsynd.training.recipe import RECIPES, recipe
from tsynd.training.rounds import OfflineRounds
from tsynd.training.standard import FLIPS, StandardAugmentation
from tsynd.utils.atomic import atomic_path
from tsynd.utils.device import resolve_device
from tsynd.utils.errors import InputError, check_whole, require
from tsynd.utils.fingerprint import fingerprint, plain_settings
from tsynd.utils.progress import say
from tsynd.utils.timing import Phases
from tsynd.utils.version import __version__

__all__ = ["RunSettings", "run"]

# far from the ascent's seed, so that the reported uncertainty is not that of the samples climbed on
_FRESH = 1_000_003
_EVERY = 50  # steps between two states of a training
_CONDITIONS = ("clean", "noise", "rotation")
_NEEDED = (
    "monai.networks.nets",
    "safetensors.torch",
    "accelerate",
    "torchmetrics",
    "kornia",
    "matplotlib.figure",
    "PIL",
)


@dataclass(frozen=True, kw_only=True)
class RunSettings(NetworkChoice, AscentSettings):
    """Everything that decides the result of :func:`run`, besides the data and the version.

    The ascent's settings are those of the synthesis and, with the recipe ``targeted`` and save for T and K, of the
    training loop; ``task`` is the data's.

    Attributes:
        train_size: labelled training images; all by default.
        seed: of the subset, the networks, the batches and the posterior samples.
        autoencoder_data: ``train`` (the labelled subset) or ``all`` (every training image, without labels).
        autoencoder_iterations: optimiser steps of the autoencoder.
        iterations: optimiser steps of each classifier.
        batch_size: real images per step.
        recipe: extra images of the second classifier: ``robust`` (several kinds, see :func:`tsynd.recipe`) or
            ``targeted`` (by the ascent's settings, at every step).
        flip: flips that leave an image possible, for ``robust``: ``none``, ``horizontal`` or ``both``.
        dropout: ``head`` (before the last layer) or ``stages`` (everywhere).
        samples: T, posterior samples of the synthesis; a quarter of them in the training loop.
        augmentation_steps: K in the training loop, for ``targeted``.
        augmentation_weight: weight of the extra images' loss.
        reading: how the files of a folder or table are read.
    """

    train_size: int | None = None
    seed: int = 0
    autoencoder_data: str = "train"
    autoencoder_iterations: int = 800
    iterations: int = 300
    batch_size: int = 64
    recipe: str = "robust"
    flip: str = "none"
    dropout: str = "head"
    augmentation_steps: int = 3
    augmentation_weight: float = 1.0
    reading: ReadOptions = field(default_factory=ReadOptions)


def run(
    data: str | Path,
    output: str | Path,
    settings: RunSettings | None = None,
    *,
    device: str | None = None,
    progress: bool = True,
    track: str | None = None,
    test_data: External | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, synthesise, train with targeted images, test, report; see ``docs/run.md`` for the files.

    A run that was interrupted goes on where it was, a training at its last 50th step, when started in the same way.

    Args:
        data: anything :func:`tsynd.load_data` takes.
        output: a new or empty folder, or that of the same run interrupted.
        settings: see :class:`RunSettings`.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; None takes a GPU where there is one.
        progress: show bars where rich is installed.
        track: ``tensorboard``, ``wandb``, ``mlflow``, ...: log every training's losses, into the folder's ``logs``.
        test_data: name → more test sets, as of other hospitals, on which the same classifiers are scored.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        InputError: an argument, the data or the output folder cannot be used; raised before training starts.
    """
    settings = settings or RunSettings()
    _check(settings)
    for module in _NEEDED:  # now, not after the training
        require(module, "cli")
    where = str(resolve_device(device))
    if track is not None:
        tracking_accelerator(Track(track, Path()))
    source = load_data(data, train_size=settings.train_size, seed=settings.seed, **settings.reading.given())
    say(source.summary.lines(), progress)
    external = test_data if isinstance(test_data, External) else External(test_data or {})
    elsewhere = external.load(source, settings.reading)
    settings = replace(settings, task=source.task)
    new_classifier(source, settings.seed, **settings.classifier_network(settings.dropout))
    new_autoencoder(source, settings.seed, **settings.autoencoder_network())
    command = _study_command(str(data), Path(output).name, source, external, settings)
    settings = replace(settings, rounds=settings.rounds_of_training())
    content = [x for part in (source.train, source.unlabelled, source.test) for x in (part.images, part.labels)]
    with Job(Path(output).expanduser(), fingerprint(settings, content, **settings.content())) as job:
        return _stages(job, command, source, elsewhere, settings, where, progress, track)


def _stages(
    job: Job,
    command: str,
    source: DataSource,
    elsewhere: Mapping[str, LabelledImages],
    settings: RunSettings,
    where: str,
    progress: bool,
    track: str | None,
) -> dict[str, Any]:
    def tracked(name: str) -> Track | None:
        return None if track is None else Track(track, job.folder / "logs", name)

    def train_autoencoder(path: Path) -> dict[str, Any]:
        fit_autoencoder_step(
            source,
            path,
            seed=settings.seed,
            which=settings.autoencoder_data,
            network=settings.autoencoder_network(),
            iterations=settings.autoencoder_iterations,
            device=where,
            progress=progress,
            checkpoint=Checkpoint(path.with_suffix(STATE), _EVERY),
            track=tracked("autoencoder"),
        )
        return {}

    job.stage("autoencoder", "autoencoder.safetensors", train_autoencoder)
    autoencoder = load_model(job.folder / "autoencoder.safetensors", device=where)

    def train_classifier(path: Path, augmentation: Augmentation | None) -> dict[str, Any]:
        say([f"training {path.stem}, one of four"], progress)
        _, report = fit_classifier_step(
            source,
            path,
            seed=settings.seed,
            network=settings.classifier_network(settings.dropout),
            features=job.folder / "features",
            iterations=settings.iterations,
            batch_size=settings.batch_size,
            augmentation=augmentation,
            augmentation_weight=settings.augmentation_weight,
            device=where,
            progress=progress,
            checkpoint=Checkpoint(path.with_suffix(STATE), _EVERY),
            track=tracked(path.stem),
        )
        return {"augmentation_share": round(report.augmentation_share, 3)}

    def classifier_of(name: str, augmentation: Augmentation | None) -> nn.Module:
        job.stage(name, f"{name}.safetensors", lambda path: train_classifier(path, augmentation))
        return load_model(job.folder / f"{name}.safetensors", device=where)

    models = {"real": classifier_of("classifier_real", None)}
    real = models["real"]

    synthesis = job.stage(
        "synthesis",
        "synthetic.npz",
        lambda path: _synthesise(path, autoencoder, real, source, settings, where, progress),
    )
    augmentation: Augmentation
    if settings.recipe == "targeted":
        options = replace(settings, samples=max(1, settings.samples // 4), steps=settings.augmentation_steps).options()
        augmentation = TargetedAugmentation(autoencoder, seed=settings.seed, **options)
    else:
        options = {"task": settings.task, "flip": settings.flip, "seed": settings.seed}
        augmentation = recipe(settings.recipe, autoencoder, offline=bool(settings.rounds), **options)

    def in_rounds(one: Augmentation, folder: str) -> Augmentation:
        if not settings.rounds:
            return one
        parts = one.parts if isinstance(one, Alternation) else (one,)
        return OfflineRounds(source.train, *parts, rounds=settings.rounds, folder=job.folder / folder)

    # what a gain might be owed to instead
    standard = StandardAugmentation(settings.flip, seed=settings.seed)
    models["standard"] = classifier_of("classifier_standard", in_rounds(standard, "rounds_standard"))
    plain = TargetedAugmentation(autoencoder, task=source.task, direction="reconstruction", seed=settings.seed)
    models["reconstruction"] = classifier_of("classifier_reconstruction", in_rounds(plain, "rounds_reconstruction"))
    models["targeted"] = classifier_of("classifier", in_rounds(augmentation, "rounds"))
    return _finish(job, source, elsewhere, settings, synthesis, autoencoder, models, where, command)


def _study_command(data: str, folder: str, source: DataSource, others: External, settings: RunSettings) -> str:
    """What would settle whether the extra images help, of the same data, networks and test sets; ready to paste."""
    options: dict[str, Any] = {
        "data": data,
        "output": f"{folder}-study",
        "train_size": len(source.train),
        "seeds": 6,  # five cannot give p < .05
        "iterations": settings.iterations,
        "batch_size": settings.batch_size,
        "autoencoder_data": settings.autoencoder_data,
        "autoencoder_iterations": settings.autoencoder_iterations,
    }
    names = ["dropout", "augmentation_weight", *(part.name for part in fields(NetworkChoice))]
    if settings.recipe == "targeted":
        names += ["masks", "radius", "step_size", "rule", "label_consistency"]
    options |= {name: own for name in names if (own := getattr(settings, name)) != getattr(RunSettings, name)}
    options |= settings.reading.given()
    files = {name: found for name, found in others.sources.items() if isinstance(found, str | Path)}
    options["test_data"] = [f"{name}={found}" for name, found in files.items()]
    options["class_map"] = [f"{theirs}={ours}" for theirs, ours in others.class_map.items() if files]
    words = ["tsynd", "experiment"]
    for name, value in options.items():
        flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, list) else [value]
        words += [flag, *(str(one) for one in values if one is not True)] if values else []
    words.append("--arms")
    for arm in ("real", "standard", "reconstruction", "random", "trades", "mutual_information", "recipe"):
        flips = arm in ("standard", "recipe") and settings.flip != "none"
        words.append(f"{arm},flip={settings.flip}" if flips else arm)
    return shlex.join(words)


def _check(settings: RunSettings) -> None:
    """What the stages would only refuse after training has begun."""
    if settings.objective == "expected_information":
        raise InputError("objective: got 'expected_information', which needs target images; wanted another for a run")
    for name in ("autoencoder_iterations", "iterations", "batch_size", "augmentation_steps"):
        check_whole(name, getattr(settings, name))
    choices = {
        "autoencoder_data": ("train", "all"),
        "dropout": ("head", "stages"),
        "recipe": (*RECIPES, "targeted"),
        "flip": FLIPS,
        "objective": OBJECTIVES,  # the synthesis has no targets
    }
    for name, wanted in choices.items():
        if getattr(settings, name) not in wanted:
            raise InputError(f"{name}: got {getattr(settings, name)!r}, wanted one of {', '.join(wanted)}")
    settings.rounds_of_training()
    if not settings.augmentation_weight >= 0:
        raise InputError(f"augmentation_weight: got {settings.augmentation_weight!r}, wanted at least 0")


def _synthesise(
    path: Path,
    autoencoder: Any,
    classifier: nn.Module,
    source: DataSource,
    settings: RunSettings,
    device: str,
    progress: bool,
) -> dict[str, Any]:
    start, phases = time.perf_counter(), Phases()
    result = synthesize(
        autoencoder,
        classifier,
        source.train.pixels(),
        source.train.labels,
        seed=settings.seed,
        device=device,
        progress=progress,
        phases=phases,
        **settings.options(),
    )
    speed = len(result) / (time.perf_counter() - start)
    with phases("save"):
        result.save(path, class_names=source.class_names)
    return {"images_per_second": round(speed, 2), "phases": phases.rounded()}


def _decode(autoencoder: Any, latents: Tensor, device: str, values: int) -> Tensor:
    with torch.no_grad():
        parts = [autoencoder.decode(z.to(device)).clamp(0, 1).cpu() for z in latents.split(at_once(values))]  # type: ignore[no-untyped-call]
    return torch.cat(parts)


def _finish(
    job: Job,
    source: DataSource,
    elsewhere: Mapping[str, LabelledImages],
    settings: RunSettings,
    synthesis: dict[str, Any],
    autoencoder: Any,
    models: dict[str, nn.Module],
    device: str,
    command: str,
) -> dict[str, Any]:
    """Measure under fresh posterior samples, test the classifiers, write metrics and report."""
    phases, real = Phases(), models["real"]
    with phases("reconstructions"):
        result = load_result(job.folder / "synthetic.npz")
        reconstructions = _decode(autoencoder, result.source_latents, device, math.prod(source.image_shape))

    def fresh(images: Tensor) -> Tensor:
        return uncertainty(real, images, settings=settings, samples=4 * settings.samples, seed=settings.seed + _FRESH)

    with phases("fresh_uncertainty"):
        before, after = fresh(reconstructions), fresh(result.images)
    with phases("evaluation"):
        logits = {
            name: predictions(model, source.test, task=source.task, conditions=_CONDITIONS, seed=settings.seed)
            for name, model in models.items()
        }
        labels = source.test.labels
        evaluation = {
            name: {condition: scores(one, labels, source.task) for condition, one in own.items()}
            for name, own in logits.items()
        }
        comparison = compare(logits, labels, source.task, source.test.groups)
        others = {name: _elsewhere(models, tested, source) for name, tested in elsewhere.items()}
    # the reconstructions' classifier: the ascent did not climb on it
    judge = models["reconstruction"]
    seen = [predictions(judge, (x, result.labels), task=source.task)["clean"] for x in (reconstructions, result.images)]
    kept = [float((~errors(one, source.train.labels, source.task)).double().mean()) for one in seen]
    status = result.status.long().bincount(minlength=len(Status)).tolist()
    metrics: dict[str, Any] = {
        "version": __version__,
        "data": {
            "name": source.name,
            "task": source.task,
            "class_names": list(source.class_names),
            "train": len(source.train),
            "test": len(source.test),
            "test_counts": _counts(source.test.labels, source.class_names),
            "image_shape": list(source.image_shape),
            "summary": source.summary.lines(),
        },
        "settings": plain_settings(settings),
        "synthesis": {
            "images": len(result),
            "uncertainty_before": float(before.mean()),
            "uncertainty_after": float(after.mean()),
            "raised_fraction": float((after > before).double().mean()),
            "images_per_second": synthesis["images_per_second"],
            "status": {kind.name.lower(): status[kind] for kind in Status},
            "label_kept": kept[1],
            "label_kept_reconstruction": kept[0],
        },
        "reconstruction": _reconstruction(source, reconstructions),
        "evaluation": evaluation,
        "comparison": comparison,
        "elsewhere": others,
        "study_command": command,
        "seconds": {
            **job.seconds,
            **{f"synthesis_{name}": seconds for name, seconds in synthesis.get("phases", {}).items()},
            **phases.rounded(),
        },
        "machine": _machine(device),
    }
    with phases("report"):
        sources = source.train.pixels()
        write_report(
            job.folder / "report.html",
            metrics,
            result,
            sources,
            reconstructions,
            source.class_names,
            before,
            after,
            seen[1].softmax(1) if source.task == "multiclass" else seen[1].sigmoid(),
        )
        _draw(job.folder / "examples.png", source, result, reconstructions, before, after)
    metrics["seconds"]["report"] = phases.rounded()["report"]
    with atomic_path(job.folder / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def _elsewhere(models: Mapping[str, nn.Module], tested: LabelledImages, source: DataSource) -> dict[str, Any]:
    """What the classifiers get right of a test set from elsewhere."""
    logits = {name: predictions(model, tested, task=source.task) for name, model in models.items()}
    return {
        "images": len(tested),
        "test_counts": _counts(tested.labels, source.class_names),
        "evaluation": {name: scores(own["clean"], tested.labels, source.task) for name, own in logits.items()},
        "comparison": compare(logits, tested.labels, source.task, tested.groups),
    }


def _counts(labels: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Images of each class, or with each label."""
    if labels.ndim == 1:
        return {name: int((labels == number).sum()) for number, name in enumerate(names)}
    return {name: int((labels[:, number] > 0.5).sum()) for number, name in enumerate(names)}


def _reconstruction(source: DataSource, reconstructions: Tensor) -> dict[str, Any]:
    """Share of the images' variance that the autoencoder misses: of all, and of each class or label."""
    missed = unexplained(source.train.pixels(), reconstructions)
    labels, names = source.train.labels, source.class_names
    rows = [labels == place if labels.dim() == 1 else labels[:, place] > 0 for place in range(len(names))]
    own = {name: float(missed[row].mean()) for name, row in zip(names, rows, strict=True) if bool(row.any())}
    if (worst := max(own.values(), default=0.0)) > POOR_RECONSTRUCTION:
        name = max(own, key=lambda key: own[key])
        warnings.warn(
            f"autoencoder: it misses {worst:.0%} of the variance of {name!r} pictures (more than "
            f"{POOR_RECONSTRUCTION:.0%}): what it makes is too blurred to teach much; train it longer or take another",
            RuntimeWarning,
            stacklevel=2,
        )
    return {"unexplained": float(missed.mean()), "by_class": own}


def _draw(
    path: Path, source: DataSource, result: SynthesisResult, reconstructions: Tensor, before: Tensor, after: Tensor
) -> None:
    """Examples of typical gain, one class after another: four pictures, or two volumes."""
    count, train = 4 if source.spatial_dims == 2 else 2, source.train
    if source.task == "multiclass":
        typical = []
        for number in range(count):
            members = (train.labels == number % source.num_classes).nonzero()[:, 0]
            members = members if len(members) else torch.arange(len(train))
            order = members[(after - before)[members].argsort()]
            typical.append(int(order[min(len(order) - 1, len(order) * (5 + number // source.num_classes) // 10)]))
        labels = [source.class_names[int(train.labels[i])] for i in typical]
    else:
        typical = np.linspace(0, len(train) - 1, count).astype(int).tolist()
        labels = [""] * count
    pick = torch.tensor(typical)
    stages = train.pixels()[pick], reconstructions[pick], result.images[pick]
    draw_examples(path, *stages, before[pick], after[pick], labels)


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {
        "device": device,
        "processor": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
