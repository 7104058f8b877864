"""The default networks and the adapters for other libraries' autoencoders."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tsynd.autoencoder import (
    CodebookAutoencoder,
    DiffusersAutoencoder,
    KLAutoencoder,
    PairAutoencoder,
    VariationalAutoencoder,
    as_autoencoder,
    check_autoencoder,
    measure_latent_std,
)
from tsynd.errors import InputError

pytest.importorskip("monai")
from monai.networks import nets

from tsynd.networks import SmallAutoencoder, SmallResNet


@pytest.mark.parametrize("dropout", ["head", "stages"])
@pytest.mark.parametrize(("channels", "size", "widths"), [(1, 28, (8, 16, 32, 64)), (3, 32, (8, 64))])
def test_resnet_gives_logits_and_drops_before_the_head(channels, size, widths, dropout):
    torch.manual_seed(0)
    model = SmallResNet(channels, 5, widths, dropout, 0.4)
    images = torch.rand(3, channels, size, size)
    assert model(images).shape == (3, 5)
    drops = [part for part in model.modules() if isinstance(part, (nn.Dropout, nn.Dropout2d))]
    assert len(drops) == (1 if dropout == "head" else 1 + len(widths))
    seen = []
    model.dropout.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.eval()
    logits = model(images)
    assert seen[0].shape == (3, widths[-1])
    assert torch.equal(logits, model.head(seen[0]))
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize("dropout", ["head", "stages"])
def test_resnet_can_be_traced_and_scripted(dropout):
    torch.manual_seed(0)
    model = SmallResNet(widths=(8, 16), dropout=dropout).eval()
    images = torch.rand(2, 1, 28, 28)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images), model(images))
    assert any(node.target == "dropout" for node in traced.graph.nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates scripting, users still deploy it
        torch.testing.assert_close(torch.jit.script(model)(images), model(images))


def test_no_activation_overwrites_what_an_earlier_layer_gave():
    model = SmallResNet(widths=(8, 16), dropout="stages").eval()
    kept = []
    for part in model.modules():
        if not list(part.children()):
            part.register_forward_hook(lambda module, args, out: kept.append((args[0], args[0].clone())))
    model(torch.rand(2, 1, 16, 16))
    assert len(kept) > 10
    assert all(torch.equal(given, copy) for given, copy in kept)


def test_gradient_reaches_the_images_through_both_networks():
    torch.manual_seed(0)
    coder, model = SmallAutoencoder(1).eval(), SmallResNet(widths=(8, 16)).eval()
    latents = coder.encode(torch.rand(2, 1, 28, 28)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(coder.decode(latents)).square().sum(), latents)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).gt(0).all()


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 64), (224, 224), (20, 36)])
@pytest.mark.parametrize("channels", [1, 3])
def test_autoencoder_keeps_shape_and_range(size, channels):
    coder = SmallAutoencoder(channels, widths=(8, 16)).eval()
    images = torch.rand(2, channels, *size)
    latents = coder.encode(images)
    channels_out = coder.config["latent_channels"]
    assert latents.shape == (2, channels_out, size[0] // 4, size[1] // 4)
    decoded = coder.decode(latents * 100)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert torch.equal(coder(images), coder.decode(latents))
    assert coder.latent_std.isnan()


def test_configs_rebuild_the_networks():
    for model in (SmallResNet(3, 4, (8, 16), "stages", 0.3), SmallAutoencoder(3, 2, (8, 16))):
        twin = type(model)(**json.loads(json.dumps(model.config)))
        assert str(twin) == str(model)
        twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "arguments", "word"),
    [
        (SmallResNet, {"widths": ()}, "widths"),
        (SmallResNet, {"widths": (8, 0)}, "widths"),
        (SmallResNet, {"dropout": "everywhere"}, "dropout"),
        (SmallResNet, {"dropout_rate": 1.0}, "dropout_rate"),
        (SmallResNet, {"num_classes": 0}, "num_classes"),
        (SmallAutoencoder, {"widths": (8,)}, "widths"),
        (SmallAutoencoder, {"latent_channels": 0}, "latent_channels"),
    ],
)
def test_bad_arguments_are_refused(kind, arguments, word):
    with pytest.raises(InputError, match=word):
        kind(**arguments)


def test_autoencoder_refuses_sizes_that_do_not_halve_twice():
    with pytest.raises(InputError, match="multiples of 4"):
        SmallAutoencoder().encode(torch.rand(1, 1, 30, 28))


IMAGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
KL = {"spatial_dims": 2, "channels": (8, 8), "norm_num_groups": 4, "num_res_blocks": 1}
KL |= {
    "attention_levels": (False, False),
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}


def _vqvae():
    step = {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}
    sizes = {"channels": (8, 8), "num_res_layers": 1, "num_res_channels": (8, 8), "embedding_dim": 4}
    return nets.VQVAE(2, 1, 1, num_embeddings=8, **sizes, **step)


@pytest.mark.parametrize(
    ("build", "adapter"),
    [
        (lambda: nets.AutoencoderKL(**KL), KLAutoencoder),
        (lambda: nets.VarAutoEncoder(2, (1, 16, 16), 1, 5, (4, 8), (2, 2)), VariationalAutoencoder),
        (_vqvae, CodebookAutoencoder),
        (lambda: nets.AutoEncoder(2, 1, 1, (4, 8), (2, 2), inter_channels=[8]), PairAutoencoder),
        (lambda: (nn.Conv2d(1, 3, 1), nn.Conv2d(3, 1, 1)), PairAutoencoder),
    ],
)
def test_adapters_encode_decode_and_pass_gradients(build, adapter):
    torch.manual_seed(0)
    coder = as_autoencoder(build())
    assert isinstance(coder, adapter)
    assert isinstance(coder, nn.Module)
    coder.eval()
    check_autoencoder(coder, IMAGES)
    latents = coder.encode(IMAGES)
    assert torch.equal(latents, coder.encode(IMAGES))
    (gradient,) = torch.autograd.grad(coder.decode(latents).sum(), latents)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert len(list(coder.parameters())) > 0


def test_kl_adapter_takes_the_mean():
    model = nets.AutoencoderKL(**KL).eval()
    assert torch.equal(as_autoencoder(model).encode(IMAGES), model.encode(IMAGES)[0])


def test_own_models_are_taken_as_they_are():
    coder = SmallAutoencoder(widths=(8, 16))
    assert as_autoencoder(coder) is coder
    simple = SimpleNamespace(encode=lambda x: x, decode=lambda z: z)
    assert as_autoencoder(simple) is simple


def test_diffusers_models_are_known_by_their_module_and_see_their_own_range():
    class Posterior:
        def __init__(self, mean: Tensor) -> None:
            self.mean = mean

        def mode(self) -> Tensor:
            return self.mean

    class AutoencoderKL(nn.Module):
        def encode(self, images: Tensor) -> SimpleNamespace:
            assert images.min() < -0.5
            return SimpleNamespace(latent_dist=Posterior(images * 3))

        def decode(self, latents: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=latents / 3)

    AutoencoderKL.__module__ = "diffusers.models.autoencoders.autoencoder_kl"
    coder = as_autoencoder(AutoencoderKL())
    assert isinstance(coder, DiffusersAutoencoder)
    check_autoencoder(coder, IMAGES)
    torch.testing.assert_close(coder.decode(coder.encode(IMAGES)), IMAGES)


@pytest.mark.parametrize("thing", [object(), nn.Linear(2, 2), (nn.Identity(),), (nn.Identity(), 3), "kl"])
def test_what_is_no_autoencoder_is_refused(thing):
    with pytest.raises(InputError, match="autoencoder: got"):
        as_autoencoder(thing)


@pytest.mark.parametrize(
    ("encode", "decode", "message"),
    [
        (lambda x: x, lambda z: z[..., :8], r"\[1, 1, 16, 16\] came back as \[1, 1, 16, 8\]"),
        (lambda x: x, lambda z: z / 0, "not finite"),
        (lambda x: (x, x), lambda z: z, "returned tuple"),
        (lambda x: x.long(), lambda z: z, "floating"),
        (lambda x: x[0], lambda z: z, "floating tensor"),
        (lambda x: x, lambda z: z @ torch.zeros(3, 3), "failed on images"),
        (lambda x: x, lambda z: (z, z), "decode: returned tuple"),
    ],
)
def test_a_model_that_does_not_fit_is_named(encode, decode, message):
    if "floating tensor" in message:
        encode = lambda x: x.expand(2, -1, -1, -1)  # noqa: E731
    with pytest.raises(InputError, match=message):
        check_autoencoder(SimpleNamespace(encode=encode, decode=decode), IMAGES)


def test_latent_std_ignores_what_all_images_share():
    generator = torch.Generator().manual_seed(0)
    layout = 100 * torch.randn(1, 3, 4, generator=generator)
    latents = layout + 2 * torch.randn(5000, 3, 4, generator=generator)
    whole, parts = measure_latent_std([latents]), measure_latent_std(latents.split(999))
    assert whole.item() == pytest.approx(2.0, rel=0.02)
    assert whole.item() == pytest.approx(latents.var(0).mean().sqrt().item(), rel=1e-5)
    torch.testing.assert_close(parts, whole)
    with pytest.raises(InputError, match="two or more"):
        measure_latent_std([latents[:1]])
