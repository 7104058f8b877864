"""Extra images made of pixels, by ascent in a ball around each image: adversarial ones, and those of TRADES.

The inner maximisation sees the classifier in eval mode, as the ascent in latents does: batch norm uses its running
statistics, so that an image's gradient does not depend on its neighbours, and dropout is off.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.checks import check_images
from tsynd.fx.folding import FoldedGraph, fold
from tsynd.models.classifier import logits_of
from tsynd.ops import operators as ops
from tsynd.ops.reference import TASKS
from tsynd.posteriors.posterior import frozen
from tsynd.training.extra_images import (
    BatchAugmentation,
    ExtraImages,
    PerImage,
    check_extra_labels,
    image_losses,
)
from tsynd.utils.draws import draw_rows
from tsynd.utils.errors import InputError, check_choice, check_whole

__all__ = ["PixelAdversarial", "PixelAscent", "PixelConsistency"]

Loss = Callable[[Tensor], Tensor]
"""Logits [M, C] of the moved images -> what to raise, [M]."""


class PixelAscent(BatchAugmentation):
    """Base of both: steps of the gradient's sign in the ball |x* - x| <= budget, cut to [0, 1], from anywhere in it.

    Args:
        budget: of the L-infinity ball, in units of the intensity range [0, 1].
        steps: K, each 2.5 * budget / K long, but at most 1.25 * budget.
        task: ``multiclass`` or ``multilabel``.
        persistent: an image's ascent begins where its last one ended, so that few steps a visit are enough (Zheng et
            al. 2020). For trainings whose images stay the same from visit to visit.
        ratio: extra images per real image of the batch, in (0, 1]; the batch's first are taken.
        every: only calls 0, n, 2n, ... give images, the others none.
        seed: of the starts; call n uses seed + n.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(
        self,
        budget: float = 4 / 255,
        steps: int = 5,
        *,
        task: str = "multiclass",
        persistent: bool = False,
        ratio: float = 1.0,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(ratio, every, seed)
        if not (isinstance(budget, (int, float)) and 0 < budget <= 1):
            raise InputError(f"budget: got {budget!r}, wanted a number in (0, 1]")
        check_whole("steps", steps)
        check_choice("task", task, TASKS)
        self.budget, self.steps, self.task, self.persistent = budget, steps, task, persistent
        self._offsets = PerImage()
        self._folded: tuple[nn.Module, FoldedGraph | None] | None = None

    @abstractmethod
    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        """What the ascent raises; no gradients are recorded here."""

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`BatchAugmentation.state_dict`; also what is kept per image."""
        return {**super().state_dict(), "offsets": self._offsets.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        super().load_state_dict(state)
        self._offsets.load_state_dict(state["offsets"])

    def _network(self, classifier: nn.Module, images: Tensor) -> nn.Module:
        """The classifier with its batch norms folded where that can be done; traced once, it follows the weights."""
        network = logits_of(classifier)
        if self._folded is None or self._folded[0] is not classifier:
            self._folded = classifier, fold(network, images[:2])
        graph = self._folded[1]
        if graph is None:
            return network
        graph.refresh()
        return graph.module

    def make(self, classifier: nn.Module, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """See :meth:`BatchAugmentation.make`."""
        offset = self.budget * (2 * draw_rows(torch.rand, images, rows, self.seed + self.calls) - 1)
        if self.persistent:
            offset = self._offsets.get(self.ids, offset)
        step = 2.5 * self.budget / max(self.steps, 2)
        moved = (images + offset).clamp_(0, 1)
        with frozen(classifier):
            network = self._network(classifier, images)
            with torch.no_grad():
                if self.calls == 0:
                    check_extra_labels(labels, len(check_images(images)), self.task, network(images[:1]).shape[-1])
                raised = self.loss(network, images, labels)
            for _ in range(self.steps):
                with torch.enable_grad():
                    leaf = moved.detach().requires_grad_()
                    (slope,) = torch.autograd.grad(raised(network(leaf).float()).sum(), leaf)
                ops.ascend_(moved, slope.to(moved), images, step, self.budget, "linf")
                moved.clamp_(0, 1)
        if self.persistent:
            self._offsets.put(self.ids, moved - images)
        return moved


class PixelAdversarial(PixelAscent):
    """Adversarial training (Madry et al. 2018): images that raise the label's cross-entropy, with their labels.

    Args and errors: see :class:`PixelAscent`.
    """

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        """Cross-entropy to the labels."""
        return lambda logits: image_losses(logits, labels, task=self.task)


class PixelConsistency(PixelAscent):
    """TRADES (Zhang et al. 2019): images that raise the KL divergence from the prediction for the unmoved image.

    They are learnt by that same divergence. The original starts a thousandth away from the image; here the start is
    uniform in the ball, which needs fewer steps.

    Args:
        budget: see :class:`PixelAscent`, like all that follow but ``weight``.
        steps: K.
        weight: beta, of the divergence beside the real images' cross-entropy, 0 or more.
        **options: ``task``, ``persistent``, ``ratio``, ``every``, ``seed``.

    Raises:
        InputError: an argument that cannot be used.
    """

    def __init__(self, budget: float = 4 / 255, steps: int = 5, *, weight: float = 3.0, **options: Any) -> None:
        super().__init__(budget, steps, **options)
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
            raise InputError(f"weight: got {weight!r}, wanted a finite number of 0 or more")
        self.weight = float(weight)

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        """Divergence from the prediction for the images."""
        clean = network(images).float()
        return lambda logits: image_losses(logits, labels, "consistency", task=self.task, clean=clean)

    def extra(self, images: Tensor, labels: Tensor) -> ExtraImages:
        """See :class:`ExtraImages`, loss ``consistency``."""
        return ExtraImages(images, labels, "consistency", self.weight)
