"""Monte-Carlo dropout: the deterministic part of a classifier runs once, the rest once per posterior sample."""

from __future__ import annotations

import warnings
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tsynd.fx.tracing import private_copy
from tsynd.models.classifier import ending_note, logits_of, plain, two_images
from tsynd.models.held import evaluating
from tsynd.ops import operators as ops
from tsynd.ops.reference import keep_count
from tsynd.posteriors.dropout import MaskSource, addressing
from tsynd.posteriors.passes import Passes, images_at_once, passes_logits, passes_uncertainty
from tsynd.posteriors.posterior import Posterior
from tsynd.posteriors.runner import (
    RESOLVING,
    Runner,
    check_classes,
    heads_logits,
    heads_uncertainty,
    measured,
    structure_of,
)
from tsynd.posteriors.splitting import NoDropoutError, Split, may_have_head, split_at_dropout, split_at_hook
from tsynd.posteriors.whole_network import PassLoop, WholeNetwork, agrees, set_training
from tsynd.utils.errors import InputError, check_choice, check_whole, first_line

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
        check_classes(len(self._linear.weight), task)
        features = features if features.is_cuda or features.dtype == torch.bfloat16 else features.float()
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


Plan: TypeAlias = BatchedTail | WholeNetwork | PassLoop


class MCDropout(Posterior):
    """Monte-Carlo dropout (Gal & Ghahramani, 2016): the deterministic part runs once, the rest T times.

    The classifier is traced with torch.fx and split at its first active dropout. A dropout -> linear head is served
    by the fused operators; any other tail runs its T passes in one batch. A classifier that cannot be traced is
    split too where its only dropout stands before its last layer; any other runs as a whole T times, which is said
    once in a warning. Batch norm stays in eval mode. Dropout inside attention counts, and dropout that a module's code
    asks for in training alone. What runs is held against a plain loop of passes with the same masks, on two images at
    the first call and when the network's structure has changed; where they differ the loop itself runs, with a warning.

    Args:
        classifier: gives logits [B, classes] (or what :func:`tsynd.as_classifier` knows); parameters are shared, so
            training it further moves the posterior.
        samples: T, at least 1.
        masks: ``shared`` (one mask per pass for all images: a draw of the weights) or ``independent`` (a fresh mask
            per image and pass, nn.Dropout's own law).
        seed: of the masks; the same seed and image give the same masks anywhere.
        fast: False runs a plain loop of T passes over the network; the numbers are the same.
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
        fast: bool = True,
    ) -> None:
        if not isinstance(classifier, nn.Module):
            raise InputError(f"classifier: got {type(classifier).__name__}, wanted an nn.Module")
        check_whole("samples", samples)
        check_choice("masks", masks, ("shared", "independent"))
        self.classifier, self.samples, self.masks, self.seed = classifier, samples, masks, int(seed)
        self.networks = (classifier,)
        self._fast, self._depth = fast, stochastic_depth
        self._network = logits_of(classifier)
        self._faces = (self._network,)
        self._settled: object = None  # the structure that the plan was held against
        self._notes: list[str] = []
        self._begin()
        self._say(3)

    def _begin(self) -> None:
        """A plan from the network's structure alone."""
        self._whole = WholeNetwork(self._network, self._depth)
        self._plan: Plan = self._whole
        self._reason = ""
        with evaluating(self.classifier):
            try:
                self._plan = _plan_of(split_at_dropout(self._whole.network, self._depth))
            except NoDropoutError:
                if not self._trains():
                    raise InputError(_NO_DROPOUT) from None
                self._reason = "its dropout is there in training alone"
            except Exception as error:  # whatever the network's own code raises under tracing
                self._reason = first_line(error)
                if not may_have_head(self._network):  # else one may be found by running the network
                    self._note_whole(self._reason)

    def _trains(self) -> bool:
        """Whether the network may have a dropout in training mode that it has not in eval mode."""
        trial = private_copy(self._network)
        set_training(trial)
        try:
            split_at_dropout(trial, self._depth)
        except NoDropoutError:
            return False
        except Exception:  # as above
            return True
        return True

    @property
    def plan(self) -> str:
        """How the passes run: ``fused head``, ``batched tail``, ``whole network`` or ``pass by pass``."""
        return self._plan.name

    @property
    def _runner(self) -> Runner:  # type: ignore[override]
        return self._plan.runner

    def logits(self, images: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Logits [T, B, classes], see :meth:`Posterior.logits`."""
        images = plain(images)
        with self._evaluating():
            return self._resolved(images).logits(images, self._address(images, sample_ids))

    def _uncertainty(self, images: Tensor, sample_ids: Tensor | None, objective: str, task: str) -> Tensor:
        """Fused where the tail is dropout -> linear."""
        images = plain(images)
        with self._evaluating():
            plan = self._resolved(images)
            self._check_ending(task)
            return plan.uncertainty(images, self._address(images, sample_ids), objective, task)

    def features(self, images: Tensor) -> Tensor:
        """What enters the first active dropout, [B, D], of images [B, C, H, W]; computed once for all samples.

        Raises:
            InputError: the classifier cannot be split there.
        """
        images = plain(images)
        with self._evaluating():
            plan = self._resolved(images)
            if not isinstance(plan, BatchedTail):
                raise InputError("classifier: cannot be split at its first dropout, so it has no features of its own")
            return plan.features(images)

    def _address(self, images: Tensor, sample_ids: Tensor | None) -> MaskSource:
        if self.masks == "shared":
            ids = torch.zeros(1, dtype=torch.int64, device=images.device)
        elif sample_ids is None:
            ids = torch.arange(images.shape[0], device=images.device)
        else:
            ids = sample_ids.to(images.device)
        return MaskSource(self.samples, self.seed, ids, self.masks == "shared", kept=self._block)

    def _note_whole(self, reason: str) -> None:
        self._notes.append(
            f"cannot be split at its first dropout ({reason}); the whole network runs {self.samples} times"
        )

    def _say(self, level: int) -> None:
        """Warn of what was noted, once the plan is made: a warning may be an error to the caller."""
        notes, self._notes = self._notes, []
        for note in notes:
            warnings.warn(f"{type(self._network.model).__name__} {note}", RuntimeWarning, stacklevel=level)

    def _resolved(self, images: Tensor) -> Plan:
        """The plan, held against a plain loop of passes at first and whenever the network's structure has changed."""
        kept = {} if self._block is None else self._block
        if "resolved" not in kept:
            structure = structure_of(self.classifier)
            if structure != self._settled:
                with RESOLVING, torch.no_grad():
                    if structure != self._settled:
                        if self._settled is not None:
                            self._network.ending = None
                            self._begin()
                        self._resolve(two_images(images))
                        self._settled = structure
                self._say(6)
            kept["resolved"] = True
        return self._plan

    def _resolve(self, few: Tensor) -> None:
        learnt = self._whole.learn(few)
        logits = learnt.logits
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"classifier: gives {shape}, wanted logits [images, classes]")
        if not any(0 < call.p < 1 for call in learnt.calls):
            raise InputError(_NO_DROPOUT + (f" (it {learnt.notes[0]})" if learnt.notes else ""))
        self._notes += learnt.notes
        if learnt.ending is not None:
            self._network.ending = self._whole.network.ending = learnt.ending  # type: ignore[assignment]
            self._notes.append(ending_note(learnt.ending))
        loop = PassLoop(self._whole)
        if not self._fast:
            self._plan = loop
        elif self._mixes(few, logits):
            self._plan = loop
            self._notes.append(
                "gives an image other logits beside other images (batch statistics?): its passes run one by one, and "
                "its uncertainties depend on the batch"
            )
        else:
            self._plan = self._fastest(few, loop, learnt.changed or learnt.ending is not None, len(learnt.calls))
        if not isinstance(self._plan, BatchedTail):
            self._whole.axes(few)  # now, on plain images: an exporter's have symbols for sizes

    def _mixes(self, few: Tensor, logits: Tensor) -> bool:
        """Whether an image's logits depend on those beside it."""
        try:
            alone = [self._whole.learn_logits(one).reshape(1, -1) for one in torch.split(few, 1)]
        except (RuntimeError, ValueError):  # batch statistics of one value
            return True
        together = self._whole.learn_logits(few) if self._network.ending else logits
        return not all(map(agrees, alone, torch.split(together, 1)))

    def _fastest(self, few: Tensor, loop: PassLoop, changed: bool, calls: int) -> Plan:
        """The fastest way that gives what the loop gives, for two images and a few passes."""
        count = min(self.samples, 3)
        ids = torch.arange(1 if self.masks == "shared" else 2, device=few.device)
        source = MaskSource(count, self.seed, ids, self.masks == "shared")
        wanted = loop.logits(few, source)
        task = "multilabel" if wanted.shape[-1] == 1 else "multiclass"
        value = measured(wanted, "entropy", task)[0]

        def right(plan: Plan) -> bool:
            try:
                got = plan.logits(few, source)
                return agrees(got, wanted) and agrees(plan.uncertainty(few, source, "entropy", task), value)
            except Exception:  # shapes computed before the dropout no longer fit behind it
                return False

        plan, reason = self._plan, self._reason
        if changed:
            try:
                plan, reason = _plan_of(split_at_dropout(self._whole.network, self._depth)), ""
            except Exception as error:  # whatever the network's own code raises under tracing
                plan, reason = self._whole, reason or first_line(error)
        found = isinstance(self._plan, BatchedTail)
        if isinstance(plan, BatchedTail):
            if plan.dropouts == calls and right(plan):
                return plan
            some = "tracing does not see all of its dropouts"
            reason = some if plan.dropouts != calls else "its parts do not add up to the whole"
            found = True
        elif may_have_head(self._network):
            split = split_at_hook(self._whole, few)
            if split is not None and right(found_plan := _plan_of(split)):
                return found_plan
            found = True
        if found or changed:
            self._note_whole(reason)
        if right(self._whole):
            return self._whole
        self._notes.append(
            "gives other logits with its passes side by side than one by one, so they run one by one, and an image's "
            "masks may depend on the batch"
        )
        return loop


def _plan_of(split: Split) -> BatchedTail:
    return FusedHead(split) if split.head else BatchedTail(split)


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
