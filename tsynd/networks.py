"""The default networks: small 2-D ones that train on a CPU, built from MONAI's parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.errors import InputError, require

__all__ = ["SmallAutoencoder", "SmallResNet"]


def _check_widths(widths: Sequence[int], low: int, high: int) -> list[int]:
    sizes = [int(width) for width in widths]
    if not low <= len(sizes) <= high or min(sizes) < 1:
        raise InputError(f"widths: got {sizes}, wanted {low} to {high} positive integers")
    return sizes


def _out_of_place(module: nn.Module) -> None:
    """Make activations keep their input: a trunk's features must survive T passes through its tail."""
    for part in module.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010 (mypy takes a module's attributes for tensors)


class SmallResNet(nn.Module):
    """MONAI's ResNet with basic blocks, a 3×3 stem without pooling, batch norm and dropout.

    The weights are kept in the channels-last layout, which is up to 1.5 times faster on a CPU.

    Args:
        channels: of the images.
        num_classes: number of logits.
        widths: channels of the one to four stages; every stage after the first halves the resolution.
        dropout: "head": one ``nn.Dropout``, right before the final linear layer. "stages": also an
            ``nn.Dropout2d`` of a fifth of the rate after every stage.
        dropout_rate: probability in (0, 1) that a feature is dropped before the final layer.

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
    ) -> None:
        super().__init__()
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
        }
        # MONAI's ResNet always has four stages; those beyond the widths are not taken over.
        body = require("monai.networks.nets", "models").ResNet(
            "basic",
            [1] * 4,
            sizes + [1] * (4 - len(sizes)),
            spatial_dims=2,
            n_input_channels=channels,
            conv1_t_size=3,
            feed_forward=False,
            bias_downsample=False,
        )
        self.stem = nn.Sequential(body.conv1, body.bn1, body.act)
        stages: list[nn.Module] = []
        for index in range(len(sizes)):
            stages.append(getattr(body, f"layer{index + 1}"))
            if dropout == "stages":
                stages.append(nn.Dropout2d(dropout_rate / 5))
        self.stages = nn.Sequential(*stages)
        self.pool = body.avgpool
        self.dropout = nn.Dropout(dropout_rate)
        self.head = nn.Linear(sizes[-1], num_classes)
        _out_of_place(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, channels, H, W] in [0, 1]."""
        maps = self.stages(self.stem((images - 0.5) / 0.25))
        logits: Tensor = self.head(self.dropout(torch.flatten(self.pool(maps), 1)))
        return logits


class SmallAutoencoder(nn.Module):
    """MONAI's convolutional AutoEncoder with a linear bottleneck at a quarter of the resolution.

    Weights are kept in the channels-last layout, for speed on a CPU.

    Args:
        channels: of the images.
        latent_channels: of the latents [B, latent_channels, H/4, W/4].
        widths: channels at half and at a quarter of the images' resolution.

    Attributes:
        latent_std: scalar, deviation of the latents over the training images; NaN until ``fit_autoencoder``.

    Raises:
        InputError: an argument out of its range.
    """

    latent_std: Tensor

    def __init__(self, channels: int = 1, latent_channels: int = 8, widths: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        half, quarter = sizes = _check_widths(widths, 2, 2)
        if channels < 1 or latent_channels < 1:
            raise InputError(f"channels, latent_channels: got {channels} and {latent_channels}, wanted 1 or more")
        self.config: dict[str, Any] = {
            "channels": channels,
            "latent_channels": latent_channels,
            "widths": sizes,
        }
        body = require("monai.networks.nets", "models").AutoEncoder(
            spatial_dims=2,
            in_channels=channels,
            out_channels=channels,
            channels=(half, quarter, latent_channels),
            strides=(2, 2, 1),
            norm="batch",
        )
        # A linear map behind the last activation and norm gives the latents free range.
        self.encoder = nn.Sequential(body.encode, nn.Conv2d(latent_channels, latent_channels, 1))
        self.decoder = body.decode
        self.register_buffer("latent_std", torch.tensor(math.nan))
        _out_of_place(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, latent_channels, H/4, W/4] of images [B, channels, H, W] in [0, 1].

        Raises:
            InputError: H or W is no multiple of 4.
        """
        if images.shape[-1] % 4 or images.shape[-2] % 4:
            raise InputError(f"images: got shape {list(images.shape)}, wanted H and W to be multiples of 4")
        latents: Tensor = self.encoder(images * 2 - 1)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, channels, H, W] in [0, 1] of latents [B, latent_channels, H/4, W/4]."""
        images: Tensor = self.decoder(latents).sigmoid()
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruction of images [B, channels, H, W]."""
        return self.decode(self.encode(images))
