"""A training step with targeted images against one with real images alone and with cheaper extra ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import peers
from benchmarks.harness import Row, measure
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.api import uncertainty
from tsynd.training.augmentation import TargetedAugmentation

__all__ = ["SHAPES", "run", "summary"]

# images of 28 x 28 in a batch, T, K
SHAPES: dict[str, tuple[int, int, int]] = {"R1": (64, 8, 3), "GR1": (512, 8, 3)}
FLOOR, TARGETED = "floor: real images alone", "tsynd, targeted"
LOOP = "targeted by T passes, loop"
_CLASSES = 4


def _methods(shape: tuple[int, int, int], device: str) -> dict[str, Callable[[], object]]:
    count, samples, steps = shape
    torch.manual_seed(0)
    network = SmallResNet(1, _CLASSES).to(device)
    autoencoder = SmallAutoencoder(1).to(device)
    autoencoder.latent_std.fill_(1.0)
    images = torch.rand(count, 1, 28, 28, device=device)
    labels = torch.arange(count, device=device) % _CLASSES
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(make: Callable[[], tuple[Tensor, Tensor]] | None) -> float:
        x, y = images, labels
        if make is not None:
            made, own = make()
            x, y = torch.cat([images, made]), torch.cat([labels, own])
        network.train()
        losses = functional.cross_entropy(network(x), y, reduction="none")
        loss = losses[:count].mean() + (losses[count:].mean() if make is not None else 0.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    made_by: dict[str, tuple[str, nn.Module | Posterior]] = {
        "reconstructions": ("reconstruction", network),
        "random directions": ("random", network),
        TARGETED: ("uncertainty", network),
        LOOP: ("uncertainty", peers.PassesPosterior(network, samples, batched=False)),
    }

    def maker(direction: str, classifier: nn.Module | Posterior) -> Callable[[], tuple[Tensor, Tensor]]:
        made = TargetedAugmentation(autoencoder, direction=direction, samples=samples, steps=steps)
        return lambda: made(classifier, images, labels)

    makers = {name: maker(direction, classifier) for name, (direction, classifier) in made_by.items()}
    plain = uncertainty(network, makers["reconstructions"]()[0]).mean()
    for name in (TARGETED, LOOP):
        made = makers[name]()[0]
        if not (made.shape == images.shape and uncertainty(network, made).mean() > plain):
            raise SystemExit(f"{name}: does not raise the uncertainty, not timed")
    methods: dict[str, Callable[[], object]] = {FLOOR: lambda: step(None)}
    methods |= {name: partial(step, make) for name, make in makers.items()}
    return methods


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    if dtype != torch.float32:
        raise SystemExit("train: wanted --dtype float32")
    rows: list[Row] = []
    for name in shapes:
        count, samples, steps = SHAPES[name]
        rows += measure(
            "train",
            f"{name} {count}·28², T={samples}, K={steps}",
            _methods(SHAPES[name], device),
            floor=FLOOR,
            device=device,
            seconds=seconds,
        )
    return rows


def summary(rows: list[Row]) -> list[str]:
    """What a targeted step costs."""
    return [
        f"{row.shape.split()[0]}, {row.method.removeprefix('tsynd, ')}: {row.over_floor:.1f}× a step with real images"
        for row in rows
        if row.method != FLOOR
    ]
