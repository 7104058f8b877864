"""General tails a few images at a time give what the whole batch gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import TinyClassifier
from test_posterior import Branching
from torch import Tensor, nn

import tsynd
from tsynd.posteriors import passes as microbatch
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.synthesis.objectives import LabelLoss

IDS = torch.tensor([5, 9, 100, 3, 8, 2])


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def posterior_of(network: nn.Module, masks: str) -> MCDropout:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return MCDropout(network, samples=5, masks=masks, seed=3)


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("make", [lambda: TinyClassifier(early=True), Branching])
@pytest.mark.parametrize("at_once", [1, 4])
def test_parts_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, make: object, masks: str, at_once: int, x: Tensor
) -> None:
    posterior = posterior_of(make(), masks)  # type: ignore[operator]

    def all_of() -> list[Tensor]:
        leaf = x.clone().requires_grad_(True)
        value = posterior.uncertainty(leaf, IDS)
        (gradient,) = torch.autograd.grad((value * torch.arange(1.0, 7.0)).sum(), leaf)
        loss = LabelLoss(posterior, torch.arange(6) % 3, "multiclass")(leaf, IDS)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
        return [value.detach(), gradient, posterior.probabilities(x, IDS).detach(), loss.detach(), slope]

    with posterior.frozen():
        whole = all_of()
        counts: list[int] = []

        def small(inputs: tuple[Tensor, ...], samples: int, weight: int = 1) -> int:
            counts.append(len(inputs[0]))
            return at_once

        for module in ("mc_dropout", "whole_network"):
            monkeypatch.setattr(f"tsynd.posteriors.{module}.images_at_once", small)
        for got, wanted in zip(all_of(), whole, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert counts == [6, 6, 6]


def test_uncertainty_gives_gradients_as_autograd_does(x: Tensor) -> None:
    posterior = posterior_of(TinyClassifier(early=True), "shared")
    with posterior.frozen():
        assert not posterior.uncertainty(x).requires_grad
        leaf = x.double().float().requires_grad_(True)
        value = posterior.uncertainty(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        logits = posterior.logits(leaf)
        wanted = tsynd.ops.logits_uncertainty(logits)[0]  # type: ignore[attr-defined]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient, torch.autograd.grad(wanted.sum(), leaf)[0], rtol=1e-4, atol=1e-7)


def test_images_at_once_keep_the_work_the_same_for_any_number_of_passes() -> None:
    maps = (torch.empty(512, 16, 28, 28),)
    rows = {samples: samples * microbatch.images_at_once(maps, samples) for samples in (8, 32, 128, 256)}
    assert set(rows.values()) == {256}
    assert microbatch.images_at_once(maps, 10_000) == 1
    assert microbatch.images_at_once((maps[0][:3],), 8) == 3
    assert microbatch.images_at_once((maps[0], 7), 10_000) == 512  # a plain value may be the batch's size


def held_bytes(posterior: MCDropout, images: Tensor) -> int:
    """What autograd keeps for the backward pass of one call, at most at one time."""
    held = peak = 0

    class Kept:
        def __init__(self, x: Tensor) -> None:
            nonlocal held, peak
            self.x, self.size = x, x.nbytes
            held += self.size
            peak = max(peak, held)

        def __del__(self) -> None:
            nonlocal held
            held -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        leaf = images.clone().requires_grad_(True)
        torch.autograd.grad(posterior.uncertainty(leaf).sum(), leaf)
    return peak


def test_memory_does_not_grow_with_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbatch, "_CPU_VALUES", 2**17)
    images = torch.rand(16, 1, 12, 12)
    peaks = []
    for samples in (8, 32):
        posterior = MCDropout(TinyClassifier(early=True), samples=samples)
        with posterior.frozen():
            peaks.append(held_bytes(posterior, images))
    assert peaks[1] < 1.1 * peaks[0]
