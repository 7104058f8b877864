"""The default networks."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

from tsynd.utils.errors import InputError

pytest.importorskip("monai")

from tsynd.models.networks import SmallAutoencoder, SmallResNet


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
