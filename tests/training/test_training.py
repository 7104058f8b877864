"""Training loops."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tsynd.training.augmentation import TargetedAugmentation
from tsynd.utils.errors import InputError

pytest.importorskip("monai")
pytest.importorskip("accelerate")

from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier
from tsynd.training.loop import batch_order
from tsynd.training.rounds import OfflineRounds

QUIET = {"progress": False, "device": "cpu"}


def _stripes(count, size=16, seed=0):
    """Horizontal or vertical stripes in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    images = 0.4 * torch.rand(count, 1, size, size, generator=generator)
    bright = torch.arange(size) % 4 < 2
    images[labels == 0] += 0.4 * bright[:, None]
    images[labels == 1] += 0.4 * bright
    return images, labels


IMAGES, LABELS = _stripes(8)


def _classifier(seed=0, classes=2):
    torch.manual_seed(seed)
    return SmallResNet(1, classes, (8, 16))


def _same(one, other):
    mine, yours = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[key], yours[key]) for key in mine)


def test_classifier_learns_and_reports():
    model, data = _classifier(), _stripes(64)
    report = fit_classifier(
        model, data, iterations=40, batch_size=16, learning_rate=1e-2, val=_stripes(50, seed=1), **QUIET
    )
    assert len(report.losses) == report.iterations == 40
    assert np.mean(report.losses[-5:]) < 0.5 * np.mean(report.losses[:5])
    assert report.validation["balanced_accuracy"] > 0.95
    assert report.seconds > 0
    assert report.augmentation_share == 0
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_same_seed_same_weights_and_the_callers_random_state_stays():
    runs = []
    for seed, junk in ((3, 1), (3, 2), (4, 1)):
        model = _classifier()
        torch.manual_seed(junk)
        state = torch.get_rng_state()
        fit_classifier(model, _stripes(30), iterations=6, batch_size=8, seed=seed, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(model)
    assert _same(runs[0], runs[1])
    assert not _same(runs[0], runs[2])


def test_autoencoder_is_reproducible_and_measures_its_latents():
    images, runs = _stripes(40)[0], []
    for junk in (1, 2):
        torch.manual_seed(0)
        coder = SmallAutoencoder(1, 4, (8, 16))
        torch.manual_seed(junk)
        state = torch.get_rng_state()
        report = fit_autoencoder(coder, images, iterations=60, batch_size=16, **QUIET)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append(coder)
    assert _same(*runs)
    assert not coder.training
    with torch.no_grad():
        assert (coder(images) - images).square().mean() < 0.5 * images.var()
        expected = coder.encode(images).flatten(1).var(0).mean().sqrt()
    torch.testing.assert_close(coder.latent_std, expected)
    assert 0.05 < expected < 20
    assert report.losses[-1] < report.losses[0]


def test_an_autoencoder_looks_at_windows_of_large_images():
    """The same window of a step's images, wherever it lies, at every process and start."""
    seen = []

    class Watching(SmallAutoencoder):
        def encode(self, images):
            if self.training:
                seen.append(images.detach().clone())
            return super().encode(images)

    torch.manual_seed(0)
    columns = torch.arange(40.0).expand(12, 1, 24, 40) / 40 + torch.arange(24.0)[:, None] / 1000
    columns = columns + torch.arange(12.0)[:, None, None, None] / 10_000
    model = Watching(1, 4, (4, 8))
    fit_autoencoder(model, columns.clamp(0, 1), iterations=30, batch_size=4, crop=16, progress=False, device="cpu")
    assert {tuple(x.shape) for x in seen} == {(4, 1, 16, 16)}
    lefts = {round(float(x[0, 0, 0, 0] * 40)) for x in seen}
    assert min(lefts) >= 0
    assert max(lefts) <= 24
    assert len(lefts) > 10  # of the 25 places
    assert all(float((x - x[:1]).abs().max()) < 0.0012 for x in seen)
    assert float(model.latent_std) > 0


def test_any_pair_of_modules_can_be_an_autoencoder():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = nn.Linear(256, 8), nn.Linear(8, 256)

        def encode(self, images):
            return self.inside(images.flatten(1))

        def decode(self, latents):
            return self.outside(latents).reshape(-1, 1, 16, 16).sigmoid()

    report = fit_autoencoder(Own(), _stripes(20), iterations=20, batch_size=64, **QUIET)
    assert report.losses[-1] < report.losses[0]


class Recorder:
    """An augmentation that misbehaves as far as it may: eval mode, gradients, draws, more images."""

    def __init__(self, factor=1):
        self.calls, self.factor = [], factor

    def __call__(self, classifier, images, labels):
        assert classifier.training
        self.calls.append((images.clone(), labels.clone()))
        classifier.eval()
        latents = images.clone().requires_grad_()
        classifier(latents).sum().backward()
        extra = (latents + 0.01 * torch.rand_like(images)).clamp(0, 1)
        return extra.repeat(self.factor, 1, 1, 1), labels.repeat(self.factor)


@pytest.mark.parametrize("factor", [1, 2])
def test_augmentation_starts_after_the_warm_up(factor):
    extra = Recorder(factor)
    images, labels = data = _stripes(32)
    report = fit_classifier(
        _classifier(), data, iterations=10, batch_size=8, augmentation=extra, warmup_fraction=0.35, **QUIET
    )
    assert len(extra.calls) == 6
    assert 0 < report.augmentation_share < 1
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for batch, names in extra.calls:
        assert [known[image.numpy().tobytes()] for image in batch] == names.tolist()


class Kept(TargetedAugmentation):
    """Keeps what it was given and what it gave."""

    def __call__(self, classifier, images, labels):
        made = super().__call__(classifier, images, labels)
        self.kept = [*getattr(self, "kept", []), (self.progress, images.clone(), *(part.clone() for part in made))]
        return made


def _targeted(**options):
    torch.manual_seed(5)
    coder = SmallAutoencoder(1, 4, (8, 16))
    return Kept(coder, **{"latent_std": 1.0, "samples": 8, "steps": 2, "seed": 3} | options)


def _plain_loop(model, images, labels, augmentation, iterations, batch_size, warmup, seed):
    """What a user writes who wants no fit_classifier."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    rate = lambda step: min(1.0, step + 1) * 0.5 * (1 + math.cos(math.pi * step / iterations))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    augmentation.prepare(images.split(10))
    torch.manual_seed(seed)
    model.train()
    for step, draw in zip(range(iterations), batch_order(len(images), batch_size, seed), strict=False):
        x, y = images[draw], labels[draw]
        share = torch.full([len(x)], 1 / len(x))
        if step >= warmup:
            augmentation.set_progress((step - warmup) / (iterations - 1 - warmup))
            more, names = augmentation(model, x, y)
            x, y = torch.cat([x, more]), torch.cat([y, names])
            share = torch.cat([share, torch.full([len(more)], 1 / max(len(more), 1))])
        loss = (nn.functional.cross_entropy(model(x), y, reduction="none") * share).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "options",
    [
        {"radius": (0.2, 1.0), "every": 2, "label_consistency": 0.3},
        {"residual": 0.5, "ratio": 0.5},
        {"direction": "loss"},
        {"direction": "random"},
    ],
)
def test_a_plain_loop_gets_the_same_batches(options):
    images, labels = _stripes(24)
    models, kept = [], []
    for plain in (False, True):
        model, augmentation = _classifier(), _targeted(**options)
        if plain:
            _plain_loop(model, images, labels, augmentation, iterations=7, batch_size=8, warmup=2, seed=4)
        else:
            fit_classifier(
                model,
                (images, labels),
                iterations=7,
                batch_size=8,
                warmup_fraction=2 / 7,
                balanced=False,
                augmentation=augmentation,
                seed=4,
                **QUIET,
            )
        models.append(model)
        kept.append(augmentation.kept)
    assert len(kept[0]) == len(kept[1]) == 5
    for (one, *mine), (other, *yours) in zip(*kept, strict=True):
        assert one == other
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))
    assert [progress for progress, *_ in kept[0]] == [0, 0.25, 0.5, 0.75, 1]
    assert any(len(made) and (made - x[: len(made)]).abs().max() > 0.1 for _, x, made, _ in kept[0])
    assert _same(*models)


def test_the_augmentation_pays_its_own_bill():
    augmentation = _targeted(every=2)
    report = fit_classifier(
        _classifier(), _stripes(24), iterations=6, batch_size=8, warmup_fraction=0, augmentation=augmentation, **QUIET
    )
    assert augmentation.images_made == 3 * 8
    assert 0.5 * report.seconds * report.augmentation_share < augmentation.seconds < report.seconds


def test_rounds_continue_with_the_same_number_of_steps():
    images, labels = data = _stripes(24)
    torch.manual_seed(5)
    coder = SmallAutoencoder(1, 4, (8, 16))
    options = {"iterations": 13, "batch_size": 8, "warmup_fraction": 0.3, "seed": 2, **QUIET}
    own = {"samples": 8, "steps": 2, "radius": 0.7, "latent_std": 1.0, "seed": 2}

    def fit(watch=None):
        model, rounds = _classifier(), OfflineRounds(data, TargetedAugmentation(coder, **own), rounds=3)
        if watch is not None:
            model.register_forward_hook(watch)
        before = torch.get_rng_state()
        report = fit_classifier(model, data, augmentation=rounds, **options)
        assert torch.equal(torch.get_rng_state(), before)
        return model, rounds, report

    steps = []
    fit(lambda m, x, out: steps.append((m.training, len(x[0]))))
    # (a posterior looks once at two images in training mode, to count the dropouts)
    assert [size for training, size in steps if training and size > 2] == [8] * 4 + [16] * 9
    model, rounds, report = fit()
    assert report.iterations == len(report.losses) == 13
    assert 0 < report.augmentation_share < 1
    assert len(rounds.made) == 3
    for (extra,) in rounds.made:
        assert torch.equal(extra.labels, labels)
        assert torch.equal(extra.sources, torch.arange(24))
    first, second = (extra.images for (extra,) in rounds.made[:2])
    assert (first - second).abs().max() > 1e-3
    assert _same(model, fit()[0])
    # the first round is made where the online augmentation would begin
    early = _classifier()
    with pytest.raises(KeyboardInterrupt):
        fit_classifier(early, data, **options, augmentation=_interrupt)
    by_hand, _ = TargetedAugmentation(coder, **own)(early, images[:16], labels[:16])
    assert torch.equal(first[:16], by_hand)


def _interrupt(classifier, images, labels):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds: got 0"),
        ({"rounds": 4}, "rounds: got 4, wanted at most the 3 steps after the warm-up"),
        ({"radius": 0.0}, "radius: got 0.0"),
        ({"objective": "bald"}, "objective: got 'bald'"),
        ({"masks": "none"}, "masks: got 'none'"),
        ({"samples": 0}, "samples: got 0"),
        ({"latent_std": -1.0}, "latent_std: got -1.0"),
        ({"autoencoder": SmallAutoencoder(3)}, "autoencoder: failed on images"),
        ({"autoencoder": None}, "autoencoder: got NoneType"),
        ({"classifier": nn.Sequential(nn.Flatten(), nn.Linear(256, 2))}, "no active dropout"),
        ({"task": "ranking"}, "task: got 'ranking'"),
    ],
)
def test_rounds_refuse_bad_input_before_training(options, message):
    given = {"classifier": _classifier(), "autoencoder": SmallAutoencoder(1, 4, (8, 16)), "latent_std": 1.0} | options
    model = given.pop("classifier")
    before = [weight.clone() for weight in model.state_dict().values()]

    def train():
        rounds = {name: given.pop(name) for name in ("rounds",) if name in given}
        targeted = TargetedAugmentation(given.pop("autoencoder"), **given)
        growing = OfflineRounds((IMAGES, LABELS), targeted, **rounds)
        fit_classifier(model, (IMAGES, LABELS), iterations=5, batch_size=4, augmentation=growing, **QUIET)

    with pytest.raises(InputError, match=message):
        train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_augmentation_without_weight_or_images_changes_the_loss_as_it_should():
    data = _stripes(32)
    options = {"iterations": 1, "batch_size": 8, "warmup_fraction": 0.0, **QUIET}

    losses = []
    for more in (
        {},
        {"augmentation": lambda c, x, y: (x, y), "augmentation_weight": 0.5},
        {"augmentation": lambda c, x, y: (x, y), "augmentation_weight": 0.0},
        {"augmentation": lambda c, x, y: (x[:0], y[:0])},
    ):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))  # neither batch norm nor dropout
        losses.append(fit_classifier(model, data, **options, **more).losses[0])
    assert losses[1:] == pytest.approx([1.5 * losses[0], losses[0], losses[0]], rel=1e-5)


def test_balanced_loss_lets_a_rare_class_be_seen():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(124) < 4).long()
    images = torch.rand(124, 1, 4, 4, generator=generator) * 0.8 + 0.1 * labels.view(-1, 1, 1, 1)
    chance = []
    for balanced in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        options = {"iterations": 100, "batch_size": 31, "learning_rate": 3e-2, "balanced": balanced}
        fit_classifier(model, (images, labels), **options, **QUIET)
        with torch.no_grad():
            chance.append(model(images).softmax(1)[:, 1].mean().item())
    assert chance[0] > chance[1] + 0.1


def test_multilabel():
    images, labels = _stripes(64)
    truth = torch.stack([labels == 0, labels == 1, labels >= 0], 1).float()
    model = _classifier(classes=3)
    report = fit_classifier(
        model,
        (images, truth),
        task="multilabel",
        iterations=60,
        batch_size=16,
        learning_rate=1e-2,
        val=(images, truth),
        **QUIET,
    )
    assert report.validation["balanced_accuracy"] > 0.95
    assert report.losses[-1] < report.losses[0]


def test_bfloat16_trains():
    report = fit_classifier(_classifier(), _stripes(32), iterations=30, batch_size=16, precision="bfloat16", **QUIET)
    assert report.losses[-1] < report.losses[0]
    coder = SmallAutoencoder(1, 4, (8, 16))
    report = fit_autoencoder(coder, _stripes(32)[0], iterations=10, precision="bfloat16", **QUIET)
    assert coder.latent_std.dtype == torch.float32
    assert report.losses[-1] < report.losses[0]


def test_a_loss_that_is_not_finite_is_told_and_the_weights_before_it_stay():
    model = _classifier()
    before = model.state_dict()["head.weight"].clone()
    bad = lambda classifier, images, labels: (images * math.inf, labels)  # noqa: E731
    with pytest.raises(InputError, match="loss: got nan at iteration 0"):
        fit_classifier(model, _stripes(16), iterations=3, augmentation=bad, warmup_fraction=0, **QUIET)
    assert torch.equal(model.state_dict()["head.weight"], before)


def test_interruption_leaves_things_in_order():
    model = _classifier()
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit_classifier(model, _stripes(16), iterations=4, augmentation=_interrupt, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ((IMAGES[:0], LABELS[:0]), {}, "data: holds no images"),
        ((IMAGES[:1], LABELS[:1]), {}, "data: holds 1 image"),
        ((IMAGES, LABELS + 1), {}, "the classifier gives 2 logits"),
        (IMAGES, {}, "no labels"),
        ((IMAGES, LABELS), {"iterations": -1}, "iterations: got -1"),
        ((IMAGES, LABELS), {"iterations": 2.5}, "iterations: got 2.5"),
        ((IMAGES, LABELS), {"batch_size": 1}, "batch_size: got 1"),
        ((IMAGES, LABELS), {"seed": -1}, "seed: got -1"),
        ((IMAGES, LABELS), {"learning_rate": 0}, "learning_rate: got 0"),
        ((IMAGES, LABELS), {"learning_rate": math.nan}, "learning_rate: got nan"),
        ((IMAGES, LABELS), {"weight_decay": "much"}, "weight_decay: got 'much'"),
        ((IMAGES, LABELS), {"augmentation_weight": -1}, "augmentation_weight: got -1"),
        ((IMAGES, LABELS), {"warmup_fraction": 1.5}, "warmup_fraction: got 1.5"),
        ((IMAGES, LABELS), {"precision": "float16"}, "precision: got 'float16'"),
        ((IMAGES, LABELS), {"task": "ranking"}, "task: got 'ranking'"),
        (
            (IMAGES, LABELS),
            {"augmentation": lambda c, x, y: (x[..., :4], y), "warmup_fraction": 0},
            "augmentation",
        ),
        (
            (IMAGES, LABELS),
            {"augmentation": lambda c, x, y: (x, y[:1]), "warmup_fraction": 0},
            "with 1 labels",
        ),
    ],
)
def test_bad_input_is_refused_by_name(data, options, message):
    with pytest.raises(InputError, match=message):
        fit_classifier(_classifier(), data, **({"iterations": 2, "batch_size": 4} | options), **QUIET)


def test_bad_models_are_refused():
    with pytest.raises(InputError, match=r"classifier: one image gave logits \[1, 1, 16, 16\]"):
        fit_classifier(nn.Conv2d(1, 1, 1), (IMAGES, LABELS), **QUIET)
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        fit_classifier(_classifier().requires_grad_(False), (IMAGES, LABELS), **QUIET)
    with pytest.raises(InputError, match="autoencoder: failed on images"):
        fit_autoencoder(SmallAutoencoder(3), IMAGES, **QUIET)
    with pytest.raises(InputError, match="images: holds no images"):
        fit_autoencoder(SmallAutoencoder(), IMAGES[:0], **QUIET)


_WORKER = """
import hashlib, os, sys, torch
from pathlib import Path
from tsynd.models.networks import SmallAutoencoder, SmallResNet
from tsynd.training.autoencoder import fit_autoencoder
from tsynd.training.classifier import fit_classifier

images, labels = torch.load(sys.argv[1], weights_only=True)
torch.manual_seed(0)
model, coder = SmallResNet(widths=(8, 16)), SmallAutoencoder(widths=(8, 16))
options = {"iterations": 6, "batch_size": 8, "device": "cpu", "progress": False}
extra = lambda classifier, x, y: (x.flip(-1), y)
fit_classifier(model, (images, labels), augmentation=extra, **options)
fit_autoencoder(coder, images, **options)
state = list(model.state_dict().values()) + list(coder.state_dict().values())
digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state)).hexdigest()
Path(sys.argv[1]).with_name("state" + os.environ["RANK"]).write_text(digest)
# a rank that leaves while the other still talks to it can abort gloo's threads
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_end_with_the_same_models(tmp_path):
    (tmp_path / "worker.py").write_text(_WORKER)
    torch.save(_stripes(24), tmp_path / "data.pt")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(tmp_path / "worker.py"), str(tmp_path / "data.pt")),
        ],
        env=os.environ
        | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "state0").read_text() == (tmp_path / "state1").read_text()


def test_real_images_are_learned():
    folder = Path(os.environ.get("TSYND_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (folder / "pneumoniamnist.npz").is_file():
        pytest.skip("pneumoniamnist.npz not found; name its folder in TSYND_TEST_DATA")
    with np.load(folder / "pneumoniamnist.npz", allow_pickle=False) as file:
        part = {
            name: (
                torch.from_numpy(file[f"{name}_images"])[:, None],
                torch.from_numpy(file[f"{name}_labels"])[:, 0],
            )
            for name in ("train", "val")
        }
    few = tuple(item[:200] for item in part["train"])
    torch.manual_seed(0)
    report = fit_classifier(SmallResNet(), few, iterations=100, batch_size=32, val=part["val"], **QUIET)
    assert report.validation["balanced_accuracy"] > 0.8
    assert report.validation["auroc"] > 0.9
    torch.manual_seed(0)
    coder = SmallAutoencoder(1)
    fit_autoencoder(coder, few, iterations=150, **QUIET)
    held_out = part["val"][0][:100].float() / 255
    with torch.no_grad():
        assert (coder(held_out) - held_out).square().mean() < 0.2 * held_out.var()
