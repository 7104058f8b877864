"""Measures that an ascent climbs: the label's loss and the expected information."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyClassifier
from helpers import STD, sharp
from torch import Tensor, nn
from torch.nn import functional

import tsynd
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.synthesis.objectives import LabelLoss
from tsynd.utils.errors import InputError


@pytest.fixture
def classifier(images: Tensor) -> TinyClassifier:
    return sharp(images)


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
            autoencoder,
            sharp(images),
            tmp_path / "a.pt",
            image_shape=images.shape[1:],
            objective="expected_information",
            latent_std=STD,
        )
    assert not (tmp_path / "a.pt").exists()
