"""Expected information about target images in ``synthesize``, ``uncertainty`` and the exported files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tsynd

OPTIONS: dict[str, Any] = {"samples": 8, "latent_std": 0.4, "progress": False}


@pytest.fixture
def targets() -> Tensor:
    return torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(9))


def by_sums(logits: Tensor, aims: Tensor, task: str = "multiclass") -> Tensor:
    """EPIG [B] of logits [T, B, C] about [T, M, C], as the double sum over classes of both in float64."""
    p, q = logits.double(), aims.double()
    if task == "multilabel":
        p, q = torch.stack([p.sigmoid(), 1 - p.sigmoid()], -1), torch.stack([q.sigmoid(), 1 - q.sigmoid()], -1)
        parts = [(p[:, :, k], q[:, :, k]) for k in range(p.shape[2])]
    else:
        parts = [(p.softmax(-1), q.softmax(-1))]
    value = torch.zeros(logits.shape[1], dtype=torch.float64)
    for a, b in parts:
        for m in range(b.shape[1]):
            joint = torch.stack([torch.outer(a[t, i], b[t, m]) for i in range(a.shape[1]) for t in range(len(a))])
            joint = joint.reshape(a.shape[1], len(a), *joint.shape[1:]).mean(1)
            apart = a.mean(0)[:, :, None] * b[:, m].mean(0)[None, None]
            value += (joint * (joint / apart).log()).sum((1, 2)) / b.shape[1]
    return value


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("early", [False, True])
def test_it_is_climbed(autoencoder: nn.Module, images: Tensor, targets: Tensor, task: str, early: bool) -> None:
    torch.manual_seed(2)
    classifier = TinyClassifier(early=early)
    options = {**OPTIONS, "task": task, "objective": "expected_information"}
    result = tsynd.synthesize(autoencoder, classifier, images, targets=targets, **options)
    assert (result.status == tsynd.Status.RAISED).float().mean() > 0.8
    posterior = tsynd.MCDropout(classifier, 8)
    with torch.no_grad(), posterior.frozen():
        wanted = by_sums(posterior.logits(result.images), posterior.logits(targets), task)
        information = posterior.uncertainty(result.images, task=task)
    torch.testing.assert_close(result.uncertainty.double(), wanted, rtol=1e-3, atol=1e-6)
    assert (result.uncertainty <= information + 1e-5).all()
    del options["latent_std"], options["progress"]
    again = tsynd.uncertainty(classifier, result.images, targets=targets, **options)
    torch.testing.assert_close(again.double(), wanted, rtol=1e-3, atol=1e-6)
    # what climbs the mutual information tells less about the targets
    plain = tsynd.synthesize(autoencoder, classifier, images, **{**OPTIONS, "task": task})
    other = tsynd.uncertainty(classifier, plain.images, targets=targets, **options)
    assert other.mean() < result.uncertainty.mean()


def test_targets_of_every_kind(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, targets: Tensor) -> None:
    options = {**OPTIONS, "objective": "expected_information", "steps": 2}
    eight_bit = (targets * 255).round().to(torch.uint8)
    wanted = tsynd.synthesize(autoencoder, classifier, images, targets=eight_bit, **options)
    pixels, labels = eight_bit.float() / 255, torch.arange(5)
    for given in (
        pixels.numpy(),
        tsynd.LabelledImages(eight_bit, labels),
        TensorDataset(pixels, labels),
        DataLoader(TensorDataset(pixels), batch_size=2),
    ):
        same = tsynd.synthesize(autoencoder, classifier, images, targets=given, **options)
        assert torch.equal(same.images, wanted.images)
    for size in (1, 7):
        part = tsynd.synthesize(autoencoder, classifier, images, targets=eight_bit, batch_size=size, **options)
        torch.testing.assert_close(part.images, wanted.images, rtol=0, atol=1e-5)
    other = tsynd.synthesize(autoencoder, classifier, images, targets=eight_bit[:1], **options)
    assert (other.images - wanted.images).abs().max() > 1e-3
    ensemble = tsynd.Ensemble([TinyClassifier(), TinyClassifier(), TinyClassifier()])
    made = tsynd.synthesize(autoencoder, ensemble, images, targets=targets, **options)
    assert (made.status == tsynd.Status.RAISED).float().mean() > 0.8


def test_what_is_refused(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, targets: Tensor) -> None:
    def run(model: Any = classifier, **options: Any) -> None:
        tsynd.synthesize(autoencoder, model, images, **OPTIONS, **options)

    aims: dict[str, Any] = {"objective": "expected_information", "targets": targets}
    with pytest.raises(tsynd.InputError, match="targets: got none with objective"):
        run(objective="expected_information")
    with pytest.raises(tsynd.InputError, match="targets: got images with objective 'entropy'"):
        run(**aims | {"objective": "entropy"})
    for model, masks in ((classifier, "independent"), (tsynd.MCDropout(classifier, 4, "independent"), "shared")):
        with pytest.raises(tsynd.InputError, match="objective: got 'expected_information' with masks 'independent'"):
            run(model, **aims, masks=masks)
    with pytest.raises(tsynd.InputError, match=r"targets: images of shape \[1, 8, 8\], wanted \[1, 12, 12\]"):
        run(**aims | {"targets": targets[..., :8, :8]})
    with pytest.raises(tsynd.InputError, match="targets: values from"):
        run(**aims | {"targets": targets * 255})
    with pytest.raises(tsynd.InputError, match="targets: got none"):
        tsynd.uncertainty(classifier, images, objective="expected_information")
