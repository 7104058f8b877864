"""Goals of an ascent: the label's loss and typicality."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyClassifier
from helpers import STD, sharp, targeted
from torch import Tensor, nn
from torch.nn import functional

import tsynd
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.synthesis.ascent import AscentSettings, Status, ascend_latents
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
        value = LabelLoss(posterior, labels, "multiclass")(images, ids)
        assert p[ids, labels].min() < 0.2
        torch.testing.assert_close(value, -p[ids, labels].log())
        truth = functional.one_hot(labels, 3).float()
        p = posterior.logits(images, ids).sigmoid().mean(0)
        value = LabelLoss(posterior, truth, "multilabel")(images, ids)
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


# --- expected information


def test_synthesis_climbs_what_an_image_tells_about_targets(autoencoder: nn.Module, images: Tensor) -> None:
    classifier = sharp(images)
    targets = (images[:4] * 255).round().byte()  # as they lie in files
    options: dict[str, Any] = {"objective": "expected_information", "targets": targets, "samples": 8}
    result = tsynd.synthesize(autoencoder, classifier, images, latent_std=STD, progress=False, **options)
    assert (result.uncertainty >= result.initial_uncertainty).all()
    assert float(result.uncertainty.mean()) > 1.05 * float(result.initial_uncertainty.mean())
    # the same by the operator on plain logits
    posterior = MCDropout(classifier, 8)
    with torch.no_grad():
        logits, aims = posterior.logits(result.images), posterior.logits(targets.float() / 255)
    wanted, _ = tsynd.ops.expected_information(logits, aims)
    torch.testing.assert_close(result.uncertainty, wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(tsynd.uncertainty(classifier, result.images, **options), wanted, rtol=1e-3, atol=1e-6)
    # in batches of another size the same images
    again = tsynd.synthesize(
        autoencoder, classifier, images, latent_std=STD, progress=False, batch_size=16, checkpointing=True, **options
    )
    torch.testing.assert_close(again.images, result.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "expected_information"}, "targets: got none with objective 'expected_information'"),
        ({"targets": torch.rand(2, 1, 12, 12)}, "targets: got images with objective 'mutual_information'"),
        ({"objective": "expected_information", "masks": "independent"}, "wanted 'shared' masks"),
        ({"objective": "expected_information", "targets": torch.rand(2, 1, 12)}, "targets: "),
    ],
)
def test_expected_information_asks_for_targets(
    autoencoder: nn.Module, images: Tensor, options: dict[str, Any], words: str
) -> None:
    classifier = sharp(images)
    with pytest.raises(InputError, match=words):
        tsynd.synthesize(autoencoder, classifier, images, latent_std=STD, progress=False, **options)


def test_expected_information_is_not_exported(autoencoder: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="objective: got 'expected_information'"):
        tsynd.export_torchscript(
            sharp(images),
            autoencoder,
            tmp_path / "a.pt",
            image_shape=images.shape[1:],
            objective="expected_information",
            latent_std=STD,
        )
    assert not (tmp_path / "a.pt").exists()
