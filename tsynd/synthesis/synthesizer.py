"""The synthesis as a stream: batches in, targeted images out, nothing kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tsynd.data.dataset import Batch
from tsynd.fx.checkpointing import kept_per_image, staged
from tsynd.fx.folding import folded_decoder
from tsynd.fx.layout import LaidOut, channels_last
from tsynd.models.autoencoder import (
    Autoencoder,
    autoencoder_of,
    check_autoencoder,
    check_pixel_range,
    known_latent_std,
)
from tsynd.posteriors.mc_dropout import as_posterior
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.ascent import Ascent, AscentSettings, ascend_latents
from tsynd.synthesis.cuda import Climb, GraphedAscent, fetch, send
from tsynd.synthesis.objectives import Measure, check_targets, measure_of
from tsynd.utils.device import out_of_memory, place
from tsynd.utils.draws import random_directions
from tsynd.utils.errors import InputError, check_choice, check_whole, first_line
from tsynd.utils.timing import Phases

__all__ = ["CPU_BYTES", "AscentStream", "Part", "place"]

Part: TypeAlias = tuple[Batch, Tensor, Ascent]
"""A batch, its source latents [B, ...] and its ascent; the last two on the CPU."""

# Convolution and matrix libraries pick their kernels by the batch; the ascent would amplify a last-digit difference.
# Whole tiles of 16 give every image the same arithmetic in any batch. Large images go in smaller tiles, down to one
# image, that keep within _TILE_BYTES, by the image's shape and the networks alone; no two of those go at once.
_TILE = 16
_TILE_BYTES = 2**27

CPU_BYTES = 2**31
"""What a batch's activations may take on a CPU unless told otherwise."""

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AscentStream:
    """Models that are placed, frozen and checked once, and then take any number of batches.

    Use: ``with stream: stream.check(first); stream.prepare(latent_std, first); for part in stream.run(batches): ...``

    Args:
        autoencoder, classifier: see :func:`tsynd.synthesize`.
        settings: of the ascent.
        seed, batch_size, device, precision, compile, checkpointing, memory_limit: see :func:`tsynd.synthesize`.
        targets: [M, C, ...] in [0, 1] on the CPU, see :func:`tsynd.synthesize`.
        phases: takes the seconds of every phase, see :func:`tsynd.synthesize`.

    Attributes:
        device: where the work happens.
        size: images at once; the encoder's after :meth:`check`, final after :meth:`prepare`.
        checkpointing: whether activations are made again; final after :meth:`prepare`.
        noise: seed of a random point in each ball, half way out, to which the first step leads; None, as at first, for
            none. May be set before :meth:`run`.

    Raises:
        InputError: an argument cannot be used.
    """

    def __init__(
        self,
        autoencoder: Any,
        classifier: nn.Module | Posterior,
        settings: AscentSettings,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        precision: str = "float32",
        compile: bool = False,
        checkpointing: bool | None = None,
        memory_limit: float | None = None,
        targets: Tensor | None = None,
        phases: Phases | None = None,
    ) -> None:
        check_choice("precision", precision, tuple(_PRECISIONS))
        if memory_limit is not None and not (isinstance(memory_limit, (int, float)) and memory_limit > 0):
            raise InputError(f"memory_limit: got {memory_limit!r}, wanted a number of GiB above 0, or None")
        if checkpointing and compile:
            raise InputError("checkpointing: got True with compile=True, wanted one of the two")
        check_whole("batch_size", batch_size, optional=True)
        self.posterior = as_posterior(classifier, settings.samples, settings.masks, seed)
        check_targets(settings.objective, targets)
        self.model = self._running = autoencoder_of(autoencoder)
        self.device = place(device, *self.posterior.networks, self.model)
        if precision == "float16" and self.device.type == "cpu":
            raise InputError("precision: got 'float16' on a CPU, wanted 'float32' or 'bfloat16' there")
        self.size = batch_size or 0
        self.checkpointing = bool(checkpointing)
        self._choose, self._limit, self._given, self._tile = checkpointing is None, memory_limit, batch_size, _TILE
        self._settings, self._precision, self._compile = settings, precision, compile
        self._targets, self._phases = targets, phases or Phases()
        self.noise: int | None = None
        self._reach = 0.0
        # a phase that is measured waits for the GPU
        self._watched = self.device if phases is not None else torch.device("cpu")
        self._stack = contextlib.ExitStack()
        self._copying: list[tuple[Batch, Callable[[], tuple[Tensor, Ascent]]]] = []
        self._climb: Climb

    def __enter__(self) -> AscentStream:
        """Freeze the models."""
        stack = contextlib.ExitStack()
        with stack:
            stack.enter_context(self.posterior.frozen())
            stack.enter_context(frozen(self.model))
            # the precision is this argument's, not the caller's context's
            autocast = _PRECISIONS[self._precision]
            stack.enter_context(torch.autocast(self.device.type, autocast, enabled=autocast is not None))
            stack.enter_context(torch.inference_mode(False))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._copying.clear()
        self._stack.__exit__(kind, error, trace)

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count what happens inside under ``name``."""
        return self._phases(name, self._watched)

    @property
    def known_latent_std(self) -> float | None:
        """The deviation that the settings give, or else the autoencoder's own; None where neither is there."""
        return self._settings.latent_std or known_latent_std(self.model)

    def check(self, first: Tensor) -> int:
        """Run both models on one image [1, C, H, W]; return the number of classes.

        Raises:
            InputError: the models do not fit the image or each other.
        """
        if self._targets is not None and self._targets.shape[1:] != first.shape[1:]:
            shapes = [list(x.shape[1:]) for x in (self._targets, first)]
            raise InputError(f"targets: images of shape {shapes[0]}, wanted {shapes[1]} as the sources")
        classes = _check_models(self.model, self.posterior, first.to(self.device))
        self._tile = _TILE if self.device.type == "cpu" else 1
        self.size = _whole_tiles(self.size or _default_batch(first, self.device), self._tile)
        return classes

    def prepare(self, latent_std: float, first: Tensor) -> None:
        """Make ready to run, with the latents' standard deviation and one image [1, C, H, W]."""
        self._stack.enter_context(self.posterior.folded())
        self._stack.enter_context(self.posterior.laid_out(channels_last))
        self._running = LaidOut(self.model, channels_last).module
        image = first.to(self.device)
        targets = None if self._targets is None else self._targets.to(self.device)
        measure = measure_of(self.posterior, self._settings.objective, self._settings.task, targets)
        with torch.no_grad():
            latent = self._running.encode(image).float()
            decode = folded_decoder(self._running, latent)
        decode = self._fit(decode, measure, image, latent)
        if self._compile:
            self._stack.enter_context(self.posterior.compiled())
            decode = torch.compile(decode, dynamic=False)
        else:
            decode = self._phases.timed("decode", decode, self._watched)
        measured = self._phases.timed("uncertainty", measure, self._watched)

        self._reach = self._settings.lengths(latent_std, latent[0].numel())[1]

        def climb(z0: Tensor, ids: Tensor, y: Tensor | None, jump: Tensor | None) -> Ascent:
            return ascend_latents(self.posterior, decode, z0, ids, self._settings, latent_std, y, measured, jump)

        self._climb = GraphedAscent(climb) if self._compile and self.device.type == "cuda" else climb

    def _fit(
        self, decode: Callable[[Tensor], Tensor], measure: Measure, image: Tensor, latent: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Choose how many images at once and whether to make activations again, by what one image keeps."""
        ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        with torch.no_grad():  # what a posterior keeps of its first call must not be made of tensors without values
            measure(image, ids)

        def kept(decode: Callable[[Tensor], Tensor]) -> int:
            def run(latents: Tensor) -> Tensor:
                images = decode(latents).clamp(0, 1)
                return measure(images, ids.expand(len(images)))

            return kept_per_image(run, latent)

        if self._limit is not None:
            limit = self._limit * 2**30
        else:
            on_gpu = self.device.type == "cuda"
            limit = torch.cuda.mem_get_info(self.device)[0] / 2 if on_gpu else float(CPU_BYTES)
        each = kept(decode)
        if self.device.type == "cpu":
            self._tile = max(1, min(_TILE, 2 ** int(math.log2(max(1.0, _TILE_BYTES / each)))))
        if self._choose and not self._compile:
            self.checkpointing = self._at_once(self._given or self._tile) * each > limit
        if self.checkpointing:
            stages = staged(decode, latent)
            heaviest = max(stages.heaviest, self._stack.enter_context(self.posterior.staged(image)))
            decode, each = stages, kept(stages) + heaviest
        fits = max(1, int(limit / each))
        size = self._given or min(_default_batch(image, self.device), max(self._tile, fits - fits % self._tile))
        self.size = _whole_tiles(size, self._tile)
        return decode

    def run(self, batches: Iterable[Batch]) -> Iterator[Part]:
        """Every batch's results, in order; on a GPU one batch behind, so that copies lie beside the work.

        Out of memory halves a batch, which then gives several parts.
        """
        for batch in batches:
            for part in self._tiles(batch):
                _halving(self._work, part)
            yield from self._finished(1 if self.device.type == "cuda" else 0)
        yield from self._finished(0)

    def _work(self, batch: Batch) -> None:
        count = len(batch.images)
        full = batch.padded(_halved(self.size, count) if self._compile else _whole_tiles(count, self._tile))
        with self.phase("encode"):
            z0 = self._encode(full.images)
        y = None if full.labels is None else send(full.labels, self.device)
        jump = None
        if full.start is not None:
            jump = z0 + _within(send(full.start, self.device).to(z0) - z0, self._reach, self._settings.rule)
        elif self.noise is not None:
            way = random_directions(z0, full.sample_ids, self.noise, self._settings.rule)
            jump = z0 + self._reach / 2 * way
        with self.phase("backward"):
            climbed = self._climb(z0, send(full.sample_ids, self.device), y, jump)
        self._copying.append((batch, fetch(z0[:count], climbed.first(count))))

    def _at_once(self, count: int) -> int:
        """How many of so many images go through the networks at once."""
        return self._tile if self.device.type == "cpu" and self._tile < _TILE else count

    def _tiles(self, batch: Batch) -> list[Batch]:
        """The batch as it goes through the networks."""
        size = self._at_once(len(batch.images))
        return [batch.rows(slice(at, at + size)) for at in range(0, len(batch.images), size)]

    def _encode(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self._running.encode(send(images, self.device)).float().contiguous()

    def encode(self, batch: Batch) -> Tensor:
        """Latents [B, ...] of a batch, on the CPU: those that its ascent starts from."""
        done = [
            self._encode(part.padded(_whole_tiles(len(part.images), self._tile)).images)[: len(part.images)].cpu()
            for part in self._tiles(batch)
        ]
        return torch.cat(done)

    def _finished(self, most: int) -> Iterator[Part]:
        """Wait for results until ``most`` batches' are on their way."""
        while len(self._copying) > most:
            batch, wait = self._copying.pop(0)
            yield (batch, *wait())


def _whole_tiles(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def _halved(size: int, count: int) -> int:
    """The least of size, size / 2, size / 4, ... (rounded up) that holds ``count``: few shapes to compile for."""
    while size > 1 and -(-size // 2) >= count:
        size = -(-size // 2)
    return size


def _check_models(model: Autoencoder, posterior: Posterior, image: Tensor) -> int:
    """Run both models on one image; return the number of classes."""
    check_autoencoder(model, image)
    check_pixel_range(model, image)
    try:
        with torch.no_grad():
            logits = posterior.logits(image)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        shape = list(image.shape[1:])
        raise InputError(f"classifier: failed on an image of shape {shape}: {first_line(error)}") from error
    if logits.dim() != 3:
        raise InputError(f"classifier: gives logits of shape {list(logits.shape[1:])}, wanted [images, classes]")
    return int(logits.shape[2])


def _default_batch(image: Tensor, device: torch.device) -> int:
    """Images at once: about 16 MiB of float pixels on a GPU, 1 MiB on a CPU."""
    budget = 2**22 if device.type == "cuda" else 2**18
    return int(max(1, min(1024, budget // image[0].numel())))


def _halving(work: Callable[[Batch], None], batch: Batch) -> None:
    """Do the batch; out of memory, do its halves."""
    try:
        work(batch)
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(batch.images) == 1:
            raise
    # outside the handler: the traceback would keep the failed batch's tensors alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch.images) // 2
    for part in (slice(0, half), slice(half, None)):
        _halving(work, batch.rows(part))


def _within(way: Tensor, reach: float, rule: str) -> Tensor:
    """Offsets [B, ...] cut to the ball (box) of that radius."""
    if rule == "linf":
        return way.clamp(-reach, reach)
    length = way.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, *[1] * (way.dim() - 1))
    cut: Tensor = way * (reach / length).clamp_max(1)
    return cut
