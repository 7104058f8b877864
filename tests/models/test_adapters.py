"""Autoencoders of MONAI and diffusers behind one face, their pixel ranges, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyAutoencoder, TinyClassifier
from torch import Tensor, nn

import tsynd
from tsynd.models.adapters import (
    Adapter,
    CodebookAutoencoder,
    DiffusersAutoencoder,
    KLAutoencoder,
    ModelAutoencoder,
    PairAutoencoder,
    VariationalAutoencoder,
)
from tsynd.models.autoencoder import as_autoencoder, check_autoencoder, check_pixel_range, latent_deviation
from tsynd.models.networks import SmallAutoencoder
from tsynd.utils.errors import InputError

IMAGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
VOLUMES = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1))


def monai(name: str, **arguments: Any) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    torch.manual_seed(0)
    return getattr(nets, name)(**arguments)


def kl(dims: int, **options: Any) -> nn.Module:
    plain = {"attention_levels": (False, False), "with_encoder_nonlocal_attn": False}
    plain |= {"with_decoder_nonlocal_attn": False, "num_res_blocks": 1, "norm_num_groups": 4, "channels": (8, 8)}
    return monai("AutoencoderKL", spatial_dims=dims, **(plain | options))


def vqvae(dims: int) -> nn.Module:
    steps = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    sizes = {"channels": (8, 8), "num_res_layers": 1, "num_res_channels": (8, 8), "embedding_dim": 4}
    return monai("VQVAE", spatial_dims=dims, in_channels=1, out_channels=1, num_embeddings=8, **sizes, **steps)


def variational(dims: int, **options: Any) -> nn.Module:
    shape = (1, 16, 16) if dims == 2 else (1, 8, 8, 8)
    sizes = {"out_channels": 1, "latent_size": 5, "channels": (4, 8), "strides": (2, 2)}
    return monai("VarAutoEncoder", spatial_dims=dims, in_shape=shape, **sizes, **options)


def plain_monai(dims: int) -> nn.Module:
    sizes = {"in_channels": 1, "out_channels": 1, "channels": (4, 8), "strides": (2, 2), "inter_channels": [8]}
    return monai("AutoEncoder", spatial_dims=dims, **sizes)


MONAI: list[tuple[Callable[[int], nn.Module], type[Adapter]]] = [
    (kl, KLAutoencoder),
    (variational, VariationalAutoencoder),
    (vqvae, CodebookAutoencoder),
    (plain_monai, PairAutoencoder),
]

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CHANNELS = {"in_channels": 1, "out_channels": 1, "latent_channels": 2}
SMALL = BLOCKS | CHANNELS | {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
FLAT = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock", "upsample_block_type": "interpolate"}
FLAT |= {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
FLAT |= {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
FLAT |= {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
TINY |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
ASYMMETRIC = BLOCKS | CHANNELS | {"down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8)}
MAGVIT = CHANNELS | {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
MAGVIT |= {"down_block_types": ["SpatialDownBlock3D"] * 2, "up_block_types": ["SpatialUpBlock3D"] * 2}
WAN = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [True]}

DIFFUSERS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "AutoencoderKL": (SMALL, (1, 16, 16)),
    "VQModel": (SMALL | {"num_vq_embeddings": 8}, (1, 16, 16)),
    "AutoencoderTiny": ({"in_channels": 1, "out_channels": 1} | TINY, (1, 16, 16)),
    "AutoencoderDC": ({"in_channels": 1, "latent_channels": 4} | FLAT, (1, 16, 16)),
    "AsymmetricAutoencoderKL": (ASYMMETRIC | {"norm_num_groups": 4}, (1, 16, 16)),
    "AutoencoderKLFlux2": (SMALL, (1, 16, 16)),
    "AutoencoderKLMagvit": (MAGVIT, (1, 5, 16, 16)),
    "AutoencoderKLWan": (WAN, (3, 5, 16, 16)),
}


def diffused(name: str, **options: Any) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    return getattr(diffusers, name)(**(DIFFUSERS[name][0] | options))


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def exercise(model: nn.Module, adapter: type[Adapter], images: Tensor) -> Adapter:
    """What holds for every adapter."""
    model.train()
    next(iter(model.children())).eval()
    modes = [part.training for part in model.modules()]
    before = copy.deepcopy(model.state_dict())
    coder = as_autoencoder(model)
    assert isinstance(coder, adapter)
    assert coder.training
    assert [part.training for part in model.modules()] == modes
    model.eval()
    coder = as_autoencoder(model)
    assert not coder.training
    check_autoencoder(coder, images)
    latents = coder.encode(images).detach().requires_grad_(True)
    assert torch.equal(latents, coder.encode(images))
    decoded = coder.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    (gradient,) = torch.autograd.grad(coder.decode(latents).square().sum(), latents)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    each = torch.cat([coder.encode(image[None]) for image in images])
    torch.testing.assert_close(each, coder.encode(images), rtol=1e-3, atol=1e-4)
    assert same_state(model, before)
    assert {id(p) for p in coder.parameters()} == {id(p) for p in model.parameters()} or adapter is PairAutoencoder
    return coder


# --- MONAI


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("build", "adapter"), MONAI)
def test_monai(build: Callable[[int], nn.Module], adapter: type[Adapter], dims: int) -> None:
    exercise(build(dims), adapter, IMAGES if dims == 2 else VOLUMES)


@pytest.mark.parametrize("dims", [2, 3])
def test_monai_values_are_the_models_own(dims: int) -> None:
    images = IMAGES if dims == 2 else VOLUMES
    model = kl(dims).eval()
    coder = as_autoencoder(model)
    assert torch.equal(coder.encode(images), model.encode(images)[0])
    assert torch.equal(coder(images), model.reconstruct(images).clamp(0, 1))
    code = vqvae(dims).eval()
    coder = as_autoencoder(code)
    assert torch.equal(coder(images), code(images)[0].clamp(0, 1))
    for sigmoid in (True, False):
        model = variational(dims, use_sigmoid=sigmoid, use_mean_at_inference=True).eval()
        assert torch.equal(as_autoencoder(model)(images), model(images)[0].clamp(0, 1))
    plain = plain_monai(dims).eval()
    assert torch.equal(as_autoencoder(plain)(images), plain(images).clamp(0, 1))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_quantiser_passes_gradients_straight_through(dims: int) -> None:
    model, images = vqvae(dims).eval(), IMAGES if dims == 2 else VOLUMES
    with torch.no_grad():  # decoded pixels inside [0, 1], where nothing is clamped
        model.quantizer.quantizer.embedding.weight.mul_(0.1)
        last = [p for p in model.decoder.parameters() if p.dim() == 1][-1]
        last.fill_(0.5)
    coder = as_autoencoder(model)
    code = coder.encode(images).detach()
    quantised = model.quantize(code)[0].detach()
    assert not torch.allclose(code, quantised, atol=1e-3)
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    slopes = []
    for point, decode in ((code, coder.decode), (quantised, model.decode)):
        leaf = point.clone().requires_grad_(True)
        slopes.append(torch.autograd.grad((decode(leaf) * weights).sum(), leaf)[0])
    assert slopes[0].abs().max() > 1e-4
    torch.testing.assert_close(slopes[0], slopes[1])


def test_every_monai_model_climbs() -> None:
    for build, _ in MONAI:
        model = build(2).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and name.endswith("bias") and len(parameter) == 1:
                    parameter.fill_(0.5)
        before = copy.deepcopy(model.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = tsynd.synthesize(
                model, TinyClassifier(), IMAGES.repeat(8, 1, 1, 1), progress=False, latent_std=1.0
            )
        assert (result.uncertainty > result.initial_uncertainty).any(), build
        assert same_state(model, before)
        assert not any(part.training for part in model.modules())


# --- diffusers


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name: str) -> None:
    images = torch.rand(2, *DIFFUSERS[name][1], generator=torch.Generator().manual_seed(0))
    exercise(diffused(name), DiffusersAutoencoder, images)


def test_latents_are_the_pipelines() -> None:
    model = diffused("AutoencoderKL", scaling_factor=0.3, shift_factor=0.7).eval()
    coder, images = as_autoencoder(model), IMAGES
    mode = model.encode(2 * images - 1).latent_dist.mode()
    torch.testing.assert_close(coder.encode(images), (mode - 0.7) * 0.3)
    torch.testing.assert_close(coder(images), ((model.decode(mode).sample + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    model = diffused("AutoencoderKL", latents_mean=[0.1, -0.2], latents_std=[2.0, 0.5], scaling_factor=0.5).eval()
    mode = model.encode(2 * images - 1).latent_dist.mode()
    mean, std = torch.tensor([0.1, -0.2]).reshape(1, 2, 1, 1), torch.tensor([2.0, 0.5]).reshape(1, 2, 1, 1)
    coder = as_autoencoder(model)
    torch.testing.assert_close(coder.encode(images), (mode - mean) * 0.5 / std)
    torch.testing.assert_close(coder(images), ((model.decode(mode).sample + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_a_vq_model_is_quantised_straight_through() -> None:
    model = diffused("VQModel", num_vq_embeddings=8).eval()
    coder = as_autoencoder(model)
    code = coder.encode(IMAGES).detach()
    raw = code / model.config.scaling_factor
    quantised = model.quantize(raw)[0].detach()
    assert not torch.allclose(raw, quantised, atol=1e-3)
    leaf = code.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(coder.decode(leaf).sum(), leaf)
    point = quantised.clone().requires_grad_(True)
    decoded = model.decode(point, force_not_quantize=True).sample
    (wanted,) = torch.autograd.grad(((decoded + 1) / 2).clamp(0, 1).sum(), point)
    assert got.abs().max() > 1e-3
    torch.testing.assert_close(got * model.config.scaling_factor, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_weights_take_float32_images(dtype: torch.dtype) -> None:
    for model in (diffused("AutoencoderKL"), kl(2)):
        coder = as_autoencoder(model.to(dtype).eval())
        latents = coder.encode(IMAGES)
        assert latents.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        assert coder.decode(latents.float()).isfinite().all()


def test_an_rgb_model_takes_grey_images() -> None:
    model = diffused("AutoencoderKL", in_channels=3, out_channels=3).eval()
    with pytest.raises(InputError, match="failed on images"):
        check_autoencoder(as_autoencoder(model), IMAGES)
    coder = as_autoencoder(model, grey=True)
    check_autoencoder(coder, IMAGES)
    rgb = as_autoencoder(model)(IMAGES.expand(-1, 3, -1, -1))
    unclamped = coder.decode(coder.encode(IMAGES))
    assert unclamped.shape == IMAGES.shape
    inside = ((rgb > 0) & (rgb < 1)).all(1, keepdim=True)
    assert inside.any()
    torch.testing.assert_close(unclamped[inside], rgb.mean(1, keepdim=True)[inside])


# --- own models and pairs


def test_own_models_are_taken_as_they_are() -> None:
    coder = SmallAutoencoder(widths=(8, 16))
    assert as_autoencoder(coder) is coder
    simple = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)
    assert as_autoencoder(simple) is simple
    adapter = as_autoencoder((nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1)))
    assert as_autoencoder(adapter) is adapter
    assert not as_autoencoder((nn.Conv2d(1, 3, 1).eval(), nn.Conv2d(3, 1, 1).eval())).training


@pytest.mark.parametrize(
    ("arguments", "forward"),
    [
        ({"pixel_range": (-1, 1)}, lambda x: 2 * x - 1),
        ({"pixel_range": (0, 255)}, lambda x: 255 * x),
        ({"mean": 0.4, "std": 0.2}, lambda x: (x - 0.4) / 0.2),
        ({"mean": [0.4], "std": (0.2,)}, lambda x: (x - 0.4) / 0.2),
    ],
)
def test_a_range_is_mapped_there_and_back(arguments: dict[str, Any], forward: Callable[[Tensor], Tensor]) -> None:
    seen: list[Tensor] = []

    def encode(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    own = SimpleNamespace(encode=encode, decode=lambda z: z, latent_std=torch.tensor(3.0))
    for model in (own, (encode, lambda z: z)):
        coder = as_autoencoder(model, **arguments)
        torch.testing.assert_close(coder(IMAGES), IMAGES)
        torch.testing.assert_close(seen.pop(), forward(IMAGES), rtol=1e-5, atol=1e-5)
    coder = as_autoencoder(own, **arguments)
    assert isinstance(coder, ModelAutoencoder)
    assert float(coder.latent_std) == 3
    volume = as_autoencoder(own, mean=(0.1, 0.2), std=(1, 2)).encode(torch.rand(2, 2, 4, 4, 4))
    assert volume.shape == (2, 2, 4, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pixel_range": (1, 1)}, "pixel_range: got"),
        ({"pixel_range": (0, math.nan)}, "pixel_range: got"),
        ({"pixel_range": 1}, "pixel_range: got 1"),
        ({"pixel_range": ("a", "b")}, "pixel_range: got"),
        ({"pixel_range": (0, 1), "mean": 0.5, "std": 1}, "wanted one of the two"),
        ({"mean": 0.5}, "std: got None"),
        ({"std": 0.5}, "mean: got None"),
        ({"mean": 0.5, "std": 0}, "std: got 0"),
        ({"mean": (0.5, 0.5), "std": (1, 1, 1)}, "std: got 3 numbers with 2"),
        ({"mean": "x", "std": 1}, "mean: got 'x'"),
        ({"mean": (), "std": ()}, "mean: got"),
    ],
)
def test_what_names_no_range_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        as_autoencoder(TinyAutoencoder(), **arguments)


def test_training_is_not_clamped() -> None:
    coder = as_autoencoder((nn.Identity(), nn.Identity()))
    assert coder.train().decode(torch.tensor([[-1.0, 2.0]])).tolist() == [[-1.0, 2.0]]
    assert coder.eval().decode(torch.tensor([[-1.0, 2.0]])).tolist() == [[0.0, 1.0]]
    model = kl(2)
    with torch.no_grad():
        model.decoder.blocks[-1].conv.bias.fill_(-2.0)  # every pixel starts below 0
    tsynd.fit_autoencoder(as_autoencoder(model), IMAGES, iterations=60, learning_rate=3e-2, progress=False)
    with torch.no_grad():
        assert float(as_autoencoder(model)(IMAGES).mean()) > 0.2


# --- pixel ranges found out


def trained(arguments: dict[str, Any], images: Tensor) -> Any:
    """A pair trained, briefly, on another range."""
    torch.manual_seed(0)
    pair = (
        nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, 2, 1)),
        nn.Sequential(nn.ConvTranspose2d(8, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)),
    )
    coder = as_autoencoder(pair, **arguments)
    tsynd.fit_autoencoder(coder, images, iterations=200, latent_noise=0.05, batch_size=32, progress=False)
    for part in pair:
        part.eval()
    return pair


@pytest.fixture(scope="module")
def phantom() -> Tensor:
    return tsynd.load_data("phantom", train_size=64).train.images.float() / 255


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mean": 0.7, "std": 0.2}, r"only \d+%: it was trained on another range, wanted .*mean=\.\.\., std=\.\.\."),
        ({"pixel_range": (-3, 1)}, "another range"),
    ],
)
def test_a_trained_model_on_the_wrong_range_is_told(arguments: dict[str, Any], words: str, phantom: Tensor) -> None:
    pair = trained(arguments, phantom)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        check_pixel_range(as_autoencoder(pair, **arguments), phantom)
    with pytest.raises(InputError, match=words):
        check_pixel_range(as_autoencoder(pair), phantom)
    own = SimpleNamespace(encode=pair[0], decode=pair[1])
    with pytest.raises(InputError, match=words):
        tsynd.synthesize(own, TinyClassifier(), phantom, progress=False, latent_std=1.0)
    augmentation = tsynd.TargetedAugmentation(own, latent_std=1.0)
    with pytest.raises(InputError, match=words):
        augmentation(TinyClassifier(), phantom[:4], torch.zeros(4, dtype=torch.int64))


def test_a_briefly_trained_model_is_not_refused(phantom: Tensor) -> None:
    """It is still off by a constant, which another range divides; but it reconstructs well in none."""
    nets = pytest.importorskip("monai.networks.nets")
    plain = {name: False for name in ("with_encoder_nonlocal_attn", "with_decoder_nonlocal_attn")}
    torch.manual_seed(2)
    model = nets.AutoencoderKL(
        2,
        channels=(8, 16),
        num_res_blocks=1,
        norm_num_groups=8,
        latent_channels=4,
        attention_levels=(False, False),
        **plain,
    )
    coder = as_autoencoder(model)
    tsynd.fit_autoencoder(coder, phantom, iterations=40, batch_size=16, progress=False)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        check_pixel_range(coder, phantom)


def test_a_model_of_minus_one_to_one_is_told() -> None:
    own = SimpleNamespace(encode=lambda x: x, decode=lambda z: -z.abs())  # keeps dark pixels of that range alone
    images = (IMAGES > 0.5).float() * 0.2 + 0.2
    remedy = r"wanted tsynd\.as_autoencoder\(model, pixel_range=\(-1, 1\)\)"
    with pytest.raises(InputError, match=r"with pixels in \[0, 1\] it misses .* only 0%: .*" + remedy):
        check_pixel_range(as_autoencoder(own), images)
    check_pixel_range(as_autoencoder(own, pixel_range=(-1, 1)), images)
    with pytest.raises(InputError, match=r"with pixel_range=\(0, 255\) it misses"):
        check_pixel_range(as_autoencoder(own, pixel_range=(0, 255)), images)


@pytest.mark.parametrize("build", [kl, variational, vqvae, plain_monai])
def test_an_untrained_model_is_not_refused(build: Callable[[int], nn.Module]) -> None:
    for seed in range(3):
        model = build(2).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            check_pixel_range(as_autoencoder(model), IMAGES)


def test_a_blurred_or_constant_output_and_a_blank_image_are_not_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for decode in (lambda z: z.mean((2, 3), keepdim=True).expand_as(z), torch.zeros_like, lambda z: z * math.nan):
            if decode(IMAGES).isfinite().all():
                check_pixel_range(SimpleNamespace(encode=lambda x: x, decode=decode), IMAGES)
        check_pixel_range(SimpleNamespace(encode=lambda x: x, decode=lambda z: z - 9), torch.full((1, 1, 4, 4), 0.5))


def test_pixels_outside_are_worth_a_warning() -> None:
    dark = SimpleNamespace(encode=lambda x: x, decode=lambda z: torch.full_like(z, -1.0))
    with pytest.warns(RuntimeWarning, match=r"100% of the pixels that it decodes lie outside \[0, 1\]"):
        check_pixel_range(dark, IMAGES)


# --- what does not fit


@pytest.mark.parametrize("thing", [object(), nn.Linear(2, 2), (nn.Identity(),), (nn.Identity(), 3), "kl", None])
def test_what_is_no_autoencoder_is_refused(thing: object) -> None:
    with pytest.raises(InputError, match="autoencoder: got"):
        as_autoencoder(thing)


def test_an_adapter_is_mapped_no_further() -> None:
    with pytest.raises(InputError, match="got an adapter"):
        as_autoencoder(as_autoencoder((nn.Identity(), nn.Identity())), pixel_range=(-1, 1))


@pytest.mark.parametrize(
    ("encode", "decode", "message"),
    [
        (lambda x: x, lambda z: z[..., :8], r"\[1, 1, 16, 16\] came back as \[1, 1, 16, 8\]"),
        (lambda x: x, lambda z: z / 0, "not finite"),
        (lambda x: (x, x), lambda z: z, "returned tuple"),
        (lambda x: x.long(), lambda z: z, "floating"),
        (lambda x: x.expand(2, -1, -1, -1), lambda z: z, "floating tensor"),
        (lambda x: x, lambda z: z @ torch.zeros(3, 3), "failed on images"),
        (lambda x: x, lambda z: z.reshape(3), "failed on images"),
        (lambda x: x, lambda z: [*z][7], "failed on images"),
        (lambda x: x, lambda z: dict([z]), "failed on images"),
        (lambda x: x, lambda z: (z, z), "decode: returned tuple"),
        (lambda x: x, lambda z: z + torch.rand_like(z), "decode: gave two images for one latent"),
    ],
)
def test_a_model_that_does_not_fit_is_named(encode: Any, decode: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_autoencoder(SimpleNamespace(encode=encode, decode=decode), IMAGES)


def test_latent_std_ignores_what_all_images_share() -> None:
    generator = torch.Generator().manual_seed(0)
    layout = 100 * torch.randn(1, 3, 4, generator=generator)
    latents = layout + 2 * torch.randn(5000, 3, 4, generator=generator)
    whole, parts = latent_deviation([latents]), latent_deviation(latents.split(999))
    assert whole.item() == pytest.approx(2.0, rel=0.02)
    assert whole.item() == pytest.approx(latents.var(0).mean().sqrt().item(), rel=1e-5)
    torch.testing.assert_close(parts, whole)
    with pytest.raises(InputError, match="two or more"):
        latent_deviation([latents[:1]])
