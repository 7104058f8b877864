"""Gradient checkpointing: the same images bit for bit, less memory kept, and a batch that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, fx, nn

import tsynd
from tsynd.fx.checkpointing import Staged, kept_per_image, staged
from tsynd.fx.folding import folded_decoder
from tsynd.models.autoencoder import as_autoencoder
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.synthesis import synthesizer as streaming
from tsynd.synthesis.ascent import AscentSettings
from tsynd.synthesis.synthesizer import AscentStream

OPTIONS: dict[str, Any] = {"samples": 8, "steps": 3, "latent_std": 0.5, "progress": False}


class Deep(nn.Module):
    """A chain with a skip across part of it, and a value looked at, which no tracing follows."""

    def __init__(self, looks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and float(x.detach().sum()) == 12345.0:
            return x
        x = self.layers[1](self.layers[0](x).relu()).relu()
        x = x + self.layers[3](self.layers[2](x).tanh()).tanh()
        return self.layers[5](self.layers[4](x).sigmoid()).sigmoid()


def gradient(run: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    return torch.autograd.grad(run(leaf).square().sum(), leaf)[0]


@pytest.mark.parametrize("keep_last", [False, True])
def test_stages_change_nothing_but_what_is_kept(keep_last: bool) -> None:
    torch.manual_seed(0)
    network = Deep().eval().requires_grad_(False)
    traced, x = fx.symbolic_trace(network), torch.randn(3, 4, 16, 16)
    cut = staged(traced, x[:1], keep_last)
    assert len(cut.stages) > 1
    assert torch.equal(cut(x), network(x))
    assert torch.equal(gradient(cut, x), gradient(network, x))
    plain, less = kept_per_image(traced, x[:1]), kept_per_image(cut, x[:1])
    assert less + cut.heaviest < 0.9 * plain


def test_what_is_kept_is_counted_without_weights() -> None:
    linear = nn.Linear(10, 10_000).eval().requires_grad_(False)
    x = torch.randn(1, 10)
    assert kept_per_image(lambda z: linear(z).tanh(), x) == 10_000 * 4
    # code that looks at values is run on real ones
    assert kept_per_image(lambda z: linear(z * 2 if float(z.detach().sum()) > 1e9 else z).tanh(), x) == 10_000 * 4


def test_an_untraced_network_is_one_stage() -> None:
    torch.manual_seed(0)
    network, x = Deep(looks=True).eval().requires_grad_(False), torch.randn(2, 4, 8, 8)
    cut = staged(network, x[:1])
    assert isinstance(cut, Staged)
    assert len(cut.stages) == 1
    assert kept_per_image(cut, x[:1]) == x[:1].nbytes
    assert torch.equal(gradient(cut, x), gradient(network, x))


def test_decoders_are_traced_around_what_cannot_be() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    for dims in (2, 3):
        model = nets.AutoencoderKL(
            spatial_dims=dims, in_channels=1, out_channels=1, channels=(8, 8), latent_channels=2, num_res_blocks=1,
            norm_num_groups=4, attention_levels=(False, True),
        )  # fmt: skip
        adapter = as_autoencoder(model).eval().requires_grad_(False)  # type: ignore[attr-defined]
        latents = torch.randn(2, 2, *[8] * dims)
        decode = folded_decoder(adapter, latents)
        assert isinstance(decode, fx.GraphModule)  # although its attention cannot be traced
        cut = staged(decode, latents[:1])
        assert len(cut.stages) > 1
        assert torch.equal(cut(latents), decode(latents))
        torch.testing.assert_close(gradient(cut, latents), gradient(adapter.decode, latents), rtol=1e-4, atol=1e-5)


CLASSIFIERS = {
    "fused head": lambda: TinyClassifier(),
    "general tail": lambda: TinyClassifier(early=True),
    "ensemble": lambda: tsynd.Ensemble([TinyClassifier().eval(), TinyClassifier().eval()]),
    "small": lambda: tsynd.SmallResNet(1, 3).eval(),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_checkpointing_gives_the_same_images(kind: str, images: Tensor) -> None:
    torch.manual_seed(0)
    classifier = CLASSIFIERS[kind]()
    autoencoder = tsynd.SmallAutoencoder(1).eval() if kind == "small" else TinyAutoencoder()
    plain = tsynd.synthesize(autoencoder, classifier, images, **OPTIONS)
    less = tsynd.synthesize(autoencoder, classifier, images, checkpointing=True, **OPTIONS)
    for field in ("images", "latents", "uncertainty", "trajectory", "status"):
        assert torch.equal(getattr(less, field), getattr(plain, field)), field
    again = tsynd.synthesize(autoencoder, classifier, images, **OPTIONS)
    assert torch.equal(again.images, plain.images)  # nothing is left behind


def prepared(shape: tuple[int, ...], **options: Any) -> AscentStream:
    torch.manual_seed(0)
    autoencoder, classifier = tsynd.SmallAutoencoder(3).eval(), tsynd.SmallResNet(3, 4).eval()
    stream = AscentStream(autoencoder, classifier, AscentSettings(samples=8), **options)
    with stream:
        stream.check(torch.rand(1, *shape))
        stream.prepare(0.5, torch.rand(1, *shape))
    return stream


def test_checkpointing_and_the_batch_follow_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not prepared((3, 32, 32)).checkpointing
    assert prepared((3, 32, 32)).size % 16 == 0
    assert prepared((3, 32, 32), memory_limit=0.001).checkpointing  # a tile of 16 would keep 7 MiB
    assert not prepared((3, 32, 32), memory_limit=0.001, checkpointing=False).checkpointing
    assert prepared((3, 32, 32), batch_size=512, memory_limit=0.1).checkpointing
    assert prepared((3, 32, 32), batch_size=20).size == 32
    monkeypatch.setattr(streaming, "_TILE_BYTES", 2**20)
    assert prepared((3, 32, 32), batch_size=1).size == 2  # two such images keep less than a MiB, four do not
    with pytest.raises(tsynd.InputError, match="memory_limit: got 0"):
        prepared((3, 32, 32), memory_limit=0)
    with pytest.raises(tsynd.InputError, match="checkpointing: got True with compile"):
        prepared((3, 32, 32), checkpointing=True, compile=True)


def test_images_of_small_tiles_do_not_depend_on_the_batch(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_TILE_BYTES", 1)
    torch.manual_seed(0)
    autoencoder, classifier = tsynd.SmallAutoencoder(1).eval(), tsynd.SmallResNet(1, 3).eval()
    whole = tsynd.synthesize(autoencoder, classifier, images[:6], batch_size=1, **OPTIONS)
    order = torch.tensor([4, 1])
    part = tsynd.synthesize(autoencoder, classifier, images[order], batch_size=1, sample_ids=order, **OPTIONS)
    assert torch.equal(part.images, whole.images[order])


def test_mc_dropout_is_as_before_after_stages() -> None:
    posterior = MCDropout(TinyClassifier(), samples=4)
    image = torch.rand(1, 1, 12, 12)
    with posterior.frozen():
        value, plain = posterior.uncertainty(image), kept_per_image(posterior.uncertainty, image)
        with posterior.staged(image) as heaviest:
            assert heaviest > 0
            assert kept_per_image(posterior.uncertainty, image) < plain
            assert torch.equal(posterior.uncertainty(image), value)
        assert kept_per_image(posterior.uncertainty, image) == plain
