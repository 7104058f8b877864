"""Attacks on the deterministic classifier, by the Adversarial Robustness Toolbox; budgets in [0, 1] pixel units."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.data.dataset import at_once, parts
from tsynd.posteriors.posterior import frozen
from tsynd.utils.calls import call_of, is_call
from tsynd.utils.errors import InputError, require

__all__ = ["BUDGETS", "KINDS", "STEPS", "Attack", "check_robustness", "parse_attacks", "perturb"]

BUDGETS = (1, 2, 4, 8)
"""Default budgets of FGSM and PGD, in 1/255."""

STEPS = {"pgd": 20, "apgd": 20, "square": 100, "deepfool": 50}
"""Steps of the attacks (Square: queries); :func:`perturb` takes others."""

KINDS = ("fgsm", "pgd", "apgd", "square", "deepfool")
MULTILABEL = ("fgsm", "pgd", "square")
_DEFAULTS = {"fgsm": BUDGETS, "pgd": BUDGETS, "apgd": (2,), "square": (4,)}


@dataclass(frozen=True)
class Attack:
    """One attack in the ball ‖x* − x‖∞ ≤ budget, cut to [0, 1]; DeepFool knows no ball.

    Attributes:
        kind: ``fgsm`` (Goodfellow et al. 2015); ``pgd`` (Madry et al. 2018: 20 steps of 2.5 · budget / 20, one
            random start); ``apgd`` (Croce & Hein 2020: AutoPGD on the cross-entropy, 20 steps, two random starts);
            ``square`` (Andriushchenko et al. 2020: up to 100 queries, no gradient; in volumes its squares go through
            all slices, with a sign for each); or ``deepfool`` (Moosavi-Dezfooli et al. 2016: 50 steps towards the
            nearest boundary, of about the smallest Euclidean length).
        budget: in units of the intensity range [0, 1]; infinite for DeepFool and for functions.
        function: yours, instead of these: (classifier, images [B, C, H, W], labels, seed) → attacked images; ``kind``
            is its name.
    """

    kind: str
    budget: float = math.inf
    function: Callable[[nn.Module, Tensor, Tensor, int], Tensor] | None = None

    @property
    def name(self) -> str:
        """``KIND:N/255``, or the plain number where that is no multiple of 1/255; ``deepfool``."""
        if math.isinf(self.budget):
            return self.kind
        steps = self.budget * 255
        whole = abs(steps - round(steps)) < 1e-6
        return f"{self.kind}:{round(steps)}/255" if whole else f"{self.kind}:{self.budget:g}"


def parse_attacks(texts: Sequence[str]) -> list[Attack]:
    """Attacks from ``KIND:BUDGET`` (as ``pgd:2/255`` or ``pgd:0.01``), or ``KIND`` for its default budgets.

    ``MODULE:FUNCTION`` is a function of yours, see :class:`Attack`.

    Raises:
        InputError: an unknown kind, or a budget outside (0, 1].
    """
    found: list[Attack] = []
    for text in texts:
        kind, _, budget = str(text).partition(":")
        if kind not in KINDS and is_call(str(text)):
            if budget in (*KINDS, *(attack.kind for attack in found)):
                raise InputError(f"attacks: got {text!r}, wanted another name: there is an attack {budget!r}")
            found.append(Attack(budget, function=call_of(str(text), "attacks")))
            continue
        if kind not in KINDS:
            raise InputError(
                f"attacks: got {text!r}, wanted KIND, KIND:BUDGET or MODULE:FUNCTION, KIND one of {', '.join(KINDS)}"
            )
        if kind == "deepfool":
            if budget:
                raise InputError(f"attacks: got {text!r}, wanted deepfool without a budget: it looks for the smallest")
            found.append(Attack(kind))
            continue
        if not budget:
            found += [Attack(kind, n / 255) for n in _DEFAULTS[kind]]
            continue
        parts = re.fullmatch(r"([0-9]*\.?[0-9]+)(?:/([0-9]+))?", budget)
        value = float(parts[1]) / float(parts[2] or 1) if parts and float(parts[2] or 1) else 0.0
        if not 0 < value <= 1:
            raise InputError(f"attacks: got {text!r}, wanted a budget in (0, 1], as pgd:2/255")
        found.append(Attack(kind, value))
    return list(dict.fromkeys(found))


def check_robustness(attacks: Sequence[Attack]) -> None:
    """Ask for what these attacks need before work starts.

    Raises:
        MissingExtraError: the toolbox is not installed.
    """
    if any(attack.function is None for attack in attacks):
        require("art.attacks.evasion", "robustness")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The toolbox draws from numpy's global generator (its loaders from torch's): seeded, and then as before."""
    state = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)


class _LabelLoss(nn.Module):
    """Binary cross-entropy over all labels; torch's own class would make the toolbox reduce labels to one."""

    reduction = "mean"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction=self.reduction)


class _Sliced(nn.Module):
    """A classifier of volumes [B, C, D, H, W] that is given them as [B, C · D, H, W]."""

    def __init__(self, classifier: nn.Module, channels: int) -> None:
        super().__init__()
        self.classifier, self.channels = classifier, channels

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x.reshape(len(x), self.channels, -1, *x.shape[2:]))
        return logits


def _any_label_wrong(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(((logits > 0) != (labels > 0.5)).any(1))


def _by_function(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    name: str,
    function: Callable[[nn.Module, Tensor, Tensor, int], Tensor],
    seed: int,
    batch_size: int,
) -> Tensor:
    """What somebody's own attack makes of the images."""
    made = []
    for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        with frozen(classifier), _seeded(seed):
            torch.manual_seed(seed)
            one = function(classifier, x, y, seed)
        if not isinstance(one, Tensor) or one.shape != x.shape or not bool(one.isfinite().all()):
            raise InputError(f"attacks: {name} gave something else than finite images {list(x.shape)}")
        made.append(one.detach().to(x).clamp(0, 1))
    return torch.cat(made)


def perturb(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    *,
    task: str = "multiclass",
    seed: int = 0,
    steps: int | None = None,
    batch_size: int = 128,
) -> Tensor:
    """Attacked copies of images; the network attacked is the deterministic one (eval mode, no dropout).

    Untargeted: FGSM and both PGDs raise the cross-entropy of the true labels, Square lowers the margin of the true
    class (multilabel: of the least certain label), DeepFool leaves the predicted class. AutoPGD, Square and
    DeepFool leave alone what is already wrong.

    Args:
        classifier: images → logits [B, K], K of two or more; its modes and parameters' ``requires_grad`` come back.
        images: [N, C, H, W] or [N, C, D, H, W] in [0, 1], on the classifier's device.
        labels: int64 [N], or 0/1 [N, K] for multilabel.
        attack: kind and budget.
        task: "multiclass" or "multilabel".
        seed: of the starts and of Square's squares; the global random states are left as they were.
        steps: of all but FGSM; :data:`STEPS` by default.
        batch_size: images at a time; fewer where they are large.

    Returns:
        Of the same shape in [0, 1], within the budget of the images (to float32 rounding).

    Raises:
        MissingExtraError: the toolbox is not installed.
        InputError: one logit only, Square on images that are far from square, or AutoPGD or DeepFool on several labels.
    """
    check_robustness([attack])
    batch_size = at_once(images[:1].numel() or 1, batch_size)
    if attack.function is not None:
        return _by_function(classifier, images, labels, attack.kind, attack.function, seed, batch_size)
    evasion = require("art.attacks.evasion", "robustness")
    projected = require(
        "art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch", "robustness"
    )
    wrapper = require("art.estimators.classification", "robustness").PyTorchClassifier
    multiclass = task == "multiclass"
    if not multiclass and attack.kind in ("apgd", "deepfool"):
        raise InputError(f"attacks: got {attack.kind} for several labels, wanted {', '.join(MULTILABEL)}")
    with frozen(classifier), _seeded(seed):
        with torch.no_grad():
            logits = torch.cat([classifier(part) for part in parts(images, batch_size)])
        classes = logits.shape[1]
        if classes < 2:
            raise InputError(f"classifier: gives {classes} logit, wanted 2 or more for an attack")
        height, width = images.shape[-2:]
        if attack.kind == "square" and round((0.8 * height * width) ** 0.5) >= min(height, width):
            raise InputError(f"attacks: square on {height} x {width} images, wanted sides within a factor of 1.25")
        # the toolbox's squares lie in pictures: a volume is one with a channel for each slice
        sliced = images.ndim == 5 and attack.kind == "square"
        shown = images.flatten(1, 2) if sliced else images
        network = wrapper(
            _Sliced(classifier, images.shape[1]) if sliced else classifier,
            loss=nn.CrossEntropyLoss() if multiclass else _LabelLoss(),
            input_shape=tuple(shown.shape[1:]),
            nb_classes=classes,
            clip_values=(0.0, 1.0),
            preprocessing=None,
            device_type="gpu" if images.is_cuda else "cpu",
        )
        truth = functional.one_hot(labels.long(), classes) if multiclass else labels
        pixels, answers = shown.detach().cpu().numpy(), truth.float().cpu().numpy()
        shared: dict[str, Any] = dict(eps=attack.budget, batch_size=batch_size, verbose=False)
        count = 1 if attack.kind == "fgsm" else steps or STEPS[attack.kind]
        method: Any
        if attack.kind == "deepfool":
            method = evasion.DeepFool(network, count, epsilon=0.02, nb_grads=10, batch_size=batch_size, verbose=False)
        elif attack.kind == "apgd":
            method = evasion.AutoProjectedGradientDescent(
                network, eps_step=2 * attack.budget, max_iter=count, nb_random_init=2, **shared
            )
        elif attack.kind == "square":
            own: dict[str, Any] = {}
            if not multiclass:

                def margin(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                    logits = network.predict(x, batch_size=batch_size)
                    return np.asarray(np.where(y > 0.5, logits, -logits).min(1))

                own = dict(adv_criterion=_any_label_wrong, loss=margin)
            method = evasion.SquareAttack(network, max_iter=count, **shared, **own)
        else:
            # FGSM is one whole step without a random start; the toolbox's own class would rescale multilabel truth
            step = attack.budget if attack.kind == "fgsm" else 2.5 * attack.budget / count
            options = dict(eps_step=step, max_iter=count, num_random_init=int(attack.kind == "pgd"))
            method = projected.ProjectedGradientDescentPyTorch(network, **options, **shared)
        found = torch.from_numpy(method.generate(pixels, answers)).to(images).reshape(images.shape)
        if attack.kind == "deepfool":  # it would lead wrong predictions to right ones
            wrong = logits.argmax(1) != labels
            found[wrong] = images[wrong]
    # rounding in float32 may lead an ulp outside
    return torch.minimum(torch.maximum(found, images - attack.budget), images + attack.budget).clamp(0, 1)
