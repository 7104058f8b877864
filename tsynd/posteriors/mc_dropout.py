"""Monte-Carlo dropout: the deterministic part of a classifier runs once, the rest once per posterior sample."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from tsynd.fx.checkpointing import staged
from tsynd.fx.folding import FoldedGraph
from tsynd.models.classifier import as_classifier
from tsynd.ops import operators as ops
from tsynd.ops.reference import keep_count
from tsynd.posteriors.dropout import MaskSource
from tsynd.posteriors.passes import Passes, images_at_once, passes_logits, passes_uncertainty
from tsynd.posteriors.posterior import Posterior, evaluating
from tsynd.posteriors.sampled import heads_logits, heads_uncertainty
from tsynd.posteriors.splitting import LinearHead, NoDropoutError, Split, split_at_dropout
from tsynd.posteriors.trunks import may_have_head, split_at_hook
from tsynd.posteriors.whole_network import AddressedDropoutMode, WholeNetwork, attending
from tsynd.utils.errors import InputError, check_choice

__all__ = ["MCDropout", "as_posterior"]

_NO_DROPOUT = (
    "classifier: no active dropout was found, so all posterior samples agree and the mutual information is zero "
    "everywhere; put nn.Dropout(p > 0) before the last layer, or pass tsynd.Ensemble([...]) or another posterior"
)

# values that a network holds per value of an image, against those that a tail holds per value it starts from
_WHOLE_NETWORK = 16


class MCDropout(Posterior):
    """Monte-Carlo dropout (Gal & Ghahramani, 2016): the deterministic part runs once, the rest T times.

    The classifier is traced with torch.fx and split at its first active dropout. A dropout -> linear head is served
    by the fused operators; any other tail runs its T passes in one batch. A classifier that cannot be traced is
    split too where its only dropout stands before its last layer; any other runs as a whole T times, which is said
    once in a warning. Batch norm stays in eval mode. Dropout inside attention counts, also where a module holds its
    rate as a number.

    Args:
        classifier: gives logits [B, classes] (or what :func:`tsynd.as_classifier` knows); parameters are shared, so
            training it further moves the posterior.
        samples: T, at least 1.
        masks: ``shared`` (one mask per pass for all images: a draw of the weights) or ``independent`` (a fresh mask
            per image and pass, nn.Dropout's own law).
        seed: of the masks; the same seed and image give the same masks anywhere.
        stochastic_depth: also drop the residual branches behind modules for stochastic depth (Huang et al., 2016):
            timm's and MONAI's ``DropPath``, torchvision's ``StochasticDepth``, transformers' ``...DropPath``.

    Raises:
        InputError: an argument does not fit, or the classifier has no active dropout.
    """

    def __init__(
        self,
        classifier: nn.Module,
        samples: int = 32,
        masks: str = "shared",
        seed: int = 0,
        stochastic_depth: bool = False,
    ) -> None:
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
        self._network = as_classifier(classifier)
        self._whole = WholeNetwork(self._network, stochastic_depth)
        self._split, self._reason = self._trace(stochastic_depth)
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
        with evaluating(self.classifier):
            self._check_split(images)
            if self._split is None or not self._split.head or self.masks != "shared":
                return passes_logits(*self._passes(images, sample_ids))
            return heads_logits(self.features(images), *self._sampled_weights(self._split.head))

    def _uncertainty(self, images: Tensor, sample_ids: Tensor | None, objective: str, task: str) -> Tensor:
        """Fused where the tail is dropout -> linear."""
        with evaluating(self.classifier):
            self._check_split(images)
            head = self._split.head if self._split else None
            if head is None:
                return passes_uncertainty(*self._passes(images, sample_ids), objective, task)
            features = self.features(images)
            if self.masks == "shared":
                return heads_uncertainty(features, *self._sampled_weights(head), objective, task)
            weight, bias = head.linear.weight.detach(), None
            if head.linear.bias is not None:
                bias = head.linear.bias.detach().to(features.dtype)
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
        with evaluating(self.classifier):
            self._check_split(images)
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
        split = self._split
        if split is not None and isinstance(split.trunk, fx.GraphModule) and isinstance(split.tail, fx.GraphModule):
            if self._folded is None:
                with evaluating(self.classifier):
                    self._folded = FoldedGraph(split.trunk), FoldedGraph(split.tail)
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
        if self._split is not None and isinstance(self._split.trunk, fx.GraphModule):
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

    def _trace(self, stochastic_depth: bool) -> tuple[Split | None, str]:
        """The split, or why there is none; said at once unless a head may still be found by running the network."""
        with evaluating(self.classifier), attending(self._whole.attention):
            try:
                return split_at_dropout(self._network, self._current, stochastic_depth), ""
            except NoDropoutError:
                raise InputError(_NO_DROPOUT) from None
            except Exception as error:  # whatever the network's own code raises under tracing
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not may_have_head(self._network):
            self._warn_whole(reason)
        return None, reason

    def _current(self) -> MaskSource:
        assert self._source is not None
        return self._source

    def _warn_whole(self, reason: str) -> None:
        name = type(getattr(self._network, "model", self.classifier)).__name__
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
            return self._whole.run(inputs[0], own) if self._split is None else self._run_tail(inputs, own)

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

    def _check_split(self, images: Tensor) -> None:
        """Once: with every unit kept, trunk and tail must equal the classifier; else fall back."""
        if self._checked:
            return
        few = images[:2].detach()
        self._settle_split(few)
        if self._split is None:
            self._whole.axes(few)  # now, on plain images: an exporter's have symbols for sizes

    def _settle_split(self, few: Tensor) -> None:
        first = torch.zeros(1, dtype=torch.int64, device=few.device)
        # functional dropout is on even in eval mode unless told otherwise: keep every unit here too
        mode = AddressedDropoutMode(MaskSource(1, self.seed, first, active=False))
        with torch.no_grad():
            wanted = self._whole.record(few, mode)
            if not isinstance(wanted, Tensor) or wanted.dim() != 2:
                shape = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise InputError(f"classifier: gives {shape}, wanted logits [images, classes]")
            if not mode.shapes:
                raise InputError(_NO_DROPOUT)
            self._checked = True
            if self._split is None:
                if may_have_head(self._network):
                    self._split = split_at_hook(self._whole, few, self._current)
                    if self._split is None:
                        self._warn_whole(self._reason)
                return
            if len(mode.shapes) != self._split.dropouts:  # some in a function that tracing does not look into
                self._split = None
                self._warn_whole("tracing does not see all of its dropouts")
                return
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints what it raises
                    off = MaskSource(self.samples, self.seed, first, active=False)
                    got = self._run_tail(self._run_trunk(few), off)
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
