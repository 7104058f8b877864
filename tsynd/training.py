"""Training loops for the autoencoder and the classifier, on Hugging Face Accelerate.

Alone, a loop runs as it stands; under ``torchrun`` or ``accelerate launch`` every process takes its share of each
batch, and the result is that of one process with the whole batch, to float tolerance (``tsynd.global_batch``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsynd.checks import resolve_device
from tsynd.clock import clock
from tsynd.errors import InputError, require
from tsynd.evaluation import Batches, check_task, evaluate
from tsynd.global_batch import GlobalBatch
from tsynd.models.autoencoder import ReconstructionLoss, check_autoencoder, measure_latent_std
from tsynd.posteriors.classifier import as_classifier
from tsynd.progress import progress_bar
from tsynd.resume import TrainingState, load_state, save_state

__all__ = ["Augmentation", "Checkpoint", "FitReport", "batch_order", "fit_autoencoder", "fit_classifier"]

Augmentation: TypeAlias = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(classifier, images [B, C, H, W], labels [B, ...]) → extra images [M, C, H, W], labels [M, ...]."""

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FitReport:
    """What a training run did.

    Attributes:
        losses: the loss of every iteration, over all processes.
        iterations: number of iterations.
        seconds: wall time of the loop.
        augmentation_share: part of that time spent in the augmentation, in [0, 1].
        validation: scores on ``val`` after training, see ``tsynd.evaluation.scores``; empty without ``val``.
    """

    losses: tuple[float, ...]
    iterations: int
    seconds: float
    augmentation_share: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)


_LEAST = {"iterations": 1, "batch_size": 2, "seed": 0}


def _check_settings(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name == "precision":
            if value not in _PRECISIONS:
                raise InputError(f"precision: got {value!r}, wanted one of {', '.join(_PRECISIONS)}")
        elif name in _LEAST:
            if not isinstance(value, int) or value < _LEAST[name]:
                raise InputError(f"{name}: got {value!r}, wanted an integer of {_LEAST[name]} or more")
        elif not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise InputError(f"{name}: got {value!r}, wanted a finite number of 0 or more")
    if settings["learning_rate"] == 0:
        raise InputError("learning_rate: got 0, wanted a positive number")


def batch_order(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless full batches of indices [batch_size]: shuffled passes over ``count`` images, laid end to end."""
    generator = torch.Generator().manual_seed(seed)
    rest = torch.empty(0, dtype=torch.long)
    while True:
        while len(rest) < batch_size:
            rest = torch.cat([rest, torch.randperm(count, generator=generator)])
        yield rest[:batch_size]
        rest = rest[batch_size:]


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators (dropout draws from them) and give the caller's states back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, so that the same call goes on exactly there after a kill.

    Attributes:
        path: safetensors file; read at the start where it exists, left there at the end.
        every: iterations between two states.

    Raises:
        InputError: ``every`` is below 1.
    """

    path: Path
    every: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"checkpoint: every {self.every!r} iterations, wanted an integer of 1 or more")


class _Loop:
    """What both trainings share: device, processes, optimiser, schedule, precision, batch order."""

    def __init__(
        self, module: nn.Module, batches: Batches, device: torch.device | str | None, settings: dict[str, Any]
    ) -> None:
        if len(batches) < 2:
            raise InputError(f"{batches.name}: holds {len(batches)} image, wanted two or more")
        self.accelerator = require("accelerate", "train").Accelerator(device_placement=False)
        self.device = resolve_device(device) if device is not None else self.accelerator.device
        self.module = module.to(self.device)
        self.batches, self.seed, self.settings = batches, settings["seed"], settings
        self.iterations = settings["iterations"]
        self.batch_size = min(settings["batch_size"], len(batches))
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.batch_size < self.ranks:
            raise InputError(
                f"batch_size: {self.batch_size} images for {self.ranks} processes, wanted one each or more"
            )
        self.rows = torch.arange(self.batch_size)[self.rank :: self.ranks]
        self.dtype = _PRECISIONS[settings["precision"]]
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(f"{type(module).__name__}: has no parameter that requires a gradient")
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
        )
        self.schedule = self._schedule_from(0)

    def _schedule_from(self, step: int) -> torch.optim.lr_scheduler.LambdaLR:
        warm = max(1, min(20, self.iterations // 10))  # a few small steps while batch norm finds its statistics
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.iterations)),
            last_epoch=step - 1,
        )

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def over_all(self, rows: Tensor, total: int) -> AbstractContextManager[Any]:
        """Where this process's images are these rows of a batch over all processes."""
        return GlobalBatch(rows.to(self.device), total) if self.ranks > 1 else nullcontext()

    def total(self, value: Tensor | float) -> float:
        """Sum over all processes."""
        if self.ranks == 1:
            return float(value)
        shared = torch.as_tensor(value, dtype=torch.float64).to(self.device)
        torch.distributed.all_reduce(shared)
        return float(shared)

    def run(
        self,
        compute_loss: Callable[[nn.Module, int, Tensor, Tensor | None], Tensor],
        text: str,
        progress: bool,
        checkpoint: Checkpoint | None,
        extra: Any = None,
    ) -> tuple[tuple[float, ...], float]:
        """Train; ``compute_loss(module, step, images, labels)`` uses ``module`` for its forward pass.

        Over several processes it gives this one's share of the whole batch's loss. ``extra`` is an object whose
        ``state_dict`` and ``load_state_dict`` belong to the checkpoint, or None.

        Raises:
            InputError: the loss is not finite, in any process; all raise it then.
        """
        draws = batch_order(len(self.batches), self.batch_size, self.seed)
        start = time.perf_counter()
        with (
            _own_randomness(self.seed, self.device),
            progress_bar(text, self.iterations, progress and self.rank == 0) as report,
        ):
            state = TrainingState()
            if checkpoint is not None:
                state = load_state(checkpoint.path, self.settings, self.module, self.optimizer, self.device)
                if extra is not None and state.extra:
                    extra.load_state_dict(state.extra)
                report(state.step, "resumed" if state.step else "")
            for _ in range(state.step):
                next(draws)
            if state.step:
                self.schedule = self._schedule_from(state.step)
            engine = self.accelerator.prepare_model(self.module) if self.ranks > 1 else self.module
            for step in range(state.step, self.iterations):
                images, labels = self.batches(next(draws)[self.rows])
                labels = None if labels is None else labels.to(self.device)
                loss = compute_loss(engine, step, images.to(self.device), labels)
                state.losses.append(self.total(loss.detach()))
                if not math.isfinite(state.losses[-1]):
                    raise InputError(
                        f"loss: got {state.losses[-1]} at iteration {step}, wanted a finite number;"
                        f" lower learning_rate or look for bad values in {self.batches.name}"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                # processes' gradients are averaged, their shares of the loss add up
                self.accelerator.backward(loss * self.ranks if self.ranks > 1 else loss)
                self.optimizer.step()
                self.schedule.step()
                state.step = step + 1
                due = checkpoint is not None and (state.step % checkpoint.every == 0 or state.step == self.iterations)
                if checkpoint is not None and due and self.rank == 0:
                    state.extra = {} if extra is None else extra.state_dict()
                    save_state(checkpoint.path, self.settings, state, self.module, self.optimizer, self.device)
                report(1, f"loss {state.losses[-1]:.4f}")
        self.optimizer.zero_grad(set_to_none=True)
        return tuple(state.losses), time.perf_counter() - start


def fit_autoencoder(
    autoencoder: nn.Module,
    images: Any,
    *,
    iterations: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-4,
    latent_noise: float = 0.5,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool = True,
    checkpoint: Checkpoint | None = None,
) -> FitReport:
    """Train an autoencoder, in place, to reconstruct ``images`` from disturbed latents.

    The loss is the mean squared error. Each image's latent is disturbed by Gaussian noise of up to
    ``latent_noise`` deviations, so that the surroundings of a real latent decode to images too. At the end
    the autoencoder's buffer ``latent_std``, where it has one, is set (``measure_latent_std``).

    Args:
        autoencoder: module with ``encode`` and ``decode``; it is moved to the device and left in eval mode.
        images: [N, C, H, W], or labelled data, as ``tsynd.evaluation.Batches`` reads them.
        iterations: optimiser steps.
        batch_size: images per step over all processes; at most the number of images is used.
        learning_rate: peak of a cosine schedule (AdamW).
        weight_decay: of AdamW.
        latent_noise: largest noise, in deviations of the latents.
        seed: of the batch order and the noise; the global random state is left as it was.
        device: Accelerate's choice by default.
        precision: "float32" or "bfloat16" (autocast; weights stay float32).
        progress: show a bar.
        checkpoint: keep the training's state; a killed training that is called again in the same way (number of
            processes may differ) ends, on a CPU, with the same weights bit for bit as one that was not.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite.
    """
    settings: dict[str, Any] = dict(iterations=iterations, batch_size=batch_size, learning_rate=learning_rate)
    settings |= dict(weight_decay=weight_decay, seed=seed, precision=precision)
    _check_settings(settings | {"latent_noise": latent_noise})
    batches = Batches(images, "images")
    loop = _Loop(ReconstructionLoss(autoencoder, latent_noise), batches, device, settings)
    model: Any = autoencoder.eval()
    check_autoencoder(model, batches(torch.tensor([0]))[0].to(loop.device))

    def compute_loss(engine: nn.Module, step: int, images: Tensor, labels: Tensor | None) -> Tensor:
        with loop.over_all(loop.rows, loop.batch_size), loop.autocast():
            loss: Tensor = engine(images)
        return loss if loop.ranks == 1 else loss * (len(images) / loop.batch_size)

    autoencoder.train()
    try:
        losses, seconds = loop.run(compute_loss, "autoencoder", progress, checkpoint)
    finally:
        autoencoder.eval()
    if isinstance(getattr(autoencoder, "latent_std", None), Tensor):
        with torch.no_grad():
            latents = (model.encode(batches(part)[0].to(loop.device)) for part in batches.chunks(256))
            model.latent_std.copy_(measure_latent_std(latents))
    return FitReport(losses, iterations, seconds)


def _class_weights(labels: Tensor, task: str, classes: int) -> Tensor:
    """Weights [C] that give classes, or labels' positives, equal say; absent ones weigh 1."""
    if task == "multiclass":
        counts = torch.bincount(labels, minlength=classes).float()
        present = int((counts > 0).sum())
        return torch.where(counts > 0, len(labels) / (present * counts.clamp_min(1)), torch.ones(classes))
    positive = labels.sum(0)
    # Capped: one positive among thousands would otherwise be the whole loss.
    ratio = ((len(labels) - positive) / positive.clamp_min(1)).clamp(0.05, 20)
    return torch.where((positive > 0) & (positive < len(labels)), ratio, torch.ones(classes))


def _with_extra(loop: _Loop, count: int, extra_rows: Tensor | None) -> tuple[Tensor, int, int]:
    """This process's rows of the whole batch of real and then extra images, its size, and the extra ones' number."""
    made = int(loop.total(count))
    if loop.ranks == 1:
        return torch.arange(loop.batch_size + made), loop.batch_size + made, made
    if extra_rows is None:
        counts = torch.zeros(loop.ranks, dtype=torch.int64, device=loop.device)
        counts[loop.rank] = count
        torch.distributed.all_reduce(counts)
        own = [len(range(rank, loop.batch_size, loop.ranks)) for rank in range(loop.ranks)]
        extra_rows = int(counts[: loop.rank].sum()) + torch.arange(count)
        if counts.tolist() == own:  # one for each, taken to be in the same order
            extra_rows = loop.rows
    return torch.cat([loop.rows, loop.batch_size + extra_rows]), loop.batch_size + made, made


def fit_classifier(
    classifier: nn.Module,
    data: Any,
    *,
    task: str = "multiclass",
    iterations: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    balanced: bool = True,
    augmentation: Augmentation | None = None,
    augmentation_weight: float = 1.0,
    warmup_fraction: float = 0.3,
    seed: int = 0,
    device: torch.device | str | None = None,
    precision: str = "float32",
    progress: bool = True,
    val: Any = None,
    checkpoint: Checkpoint | None = None,
) -> FitReport:
    """Train a classifier, in place, with CE(x, y) + λ·CE(x*, y*) (binary CE per label for multilabel).

    Real and extra images go through the classifier in one batch: batch norm then normalises both with the
    statistics that it also stores for test time, and one large pass is faster than two.

    Args:
        classifier: images [B, C, H, W] in [0, 1] → logits [B, K]; it is moved to the device and left in eval
            mode.
        data: labelled images, as ``tsynd.evaluation.Batches`` reads them.
        task: "multiclass" (labels int64 [N]) or "multilabel" (labels 0/1 [N, K]).
        balanced: weigh the loss so that every class (every label's positives) counts the same.
        augmentation: called with the classifier and each step's real batch after the warm-up; it may change
            the classifier's mode, and what it returns is not differentiated. Where it has them, its
            ``prepare(batches of all training images)`` is called before training and ``set_progress(fraction)``
            before each call, from 0 at the first to 1 at the last augmented step. Over several processes each
            gives its own images; ``set_rows(rows of the whole batch, its size)`` is called before each call then,
            and says which rows will be given.
        augmentation_weight: λ.
        warmup_fraction: part of the iterations before the augmentation is used, in [0, 1].
        val: labelled images, scored once after training.
        iterations: optimiser steps.
        batch_size: real images per step over all processes.
        learning_rate: peak of a cosine schedule (AdamW).
        weight_decay: of AdamW.
        seed: of the batch order and dropout; the global random state is left as it was.
        device: Accelerate's choice by default.
        precision: "float32" or "bfloat16" (autocast; weights stay float32).
        progress: show a bar.
        checkpoint: as in :func:`fit_autoencoder`.

    Raises:
        InputError: an argument that cannot be used, or a loss that is not finite.
    """
    check_task(task)
    settings: dict[str, Any] = dict(iterations=iterations, batch_size=batch_size, learning_rate=learning_rate)
    settings |= dict(weight_decay=weight_decay, seed=seed, precision=precision)
    _check_settings(settings | {"augmentation_weight": augmentation_weight, "warmup_fraction": warmup_fraction})
    if warmup_fraction > 1:
        raise InputError(f"warmup_fraction: got {warmup_fraction}, wanted a number in [0, 1]")
    batches, classifier = Batches(data), as_classifier(classifier)
    loop = _Loop(classifier, batches, device, settings)
    with torch.no_grad():
        shape = list(classifier.eval()(batches(torch.tensor([0]))[0].to(loop.device)).shape)
    if len(shape) != 2:
        raise InputError(f"classifier: one image gave logits {shape}, wanted [1, K]")
    everything = batches.labels(task, shape[1])
    weights = _class_weights(everything, task, shape[1]) if balanced else torch.ones(shape[1])
    weights = weights.to(loop.device)
    start_at = math.ceil(warmup_fraction * iterations)
    spent = 0.0
    stateful = augmentation if hasattr(augmentation, "load_state_dict") else None
    tell_progress, tell_rows = getattr(augmentation, "set_progress", None), getattr(augmentation, "set_rows", None)
    prepare = getattr(augmentation, "prepare", None)
    if prepare is not None:
        prepare(batches(part)[0].to(loop.device) for part in batches.chunks(256))

    def compute_loss(engine: nn.Module, step: int, images: Tensor, labels: Tensor | None) -> Tensor:
        nonlocal spent
        assert labels is not None  # batches.labels has seen them
        share = torch.full([len(images)], 1 / loop.batch_size, device=loop.device)
        rows, total = loop.rows, loop.batch_size
        if augmentation is not None and step >= start_at:
            start = clock(loop.device)
            if tell_progress is not None:
                tell_progress((step - start_at) / max(iterations - 1 - start_at, 1))
            extra_rows = tell_rows(rows, total) if loop.ranks > 1 and tell_rows is not None else None
            extra, extra_labels = augmentation(classifier, images, labels)
            spent += clock(loop.device) - start
            classifier.train()
            if extra.shape[1:] != images.shape[1:] or len(extra) != len(extra_labels):
                raise InputError(
                    f"augmentation: gave images {list(extra.shape)} with {len(extra_labels)} labels,"
                    f" wanted [M, {', '.join(map(str, images.shape[1:]))}] with M labels"
                )
            images = torch.cat([images, extra.detach().to(images)])
            labels = torch.cat([labels, extra_labels.to(labels)])
            rows, total, made = _with_extra(loop, len(extra), extra_rows)
            extra_share = augmentation_weight / max(made, 1)
            share = torch.cat([share, torch.full([len(extra)], extra_share, device=loop.device)])
        with loop.over_all(rows, total), loop.autocast():
            logits = engine(images).float()
        if task == "multiclass":
            each = functional.cross_entropy(logits, labels.long(), weight=weights, reduction="none")
        else:
            truth = labels.float()
            each = functional.binary_cross_entropy_with_logits(
                logits, truth, pos_weight=weights, reduction="none"
            ).mean(1)
        return (each * share).sum()

    classifier.train()
    try:
        losses, seconds = loop.run(compute_loss, "classifier", progress, checkpoint, stateful)
    finally:
        classifier.eval()
    validation = evaluate(classifier, val, task=task, conditions=("clean",))["clean"] if val is not None else {}
    return FitReport(losses, iterations, seconds, min(spent / seconds, 1.0), validation)
