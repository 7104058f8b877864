"""Training the head of a frozen encoder on kept features, and offline rounds that survive a kill."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder
from helpers import targeted
from torch import Tensor, nn
from torch.nn import functional

from tsynd.data.dataset import LabelledImages
from tsynd.models.networks import SmallResNet
from tsynd.models.pretrained import PretrainedClassifier
from tsynd.training.classifier import fit_classifier
from tsynd.training.extra_images import Augmentation, Extra, ExtraImages
from tsynd.training.loop import Checkpoint, batch_order
from tsynd.training.pixels import PixelConsistency
from tsynd.training.rounds import OfflineRounds
from tsynd.utils.errors import InputError

QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}


class Encoder(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 12, 3)
        )
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        return self.body(x).mean((2, 3))


def frozen(trains: str = "head") -> PretrainedClassifier:
    torch.manual_seed(0)
    shared = {"num_classes": 3, "dropout": 0.5, "trains": trains, "size": None, "mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"source": "made:here", "blueprint": {}, "last_layer": "", **shared}
    return PretrainedClassifier(Encoder(), 12, **shared, config=config).eval()  # type: ignore[arg-type]


@pytest.fixture
def data() -> LabelledImages:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(40) % 3
    images = torch.rand(40, 1, 16, 16, generator=generator) * 0.5 + 0.2 * labels[:, None, None, None]
    return LabelledImages(images, labels)


def test_the_head_is_trained_on_kept_features(data: LabelledImages, tmp_path: Path) -> None:
    """As a loop of one's own over features that were computed once trains it, bit for bit."""
    made, plain = frozen(), frozen()
    before = {key: value.clone() for key, value in made.encoder.state_dict().items()}
    made.features_folder = tmp_path
    report = fit_classifier(made, data, iterations=30, batch_size=16, warmup_fraction=0.0, seed=3, **QUIET)
    with torch.no_grad():
        padded = torch.cat([data.images, data.images[-1:].expand(8, -1, -1, -1)])
        features = torch.cat([plain.features(part) for part in padded.split(16)])[:40]
    optimizer = torch.optim.AdamW(plain.head.parameters(), lr=1e-3, weight_decay=1e-2)
    rate = lambda step: min(1.0, (step + 1) / 3) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 30)).item())  # noqa: E731
    order = batch_order(40, 16, 3)
    weights = 40 / (3 * data.labels.bincount().float())
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(3)
        plain.head.train()
        for step in range(30):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * rate(step)
            rows = next(order)
            logits = plain.head(features[rows])
            each = functional.cross_entropy(logits, data.labels[rows], weight=weights, reduction="none")
            loss = (each * torch.full([16], 1 / 16)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert torch.allclose(made.head[1].weight, plain.head[1].weight, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in made.encoder.state_dict().items())
    assert made.encoder.passes == 48 + 1  # each image once, in whole tiles; and one to learn the number of classes
    again = frozen()
    again.features_folder = tmp_path
    assert fit_classifier(again, data, iterations=30, batch_size=16, seed=3, **QUIET).losses == report.losses
    assert again.encoder.passes == 1  # the second training finds them in the folder


def test_a_step_on_kept_features_is_twenty_times_faster() -> None:
    made = frozen()
    made.encoder = _Deep()
    made.head[1] = nn.Linear(64, 3)
    data = LabelledImages(torch.rand(64, 1, 64, 64), torch.arange(64) % 3)
    start = time.process_time()
    for _ in range(2):
        loss = functional.cross_entropy(made.head(made.features(data.images)), data.labels)
        loss.backward()
    through = (time.process_time() - start) / 2
    first = time.process_time()
    fit_classifier(made, data, iterations=2, batch_size=64, **QUIET)
    start = time.process_time()
    fit_classifier(made, data, iterations=202, batch_size=64, **QUIET)
    kept = (time.process_time() - start - (start - first)) / 200
    assert kept < through / 20, f"{kept * 1e3:.2f} ms against {through * 1e3:.1f} ms"


class _Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1), *(m for _ in range(6) for m in (nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))


@pytest.mark.parametrize("trains", ["last_block", "all"])
def test_parts_learn_at_rates_of_their_own(trains: str, data: LabelledImages) -> None:
    made, before = frozen(trains), frozen(trains)
    fit_classifier(made, data, iterations=1, batch_size=16, weight_decay=0.0, **QUIET)
    # the first step of AdamW moves each weight by its rate, whatever its gradient
    moved = {
        name: float((p - q).abs().max())
        for (name, p), (_, q) in zip(made.named_parameters(), before.named_parameters(), strict=True)
    }
    assert moved["head.1.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["encoder.body.3.weight"] == pytest.approx(1e-4, rel=1e-2)
    if trains == "all":
        assert moved["encoder.body.0.weight"] == pytest.approx(1e-4, rel=1e-2)  # a network without blocks is one


class Noisy(Augmentation):
    """Brighter by the number of the call; counts what it was asked for, and fails when told."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.seen, self._fails_at = 0, 0, fails_at

    def __call__(self, classifier: nn.Module, images: Tensor, labels: Tensor) -> Extra:
        if self.seen == self._fails_at:
            raise KeyboardInterrupt
        self.calls, self.seen = self.calls + 1, self.seen + 1
        return (images + 0.01 * self.calls).clamp(0, 1), labels

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def test_rounds_give_what_the_augmentations_make_of_all_images(
    data: LabelledImages, autoencoder: TinyAutoencoder
) -> None:
    latent = targeted(autoencoder, steps=2, seed=5)
    rounds = OfflineRounds(data, PixelConsistency(steps=2, seed=9), latent, rounds=2)
    made = frozen()
    for progress in (0.0, 0.5):
        rounds.set_progress(progress)
        rounds.set_ids(torch.tensor([7, 30, 2]))
        rounds(made, data.images[[7, 30, 2]], data.labels[[7, 30, 2]])
    alone = [PixelConsistency(steps=2, seed=9), targeted(autoencoder, steps=2, seed=5)]
    for number, augmentation in enumerate(alone):
        wanted = [augmentation(made, x, y) for x, y in zip(data.images.split(16), data.labels.split(16), strict=True)]
        images = torch.cat([part.images if isinstance(part, ExtraImages) else part[0] for part in wanted])
        (extra,) = rounds.made[number]
        assert torch.equal(extra.images, images)
        assert extra.sources.tolist() == list(range(40))
        assert (extra.loss, extra.weight) == (("consistency", 3.0), ("label", 1.0))[number]
    seen = set()
    for _ in range(20):
        rounds.set_ids(torch.tensor([7, 30, 2]))
        (given,) = rounds(made, data.images[[7, 30, 2]], data.labels[[7, 30, 2]])
        number = 0 if given.loss == "consistency" else 1
        assert torch.equal(given.images, rounds.made[number][0].images[[7, 30, 2]])
        assert given.made_of().tolist() == [0, 1, 2]
        seen.add(number)
    assert seen == {0, 1}


@pytest.mark.parametrize("network", ["frozen", "last_block", "small"])
@pytest.mark.parametrize("fails_at", [0, 2, 4, 7])
def test_a_killed_job_with_rounds_goes_on_exactly(
    network: str, fails_at: int, data: LabelledImages, tmp_path: Path
) -> None:
    def new() -> nn.Module:
        torch.manual_seed(0)
        return SmallResNet(1, 3, (4, 8)) if network == "small" else frozen("head" if network == "frozen" else network)

    def fit(folder: Path | None, fails_at: int | None = None) -> tuple[nn.Module, Noisy, OfflineRounds]:
        model, inner = new(), Noisy(fails_at)
        rounds = OfflineRounds(data, inner, rounds=3, folder=folder)
        checkpoint = None if folder is None else Checkpoint(folder / "training.safetensors", 4)
        options: dict[str, Any] = {"iterations": 21, "batch_size": 16, "checkpoint": checkpoint, **QUIET}
        fit_classifier(model, data, augmentation=rounds, **options)
        return model, inner, rounds

    wanted, inner, rounds = fit(None)
    assert inner.seen == 9  # three rounds of three files
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, fails_at)
    assert len(list(tmp_path.glob("round-*/*.safetensors"))) == fails_at
    got, again, found = fit(tmp_path)
    assert again.seen == 9 - fails_at  # nothing is made twice
    for made, other in zip(found.made, rounds.made, strict=True):
        assert torch.equal(made[0].images, other[0].images)
    for (name, p), (_, q) in zip(got.state_dict().items(), wanted.state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_rounds_in_a_folder_are_not_believed_blindly(data: LabelledImages, tmp_path: Path) -> None:
    def made(seed: int = 0) -> OfflineRounds:
        rounds = OfflineRounds(data, Noisy(), rounds=1, folder=tmp_path)
        rounds.set_ids(torch.arange(4))
        torch.manual_seed(seed)
        model = frozen() if seed == 0 else SmallResNet(1, 3, (4, 8))
        rounds(model, data.images[:4], data.labels[:4])
        return rounds

    assert made().parts[0].seen == 3  # type: ignore[attr-defined]
    assert made().parts[0].seen == 0  # type: ignore[attr-defined]
    assert made(1).parts[0].seen == 3  # type: ignore[attr-defined]  # against another classifier
    (file, *_) = sorted(tmp_path.glob("round-0/*"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    assert made(1).parts[0].seen == 1  # type: ignore[attr-defined]
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    rounds = OfflineRounds(data, Noisy(), rounds=1, folder=tmp_path)
    with pytest.raises(InputError, match=r"00000\.safetensors is missing or damaged"):
        rounds.load_state_dict({"made": 1, "parts": [{"calls": 3}]})


@pytest.mark.parametrize(("options", "words"), [
    ({"rounds": 0}, "rounds: got 0"), ({"at_once": 0}, "at_once: got 0"), ({"rounds": 99}, "at most the 14 steps"),
])  # fmt: skip
def test_rounds_that_cannot_be_are_refused(options: dict[str, Any], words: str, data: LabelledImages) -> None:
    with pytest.raises(InputError, match=words):
        fit_classifier(frozen(), data, iterations=20, augmentation=OfflineRounds(data, Noisy(), **options), **QUIET)
    with pytest.raises(InputError, match="augmentations: got none"):
        OfflineRounds(data)
