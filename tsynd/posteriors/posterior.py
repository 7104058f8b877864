"""What posterior samples of a classifier are to tsynd, the uncertainty they give, and ensembles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.fx.layout import Order
from tsynd.models.classifier import ClassifierAdapter, logits_of, plain
from tsynd.models.held import evaluating, frozen
from tsynd.ops.reference import OBJECTIVES, TASKS
from tsynd.posteriors.runner import Runner, check_classes, measured
from tsynd.utils.errors import InputError, check_choice

__all__ = ["Ensemble", "Posterior", "evaluating", "frozen"]


class Posterior(ABC):
    """T samples from a posterior over classifiers.

    Attributes:
        samples: T.
        networks: the modules behind it (moved, frozen and restored by the callers).
    """

    samples: int
    networks: tuple[nn.Module, ...]
    _runner = Runner()  # of nothing
    _faces: tuple[ClassifierAdapter, ...] = ()

    @abstractmethod
    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits of every posterior sample.

        Args:
            images: [B, C, H, W] in [0, 1].
            sample_ids: [B] int64, the images' global indices (0 .. B-1 when None).

        Returns:
            [T, B, classes], differentiable with respect to the images.
        """

    def uncertainty(
        self,
        images: Tensor,
        sample_ids: Tensor | None = None,
        objective: str = "mutual_information",
        task: str = "multiclass",
    ) -> Tensor:
        """Uncertainty [B] float32 in nats, differentiable with respect to the images (arguments as `logits`)."""
        check_choice("objective", objective, OBJECTIVES)
        check_choice("task", task, TASKS)
        return self._uncertainty(images, sample_ids, objective, task)

    def _uncertainty(self, images: Tensor, sample_ids: Tensor | None, objective: str, task: str) -> Tensor:
        """What `uncertainty` gives once its choices are known to be good; overridden where there is a faster way."""
        logits = self.logits(images, sample_ids)
        self._check_ending(task)
        return measured(logits, objective, task)[0]

    def probabilities(self, images: Tensor, sample_ids: Tensor | None = None, task: str = "multiclass") -> Tensor:
        """Mean predicted probabilities [B, classes] (arguments as `logits`)."""
        check_choice("task", task, TASKS)
        logits = self.logits(images, sample_ids).float()
        self._check_ending(task)
        check_classes(logits.shape[-1], task)
        return (logits.softmax(-1) if task == "multiclass" else logits.sigmoid()).mean(0)

    @contextmanager
    def frozen(self) -> Iterator[Posterior]:
        """Inside, the networks are in eval mode, their parameters take no gradient and must not change."""
        with frozen(*self.networks):
            blocks, own = self.__dict__.setdefault("_blocks", {}), get_ident()
            before = blocks.get(own)
            blocks[own] = {}
            try:
                yield self
            finally:
                del blocks[own]
                if before is not None:
                    blocks[own] = before

    @property
    def _block(self) -> dict[str, Any] | None:
        """What this thread may keep until its :meth:`frozen` block ends; None outside of one."""
        found: dict[str, Any] | None = self.__dict__.get("_blocks", {}).get(get_ident())
        return found

    def _evaluating(self) -> AbstractContextManager[None]:
        return evaluating(*self.networks) if self._block is None else nullcontext()

    def _check_ending(self, task: str) -> None:
        if task == "multilabel" and any(face.ending == "softmax" for face in self._faces):
            raise InputError("classifier: ends in a softmax over its classes, wanted task='multiclass'")

    @contextmanager
    def folded(self) -> Iterator[Posterior]:
        """Inside, batch norms are part of the convolutions before them where the posterior can fold them.

        For use inside :meth:`frozen`: the weights must not change.
        """
        with self._runner.folded():
            yield self

    @contextmanager
    def laid_out(self, order: Order) -> Iterator[Posterior]:
        """Inside, tsynd's own posteriors work on copies of the weights in this order of memory.

        For use inside :meth:`frozen` and :meth:`folded`, after a first call.
        """
        with self._runner.laid_out(order):
            yield self

    @contextmanager
    def compiled(self) -> Iterator[Posterior]:
        """Inside, what runs once per image goes through ``torch.compile`` where the posterior can tell it apart."""
        with self._runner.compiled():
            yield self

    @contextmanager
    def staged(self, image: Tensor) -> Iterator[int]:
        """Inside, what runs once per image is cut into stages that keep little; gives the heaviest one's bytes.

        Args:
            image: [1, C, ...] in [0, 1], to measure with.
        """
        with self._runner.staged(image) as heaviest:
            yield heaviest


class Ensemble(Posterior):
    """Independently trained classifiers as posterior samples (Lakshminarayanan et al., 2017).

    Args:
        networks: at least two modules, each giving logits [B, classes] (or what :func:`tsynd.as_classifier` knows).
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if len(networks) < 2 or not all(isinstance(network, nn.Module) for network in networks):
            raise InputError(
                f"networks: got {len(networks)} of {[type(n).__name__ for n in networks]}, "
                "wanted at least two nn.Module"
            )
        self.networks = tuple(networks)
        self._faces = tuple(logits_of(network) for network in networks)
        self._runner, self._looked = Runner(*self._faces), False
        self.samples = len(self.networks)

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [T, B, classes], one row of the first axis per network."""
        images = plain(images)
        with self._evaluating():
            if not self._looked:
                for face in self._faces:
                    face.look(images)
                self._looked = True
            logits = [network(images) for network in self._runner.once]
        shapes = [list(one.shape) for one in logits]
        if logits[0].dim() != 2 or any(shape != shapes[0] for shape in shapes):
            raise InputError(f"networks: give logits {shapes}, wanted [images, classes] of each, with the same classes")
        return torch.stack(logits)
