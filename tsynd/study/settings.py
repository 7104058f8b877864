"""What a study is: its settings, its arms and its cells."""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsynd.data.dataset import DataSource
from tsynd.data.readers.options import ReadOptions
from tsynd.evaluation.attacks import KINDS, parse_attacks
from tsynd.evaluation.evaluate import CONDITIONS, FAMILIES, choose_conditions
from tsynd.jobs.steps import NetworkChoice, new_autoencoder, new_classifier
from tsynd.models.autoencoder import check_autoencoder
from tsynd.study.arms import Arm, Base, augmentation_of, parse_arm
from tsynd.utils.calls import call_digest, is_call
from tsynd.utils.errors import InputError, check_choice, check_whole

__all__ = [
    "DEFAULT_ARMS",
    "Cell",
    "StudySettings",
    "Workplace",
    "autoencoder_path",
    "by_class",
    "cell_path",
    "cells_of",
    "check_study",
    "classifier_path",
    "make_augmentation",
    "predictions_path",
    "read_arrays",
    "samples_path",
]

DEFAULT_ARMS = (
    "real",
    "standard",
    "randaugment",
    "adversarial",
    "trades",
    "reconstruction",
    "random",
    "entropy",
    "mutual_information",
    "recipe",
)


@dataclass(frozen=True)
class StudySettings(NetworkChoice):
    """Everything that decides a cell's result, besides its size, seed and arm, the data and the version.

    Attributes:
        autoencoder_data: ``train`` (the labelled subset) or ``all`` (every training image, without labels).
        autoencoder_iterations: optimiser steps of the autoencoder.
        autoencoder_widths: channels of the autoencoder at half and at a quarter of the resolution.
        latent_channels: channels of the latents.
        iterations: optimiser steps of every classifier, the same in all arms.
        batch_size: real images per step.
        learning_rate: of the classifiers.
        dropout: ``head`` (before the last layer) or ``stages`` (everywhere).
        dropout_rate: before the last layer.
        base: what is done to every real image in all arms: ``standard`` (as standard,flip=both), ``randaugment``, or
            MODULE:FUNCTION; None is nothing.
        augmentation_weight: λ, weight of the extra images' loss.
        warmup_fraction: part of the steps before extra images are added.
        samples: T in the training loop, posterior samples.
        masks: ``shared`` or ``independent`` dropout masks.
        steps: K in the training loop, ascent steps.
        radius: of the ball, times latent deviation times sqrt(dimension); also of the random arm.
        step_size: of the ascent, in the unit of the radius; 2.5 * radius / steps by default.
        rule: ``l2`` (a ball) or ``linf`` (a box).
        label_consistency: least mean probability that the source label must keep.
        ratio: extra images per real image.
        every: extra images at every n-th step.
        adversarial_budget: of the arms adversarial and trades, in [0, 1] pixel units.
        adversarial_steps: of the same arms.
        split: what is scored: ``test``, or ``val`` to choose settings on.
        conditions: clean, noise (σ = 0.05), rotation (±15°), shifts (seven kinds) and medmnist_c (thirteen), each in
            all severities or in one, as shifts:3, or one kind, as blur:3; or MODULE:FUNCTION.
        attacks: fgsm, pgd, apgd, square, or one budget of the range [0, 1], as pgd:2/255; deepfool; MODULE:FUNCTION;
            none for none.
        attack_images: images that are attacked by gradient; None (on the command line 0) is all.
        query_images: how many of these Square attacks; None (on the command line 0) is all.
        queries: Square's for each of these images.
        uncertainty_samples: T of the measured uncertainty, posterior samples.
        reading: how the files of a folder or table are read.
    """

    autoencoder_data: str = "train"
    autoencoder_iterations: int = 800
    autoencoder_widths: tuple[int, int] = (32, 64)
    latent_channels: int = 8
    iterations: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    dropout: str = "head"
    dropout_rate: float = 0.5
    base: str | None = None
    augmentation_weight: float = 1.0
    warmup_fraction: float = 0.3
    samples: int = 8
    masks: str = "shared"
    steps: int = 3
    radius: float = 0.5
    step_size: float | None = None
    rule: str = "l2"
    label_consistency: float | None = None
    ratio: float = 1.0
    every: int = 1
    adversarial_budget: float = 4 / 255
    adversarial_steps: int = 5
    split: str = "test"
    conditions: tuple[str, ...] = ("clean", "shifts:1", "shifts:3", "shifts:5", "medmnist_c:3")
    attacks: tuple[str, ...] = ("pgd:2/255", "pgd:4/255", "apgd:2/255", "square:2/255", "deepfool")
    attack_images: int | None = 64
    query_images: int | None = 32
    queries: int = 100
    uncertainty_samples: int = 32
    reading: ReadOptions = field(default_factory=ReadOptions)

    def augmentation(self) -> dict[str, Any]:
        """The options of :class:`tsynd.TargetedAugmentation`."""
        names = ("samples", "masks", "steps", "radius", "step_size", "rule", "label_consistency", "ratio", "every")
        return {name: getattr(self, name) for name in names}

    def autoencoder_options(self) -> dict[str, Any]:
        """Options of :func:`tsynd.jobs.steps.new_autoencoder`."""
        own = {"latent_channels": self.latent_channels, "widths": self.autoencoder_widths}
        return self.autoencoder_network() or own

    def code(self) -> dict[str, str]:
        """MODULE:FUNCTION → digest of its source text, of all that the settings name."""
        named = {"classifier": [self.classifier], "autoencoder": [self.autoencoder], "base": [self.base or ""]}
        named |= {"conditions": list(self.conditions), "attacks": list(self.attacks)}
        own = [(text.split(",")[0], what) for what, texts in named.items() for text in texts]
        return {text: call_digest(text, what) for text, what in own if is_call(text) and not _library(text)}

    def classifier_options(self) -> dict[str, Any]:
        """Options of :func:`tsynd.jobs.steps.new_classifier`."""
        own = self.classifier_network(self.dropout)
        return own | {"dropout_rate" if self.classifier == "small" else "dropout": self.dropout_rate}


@dataclass(frozen=True)
class Cell:
    """One training and its test.

    Attributes:
        size: labelled training images.
        seed: of the subset, the initial weights, the batch order and all draws.
        arm: see :func:`tsynd.study.arms.parse_arm`.
    """

    size: int
    seed: int
    arm: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.size}-{self.seed}-{re.sub(r'[^A-Za-z0-9_=.,+-]', '_', self.arm)}"


def _library(text: str) -> bool:
    """Whether the text names another library's network or a known disturbance, not a function of the user's."""
    return text.partition(":")[0] in ("timm", "hf", "diffusers", *KINDS, *CONDITIONS, *FAMILIES)


def cells_of(sizes: Sequence[int], seeds: int | Sequence[int], arms: Sequence[str]) -> list[Cell]:
    """All cells, ``real`` before the others of its size and seed; it is always there, to compare with.

    Args:
        sizes: labelled training images.
        seeds: how many (0, 1, ...), or which.
        arms: see :func:`tsynd.study.arms.parse_arm`.

    Raises:
        InputError: no size, seed or arm, or one that cannot be used.
    """
    if not sizes or any(not isinstance(size, int) or size < 2 for size in sizes):
        raise InputError(f"train_size: got {list(sizes)}, wanted integers of 2 or more")
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers or any(not isinstance(seed, int) or not 0 <= seed < 2**31 for seed in numbers):
        raise InputError(f"seeds: got {seeds!r}, wanted an integer of 1 or more, or several below 2^31")
    wanted = ["real", *(arm for arm in dict.fromkeys(arms) if arm != "real")]
    for arm in wanted:
        parse_arm(arm)
    cells = [Cell(size, seed, arm) for size in dict.fromkeys(sizes) for seed in numbers for arm in wanted]
    if len({cell.name for cell in cells}) < len(cells):
        raise InputError(f"arms: got {', '.join(wanted)}, two of which would share a file name")
    return cells


def check_study(settings: StudySettings, source: DataSource, arms: Sequence[Arm]) -> None:
    """What the cells would only refuse after training has begun.

    Raises:
        InputError: a setting that cannot be used, or does not fit the data or an arm.
    """
    for name in ("autoencoder_iterations", "iterations", "adversarial_steps", "uncertainty_samples", "queries"):
        check_whole(name, getattr(settings, name))
    check_whole("batch_size", settings.batch_size, 2)
    for name in ("attack_images", "query_images"):
        check_whole(name, getattr(settings, name), optional=True)
    check_choice("autoencoder_data", settings.autoencoder_data, ("train", "all"))
    check_choice("split", settings.split, ("test", "val"))
    for name in ("learning_rate", "adversarial_budget"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name}: got {value!r}, wanted a finite number above 0")
    pictures = any("randaugment" in arm.kinds for arm in arms) or (settings.base or "").startswith("randaugment")
    if source.spatial_dims == 3 and pictures:
        raise InputError("arms: got randaugment for volumes, wanted arms and base without it: it is for pictures")
    if "clean" not in choose_conditions(settings.conditions):
        raise InputError(f"conditions: got {', '.join(settings.conditions)}, wanted clean among them")
    attacks = {attack.kind for attack in parse_attacks(settings.attacks)}
    if both := attacks & set(choose_conditions(settings.conditions)):
        raise InputError(f"attacks: got {min(both)}, which is a condition's name too, wanted another")
    if settings.base is not None:
        Base(settings.base, 0)
    new_classifier(source, 0, **settings.classifier_options())
    autoencoder = new_autoencoder(source, 0, **settings.autoencoder_options())
    check_autoencoder(autoencoder.eval(), source.train.batch(torch.tensor([0]))[0])
    autoencoder.latent_std.fill_(1.0)
    for arm in arms:
        for name, value in {"augmentation_weight": settings.augmentation_weight, **arm.training}.items():
            if name == "augmentation_weight" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise InputError(f"{name}: got {value!r}, wanted a finite number of 0 or more")
        fraction = arm.training.get("warmup_fraction", settings.warmup_fraction)
        if not (isinstance(fraction, (int, float)) and 0 <= fraction <= 1):
            raise InputError(f"warmup_fraction: got {fraction!r}, wanted a number in [0, 1]")
        check_whole("iterations", arm.training.get("iterations", 1))
        if "base" in arm.training:
            Base(arm.training["base"], 0)
        try:
            make_augmentation(arm, autoencoder, settings, source.task, 0)
        except TypeError as error:  # a word where a number belongs
            raise InputError(f"arms: got {arm.text!r}, which cannot be used ({error})") from None


def make_augmentation(arm: Arm, autoencoder: Any, settings: StudySettings, task: str, seed: int) -> Any:
    """The arm's augmentation under the study's settings; None for ``real``."""
    return augmentation_of(
        arm,
        autoencoder,
        settings.augmentation(),
        task=task,
        seed=seed,
        adversarial_budget=settings.adversarial_budget,
        adversarial_steps=settings.adversarial_steps,
    )


@dataclass(frozen=True)
class Workplace:
    """Where a study works: what a worker process needs besides the cell.

    Attributes:
        data: as :func:`tsynd.load_data` takes it.
        folder: the study's.
        settings: the study's.
        device: where to compute.
    """

    data: str
    folder: Path
    settings: StudySettings
    device: str = "cpu"


def autoencoder_path(place: Workplace, size: int, seed: int) -> Path:
    """Of the autoencoder that the arms of a size and seed share (``all``: all sizes too)."""
    which = "all" if place.settings.autoencoder_data == "all" else size
    return place.folder / "models" / f"autoencoder-{which}-{seed}.safetensors"


def classifier_path(place: Workplace, cell: Cell) -> Path:
    """Of a cell's classifier."""
    return place.folder / "models" / f"classifier-{cell.name}.safetensors"


def samples_path(place: Workplace, cell: Cell) -> Path:
    """Of a few synthetic images of a cell."""
    return place.folder / "samples" / f"{cell.name}.npz"


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """What such a file holds; None where there is none, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None


def predictions_path(place: Workplace, cell: Cell) -> Path:
    """Of a cell's probabilities under every condition, and the labels."""
    return place.folder / "predictions" / f"{cell.name}.npz"


def cell_path(place: Workplace, cell: Cell) -> Path:
    """Of a finished cell's results."""
    return place.folder / "cells" / f"{cell.name}.json"


def by_class(labels: Tensor, indices: Tensor) -> Tensor:
    """The indices ordered by their class, so that pictures of one class stand together."""
    chosen = labels[indices] if labels.ndim == 1 else labels[indices].argmax(1)
    return indices[chosen.argsort(stable=True)]
