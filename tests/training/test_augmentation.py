"""Targeted augmentation: its directions, its options, and that a plain loop gets what fit_classifier gets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from helpers import STD, sharp, targeted
from torch import Tensor, nn
from torch.nn import functional

from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Ensemble
from tsynd.synthesis.objectives import LabelLoss, Uncertainty
from tsynd.training.augmentation import DIRECTIONS
from tsynd.utils.errors import InputError


class Watched(TinyAutoencoder):
    """Remembers the last source and every decoded latent, and whether gradients were on."""

    def encode(self, images: Tensor) -> Tensor:
        self.source: Tensor = super().encode(images)
        self.decoded: list[Tensor] = []
        self.graph = False
        return self.source

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents.detach().clone())
        self.graph |= latents.requires_grad
        return super().decode(latents)

    def distances(self) -> Tensor:
        return torch.stack([(z - self.source).flatten(1).norm(dim=1) for z in self.decoded])


@pytest.fixture
def watched() -> Watched:
    torch.manual_seed(1)
    return Watched()


@pytest.fixture
def classifier(images: Tensor) -> TinyClassifier:
    """One whose batch norm knows the images, so that its predictions tell them apart."""
    return sharp(images)


@pytest.fixture
def labels(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 3


def unit(autoencoder: TinyAutoencoder, images: Tensor) -> float:
    return STD * math.sqrt(autoencoder.encode(images)[0].numel())


@pytest.mark.parametrize("direction", ["uncertainty", "loss"])
def test_climbing_stays_in_the_ball_and_raises_its_measure(
    watched: Watched, classifier: nn.Module, images: Tensor, labels: Tensor, direction: str
) -> None:
    radius = 0.5
    made, given = targeted(watched, direction=direction, radius=radius)(classifier, images, labels)
    assert given is labels or torch.equal(given, labels)
    assert made.shape == images.shape
    assert not made.requires_grad
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    distances = watched.distances()
    limit = radius * unit(watched, images)
    assert float(distances.max()) <= limit * (1 + 1e-5)
    assert float(distances.max()) > 0.9 * limit
    posterior = MCDropout(classifier, 8)  # seed 0: the samples of the first call
    before = watched.decode(watched.encode(images))

    def measure(x: Tensor) -> Tensor:
        with torch.no_grad():
            if direction == "uncertainty":
                return posterior.uncertainty(x)
            return functional.nll_loss(posterior.probabilities(x).log(), labels, reduction="none")

    anywhere, _ = targeted(watched, direction="random", radius=radius)(classifier, images, labels)
    gain, by_chance = measure(made) - measure(before), measure(anywhere) - measure(before)
    assert (gain >= -1e-6).all()
    assert gain.mean() > 3 * by_chance.mean().abs()


@pytest.mark.parametrize("rule", ["l2", "linf"])
def test_random_goes_exactly_to_the_radius(
    watched: Watched, classifier: nn.Module, images: Tensor, labels: Tensor, rule: str
) -> None:
    targeted(watched, direction="random", radius=0.7, rule=rule)(classifier, images, labels)
    (latents,) = watched.decoded
    offset = (latents - watched.source).flatten(1)
    if rule == "l2":
        expected = torch.full((len(images),), 0.7 * unit(watched, images))
        torch.testing.assert_close(offset.norm(dim=1), expected, rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(offset.abs(), torch.full_like(offset, 0.7 * STD), rtol=1e-4, atol=1e-6)
    # uniform: no two images go the same way, and no way is preferred
    cosine = functional.normalize(offset) @ functional.normalize(offset).t()
    others = cosine[~torch.eye(len(images), dtype=torch.bool)]
    assert float(others.abs().max()) < 0.8
    assert abs(float(others.mean())) < 0.05
    assert abs(float((offset > 0).float().mean()) - 0.5) < 0.07


def test_random_is_addressed_by_seed_call_and_position(watched: Watched, images: Tensor, labels: Tensor) -> None:
    def latents(seed: int, calls: int, count: int) -> Tensor:
        augmentation = targeted(watched, direction="random", seed=seed)
        for _ in range(calls):
            torch.rand(3)  # the global state has no say
            augmentation(nn.Identity(), images[:count], labels[:count])
        return watched.decoded[0] - watched.source

    first = latents(3, 1, 23)
    torch.testing.assert_close(latents(3, 1, 7), first[:7], rtol=0, atol=1e-5)
    assert torch.equal(latents(3, 1, 23), first)
    assert torch.equal(latents(2, 2, 23), first)  # call 1 of seed 2 is call 0 of seed 3
    assert (latents(4, 1, 23) - first).abs().mean() > 0.1 * first.abs().mean()


def test_every_call_has_posterior_samples_of_its_own(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor
) -> None:
    def third(seed: int, calls: int) -> Tensor:
        augmentation = targeted(autoencoder, seed=seed)
        return [augmentation(classifier, images, labels)[0] for _ in range(calls)][-1]

    assert torch.equal(third(5, 3), third(7, 1))
    assert (third(5, 3) - third(5, 2)).abs().max() > 1e-2


def test_reconstruction_is_encode_and_decode(watched: Watched, images: Tensor, labels: Tensor) -> None:
    made, _ = targeted(watched, direction="reconstruction")(nn.Identity(), images, labels)
    with torch.no_grad():
        assert torch.equal(made, watched.decode(watched.encode(images)))


@pytest.mark.parametrize("direction", ["random", "reconstruction"])
def test_the_blind_directions_pay_for_no_gradient_and_no_prediction(
    watched: Watched, images: Tensor, labels: Tensor, direction: str
) -> None:
    class Untouchable(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("asked for a prediction")

    targeted(watched, direction=direction)(Untouchable(), images, labels)
    assert len(watched.decoded) == 1
    assert not watched.graph


@pytest.mark.parametrize("direction", ["uncertainty", "loss", "random"])
def test_label_consistency_is_respected(
    watched: Watched, classifier: nn.Module, images: Tensor, direction: str
) -> None:
    posterior = MCDropout(classifier, 8)

    def kept(made: Tensor) -> Tensor:
        with torch.no_grad():
            return posterior.probabilities(made).gather(1, labels[:, None])[:, 0]

    with torch.no_grad():
        start = watched.decode(watched.encode(images))
        labels = posterior.probabilities(start).argmax(1)
    options: dict[str, Any] = {"direction": direction, "radius": 3.0}
    free = kept(targeted(watched, **options)(classifier, images, labels)[0])
    least = float(free.median())
    made = targeted(watched, **options, label_consistency=least)(classifier, images, labels)[0]
    still = kept(start) >= least
    assert (free[still] < least).any()
    assert (kept(made)[still] >= least - 1e-5).all()
    if direction == "random":  # what would lose its label is the reconstruction, the others are as they were
        lost = free < least
        torch.testing.assert_close(made[lost], start[lost])
        assert not torch.isclose(made[~lost], start[~lost], atol=1e-3).all()


def test_the_radius_follows_the_progress(watched: Watched, images: Tensor, labels: Tensor) -> None:
    augmentation, length = targeted(watched, direction="random", radius=(0.2, 1.0)), unit(watched, images)
    for fraction, radius in ((0.0, 0.2), (0.25, 0.4), (1.0, 1.0)):
        augmentation.set_progress(fraction)
        augmentation(nn.Identity(), images, labels)
        expected = torch.full((1, len(images)), radius * length)
        torch.testing.assert_close(watched.distances(), expected, rtol=1e-4, atol=0)


def test_every_nth_call_and_the_costs(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    labels = torch.arange(len(images)) % 3
    augmentation = targeted(autoencoder, every=3, ratio=0.4)
    counts, seconds = [], []
    for _ in range(5):
        made, given = augmentation(classifier, images, labels)
        assert len(made) == len(given)
        assert made.shape[1:] == images.shape[1:]
        counts.append(len(made))
        seconds.append(augmentation.seconds)
    assert counts == [10, 0, 0, 10, 0]  # ceil(0.4 * 23)
    assert augmentation.images_made == 20
    assert augmentation.calls == 5
    assert 0 < seconds[0] == seconds[1] == seconds[2] < seconds[3] == seconds[4]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_everything_is_left_as_it_was(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor, direction: str
) -> None:
    classifier.train()
    classifier.body.eval()
    autoencoder.train()
    classifier.head.weight.requires_grad_(False)
    modules = [*classifier.modules(), *autoencoder.modules()]
    parameters = [*classifier.parameters(), *autoencoder.parameters()]
    modes, wanted = [m.training for m in modules], [p.requires_grad for p in parameters]
    weights = [v.clone() for v in (*classifier.state_dict().values(), *autoencoder.state_dict().values())]
    state = torch.get_rng_state()
    targeted(autoencoder, direction=direction)(classifier, images, labels)
    assert [m.training for m in modules] == modes
    assert [p.requires_grad for p in parameters] == wanted
    assert all(p.grad is None for p in parameters)
    after = [*classifier.state_dict().values(), *autoencoder.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("direction", ["uncertainty", "reconstruction"])
def test_images_keep_their_dtype_under_autocast(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, direction: str
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert autoencoder.decode(autoencoder.encode(images)).dtype == torch.bfloat16
        made, _ = targeted(autoencoder, direction=direction)(classifier, images, torch.arange(len(images)) % 3)
    assert made.dtype == images.dtype == torch.float32


def test_an_ensemble_and_several_labels(autoencoder: nn.Module, images: Tensor) -> None:
    torch.manual_seed(4)
    ensemble = Ensemble([TinyClassifier(), TinyClassifier()])
    truth = (torch.arange(3 * len(images)).reshape(-1, 3) % 2).float()
    for direction in ("uncertainty", "loss"):
        augmentation = targeted(autoencoder, direction=direction, task="multilabel")
        made, given = augmentation(ensemble, images, truth)
        assert torch.equal(given, truth)
        with torch.no_grad():
            before = autoencoder.decode(autoencoder.encode(images))
            measure = Uncertainty(ensemble, "mutual_information", "multilabel")
            if direction == "loss":
                measure = LabelLoss(ensemble, truth, "multilabel")
            ids = torch.arange(len(images))
            assert measure(made, ids).mean() > measure(before, ids).mean()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"direction": "up"}, "direction: got 'up', wanted one of 'uncertainty', 'loss', 'random', 'reconstruction'"),
    ({"objective": "bald"}, "objective: got 'bald'"),
    ({"task": "binary"}, "task: got 'binary'"),
    ({"masks": "none"}, "masks: got 'none'"),
    ({"rule": "l1"}, "rule: got 'l1'"),
    ({"samples": 0}, "samples: got 0"),
    ({"steps": 0}, "steps: got 0"),
    ({"radius": 0}, "radius: got 0"),
    ({"radius": (0.5, -1.0)}, r"radius: got \(0.5, -1.0\), wanted a number above 0 or a pair"),
    ({"radius": (0.1, 0.2, 0.3)}, "radius: got"),
    ({"radius": "wide"}, "radius: got 'wide'"),
    ({"step_size": -1.0}, "step_size: got -1.0"),
    ({"label_consistency": 1.0}, "label_consistency: got 1.0"),
    ({"ratio": 0}, "ratio: got 0"),
    ({"ratio": 1.5}, "ratio: got 1.5"),
    ({"every": 0}, "every: got 0"),
    ({"every": 2.0}, "every: got 2.0"),
    ({"latent_std": None}, "latent_std: got nan"),
    ({"latent_std": 0.0}, "latent_std: got 0.0"),
    ({"seed": -1}, "seed: got -1"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_arguments_are_refused_at_once(autoencoder: nn.Module, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        targeted(autoencoder, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"images": torch.rand(5, 1, 12, 12) * 255}, {}, "images: values from"),
        ({"images": torch.rand(5, 3, 12, 12)}, {}, "autoencoder: failed on images"),
        ({"labels": torch.full((5,), 3)}, {}, "labels: values from 3 to 3; wanted 0 to 2"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, {}, r"labels: shape \[4\]"),
        ({"labels": torch.zeros(5, 2)}, {"task": "multilabel"}, "labels: 2 labels per image; wanted 3"),
        ({"classifier": nn.Sequential(nn.Flatten(), nn.Linear(144, 3))}, {}, "no active dropout"),
    ],
)
def test_bad_input_is_refused_at_the_first_call(
    watched: Watched, classifier: nn.Module, change: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    given = {"images": torch.rand(5, 1, 12, 12), "labels": torch.zeros(5, dtype=torch.int64)} | change
    augmentation = targeted(watched, **options)
    with pytest.raises(InputError, match=words):
        augmentation(given.get("classifier", classifier), given["images"], given["labels"])
    assert augmentation.images_made == 0


def test_progress_outside_its_range_is_refused(autoencoder: nn.Module) -> None:
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="fraction: got"):
            targeted(autoencoder).set_progress(fraction)
