"""Networks by name: tsynd's own, a saved file's, or another library's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from tsynd.models.checkpoint import load_model, read_card
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.models.pretrained import build_classifier
from tsynd.models.pretrained_autoencoder import build_autoencoder
from tsynd.utils.errors import InputError

__all__ = ["autoencoder", "classifier"]


def classifier(
    name: str | os.PathLike[str],
    classes: int,
    *,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    dropout: float = 0.5,
    trains: str = "head",
    channels: int = 1,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    last_layer: str | None = None,
) -> nn.Module:
    """A classifier by name; a pretrained one has a new last layer, behind a dropout, for images of 1 or 3 channels.

    Args:
        name: ``timm:NAME`` (a model of timm), ``hf:NAME`` (on the Hugging Face hub, or the folder of a saved model),
            ``MODULE:FUNCTION`` (installed or in the current folder, gives a network), ``small``
            (:class:`tsynd.SmallResNet`, from scratch), or the file of a model that :func:`tsynd.save_model` wrote. The
            first three take ``,option=value,...`` for what makes the network.
        classes: number of logits.
        pretrained: load the library's own weights; False starts from random ones.
        weights: a file of the network's weights (.safetensors, or .pth, .pt, .bin without pickled code) instead of
            the library's own.
        dropout: probability in (0, 1) that a feature is dropped before the last layer.
        trains: ``head`` (the encoder is frozen), ``last_block`` (and all behind it) or ``all``; see
            :meth:`tsynd.models.pretrained.PretrainedClassifier.parameter_groups` for their learning rates.
        channels: of the images, for ``small``.
        image_size: images are resized to this square; None does so only for a network that takes no other size.
        mean: what the network subtracts of pixels in [0, 1], one number a channel; None is its library's own, or
            ImageNet's.
        std: what it divides by.
        last_layer: name of the linear layer that is replaced; None finds it.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: a name, weights or a network that cannot be used.
        MissingExtraError: the library is not installed.
    """
    text = os.fspath(name)
    own = text == "small" or _is_file(text)
    if own and weights is not None:
        raise InputError(f"weights: got {weights} with classifier {text!r}, wanted another library's network for them")
    if text == "small":
        return SmallResNet(channels, classes, dropout_rate=dropout).eval()
    if own:
        found = read_card(text).config.get("num_classes")
        if found != classes:
            raise InputError(f"classifier: {text} gives {found} logits, wanted {classes}")
        return load_model(text)
    return build_classifier(
        text,
        classes,
        pretrained=pretrained,
        weights=None if weights is None else Path(weights),
        dropout=dropout,
        trains=trains,
        image_size=image_size,
        mean=mean,
        std=std,
        last_layer=last_layer,
    )


def autoencoder(
    name: str | os.PathLike[str],
    *,
    channels: int = 1,
    trains: str = "none",
    pixel_range: tuple[float, float] | None = None,
) -> nn.Module:
    """An autoencoder by name, for images of one or three channels in [0, 1].

    A pretrained one knows no ``latent_std`` yet: :func:`tsynd.fit_autoencoder` measures it, and trains what ``trains``
    says.

    Args:
        name: ``diffusers:NAME`` (on the Hugging Face hub, or the folder of a saved model), ``monai-bundle:PATH`` (the
            folder of a bundle), ``MODULE:FUNCTION`` (installed or in the current folder, gives a network that
            :func:`tsynd.as_autoencoder` knows), ``small`` (:class:`tsynd.SmallAutoencoder`, from scratch), or the file
            of a model that :func:`tsynd.save_model` wrote. The first three take ``,option=value,...``: ``subfolder``
            of diffusers, ``key`` and ``weights`` of a bundle, the function's own.
        channels: of the images; an autoencoder of three channels takes grey images too.
        trains: ``none`` (frozen), ``decoder`` or ``all``.
        pixel_range: what 0 and 1 are to a bundle's autoencoder.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: a name or a model that cannot be used.
        MissingExtraError: the library is not installed.
    """
    text = os.fspath(name)
    if text == "small":
        return SmallAutoencoder(channels).eval()
    if not _is_file(text):
        return build_autoencoder(text, channels, trains=trains, pixel_range=pixel_range)
    found = read_card(text).config.get("channels")
    if found != channels:
        raise InputError(f"autoencoder: {text} takes images of {found} channels, wanted {channels}")
    return load_model(text)


def _is_file(text: str) -> bool:
    return text.endswith(".safetensors") or Path(text + ".safetensors").exists()
