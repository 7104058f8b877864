"""Extra images: their losses, pixel ascents with known answers, alternation, mixture, and resumption."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from helpers import sharp, targeted
from torch import Tensor, nn
from torch.nn import functional

from tsynd.models.networks import SmallResNet
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.synthesis.objectives import ExpectedInformation
from tsynd.training.augmentation import TargetedAugmentation
from tsynd.training.classifier import fit_classifier
from tsynd.training.extra_images import (
    Alternation,
    Augmentation,
    BatchAugmentation,
    ExtraImages,
    Mixture,
    as_parts,
    image_losses,
)
from tsynd.training.in_place import InPlace
from tsynd.training.loop import Checkpoint, batch_order
from tsynd.training.pixels import PixelAdversarial, PixelConsistency
from tsynd.training.recipe import recipe
from tsynd.training.rounds import OfflineRounds
from tsynd.training.standard import FLIPS, StandardAugmentation
from tsynd.utils.errors import InputError

QUIET: dict[str, Any] = {"progress": False, "device": "cpu"}
BUDGET = 4 / 255


class Linear(nn.Module):
    """Logits (w x, -w x) of an image: every gradient in pixels has the signs of w."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        score = (images * self.weight).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


@pytest.fixture
def linear() -> Linear:
    return Linear(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def pixels() -> Tensor:
    """Some of them at the ends of the range."""
    return (torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 1.4 - 0.2).clamp(0, 1)


# --- losses


def test_losses_of_an_image_are_those_of_the_textbook() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.5], [0.2, 0.3, -2.0]])
    labels, weights = torch.tensor([2, 0]), torch.tensor([1.0, 2.0, 4.0])
    logp = logits.double().log_softmax(1)
    got = image_losses(logits, labels, weights=weights)
    torch.testing.assert_close(got.double(), torch.stack([-4 * logp[0, 2], -logp[1, 0]]), atol=1e-6, rtol=1e-6)
    soft = torch.tensor([[0.5, 0.0, 0.5], [0.1, 0.8, 0.1]])
    got = image_losses(logits, soft)
    torch.testing.assert_close(got.double(), -(soft.double() * logp).sum(1), atol=1e-6, rtol=1e-6)
    clean = torch.tensor([[0.0, 1.0, 2.0], [0.2, 0.3, -2.0]])
    p = clean.double().softmax(1)
    divergence = (p * (p.log() - logp)).sum(1)
    got = image_losses(logits, labels, "consistency", weights=weights, clean=clean)
    torch.testing.assert_close(got.double(), divergence * torch.tensor([4.0, 1.0]), atol=1e-6, rtol=1e-6)
    assert float(got[1]) == pytest.approx(0, abs=1e-7)
    p, q = clean.double().sigmoid(), logits.double().sigmoid()
    bernoulli = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    got = image_losses(logits, (clean > 0).float(), "consistency", task="multilabel", clean=clean)
    torch.testing.assert_close(got.double(), bernoulli.mean(1), atol=1e-6, rtol=1e-6)


def test_a_training_step_adds_up_each_parts_loss() -> None:
    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(8) % 2
    soft = torch.tensor([[0.3, 0.7]]).repeat(3, 1)
    seen: list[float] = []

    def extra(classifier: nn.Module, x: Tensor, y: Tensor) -> list[ExtraImages]:
        with torch.no_grad():
            logits = classifier(x)
            far = classifier(1 - x[5:])
            label = functional.cross_entropy(classifier(x.flip(-1)[:2]), y[:2], reduction="sum")
            mixed = functional.cross_entropy(classifier(x[:3] / 2), soft, reduction="sum")
            p = logits[5:].softmax(1)
            divergence = (p * (p.log() - far.log_softmax(1))).sum()
            mean = (label + 0.5 * mixed + 3 * divergence) / 8
            seen.append(float(functional.cross_entropy(logits, y) + 0.7 * mean))
        return [
            ExtraImages(x.flip(-1)[:2], y[:2]),
            ExtraImages(x[:3] / 2, soft, weight=0.5),
            ExtraImages(1 - x[5:], y[5:], "consistency", 3.0, torch.arange(5, 8)),
        ]

    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    options = {"iterations": 3, "batch_size": 8, "warmup_fraction": 0.0, "balanced": False, "augmentation_weight": 0.7}
    report = fit_classifier(model, (images, labels), augmentation=extra, **options, **QUIET)
    assert report.losses == pytest.approx(seen, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: ExtraImages(x, y, "hinge"), "loss: got 'hinge'"),
        (lambda x, y: ExtraImages(x, y, weight=-1.0), "weight: got -1.0"),
        (lambda x, y: ExtraImages(x, y, "consistency", sources=torch.arange(3)), "sources"),
        (lambda x, y: ExtraImages(x, y, "consistency", sources=torch.arange(4) + 1), "sources"),
        (lambda x, y: x, "augmentation: gave"),
        (lambda x, y: [x, y, y], "augmentation: gave"),
    ],
)
def test_extra_images_that_do_not_fit_are_refused(make: Callable[[Tensor, Tensor], Any], words: str) -> None:
    data = torch.rand(4, 1, 4, 4), torch.arange(4) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    options = {"iterations": 2, "batch_size": 4, "warmup_fraction": 0.0}
    with pytest.raises(InputError, match=words):
        fit_classifier(model, data, augmentation=lambda c, x, y: make(x, y), **options, **QUIET)
    with pytest.raises(InputError, match="augmentation: got int"):
        fit_classifier(model, data, augmentation=3, **options, **QUIET)  # type: ignore[arg-type]


# --- pixels


def test_adversarial_images_of_a_linear_classifier_are_known(linear: Linear, pixels: Tensor) -> None:
    labels = torch.arange(6) % 2
    made, given = as_parts(PixelAdversarial(BUDGET, 5)(linear, pixels, labels))[0].images, labels
    # down the label's score: -w for the first class, +w for the second, to the end of the ball
    way = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1) * linear.weight.detach().sign()
    torch.testing.assert_close(made, (pixels + BUDGET * way).clamp(0, 1), atol=1e-6, rtol=0)
    assert torch.equal(given, labels)
    assert not made.requires_grad


def test_consistency_images_of_a_linear_classifier_are_known(linear: Linear, pixels: Tensor) -> None:
    labels = torch.arange(6) % 2
    extra = as_parts(PixelConsistency(BUDGET, 5, weight=2.5)(linear, pixels, labels))[0]
    assert (extra.loss, extra.weight, extra.sources) == ("consistency", 2.5, None)
    # away from the image's own score along w, to whichever side the start lay on
    with torch.no_grad():
        side = (linear(extra.images) - linear(pixels))[:, 0].sign().view(-1, 1, 1, 1)
    wanted = (pixels + BUDGET * side * linear.weight.detach().sign()).clamp(0, 1)
    torch.testing.assert_close(extra.images, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [PixelAdversarial, PixelConsistency])
def test_pixel_images_raise_their_loss_within_the_budget(kind: Any, images: Tensor) -> None:
    model = sharp(images)
    labels = torch.arange(len(images)) % 3

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            name = "label" if kind is PixelAdversarial else "consistency"
            return image_losses(model(x), labels, name, clean=model(images))

    augmentation = kind(0.03, 4, seed=2)
    state = torch.get_rng_state()
    model.train()
    made = as_parts(augmentation(model, images, labels))[0].images
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert float((made - images).abs().max()) <= 0.03 + 1e-6
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    noise = (images + 0.03 * torch.randn_like(images).sign()).clamp(0, 1)
    assert (loss(made) - loss(images)).mean() > 2 * (loss(noise) - loss(images)).mean().abs()
    # addressed: a part of the batch gives the same part, another seed or call something else
    part = as_parts(kind(0.03, 4, seed=2)(model, images[:5], labels[:5]))[0].images
    torch.testing.assert_close(part, made[:5], atol=1e-5, rtol=0)
    other = as_parts(kind(0.03, 4, seed=3)(model, images, labels))[0].images
    assert (other - made).abs().max() > 1e-3
    assert torch.equal(other, as_parts(augmentation(model, images, labels))[0].images)  # call 1 of seed 2


def test_a_persistent_ascent_goes_on_where_it_ended(linear: Linear) -> None:
    images, labels = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    augmentation = PixelAdversarial(BUDGET, 1, persistent=True)
    with pytest.raises(InputError, match="set_ids"):
        augmentation(linear, images, labels)
    distances = []
    for ids in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 7, 8]):
        augmentation.set_ids(torch.tensor(ids))
        made = as_parts(augmentation(linear, images, labels))[0].images
        distances.append((made - 0.5 + BUDGET * linear.weight.detach().sign()).abs().flatten(1).amax(1))
    # one step of 1.25 budgets leaves some pixel inside, two never do; images 7 and 8 are new
    assert (distances[0] > 1e-4).all()
    assert float(distances[1].max()) < 1e-6
    assert float(distances[2][:2].max()) < 1e-6
    assert (distances[2][2:] > 1e-4).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "budget: got 0.0"),
        ({"budget": 4}, "budget: got 4"),
        ({"steps": 0}, "steps: got 0"),
        ({"weight": -1.0}, "weight: got -1.0"),
        ({"weight": math.nan}, "weight: got nan"),
        ({"task": "ranking"}, "task: got 'ranking'"),
        ({"ratio": 0}, "ratio: got 0"),
        ({"every": 0}, "every: got 0"),
    ],
)
def test_bad_pixel_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        PixelConsistency(**options)


# --- several in one training


def shade(value: float) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda classifier, images, labels: (torch.full_like(images, value), labels)


def test_alternation_takes_turns() -> None:
    images, labels = torch.rand(4, 1, 4, 4), torch.arange(4)
    turns = Alternation(shade(0.1), None, shade(0.3))
    got = [as_parts(turns(nn.Identity(), images, labels))[0].images for _ in range(5)]
    assert [float(x.mean()) if len(x) else None for x in got] == pytest.approx([0.1, None, 0.3, 0.1, None])
    assert turns.set_rows(torch.arange(4), 4) is None  # a plain function does not know
    again = Alternation(shade(0.1), None, shade(0.3))
    again.load_state_dict(turns.state_dict())
    assert float(as_parts(again(nn.Identity(), images, labels))[0].images.mean()) == pytest.approx(0.3)


def test_a_mixture_gives_each_part_its_block() -> None:
    images, labels = torch.rand(10, 1, 4, 4), torch.arange(10) % 2
    mixture = Mixture(shade(0.1), PixelConsistency(0.01, 1), None, shade(0.9), shares=[1, 2, 1, 1])
    got = as_parts(mixture(Linear(torch.ones(1, 4, 4)), images, labels))
    assert [len(part.images) for part in got] == [2, 4, 0, 2]
    assert [part.made_of().tolist() for part in got] == [[0, 1], [2, 3, 4, 5], [], [8, 9]]
    assert [part.loss for part in got] == ["label", "consistency", "label", "label"]
    assert float((got[1].images - images[2:6]).abs().max()) <= 0.01 + 1e-6
    assert [part.labels.tolist() for part in got] == [[0, 1], [0, 1, 0, 1], [], [0, 1]]


def test_two_processes_rows_of_a_mixture_are_those_of_one() -> None:
    images, labels = torch.rand(10, 1, 4, 4), torch.arange(10) % 2
    model = Linear(torch.ones(1, 4, 4))

    def mixture() -> Mixture:
        return Mixture(PixelConsistency(0.01, 1), PixelAdversarial(0.1, 1, ratio=0.5), shares=[3, 2])

    def made(augmentation: Mixture, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([part.images for part in as_parts(augmentation(model, x, y))])

    whole = made(mixture(), images, labels)  # rows 0..5, then 6 and 7
    assert len(whole) == 8
    for rank in (0, 1):
        own, rows = mixture(), torch.arange(10)[rank::2]
        given = own.set_rows(rows, 10)
        assert given is not None
        assert given.tolist() == [row for row in rows.tolist() if row < 8]
        torch.testing.assert_close(made(own, images[rows], labels[rows]), whole[given], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Alternation(shade(0.1)), "parts: got 1"),
        (lambda: Alternation(shade(0.1), 3), "augmentation: got int"),  # type: ignore[arg-type]
        (lambda: Mixture(shade(0.1), None, shares=[1.0]), "shares: got"),
        (lambda: Mixture(shade(0.1), None, shares=[1.0, 0.0]), "shares: got"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


# --- targeted images with residual, expected information


def test_residual_adds_back_what_the_autoencoder_loses(images: Tensor, autoencoder: TinyAutoencoder) -> None:
    labels = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        blurred = autoencoder.decode(autoencoder.encode(images))

    def made(share: float) -> Tensor:
        augmentation = targeted(autoencoder, direction="reconstruction", residual=share)
        return augmentation(nn.Identity(), images, labels)[0]

    torch.testing.assert_close(made(1.0), images, atol=1e-6, rtol=0)
    torch.testing.assert_close(made(0.25), blurred + 0.25 * (images - blurred), atol=1e-6, rtol=0)


def test_expected_information_knows_twins_and_strangers(images: Tensor) -> None:
    posterior = MCDropout(sharp(images), 16)
    with torch.no_grad():
        ids = torch.arange(len(images))
        logits = posterior.logits(images)
        own = [float(ExpectedInformation(posterior, logits[:, [i]], "multiclass")(images, ids)[i]) for i in range(5)]
        mutual = posterior.uncertainty(images)
        # what an image tells about itself, were it asked twice, is at most its mutual information
        assert all(0 < a <= float(b) + 1e-6 for a, b in zip(own, mutual, strict=False))
        still = logits[:1].expand_as(logits)[:, :4]  # targets whose samples agree
        value = ExpectedInformation(posterior, still, "multiclass")(images, ids)
        torch.testing.assert_close(value, torch.zeros(len(images)), atol=1e-6, rtol=0)


def test_expected_information_of_samples_that_are_sure_is_the_mutual_information() -> None:
    half = torch.tensor([30.0, -30.0]).repeat(4)
    logits = torch.stack([half, -half], -1)[:, None]

    class Given:
        def logits(self, images: Tensor, ids: Tensor) -> Tensor:
            return logits

    apart = torch.tensor([30.0, 30.0, -30.0, -30.0]).repeat(2)
    for targets, wanted in ((logits, math.log(2)), (torch.stack([apart, -apart], -1)[:, None], 0.0)):
        measure = ExpectedInformation(Given(), targets, "multiclass")  # type: ignore[arg-type]
        assert float(measure(torch.empty(1), torch.empty(1))) == pytest.approx(wanted, abs=1e-5)


def test_targets_steer_the_images(images: Tensor, autoencoder: TinyAutoencoder) -> None:
    classifier, labels = sharp(images), torch.arange(len(images)) % 3
    near, far = images[:4], torch.rand(4, *images.shape[1:], generator=torch.Generator().manual_seed(5))
    options: dict[str, Any] = {"objective": "expected_information", "radius": 1.0, "steps": 5}
    posterior = MCDropout(classifier, 8)
    for targets in (near, far):
        made = targeted(autoencoder, targets=targets, **options)(classifier, images, labels)[0]
        with torch.no_grad():
            measure = ExpectedInformation(posterior, posterior.logits(targets), "multiclass")
            before = autoencoder.decode(autoencoder.encode(images))
            ids = torch.arange(len(images))
            assert measure(made, ids).mean() > measure(before, ids).mean()
    bare = targeted(autoencoder, **options)
    with pytest.raises(InputError, match="targets: got none"):
        bare(classifier, images, labels)
    bare.prepare(images.split(7))
    assert bare.targets is not None
    assert torch.equal(bare.targets, images)
    assert len(bare(classifier, images, labels)[0]) == len(images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"persistent": True, "direction": "reconstruction"}, "persistent: got True with direction"),
        ({"residual": 1.5}, "residual: got 1.5"),
        ({"residual": "half"}, "residual: got 'half'"),
        ({"targets": torch.rand(2, 1, 12, 12)}, "targets: got images"),
        ({"objective": "expected_information", "masks": "independent"}, "wanted 'shared' masks"),
        ({"objective": "expected_information", "targets": torch.rand(2, 12)}, "images: "),
        ({"temperature": 1.0}, "temperature: is no setting"),
    ],
)
def test_bad_targeted_options_are_refused(autoencoder: TinyAutoencoder, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        targeted(autoencoder, **options)


# --- resumption, and loops of one's own


def _data(count: int = 20) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 2


def _coder(latent_std: float | None = None) -> TinyAutoencoder:
    torch.manual_seed(1)
    coder = TinyAutoencoder()
    if latent_std is not None:
        coder.latent_std = torch.tensor(latent_std)
    return coder


KINDS: dict[str, Callable[[], Augmentation]] = {
    "consistency": lambda: PixelConsistency(0.02, 1, persistent=True),
    "adversarial": lambda: PixelAdversarial(0.02, 2, every=2),
    "targeted": lambda: _targeted(steps=1, persistent=True, residual=0.5),
    "expected": lambda: _targeted(objective="expected_information", steps=2),
    "alternation": lambda: Alternation(PixelConsistency(0.02, 1, persistent=True), _targeted(steps=1, persistent=True)),
    "mixture": lambda: Mixture(PixelAdversarial(0.02, 1, persistent=True), _targeted(steps=1), shares=[1, 2]),
    "recipe": lambda: recipe("robust", _coder(0.4), seed=3),
    "rounds": lambda: OfflineRounds(_data(), _targeted(steps=1), rounds=2),
}


def _targeted(**options: Any) -> TargetedAugmentation:
    return targeted(_coder(), samples=4, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_exactly(tmp_path: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(checkpoint: Checkpoint | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = TinyClassifier(classes=2)
        options = {"iterations": 12, "batch_size": 6, "warmup_fraction": 0.2, **QUIET}
        fit_classifier(model, _data(), augmentation=KINDS[kind](), checkpoint=checkpoint, **options)
        return model.state_dict()

    whole = fit(None)
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 4)
    steps, step = iter(range(10)), torch.optim.AdamW.step

    def stop(self: Any, *given: Any) -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint)
    monkeypatch.undo()
    resumed = fit(checkpoint)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rounds"])
def test_a_loop_of_ones_own_gets_the_same_batches(kind: str) -> None:
    images, labels = _data()
    kept: list[list[Tensor]] = [[], []]

    def record(augmentation: Augmentation, into: list[Tensor]) -> Augmentation:
        call = type(augmentation).__call__

        class Recorded(type(augmentation)):  # type: ignore[misc]
            def __call__(self, *given: Any) -> Any:
                made = call(self, *given)
                into.extend(part.images.clone() for part in as_parts(made))
                return made

        augmentation.__class__ = Recorded
        return augmentation

    torch.manual_seed(0)
    model = SmallResNet(widths=(4, 8))
    options = {"iterations": 5, "batch_size": 6, "warmup_fraction": 0.0, "balanced": False, **QUIET}
    fit_classifier(model, (images, labels), augmentation=record(KINDS[kind](), kept[0]), seed=4, **options)

    torch.manual_seed(0)
    plain = SmallResNet(widths=(4, 8))
    augmentation = record(KINDS[kind](), kept[1])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step + 1) * 0.5 * (1 + math.cos(math.pi * step / 5))
    )
    augmentation.prepare(images.split(7))
    torch.manual_seed(4)
    plain.train()
    for step, draw in zip(range(5), batch_order(20, 6, 4), strict=False):
        augmentation.set_progress(step / 4)
        augmentation.set_ids(draw)
        x, y = images[draw], labels[draw]
        if hasattr(augmentation, "transform"):
            x, y = augmentation.transform(x, y)
        parts = as_parts(augmentation(plain, x, y))
        plain.train()
        logits = plain(torch.cat([x, *(part.images for part in parts)]))
        losses = [image_losses(logits[:6], y) / 6]
        rest, made = logits[6:], max(sum(len(part.images) for part in parts), 1)
        for part in parts:
            own, rest = rest[: len(part.images)], rest[len(part.images) :]
            clean = logits[:6][part.made_of()]
            losses.append(image_losses(own, part.labels, part.loss, clean=clean) * part.weight / made)
        optimizer.zero_grad()
        torch.cat(losses).sum().backward()
        optimizer.step()
        schedule.step()
    assert len(kept[0]) == len(kept[1]) >= 5
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_the_recipe_keeps_predictions_and_moves_towards_targets() -> None:
    images, labels = _data()
    robust = recipe("robust", _coder(0.4), targets=images[:3])
    model, found = TinyClassifier(classes=2), []
    robust.prepare([images])
    for _ in range(6):
        robust.set_ids(torch.arange(20))
        found += as_parts(robust(model, images, labels))
    assert [part.loss for part in found] == ["consistency", "label"] * 3
    assert [part.weight for part in found] == [3.0, 1.0] * 3
    assert float((found[0].images - images).abs().max()) <= 3 / 255 + 1e-6
    offline = recipe("robust", _coder(0.4), offline=True)
    assert isinstance(offline, Alternation)
    assert [type(part) for part in offline.parts] == [TargetedAugmentation, StandardAugmentation]
    with pytest.raises(InputError, match="recipe: got 'best', wanted one of 'robust'"):
        recipe("best", _coder(0.4))


def test_real_images_are_changed_in_place() -> None:
    """From the first step on; what is learnt and what extra images are made of is the changed image."""
    seen: list[tuple[Tensor, Tensor]] = []

    def extra(classifier: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((x.clone(), y.clone()))
        return x[:1], y[:1]

    class Halved(BatchAugmentation):
        def make(self, classifier: Any, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
            return images / 2

    class Noted(TinyClassifier):
        def forward(self, images: Tensor) -> Tensor:
            largest.append(float(images.amax()))
            return super().forward(images)

    images, labels = _data()
    largest: list[float] = []
    model = Noted(classes=2)
    change = Halved()
    options = {"iterations": 6, "batch_size": 20, "warmup_fraction": 0.5, **QUIET}
    fit_classifier(model, (images, labels), augmentation=InPlace(change, extra), **options)
    assert change.calls == 6
    assert len(seen) == 3
    assert all(torch.equal(x.flatten(1).amax(1).sort().values, images.flatten(1).amax(1).sort().values / 2)
               for x, _ in seen)  # fmt: skip
    assert max(largest[1:]) <= images.amax() / 2  # behind the look at one image that is no step
    for bad in (Halved(ratio=0.5), Halved(every=2), lambda x, y: (x, y)):
        with pytest.raises(InputError, match="change: wanted"):
            InPlace(bad, extra)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 12, 12), (1, 4, 12, 12)])
def test_standard_images_are_turned_and_flipped_a_little(shape: tuple[int, ...]) -> None:
    images = torch.zeros(16, *shape)
    images[..., 2:5, 2:5] = 1.0  # a square up left
    labels = torch.arange(16)
    state = torch.get_rng_state()
    sides = {}
    for flip in FLIPS:
        made, given = as_parts(StandardAugmentation(flip, seed=1)(nn.Identity(), images, labels))[0].images, labels
        assert torch.equal(torch.get_rng_state(), state)
        assert made.shape == images.shape
        assert torch.equal(given, labels)
        assert 0.4 * images.mean() < made.mean() < 2.5 * images.mean()
        assert (made - images).abs().flatten(1).amax(1).min() > 0.05
        corner = made.flatten(1, -3).sum(1)
        sides[flip] = [bool(corner[i, :, :6].sum() > corner[i, :, 6:].sum()) for i in range(16)]
        upper = [bool(corner[i, :6].sum() > corner[i, 6:].sum()) for i in range(16)]
        assert all(upper) == (flip != "both")
        if len(shape) == 4:  # every slice of a volume in the same way
            assert torch.equal(made[:, :, 0], made[:, :, 3])
    assert all(sides["none"])
    assert not all(sides["horizontal"])
    assert any(sides["horizontal"])
    again = as_parts(StandardAugmentation("both", seed=1)(nn.Identity(), images, labels))[0].images
    assert torch.equal(again, made)


# --- what fit_classifier takes besides


def test_a_transform_is_done_to_every_real_batch() -> None:
    data, seen = _data(), []

    def transform(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images + torch.rand(len(images), 1, 1, 1) * (1 - images), labels

    def record(classifier: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(images.clone())
        return images[:0], labels[:0]

    def fit(**options: Any) -> tuple[float, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        shared = {"iterations": 3, "batch_size": 6, "warmup_fraction": 0.0, "seed": 1, **QUIET}
        return fit_classifier(model, data, augmentation=record, **options, **shared).losses

    plain, moved = fit(), fit(transform=transform)
    draws = list(zip(range(3), batch_order(20, 6, 1), strict=False))
    for (_, draw), before, after in zip(draws, seen[:3], seen[3:], strict=True):
        assert torch.equal(before, data[0][draw])
        assert not torch.equal(after, before)
    assert plain != moved
    assert fit(transform=transform) == moved
    with pytest.raises(InputError, match="transform: gave Tensor"):
        fit(transform=lambda x, y: x)


def test_mixed_images_are_learnt_by_probabilities() -> None:
    images, _ = _data()
    seen: list[float] = []

    def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        truth = functional.one_hot(y, 2).float()
        mixed, soft = 0.7 * x + 0.3 * x.flip(0), 0.7 * truth + 0.3 * truth.flip(0)
        weights = torch.tensor([1.0, 3.0])
        with torch.no_grad():
            seen.append(float(-(soft * weights * model(mixed).log_softmax(1)).sum(1).mean()))
        return mixed, soft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    quarter = torch.tensor([1, 0, 0, 0] * 5)  # a quarter weighs three times as much: 20 / 30 and 20 / 10
    losses = fit_classifier(model, (images, quarter), transform=mix, iterations=3, batch_size=6, **QUIET).losses
    assert losses == pytest.approx([value * 2 / 3 for value in seen], rel=1e-5)


@pytest.mark.parametrize("kind", ["consistency", "adversarial", "targeted", "expected"])
def test_augmentations_take_probabilities_for_labels(kind: str) -> None:
    images, labels = _data()
    soft = 0.9 * functional.one_hot(labels, 2).float() + 0.05
    model = TinyClassifier(classes=2)
    augmentation = KINDS[kind]()
    augmentation.prepare([images])
    augmentation.set_ids(torch.arange(20))
    (part,) = as_parts(augmentation(model, images, soft))
    assert torch.equal(part.labels, soft)
    wrong = KINDS[kind]()
    wrong.prepare([images])
    wrong.set_ids(torch.arange(20))
    with pytest.raises(InputError, match="labels: "):
        wrong(model, images, torch.full((20, 3), 1 / 3))


def test_own_metrics_stand_beside_the_scores() -> None:
    data = _data()

    def brier(chances: Tensor, labels: Tensor) -> Tensor:
        return (chances - functional.one_hot(labels, 2)).square().sum(1).mean()

    model = TinyClassifier(classes=2)
    options = {"iterations": 2, "batch_size": 6, **QUIET}
    report = fit_classifier(model, data, val=data, metrics={"brier": brier}, **options)
    with torch.no_grad():
        wanted = brier(model(data[0]).softmax(1), data[1])
    assert report.validation["brier"] == pytest.approx(float(wanted), rel=1e-5)
    assert "auroc" in report.validation
    with pytest.raises(InputError, match="metrics: got brier without val"):
        fit_classifier(model, data, metrics={"brier": brier}, **options)


@pytest.mark.parametrize("place", [0.3, 0.5, 0.7, 0.9])
def test_one_changed_bit_in_a_checkpoint_is_refused(tmp_path: Any, place: float) -> None:
    checkpoint = Checkpoint(tmp_path / "state.safetensors", 2)
    options = {"iterations": 4, "batch_size": 6, "checkpoint": checkpoint, **QUIET}
    fit_classifier(TinyClassifier(classes=2), _data(), augmentation=KINDS["consistency"](), **options)
    content = bytearray(checkpoint.path.read_bytes())
    content[int(len(content) * place)] ^= 0x10
    checkpoint.path.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint: .* cannot be read"):
        fit_classifier(TinyClassifier(classes=2), _data(), augmentation=KINDS["consistency"](), **options)
