"""Where ascents start: between two sources, at latents of one's own; and the sources that are least understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import run_tsynd
from torch import Tensor, nn

import tsynd

QUIET: dict[str, Any] = {"progress": False, "samples": 8, "steps": 2, "latent_std": 0.4, "step_size": 1e-9}
# a step that leads nowhere behind the start: the last iterate is the start itself, wherever it is more uncertain


def reach(latents: Tensor, rule: str) -> Tensor:
    """How far half the ball is, in the rule's length."""
    size = latents[0].numel()
    return torch.tensor(0.5 * 0.4 * (size**0.5 if rule == "l2" else 1))


@pytest.mark.parametrize("rule", ["l2", "linf"])
def test_own_latents_are_cut_to_the_ball(
    autoencoder: nn.Module, classifier: nn.Module, images: Tensor, rule: str
) -> None:
    with torch.no_grad():
        z = autoencoder.encode(images)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 100.0):
        start = z + scale * torch.randn(z.shape, generator=generator)
        made = tsynd.synthesize(autoencoder, classifier, images, start=start, rule=rule, batch_size=5, **QUIET)
        risen = made.uncertainty > made.initial_uncertainty
        assert 0 < risen.sum() < len(images)
        way = (made.latents - made.source_latents).flatten(1)[risen]
        wanted = (start - z).flatten(1)[risen]
        if scale == 100.0:
            length = way.norm(dim=1) if rule == "l2" else way.abs().amax(1)
            torch.testing.assert_close(length, reach(z, rule).expand_as(length), rtol=1e-4, atol=1e-5)
            cut = wanted if rule == "l2" else wanted.sign()
            torch.testing.assert_close(torch.cosine_similarity(way, cut), torch.ones(len(way)), rtol=1e-2, atol=1e-2)
        else:
            torch.testing.assert_close(way, wanted, rtol=1e-3, atol=1e-5)


def test_between_two_sources_of_a_label(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    labels = torch.arange(23) % 2
    labels[22] = 2  # alone
    options = {**QUIET, "radius": 100.0, "start": "interpolate"}
    made = tsynd.synthesize(autoencoder, classifier, images, labels, **options)
    with torch.no_grad():
        z = autoencoder.encode(images).flatten(1)
    partner = 2 * made.latents.flatten(1) - z  # of those that moved
    for number in (made.uncertainty > made.initial_uncertainty).nonzero()[:, 0].tolist():
        nearest = int((partner[number] - z).norm(dim=1).argmin())
        assert (partner[number] - z[nearest]).norm() < 1e-3
        assert labels[nearest] == labels[number]
        assert nearest != number
    assert torch.equal(made.latents[22], made.source_latents[22])
    again = tsynd.synthesize(autoencoder, classifier, images, labels, batch_size=7, **options)
    torch.testing.assert_close(again.images, made.images, rtol=0, atol=1e-5)
    without = tsynd.synthesize(autoencoder, classifier, images, **options)
    assert not torch.equal(without.latents, made.latents)
    two = tsynd.synthesize(autoencoder, classifier, images, labels, variants=2, **options)
    assert torch.equal(two[:23].latents, made.latents)
    assert not torch.equal(two[23:].latents, made.latents)


def test_the_most_uncertain_sources(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    labels = torch.arange(23) % 3
    options: dict[str, Any] = {"samples": 8, "latent_std": 0.4, "progress": False, "steps": 2}
    before = tsynd.uncertainty(classifier, images, samples=8)
    wanted = before.topk(5).indices.msort()
    made = tsynd.synthesize(autoencoder, classifier, images, labels, most_uncertain=5, **options)
    assert torch.equal(made.sample_ids, wanted)
    assert torch.equal(made.labels, labels[wanted])
    all_of_them = tsynd.synthesize(autoencoder, classifier, images, labels, **options)
    torch.testing.assert_close(made.images, all_of_them[wanted].images, rtol=0, atol=1e-5)
    shuffled = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=4, shuffle=True)
    found = tsynd.synthesize(autoencoder, classifier, shuffled, most_uncertain=5, **options)
    assert torch.equal(found.sample_ids, wanted)


def test_refusals(autoencoder: nn.Module, classifier: nn.Module, images: Tensor) -> None:
    for option, message in (
        ({"start": torch.zeros(23, 4, 3, 2)}, "start: got latents"),
        ({"start": torch.full((23, 4, 3, 3), torch.nan)}, "finite"),
        ({"start": "far"}, "start"),
        ({"start": "interpolate", "steps": 1}, "steps"),
        ({"most_uncertain": 24}, "24 of 23"),
        ({"most_uncertain": 0}, "most_uncertain"),
        ({"most_uncertain": 3, "balance": True}, "most_uncertain"),
    ):
        with pytest.raises(tsynd.InputError, match=message):
            tsynd.synthesize(autoencoder, classifier, images, **{**QUIET, **option})


def test_other_paths_refuse_them(tmp_path: Any) -> None:
    start = ["synthesize", "--data", "phantom", "--output", tmp_path / "out", "--quiet"]
    for flag in (["--start", "noise"], ["--variants", "2"], ["--balance"], ["--most-uncertain", "3"]):
        for path in (["--model", "a.onnx"], ["--autoencoder", "a", "--classifier", "b", "--shard-size", "8"]):
            done = run_tsynd(*start, *path, *flag)
            assert done.returncode == 2
            assert f"{flag[0]} does nothing with {path[0] if len(path) == 2 else '--shard-size'}" in done.stderr
