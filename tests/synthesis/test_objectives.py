"""Goals of an ascent: the label's loss, typicality and diversity."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import TinyClassifier
from helpers import STD, sharp, targeted
from torch import Tensor, nn
from torch.nn import functional

from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.synthesis.ascent import AscentSettings, Status, ascend_latents
from tsynd.synthesis.joint_information import group_size, joint_mutual_information, redundancy
from tsynd.synthesis.latent_prior import fit_latent_prior
from tsynd.synthesis.objectives import LabelLoss, PlausibleGoal, Uncertainty
from tsynd.utils.errors import InputError


@pytest.fixture
def classifier(images: Tensor) -> TinyClassifier:
    return sharp(images)


@pytest.fixture
def labels(images: Tensor) -> Tensor:
    return torch.arange(len(images)) % 3


def test_label_loss_is_the_cross_entropy_of_the_mean_prediction(classifier: nn.Module, images: Tensor) -> None:
    ids, labels = torch.arange(len(images)), torch.arange(len(images)) % 3
    posterior = MCDropout(classifier, 8)
    with torch.no_grad():
        p = posterior.logits(images, ids).softmax(-1).mean(0)
        value, climbed = LabelLoss(posterior, labels, "multiclass")(images, ids)
        assert p[ids, labels].min() < 0.2
        torch.testing.assert_close(value, -p[ids, labels].log())
        assert torch.equal(value, climbed)
        truth = functional.one_hot(labels, 3).float()
        p = posterior.logits(images, ids).sigmoid().mean(0)
        value = LabelLoss(posterior, truth, "multilabel")(images, ids)[0]
        torch.testing.assert_close(value, functional.binary_cross_entropy(p, truth, reduction="none").sum(1))


# --- typicality


def test_the_prior_is_the_gaussian_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    latents = torch.randn(200, 3, 4, generator=generator).flatten(1) @ mixing + 5
    prior = fit_latent_prior(latents.reshape(-1, 3, 4).split(64), rank=4, shrinkage=0.2)
    v = prior.directions.double()
    torch.testing.assert_close(v @ v.t(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)
    covariance = prior.rest * (torch.eye(12, dtype=torch.float64) - v.t() @ v)
    covariance += v.t() @ prior.variances.double().diag() @ v
    centred = latents.double() - latents.double().mean(0)
    wanted = ((centred @ torch.linalg.inv(covariance)) * centred).sum(1) / 12
    distance = prior.distance(latents.reshape(-1, 3, 4))
    torch.testing.assert_close(distance.double(), wanted, rtol=1e-4, atol=1e-5)
    # without shrinkage the fitted variances are the sample's own, so the mean distance is (N - 1) / N
    plain = fit_latent_prior([latents], rank=11, shrinkage=0.0)
    assert float(plain.distance(latents).mean()) == pytest.approx(199 / 200, rel=1e-3)
    round_one = fit_latent_prior([latents], rank=3, shrinkage=1.0)
    spread = float(centred.square().sum() / 199 / 12)
    torch.testing.assert_close(round_one.variances, torch.full((3,), spread))
    assert round_one.rest == pytest.approx(spread)


def test_the_penalty_is_on_what_the_ascent_adds() -> None:
    latents = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    prior = fit_latent_prior([latents], rank=2)
    away = latents + (latents - prior.mean)
    assert float(prior.excess(latents, latents).abs().max()) == 0
    torch.testing.assert_close(prior.excess(away, latents), 1.5 * prior.distance(latents))
    assert float(prior.excess(prior.mean.expand_as(latents), latents).max()) == 0


def test_few_or_equal_latents_give_a_usable_prior_or_a_clear_refusal() -> None:
    two = fit_latent_prior([torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 2.0]])], shrinkage=0.0)
    assert bool(two.distance(torch.rand(5, 3)).isfinite().all())
    with pytest.raises(InputError, match="latents: got 1 images"):
        fit_latent_prior([torch.rand(1, 3)])
    with pytest.raises(InputError, match="latents: got 0 images"):
        fit_latent_prior([])
    with pytest.raises(InputError, match="latents: their variance is 0"):
        fit_latent_prior([torch.ones(4, 3)])
    with pytest.raises(InputError, match="rank: got 3, wanted an integer from 0 to 2"):
        fit_latent_prior([torch.rand(9, 3)], rank=3)
    with pytest.raises(InputError, match="shrinkage: got -1"):
        fit_latent_prior([torch.rand(9, 3)], shrinkage=-1)


def test_typicality_keeps_latents_plausible_and_the_trajectory_plain(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with torch.no_grad():
        source = autoencoder.encode(images)
    prior = fit_latent_prior([source], rank=5)
    posterior, ids, settings = MCDropout(classifier, 8), torch.arange(len(images)), AscentSettings(steps=4)
    distance, plain = {}, {}
    with posterior.frozen():
        for weight in (0.0, 0.02, 1e4):
            goal = PlausibleGoal(Uncertainty(posterior, "mutual_information", "multiclass"), source, prior, weight)
            climbed = ascend_latents(posterior, autoencoder.decode, source, ids, settings, STD, labels, goal)
            distance[weight] = float(prior.excess(climbed.latents, source).mean())
            plain[weight] = climbed
            with torch.no_grad():
                value = posterior.uncertainty(climbed.images, ids)
            torch.testing.assert_close(climbed.uncertainty, value, rtol=1e-4, atol=1e-6)
            moved = (climbed.latents != source).flatten(1).any(1)
            assert torch.equal(moved, climbed.status == Status.RAISED)
            assert bool(moved.all()) == (weight < 1)
    assert distance[0.0] > 2 * distance[0.02] > 0
    assert distance[1e4] < 1e-3 * distance[0.0]  # so heavy that hardly a step is worth it
    assert torch.equal(plain[0.0].trajectory[0], plain[0.02].trajectory[0])
    default = ascend_latents(posterior, autoencoder.decode, source, ids, settings, STD)
    assert torch.equal(default.images, plain[0.0].images)


def test_prepare_fits_once_and_is_needed(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor
) -> None:
    augmentation = targeted(autoencoder, typicality=1.0)
    with pytest.raises(InputError, match=r"typicality: .* wanted prepare"):
        augmentation(classifier, images, labels)
    augmentation.prepare(images.split(10))
    prior = augmentation.prior
    assert prior is not None
    with torch.no_grad():
        torch.testing.assert_close(prior.mean, autoencoder.encode(images).flatten(1).mean(0), rtol=1e-4, atol=1e-5)
    augmentation.prepare([images + math.nan])
    assert augmentation.prior is prior
    held, free = augmentation(classifier, images, labels)[0], targeted(autoencoder)(classifier, images, labels)[0]
    assert (held - free).abs().max() > 1e-3
    without = targeted(autoencoder)
    without.prepare(iter([None]))  # type: ignore[list-item]
    assert without.prior is None


# --- diversity


def brute_force(p: Tensor) -> float:
    """I(y_1..y_m; t) from probabilities [T, m, K] in float64, configuration by configuration."""
    samples, count, classes = p.shape
    total = 0.0
    for configuration in itertools.product(range(classes), repeat=count):
        each = torch.stack([p[:, place, name] for place, name in enumerate(configuration)]).prod(0)
        for q in each.tolist():
            if q > 0:
                total += q * math.log(q / float(each.mean())) / samples
    return total


@pytest.mark.parametrize(("count", "classes"), [(1, 3), (2, 2), (2, 4), (3, 3)])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_joint_information_equals_enumeration(count: int, classes: int, scale: float) -> None:
    logits = torch.randn(6, 2, count, classes, generator=torch.Generator().manual_seed(count + classes)) * scale
    joint = joint_mutual_information(logits)
    wanted = [brute_force(logits[:, g].double().softmax(-1)) for g in range(2)]
    assert joint.tolist() == pytest.approx(wanted, rel=2e-3, abs=1e-7)
    labels = joint_mutual_information(logits, "multilabel")
    p = torch.stack([logits.double().sigmoid(), (-logits.double()).sigmoid()], -1)
    wanted = [sum(brute_force(p[:, g, :, k]) for k in range(classes)) for g in range(2)]
    assert labels.tolist() == pytest.approx(wanted, rel=2e-3, abs=1e-7)


def test_joint_information_has_the_right_gradient() -> None:
    logits = torch.randn(5, 1, 2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(joint_mutual_information(logits).sum(), logits)
    slow = logits.detach().double().requires_grad_()
    p = slow.softmax(-1)[:, 0]
    joint = (p[:, 0, :, None] * p[:, 1, None, :]).flatten(1)
    value = (joint * (joint.log() - joint.mean(0).log())).sum(1).mean()
    (wanted,) = torch.autograd.grad(value, slow)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)


def test_redundancy_knows_twins_strangers_and_broken_images() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([4.0, -4.0]).repeat(8)  # 16 samples, half of them sure of either class
    twin = torch.stack([half, -half], -1)[:, None]
    apart = torch.tensor([4.0, 4.0, -4.0, -4.0]).repeat(4)  # independent of the first over the samples
    stranger = torch.stack([apart, -apart], -1)[:, None]
    alone = float(joint_mutual_information(twin[:, None]))
    assert float(redundancy(torch.cat([twin, stranger], 1))) == pytest.approx(0, abs=1e-5)
    assert float(redundancy(torch.cat([twin, twin], 1))) == pytest.approx(alone, rel=0.02)
    # 19 images are groups of 8, 8 and 3
    batch = torch.randn(16, 19, 2, generator=generator)
    mutual = sum(float(joint_mutual_information(batch[:, None, i])) for i in torch.arange(19).reshape(-1, 1))
    joint = sum(float(joint_mutual_information(batch[:, None, part])) for part in torch.arange(19).split(8))
    assert float(redundancy(batch)) == pytest.approx(mutual - joint, rel=1e-4)
    assert mutual - joint > 0.1
    broken = batch.clone()
    broken[:, 2] = math.nan
    rest = batch.clone()
    rest[:, 2] = 0
    leaf = broken.requires_grad_()
    value = redundancy(leaf)
    assert value.item() == pytest.approx(float(redundancy(rest)), rel=1e-5)
    gradient = torch.autograd.grad(value, leaf)[0]
    assert bool(gradient[:, torch.arange(19) != 2].isfinite().all())


def test_groups_are_as_large_as_can_be_enumerated() -> None:
    assert [group_size(classes) for classes in (2, 3, 4, 16, 17)] == [8, 5, 4, 2, 1]
    with pytest.raises(InputError, match=r"diversity: .* 17 classes, wanted at most 16"):
        redundancy(torch.zeros(4, 6, 17))


def test_diversity_raises_the_joint_information(autoencoder: nn.Module, images: Tensor) -> None:
    classifier = sharp(images, 2)
    posterior, labels = MCDropout(classifier, 8), torch.zeros(16, dtype=torch.int64)
    joint, alone = [], []
    for diversity in (0.0, 1.0):
        augmentation = targeted(autoencoder, diversity=diversity, steps=8, radius=1.0)
        made, _ = augmentation(classifier, images[:16], labels)
        with torch.no_grad():
            logits = posterior.logits(made)
        groups = logits.reshape(8, 2, 8, 2)
        joint.append(float(joint_mutual_information(groups).sum()))
        alone.append(float(posterior.uncertainty(made).sum().detach()))
    assert joint[1] > joint[0] + 0.02
    assert alone[1] < alone[0]
