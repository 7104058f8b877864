"""``tsynd.synthesize``: from labelled images to targeted ones, batch by batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsynd.data.dataset import Batch, LabelledBatches, at_once
from tsynd.models.autoencoder import as_autoencoder, check_autoencoder, latent_deviation
from tsynd.posteriors.mc_dropout import as_posterior
from tsynd.posteriors.posterior import Posterior, frozen
from tsynd.synthesis.ascent import Ascent, AscentOptions, AscentSettings, ascent_settings
from tsynd.synthesis.objectives import measure_of
from tsynd.synthesis.result import Collector, SynthesisResult
from tsynd.synthesis.synthesizer import AscentStream, place
from tsynd.utils.errors import InputError, check_choice, check_whole
from tsynd.utils.progress import progress_bar
from tsynd.utils.timing import Phases

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["measure_latent_std", "synthesize", "uncertainty"]


def synthesize(
    autoencoder: Any,
    classifier: nn.Module | Posterior,
    images: Any,
    labels: Any = None,
    *,
    targets: Any = None,
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
    variants: int = 1,
    per_class: Mapping[int, int] | None = None,
    balance: bool = False,
    start: str | Tensor = "source",
    most_uncertain: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    sample_ids: Any = None,
    device: torch.device | str | None = None,
    precision: str = "float32",
    compile: bool = False,
    checkpointing: bool | None = None,
    memory_limit: float | None = None,
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
        images: tensor or array [N, C, H, W] or, for volumes, [N, C, D, H, W] (float in [0, 1], or uint8), a Dataset
            or a DataLoader of images or (image, label) pairs.
        labels: [N] class numbers or [N, L] of 0/1; those of the Dataset or DataLoader when None.
        targets: images as above, for the objective ``expected_information``: those that the classifier is to get
            right, labelled or not, as of another site; a few hundred at most.
        objective: ``mutual_information``, ``entropy``, or ``expected_information``: what an image's class would tell
            about those of ``targets`` (EPIG, Bickford Smith et al. 2023); it needs ``shared`` masks, an ensemble or
            another posterior whose samples see all images.
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
        variants: images per source. The first is the one that ``variants=1`` gives; the others have posterior samples
            of their own (a :class:`tsynd.Posterior` keeps its) and start from ``noise``. They follow in rounds:
            row v * N + i is variant v of source i.
        per_class: class number -> images wanted of it; classes that it does not name give none. Sources are taken in
            order, in as many rounds of variants as it takes.
        balance: as many images of each class as the largest has, likewise; with ``variants`` times as many.
        start: ``source``; or where the first of the K steps leads to: ``noise``, a random point half way out,
            addressed by seed and sample id; ``interpolate``, half way to another source of the same label; or latents
            [N, ...] of your own, one for each source. The last two are cut to the ball, and further rounds of latents
            start from noise. The best iterate is kept, the reconstruction among them.
        most_uncertain: only so many sources, those of which the posterior is most uncertain, in their order.
        batch_size: images at once, on a CPU rounded up to a multiple of 16 (of fewer where 16 would keep more than
            128 MiB of activations); None picks one within ``memory_limit``. Out of memory halves it and goes on.
        seed: of the posterior samples.
        sample_ids: [N] integers in [0, 2^32) that name the images for the masks; their positions when None.
        device: where to work (the models are moved there); None is where the classifier is.
        precision: ``float32``, ``bfloat16`` or, on a GPU, ``float16`` (autocast).
        compile: send the decoder and the classifier's part before its first dropout through ``torch.compile``, and on
            a GPU replay the steps of a batch as a CUDA graph. Worth its minute for many batches; the images then
            equal those without it to float tolerance only.
        checkpointing: gradient checkpointing: keep few of the decoder's and the classifier's activations and make the
            others again when the gradient needs them. The images stay the same; it takes less memory and about 1.4
            times as long. None does so where the activations would take more than ``memory_limit``.
        memory_limit: GiB that the activations of the images at once may take, by what one image is seen to keep; a
            single image is worked on even if it takes more. None is 2 on a CPU, half of what is free on a GPU.
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
    settings = AscentSettings(
        objective=objective,
        task=task,
        samples=samples,
        masks=masks,
        steps=steps,
        radius=radius,
        step_size=step_size,
        rule=rule,
        label_consistency=label_consistency,
        latent_std=latent_std,
    )
    _check_choice_of_sources(variants, per_class, balance, start, settings, most_uncertain)
    by_class, aims = per_class is not None or balance, _pixels(targets)
    beside = isinstance(start, Tensor) or start == "interpolate"

    def stream_of(variant: int) -> AscentStream:
        made = AscentStream(
            autoencoder,
            classifier,
            settings,
            seed=seed + variant * _VARIANT,
            batch_size=batch_size,
            device=device,
            precision=precision,
            compile=compile,
            checkpointing=checkpointing,
            memory_limit=memory_limit,
            targets=aims,
            phases=phases,
        )
        if variant > 0 or (isinstance(start, str) and start == "noise"):
            made.noise = seed + variant * _VARIANT
        return made

    with (phases or Phases())("prepare"):
        stream = stream_of(0)
        source = LabelledBatches(
            images, labels, sample_ids, task, by_index=by_class or beside or most_uncertain is not None
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        with stream.phase("prepare"):
            classes = stream.check(source.first)
            source.check_labels(classes, needed=label_consistency is not None)
            rounds: list[Tensor | None] = [None] * variants
            if by_class:
                rounds = _rounds(source, classes, variants, per_class)
            if most_uncertain is not None:
                rounds = [_most_uncertain(stream, source, settings, aims, most_uncertain)] * variants
            if beside and rounds[0] is None:
                rounds = [torch.arange(source.count)] * variants
            settings = replace(settings, latent_std=_latent_std(stream, source))
            stream.prepare(settings.latent_std or 0.0, source.first)
        total = sum(source.count if indices is None else len(indices) for indices in rounds)
        collector = Collector(total)
        with progress_bar("synthesising", total, progress) as advance:
            for variant, indices in enumerate(rounds):
                if variant > 0:
                    stack.close()
                    stream = stack.enter_context(stream_of(variant))
                    with stream.phase("prepare"):
                        stream.check(source.first)
                        stream.prepare(settings.latent_std or 0.0, source.first)
                batches = _batches(source, indices, stream.size)
                if indices is not None and isinstance(start, Tensor) and variant == 0:
                    batches = _from_latents(batches, start, indices, stream, source)
                elif indices is not None and not isinstance(start, Tensor) and start == "interpolate":
                    batches = _interpolated(batches, indices, stream, source, seed + variant * _VARIANT)
                for batch, latents, climbed in stream.run(batches):
                    with stream.phase("collect"):
                        collector.add(batch, latents, climbed)
                    advance(len(batch.images), _mean_raise(climbed))
    return SynthesisResult(**collector.arrays())  # type: ignore[arg-type]


_VARIANT = 1_000_003  # between the seeds of two variants


def _check_choice_of_sources(
    variants: int,
    per_class: Mapping[int, int] | None,
    balance: bool,
    start: str | Tensor,
    settings: AscentSettings,
    most_uncertain: int | None,
) -> None:
    check_whole("variants", variants)
    if not isinstance(start, Tensor):
        check_choice("start", start, ("source", "noise", "interpolate"))
    kind = "latents" if isinstance(start, Tensor) else start
    if (kind != "source" or variants > 1) and settings.steps < 2:
        kind = "noise" if kind == "source" else kind
        raise InputError(f"steps: got {settings.steps} with a start from {kind}, which takes one; wanted 2 or more")
    if most_uncertain is not None and (per_class is not None or balance):
        raise InputError("most_uncertain: got a number with per_class or balance, wanted the one or the other")
    check_whole("most_uncertain", most_uncertain, optional=True)
    if per_class is not None and (balance or variants > 1):
        raise InputError("per_class: got numbers with balance or variants, wanted the one or the other")
    if (per_class is not None or balance) and settings.task != "multiclass":
        raise InputError(f"per_class, balance: got task {settings.task!r}, wanted 'multiclass'")
    for name, count in (per_class or {}).items():
        if not isinstance(name, int) or not isinstance(count, int) or count < 0:
            raise InputError(f"per_class: got {name!r}: {count!r}, wanted class number: images of 0 or more")


def _rounds(
    source: LabelledBatches, classes: int, variants: int, per_class: Mapping[int, int] | None
) -> list[Tensor | None]:
    """Which sources [n] each round takes, so that every class gets its number of images."""
    labels = source.labels(classes)
    held = labels.bincount(minlength=classes)
    wanted = torch.zeros(classes, dtype=torch.int64)
    if per_class is None:
        wanted[held > 0] = held.max() * variants
    for name, count in (per_class or {}).items():
        if not 0 <= name < classes:
            raise InputError(f"per_class: got class {name}, wanted 0 to {classes - 1}")
        if count and not held[name]:
            raise InputError(f"per_class: got {count} images of class {name}, of which there is no source")
        wanted[name] = count
    place = torch.zeros_like(labels)  # of each source among those of its class
    for name in range(classes):
        place[labels == name] = torch.arange(int(held[name]))
    if not int(wanted.sum()):
        raise InputError("per_class: got numbers that sum to 0, wanted images of a class at least")
    times = int((-(-wanted // held.clamp_min(1))).max())
    return [(number * held[labels] + place < wanted[labels]).nonzero()[:, 0] for number in range(times)]


def _most_uncertain(
    stream: AscentStream, source: LabelledBatches, settings: AscentSettings, aims: Tensor | None, count: int
) -> Tensor:
    """Positions [count] of the sources of the highest uncertainty, ascending."""
    if count > source.count:
        raise InputError(f"most_uncertain: got {count} of {source.count} sources")
    aims = None if aims is None else aims.to(stream.device)
    with torch.no_grad():
        measure = measure_of(stream.posterior, settings.objective, settings.task, aims)
        batches = (source.at(part) for part in source.chunks(at_once(source.first.numel())))
        values = [
            measure(batch.images.to(stream.device), batch.sample_ids.to(stream.device)).cpu() for batch in batches
        ]
    return torch.cat(values).topk(count).indices.msort()


def _from_latents(
    batches: Iterator[Batch], start: Tensor, indices: Tensor, stream: AscentStream, source: LabelledBatches
) -> Iterator[Batch]:
    """Batches with their rows of the caller's latents."""
    wanted = [source.count, *stream.encode(source.at(torch.tensor([0]))).shape[1:]]
    if list(start.shape) != wanted or not bool(start.isfinite().all()):
        raise InputError(f"start: got latents {list(start.shape)}, wanted finite ones {wanted}")
    at = 0
    for batch in batches:
        rows = indices[at : at + len(batch.images)]
        at += len(rows)
        yield replace(batch, start=start.detach().cpu()[rows])


def _interpolated(
    batches: Iterator[Batch], indices: Tensor, stream: AscentStream, source: LabelledBatches, seed: int
) -> Iterator[Batch]:
    """Batches with latents half way to those of another source of the same label; alone, to none."""
    labels = next(iter(source.batches(1))).labels
    kinds = torch.zeros(source.count, dtype=torch.int64)
    if labels is not None:
        everything = torch.cat([source.at(part).labels for part in source.chunks(256)])  # type: ignore[misc]
        kinds = torch.unique(everything, dim=0, return_inverse=True)[1]
    others = torch.arange(source.count)
    generator = torch.Generator().manual_seed(seed % 2**63)
    for kind in range(int(kinds.max()) + 1):
        members = (kinds == kind).nonzero()[:, 0]
        shift = int(torch.randint(1, max(len(members), 2), (), generator=generator))
        others[members] = members.roll(shift)
    at = 0
    for batch in batches:
        rows = indices[at : at + len(batch.images)]
        at += len(rows)
        yield replace(batch, start=(stream.encode(batch) + stream.encode(source.at(others[rows]))) / 2)


def _batches(source: LabelledBatches, indices: Tensor | None, size: int) -> Iterator[Batch]:
    if indices is None:
        return source.batches(size)
    return (source.at(part) for part in torch.split(indices, size))


def uncertainty(
    classifier: nn.Module | Posterior,
    images: Any,
    *,
    settings: AscentSettings | None = None,
    targets: Any = None,
    seed: int = 0,
    sample_ids: Any = None,
    batch_size: int = 256,
    **ascent: Unpack[AscentOptions],
) -> Tensor:
    """Uncertainty of given images, for instance under a seed that the ascent has not seen.

    Args:
        classifier: see :func:`synthesize`.
        images: tensor, array, Dataset or DataLoader, see :func:`synthesize`.
        settings: whose ``objective``, ``task``, ``samples`` and ``masks`` count; None for the defaults.
        targets: see :func:`synthesize`.
        seed: of the posterior samples.
        sample_ids: see :func:`synthesize`.
        batch_size: images at once; fewer where they are large.
        ascent: fields of the settings, instead of those given there.

    Returns:
        [N] float32 in nats, on the CPU.
    """
    chosen = ascent_settings(settings, ascent)
    posterior = as_posterior(classifier, chosen.samples, chosen.masks, seed)
    source = LabelledBatches(images, None, sample_ids, None)
    device = place(None, *posterior.networks)
    values, aims = [], _pixels(targets)
    with posterior.frozen(), torch.no_grad():
        aims = None if aims is None else aims.to(device)
        measure = measure_of(posterior, chosen.objective, chosen.task, aims)
        for batch in source.batches(at_once(source.first.numel(), batch_size)):
            ids = batch.sample_ids.to(device)
            values.append(measure(batch.images.to(device), ids).cpu())
    return torch.cat(values)


def _pixels(targets: Any) -> Tensor | None:
    """Target images of any kind as one tensor [M, C, ...] on the CPU."""
    if targets is None:
        return None
    source = LabelledBatches(targets, task=None, name="targets")
    return torch.cat([batch.images for batch in source.batches(source.count)])


def _latent_std(stream: AscentStream, source: LabelledBatches) -> float:
    known = stream.known_latent_std
    if known is not None:
        return known
    if source.count < 2:
        raise InputError("latent_std: got None with a single image, wanted a number: one image has no deviation")
    with torch.no_grad():
        return _checked_std(latent_deviation(stream.encode(batch) for batch in source.batches(stream.size)))


def _checked_std(deviation: Tensor) -> float:
    value = float(deviation)
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"autoencoder: its latents have standard deviation {value}, wanted a number above 0")
    return value


def measure_latent_std(
    autoencoder: Any, images: Any, *, batch_size: int = 256, device: torch.device | str | None = None
) -> float:
    """The standard deviation of an autoencoder's latents around their mean, the unit of an ascent's radius.

    Args:
        autoencoder: see :func:`synthesize`; its own ``latent_std``, if any, is left as it is.
        images: see :func:`synthesize`; at least two. An autoencoder's training images are the right ones.
        batch_size: images at once; fewer where they are large.
        device: where to work; None is where the autoencoder is.

    Raises:
        InputError: images or an autoencoder that cannot be used, or latents that do not vary.
    """
    model = as_autoencoder(autoencoder)
    source = LabelledBatches(images, task=None)
    where = place(device, model)
    modules = (model,) if isinstance(model, nn.Module) else ()
    with frozen(*modules), torch.no_grad():
        check_autoencoder(model, source.first.to(where))
        batches = source.batches(at_once(source.first.numel(), batch_size))
        return _checked_std(latent_deviation(model.encode(batch.images.to(where)).cpu() for batch in batches))


def _mean_raise(climbed: Ascent) -> str:
    return f"uncertainty {float(climbed.trajectory[0].mean()):.4f} → {float(climbed.uncertainty.mean()):.4f}"
