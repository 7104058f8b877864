"""The steps that jobs share: a network of a seed, trained on a source's images and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tsynd.data.dataset import DataSource
from tsynd.models.checkpoint import save_model
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier
from tsynd.training.loop import FitReport

__all__ = ["fit_autoencoder_step", "fit_classifier_step", "new_autoencoder", "new_classifier"]


def new_autoencoder(source: DataSource, seed: int, **network: Any) -> SmallAutoencoder:
    """The autoencoder for a source's images; its first weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallAutoencoder(source.channels, spatial_dims=source.spatial_dims, **network)


def new_classifier(source: DataSource, seed: int, **network: Any) -> SmallResNet:
    """The classifier for a source's images and classes; its first weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallResNet(source.channels, source.num_classes, spatial_dims=source.spatial_dims, **network)


def fit_autoencoder_step(
    source: DataSource,
    path: Path | None,
    *,
    seed: int,
    which: str = "train",
    network: dict[str, Any] | None = None,
    **fitting: Any,
) -> tuple[SmallAutoencoder, FitReport]:
    """Train an autoencoder and save it.

    Args:
        source: the images.
        path: of the file; None does not save.
        seed: of first weights, batches and noise.
        which: ``train`` (the labelled images) or ``all`` (every training image, without labels).
        network: options of :class:`tsynd.SmallAutoencoder`.
        fitting: options of :func:`tsynd.fit_autoencoder`.
    """
    model = new_autoencoder(source, seed, **(network or {}))
    report = fit_autoencoder(model, source.unlabelled if which == "all" else source.train, seed=seed, **fitting)
    if path is not None:
        save_model(model, path, image_shape=source.image_shape)
    return model, report


def fit_classifier_step(
    source: DataSource, path: Path | None, *, seed: int, network: dict[str, Any] | None = None, **fitting: Any
) -> tuple[SmallResNet, FitReport]:
    """Train a classifier on a source's labelled images and save it.

    Args:
        source: images, labels and names of the classes.
        path: of the file; None does not save.
        seed: of first weights, batches and dropout: classifiers of one seed are paired.
        network: options of :class:`tsynd.SmallResNet`.
        fitting: options of :func:`tsynd.fit_classifier`.
    """
    model = new_classifier(source, seed, **(network or {}))
    report = fit_classifier(model, source.train, task=source.task, seed=seed, **fitting)
    if path is not None:
        save_model(model, path, class_names=source.class_names, image_shape=source.image_shape, task=source.task)
    return model, report
