"""Small models and images that the tests share."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tsynd.posteriors.mc_dropout import MCDropout

try:
    from hypothesis import settings
except ImportError:  # the GPU tests do without
    pass
else:  # the same examples in every run; HYPOTHESIS_PROFILE=search looks for new ones
    settings.register_profile("repeat", derandomize=True)
    settings.register_profile("search", derandomize=False)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))

# TSYND_TEST_THREADS: with another number of threads than the suite's two, or one in each of several processes
_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads())
torch.set_num_threads(int(os.environ.get("TSYND_TEST_THREADS", _THREADS)))


class TinyAutoencoder(nn.Module):
    """Smooth and untrained: enough for an ascent to climb on."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, 4, 4, stride=4)
        self.up = nn.ConvTranspose2d(4, channels, 4, stride=4)

    def encode(self, images: Tensor) -> Tensor:
        return self.down(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.up(latents.tanh() * 3).sigmoid()


class TinyClassifier(nn.Module):
    """Convolution, batch norm, pooling, then dropout -> linear (or dropout earlier with ``early``)."""

    def __init__(self, channels: int = 1, classes: int = 3, p: float = 0.5, early: bool = False) -> None:
        super().__init__()
        first = nn.Dropout2d(p) if early else nn.Identity()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), first, nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.dropout = nn.Dropout(p)
        self.head = nn.Linear(128, classes)
        with torch.no_grad():
            self.head.weight.mul_(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(images)))


class Untraceable(nn.Module):
    """A network behind control flow on data: torch.fx cannot trace it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        out = self.network(images if images.sum() > -1 else -images)
        return out * 1 if isinstance(out, Tensor) else out.logits * 1  # not the last layer's own output: no head


def whole_network(network: nn.Module, samples: int, masks: str, seed: int) -> MCDropout:
    """MC dropout of the network without any split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        posterior = MCDropout(Untraceable(network), samples, masks, seed)
        posterior.logits(torch.rand(2, 1, 28, 28) if hasattr(network, "config") else torch.rand(2, 1, 12, 12))
    assert posterior.plan == "whole network"
    return posterior


@pytest.fixture
def autoencoder() -> TinyAutoencoder:
    torch.manual_seed(1)
    return TinyAutoencoder()


@pytest.fixture
def classifier() -> TinyClassifier:
    torch.manual_seed(2)
    return TinyClassifier()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(23, 1, 12, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def real_data() -> Path:
    """Folder of real test images; skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TSYND_TEST_DATA", default))
    if not (folder / "pneumoniamnist.npz").exists():
        pytest.skip(
            f"no real test images: set TSYND_TEST_DATA to a folder with pneumoniamnist.npz (looked in {folder})"
        )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small npz in MedMNIST's layout."""
    from tsynd.data.phantom import phantom

    path = tmp_path_factory.mktemp("data") / "cells.npz"
    np.savez(path, **phantom(train=60, val=20, test=40))
    return path
