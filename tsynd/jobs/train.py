"""``tsynd train``: one model into one folder, alone or as a process of torchrun, resumed after a kill."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tsynd.data.dataset import DataSource
from tsynd.data.load import load_data
from tsynd.data.readers.options import ReadOptions
from tsynd.jobs.job import Job
from tsynd.jobs.steps import ClassifierChoice, fit_autoencoder_step, fit_classifier_step, new_classifier
from tsynd.models.checkpoint import load_model, read_card
from tsynd.synthesis.ascent import AscentSettings
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.loop import Checkpoint, FitReport, Track, tracking_accelerator
from tsynd.utils.errors import InputError, check_choice, require
from tsynd.utils.fingerprint import fingerprint
from tsynd.utils.progress import say

__all__ = ["TrainSettings", "train_model"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ClassifierChoice, AscentSettings):
    """Everything that decides the trained model, besides the data and the version.

    The ascent's settings are those of the targeted images; ``task`` is the data's.

    Attributes:
        model: ``classifier`` or ``autoencoder``.
        autoencoder: file of a trained one: the classifier is then trained with targeted images.
        iterations: optimiser steps.
        batch_size: real images per step, over all processes.
        train_size: labelled training images; all by default.
        seed: of the subset, the network, the batches and the posterior samples.
        reading: how the files of a folder or table are read.
    """

    model: str = "classifier"
    autoencoder: str | None = None
    iterations: int = 300
    batch_size: int = 64
    train_size: int | None = None
    seed: int = 0
    samples: int = 8
    steps: int = 3
    reading: ReadOptions = field(default_factory=ReadOptions)


def train_model(
    data: str | Path,
    output: str | Path,
    settings: TrainSettings,
    *,
    device: str | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
    track: str | None = None,
) -> tuple[Path | None, float]:
    """Train a model and save it in ``output``, beside ``training.safetensors``, the state to go on from.

    Args:
        data: anything :func:`tsynd.load_data` takes.
        output: a new or empty folder, or that of the same training interrupted.
        settings: what to train.
        device: of every process; None takes GPUs where there are any, each process its own.
        checkpoint_every: steps between two states.
        progress: show a bar where rich is installed.
        track: ``tensorboard``, ``wandb``, ``mlflow``, ...: log the losses, into the folder's ``logs``.

    Returns:
        The model's file (None in all processes but the first) and the last loss.

    Raises:
        InputError: an argument, the data or the folder cannot be used; or a loss that is not finite.
    """
    check_choice("model", settings.model, ("classifier", "autoencoder"))
    if settings.autoencoder is not None and settings.model == "autoencoder":
        raise InputError("autoencoder: got a file together with model autoencoder, wanted it for a classifier")
    require("safetensors.torch", "train")
    state = require("accelerate", "train").PartialState(cpu=device == "cpu")
    if state.num_processes > 1 and device == "cuda":
        device = None
    if track is not None:
        tracking_accelerator(Track(track, Path()))
    source = load_data(data, train_size=settings.train_size, seed=settings.seed, **settings.reading.given())
    say(source.summary.lines(), progress and state.is_main_process)
    settings, folder = replace(settings, task=source.task), Path(output).expanduser()
    if settings.model == "classifier":
        new_classifier(
            source, settings.seed, **settings.classifier_network()
        )  # what cannot be is refused before the folder
    elif settings.classifier != "small":
        raise InputError(f"classifier: got {settings.classifier!r} with model autoencoder, wanted it for a classifier")
    given = fingerprint(settings, [source.train.images, source.train.labels], **_parts(settings))
    job: Job | None = None
    try:
        with state.main_process_first():
            job = Job(folder, given, alone=state.is_main_process)
        path = folder / f"{settings.model}.safetensors"
        report = _fit(
            source,
            settings,
            path if state.is_main_process else None,
            folder / "features",
            device=device,
            progress=progress,
            track=None if track is None else Track(track, folder / "logs", settings.model),
            checkpoint=Checkpoint(folder / "training.safetensors", checkpoint_every),
        )
        job.check_folder()
        state.wait_for_everyone()  # a process that leaves while others talk to it can abort them
        return (path if state.is_main_process else None), report.losses[-1]
    finally:
        if job is not None:
            job.close()
        if torch.distributed.is_initialized():
            gc.collect()  # what still holds the group, as the traceback of a failed step, goes before it
            torch.distributed.destroy_process_group()


def _parts(settings: TrainSettings) -> dict[str, Any]:
    """Files by their content; the autoencoder wherever its file lies."""
    own = {} if settings.autoencoder is None else {"autoencoder": read_card(settings.autoencoder).sha256}
    return {**settings.content(), **own}


def _fit(source: DataSource, settings: TrainSettings, path: Path | None, features: Path, **fitting: Any) -> FitReport:
    fitting |= {"seed": settings.seed, "iterations": settings.iterations, "batch_size": settings.batch_size}
    if settings.model == "autoencoder":
        return fit_autoencoder_step(source, path, **fitting)[1]
    augmentation = None
    if settings.autoencoder is not None:
        augmentation = TargetedAugmentation(load_model(settings.autoencoder), seed=settings.seed, **settings.options())
    fitting |= {"network": settings.classifier_network(), "features": features}
    return fit_classifier_step(source, path, augmentation=augmentation, **fitting)[1]
