"""``tsynd.synthesize``: from labelled images to targeted ones, batch by batch."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsynd.ascent import Ascent, AscentSettings, ascend_latents
from tsynd.autoencoder import Autoencoder, as_autoencoder, check_autoencoder, measure_latent_std
from tsynd.checks import check_choice, check_images, resolve_device
from tsynd.clock import Phases
from tsynd.collect import Collector
from tsynd.errors import InputError
from tsynd.fast import GraphedAscent, channels_last, fetch, send
from tsynd.folding import folded_decoder
from tsynd.goals import PlausibleGoal, Uncertainty
from tsynd.posterior import Posterior, as_posterior, frozen
from tsynd.progress import progress_bar
from tsynd.source import Batch, ImageSource
from tsynd.storage import save_class_folders, save_npz, to_uint8

__all__ = ["SynthesisResult", "load_result", "synthesize", "uncertainty"]

# Convolution and matrix libraries pick their kernels by the batch's remainder. Whole tiles give every image the same
# arithmetic in any batch; the ascent would amplify a last-digit difference.
_TILE = 16

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SynthesisResult:
    """Targeted images and where they come from; all tensors on the CPU, row i belongs to source image i.

    Attributes:
        images: [N, C, H, W] float32 in [0, 1].
        labels: [N] or [N, L], the sources' labels, or None.
        latents: [N, ...] float32, the best iterates.
        source_latents: [N, ...] float32, the encoded sources.
        initial_uncertainty: [N], of the reconstructions, in nats.
        uncertainty: [N], of the images, in nats; both under the posterior samples climbed on.
        trajectory: [N, steps + 1], the uncertainty at every iterate.
        status: [N] int8, see :class:`tsynd.Status`.
        sample_ids: [N] int64.
    """

    images: Tensor
    labels: Tensor | None
    latents: Tensor
    source_latents: Tensor
    initial_uncertainty: Tensor
    uncertainty: Tensor
    trajectory: Tensor
    status: Tensor
    sample_ids: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: str | Path, class_names: tuple[str, ...] | None = None) -> Path:
        """Write the result: a path that ends in ``.npz`` gets one archive, any other a folder of PNG per class.

        The archive's ``images`` [N, H, W] or [N, H, W, 3] are uint8 as in MedMNIST, so that
        :func:`tsynd.load_data` reads it; the other fields are stored as they are.

        Args:
            path: a file name or a folder that does not exist yet.
            class_names: folder names; the class numbers when None.

        Raises:
            InputError: the path cannot be written, or class folders are wanted for images without labels.
        """
        path = Path(path)
        if path.suffix == ".npz":
            arrays = {field.name: getattr(self, field.name) for field in fields(self)}
            arrays = {name: value for name, value in arrays.items() if value is not None}
            arrays["images"] = to_uint8(self.images)
            if class_names is not None:
                arrays["class_names"] = np.array(class_names)
            save_npz(path, **arrays)
        else:
            if self.labels is None:
                raise InputError("labels: the result has none, wanted some to name the class folders; save as .npz")
            if class_names is None:
                width = int(self.labels.max()) + 1
                class_names = tuple(str(i) for i in range(width))
            save_class_folders(path, self.images, self.labels, class_names)
        return path


def load_result(path: str | Path) -> SynthesisResult:
    """Read what :meth:`SynthesisResult.save` wrote as ``.npz``; the images come back rounded to 1/255.

    Raises:
        InputError: not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "biuf"}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"path: {path} cannot be read ({type(error).__name__}), wanted an .npz of tsynd") from None
    missing = {field.name for field in fields(SynthesisResult)} - {"labels"} - set(arrays)
    if missing:
        raise InputError(f"path: {path} lacks {', '.join(sorted(missing))}, wanted an .npz of SynthesisResult.save")
    pixels = arrays["images"]
    arrays["images"] = check_images(pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2))
    arrays.setdefault("labels", None)  # type: ignore[arg-type]
    return SynthesisResult(**{field.name: arrays[field.name] for field in fields(SynthesisResult)})


def _whole_tiles(count: int, device: torch.device) -> int:
    return -(-count // _TILE) * _TILE if device.type == "cpu" else count


def _halved(size: int, count: int) -> int:
    """The least of size, size / 2, size / 4, ... (rounded up) that holds ``count``: few shapes to compile for."""
    while size > 1 and -(-size // 2) >= count:
        size = -(-size // 2)
    return size


def synthesize(
    autoencoder: Any,
    classifier: nn.Module | Posterior,
    images: Any,
    labels: Any = None,
    *,
    objective: str = "mutual_information",
    task: str = "multiclass",
    samples: int = 32,
    masks: str = "shared",
    steps: int = 5,
    radius: float = 0.5,
    step_size: float | None = None,
    rule: str = "l2",
    label_consistency: float | None = None,
    latent_std: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    sample_ids: Any = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
    compile: bool = False,
    progress: bool = True,
    phases: Phases | None = None,
) -> SynthesisResult:
    """Move each image's latent code uphill on the classifier's epistemic uncertainty and decode it.

    TSynD (Niemeijer et al. 2024, arXiv 2406.17473): maximise MI(decode(z)) over |z - encode(x)| <= r by projected
    gradient ascent. The same seed and ``sample_ids`` give the same images in any batch size and order.

    Args:
        autoencoder: anything with ``encode`` and ``decode``, a pair of modules, or a model that
            :func:`tsynd.as_autoencoder` knows.
        classifier: a module giving logits [B, classes] with at least one active dropout, or a
            :class:`tsynd.Posterior` (then ``samples``, ``masks`` and ``seed`` are its own).
        images: tensor or array [N, C, H, W] (float in [0, 1], or uint8), a Dataset or a DataLoader of images or
            (image, label) pairs.
        labels: [N] class numbers or [N, L] of 0/1; those of the Dataset or DataLoader when None.
        objective: ``mutual_information`` or ``entropy``.
        task: ``multiclass`` or ``multilabel``.
        samples: T, posterior samples.
        masks: ``shared`` or ``independent``, see :class:`tsynd.MCDropout`.
        steps: K, ascent steps.
        radius: of the ball, times latent standard deviation times sqrt(latent dimension).
        step_size: in the same unit; None is 2.5 * radius / steps.
        rule: ``l2`` or ``linf``, see :func:`tsynd.ops.ascend_`.
        label_consistency: keep a step only while the posterior mean gives the source label at least this
            probability; None for no limit.
        latent_std: standard deviation of the latents; None takes the autoencoder's ``latent_std`` or else measures
            it over the images.
        batch_size: images at once, on a CPU rounded up to a multiple of 16; None picks one. Out of memory halves it
            and goes on.
        seed: of the posterior samples.
        sample_ids: [N] integers in [0, 2^32) that name the images for the masks; their positions when None.
        device: where to work (the models are moved there); None is where the classifier is.
        precision: ``float32``, ``bfloat16`` or, on a GPU, ``float16`` (autocast).
        compile: send the decoder and the classifier's part before its first dropout through ``torch.compile``, and on
            a GPU replay the steps of a batch as a CUDA graph. Worth its minute for many batches; the images then
            equal those without it to float tolerance only.
        progress: show a bar where rich is installed.
        phases: takes the seconds spent on ``prepare``, ``encode``, ``decode``, ``uncertainty`` (with its gradient
            from the features on), ``backward`` (the other gradients, and the steps) and ``collect``; not with
            ``compile``, whose phases run into one another.

    Raises:
        InputError: an argument cannot be used; raised before work starts, except for a bad item deep in a
            Dataset or DataLoader, which is named by its index.
    """
    if phases is not None and compile:
        raise InputError("phases: got phases to measure with compile=True, wanted one of the two")
    settings = AscentSettings(objective, task, steps, radius, step_size, rule, label_consistency)
    check_choice("precision", precision, tuple(_PRECISIONS))
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size: got {batch_size!r}, wanted an integer of at least 1, or None")
    if latent_std is not None and not (math.isfinite(latent_std) and latent_std > 0):
        raise InputError(f"latent_std: got {latent_std!r}, wanted a number above 0, or None")
    posterior = as_posterior(classifier, samples, masks, seed)
    model = as_autoencoder(autoencoder)
    source = ImageSource(images, labels, sample_ids, task)
    target = _place(posterior, model, device)
    if precision == "float16" and target.type == "cpu":
        raise InputError("precision: got 'float16' on a CPU, wanted 'float32' or 'bfloat16' there")

    watched, phases = phases is not None, phases or Phases()
    where = target if watched else torch.device("cpu")  # a phase that is measured waits for the GPU

    with contextlib.ExitStack() as stack:
        preparing = stack.enter_context(contextlib.ExitStack())
        preparing.enter_context(phases("prepare", where))
        stack.enter_context(posterior.frozen())
        if isinstance(model, nn.Module):
            stack.enter_context(frozen(model))
        autocast = _PRECISIONS[precision]
        if autocast is not None:
            stack.enter_context(torch.autocast(target.type, autocast))
        classes = _check_models(model, posterior, source.first.to(target))
        source.check_labels(classes, needed=label_consistency is not None)
        size = _whole_tiles(batch_size or _default_batch(source.first, target), target)
        scale = latent_std or _latent_std(model, source, size, target)
        networks = (*posterior.networks, model) if isinstance(model, nn.Module) else posterior.networks
        stack.enter_context(channels_last(*networks))
        stack.enter_context(posterior.folded())  # after the layout, which the folded weights take over
        with torch.no_grad():
            decode = folded_decoder(model, model.encode(source.first.to(target)).float())
        if compile:
            stack.enter_context(posterior.compiled())
            decode = torch.compile(decode, dynamic=False)

        if not compile:
            decode = phases.timed("decode", decode, where)
        measure = phases.timed("uncertainty", Uncertainty(posterior, objective, task), where)

        def climb(z0: Tensor, ids: Tensor, y: Tensor | None) -> Ascent:
            return ascend_latents(posterior, decode, z0, ids, settings, scale, y, PlausibleGoal(measure, z0))

        run = GraphedAscent(climb) if compile and target.type == "cuda" else climb
        collector = Collector(source.count)
        copying: list[tuple[Batch, Callable[[], tuple[Tensor, Ascent]]]] = []

        def collect(most: int) -> None:  # leave `most` batches' results on their way
            while len(copying) > most:
                done, wait = copying.pop(0)
                collector.add(done, *wait())

        def work(batch: Batch) -> None:
            count = len(batch.images)
            full = batch.padded(_halved(size, count) if compile else _whole_tiles(count, target))
            with torch.no_grad(), phases("encode", where):
                z0 = model.encode(send(full.images, target)).float().contiguous()
            y = None if full.labels is None else send(full.labels, target)
            with phases("backward", where):
                climbed = run(z0, send(full.sample_ids, target), y)
            with phases("collect", where):
                copying.append((batch, fetch(z0[:count], climbed.first(count))))
                collect(1 if target.type == "cuda" else 0)

        preparing.close()
        with progress_bar("synthesising", source.count, progress) as advance:
            for batch in source.batches(size):
                _halving(work, batch, lambda done: advance(done, _mean_raise(collector)))
        collect(0)
    return SynthesisResult(**collector.arrays())  # type: ignore[arg-type]


def uncertainty(
    classifier: nn.Module | Posterior,
    images: Any,
    *,
    objective: str = "mutual_information",
    task: str = "multiclass",
    samples: int = 32,
    masks: str = "shared",
    seed: int = 0,
    sample_ids: Any = None,
    batch_size: int = 256,
) -> Tensor:
    """Uncertainty of given images, for instance under a seed that the ascent has not seen.

    Args:
        classifier: see :func:`synthesize`.
        images: tensor, array, Dataset or DataLoader, see :func:`synthesize`.
        objective: ``mutual_information`` or ``entropy``.
        task: ``multiclass`` or ``multilabel``.
        samples: T.
        masks: ``shared`` or ``independent``.
        seed: of the posterior samples.
        sample_ids: see :func:`synthesize`.
        batch_size: images at once.

    Returns:
        [N] float32 in nats, on the CPU.
    """
    posterior = as_posterior(classifier, samples, masks, seed)
    source = ImageSource(images, None, sample_ids, task)
    device = _place(posterior, None, None)
    values = []
    with posterior.frozen(), torch.no_grad():
        for batch in source.batches(batch_size):
            ids = batch.sample_ids.to(device)
            values.append(posterior.uncertainty(batch.images.to(device), ids, objective, task).cpu())
    return torch.cat(values)


def _place(posterior: Posterior, model: Autoencoder | None, device: torch.device | str | None) -> torch.device:
    """Move the models and tell where the work happens."""
    if device is None:
        parameters = (p for network in posterior.networks for p in network.parameters())
        target = next((p.device for p in parameters), torch.device("cpu"))
    else:
        target = resolve_device(device)
        for network in posterior.networks:
            network.to(target)
    if isinstance(model, nn.Module):
        model.to(target)
    return target


def _check_models(model: Autoencoder, posterior: Posterior, image: Tensor) -> int:
    """Run both models on one image; return the number of classes."""
    check_autoencoder(model, image)
    try:
        with torch.no_grad():
            logits = posterior.logits(image)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"classifier: failed on an image of shape {list(image.shape[1:])}: {reason}") from error
    if logits.dim() != 3:
        raise InputError(f"classifier: gives logits of shape {list(logits.shape[1:])}, wanted [images, classes]")
    return int(logits.shape[2])


def _default_batch(image: Tensor, device: torch.device) -> int:
    """Images at once: about 16 MiB of float pixels on a GPU, 1 MiB on a CPU."""
    budget = 2**22 if device.type == "cuda" else 2**18
    return int(max(1, min(1024, budget // image[0].numel())))


def _latent_std(model: Autoencoder, source: ImageSource, size: int, device: torch.device) -> float:
    known = getattr(model, "latent_std", None)
    value = float(known) if known is not None else math.nan
    if not (math.isfinite(value) and value > 0):
        if source.count < 2:
            raise InputError("latent_std: got None with a single image, wanted a number: one image has no deviation")
        with torch.no_grad():
            value = float(
                measure_latent_std(model.encode(batch.images.to(device)).cpu() for batch in source.batches(size))
            )
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"autoencoder: its latents have standard deviation {value}, wanted a number above 0")
    return value


def _halving(work: Callable[[Batch], None], batch: Batch, done: Callable[[int], None]) -> None:
    """Do the batch; out of memory, do its halves."""
    try:
        work(batch)
        done(len(batch.images))
        return
    except RuntimeError as error:
        short = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not short or len(batch.images) == 1:
            raise
    # outside the handler: the traceback would keep the failed batch's tensors alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(batch.images) // 2
    for part in (slice(0, half), slice(half, None)):
        labels = None if batch.labels is None else batch.labels[part]
        _halving(work, Batch(batch.images[part], labels, batch.sample_ids[part]), done)


def _mean_raise(collector: Collector) -> str:
    return "" if collector.last is None else "uncertainty {:.4f} → {:.4f}".format(*collector.last)
