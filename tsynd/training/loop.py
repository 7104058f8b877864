"""Training loops for the autoencoder and the classifier, on Hugging Face Accelerate.

Alone, a loop runs as it stands; under ``torchrun`` or ``accelerate launch`` every process takes its share of each
batch, and the result is that of one process with the whole batch, to float tolerance (``tsynd.training.global_batch``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import LabelledBatches
from tsynd.training.global_batch import GlobalBatch
from tsynd.utils.device import resolve_device
from tsynd.utils.errors import InputError, check_choice, check_whole, require
from tsynd.utils.fingerprint import differences
from tsynd.utils.progress import progress_bar
from tsynd.utils.tensors import read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "FitReport",
    "Track",
    "TrainingSettings",
    "TrainingState",
    "batch_order",
    "load_state",
    "save_state",
]

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
_LEAST = {"iterations": 1, "batch_size": 2, "seed": 0}


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained.

    Attributes:
        iterations: optimiser steps, at least 1.
        batch_size: real images per step over all processes, at least 2; at most the number of images is used.
        learning_rate: peak of a cosine schedule (AdamW), above 0.
        weight_decay: of AdamW.
        seed: of the batch order, dropout and noise; the global random state is left as it was.
        precision: ``float32`` or ``bfloat16`` (autocast; weights stay float32).

    Raises:
        InputError: a value out of range.
    """

    iterations: int = 300
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "precision":
                check_choice(name, value, tuple(_PRECISIONS))
            elif name in _LEAST:
                check_whole(name, value, _LEAST[name])
            elif not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise InputError(f"{name}: got {value!r}, wanted a finite number of 0 or more")
        if self.learning_rate == 0:
            raise InputError("learning_rate: got 0, wanted a positive number")


@dataclass(frozen=True)
class FitReport:
    """What a training run did.

    Attributes:
        losses: the loss of every iteration, over all processes.
        iterations: number of iterations.
        seconds: wall time of the loop.
        augmentation_share: part of that time spent in the augmentation, in [0, 1].
        validation: scores on ``val`` after training, see ``tsynd.evaluation.metrics.scores``; empty without ``val``.
    """

    losses: tuple[float, ...]
    iterations: int
    seconds: float
    augmentation_share: float = 0.0
    validation: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Track:
    """Where the loss of every step (and scores on ``val``) are logged, by one of Accelerate's trackers.

    Attributes:
        kind: ``tensorboard``, ``wandb``, ``mlflow``, ... as Accelerate calls it.
        folder: where it writes.
        name: of the run; W&B's project, MLflow's experiment.
    """

    kind: str
    folder: Path
    name: str = "tsynd"


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


def tracking_accelerator(track: Track | None) -> Any:
    """Accelerate's object for a training.

    Raises:
        InputError: Accelerate knows no such tracker, or its package is not installed.
    """
    accelerate = require("accelerate", "train")
    if track is None:
        return accelerate.Accelerator(device_placement=False)
    try:
        made = accelerate.Accelerator(device_placement=False, log_with=track.kind, project_dir=str(track.folder))
    except ValueError as error:
        raise InputError(f"track: got {track.kind!r}, wanted tensorboard, wandb, mlflow, ...: {error}") from None
    if not made.log_with:
        raise InputError(f"track: {track.kind} is not installed, wanted pip install {track.kind}")
    return made


class _Loop:
    """What both trainings share: device, processes, optimiser, schedule, precision, batch order."""

    def __init__(
        self,
        module: nn.Module,
        batches: LabelledBatches,
        device: torch.device | str | None,
        settings: TrainingSettings,
        track: Track | None = None,
    ) -> None:
        if len(batches) < 2:
            raise InputError(f"{batches.name}: holds {len(batches)} image, wanted two or more")
        self.accelerator = tracking_accelerator(track)
        self.tracked = track
        self.device = resolve_device(device) if device is not None else self.accelerator.device
        self.module = module.to(self.device)
        self.batches, self.settings = batches, settings
        self.batch_size = min(settings.batch_size, len(batches))
        self.ranks, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.batch_size < self.ranks:
            raise InputError(
                f"batch_size: {self.batch_size} images for {self.ranks} processes, wanted one each or more"
            )
        self.rows = torch.arange(self.batch_size)[self.rank :: self.ranks]
        self.dtype = _PRECISIONS[settings.precision]
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise InputError(f"{type(module).__name__}: has no parameter that requires a gradient")
        groups = getattr(
            module, "parameter_groups", None
        )  # of a pretrained network, whose parts learn at their own rates
        self.optimizer = torch.optim.AdamW(
            groups(settings.learning_rate) if groups else module.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.schedule = self._schedule_from(0)

    def _schedule_from(self, step: int) -> torch.optim.lr_scheduler.LambdaLR:
        warm = max(
            1, min(20, self.settings.iterations // 10)
        )  # a few small steps while batch norm finds its statistics
        return torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.settings.iterations)),
            last_epoch=step - 1,
        )

    def track(self, values: dict[str, float], step: int) -> None:
        if self.tracked is not None:
            self.accelerator.log(values, step=step)

    def stop_tracking(self) -> None:
        for tracker in self.accelerator.trackers:  # end_training would end the processes' group too
            tracker.finish()

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
        compute_loss: Callable[[nn.Module, int, Tensor, Tensor, Tensor | None], Tensor],
        text: str,
        progress: bool,
        checkpoint: Checkpoint | None,
        extra: Any = None,
    ) -> tuple[tuple[float, ...], float]:
        """Train; ``compute_loss(module, step, ids, images, labels)`` uses ``module`` for its forward pass.

        Over several processes it gives this one's share of the whole batch's loss. ``extra`` is an object whose
        ``state_dict`` and ``load_state_dict`` belong to the checkpoint, or None.

        Raises:
            InputError: the loss is not finite, in any process; all raise it then.
        """
        if self.tracked is not None:
            known = {key: value for key, value in asdict(self.settings).items() if value is not None}
            self.accelerator.init_trackers(self.tracked.name, config=known)
        draws = batch_order(len(self.batches), self.batch_size, self.settings.seed)
        start = time.perf_counter()
        with (
            _own_randomness(self.settings.seed, self.device),
            progress_bar(text, self.settings.iterations, progress and self.rank == 0) as report,
        ):
            state = TrainingState()
            if checkpoint is not None:
                state = load_state(checkpoint.path, asdict(self.settings), self.module, self.optimizer, self.device)
                if extra is not None and state.extra:
                    extra.load_state_dict(state.extra)
                report(state.step, "resumed" if state.step else "")
            for _ in range(state.step):
                next(draws)
            if state.step:
                self.schedule = self._schedule_from(state.step)
            engine = self.accelerator.prepare_model(self.module) if self.ranks > 1 else self.module
            for step in range(state.step, self.settings.iterations):
                ids = next(draws)[self.rows]
                batch = self.batches.at(ids)
                labels = None if batch.labels is None else batch.labels.to(self.device)
                loss = compute_loss(engine, step, ids, batch.images.to(self.device), labels)
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
                due = checkpoint is not None and (
                    state.step % checkpoint.every == 0 or state.step == self.settings.iterations
                )
                if checkpoint is not None and due and self.rank == 0:
                    state.extra = {} if extra is None else extra.state_dict()
                    save_state(checkpoint.path, asdict(self.settings), state, self.module, self.optimizer, self.device)
                self.track({"loss": state.losses[-1]}, state.step)
                report(1, f"loss {state.losses[-1]:.4f}")
        self.optimizer.zero_grad(set_to_none=True)
        return tuple(state.losses), time.perf_counter() - start


@dataclass
class TrainingState:
    """What a training is made of besides its settings.

    Attributes:
        step: finished iterations.
        losses: of those.
        extra: what an augmentation's ``state_dict`` said.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


def save_state(
    path: Path,
    settings: dict[str, Any],
    state: TrainingState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> None:
    """Write everything as one file; the old one stays until the new one is on the disk."""
    generators = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    held = optimizer.state_dict()["state"].items()
    write_tensors(
        path,
        {
            "settings": settings,
            "step": state.step,
            "losses": torch.tensor(state.losses, dtype=torch.float64),
            "extra": state.extra,
            "module": dict(module.state_dict()),
            "optimizer": {str(i): {k: v for k, v in own.items() if isinstance(v, Tensor)} for i, own in held},
            "generators": generators,
        },
    )


def load_state(
    path: Path,
    settings: dict[str, Any],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> TrainingState:
    """Put the modules, the optimiser and the generators where the file says; a fresh state where there is no file.

    Raises:
        InputError: the file is damaged, or of a training with other settings.
    """
    if not path.exists():
        return TrainingState()
    held = read_tensors(path)
    if held is None or not isinstance(held.get("settings"), dict):
        raise InputError(f"checkpoint: {path} cannot be read: it is damaged, or no state of a training; delete it")
    if changes := differences(held["settings"], settings):
        raise InputError(f"checkpoint: {path} is of a training with other settings ({changes}); wanted another file")
    try:
        module.load_state_dict(held["module"])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, own in held["optimizer"].items():
            parameter = parameters[int(index)]
            for name, value in own.items():
                if value.shape == parameter.shape:  # as the optimiser makes it: in the parameter's memory order
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                optimizer.state[parameter][name] = value
        torch.set_rng_state(held["generators"]["cpu"])
        if device.type == "cuda" and "cuda" in held["generators"]:
            torch.cuda.set_rng_state(held["generators"]["cuda"], device)
        return TrainingState(held["step"], held["losses"].tolist(), held["extra"])
    except (RuntimeError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint: {path} does not fit this model: {reason}") from error
