"""A training step with extra images of several kinds against one with real images alone, and what its phases cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.harness import Row, measure
from tsynd.models.held import frozen
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.api import uncertainty
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.extra_images import ExtraImages, as_parts, image_losses
from tsynd.training.recipe import recipe

__all__ = ["SHAPES", "run", "summary"]

# images of 28 x 28 in a batch, T, K
SHAPES: dict[str, tuple[int, int, int]] = {"R1": (64, 8, 3), "GR1": (512, 8, 3)}
FLOOR, TARGETED = "floor: real images alone", "tsynd, targeted"
LOOP, PERSISTENT = "targeted by T passes, loop", "tsynd, targeted, persistent"
CONSISTENCY, EXPECTED = "tsynd, recipe's step of consistency", "tsynd, recipe's targeted step"
_CLASSES = 4


def _methods(shape: tuple[int, int, int], device: str) -> dict[str, Callable[[], object]]:
    count, samples, steps = shape
    torch.manual_seed(0)
    network = SmallResNet(1, _CLASSES).to(device)
    autoencoder = SmallAutoencoder(1).to(device)
    autoencoder.latent_std.fill_(1.0)
    images = torch.rand(count, 1, 28, 28, device=device)
    numbers = torch.arange(count)
    labels = numbers.to(device) % _CLASSES
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(make: Callable[[], ExtraImages] | None) -> float:
        x, own = images, None
        if make is not None:
            own = make()
            x = torch.cat([images, own.images])
        network.train()
        logits = network(x)
        loss = image_losses(logits[:count], labels).mean()
        if own is not None:
            extra = image_losses(logits[count:], own.labels, own.loss, clean=logits[: len(own.images)])
            loss = loss + own.weight * extra.mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    made_by: dict[str, tuple[str, nn.Module | Posterior]] = {
        "reconstructions": ("reconstruction", network),
        "random directions": ("random", network),
        TARGETED: ("uncertainty", network),
        LOOP: ("uncertainty", peers.PassesPosterior(network, samples, batched=False)),
    }

    def maker(direction: str, classifier: nn.Module | Posterior, **options: Any) -> Callable[[], ExtraImages]:
        made = TargetedAugmentation(autoencoder, direction=direction, **{"samples": samples, "steps": steps, **options})

        def make() -> ExtraImages:
            made.set_ids(numbers)
            return ExtraImages(*made(classifier, images, labels))

        return make

    makers = {name: maker(direction, classifier) for name, (direction, classifier) in made_by.items()}
    makers[PERSISTENT] = maker("uncertainty", network, steps=1, persistent=True)
    plain = uncertainty(network, makers["reconstructions"]().images).mean()
    for name in (TARGETED, LOOP):
        made = makers[name]().images
        if not (made.shape == images.shape and uncertainty(network, made).mean() > plain):
            raise SystemExit(f"{name}: does not raise the uncertainty, not timed")
    robust: Any = recipe("robust", autoencoder)
    robust.prepare([images])

    def part(number: int) -> ExtraImages:
        robust.extra.calls = number  # its turn
        return as_parts(robust(network, *robust.transform(images, labels)))[0]

    makers |= {CONSISTENCY: partial(part, 0), EXPECTED: partial(part, 1)}
    methods: dict[str, Callable[[], object]] = {FLOOR: lambda: step(None)}
    methods |= {name: partial(step, make) for name, make in makers.items()}
    ready = ExtraImages(images.flip(0), labels)
    methods["phase: step with extra images at hand"] = lambda: step(lambda: ready)
    return methods | _phases(network, autoencoder, images, samples)


def _phases(
    network: SmallResNet, autoencoder: SmallAutoencoder, images: Tensor, samples: int
) -> dict[str, Callable[[], object]]:
    """What one targeted step is made of."""
    posterior = MCDropout(network, samples)

    def uncertain(gradient: bool) -> None:
        with posterior.frozen(), posterior.folded(), torch.set_grad_enabled(gradient):
            leaf = images.clone().requires_grad_(gradient)
            value = posterior.uncertainty(leaf).sum()
            if gradient:
                torch.autograd.grad(value, leaf)

    def decode(gradient: bool) -> None:
        with frozen(autoencoder), torch.set_grad_enabled(gradient):
            leaf = latents.clone().requires_grad_(gradient)
            decoded = autoencoder.decode(leaf).sum()
            if gradient:
                torch.autograd.grad(decoded, leaf)

    with frozen(autoencoder), torch.no_grad():
        latents = autoencoder.encode(images)

    def encode() -> None:
        with frozen(autoencoder), torch.no_grad():
            autoencoder.encode(images)

    return {
        "phase: encode": encode,
        "phase: decode": partial(decode, False),
        "phase: decode, with gradient": partial(decode, True),
        "phase: trunk and head": partial(uncertain, False),
        "phase: trunk and head, with gradient": partial(uncertain, True),
    }


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
    lines = [
        f"{row.shape.split()[0]}, {row.method.removeprefix('tsynd, ')}: {row.over_floor:.1f}× a step with real images"
        for row in rows
        if row.method != FLOOR and not row.method.startswith("phase: ")
    ]
    trainings = {"the recipe": (CONSISTENCY, EXPECTED), TARGETED: (TARGETED,), PERSISTENT: (PERSISTENT,)}
    for shape in dict.fromkeys(row.shape for row in rows):
        for name, methods in trainings.items():
            turns = [row.over_floor for row in rows if row.shape == shape and row.method in methods]
            whole = 0.3 + 0.7 * sum(turns) / len(turns)
            name = name.removeprefix("tsynd, ")
            lines.append(f"{shape.split()[0]}, a training with {name}, warm-up 0.3: {whole:.2f}× real images alone")
    return lines
