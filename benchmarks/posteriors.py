"""What a posterior costs: uncertainty and its gradient at the images, against one deterministic pass and its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, fx, nn

from benchmarks.harness import Row, check, measure, tolerance
from tsynd.fx.folding import FoldedGraph
from tsynd.models.networks import SmallResNet
from tsynd.ops import operators as ops
from tsynd.posteriors.laplace import LaplaceHead
from tsynd.posteriors.last_layer import SampledHead
from tsynd.posteriors.mc_dropout import MCDropout
from tsynd.posteriors.posterior import Ensemble, Posterior
from tsynd.utils.errors import require

__all__ = ["SHAPES", "run", "summary"]

# network, images of 28 x 28, T
SHAPES: dict[str, tuple[str, int, int]] = {
    "P1": ("SmallResNet", 64, 32),
    "P2": ("ViT", 16, 32),
    "GP1": ("SmallResNet", 1024, 32),
    "GP2": ("ViT", 256, 32),
}
FLOOR, _SETTLING = "floor: deterministic, once", "settling"
_CLASSES, _MEMBERS = 4, 5


class _Opaque(nn.Module):
    """Hides a network from tracing, as control flow on its data would."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.network(images if images.isfinite().all() else images.nan_to_num())
        return out


def _vit(hidden: float, attention: float) -> nn.Module:
    hugging = require("transformers", "huggingface")
    config = hugging.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=28,
        patch_size=4,
        num_channels=1,
        num_labels=_CLASSES,
        hidden_dropout_prob=hidden,
        attention_probs_dropout_prob=attention,
    )
    network: nn.Module = hugging.ViTForImageClassification(config)
    return network


def _with_head(network: nn.Module) -> nn.Module:
    network.classifier = nn.Sequential(nn.Dropout(0.5), network.classifier)  # type: ignore[arg-type]
    return network


def _sampled(network: nn.Module, samples: int, layer: str, device: str) -> dict[str, Posterior]:
    """Laplace over the last layer."""
    data = (torch.rand(64, 1, 28, 28), torch.arange(64) % _CLASSES)
    found: dict[str, Posterior] = {}
    try:
        found["tsynd, Laplace head"] = LaplaceHead.fit(network, data, prior_precision=1.0, samples=samples, layer=layer)
    except ImportError as error:
        print(f"without the Laplace head: {error}")
    return found


def _posteriors(kind: str, samples: int, device: str) -> tuple[Callable[[Tensor], Tensor], dict[str, Posterior]]:
    """The deterministic network, and every posterior by name."""
    torch.manual_seed(0)
    if kind == "SmallResNet":
        networks = [SmallResNet(1, _CLASSES).to(device).eval() for _ in range(_MEMBERS)]
        network, deep = networks[0], SmallResNet(1, _CLASSES, dropout="stages").to(device).eval()
        plain: Callable[[Tensor], Tensor] = FoldedGraph(fx.symbolic_trace(network)).module
        found: dict[str, Posterior] = {
            "tsynd, MC dropout before the head": MCDropout(network, samples),
            "tsynd, the same, independent masks": MCDropout(network, samples, "independent"),
            **_sampled(network, samples, "head", device),
            f"ensemble of {_MEMBERS}": Ensemble(networks),
            "tsynd, MC dropout in every stage": MCDropout(deep, samples),
            "tsynd, MC dropout, not traceable": MCDropout(_Opaque(deep).eval(), samples),
        }
        return plain, found
    network_ = _vit(0.0, 0.0).to(device).eval()
    headed = _with_head(_vit(0.0, 0.0)).to(device).eval()
    found = {
        "tsynd, MC dropout before the head": MCDropout(headed, samples),
        **_sampled(network_, samples, "classifier", device),
        "tsynd, MC dropout in attention alone": MCDropout(_vit(0.0, 0.1).to(device).eval(), samples),
        "tsynd, MC dropout everywhere": MCDropout(_vit(0.1, 0.1).to(device).eval(), samples),
    }
    return lambda images: network_(images).logits, found


def _step(value: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_(True)
    out = value(leaf)
    return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]


def _entropy(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a deterministic classifier has in place of the mutual information, [B]."""
    return ops.logits_uncertainty(network(images)[None], "entropy")[0]


def _checked(name: str, posterior: Posterior, images: Tensor) -> None:
    """The fused value and gradient are those of the logits."""
    few = images[:4]
    wanted = _step(lambda x: ops.logits_uncertainty(posterior.logits(x))[0], few)
    check(name, _step(posterior.uncertainty, few), wanted, 20 * tolerance(images.dtype))


def plan_of(posterior: Posterior) -> str:
    """How the T passes run."""
    return posterior.plan if isinstance(posterior, (MCDropout, SampledHead)) else "every network"


def run(shapes: list[str], device: str, dtype: torch.dtype, seconds: float) -> list[Row]:
    """Measure the named shapes; see :data:`SHAPES`."""
    if dtype != torch.float32:
        raise SystemExit("posteriors: wanted --dtype float32")
    rows: list[Row] = []
    for name in shapes:
        kind, count, samples = SHAPES[name]
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore", RuntimeWarning)  # whole networks are measured on purpose
            plain, found = _posteriors(kind, samples, device)
            images = torch.rand(count, 1, 28, 28, device=device, generator=torch.Generator(device).manual_seed(1))
            floor = partial(_step, partial(_entropy, plain), images)
            # two groups, each beside the floor: many rounds of the cheap ones, few of those that take T passes; in the
            # second a call of the floor's that does not count pays for the caches that the heavy call before it took
            cheap: dict[str, Callable[[], object]] = {FLOOR: floor}
            heavy: dict[str, Callable[[], object]] = {_SETTLING: floor, FLOOR: floor}
            for method, posterior in found.items():
                stack.enter_context(posterior.frozen())
                stack.enter_context(posterior.folded())
                _checked(method, posterior, images)
                plan = plan_of(posterior)
                group = heavy if plan in ("batched tail", "whole network") else cheap
                group[f"{method} ({plan})"] = partial(_step, posterior.uncertainty, images)
            label = f"{name} {kind}, {count}·28², T={samples}"
            for group in (cheap, heavy):
                made = measure("posteriors", label, group, floor=FLOOR, device=device, seconds=seconds)
                rows += [row for row in made if group is cheap or row.method not in (_SETTLING, FLOOR)]
    return rows


def summary(rows: list[Row]) -> list[str]:
    """Ratios to one deterministic pass."""
    return [
        f"{row.shape.split(',')[0]}, {row.method.removeprefix('tsynd, ')}: {row.over_floor:.2f}× one deterministic pass"
        for row in rows
        if row.method != FLOOR
    ]
