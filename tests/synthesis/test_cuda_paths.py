"""Channels-last weights and compiled synthesis change speed, not results."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier

import tsynd
from tsynd.fx.layout import LaidOut, channels_last


def test_channels_last_leaves_the_weights_where_they_are() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
    own, pointer = module[0].weight, module[0].weight.data_ptr()
    laid = LaidOut(module, channels_last)
    for _ in range(2):
        assert laid.module[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(laid.module[0].weight, own)
        assert laid.module[1].weight is module[1].weight
        assert module[0].weight is own
        assert own.data_ptr() == pointer
        assert own.is_contiguous()
        with torch.no_grad():
            own.mul_(2)
        laid.refresh()


@pytest.mark.parametrize("batch_size", [None, 16, 48])
def test_compiled_synthesis_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, batch_size: int | None) -> None:
    # the compiler itself takes half a minute; its front end shows what reaches it
    compiled: list[object] = []

    def spy(function: object, **options: object) -> object:
        compiled.append(function)
        return functools.partial(torch._dynamo.optimize("aot_eager"))(function)

    monkeypatch.setattr(torch, "compile", spy)
    autoencoder, classifier = TinyAutoencoder(), TinyClassifier()
    images = torch.rand(37, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"steps": 2, "samples": 4, "latent_std": 1.0, "batch_size": batch_size, "progress": False}
    plain = tsynd.synthesize(autoencoder, classifier, images, **options)
    assert not compiled
    fast = tsynd.synthesize(autoencoder, classifier, images, compile=True, **options)
    assert len(compiled) == 2  # decoder and trunk
    torch.testing.assert_close(fast.images, plain.images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.uncertainty, plain.uncertainty, rtol=1e-3, atol=1e-5)
    assert torch.equal(fast.sample_ids, plain.sample_ids)
