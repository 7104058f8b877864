"""Other ways to compute value and gradient of the uncertainty of a dropout -> linear head, in plain torch.

The tests hold each of them against the twin, so the benchmark compares equal computations.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.ops import operators as ops
from tsynd.ops import reference
from tsynd.posteriors.dropout import dropout_kind
from tsynd.posteriors.posterior import Posterior

__all__ = [
    "PassesPosterior",
    "PlainPosterior",
    "ascend",
    "available",
    "baal_network",
    "baal_passes",
    "batched_analytic",
    "batched_passes",
    "check_law",
    "independent_batched",
    "independent_loop",
    "laplace_samples",
    "logits_autograd",
    "pass_loop",
    "shared_analytic",
    "shared_autograd",
]


def _value_and_gradient(features: Tensor, logits_of: object) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_(True)
    value = reference.uncertainty_value(logits_of(leaf))  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def independent_loop(features: Tensor, weight: Tensor, p: float, samples: int) -> tuple[Tensor, Tensor]:
    """What most people run: T passes of nn.Dropout and linear, a fresh mask per image and pass."""

    def logits(leaf: Tensor) -> Tensor:
        passes = [torch.nn.functional.dropout(leaf, p, True) @ weight.t() for _ in range(samples)]
        return torch.stack(passes)

    return _value_and_gradient(features, logits)


def independent_batched(features: Tensor, weight: Tensor, p: float, samples: int) -> tuple[Tensor, Tensor]:
    """The same passes in one batch of T * B."""

    def logits(leaf: Tensor) -> Tensor:
        dropped = torch.nn.functional.dropout(leaf.expand(samples, *leaf.shape), p, True)
        return dropped @ weight.t()

    return _value_and_gradient(features, logits)


def pass_loop(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over T sampled heads [T, C, D]."""
    return _value_and_gradient(features, lambda leaf: torch.stack([leaf @ w.t() for w in weight]))


def batched_passes(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One batched product against T sampled heads."""
    return _value_and_gradient(features, lambda leaf: torch.matmul(leaf, weight.transpose(1, 2)))


def batched_analytic(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One batched product against T sampled heads with the analytic gradient: what a compiler can take whole."""
    value, slope = reference.logits_uncertainty(torch.matmul(features, weight.transpose(1, 2)))
    return value, torch.matmul(slope, weight).sum(0)


def shared_autograd(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One matrix product against the T stacked heads, gradient by autograd."""
    samples, classes, units = weight.shape

    def logits(leaf: Tensor) -> Tensor:
        flat = leaf @ weight.reshape(samples * classes, units).t()
        return flat.reshape(-1, samples, classes).transpose(0, 1)

    return _value_and_gradient(features, logits)


def shared_analytic(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the analytic gradient: the operator's twin."""
    return reference.head_uncertainty(features, weight)


def logits_autograd(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Value by log-softmax, gradient by autograd."""
    return _value_and_gradient(logits, lambda leaf: leaf)


def ascend(latents: Tensor, gradient: Tensor, origin: Tensor, step: float, radius: float, rule: str) -> None:
    """The step as one would write it: normalised gradient or its sign, then the projection."""
    if rule == "linf":
        latents.copy_(origin + (latents + step * gradient.sign() - origin).clamp(-radius, radius))
        return
    offset = latents + step * gradient / gradient.norm(dim=1, keepdim=True) - origin
    length = offset.norm(dim=1, keepdim=True)
    latents.copy_(origin + offset * (radius / length).clamp_max(1.0))


def check_law(name: str, got: Any, value: Tensor) -> None:
    """Stop the program unless a method with masks of its own gives the same mean uncertainty as ``value`` [B]."""
    theirs = (got[0] if isinstance(got, tuple) else got).double().cpu()
    ours = value.double().cpu()
    spread = 6 * (theirs.std() + ours.std()) / math.sqrt(len(ours)) + 0.1 * ours.mean()
    if not abs(float(theirs.mean() - ours.mean())) <= float(spread):
        raise SystemExit(f"{name}: mean {float(theirs.mean()):.4f}, wanted {float(ours.mean()):.4f}, not timed")


def available(module: str) -> Any:
    """A library that is measured where it is installed; None, with the reason said, where it does not import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # whatever an unfit version raises at import
        print(
            f"not measured: {module.split('.')[0]} ({type(error).__name__}: {str(error).splitlines()[0]})", flush=True
        )
        return None


class PlainPosterior(Posterior):
    """No posterior: one deterministic network, whose entropy is climbed. What T passes are measured against.

    Args:
        network: gives logits [B, classes].
    """

    def __init__(self, network: nn.Module) -> None:
        self.networks, self.samples = (network,), 1

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """[1, B, classes]."""
        out: Tensor = self.networks[0](images)[None]
        return out

    def uncertainty(
        self,
        images: Tensor,
        sample_ids: Tensor | None = None,
        objective: str = "mutual_information",
        task: str = "multiclass",
    ) -> Tensor:
        """Entropy [B]."""
        return super().uncertainty(images, sample_ids, "entropy", task)


class PassesPosterior(Posterior):
    """MC dropout as it is usually written: T passes of the whole network with its own dropout switched on.

    Args:
        network: with dropout, otherwise in eval mode.
        samples: T.
        batched: all passes in one batch of T * B, or one pass after another.
    """

    def __init__(self, network: nn.Module, samples: int, batched: bool) -> None:
        self.networks, self.samples, self._batched = (network,), samples, batched

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """[T, B, classes]."""
        (network,) = self.networks
        dropouts = [module for module in network.modules() if dropout_kind(module)]
        for module in dropouts:
            module.training = True
        try:
            if self._batched:
                whole: Tensor = network(images.repeat(self.samples, 1, 1, 1))
                return whole.reshape(self.samples, len(images), -1)
            return torch.stack([network(images) for _ in range(self.samples)])
        finally:
            for module in dropouts:
                module.training = False


def baal_passes(features: Tensor, weight: Tensor, p: float, samples: int) -> dict[str, Callable[[], object]]:
    """baal's MC dropout over a dropout -> linear head, see :func:`baal_network`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data = weight
    return baal_network(nn.Sequential(nn.Dropout(p), linear), features, samples)


def baal_network(network: nn.Module, inputs: Tensor, samples: int) -> dict[str, Callable[[], object]]:
    """baal's MC dropout (Atighehchian et al., 2022), BALD by its heuristic; no gradient."""
    parts = [available(f"baal.{name}") for name in ("bayesian.dropout", "active.heuristics", "modelwrapper")]
    if any(part is None for part in parts) or inputs.dtype != torch.float32:
        return {}
    dropout, active, wrapper = parts
    wrapped = _baal_wrapper(wrapper, dropout.patch_module(network, inplace=False).eval())

    def run() -> Tensor:
        with torch.no_grad():
            logits = wrapped.predict_on_batch(inputs, samples)  # [B, C, T]
        score: Tensor = torch.from_numpy(active.BALD().compute_score(logits.softmax(1).cpu().numpy()))
        return score

    return {"baal MC dropout, BALD (value only)": run}


def _baal_wrapper(wrapper: Any, model: nn.Module) -> Any:
    """baal's ModelWrapper around a model that is only predicted with."""
    arguments = wrapper.TrainingArgs(
        optimizer=None, batch_size=1, epoch=0, use_cuda=False, criterion=None, replicate_in_memory=False
    )
    return wrapper.ModelWrapper(model, arguments)


def laplace_samples(features: Tensor, heads: Tensor) -> dict[str, Callable[[], object]]:
    """laplace-torch's last-layer sampling (Daxberger et al., 2021) of as many heads; no gradient, weights drawn anew.

    Checked by computing the value of the heads that it drew with :func:`tsynd.ops.head_uncertainty`.
    """
    laplace = available("laplace")
    samples, classes, units = heads.shape
    if laplace is None or features.dtype != torch.float32 or units * classes > 20000:
        return {}
    model = nn.Sequential(nn.Identity(), nn.Linear(units, classes, device=features.device))
    labels = torch.arange(64, device=features.device) % classes
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(features[:64], labels), batch_size=64)
    posterior = laplace.Laplace(model, "classification", subset_of_weights="last_layer", hessian_structure="diag")
    posterior.fit(data)

    def probabilities(generator: torch.Generator | None = None) -> Tensor:
        out: Tensor = posterior.predictive_samples(features, pred_type="nn", n_samples=samples, generator=generator)
        return out

    def run() -> Tensor:
        with torch.no_grad():
            return reference.uncertainty_value(probabilities().log())

    drawn = posterior.sample(samples, torch.Generator(features.device).manual_seed(0))
    own = ops.head_uncertainty(
        features,
        drawn[:, : classes * units].reshape(samples, classes, units).contiguous(),
        drawn[:, classes * units :].contiguous(),
    )[0]
    with torch.no_grad():
        theirs = reference.uncertainty_value(probabilities(torch.Generator(features.device).manual_seed(0)).log())
    if not torch.allclose(own, theirs, rtol=1e-2, atol=1e-4):
        raise SystemExit("laplace-torch: its value is not that of the heads that it drew, not timed")
    return {"laplace-torch, last layer (value only)": run}
