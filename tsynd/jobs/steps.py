"""The steps that jobs share: a network of a seed, trained on a source's images and saved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tsynd.data.dataset import DataSource
from tsynd.models import named
from tsynd.models.checkpoint import save_model
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier
from tsynd.training.loop import FitReport
from tsynd.utils.errors import InputError, check_whole
from tsynd.utils.fingerprint import hash_file

__all__ = [
    "ClassifierChoice",
    "NetworkChoice",
    "fit_autoencoder_step",
    "fit_classifier_step",
    "new_autoencoder",
    "new_classifier",
]

_WHOLE, _FEW = 64, 16  # side of pictures that an autoencoder is trained on whole; how many larger ones make a batch


@dataclass(frozen=True, kw_only=True)
class ClassifierChoice:
    """Which classifier a job trains.

    Attributes:
        classifier: ``small`` (trained from scratch), ``timm:NAME``, ``hf:NAME``, MODULE:FUNCTION, or a model's file.
        weights: file of the classifier's pretrained weights, instead of its library's own.
        trains: of a pretrained classifier: ``head`` (its encoder stays frozen), ``last_block`` or ``all``.
        encoder_size: images are resized to this square for a pretrained classifier; None does so where it must.
    """

    classifier: str = "small"
    weights: str | None = None
    trains: str = "head"
    encoder_size: int | None = None

    def classifier_network(self, dropout: str = "head") -> dict[str, Any]:
        """Options of :func:`new_classifier`.

        Raises:
            InputError: some that cannot act.
        """
        if self.classifier == "small":
            for name, idle in (("weights", None), ("encoder_size", None), ("trains", "head")):
                if getattr(self, name) != idle:
                    raise InputError(
                        f"{name}: got {getattr(self, name)!r} with classifier 'small', wanted a pretrained one"
                    )
            return {"dropout": dropout}
        if dropout != "head":
            raise InputError(f"dropout: got {dropout!r} with classifier {self.classifier!r}, wanted 'head'")
        options = {"weights": self.weights, "trains": self.trains, "image_size": self.encoder_size}
        return {"name": self.classifier, **options}

    def content(self) -> dict[str, str]:
        """Digests of the files that are named, for a job's fingerprint."""
        named_files = {name: getattr(self, name, None) for name in ("classifier", "weights", "autoencoder")}
        files = {name: Path(text) for name, text in named_files.items() if text and Path(text).is_file()}
        return {f"{name}_sha256": hash_file(path) for name, path in files.items()}


@dataclass(frozen=True, kw_only=True)
class NetworkChoice(ClassifierChoice):
    """Which networks a job works with, and how it makes extra images.

    Attributes:
        autoencoder: ``small`` (trained from scratch), ``diffusers:NAME``, ``monai-bundle:PATH``, MODULE:FUNCTION, or a
            model's file.
        autoencoder_trains: of a pretrained autoencoder: ``none``, ``decoder`` or ``all``.
        rounds: offline rounds of extra images, 0 makes them anew at every step; None is 3 with a pretrained classifier.
    """

    autoencoder: str = "small"
    autoencoder_trains: str = "none"
    rounds: int | None = None

    def autoencoder_network(self) -> dict[str, Any]:
        """Options of :func:`new_autoencoder`.

        Raises:
            InputError: some that cannot act.
        """
        if self.autoencoder != "small":
            return {"name": self.autoencoder, "trains": self.autoencoder_trains}
        if self.autoencoder_trains != "none":
            raise InputError(
                f"autoencoder_trains: got {self.autoencoder_trains!r} with autoencoder 'small', wanted none"
            )
        return {}

    def rounds_of_training(self) -> int:
        """How many rounds a training has.

        Raises:
            InputError: a number that cannot be one.
        """
        check_whole("rounds", self.rounds, 0, optional=True)
        usual = 0 if self.classifier == "small" else 3
        return usual if self.rounds is None else self.rounds


def new_autoencoder(source: DataSource, seed: int, name: str = "small", **network: Any) -> Any:
    """The autoencoder for a source's images; first weights that are drawn depend on the seed alone.

    Args:
        source: the images.
        seed: of first weights.
        name: as :func:`tsynd.autoencoder` takes it.
        network: its options, or those of :class:`tsynd.SmallAutoencoder` for ``small``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "small":
            return SmallAutoencoder(source.channels, spatial_dims=source.spatial_dims, **network)
        return named.autoencoder(name, channels=source.channels, **network)


def new_classifier(source: DataSource, seed: int, name: str = "small", **network: Any) -> nn.Module:
    """The classifier for a source's images and classes; first weights that are drawn depend on the seed alone.

    Args:
        source: images and classes.
        seed: of first weights.
        name: as :func:`tsynd.classifier` takes it.
        network: its options, or those of :class:`tsynd.SmallResNet` for ``small``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "small":
            return SmallResNet(source.channels, source.num_classes, spatial_dims=source.spatial_dims, **network)
        return named.classifier(name, source.num_classes, channels=source.channels, **network)


def fit_autoencoder_step(
    source: DataSource,
    path: Path | None,
    *,
    seed: int,
    which: str = "train",
    network: dict[str, Any] | None = None,
    **fitting: Any,
) -> tuple[nn.Module, FitReport]:
    """Train an autoencoder and save it.

    Args:
        source: the images.
        path: of the file; None does not save.
        seed: of first weights, batches and noise.
        which: ``train`` (the labelled images) or ``all`` (every training image, without labels).
        network: see :func:`new_autoencoder`.
        fitting: options of :func:`tsynd.fit_autoencoder`; of large pictures, the small one looks at windows.
    """
    model = new_autoencoder(source, seed, **(network or {}))
    if source.spatial_dims == 2 and math.prod(source.image_shape[1:]) > _WHOLE**2:
        fitting = {"batch_size": _FEW} | ({"crop": _WHOLE} if isinstance(model, SmallAutoencoder) else {}) | fitting
    report = fit_autoencoder(model, source.unlabelled if which == "all" else source.train, seed=seed, **fitting)
    if path is not None:
        save_model(model, path, image_shape=source.image_shape)
    return model, report


def fit_classifier_step(
    source: DataSource,
    path: Path | None,
    *,
    seed: int,
    network: dict[str, Any] | None = None,
    features: Path | None = None,
    **fitting: Any,
) -> tuple[nn.Module, FitReport]:
    """Train a classifier on a source's labelled images and save it.

    Args:
        source: images, labels and names of the classes.
        path: of the file; None does not save.
        seed: of first weights, batches and dropout: classifiers of one seed are paired.
        network: see :func:`new_classifier`.
        features: folder where a frozen encoder's features are kept.
        fitting: options of :func:`tsynd.fit_classifier`.
    """
    model = new_classifier(source, seed, **(network or {}))
    if isinstance(model, PretrainedClassifier):
        model.features_folder = features
    report = fit_classifier(model, source.train, task=source.task, seed=seed, **fitting)
    if path is not None:
        save_model(model, path, class_names=source.class_names, image_shape=source.image_shape, task=source.task)
    return model, report
