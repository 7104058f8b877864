"""What users bring to a study: an arm, a metric, a disturbance, an attack, a transform and networks."""

from __future__ import annotations

from typing import Any

import torch
from conftest import TinyAutoencoder
from torch import Tensor, nn


class Darker:
    """Extra images that are the real ones with less light."""

    def __init__(self, seed: int, light: float = 0.5) -> None:
        self.seed, self.light = seed, light

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.light * images, labels


def decoded(autoencoder: Any) -> Any:
    """Extra images that went through the autoencoder."""

    def extra(classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return autoencoder.decode(autoencoder.encode(images)), labels

    return extra


def confidence(probabilities: Tensor, labels: Tensor) -> float:
    return float(probabilities.amax(1).mean())


def inverted(images: Tensor, indices: Tensor, seed: int) -> Tensor:
    return 1 - images


def blackout(classifier: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    return torch.zeros_like(images)


def negative(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - images, labels


def network(classes: int = 2, channels: int = 3) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(body, nn.Linear(32, classes))


def coder(channels: int = 3) -> nn.Module:
    return TinyAutoencoder(channels)
