"""One worker of a synthesis of more images than memory holds: models loaded once, then shard after shard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tsynd.data.checks import check_labels
from tsynd.data.dataset import Batch
from tsynd.data.formats import to_uint8
from tsynd.data.readers.options import ReadOptions
from tsynd.data.sources import RangeSource, open_source
from tsynd.distributed.shards import FORMATS, Sample, ShardFolder, Unit
from tsynd.models.checkpoint import load_model, read_card
from tsynd.synthesis.ascent import AscentSettings, Status
from tsynd.synthesis.synthesizer import AscentStream
from tsynd.utils.errors import InputError, check_choice, printable, require
from tsynd.utils.fingerprint import plain_settings
from tsynd.utils.version import __version__

__all__ = ["ShardSettings", "ShardWorker"]


@dataclass(frozen=True, kw_only=True)
class ShardSettings(AscentSettings):
    """A sharded job; ``task`` is the data's. Sample ids are positions in the data.

    Attributes:
        data: see ``tsynd.data.sources.open_source``.
        autoencoder: file of :func:`tsynd.save_model`; with Ray, a path that every machine sees.
        classifier: file of :func:`tsynd.save_model`, likewise.
        output: folder, one that every machine sees.
        split: which images: train, val or test.
        reading: how its files are read.
        shard_size: images per WebDataset shard in the folder ``output``; resumable.
        image_format: of shards: ``png`` (8 bits) or ``npy`` (float32 [C, H, W], volumes [C, D, H, W]).
        seed: of the posterior samples (and of the subset, where there is one).
        batch_size: images at once; as many as fit by default.
        checkpointing: less memory, about 1.4 times as long; where it is needed by default.
        memory_limit: GiB for the activations of the images at once; 2 on a CPU, half of a GPU's free memory.
        precision: see :func:`tsynd.synthesize`.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...; a GPU where there is one.
        threads: CPU threads of each worker; torch's choice by default.
    """

    data: str
    autoencoder: str
    classifier: str
    output: str
    split: str = "train"
    reading: ReadOptions = field(default_factory=ReadOptions)
    shard_size: int = 4096
    image_format: str = "png"
    seed: int = 0
    batch_size: int | None = None
    checkpointing: bool | None = None
    memory_limit: float | None = None
    precision: str = "float32"
    device: str | None = None
    threads: int | None = None


# what may differ between two starts of a job; the files count by their contents
_NOT_THE_RESULT = {"data", "autoencoder", "classifier", "output", "device", "threads"}
_NOT_THE_RESULT |= {"batch_size", "checkpointing", "memory_limit"}


def _fingerprint(settings: ShardSettings, source: RangeSource, latent_std: float) -> dict[str, Any]:
    """Everything that decides the samples; not where they are made."""
    return {
        "tsynd": __version__,
        "data": source.identity,
        "images": source.count,
        "autoencoder": read_card(settings.autoencoder).sha256,
        "classifier": read_card(settings.classifier).sha256,
        **{key: value for key, value in plain_settings(settings).items() if key not in _NOT_THE_RESULT},
        "latent_std": latent_std,
    }


class ShardWorker:
    """Models and source, opened once; makes one unit after the other.

    Args:
        settings: the job.
        expected: the job's fingerprint as its driver took it; None to trust one's own.
        look_only: for a driver: check everything on the CPU and leave GPUs alone; :meth:`make` is not to be called.

    Raises:
        InputError: an argument, a file or the folder cannot be used; also where this machine sees other models or
            data than the driver.
    """

    def __init__(
        self, settings: ShardSettings, expected: dict[str, Any] | None = None, look_only: bool = False
    ) -> None:
        check_choice("image_format", settings.image_format, FORMATS)
        require("pyarrow.parquet", "big")
        if settings.image_format == "png":
            require("PIL.Image", "data")
        if settings.threads is not None:
            if settings.threads < 1:
                raise InputError(f"threads: got {settings.threads}, wanted 1 or more")
            torch.set_num_threads(settings.threads)
        autoencoder, classifier = load_model(settings.autoencoder), load_model(settings.classifier)
        self.source = open_source(settings.data, settings.split, settings.reading)
        names = tuple(map(printable, read_card(settings.classifier).class_names or ()))
        held = tuple(map(printable, self.source.class_names))
        if names and held and names != held:
            raise InputError(f"classifier: was trained for {', '.join(names)}, but the data have {', '.join(held)}")
        self.settings = settings = replace(settings, task=self.source.task)
        device = "cpu" if look_only else settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.stream = AscentStream(
            autoencoder,
            classifier,
            settings,
            seed=settings.seed,
            batch_size=settings.batch_size,
            device=device,
            precision="float32" if look_only else settings.precision,
            checkpointing=settings.checkpointing,
            memory_limit=settings.memory_limit,
        )
        latent_std = self.stream.known_latent_std
        if latent_std is None:
            raise InputError(
                "autoencoder: has no latent_std, which every shard must share; fit_autoencoder measures it"
            )
        first = self.source.read(0, 1)
        if settings.image_format == "png" and first.images.ndim == 5:
            raise InputError("image_format: png holds pictures, the data are volumes; use npy")
        if settings.image_format == "png" and first.images.shape[1] not in (1, 3):
            raise InputError(
                f"image_format: png holds 1 or 3 channels, the images have {first.images.shape[1]}; use npy"
            )
        if settings.label_consistency is not None and first.labels is None:
            raise InputError("label_consistency: got a limit, but the data have no labels")
        self.stream.__enter__()
        self._classes = self.stream.check(first.images)
        self.stream.prepare(latent_std, first.images)
        fingerprint = _fingerprint(settings, self.source, latent_std)
        facts = {
            "task": self.source.task,
            "class_names": list(names or held),
            "image_shape": list(first.images.shape[1:]),
        }
        self.folder = ShardFolder(Path(settings.output), fingerprint, facts)
        if expected is not None and expected != fingerprint:
            differ = [key for key in fingerprint if expected.get(key) != fingerprint[key]]
            raise InputError(
                f"worker: sees another {', '.join(differ)} than the driver; wanted the same files everywhere"
            )

    def close(self) -> None:
        """Give the models their modes back."""
        self.stream.__exit__(None, None, None)

    def make(self, unit: Unit) -> dict[str, Any]:
        """Make one unit; its receipt without the fingerprint, and ``seconds``."""
        start = time.perf_counter()
        receipt = self.folder.write(unit, self._samples(unit), self.settings.image_format)
        del receipt["fingerprint"]
        return receipt | {"seconds": time.perf_counter() - start}

    def _batches(self, unit: Unit) -> Iterator[Batch]:
        for start in range(unit.start, unit.stop, self.stream.size):
            batch = self.source.read(start, min(start + self.stream.size, unit.stop))
            if batch.labels is not None:
                check_labels(batch.labels, len(batch.images), self.source.task, self._classes)
            yield batch

    def _samples(self, unit: Unit) -> Iterator[Sample]:
        png = self.settings.image_format == "png"
        for batch, _, climbed in self.stream.run(self._batches(unit)):
            ids = batch.sample_ids.tolist()
            images = to_uint8(climbed.images.float()) if png else climbed.images.float().numpy()
            labels = [None] * len(ids) if batch.labels is None else batch.labels.long().tolist()
            rows = zip(
                ids,
                images,
                labels,
                climbed.trajectory[0].tolist(),
                climbed.uncertainty.tolist(),
                (Status(code).name.lower() for code in climbed.status.tolist()),
                strict=True,
            )
            for row in rows:
                yield Sample(*row)
