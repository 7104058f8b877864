"""Autoencoders as people have them: that sample, give more than a tensor, or hide behind functions."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, nn

import tsynd
from tsynd.models.autoencoder import autoencoder_of
from tsynd.utils.errors import InputError

QUIET: dict[str, Any] = {"progress": False, "latent_std": 0.4, "samples": 4, "steps": 2}


class Wraps(nn.Module):
    """Its code is a mean and a deviation; ``wrap`` makes of them what ``encode`` gives."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.wrap = TinyAutoencoder(), wrap

    def encode(self, images: Tensor) -> Any:
        mean = self.inner.encode(images)
        return self.wrap(mean, 0.3 + 0 * mean)

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(latents)


class Record:
    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


SAMPLING: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "randn_like": lambda m, s: m + s * torch.randn_like(m),
    "randn": lambda m, s: m + s * torch.randn(m.shape),
    "normal_": lambda m, s: m + s * torch.empty_like(m).normal_(),
    "torch.normal": torch.normal,
    "rsample": lambda m, s: torch.distributions.Normal(m, s).rsample(),
    "sample beside mean": lambda m, s: (m + s * torch.randn_like(m), m, s),
    "uniform around": lambda m, s: m + s * (torch.rand_like(m) - 0.5),
}
STILL: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mean and deviation": lambda m, s: (m, s),
    "list": lambda m, s: [m, s],
    "codes, loss, index": lambda m, s: (m, s.mean(), torch.zeros(3, dtype=torch.int64)),
    "distribution": lambda m, s: torch.distributions.Normal(m, s),
    "independent distribution": lambda m, s: torch.distributions.Independent(torch.distributions.Normal(m, s), 3),
    "dict": lambda m, s: {"loss": s.mean(), "z": m},
    "object": lambda m, s: Record(m),
}


@pytest.mark.parametrize("name", [*SAMPLING, *STILL])
def test_the_latent_is_the_mean(name: str, images: Tensor) -> None:
    model = Wraps((SAMPLING | STILL)[name]).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        result = tsynd.synthesize(model, found_classifier(), images, **QUIET)
    said = [str(one.message) for one in caught if "their mean is taken" in str(one.message)]
    assert bool(said) == (name in SAMPLING)
    again = tsynd.synthesize(model, found_classifier(), images, **QUIET)
    assert torch.equal(again.images, result.images)
    torch.testing.assert_close(again.source_latents, model.inner.encode(images).detach())


def found_classifier() -> nn.Module:
    torch.manual_seed(2)
    return TinyClassifier().eval()


def test_other_randomness_is_refused(images: Tensor) -> None:
    model = Wraps(lambda m, s: m * (torch.empty_like(m).exponential_() > 0.5)).eval()
    with pytest.raises(InputError, match="gave two latents for one image"):
        tsynd.synthesize(model, found_classifier(), images, **QUIET)


class Normed(TinyAutoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def encode(self, images: Tensor) -> Tensor:
        return self.norm(super().encode(images))


class Callables:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: Tensor) -> Tensor:
        return self.model.encode(images)


MODEL = Normed()


@pytest.mark.parametrize("way", ["method", "closure", "partial", "object", "global", "default"])
def test_modules_behind_functions_are_found(way: str, images: Tensor) -> None:
    global MODEL
    torch.manual_seed(1)
    MODEL = model = Normed().train()
    pairs: dict[str, Any] = {
        "method": (model.encode, model.decode),
        "closure": (lambda x: model.encode(x), lambda z: model.decode(z)),
        "partial": (functools.partial(Normed.encode, model), functools.partial(Normed.decode, model)),
        "object": (Callables(model), model.decode),
        "global": (lambda x: MODEL.encode(x), lambda z: MODEL.decode(z)),
        "default": (lambda x, m=model: m.encode(x), lambda z, m=model: m.decode(z)),
    }
    before = model.norm.running_mean.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tsynd.synthesize(pairs[way], found_classifier(), images, **QUIET)
    assert torch.equal(model.norm.running_mean, before)
    assert model.norm.training
    assert all(p.requires_grad for p in model.parameters())


def test_modules_that_cannot_be_found_are_said(images: Tensor) -> None:
    hidden = {"model": Normed().train()}
    pair = (lambda x: hidden["model"].encode(x), lambda z: hidden["model"].decode(z))
    with pytest.warns(RuntimeWarning, match="parameters that cannot be found"):
        tsynd.synthesize(pair, found_classifier(), images, **QUIET)


@pytest.mark.parametrize("kind", ["pair", "sampling", "tuple", "own"])
def test_fit_autoencoder_takes_what_synthesize_takes(kind: str, images: Tensor) -> None:
    torch.manual_seed(1)
    models: dict[str, Any] = {
        "pair": (nn.Conv2d(1, 4, 4, stride=4), nn.ConvTranspose2d(4, 1, 4, stride=4)),
        "sampling": Wraps(SAMPLING["randn_like"]),
        "tuple": Wraps(STILL["mean and deviation"]),
        "own": TinyAutoencoder(),
    }
    model = models[kind]
    weight = (model[0] if kind == "pair" else next(m for m in model.modules() if isinstance(m, nn.Conv2d))).weight
    before = weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        report = tsynd.fit_autoencoder(model, images, iterations=3, batch_size=8, progress=False)
    assert len(report.losses) == 3
    assert not torch.equal(weight, before)


def test_fit_autoencoder_refuses_what_has_nothing_to_train(images: Tensor) -> None:
    class Plain:
        def encode(self, images: Tensor) -> Tensor:
            return images

        decode = encode

    with pytest.raises(InputError, match="autoencoder: got Plain, wanted a module or a pair"):
        tsynd.fit_autoencoder(Plain(), images, iterations=1, progress=False)


def test_every_batch_of_pixels_is_looked_at(images: Tensor) -> None:
    class Later(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return images[index] * (255 if index > 15 else 1), index % 3

    data = Later()
    for call in (
        lambda: tsynd.synthesize(TinyAutoencoder(), found_classifier(), data, batch_size=8, **QUIET),
        lambda: tsynd.uncertainty(found_classifier(), data, batch_size=8),
        lambda: tsynd.evaluate(found_classifier(), data, conditions=("clean",), batch_size=8),
        lambda: tsynd.fit_classifier(found_classifier(), data, iterations=6, batch_size=16, progress=False),
    ):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            call()


def test_images_are_float32_under_autocast(images: Tensor) -> None:
    result = tsynd.synthesize(TinyAutoencoder(), found_classifier(), images, precision="bfloat16", **QUIET)
    for name in ("images", "latents", "source_latents", "uncertainty", "trajectory"):
        assert getattr(result, name).dtype == torch.float32, name


def test_the_wrapper_is_thin() -> None:
    own = tsynd.SmallAutoencoder(1)
    assert autoencoder_of(own) is own
    model = TinyAutoencoder().double()
    assert autoencoder_of(model).encode(torch.rand(1, 1, 8, 8)).dtype == torch.float64
