"""Monte-Carlo dropout: the deterministic part of a classifier runs once, the rest once per posterior sample."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.models.classifier import as_classifier
from tsynd.models.held import evaluating
from tsynd.ops import operators as ops
from tsynd.ops.reference import keep_count
from tsynd.posteriors.dropout import MaskSource, addressing
from tsynd.posteriors.passes import Passes, images_at_once, passes_logits, passes_uncertainty
from tsynd.posteriors.posterior import Posterior
from tsynd.posteriors.runner import Runner, heads_logits, heads_uncertainty
from tsynd.posteriors.splitting import NoDropoutError, Split, may_have_head, split_at_dropout, split_at_hook
from tsynd.posteriors.whole_network import AddressedDropoutMode, WholeNetwork
from tsynd.utils.errors import InputError, check_choice

__all__ = ["MCDropout", "as_posterior"]

_NO_DROPOUT = (
    "classifier: no active dropout was found, so all posterior samples agree and the mutual information is zero "
    "everywhere; put nn.Dropout(p > 0) before the last layer, or pass tsynd.Ensemble([...]) or another posterior"
)


class BatchedTail:
    """What comes before the first dropout runs once, what follows runs its T passes in one batch."""

    name = "batched tail"

    def __init__(self, split: Split) -> None:
        self.runner, self.dropouts = split.runner, split.dropouts

    def features(self, images: Tensor) -> Tensor:
        """What enters the first dropout, [B, D]."""
        features: Tensor = self.runner.once[0](images)[0]
        return features.flatten(1)

    def logits(self, images: Tensor, source: MaskSource) -> Tensor:
        """Logits [T, B, C]."""
        return passes_logits(*self._passes(images, source))

    def uncertainty(self, images: Tensor, source: MaskSource, objective: str, task: str) -> Tensor:
        """Uncertainty [B]."""
        return passes_uncertainty(*self._passes(images, source), objective, task)

    def _passes(self, images: Tensor, source: MaskSource) -> tuple[Passes, tuple[Tensor, ...], int | None]:
        """How to run the T passes, what they start from, and how many images at once."""
        inputs, tail = self.runner.once[0](images), self.runner.tail

        def run(part: slice, inputs: tuple[Tensor, ...]) -> Tensor:
            with addressing(source.part(part)):
                logits: Tensor = tail(*inputs)
            return logits.reshape(source.samples, -1, logits.shape[-1])

        return run, inputs, images_at_once(inputs, source.samples)


class FusedHead(BatchedTail):
    """Dropout -> linear: shared masks make T linear layers, and fused operators do the rest."""

    name = "fused head"

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        assert split.head is not None
        self._p, self._linear = split.head.p, split.head.linear

    def logits(self, images: Tensor, source: MaskSource) -> Tensor:
        """Logits [T, B, C]."""
        if not (source.shared and source.active):
            return super().logits(images, source)
        return heads_logits(self.features(images), *self._heads(source))

    def uncertainty(self, images: Tensor, source: MaskSource, objective: str, task: str) -> Tensor:
        """Uncertainty [B]."""
        features = self.features(images)
        if source.shared:
            return heads_uncertainty(features, *self._heads(source), objective, task)
        weight, own = self._linear.weight.detach().to(features.dtype), self._linear.bias
        bias = None if own is None else own.detach().to(features.dtype)
        address = self._p, source.samples, source.seed, 0, source.sample_ids
        return ops.dropout_head_uncertainty(features, weight, bias, *address, objective, task)[0]

    def _heads(self, source: MaskSource) -> tuple[Tensor, Tensor | None]:
        """Sampled heads [T, C, D] and biases [T, C]."""
        kept = {} if source.kept is None else source.kept
        if "heads" not in kept:
            weight, bias = self._linear.weight.detach(), self._linear.bias
            address = self._p, source.samples, source.seed, 0, source.sample_ids
            mask = ops.dropout_mask(weight.shape[1], *address)
            sampled = weight * mask.to(weight.dtype) * (256.0 / keep_count(self._p))
            kept["heads"] = sampled, None if bias is None else bias.detach().expand(source.samples, -1).contiguous()
        heads: tuple[Tensor, Tensor | None] = kept["heads"]
        return heads


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
        self._kept: dict[int, dict[str, Any]] = {}  # thread -> what stands still in its frozen block
        self._checked = False
        self._network = as_classifier(classifier)
        self._whole = WholeNetwork(self._network, stochastic_depth)
        self._plan: BatchedTail | WholeNetwork = self._whole
        self._reason = ""
        with evaluating(classifier):
            try:
                self._take(split_at_dropout(self._whole.network, stochastic_depth))
            except NoDropoutError:
                raise InputError(_NO_DROPOUT) from None
            except Exception as error:  # whatever the network's own code raises under tracing
                self._reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if not may_have_head(self._network):  # else one may be found by running the network
                    self._warn_whole(self._reason, 3)

    @property
    def plan(self) -> str:
        """How the passes run: ``fused head``, ``batched tail`` or ``whole network``."""
        return self._plan.name

    @property
    def _runner(self) -> Runner:  # type: ignore[override]
        return self._plan.runner

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [T, B, classes], see :meth:`Posterior.logits`."""
        with evaluating(self.classifier):
            return self._resolved(images).logits(images, self._address(images, sample_ids))

    def _uncertainty(self, images: Tensor, sample_ids: Tensor | None, objective: str, task: str) -> Tensor:
        """Fused where the tail is dropout -> linear."""
        with evaluating(self.classifier):
            source = self._address(images, sample_ids)
            return self._resolved(images).uncertainty(images, source, objective, task)

    def features(self, images: Tensor) -> Tensor:
        """What enters the first active dropout, [B, D], of images [B, C, H, W]; computed once for all samples.

        Raises:
            InputError: the classifier cannot be split there.
        """
        with evaluating(self.classifier):
            plan = self._resolved(images)
            if isinstance(plan, WholeNetwork):
                raise InputError("classifier: cannot be split at its first dropout, so it has no features of its own")
            return plan.features(images)

    @contextmanager
    def frozen(self) -> Iterator[Posterior]:
        """As :meth:`Posterior.frozen`; sampled weights are built once and kept for the block."""
        with super().frozen():
            own = get_ident()
            before = self._kept.get(own)
            self._kept[own] = {}
            try:
                yield self
            finally:
                del self._kept[own]
                if before is not None:
                    self._kept[own] = before

    def _address(self, images: Tensor, sample_ids: Tensor | None) -> MaskSource:
        if self.masks == "shared":
            ids = torch.zeros(1, dtype=torch.int64, device=images.device)
        elif sample_ids is None:
            ids = torch.arange(images.shape[0], device=images.device)
        else:
            ids = sample_ids.to(images.device)
        kept = self._kept.get(get_ident())
        return MaskSource(self.samples, self.seed, ids, self.masks == "shared", kept=kept)

    def _take(self, split: Split) -> None:
        self._plan = FusedHead(split) if split.head else BatchedTail(split)

    def _fall_back(self, reason: str) -> None:
        self._plan = self._whole
        self._warn_whole(reason, 6)

    def _warn_whole(self, reason: str, level: int) -> None:
        name = type(getattr(self._network, "model", self.classifier)).__name__
        warnings.warn(
            f"{name} cannot be split at its first dropout ({reason}); the whole network runs {self.samples} times",
            RuntimeWarning,
            stacklevel=level,
        )

    def _resolved(self, images: Tensor) -> BatchedTail | WholeNetwork:
        """The plan; at first it is held against the network, with every unit kept, and else falls back."""
        if not self._checked:
            few = images[:2].detach()
            self._resolve(few)
            self._checked = True
            if isinstance(self._plan, WholeNetwork):
                self._plan.axes(few)  # now, on plain images: an exporter's have symbols for sizes
        return self._plan

    def _resolve(self, few: Tensor) -> None:
        off = MaskSource(self.samples, self.seed, torch.zeros(1, dtype=torch.int64, device=few.device), active=False)
        # functional dropout is on even in eval mode unless told otherwise: keep every unit here too
        mode = AddressedDropoutMode(off)
        with torch.no_grad():
            wanted = self._whole.record(few, mode)
            if not isinstance(wanted, Tensor) or wanted.dim() != 2:
                shape = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
                raise InputError(f"classifier: gives {shape}, wanted logits [images, classes]")
            if not mode.shapes:
                raise InputError(_NO_DROPOUT)
            if isinstance(self._plan, WholeNetwork):
                if may_have_head(self._network):
                    split = split_at_hook(self._whole, few)
                    if split is None:
                        self._fall_back(self._reason)
                    else:
                        self._take(split)
                return
            if len(mode.shapes) != self._plan.dropouts:  # some in a function that tracing does not look into
                self._fall_back("tracing does not see all of its dropouts")
                return
            try:
                got = self._plan.logits(few, off)
                agrees = torch.allclose(got, wanted.expand_as(got), rtol=1e-2, atol=1e-3, equal_nan=True)
            except Exception:  # shapes computed before the dropout no longer fit behind it
                agrees = False
        if not agrees:
            self._fall_back("its parts do not add up to the whole")


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
