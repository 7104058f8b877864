"""Several images of a source, as many of each class as asked for, and a start from noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyClassifier
from torch import Tensor, nn

import tsynd

QUIET: dict[str, Any] = {"progress": False, "samples": 8, "steps": 3, "latent_std": 0.4}


@pytest.fixture
def labels(images: Tensor) -> Tensor:
    """Classes of 14, 7 and 2 images."""
    return torch.tensor([0] * 14 + [1] * 7 + [2] * 2)[torch.randperm(23, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_variants_differ(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor, masks: str
) -> None:
    options = {**QUIET, "masks": masks}
    one = tsynd.synthesize(autoencoder, classifier, images, labels, **options)
    many = tsynd.synthesize(autoencoder, classifier, images, labels, variants=3, **options)
    assert len(many) == 3 * len(images)
    assert many.sample_ids.tolist() == 3 * list(range(23))
    assert torch.equal(many.labels, labels.repeat(3))
    assert torch.equal(many[:23].images, one.images)
    rounds = many.images.reshape(3, 23, -1)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert ((rounds[first] - rounds[second]).abs().amax(1) > 1e-3).float().mean() > 0.9
    assert torch.equal(many.source_latents[:23], many.source_latents[46:])
    again = tsynd.synthesize(autoencoder, classifier, images, labels, variants=3, batch_size=7, **options)
    torch.testing.assert_close(again.images, many.images, rtol=0, atol=1e-5)


def test_variants_of_a_posterior_of_ones_own(autoencoder: nn.Module, images: Tensor) -> None:
    """Its samples stay, so that the starts alone tell the variants apart."""
    ensemble = tsynd.Ensemble([TinyClassifier(), TinyClassifier()])
    made = tsynd.synthesize(autoencoder, ensemble, images, variants=2, **QUIET)
    assert ((made.images[:23] - made.images[23:]).flatten(1).abs().amax(1) > 1e-3).float().mean() > 0.9
    assert torch.equal(made.initial_uncertainty[:23], made.initial_uncertainty[23:])


@pytest.mark.parametrize("rule", ["l2", "linf"])
def test_a_start_from_noise(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, rule: str) -> None:
    options = {**QUIET, "rule": rule}
    plain = tsynd.synthesize(autoencoder, classifier, images, **options)
    noisy = tsynd.synthesize(autoencoder, classifier, images, start="noise", **options)
    assert torch.equal(noisy.initial_uncertainty, plain.initial_uncertainty)  # the reconstruction comes first
    assert ((noisy.images - plain.images).flatten(1).abs().amax(1) > 1e-3).float().mean() > 0.9
    offset = (noisy.latents - noisy.source_latents).flatten(1)
    length = offset.norm(dim=1) if rule == "l2" else offset.abs().amax(1)
    assert (length <= 0.5 * 0.4 * (offset.shape[1] ** 0.5 if rule == "l2" else 1) * (1 + 1e-4)).all()
    # with all but one step spent on the way, the second iterate is the random point itself, half way out
    short = tsynd.synthesize(
        autoencoder, classifier, images, start="noise", **options | {"steps": 2, "step_size": 1e-9}
    )
    moved = (short.latents - short.source_latents).flatten(1)[short.status == tsynd.Status.RAISED]
    assert len(moved) > 3
    reach = moved.norm(dim=1) / offset.shape[1] ** 0.5 if rule == "l2" else moved.abs().amax(1)
    torch.testing.assert_close(reach, torch.full_like(reach, 0.1), rtol=1e-3, atol=0)
    order, options = torch.arange(22, -1, -1), {**QUIET, "rule": rule}
    turned = tsynd.synthesize(autoencoder, classifier, images[order], start="noise", sample_ids=order, **options)
    torch.testing.assert_close(turned.images[order], noisy.images, rtol=0, atol=1e-5)


def test_as_many_of_each_class(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
    plain = tsynd.synthesize(autoencoder, classifier, images, labels, **QUIET)
    made = tsynd.synthesize(autoencoder, classifier, images, labels, balance=True, **QUIET)
    assert made.labels.bincount().tolist() == [14, 14, 14]
    torch.testing.assert_close(made.images[:23], plain.images, rtol=0, atol=1e-5)
    rare = made[made.labels == 2]
    assert rare.sample_ids.bincount(minlength=23)[labels == 2].tolist() == [7, 7]
    assert len({tuple(image.flatten().tolist()) for image in rare.images}) == 14
    twice = tsynd.synthesize(autoencoder, classifier, images, labels, balance=True, variants=2, **QUIET)
    assert twice.labels.bincount().tolist() == [28, 28, 28]
    chosen = tsynd.synthesize(autoencoder, classifier, images, labels, per_class={0: 3, 2: 5}, **QUIET)
    assert chosen.labels.bincount(minlength=3).tolist() == [3, 0, 5]
    zeros, twos = (labels == 0).nonzero()[:3, 0], (labels == 2).nonzero()[:, 0]
    assert sorted(chosen.sample_ids.tolist()) == sorted([*zeros.tolist(), *twos.tolist() * 2, int(twos[0])])
    from_data = tsynd.LabelledImages(images, labels)
    assert torch.equal(
        tsynd.synthesize(autoencoder, classifier, from_data, per_class={0: 3, 2: 5}, **QUIET).images, chosen.images
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"variants": 0}, "variants: got 0"),
    ({"start": "far"}, "start: got 'far'"),
    ({"start": "noise", "steps": 1}, "steps: got 1 with a start from noise"),
    ({"per_class": {0: 2}, "balance": True}, "per_class: got numbers with balance or variants"),
    ({"per_class": {0: 2}, "variants": 2}, "per_class: got numbers with balance or variants"),
    ({"per_class": {0: -1}}, "per_class: got 0: -1"),
    ({"per_class": {7: 1}}, "per_class: got class 7, wanted 0 to 2"),
    ({"per_class": {0: 0}}, "per_class: got numbers that sum to 0"),
    ({"balance": True, "task": "multilabel"}, "per_class, balance: got task 'multilabel'"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_refused(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(tsynd.InputError, match=words):
        tsynd.synthesize(autoencoder, classifier, images, labels, **QUIET | change)


def test_classes_without_sources(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(tsynd.InputError, match="has images but no labels"):
        tsynd.synthesize(autoencoder, classifier, images, balance=True, **QUIET)
    few = torch.where(labels == 1, 0, labels)
    with pytest.raises(tsynd.InputError, match="got 2 images of class 1, of which there is no source"):
        tsynd.synthesize(autoencoder, classifier, images, few, per_class={1: 2}, **QUIET)
    made = tsynd.synthesize(autoencoder, classifier, images, few, balance=True, **QUIET)
    assert made.labels.bincount(minlength=3).tolist() == [21, 0, 21]
