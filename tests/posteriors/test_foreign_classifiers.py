"""Classifiers of transformers, MONAI and torch itself: their logits, their attention and their residual branches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TinyClassifier, whole_network
from torch import Tensor, fx, nn
from torch.nn import functional as F

import tsynd
from tsynd.models.classifier import ClassifierAdapter
from tsynd.posteriors.dropout import MaskSource
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Ensemble
from tsynd.posteriors.whole_network import AddressedDropoutMode
from tsynd.utils.errors import InputError

IDS = torch.tensor([5, 9, 100, 3])
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
SMALL = {"num_channels": 1, "image_size": 28, "num_labels": 3}
VIT = SMALL | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def hugging(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def vit(attention: str = "sdpa", **options: Any) -> nn.Module:
    return hugging("ViT", **VIT, patch_size=7, attn_implementation=attention, **options)


def swin(attention: str = "sdpa", **options: Any) -> nn.Module:
    sizes = {"patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 7}
    return hugging("Swin", **SMALL, **sizes, attn_implementation=attention, **options)


def convnext(**options: Any) -> nn.Module:
    sizes = {"patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}
    return hugging("ConvNext", num_channels=1, num_labels=3, **sizes, **options)


def with_head(network: nn.Module) -> nn.Module:
    network.classifier = nn.Sequential(nn.Dropout(0.5), network.classifier)
    return network


def quiet(network: nn.Module, *arguments: Any, **options: Any) -> MCDropout:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return MCDropout(network, *arguments, **options)


# --- the face


def test_logits_are_taken_out_of_what_models_return(x: Tensor) -> None:
    class Wraps(nn.Module):
        def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.wrap, self.head = wrap, nn.Linear(784, 3)

        def forward(self, images: Tensor) -> Any:
            return self.wrap(self.head(images.flatten(1)))

    for wrap in (lambda z: z, lambda z: SimpleNamespace(logits=z), lambda z: {"logits": z}, lambda z: (z, 3)):
        network = Wraps(wrap)
        logits = ClassifierAdapter(network)(x)
        assert torch.equal(logits, network.head(x.flatten(1)))
    for wrap in (lambda z: None, lambda z: {"loss": z}, lambda z: ()):
        with pytest.raises(InputError, match="without logits, wanted logits"):
            ClassifierAdapter(Wraps(wrap))(x)
    with pytest.raises(InputError, match="classifier: got int"):
        tsynd.as_classifier(3)  # type: ignore[arg-type]


def test_pixels_are_brought_to_the_models_range(x: Tensor) -> None:
    seen: list[Tensor] = []

    class Sees(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return images.flatten(1)

    network = Sees().eval()
    assert tsynd.as_classifier(network) is network
    adapter = tsynd.as_classifier(network, mean=0.5, std=0.25)
    adapter(x)
    torch.testing.assert_close(seen.pop(), (x - 0.5) / 0.25)
    assert not adapter.training
    tsynd.as_classifier(network, pixel_range=(-1, 1))(x)
    torch.testing.assert_close(seen.pop(), 2 * x - 1)
    tsynd.as_classifier(network, mean=(0.1, 0.2, 0.3), std=(1, 2, 4), grey=True)(x)
    got = seen.pop()
    assert got.shape == (4, 3, 28, 28)
    torch.testing.assert_close(got[:, 2:], (x - 0.3) / 4)
    with pytest.raises(InputError, match="got an adapter"):
        tsynd.as_classifier(adapter, mean=0.5, std=0.5)


def test_a_mapped_classifier_still_splits(x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        posterior = MCDropout(tsynd.as_classifier(TinyClassifier(), mean=0.5, std=0.5), 4)
        posterior.uncertainty(x)
    assert posterior.plan == "fused head"


def test_training_and_evaluation_take_hugging_face_models(x: Tensor) -> None:
    network, labels = with_head(convnext()), torch.tensor([0, 1, 2, 0])
    report = tsynd.fit_classifier(network, (x, labels), iterations=2, batch_size=4, progress=False)
    assert len(report.losses) == 2
    assert not network.training
    assert set(tsynd.evaluate(network, (x, labels), conditions=("clean",))) == {"clean"}
    posterior = Ensemble([network, with_head(convnext())])
    assert posterior.logits(x).shape == (2, 4, 3)


# --- split without a trace


@pytest.mark.parametrize("make", [convnext, vit])
def test_a_head_is_found_by_running(make: Callable[[], nn.Module], x: Tensor) -> None:
    network = with_head(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        posterior = MCDropout(network, samples=6, seed=3)
        logits = posterior.logits(x)
    assert posterior.plan == "fused head"
    for masks in ("shared", "independent"):
        posterior = quiet(network, 6, masks, 3)
        logits = posterior.logits(x, IDS)
        whole = whole_network(network, 6, masks, 3).logits(x, IDS)
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.uncertainty(x, IDS), tsynd.ops.logits_uncertainty(whole)[0])
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(posterior.uncertainty(leaf, IDS).sum(), leaf)
    assert gradient.abs().sum() > 0
    with posterior.frozen(), posterior.folded(), posterior.compiled(), posterior.staged(x[:1]):
        torch.testing.assert_close(posterior.uncertainty(x, IDS), tsynd.ops.logits_uncertainty(whole)[0])
    assert quiet(network, 6).features(x).shape == (4, 16)


def test_a_dropout_elsewhere_is_no_head(x: Tensor) -> None:
    network = vit()
    network.vit.embeddings.dropout.p = 0.3
    posterior = MCDropout(network, samples=4)
    with pytest.warns(RuntimeWarning, match="the whole network runs 4 times"):
        posterior.uncertainty(x)
    assert posterior.plan == "whole network"


# --- whole networks


def encoder(batch_first: bool) -> nn.Module:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(28, 4, 24, dropout=0.3, batch_first=batch_first)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(28, 3)

        def forward(self, images: Tensor) -> Tensor:
            rows = images.flatten(1, 2) if batch_first else images.flatten(1, 2).transpose(0, 1)
            return self.head(self.encoder(rows).mean(1 if batch_first else 0))

    return Tokens()


class BiasDropout(nn.Module):
    """A dropout on something that no image has a part in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bias, self.drop, self.head = nn.Parameter(torch.randn(1, 784)), nn.Dropout(0.5), nn.Linear(784, 3)

    def forward(self, images: Tensor) -> Tensor:
        images = images if images.sum() > -1 else -images
        return self.head(images.flatten(1) + self.drop(self.bias))


WHOLE: dict[str, Callable[[], nn.Module]] = {
    "vit eager": lambda: vit("eager", **DROPOUT),
    "vit sdpa": lambda: vit("sdpa", **DROPOUT),
    "vit attention alone": lambda: vit("sdpa", attention_probs_dropout_prob=0.2),
    "swin eager": lambda: swin("eager", **DROPOUT),
    "swin sdpa": lambda: swin("sdpa", **DROPOUT),
    "deit": lambda: hugging("DeiT", **VIT, patch_size=7, **DROPOUT),
    "encoder, batch first": lambda: encoder(True),
    "encoder, sequence first": lambda: encoder(False),
    "bias": BiasDropout,
}


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize("name", WHOLE)
def test_masks_do_not_depend_on_the_batch(name: str, masks: str, x: Tensor) -> None:
    posterior = quiet(WHOLE[name](), 5, masks, 3)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", RuntimeWarning)
        logits = posterior.logits(x, IDS)
        alone = torch.cat([posterior.logits(x[i : i + 1], IDS[i : i + 1]) for i in range(4)], 1)
        turned = posterior.logits(x.flip(0), IDS.flip(0)).flip(1)
    assert posterior.plan == "whole network"
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(turned, logits, rtol=1e-4, atol=1e-5)
    assert all((logits[0] - other).abs().max() > 1e-5 for other in logits[1:])
    assert not any(module.training for module in posterior.classifier.eval().modules())


def test_eager_and_fused_attention_have_the_same_masks(x: Tensor) -> None:
    one, two = quiet(vit("eager", **DROPOUT), 4), quiet(vit("sdpa", **DROPOUT), 4)
    two.classifier.load_state_dict(one.classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(one.logits(x), two.logits(x), rtol=1e-4, atol=1e-5)


def test_sequence_first_and_batch_first_have_the_same_law(x: Tensor) -> None:
    one, two = quiet(encoder(True), 400), quiet(encoder(False), 400)
    two.classifier.load_state_dict(one.classifier.state_dict())
    with torch.no_grad():
        a, b = one.logits(x[:1])[:, 0], two.logits(x[:1])[:, 0]
    assert ((a.std(0) / b.std(0)).log().abs() < 0.25).all()
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * a.std(0) * (2 / 400) ** 0.5).all()


@pytest.mark.parametrize("name", ["vit attention alone", "vit eager", "encoder, batch first"])
def test_masks_follow_the_law_of_dropout(name: str, x: Tensor) -> None:
    network = WHOLE[name]()
    posterior = quiet(network, 500, "independent")
    with torch.no_grad():
        ours = posterior.logits(x[:1])[:, 0]
        network.train()
        torch.manual_seed(0)
        theirs = ClassifierAdapter(network)(x[:1].expand(2000, -1, -1, -1))
    spread = theirs.std(0)
    assert spread.min() > 0
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread * (1 / 500 + 1 / 2000) ** 0.5).all()
    assert ((ours.std(0) / spread).log().abs() < 0.2).all()


def attention_case(grouped: bool) -> tuple[Tensor, ...]:
    generator, few = torch.Generator().manual_seed(0), 2 if grouped else 4
    return tuple(torch.randn(4, heads, 5, 6, generator=generator) for heads in (4, few, few))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.rand(5, 5) > 0.3},
        {"attn_mask": torch.randn(4, 1, 5, 5)},
        {"enable_gqa": True},
    ],
    ids=["plain", "causal", "scaled", "bool", "float", "grouped"],
)
def test_attention_is_torchs_where_nothing_is_dropped(options: dict[str, Any]) -> None:
    if "attn_mask" in options and options["attn_mask"].dtype == torch.bool:
        options["attn_mask"].fill_diagonal_(True)
    q, k, v = attention_case("enable_gqa" in options)
    off = MaskSource(1, 0, torch.zeros(1, dtype=torch.int64), active=False)
    with AddressedDropoutMode(off) as mode:
        got = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, **options)
        plain = F.scaled_dot_product_attention(q, k, v, **options)
    assert len(mode.shapes) == 1
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **options))
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v, **options))


def test_torchs_multi_head_attention_is_caught_whole() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).eval()
    tokens = torch.randn(6, 5, 8)
    wanted = attention(tokens, tokens, tokens)
    ids = torch.zeros(1, dtype=torch.int64)
    for weights in (True, False):
        with AddressedDropoutMode(MaskSource(3, 0, ids, active=False)) as mode:
            out, _ = attention(tokens, tokens, tokens, need_weights=weights)
        assert len(mode.shapes) == 1
        torch.testing.assert_close(out, wanted[0])
        axes = [(0, 2)] if mode.shapes[0][0] == 12 else [(0, 1)]
        same = tokens[:1].expand(6, -1, -1)
        with AddressedDropoutMode(MaskSource(3, 0, ids), 6, axes):
            out, _ = attention(same, same, same, need_weights=weights)
        assert torch.equal(out[0], out[1])  # two images of a pass share its mask
        assert not torch.equal(out[0], out[2])


@fx.wrap
def hidden_dropout(z: Tensor) -> Tensor:
    return F.dropout(z, 0.5)


def test_a_dropout_that_tracing_does_not_see_still_drops(x: Tensor) -> None:
    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.head = nn.Dropout(0.1), nn.Linear(784, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(hidden_dropout(self.drop(images.flatten(1))))

    posterior = MCDropout(Hides(), 8)
    with pytest.warns(RuntimeWarning, match="does not see all of its dropouts"):
        posterior.uncertainty(x)
    assert posterior.plan == "whole network"


def test_a_network_whose_dropouts_come_and_go_is_refused(x: Tensor) -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(784, 3)

        def forward(self, images: Tensor) -> Tensor:
            z = images.flatten(1)
            for _ in range(1 if len(images) < 3 else 2):
                z = F.dropout(z if z.sum() > -1 else -z, 0.5)
            return self.head(z)

    with pytest.raises(InputError, match="calls dropout more often"):
        quiet(Fickle(), 4).logits(x)


# --- stochastic depth


class DropPath(nn.Module):
    """As timm's and MONAI's."""

    def __init__(self, drop_prob: float = 0.5, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = torch.rand(len(x), *[1] * (x.dim() - 1)) < keep
        return x * mask / (keep if self.scale_by_keep else 1)


class Residual(nn.Module):
    def __init__(self, paths: list[nn.Module], traced: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.paths, self.traced = nn.ModuleList(paths), traced
        self.blocks = nn.ModuleList(nn.Linear(784, 784) for _ in paths)
        self.head = nn.Linear(784, 3)

    def forward(self, images: Tensor) -> Tensor:
        z = images.flatten(1)
        if not self.traced and z.sum() < -1:
            z = -z
        for block, path in zip(self.blocks, self.paths, strict=True):
            z = z + path(block(z))
        return self.head(z)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_bit_a_layer_and_pass(traced: bool, scaled: bool, x: Tensor) -> None:
    network = Residual([DropPath(0.5, scaled), DropPath(0.5, scaled)], traced).eval()
    posterior = quiet(network, 64, stochastic_depth=True)
    assert posterior.plan == ("batched tail" if traced else "whole network")
    with torch.no_grad():
        logits = posterior.logits(x)
        z = x.flatten(1)
        outcomes = []
        for first in (0, 1):
            for second in (0, 1):
                scale = 2 if scaled else 1
                a = z + first * scale * network.blocks[0](z)
                outcomes.append(network.head(a + second * scale * network.blocks[1](a)))
    distance = torch.stack([(logits - outcome).abs().amax((1, 2)) for outcome in outcomes])
    assert distance.amin(0).max() < 1e-4  # every pass is one of four networks, the same for all images
    assert distance.argmin(0).unique().tolist() == [0, 1, 2, 3]
    own = quiet(network, 64, "independent", stochastic_depth=True)
    with torch.no_grad():
        logits = own.logits(x, IDS)
        torch.testing.assert_close(own.logits(x[1:2], IDS[1:2]), logits[:, 1:2])
    distance = torch.stack([(logits - outcome).abs().amax(2) for outcome in outcomes])
    chosen = distance.argmin(0)
    assert distance.amin(0).max() < 1e-4
    assert not torch.equal(chosen[:, 0], chosen[:, 1])


def test_stochastic_depth_is_asked_for(x: Tensor) -> None:
    network = Residual([DropPath(), DropPath(0.0)], True)
    with pytest.raises(InputError, match="no active dropout"):
        MCDropout(network)
    assert (MCDropout(network, 16, stochastic_depth=True).uncertainty(x) > 0).all()
    network.paths[0].drop_prob = 0.0
    with pytest.raises(InputError, match="no active dropout"):
        MCDropout(network, stochastic_depth=True)


@pytest.mark.parametrize("make", [lambda: swin(drop_path_rate=0.4), lambda: convnext(drop_path_rate=0.4)])
def test_hugging_face_paths(make: Callable[[], nn.Module], x: Tensor) -> None:
    posterior = quiet(make(), 16, stochastic_depth=True)
    with torch.no_grad():
        logits = posterior.logits(x)
    assert 1 < len(logits[:, 0].unique(dim=0)) <= 4


def test_monai_and_torchvision_paths(x: Tensor) -> None:
    layers = pytest.importorskip("monai.networks.layers", reason="monai is not installed")

    class StochasticDepth(nn.Module):  # as torchvision's
        def __init__(self) -> None:
            super().__init__()
            self.p, self.mode = 0.5, "row"

        def forward(self, x: Tensor) -> Tensor:
            return x

    network = Residual([layers.DropPath(0.5), StochasticDepth()], True)
    with torch.no_grad():
        assert len(MCDropout(network, 32, stochastic_depth=True).logits(x)[:, 0].unique(dim=0)) == 4


# --- MONAI and timm


@pytest.mark.parametrize("name", ["densenet", "efficientnet"])
@pytest.mark.parametrize("dims", [2, 3])
def test_monai_classifiers(name: str, dims: int) -> None:
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    torch.manual_seed(0)
    if name == "densenet":
        sizes = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}
        network = nets.DenseNet(dims, 1, 3, dropout_prob=0.3, **sizes)
    else:
        network = nets.EfficientNetBN(
            "efficientnet-b0", pretrained=False, spatial_dims=dims, in_channels=1, num_classes=3
        )
    images = torch.rand(2, 1, *[32] * dims)
    posterior = quiet(network, 3)
    with torch.no_grad():
        logits = posterior.logits(images)
        torch.testing.assert_close(posterior.logits(images[1:]), logits[:, 1:], rtol=1e-3, atol=1e-4)
    assert logits.shape == (3, 2, 3)
    assert logits.std(0).min() > 0
    assert posterior.plan == ("batched tail" if name == "densenet" else "fused head")


@pytest.fixture
def timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        pytest.skip(f"timm cannot be imported here: {error}")
    return timm


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_timm_classifiers(timm: Any, name: str) -> None:
    torch.manual_seed(0)
    options = {"img_size": 32} if "224" in name else {}
    options |= {"patch_size": 4, "window_size": 4} if "swin" in name else {}
    options |= {"attn_drop_rate": 0.2} if name.startswith("vit") else {}
    network = timm.create_model(name, num_classes=3, in_chans=1, drop_rate=0.3, drop_path_rate=0.2, **options)
    images = torch.rand(2, 1, 32, 32)
    for depth in (False, True):
        posterior = quiet(network, 4, stochastic_depth=depth)
        with torch.no_grad():
            logits = posterior.logits(images)
            torch.testing.assert_close(posterior.logits(images[1:]), logits[:, 1:], rtol=1e-3, atol=1e-4)
        assert logits.std(0).min() > 0
