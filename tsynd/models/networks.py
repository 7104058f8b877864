"""The default networks: small ones for pictures or volumes that train on a CPU, built from MONAI's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.utils.errors import InputError, require

__all__ = ["SmallAutoencoder", "SmallResNet", "keep_inputs"]


def _check_widths(widths: Sequence[int], low: int, high: int) -> list[int]:
    sizes = [int(width) for width in widths]
    if not low <= len(sizes) <= high or min(sizes) < 1:
        raise InputError(f"widths: got {sizes}, wanted {low} to {high} positive integers")
    return sizes


def _check_dims(spatial_dims: int) -> None:
    if spatial_dims not in (2, 3):
        raise InputError(f"spatial_dims: got {spatial_dims!r}, wanted 2 (pictures) or 3 (volumes)")


def _to_channels_last(module: nn.Module, spatial_dims: int) -> None:
    layout = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
    module.to(memory_format=layout)  # type: ignore[call-overload]


def keep_inputs(module: nn.Module) -> None:
    """Make activations keep their input: a trunk's features must survive T passes through its tail."""
    for part in module.modules():
        if isinstance(getattr(part, "inplace", None), bool):
            setattr(part, "inplace", False)  # noqa: B010 (mypy takes a module's attributes for tensors)


class SmallResNet(nn.Module):
    """MONAI's ResNet with basic blocks, a stem of width 3 without pooling, batch norm and dropout.

    The weights are kept in the channels-last layout, which is up to 1.5 times faster on a CPU. The stem halves the
    resolution of volumes, or their first stage would take most of the time.

    Args:
        channels: of the images.
        num_classes: number of logits.
        widths: channels of the one to four stages; every stage after the first halves the resolution.
        dropout: "head": one ``nn.Dropout``, right before the final linear layer. "stages": also an
            ``nn.Dropout2d`` (``nn.Dropout3d``) of a fifth of the rate after every stage.
        dropout_rate: probability in (0, 1) that a feature is dropped before the final layer.
        spatial_dims: 2 for pictures, 3 for volumes.

    Raises:
        InputError: an argument out of its range.
    """

    def __init__(
        self,
        channels: int = 1,
        num_classes: int = 2,
        widths: Sequence[int] = (16, 32, 64),
        dropout: str = "head",
        dropout_rate: float = 0.5,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        _check_dims(spatial_dims)
        sizes = _check_widths(widths, 1, 4)
        if channels < 1 or num_classes < 1:
            raise InputError(f"channels, num_classes: got {channels} and {num_classes}, wanted 1 or more")
        if dropout not in ("head", "stages"):
            raise InputError(f"dropout: got {dropout!r}, wanted 'head' or 'stages'")
        if not 0 < dropout_rate < 1:
            raise InputError(f"dropout_rate: got {dropout_rate}, wanted a number between 0 and 1")
        self.config: dict[str, Any] = {
            "channels": channels,
            "num_classes": num_classes,
            "widths": sizes,
            "dropout": dropout,
            "dropout_rate": dropout_rate,
            "spatial_dims": spatial_dims,
        }
        # MONAI's ResNet always has four stages; those beyond the widths are not taken over.
        body = require("monai.networks.nets", "models").ResNet(
            "basic",
            [1] * 4,
            sizes + [1] * (4 - len(sizes)),
            spatial_dims=spatial_dims,
            n_input_channels=channels,
            conv1_t_size=3,
            conv1_t_stride=spatial_dims - 1,
            feed_forward=False,
            bias_downsample=False,
        )
        self.stem = nn.Sequential(body.conv1, body.bn1, body.act)
        stages: list[nn.Module] = []
        for index in range(len(sizes)):
            stages.append(getattr(body, f"layer{index + 1}"))
            if dropout == "stages":
                stages.append((nn.Dropout2d if spatial_dims == 2 else nn.Dropout3d)(dropout_rate / 5))
        self.stages = nn.Sequential(*stages)
        self.pool = body.avgpool
        self.dropout = nn.Dropout(dropout_rate)
        self.head = nn.Linear(sizes[-1], num_classes)
        keep_inputs(self)
        _to_channels_last(self, spatial_dims)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, channels, H, W] (or [B, channels, D, H, W]) in [0, 1]."""
        maps = self.stages(self.stem((images - 0.5) / 0.25))
        logits: Tensor = self.head(self.dropout(torch.flatten(self.pool(maps), 1)))
        return logits


class SmallAutoencoder(nn.Module):
    """MONAI's convolutional AutoEncoder with a linear bottleneck at a quarter of the resolution.

    Weights are kept in the channels-last layout, for speed on a CPU.

    Args:
        channels: of the images.
        latent_channels: of the latents [B, latent_channels, H/4, W/4] or [B, latent_channels, D/4, H/4, W/4].
        widths: channels at half and at a quarter of the images' resolution; None is (32, 64), for volumes (16, 32).
        spatial_dims: 2 for pictures, 3 for volumes.

    Attributes:
        latent_std: scalar, deviation of the latents over the training images; NaN until ``fit_autoencoder``.

    Raises:
        InputError: an argument out of its range.
    """

    latent_std: Tensor

    def __init__(
        self,
        channels: int = 1,
        latent_channels: int = 8,
        widths: Sequence[int] | None = None,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        _check_dims(spatial_dims)
        half, quarter = sizes = _check_widths(widths or ((32, 64) if spatial_dims == 2 else (16, 32)), 2, 2)
        if channels < 1 or latent_channels < 1:
            raise InputError(f"channels, latent_channels: got {channels} and {latent_channels}, wanted 1 or more")
        self.config: dict[str, Any] = {
            "channels": channels,
            "latent_channels": latent_channels,
            "widths": sizes,
            "spatial_dims": spatial_dims,
        }
        body = require("monai.networks.nets", "models").AutoEncoder(
            spatial_dims=spatial_dims,
            in_channels=channels,
            out_channels=channels,
            channels=(half, quarter, latent_channels),
            strides=(2, 2, 1),
            norm="batch",
        )
        convolution = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        # A linear map behind the last activation and norm gives the latents free range.
        self.encoder = nn.Sequential(body.encode, convolution(latent_channels, latent_channels, 1))
        self.decoder = body.decode
        self.register_buffer("latent_std", torch.tensor(math.nan))
        keep_inputs(self)
        _to_channels_last(self, spatial_dims)

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, latent_channels, ...] of images [B, channels, ...] in [0, 1], a quarter of their size.

        Raises:
            InputError: a side is no multiple of 4.
        """
        if any(side % 4 for side in images.shape[2:]):
            sides = "H and W" if images.ndim == 4 else "D, H and W"
            raise InputError(f"images: got shape {list(images.shape)}, wanted {sides} to be multiples of 4")
        latents: Tensor = self.encoder(images * 2 - 1)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, channels, ...] in [0, 1] of latents [B, latent_channels, ...]."""
        images: Tensor = self.decoder(latents).sigmoid()
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images [B, channels, ...]."""
        return self.decode(self.encode(images))
