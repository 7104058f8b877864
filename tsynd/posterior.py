"""Posterior samples of a classifier: MC dropout and ensembles, and the uncertainty they give."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from tsynd import ops
from tsynd.checks import check_choice
from tsynd.dropout import AddressedDropoutMode, MaskSource
from tsynd.errors import InputError
from tsynd.folding import FoldedGraph
from tsynd.microbatch import Passes, images_at_once, passes_logits, passes_uncertainty
from tsynd.reference import OBJECTIVES, TASKS, keep_count
from tsynd.splitting import LinearHead, NoDropoutError, Split, split_at_dropout
from tsynd.stages import staged

__all__ = ["Ensemble", "MCDropout", "Posterior", "as_posterior", "frozen"]

_NO_DROPOUT = (
    "classifier: no active dropout was found, so all posterior samples agree and the mutual information is zero "
    "everywhere; put nn.Dropout(p > 0) before the last layer, or pass tsynd.Ensemble([...])"
)

# values that a network holds per value of an image, against those that a tail holds per value it starts from
_WHOLE_NETWORK = 16


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for part, _ in flags:
        part.training = False
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for the parameters, both as they were afterwards."""
    parameters = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    with _evaluating(*modules):
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, wanted in parameters:
                parameter.requires_grad_(wanted)


class Posterior(ABC):
    """T samples from a posterior over classifiers.

    Attributes:
        samples: T.
        networks: the modules behind it (moved, frozen and restored by the callers).
    """

    samples: int
    networks: tuple[nn.Module, ...]

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
        return ops.logits_uncertainty(self.logits(images, sample_ids), objective, task)[0]

    def probabilities(self, images: Tensor, sample_ids: Tensor | None = None, task: str = "multiclass") -> Tensor:
        """Mean predicted probabilities [B, classes] (arguments as `logits`)."""
        check_choice("task", task, TASKS)
        logits = self.logits(images, sample_ids).float()
        return (logits.softmax(-1) if task == "multiclass" else logits.sigmoid()).mean(0)

    @contextmanager
    def frozen(self) -> Iterator[Posterior]:
        """Inside, the networks are in eval mode, their parameters take no gradient and must not change."""
        with frozen(*self.networks):
            yield self

    @contextmanager
    def folded(self) -> Iterator[Posterior]:
        """Inside, batch norms are part of the convolutions before them where the posterior can fold them.

        For use inside :meth:`frozen`: the weights must not change.
        """
        yield self

    @contextmanager
    def compiled(self) -> Iterator[Posterior]:
        """Inside, what runs once per image goes through ``torch.compile`` where the posterior can tell it apart."""
        yield self

    @contextmanager
    def staged(self, image: Tensor) -> Iterator[int]:
        """Inside, what runs once per image is cut into stages, see ``tsynd.stages``; gives the heaviest one's bytes.

        Args:
            image: [1, C, ...] in [0, 1], to measure with.
        """
        yield 0


class Ensemble(Posterior):
    """Independently trained classifiers as posterior samples (Lakshminarayanan et al., 2017).

    Args:
        networks: at least two modules, each giving logits [B, classes].
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        if len(networks) < 2 or not all(isinstance(network, nn.Module) for network in networks):
            raise InputError(
                f"networks: got {len(networks)} of {[type(n).__name__ for n in networks]}, "
                "wanted at least two nn.Module"
            )
        self.networks = tuple(networks)
        self._runners: tuple[Callable[[Tensor], Tensor], ...] = self.networks
        self.samples = len(self.networks)

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [T, B, classes], one row of the first axis per network."""
        with _evaluating(*self.networks):
            return torch.stack([network(images) for network in self._runners])

    @contextmanager
    def compiled(self) -> Iterator[Posterior]:
        """See :meth:`Posterior.compiled`."""
        self._runners = tuple(torch.compile(network, dynamic=False) for network in self.networks)
        try:
            yield self
        finally:
            self._runners = self.networks

    @contextmanager
    def staged(self, image: Tensor) -> Iterator[int]:
        """See :meth:`Posterior.staged`; every network is one stage."""
        stages = [staged(network, image) for network in self.networks]
        self._runners = tuple(stages)
        try:
            yield max(stage.heaviest for stage in stages)
        finally:
            self._runners = self.networks


class MCDropout(Posterior):
    """Monte-Carlo dropout (Gal & Ghahramani, 2016): the deterministic part runs once, the rest T times.

    The classifier is traced with torch.fx and split at its first active dropout. A dropout -> linear head is served
    by the fused operators; any other tail runs its T passes in one batch. A classifier that cannot be traced runs as
    a whole T times, which is said once in a warning. Batch norm stays in eval mode.

    Args:
        classifier: gives logits [B, classes]; parameters are shared, so training it further moves the posterior.
        samples: T, at least 1.
        masks: ``shared`` (one mask per pass for all images: a draw of the weights) or ``independent`` (a fresh mask
            per image and pass, nn.Dropout's own law).
        seed: of the masks; the same seed and image give the same masks anywhere.

    Raises:
        InputError: an argument does not fit, or the classifier has no active dropout.
    """

    def __init__(self, classifier: nn.Module, samples: int = 32, masks: str = "shared", seed: int = 0) -> None:
        if not isinstance(classifier, nn.Module):
            raise InputError(f"classifier: got {type(classifier).__name__}, wanted an nn.Module")
        if not isinstance(samples, int) or samples < 1:
            raise InputError(f"samples: got {samples!r}, wanted an integer of at least 1")
        check_choice("masks", masks, ("shared", "independent"))
        self.classifier, self.samples, self.masks, self.seed = classifier, samples, masks, int(seed)
        self.networks = (classifier,)
        self._source: MaskSource | None = None
        self._frozen = False
        self._sampled_head: tuple[Tensor, Tensor | None] | None = None
        self._checked = False
        self._split = self._trace()
        self._folded: tuple[FoldedGraph, FoldedGraph] | None = None
        self._trunk: Callable[..., tuple[Tensor, ...]] | None = None
        self._tail: Callable[..., Tensor] | None = None

    @property
    def plan(self) -> str:
        """How the passes run: ``fused head``, ``batched tail`` or ``whole network``."""
        if self._split is None:
            return "whole network"
        return "fused head" if self._split.head else "batched tail"

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [T, B, classes], see :meth:`Posterior.logits`."""
        with _evaluating(self.classifier):
            self._check_split(images)
            if self._split is None or not self._split.head or self.masks != "shared":
                return passes_logits(*self._passes(images, sample_ids))
            weight, bias = self._sampled_weights(self._split.head)
            features = self.features(images)
            flat = features @ weight.flatten(0, 1).t().to(features.dtype)
            logits = flat.reshape(flat.shape[0], *weight.shape[:2]).transpose(0, 1)
            return logits if bias is None else logits + bias[:, None]

    def uncertainty(
        self,
        images: Tensor,
        sample_ids: Tensor | None = None,
        objective: str = "mutual_information",
        task: str = "multiclass",
    ) -> Tensor:
        """Uncertainty [B], see :meth:`Posterior.uncertainty`; fused where the tail is dropout -> linear."""
        check_choice("objective", objective, OBJECTIVES)
        check_choice("task", task, TASKS)
        with _evaluating(self.classifier):
            self._check_split(images)
            head = self._split.head if self._split else None
            if head is None:
                return passes_uncertainty(*self._passes(images, sample_ids), objective, task)
            features = self.features(images)
            if self.masks == "shared":
                weight, bias = self._sampled_weights(head)
                kind = features.dtype
                bias = None if bias is None else bias.to(kind)
                return ops.head_uncertainty(features, weight.to(kind), bias, objective, task)[0]
            weight, bias = head.linear.weight.detach(), head.linear.bias
            bias = None if bias is None else bias.detach().to(features.dtype)
            ids = self._address(images, sample_ids).sample_ids
            return ops.dropout_head_uncertainty(
                features,
                weight.to(features.dtype),
                bias,
                head.p,
                self.samples,
                self.seed,
                0,
                ids,
                objective,
                task,
            )[0]

    def features(self, images: Tensor) -> Tensor:
        """What enters the first active dropout, [B, D], of images [B, C, H, W]; computed once for all samples.

        Raises:
            InputError: the classifier cannot be split there.
        """
        if self._split is None:
            raise InputError("classifier: cannot be split at its first dropout, so it has no features of its own")
        features: Tensor = self._run_trunk(images)[0]
        return features.flatten(1)

    @contextmanager
    def frozen(self) -> Iterator[Posterior]:
        """As :meth:`Posterior.frozen`; sampled weights are built once and kept for the block."""
        with super().frozen():
            self._frozen, self._sampled_head = True, None
            try:
                yield self
            finally:
                self._frozen, self._sampled_head = False, None

    @contextmanager
    def folded(self) -> Iterator[Posterior]:
        """See :meth:`Posterior.folded`."""
        if self._split is not None:
            if self._folded is None:
                with _evaluating(self.classifier):
                    self._folded = FoldedGraph(self._split.trunk), FoldedGraph(self._split.tail)
            for part in self._folded:
                part.refresh()
            self._trunk, self._tail = (part.module for part in self._folded)
        try:
            yield self
        finally:
            self._trunk = self._tail = None

    @contextmanager
    def compiled(self) -> Iterator[Posterior]:
        """See :meth:`Posterior.compiled`; the part before the first dropout."""
        plain = self._trunk
        if self._split is not None:
            self._trunk = torch.compile(plain or self._split.trunk, dynamic=False)
        try:
            yield self
        finally:
            self._trunk = plain

    @contextmanager
    def staged(self, image: Tensor) -> Iterator[int]:
        """See :meth:`Posterior.staged`; the part before the first dropout."""
        plain, heaviest = self._trunk, 0
        if self._split is not None:
            stages = staged(plain or self._split.trunk, image, keep_last=True)
            self._trunk, heaviest = stages, stages.heaviest
        try:
            yield heaviest
        finally:
            self._trunk = plain

    def _trace(self) -> Split | None:
        with _evaluating(self.classifier):
            try:
                split = split_at_dropout(self.classifier, self._current)
            except NoDropoutError:
                raise InputError(_NO_DROPOUT) from None
            except Exception as error:  # whatever the network's own code raises under tracing
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self._warn_whole(reason)
                return None
        return split

    def _current(self) -> MaskSource:
        assert self._source is not None
        return self._source

    def _warn_whole(self, reason: str) -> None:
        name = type(self.classifier).__name__
        warnings.warn(
            f"{name} cannot be split at its first dropout ({reason}); the whole network runs {self.samples} times",
            RuntimeWarning,
            stacklevel=4,
        )

    def _address(self, images: Tensor, sample_ids: Tensor | None) -> MaskSource:
        if self.masks == "shared":
            ids = torch.zeros(1, dtype=torch.int64, device=images.device)
        elif sample_ids is None:
            ids = torch.arange(images.shape[0], device=images.device)
        else:
            ids = sample_ids.to(images.device)
        return MaskSource(self.samples, self.seed, ids)

    def _run_trunk(self, images: Tensor) -> tuple[Tensor, ...]:
        assert self._split is not None
        out: tuple[Tensor, ...] = (self._split.trunk if self._trunk is None else self._trunk)(images)
        return out

    def _passes(self, images: Tensor, sample_ids: Tensor | None) -> tuple[Passes, tuple[Tensor, ...], int | None]:
        """How to run the T passes, what they start from, and how many images at once."""
        source = self._address(images, sample_ids)
        shared = source.sample_ids.shape[0] == 1

        def run(part: slice, inputs: tuple[Tensor, ...]) -> Tensor:
            own = source if shared else replace(source, sample_ids=source.sample_ids[part])
            return self._whole_network(inputs[0], own) if self._split is None else self._run_tail(inputs, own)

        if self._split is None:
            return run, (images,), images_at_once((images,), self.samples, _WHOLE_NETWORK)
        inputs = self._run_trunk(images)
        return run, inputs, images_at_once(inputs, self.samples)

    def _run_tail(self, inputs: tuple[Tensor, ...], source: MaskSource) -> Tensor:
        assert self._split is not None
        self._source = source
        logits: Tensor = (self._split.tail if self._tail is None else self._tail)(*inputs)
        return logits.reshape(self.samples, -1, logits.shape[-1])

    def _sampled_weights(self, head: LinearHead) -> tuple[Tensor, Tensor | None]:
        """Sampled heads [T, C, D] and biases [T, C]."""
        if self._sampled_head is not None:
            return self._sampled_head
        weight = head.linear.weight.detach()
        first = torch.zeros(1, dtype=torch.int64, device=weight.device)
        mask = ops.dropout_mask(weight.shape[1], head.p, self.samples, self.seed, 0, first)
        sampled = weight * mask.to(weight.dtype) * (256.0 / keep_count(head.p))
        bias = head.linear.bias
        pair = (sampled, None if bias is None else bias.detach().expand(self.samples, -1).contiguous())
        if self._frozen:
            self._sampled_head = pair
        return pair

    def _whole_network(self, images: Tensor, source: MaskSource) -> Tensor:
        repeated = images.repeat(self.samples, *[1] * (images.dim() - 1))
        mode = AddressedDropoutMode(source)
        with mode:
            logits: Tensor = self.classifier(repeated)
        if mode.layers == 0:
            raise InputError(_NO_DROPOUT)
        return logits.reshape(self.samples, images.shape[0], -1)

    def _check_split(self, images: Tensor) -> None:
        """Once: with every unit kept, trunk and tail must equal the classifier; else fall back."""
        if self._checked or self._split is None:
            return
        self._checked = True
        few = images[:2].detach()
        first = torch.zeros(1, dtype=torch.int64, device=few.device)
        # functional dropout is on even in eval mode unless told otherwise: keep every unit here too
        with torch.no_grad():
            with AddressedDropoutMode(MaskSource(1, self.seed, first, active=False)):
                wanted = self.classifier(few)
            if not isinstance(wanted, Tensor) or wanted.dim() != 2:
                shape = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise InputError(f"classifier: gives {shape}, wanted logits [images, classes]")
            try:
                got = self._run_tail(self._run_trunk(few), MaskSource(self.samples, self.seed, first, active=False))
                agrees = torch.allclose(got, wanted.expand_as(got), rtol=1e-2, atol=1e-3, equal_nan=True)
            except Exception:  # shapes computed before the dropout no longer fit behind it
                agrees = False
        if not agrees:
            self._split = None
            self._warn_whole("its parts do not add up to the whole")


def as_posterior(
    classifier: nn.Module | Posterior, samples: int = 32, masks: str = "shared", seed: int = 0
) -> Posterior:
    """The classifier itself if it is a posterior, else :class:`MCDropout` of it.

    Raises:
        InputError: neither a module with active dropout nor a posterior.
    """
    if isinstance(classifier, Posterior):
        return classifier
    return MCDropout(classifier, samples, masks, seed)
