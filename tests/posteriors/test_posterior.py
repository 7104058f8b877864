"""Splitting at the first dropout, and what the passes compute."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyClassifier, whole_network
from torch import Tensor, nn

from tsynd.ops import reference
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Ensemble
from tsynd.utils.errors import InputError

IDS = torch.tensor([5, 9, 100, 3])


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 100, 3)


class SizesBefore(Base):
    def forward(self, x: Tensor) -> Tensor:
        count = x.size(0)
        x = F.dropout2d(self.norm(self.conv(x)), 0.3, self.training)
        return self.head(F.dropout(x.relu(), 0.2, training=self.training).view(count, -1))


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(self.norm(self.conv(x)), 0.3, self.training)
        return self.head(F.alpha_dropout(x.relu(), 0.2, training=self.training).flatten(1))


class Residual(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).flatten(1)
        return self.head(y + F.dropout(y, 0.5))


class Branching(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1:  # control flow on data: torch.fx cannot trace it
            x = x * 1
        return self.head(F.dropout(self.norm(self.conv(x)), 0.3, self.training).flatten(1))


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class PlainBranching(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x if x.sum() > -1 else -x).flatten(1))


def flattened_head() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Dropout(0.4), nn.Identity(), nn.Flatten(), nn.Linear(8, 3))


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 4, 24, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(144, 3))


NETWORKS = {
    "fused head": [TinyClassifier, flattened_head],
    "batched tail": [lambda: TinyClassifier(early=True), Functional, Residual],
    "whole network": [Branching, SizesBefore, transformer],
}
CASES = [(plan, make) for plan, makes in NETWORKS.items() for make in makes]


@pytest.mark.parametrize("masks", ["shared", "independent"])
@pytest.mark.parametrize(("plan", "make"), CASES)
def test_every_plan_gives_the_same_posterior(plan: str, make: object, masks: str, x: Tensor) -> None:
    network = make()  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if plan == "whole network" else "error", RuntimeWarning)
        posterior = MCDropout(network, samples=6, masks=masks, seed=3)
        posterior.logits(x)
    assert posterior.plan == plan
    logits = posterior.logits(x, IDS)
    assert logits.shape == (6, 4, 3)
    # the oracle: the whole network repeated, every dropout call replaced by the addressed one
    whole = whole_network(network, 6, masks, 3)
    torch.testing.assert_close(whole.logits(x, IDS), logits, rtol=1e-4, atol=1e-5)
    for objective in reference.OBJECTIVES:
        value = posterior.uncertainty(x, IDS, objective)
        wanted = reference.uncertainty_value(logits.double(), objective)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-6)
    alone = torch.cat([posterior.logits(x[i : i + 1], IDS[i : i + 1]) for i in range(4)], 1)
    torch.testing.assert_close(alone, logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[0], logits[1])


def test_masks_follow_the_law_of_dropout(x: Tensor) -> None:
    network = TinyClassifier()
    posterior = MCDropout(network, samples=4000, masks="independent", seed=0)
    with torch.no_grad():
        ours = posterior.logits(x[:1])[:, 0]
        network.eval().dropout.train()
        torch.manual_seed(0)
        theirs = network(x[:1].expand(4000, -1, -1, -1))
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread / 4000**0.5 * 2**0.5).all()
    assert ((ours.std(0) / spread).log().abs() < 0.1).all()


def test_shared_masks_are_shared_and_independent_ones_are_not() -> None:
    x = torch.rand(1, 1, 12, 12).expand(5, -1, -1, -1)
    network = TinyClassifier()
    same = MCDropout(network, 4, "shared").logits(x)
    assert torch.allclose(same, same[:, :1].expand_as(same), atol=1e-5)
    own = MCDropout(network, 4, "independent").logits(x)
    assert (own[:, 0] - own[:, 1]).abs().max() > 1e-2


@pytest.mark.parametrize("make", [TinyClassifier, lambda: TinyClassifier(early=True)])
@pytest.mark.parametrize("masks", ["shared", "independent"])
def test_gradient_reaches_the_images(make: object, masks: str, x: Tensor) -> None:
    network = make()  # type: ignore[operator]
    posterior = MCDropout(network, samples=5, masks=masks)
    leaf = x.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(posterior.uncertainty(leaf, IDS).sum(), leaf)
    value = reference.uncertainty_value(posterior.logits(leaf, IDS))
    (wanted,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


def test_state_is_restored(x: Tensor) -> None:
    network = TinyClassifier().train()
    network.head.bias.requires_grad_(False)
    running = network.body[1].running_mean.clone()
    posterior = MCDropout(network, samples=3)
    modes = {name: module.training for name, module in network.named_modules()}
    wants = {name: p.requires_grad for name, p in network.named_parameters()}
    with contextlib.suppress(KeyError), posterior.frozen():
        posterior.uncertainty(x)
        assert not any(p.requires_grad for p in network.parameters())
        raise KeyError  # also when something fails inside
    posterior.uncertainty(x)
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert {name: p.requires_grad for name, p in network.named_parameters()} == wants
    assert torch.equal(network.body[1].running_mean, running)


def test_posterior_follows_the_weights(x: Tensor) -> None:
    network = TinyClassifier()
    posterior = MCDropout(network, samples=5)
    with posterior.frozen():
        before = posterior.uncertainty(x)
    with torch.no_grad():
        network.head.weight.mul_(2)
    with posterior.frozen():
        assert (posterior.uncertainty(x) > before).all()


def test_no_dropout_is_an_error(x: Tensor) -> None:
    for network in (Plain(), nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(144, 2))):
        with pytest.raises(InputError, match=r"no active dropout.*zero everywhere.*nn\.Dropout.*Ensemble"):
            MCDropout(network)
    with pytest.warns(RuntimeWarning, match="cannot be split"):
        posterior = MCDropout(PlainBranching())
    with pytest.raises(InputError, match="no active dropout"):
        posterior.uncertainty(x)


def test_fallback_says_so_once(x: Tensor) -> None:
    with pytest.warns(RuntimeWarning, match="Branching cannot be split.*whole network runs 4 times"):
        posterior = MCDropout(Branching(), samples=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.uncertainty(x)
        posterior.uncertainty(x)


def test_ensemble(x: Tensor) -> None:
    networks = [Plain(), Plain()]
    with torch.no_grad():
        networks[1].head.weight.neg_()
    posterior = Ensemble(networks)
    value = posterior.uncertainty(x)
    wanted = reference.uncertainty_value(torch.stack([n.eval()(x) for n in networks]))
    torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(posterior.probabilities(x).sum(1), torch.ones(4))
    with pytest.raises(InputError, match="at least two"):
        Ensemble([Plain()])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classifier": 3}, "classifier: got int"),
        ({"samples": 0}, "samples: got 0"),
        ({"samples": 2.5}, "samples: got 2.5"),
        ({"masks": "fresh"}, "masks: got 'fresh'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MCDropout(**{"classifier": TinyClassifier(), **arguments})  # type: ignore[arg-type]


def test_classifier_must_give_logits(x: Tensor) -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(1, 3, 3))
    with pytest.raises(InputError, match=r"wanted logits \[images, classes\]"):
        MCDropout(network).uncertainty(x)
