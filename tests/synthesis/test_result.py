"""A result is a data set: items, parts, joined; and what a notebook shows of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tsynd
from tsynd.synthesis.result import load_result

QUIET: dict[str, Any] = {"progress": False, "samples": 8, "steps": 2, "latent_std": 0.4}


@pytest.fixture
def result(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> tsynd.SynthesisResult:
    labels = torch.arange(len(images)) % 3
    return tsynd.synthesize(autoencoder, classifier, images, labels, label_consistency=1e-3, **QUIET)


def test_items_and_parts(result: tsynd.SynthesisResult, tmp_path: Path) -> None:
    assert len(result) == 23
    image, label = result[4]
    assert torch.equal(image, result.images[4])
    assert int(label) == 1
    assert torch.equal(result[-1][0], result.images[22])
    assert torch.equal(result[result.gain.argmax()][0], result.images[int(result.gain.argmax())])
    with pytest.raises(IndexError):
        result[23]
    pairs = list(result)
    assert [int(label) for _, label in pairs] == result.labels.tolist()
    images, labels = next(iter(DataLoader(result, batch_size=9)))
    assert torch.equal(images, result.images[:9])
    assert torch.equal(labels, result.labels[:9])
    mask = result.gain > result.gain.median()
    for part, wanted in (
        (result[3:7], [3, 4, 5, 6]),
        (result[[5, 1]], [5, 1]),
        (result[torch.tensor([5, 1])], [5, 1]),
        (result[mask], mask.nonzero()[:, 0].tolist()),
        (result[[]], []),
        (result[mask.tolist()], mask.nonzero()[:, 0].tolist()),
    ):
        assert isinstance(part, tsynd.SynthesisResult)
        assert part.sample_ids.tolist() == wanted
        assert torch.equal(part.images, result.images[wanted])
        assert torch.equal(part.trajectory, result.trajectory[wanted])
    saved = load_result(result[mask].save(tmp_path / "part.npz"))
    assert saved.sample_ids.tolist() == mask.nonzero()[:, 0].tolist()
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.int64), [0.5]):
        with pytest.raises(tsynd.InputError, match="index: "):
            result[bad]


def test_joined_and_measured(result: tsynd.SynthesisResult, autoencoder: nn.Module) -> None:
    joined = result[:5] + result[5:]
    for name in ("images", "labels", "latents", "uncertainty", "status", "sample_ids"):
        assert torch.equal(getattr(joined, name), getattr(result, name))
    torch.testing.assert_close(result.gain, result.uncertainty - result.initial_uncertainty)
    moved = (result.latents - result.source_latents).flatten(1)
    torch.testing.assert_close(result.distance, moved.norm(dim=1) / moved.shape[1] ** 0.5)
    plain = tsynd.synthesize(autoencoder, TinyClassifier(), result.images, **QUIET)
    assert torch.equal(plain[2], plain.images[2])  # no labels, no pair
    with pytest.raises(tsynd.InputError, match=r"labels: of shape .* and None, wanted results of one kind"):
        result + plain
    with pytest.raises(TypeError):
        result + 1  # type: ignore[operator]


def test_what_is_shown(result: tsynd.SynthesisResult) -> None:
    pytest.importorskip("PIL")
    text = repr(result)
    assert text.startswith("SynthesisResult(23 images [1, 12, 12], mean uncertainty ")
    assert "tensor" not in text
    page = result._repr_html_()
    assert page.count("<img") == page.count("alt=") == 8
    assert result[:0]._repr_html_() == "<p>SynthesisResult(no images)</p>"


def test_a_result_trains_a_classifier(result: tsynd.SynthesisResult) -> None:
    pytest.importorskip("accelerate")
    report = tsynd.fit_classifier(TinyClassifier(), result, iterations=2, batch_size=8, progress=False)
    assert len(report.losses) == 2


def test_latent_std_is_measured_as_synthesize_does(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor
) -> None:
    value = tsynd.measure_latent_std(autoencoder, images, batch_size=7)
    latents = autoencoder.encode(images).detach().flatten(1)
    assert value == pytest.approx(float((latents - latents.mean(0)).square().sum(0).div(22).mean().sqrt()), rel=1e-5)
    options = {"progress": False, "samples": 8, "steps": 2}
    own = tsynd.synthesize(autoencoder, classifier, images, **options)
    given = tsynd.synthesize(autoencoder, classifier, images, latent_std=value, **options)
    torch.testing.assert_close(given.images, own.images, rtol=0, atol=1e-5)
    assert autoencoder.training
    with pytest.raises(tsynd.InputError, match="got 1 images, wanted two or more"):
        tsynd.measure_latent_std(autoencoder, images[:1])
    with pytest.raises(tsynd.InputError, match="images: "):
        tsynd.measure_latent_std(autoencoder, "there")


def test_quality_of_each_image(autoencoder: nn.Module, classifier: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """By hand for every image; kept by parts, joins and files, and something to filter by."""
    labels = torch.arange(23) % 3
    options: dict[str, Any] = {"samples": 8, "steps": 2, "latent_std": 0.4, "progress": False}
    plain = tsynd.synthesize(autoencoder, classifier, images, labels, variants=2, **options)
    result = plain.judged(autoencoder, classifier, images)
    quality = result.quality
    assert not plain.quality
    with torch.no_grad():
        logits = classifier.eval()(result.images)
        back = autoencoder.decode(autoencoder.encode(images)).repeat(2, 1, 1, 1)
    sources = images.repeat(2, 1, 1, 1)
    torch.testing.assert_close(quality["label_kept"], logits.argmax(1) == labels.repeat(2))
    torch.testing.assert_close(quality["label_probability"], logits.softmax(1)[torch.arange(46), labels.repeat(2)])
    for name, other in (("distance", result.images), ("reconstruction_error", back)):
        torch.testing.assert_close(quality[name], (other - sources).square().mean((1, 2, 3)).sqrt())
    z, z0 = result.latents.flatten(1), result.source_latents[:23].flatten(1)
    gaps = (torch.cdist(z0, z0) + torch.eye(23) * 1e9).amin(1)
    wanted = torch.stack([(gaps >= (one - z0).norm(dim=1).amin()).float().mean() for one in z])
    torch.testing.assert_close(quality["plausibility"], wanted)
    far = replace(plain, latents=plain.latents + 1e3).judged(autoencoder, classifier, images)
    assert far.quality["plausibility"].max() == 0
    kept = result[quality["label_kept"]]
    assert 0 < len(kept) < len(result)
    assert bool(kept.quality["label_kept"].all())
    assert torch.equal((kept + result).quality["distance"], torch.cat([kept.quality["distance"], quality["distance"]]))
    assert not (kept + plain).quality
    again = load_result(kept.save(tmp_path / "kept.npz"))
    assert {name: x.tolist() for name, x in again.quality.items()} == {n: x.tolist() for n, x in kept.quality.items()}
    with pytest.raises(tsynd.InputError, match="sources: got 3 images"):
        result.judged(autoencoder, classifier, images[:3])
    several = torch.stack([labels > 0, labels > 1, labels == 0], 1).float()
    plain = replace(plain, labels=several.repeat(2, 1))
    found = plain.judged(autoencoder, classifier, images, task="multilabel").quality
    assert torch.equal(found["label_kept"], ((logits > 0) == (several.repeat(2, 1) > 0.5)).all(1))
    assert torch.equal(found["label_kept"], found["label_probability"] > 0.5)
