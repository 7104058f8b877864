"""``tsynd.synthesize``: from labelled images to targeted ones, batch by batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsynd.data.checks import check_images
from tsynd.data.dataset import LabelledBatches, at_once
from tsynd.models.autoencoder import measure_latent_std
from tsynd.posteriors.mc_dropout import as_posterior
from tsynd.posteriors.posterior import Posterior
from tsynd.synthesis.ascent import Ascent, AscentOptions, AscentSettings, ascent_settings
from tsynd.synthesis.objectives import measure_of
from tsynd.synthesis.result import Collector, SynthesisResult
from tsynd.synthesis.synthesizer import AscentStream, place
from tsynd.utils.errors import InputError
from tsynd.utils.progress import progress_bar
from tsynd.utils.timing import Phases

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["synthesize", "uncertainty"]


def synthesize(
    autoencoder: Any,
    classifier: nn.Module | Posterior,
    images: Any,
    labels: Any = None,
    *,
    objective: str = "mutual_information",
    targets: Tensor | None = None,
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
        objective: ``mutual_information``, ``entropy``, or ``expected_information``: what the image's class would tell
            about the classes of ``targets`` (EPIG, Bickford Smith et al. 2023), in one process and not exported.
        targets: [M, C, H, W] in [0, 1] or uint8, labelled or not, all held at once; for ``expected_information``.
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
    with (phases or Phases())("prepare"):
        stream = AscentStream(
            autoencoder,
            classifier,
            settings,
            seed=seed,
            batch_size=batch_size,
            device=device,
            precision=precision,
            compile=compile,
            checkpointing=checkpointing,
            memory_limit=memory_limit,
            phases=phases,
            targets=targets,
        )
        source = LabelledBatches(images, labels, sample_ids, task)
    collector = Collector(source.count)
    with stream:
        with stream.phase("prepare"):
            classes = stream.check(source.first)
            source.check_labels(classes, needed=label_consistency is not None)
            stream.prepare(_latent_std(stream, source), source.first)
        with progress_bar("synthesising", source.count, progress) as advance:
            for batch, latents, climbed in stream.run(source.batches(stream.size)):
                with stream.phase("collect"):
                    collector.add(batch, latents, climbed)
                advance(len(batch.images), _mean_raise(climbed))
    return SynthesisResult(**collector.arrays())  # type: ignore[arg-type]


def uncertainty(
    classifier: nn.Module | Posterior,
    images: Any,
    *,
    settings: AscentSettings | None = None,
    targets: Tensor | None = None,
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
    values = []
    aims = None if targets is None else check_images(targets, name="targets").to(device)
    with posterior.frozen(), torch.no_grad():
        measure = measure_of(posterior, chosen.objective, chosen.task, aims)
        for batch in source.batches(at_once(source.first.numel(), batch_size)):
            values.append(measure(batch.images.to(device), batch.sample_ids.to(device)).cpu())
    return torch.cat(values)


def _latent_std(stream: AscentStream, source: LabelledBatches) -> float:
    model, known = stream.model, stream.known_latent_std
    if known is not None:
        return known
    if source.count < 2:
        raise InputError("latent_std: got None with a single image, wanted a number: one image has no deviation")
    with torch.no_grad():
        encoded = (model.encode(batch.images.to(stream.device)).cpu() for batch in source.batches(stream.size))
        value = float(measure_latent_std(encoded))
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"autoencoder: its latents have standard deviation {value}, wanted a number above 0")
    return value


def _mean_raise(climbed: Ascent) -> str:
    return f"uncertainty {float(climbed.trajectory[0].mean()):.4f} → {float(climbed.uncertainty.mean()):.4f}"
