"""Whatever the classifier is: the numbers of a plain loop over it, with the dropout of its own training mode."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import tsynd
from tsynd.ops import reference
from tsynd.posteriors.last_layer import HeadGaussian, SampledHead
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.utils.errors import InputError

PASSES = 600


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def mutual_information(logits: Tensor) -> Tensor:
    return reference.uncertainty_value(logits.detach().double())


def loop(network: nn.Module, x: Tensor, passes: int = PASSES) -> Tensor:
    """T passes of the network as it stands in training mode but for its batch norms, [T, B, C]."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.manual_seed(5)
    with torch.no_grad():
        found = [out if isinstance(out := network(x), Tensor) else first(out) for _ in range(passes)]
    network.eval()
    return torch.stack(found).float()


def first(out: Any) -> Tensor:
    return out.logits if hasattr(out, "logits") else out["logits"] if isinstance(out, dict) else out[0]


def same_law(network: nn.Module, x: Tensor, passes: int = PASSES) -> MCDropout:
    """Mutual informations of independent masks are a loop's within its Monte-Carlo error."""
    dtype = next(network.parameters()).dtype
    posterior = MCDropout(network.eval(), passes, "independent")
    with torch.no_grad():
        ours = posterior.logits(x).float()
        value = posterior.uncertainty(x)
    theirs = loop(network, x.to(dtype), passes)
    torch.testing.assert_close(value.double(), mutual_information(ours), rtol=1e-3, atol=1e-4)
    wanted = mutual_information(theirs)
    tenths = [torch.stack([mutual_information(part) for part in found.chunk(10)]) for found in (ours, theirs)]
    error = sum(part.var(0) / 10 for part in tenths) ** 0.5
    assert ((value - wanted).abs() < 6 * error + 0.02 * wanted + 1e-5).all(), (value, wanted, error)
    return posterior


def head(*before: nn.Module, last: nn.Module | None = None, p: float = 0.5) -> nn.Sequential:
    torch.manual_seed(3)
    body = [nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(p), *before]
    linear = nn.Linear(32, 4)
    nn.init.normal_(linear.weight, 0, 0.6)
    return nn.Sequential(*body, linear if last is None else last).eval()


def temperature(network: nn.Sequential) -> nn.Module:
    network[-1].register_forward_hook(lambda module, inputs, out: out / 3)
    return network


def halved_features(network: nn.Sequential) -> nn.Module:
    network[-1].register_forward_pre_hook(lambda module, inputs: (F.normalize(inputs[0]) * 4,))
    return network


def hooked_dropout(network: nn.Sequential) -> nn.Module:
    network[3].register_forward_hook(lambda module, inputs, out: out * 0.3)
    return network


def hooked_whole(network: nn.Sequential) -> nn.Module:
    network.register_forward_hook(lambda module, inputs, out: out * 0.5)
    return network


def pruned(network: nn.Sequential) -> nn.Module:
    prune.random_unstructured(network[-1], "weight", amount=0.5)
    return network


def compiled(network: nn.Sequential) -> nn.Module:
    network.compile(backend="eager")
    return network


def replaced_forward(network: nn.Sequential) -> nn.Module:
    layer = network[-1]
    layer.forward = lambda z: F.linear(z, layer.weight, layer.bias) / 2
    return network


def own() -> nn.Module:
    torch.manual_seed(3)
    network = tsynd.SmallResNet(1, 4, widths=(4, 8), dropout="stages").eval()
    nn.init.normal_(network.head.weight, 0, 1.0)
    return network


class Timm(nn.Module):
    """As timm's models: ``drop_rate`` beside modules, drops by function in the head, ``if self.training``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.norm, self.drop_rate = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), 0.4
        self.act_drop, self.head = nn.Dropout2d(0.2), nn.Linear(8, 4)
        nn.init.normal_(self.head.weight, 0, 2.0)

    def forward(self, images: Tensor) -> Tensor:
        z = self.act_drop(self.norm(self.stem(images)).relu()).mean((2, 3))
        if self.drop_rate > 0.0:
            z = F.dropout(z, p=self.drop_rate, training=self.training)
        return self.head(z)


class Written(nn.Module):
    """Dropout written in other ways than as a layer between two others."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.way, self.temperature = way, 2.0
        self.wide, self.drop, self.head = nn.Linear(256, 32), nn.Dropout(0.5), nn.Linear(32, 4)
        nn.init.normal_(self.head.weight, 0, 0.6)

    def forward(self, images: Tensor) -> Tensor:
        z = self.wide(images.flatten(1) / (images.amax() ** 8 if self.way == "brightest" else 1)).relu()
        if self.way == "in place":
            F.dropout(z, 0.5, self.training, inplace=True)
        elif self.way == "in place by torch":
            torch.dropout_(z, 0.5, self.training)
        elif self.way == "in place by torch, named":
            z = torch.alpha_dropout_(z, p=0.5, train=self.training)
        elif self.way == "of weights":
            return F.linear(z, self.drop(self.head.weight), self.head.bias)
        elif self.way == "both sides":
            both = self.head(self.drop(torch.cat([z, -z])))
            return (both[: len(z)] + both[len(z) :]) / 2
        else:
            z = self.drop(z)
        if self.way == "thrice":
            return sum(self.head(self.drop(z)) for _ in range(3))
        return self.head(z) / self.temperature


class Flagged(nn.Module):
    """Dropout that is there in training alone, in four ways, beside a visible one."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.way, self.qkv, self.rate = way, nn.Linear(16, 48), 0.5
        self.visible, self.head = nn.Dropout(0.05), nn.Linear(256, 4)
        nn.init.normal_(self.head.weight, 0, 0.3)

    def forward(self, images: Tensor) -> Tensor:
        z = images.flatten(1, 2)
        if self.way == "flag":
            z = F.dropout(z, 0.5, self.training)
        elif self.way == "rate":
            z = F.dropout(z, 0.5 if self.training else 0.0)
        elif self.way == "branch" and self.training:
            z = F.dropout(z, 0.5)
        elif self.way == "attention":
            q, k, v = self.qkv(z).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            z = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
            z = z.transpose(1, 2)
        elif self.way == "never":
            z = F.dropout(z, 0.5, training=False)
        return self.head(self.visible(z.flatten(1)))


class KeptInEval(nn.Module):
    """Its own ``train`` keeps the encoder in eval mode, as those of fine-tuned networks do."""

    def __init__(self, by_function: bool) -> None:
        super().__init__()
        self.encoder, self.by_function, self.head = head()[:4], by_function, head()[3:]

    def train(self, mode: bool = True) -> KeptInEval:
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.encoder(images), 0.5, self.by_function and self.encoder.training))


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Returns(nn.Module):
    def __init__(self, network: nn.Module, wrap: Callable[[Tensor, bool], Any]) -> None:
        super().__init__()
        self.network, self.wrap = network, wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.network(images), self.training)


def hugging() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_channels": 1, "num_labels": 4, "hidden_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    network = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, **layers, **rates))
    nn.init.normal_(network.classifier.weight, 0, 0.5)
    return network.eval()


def monai() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    torch.manual_seed(0)
    network = nets.ViT(
        1, (16, 16), (8, 8), 24, 32, 1, 2, classification=True, num_classes=4, dropout_rate=0.3, spatial_dims=2,
        post_activation="",
    )  # fmt: skip
    return network.eval()


class UnbatchedRank(nn.Module):
    """Dropout1d on [B, C] and Dropout3d on [B, C, H, W]: torch takes B for the channels, and drops whole images."""

    def __init__(self, three: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.drop, self.head, self.three = (nn.Dropout3d if three else nn.Dropout1d)(0.4), nn.Linear(256, 4), three

    def forward(self, images: Tensor) -> Tensor:
        z = self.drop(images if self.three else images.flatten(1))
        return self.head(4 * z.flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "own": own,
    "head": head,
    "timm-like": Timm,
    "transformers": hugging,
    "monai": monai,
    "data parallel": lambda: nn.DataParallel(hugging()),
    "tuple": lambda: Returns(head(), lambda z, training: (z, z.detach())),
    "tuple in training alone": lambda: Returns(head(), lambda z, training: (z, z) if training else z),
    "list": lambda: Returns(head(), lambda z, training: [z, [z]]),
    "dict": lambda: Returns(head(), lambda z, training: {"features": 0, "logits": z}),
    "data class": lambda: Returns(head(), lambda z, training: Output(z, z)),
    "wrapped twice": lambda: Returns(nn.DataParallel(Returns(head(), lambda z, t: z)), lambda z, t: (z,)),
    "hook: temperature": lambda: temperature(head()),
    "hook: before the head": lambda: halved_features(head()),
    "hook: on the dropout": lambda: hooked_dropout(head()),
    "hook: on the whole": lambda: hooked_whole(head()),
    "hook: on an identity": lambda: hooked_dropout(head(nn.Identity())),
    "another forward": lambda: replaced_forward(head()),
    "weight norm": lambda: head(last=weight_norm(nn.Linear(32, 4))),
    "weight norm, parametrized": lambda: head(last=parametrizations.weight_norm(nn.Linear(32, 4))),
    "spectral norm": lambda: head(last=parametrizations.spectral_norm(nn.Linear(32, 4))),
    "spectral norm, by hook": lambda: head(last=spectral_norm(nn.Linear(32, 4))),
    "pruned": lambda: pruned(head()),
    "half": lambda: head().half(),
    "bfloat16": lambda: head().bfloat16(),
    "double": lambda: head().double(),
    "p = 1 beside 0.5": lambda: nn.Sequential(nn.Dropout(1.0), nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 4)),
    "p = 0.002": lambda: head(p=0.002),
    "a part kept in eval mode": lambda: KeptInEval(False),
    "a part kept in eval mode, by function": lambda: KeptInEval(True),
    "unbatched 1d": lambda: UnbatchedRank(False),
    "unbatched 3d": lambda: UnbatchedRank(True),
    "compiled": lambda: torch.compile(head(), backend="eager"),
    "compiled in place": lambda: compiled(head()),
    "compiled transformers": lambda: torch.compile(hugging(), backend="eager"),
    "compiled and hooked": lambda: hooked_whole(torch.compile(head(), backend="eager")),
    **{way: lambda way=way: Written(way) for way in ("in place", "of weights", "both sides", "brightest", "thrice")},
    **{way: lambda way=way: Written(way) for way in ("in place by torch", "in place by torch, named")},
    **{f"in training: {way}": lambda way=way: Flagged(way) for way in ("flag", "rate", "branch", "attention", "never")},
}
PLANS = {
    "own": "batched tail", "head": "fused head", "in training: branch": "batched tail", "half": "fused head",
    "compiled": "fused head", "compiled in place": "fused head", "of weights": "pass by pass",
    "brightest": "pass by pass",
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_mc_dropout_is_a_plain_loop(name: str, x: Tensor) -> None:
    network = NETWORKS[name]()
    if name.startswith("spectral"):  # its training mode would move the vectors of its power iteration
        network[-1].eval()
        network[-1].train = lambda mode=True: network[-1]
    posterior = same_law(network, x, 300 if name == "own" else PASSES)
    assert posterior.plan == PLANS.get(name, posterior.plan)
    # the same numbers, to rounding, one pass after another
    ours, slow = MCDropout(network, 6, seed=2), MCDropout(network, 6, seed=2, fast=False)
    with torch.no_grad():
        rough = next(network.parameters()).dtype in (torch.float16, torch.bfloat16)
        tolerance = {"rtol": 5e-2, "atol": 5e-2} if rough else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(ours.logits(x).float(), slow.logits(x).float(), **tolerance)
    assert slow.plan == "pass by pass"


def test_the_loop_has_the_fast_ways_gradient(x: Tensor) -> None:
    found = []
    for fast in (True, False):
        leaf = x.clone().requires_grad_(True)
        value = MCDropout(Timm().eval(), 5, fast=fast).uncertainty(leaf)
        found.append(torch.autograd.grad(value.sum(), leaf)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [
    "own", "timm-like", "transformers", "monai", "tuple", "dict", "data class", "wrapped twice", "hook: temperature",
    "hook: before the head", "compiled", "compiled transformers", "half", "bfloat16", "double",
])  # fmt: skip
def test_ensembles_are_their_networks(name: str, x: Tensor) -> None:
    networks = [NETWORKS[name](), NETWORKS[name]()]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(1.3)
        dtype = next(networks[0].parameters()).dtype
        outs = [network.eval()(x.to(dtype)) for network in networks]
        wanted = mutual_information(torch.stack([out if isinstance(out, Tensor) else first(out) for out in outs]))
        value = tsynd.Ensemble(networks).uncertainty(x)
    rough = {"rtol": 2e-2, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(value.double(), wanted, **rough)


@pytest.mark.parametrize("structure", [None, "full", "kron"])
@pytest.mark.parametrize("name", [
    "own", "head", "timm-like", "transformers", "monai", "tuple", "dict", "data class", "wrapped twice", "compiled",
    "compiled transformers", "hook: on the dropout", "hook: on an identity", "half", "double",
])  # fmt: skip
def test_sampled_heads_are_their_samples(name: str, structure: str | None, x: Tensor) -> None:
    network = NETWORKS[name]().eval()
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    mean = torch.cat([p.detach().double().flatten() for p in linear.parameters()])
    gaussian = HeadGaussian("diag", {"mean": mean, "std": torch.full_like(mean, 0.2)})
    if structure is not None:
        pytest.importorskip("laplace", reason="laplace-torch is not installed")
        data = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 4
        gaussian = tsynd.LaplaceHead.fit(network, data, structure=structure, prior_precision=9.0).gaussian
        torch.testing.assert_close(gaussian.tensors["mean"], mean, rtol=1e-6, atol=1e-7)
    value = SampledHead(network, gaussian, samples=8).uncertainty(x)
    logits, twin = [], copy.deepcopy(getattr(network, "_orig_mod", network))
    layer = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for row in gaussian.draw(8, 0):
            torch.nn.utils.vector_to_parameters(row.to(mean.dtype), layer.double().parameters())
            layer.to(next(twin.parameters()).dtype)
            out = twin(x.to(next(twin.parameters()).dtype))
            logits.append(out if isinstance(out, Tensor) else first(out))
    assert value.max() > 1e-3
    rough = {"rtol": 5e-2, "atol": 1e-2} if name == "half" else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(value.double(), mutual_information(torch.stack(logits)), **rough)


@pytest.mark.parametrize(
    "name", ["hook: temperature", "hook: before the head", "hook: on the whole", "another forward"]
)
def test_logits_that_are_not_the_last_layers_are_refused(name: str, x: Tensor) -> None:
    data = x, torch.arange(6) % 4
    with pytest.raises(InputError, match=r"classifier: its logits are not the output of layer '4'"):
        SampledHead(NETWORKS[name](), identity(head())).uncertainty(x)
    pytest.importorskip("laplace", reason="laplace-torch is not installed")
    with pytest.raises(InputError, match=r"classifier: its logits are not the output of layer '4'"):
        tsynd.LaplaceHead.fit(NETWORKS[name](), data)


def test_a_regression_laplace_is_refused() -> None:
    laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed")
    model = nn.Sequential(OrderedDict(body=nn.Linear(4, 5), head=nn.Linear(5, 3)))
    found = laplace.Laplace(model, "regression", "last_layer", "full", last_layer_name="head")
    data = torch.utils.data.TensorDataset(torch.randn(20, 4), torch.randn(20, 3))
    found.fit(torch.utils.data.DataLoader(data, batch_size=5))
    with pytest.raises(InputError, match=r"laplace: .*regression.*wanted.*classification"):
        tsynd.LaplaceHead(found)


# --- what moves after the posterior was made


def change_weights(network: nn.Module) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    network(torch.rand(6, 1, 16, 16)).square().sum().backward()
    optimizer.step()


def load_others(network: nn.Module) -> None:
    network.load_state_dict({key: value * 1.5 for key, value in network.state_dict().items()})


def assign_others(network: nn.Module) -> None:
    others = {key: value * 1.5 for key, value in network.state_dict().items()}
    network.load_state_dict(others, assign=True)


def add_hook(network: nn.Module) -> None:
    network[-1].register_forward_hook(lambda module, inputs, out: out / 3)


def another_rate(network: nn.Module) -> None:
    network[3].p = 0.9


def another_setting(network: Any) -> None:
    network.temperature = 0.5


def another_head(network: nn.Module) -> None:
    network[-1] = nn.Linear(32, 4)


def parametrize_head(network: nn.Module) -> None:
    parametrizations.weight_norm(network[-1])
    with torch.no_grad():
        network[-1].parametrizations.weight.original0.mul_(1.5)


def prune_head(network: nn.Module) -> None:
    prune.random_unstructured(network[-1], "weight", amount=0.5)


@pytest.mark.parametrize("make", [
    head, lambda: head(last=weight_norm(nn.Linear(32, 4))), lambda: Buffered(), lambda: Written("layer"),
])  # fmt: skip
@pytest.mark.parametrize("change", [
    change_weights, load_others, assign_others, add_hook, another_rate, another_head, parametrize_head, prune_head,
    another_setting, nn.Module.half, nn.Module.double,
])  # fmt: skip
def test_posteriors_follow_the_network(make: Callable[[], nn.Module], change: Callable[[Any], Any], x: Tensor) -> None:
    network = make().eval()
    bound = change in (add_hook, another_rate, another_head, parametrize_head, prune_head)
    if bound and (not isinstance(network, nn.Sequential) or hasattr(network[-1], "weight_g")):
        pytest.skip("for plain sequences")
    if change is another_setting and not hasattr(network, "temperature"):
        pytest.skip("for networks with a setting")
    posterior = MCDropout(network, 6, seed=2)
    sampled = SampledHead(network, identity(network)) if make is head and not bound else None
    with torch.no_grad():
        before = posterior.logits(x).float()
        if sampled is not None:
            sampled.logits(x)
    change(network)
    with torch.no_grad():
        after = posterior.logits(x).float()
        fresh = MCDropout(network, 6, seed=2, fast=False).logits(x).float()
        if sampled is not None:
            torch.testing.assert_close(sampled.logits(x), SampledHead(network, sampled.gaussian).logits(x))
    rough = change is nn.Module.half
    torch.testing.assert_close(after, fresh, rtol=5e-2 if rough else 1e-3, atol=5e-2 if rough else 1e-4)
    if change not in (nn.Module.half, nn.Module.double):
        assert (after - before).abs().max() > 1e-3


class Buffered(nn.Module):
    """Works with parameters and buffers of its own, and with what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.drop = nn.Parameter(torch.randn(4, 256) / 8), nn.Dropout(0.5)
        self.register_buffer("scale", torch.rand(256))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self.drop(images.flatten(1) * self.scale.sqrt()), self.weight * 2)


def identity(network: nn.Module) -> HeadGaussian:
    mean = torch.cat([p.detach().double().flatten() for p in network[-1].parameters()])
    return HeadGaussian("diag", {"mean": mean, "std": torch.full_like(mean, 0.1)})


# --- images that share a batch


class Mixing(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.drop, self.wide = nn.Conv2d(1, 8, 3), nn.Dropout2d(0.5), nn.Conv2d(8, 8, 14)
        self.norm, self.head = nn.BatchNorm2d(8, track_running_stats=False) if norm else None, nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        z = self.wide(self.drop(self.conv(images)))
        return self.head((z - z.mean(0) if self.norm is None else self.norm(z)).flatten(1))


@pytest.mark.parametrize("norm", [True, False])
def test_batch_statistics_are_those_of_one_pass(norm: bool, x: Tensor) -> None:
    network = Mixing(norm).eval()
    posterior = MCDropout(network, 600)
    with pytest.warns(RuntimeWarning, match="other logits beside other images"), torch.no_grad():
        value = posterior.uncertainty(x)
    assert posterior.plan == "pass by pass"
    wanted = mutual_information(shared_masks(network, x, 600))
    torch.testing.assert_close(value.double(), wanted, rtol=0.25, atol=0.01)


def shared_masks(network: Any, x: Tensor, passes: int) -> Tensor:
    """As a loop with one mask for all images."""
    found = []
    with torch.no_grad():
        for _ in range(passes):
            mask = (torch.rand(1, 8, 1, 1) < 0.5) * 2.0
            handle = network.drop.register_forward_hook(lambda module, inputs, out, mask=mask: inputs[0] * mask)
            found.append(network(x))
            handle.remove()
    return torch.stack(found)


# --- what is no logit


@pytest.mark.parametrize(("last", "task"), [(nn.Softmax(1), "multiclass"), (nn.Sigmoid(), "multilabel")])
def test_probabilities_are_taken_back_to_logits(last: nn.Module, task: str, x: Tensor) -> None:
    plain, ended = head(), nn.Sequential(head(), last)
    with pytest.warns(RuntimeWarning, match="it gives probabilities"):
        value = tsynd.uncertainty(ended, x, task=task)
    torch.testing.assert_close(value, tsynd.uncertainty(plain, x, task=task), rtol=1e-3, atol=1e-5)
    twin = nn.Sequential(copy.deepcopy(plain), last)
    with torch.no_grad():
        twin[0][-1].weight.neg_()
    other = tsynd.uncertainty(tsynd.Ensemble([ended, twin]), x, task=task)
    torch.testing.assert_close(
        other, tsynd.uncertainty(tsynd.Ensemble([plain, twin[0]]), x, task=task), rtol=1e-3, atol=1e-5
    )
    cast = Returns(ended, lambda z, training: z.double().clone())  # in other clothes, seen on a single image
    ensembles = [tsynd.Ensemble([network, network]) for network in (cast, plain)]
    values = [ensemble.logits(x[:1]) - ensemble.logits(x[1:2]) for ensemble in ensembles]
    torch.testing.assert_close(values[0].float().diff(), values[1].diff(), rtol=1e-2, atol=1e-2)
    labels = torch.arange(6) % 4 if task == "multiclass" else (torch.arange(24).reshape(6, 4) % 3 == 0).float()
    scores = [tsynd.evaluate(net, (x, labels), task=task, conditions=("clean",))["clean"] for net in (plain, ended)]
    assert scores[0]["nll"] == pytest.approx(scores[1]["nll"], rel=1e-3)
    if task == "multiclass":
        with pytest.raises(InputError, match=r"ends in a softmax.*multiclass"):
            MCDropout(ended).uncertainty(x, task="multilabel")
        sampled = [SampledHead(net, identity(plain), samples=6).uncertainty(x) for net in (plain, ended)]
        torch.testing.assert_close(sampled[0], sampled[1])


def test_small_logits_are_no_probabilities(x: Tensor) -> None:
    network = head()
    with torch.no_grad():
        network[-1].weight.mul_(1e-3)
        network[-1].bias.fill_(0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MCDropout(network, 4).uncertainty(x)


def test_one_logit_is_refused_as_one_of_several_classes(x: Tensor) -> None:
    one = head(last=nn.Linear(32, 1))
    two = copy.deepcopy(one)
    two[-1].weight.data.neg_()
    for classifier in (one, tsynd.Ensemble([one, two]), SampledHead(one, identity(one))):
        with pytest.raises(InputError, match=r"gives one logit.*task='multilabel'"):
            tsynd.uncertainty(classifier, x)
        assert (tsynd.uncertainty(classifier, x, task="multilabel") > 0).all()
    with pytest.raises(InputError, match="gives one logit"):
        tsynd.synthesize(tsynd.SmallAutoencoder(1), one, x, latent_std=1.0, progress=False)


# --- rates


def test_rates_at_the_edges(x: Tensor) -> None:
    for p in (0.0, 1.0):
        with pytest.raises(InputError, match="no active dropout"):
            MCDropout(head(p=p)).uncertainty(x)
    rates = []
    for p in (0.0005, 0.002, 0.0039):
        network = nn.Sequential(nn.Flatten(), nn.Dropout(p), Counts())
        logits = MCDropout(network, 4000).logits(torch.ones(1, 1, 16, 16))
        rates.append(float(logits[..., 0].mean()) / p)
    assert rates == pytest.approx([1, 1, 1], rel=0.1)


class Counts(nn.Module):
    """The share of zeros, as a logit."""

    def forward(self, z: Tensor) -> Tensor:
        return (z == 0).float().mean(1, keepdim=True).expand(-1, 2)


# --- what is said


class Noisy(nn.Module):
    def __init__(self, always: bool) -> None:
        super().__init__()
        self.always, self.drop, self.head = always, nn.Dropout(0.5), nn.Linear(256, 4)

    def forward(self, images: Tensor) -> Tensor:
        z = images.flatten(1)
        if self.training or self.always:
            z = z + 0.01 * torch.randn_like(z)
        return self.head(self.drop(z))


def test_other_randomness_is_said(x: Tensor) -> None:
    with pytest.warns(RuntimeWarning, match="random numbers in training besides dropout.*randn_like"):
        MCDropout(Noisy(False).eval(), 4).uncertainty(x)
    with pytest.warns(RuntimeWarning, match="random numbers in eval mode"):
        MCDropout(Noisy(True).eval(), 4).uncertainty(x)
    lstm = nn.LSTM(16, 8, 2, dropout=0.5, batch_first=True)
    recurrent = nn.Sequential(nn.Flatten(1, 2), Last(lstm), nn.Dropout(0.5), nn.Linear(8, 4)).eval()
    with pytest.warns(RuntimeWarning, match="besides dropout.*lstm"):
        MCDropout(recurrent, 4).uncertainty(x)


class Last(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, rows: Tensor) -> Tensor:
        return self.lstm(rows)[0][:, -1]


def test_looking_leaves_no_trace(x: Tensor) -> None:
    network = nn.Sequential(Timm(), nn.BatchNorm1d(4), parametrizations.spectral_norm(nn.Linear(4, 4)))
    network.train()
    network[1].eval()
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    noisy = Noisy(False)
    random = torch.get_rng_state()
    MCDropout(network, 4).uncertainty(x)
    MCDropout(noisy, 4).uncertainty(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
