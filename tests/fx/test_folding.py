"""Folded batch norms change speed, not results, and leave the models alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook

import tsynd
from tsynd.fx.folding import FoldedGraph, folded_decoder
from tsynd.fx.layout import channels_last
from tsynd.posteriors.mc_dropout import MCDropout


def settled(network: nn.Module) -> nn.Module:
    """With statistics and weights of the batch norms that change something."""
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        with torch.no_grad():
            norm.running_mean.uniform_(-1, 1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.affine:
                norm.weight.uniform_(-2, 2, generator=generator)
                norm.bias.uniform_(-1, 1, generator=generator)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@contextmanager
def counted(calls: list[nn.Module]) -> Iterator[None]:
    """Notes every batch norm that is called."""

    def note(module: nn.Module, *_: object) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            calls.append(module)

    handle = register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


CASES = {
    "convolution": (lambda: [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()], 0),
    "grouped": (lambda: [nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.BatchNorm2d(6, affine=False)], 0),
    "transposed": (lambda: [nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6)], 0),
    "grouped transposed": (lambda: [nn.ConvTranspose2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)], 1),
    "activation between": (lambda: [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)], 1),
    "batch statistics": (lambda: [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)], 1),
}


@pytest.mark.parametrize("name", CASES)
def test_folds_what_can_be_folded(name: str) -> None:
    make, left = CASES[name]
    torch.manual_seed(0)
    network = nn.Sequential(*make())
    network = network.eval() if "statistics" in name else settled(network)
    before = copy.deepcopy(network.state_dict())
    folded = FoldedGraph(fx.symbolic_trace(network)).module
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)
    assert norms(folded) == left
    assert norms(network) == 1
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))


def test_a_convolution_read_twice_is_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    network, x = settled(Twice()), torch.randn(2, 3, 5, 5)
    folded = FoldedGraph(fx.symbolic_trace(network)).module
    torch.testing.assert_close(folded(x), network(x))
    assert norms(folded) == 1


@pytest.mark.parametrize("early", [False, True])
def test_posterior_folds_and_follows_the_weights(early: bool) -> None:
    network = settled(TinyClassifier(early=early))
    posterior, x = MCDropout(network, samples=4), torch.rand(3, 1, 12, 12)
    for _ in range(2):
        with posterior.frozen():
            plain = posterior.uncertainty(x)
            calls: list[nn.Module] = []  # of batch norms: a folded one is not called
            with posterior.folded(), posterior.laid_out(channels_last), counted(calls):
                torch.testing.assert_close(posterior.uncertainty(x), plain, rtol=1e-4, atol=1e-6)
            assert not calls
            with counted(calls):
                assert torch.equal(posterior.uncertainty(x), plain)
            assert calls
        with torch.no_grad():  # training goes on: the next block folds the new weights
            network.body[0].weight.mul_(1.5)
            network.body[1].running_mean.add_(0.3)
    assert norms(network) == 1


def test_decoder_as_it_is_where_it_cannot_be_traced() -> None:
    class Branching(TinyAutoencoder):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents if latents.sum() > 0 else latents * 1)

    class Random(TinyAutoencoder):  # tracing would keep the first draw for ever
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents) + torch.rand(1)

    z = torch.randn(2, 4, 3, 3)
    for model in (Branching(), Random(), tsynd.as_autoencoder((TinyAutoencoder().down, TinyAutoencoder().up))):
        decode = folded_decoder(model, z)
        assert decode(z).shape == (2, 1, 12, 12)
    for model in (Branching().eval(), Random().eval()):
        assert folded_decoder(model, z) == model.decode


def test_synthesis_equals_the_unfolded_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    autoencoder = settled(tsynd.SmallAutoencoder(1, widths=(8, 16)))
    classifier = settled(tsynd.SmallResNet(1, 3, widths=(4, 8), dropout="stages"))
    images = torch.rand(5, 1, 16, 16)
    options = {"steps": 2, "samples": 4, "latent_std": 1.0, "progress": False}
    folded = tsynd.synthesize(autoencoder, classifier, images, **options)
    monkeypatch.setattr(FoldedGraph, "__init__", lambda self, traced: setattr(self, "module", traced))
    monkeypatch.setattr(FoldedGraph, "refresh", lambda self: None)
    plain = tsynd.synthesize(autoencoder, classifier, images, **options)
    torch.testing.assert_close(folded.images, plain.images, rtol=0, atol=1e-3)
    torch.testing.assert_close(folded.uncertainty, plain.uncertainty, rtol=1e-2, atol=1e-4)
