"""Results of a synthesis written in place, so that memory beyond them does not grow with the number of images."""

from __future__ import annotations

import base64
import html
import importlib
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from tsynd.data.checks import channels_first, check_images
from tsynd.data.dataset import Batch
from tsynd.data.formats import save_class_folders, to_uint8
from tsynd.synthesis.ascent import Ascent, Status
from tsynd.synthesis.publish import push_images, write_croissant
from tsynd.utils.atomic import save_npz
from tsynd.utils.errors import InputError

__all__ = ["Collector", "SynthesisResult", "load_result"]


_QUALITY = "quality_"  # before its arrays in a file


class Collector:
    """Arrays for ``count`` images, allocated at the first batch and filled batch by batch.

    Args:
        count: N, images in all.

    Attributes:
        filled: images so far.
    """

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self._arrays: dict[str, Tensor] = {}

    def add(self, batch: Batch, source: Tensor, climbed: Ascent) -> None:
        """Keep a batch's results (tensors on the CPU), which follow those of the batches before.

        Args:
            batch: where they come from.
            source: [B, ...], encoded images.
            climbed: its ascent.
        """
        rows = {
            "images": climbed.images.float(),
            "latents": climbed.latents,
            "source_latents": source,
            "initial_uncertainty": climbed.trajectory[0],
            "uncertainty": climbed.uncertainty,
            "trajectory": climbed.trajectory.t(),
            "status": climbed.status,
            "sample_ids": batch.sample_ids,
        }
        if batch.labels is not None:
            rows["labels"] = batch.labels
        for name, row in rows.items():
            if name not in self._arrays:
                self._arrays[name] = torch.empty((self.count, *row.shape[1:]), dtype=row.dtype)
            if (more := self.filled + len(row) - len(self._arrays[name])) > 0:  # a loader gave more than it announced
                spare = torch.empty((more + self.filled, *row.shape[1:]), dtype=row.dtype)
                self._arrays[name] = torch.cat([self._arrays[name], spare])
            self._arrays[name][self.filled : self.filled + len(row)] = row
        self.filled += len(batch.images)

    def arrays(self) -> dict[str, Tensor | None]:
        """The fields of a :class:`tsynd.SynthesisResult`."""
        return {"labels": None, **{name: array[: self.filled] for name, array in self._arrays.items()}}


@dataclass(frozen=True, eq=False)
class SynthesisResult(torch.utils.data.Dataset[Any]):
    """Targeted images and where they come from; all tensors on the CPU, row i belongs to source image i.

    A map-style Dataset: ``len(result)``, ``result[3]`` is (image, label), or the image alone where there are no
    labels. A slice, a boolean mask or a list of positions gives a part of it, ``+`` joins two: what a part's ``save``
    writes, ``load_result`` reads.

    Attributes:
        images: [N, C, H, W] or, for volumes, [N, C, D, H, W] float32 in [0, 1].
        labels: [N] or [N, L], the sources' labels, or None.
        latents: [N, ...] float32, the best iterates.
        source_latents: [N, ...] float32, the encoded sources.
        initial_uncertainty: [N], of the reconstructions, in nats.
        uncertainty: [N], of the images, in nats; both under the posterior samples climbed on.
        trajectory: [N, steps + 1], the uncertainty at every iterate.
        status: [N] int8, see :class:`tsynd.Status`.
        sample_ids: [N] int64.
        quality: name → [N], what :meth:`judged` found of each image.
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
    quality: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | Sequence[bool] | Tensor) -> SynthesisResult: ...
    def __getitem__(self, index: Any) -> Any:
        """One image and its label, or the part that a slice, mask or list of positions names.

        Raises:
            IndexError: a position outside.
            InputError: a mask of another length, or no position at all.
        """
        if isinstance(index, (int, np.integer)) or (isinstance(index, Tensor) and index.ndim == 0):
            position = range(len(self))[index]
            return self.images[position] if self.labels is None else (self.images[position], self.labels[position])
        if not isinstance(index, slice):
            index = torch.as_tensor(index if len(index) else torch.empty(0, dtype=torch.int64))
            if index.dtype == torch.bool and index.shape != (len(self),):
                raise InputError(f"index: a mask of shape {list(index.shape)}, wanted [{len(self)}]")
            if index.ndim != 1 or index.is_floating_point():
                raise InputError(f"index: got {index.dtype} {list(index.shape)}, wanted a slice, a mask or positions")
        parts: dict[str, Any] = {name: None if x is None else x[index] for name, x in self._tensors().items()}
        return SynthesisResult(**parts, quality={name: x[index] for name, x in self.quality.items()})

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def __add__(self, other: Any) -> Any:
        """Both results' images, this one's first; for the same kind of images, latents and labels.

        Raises:
            InputError: they differ in that.
        """
        if not isinstance(other, SynthesisResult):
            return NotImplemented
        joined: dict[str, Any] = {}
        for name, x in self._tensors().items():
            y = getattr(other, name)
            if (x is None) != (y is None) or (x is not None and x.shape[1:] != y.shape[1:]):
                shapes = [None if part is None else list(part.shape[1:]) for part in (x, y)]
                raise InputError(f"{name}: of shape {shapes[0]} and {shapes[1]}, wanted results of one kind to join")
            joined[name] = None if x is None else torch.cat([x, y])
        both = set(self.quality) & set(other.quality)
        return SynthesisResult(
            **joined, quality={name: torch.cat([self.quality[name], other.quality[name]]) for name in sorted(both)}
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        return {part.name: getattr(self, part.name) for part in fields(self) if part.name != "quality"}

    def judged(self, autoencoder: Any, classifier: nn.Module, sources: Any, *, task: str = "multiclass") -> Any:
        """The same result with a ``quality`` of every image, to filter by: ``result[result.quality["label_kept"]]``.

        ``label_kept``: the classifier, best one that was not climbed on, takes it for its label (bool; of several, for
        all); ``label_probability``: the probability it gives that (of several, the least certain one's);
        ``distance``: root mean square difference of its pixels to the source's, ``reconstruction_error``: the
        same of the source's reconstruction; ``plausibility``: share of the sources that lie at least as far from
        their nearest other source, in the latents, as the image does from its nearest: 1 well inside, 0 where no
        source lies so far from all others.

        Args:
            autoencoder: as in :func:`tsynd.synthesize`.
            classifier: images [B, C, ...] → logits; without dropout.
            sources: the images that were given to :func:`tsynd.synthesize`: ``sample_ids`` are positions in them.
            task: ``multiclass`` or ``multilabel``.

        Raises:
            InputError: no labels, or sources that are others.
        """
        from tsynd.synthesis.quality import quality_of

        return replace(self, quality=quality_of(self, autoencoder, classifier, sources, task))

    @property
    def gain(self) -> Tensor:
        """[N], by how many nats each image is more uncertain than its source's reconstruction."""
        return self.uncertainty - self.initial_uncertainty

    @property
    def distance(self) -> Tensor:
        """[N], how far each latent went: root mean square over its coordinates, in latent units."""
        return (self.latents - self.source_latents).flatten(1).square().mean(1).sqrt()

    def __repr__(self) -> str:
        if not len(self):
            return "SynthesisResult(no images)"
        before, after = float(self.initial_uncertainty.mean()), float(self.uncertainty.mean())
        raised = float((self.status == Status.RAISED).double().mean())
        return (
            f"SynthesisResult({len(self)} images {list(self.images.shape[1:])}, mean uncertainty {before:.4f} → "
            f"{after:.4f} nats, raised for {raised:.0%})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the summary, and up to eight images where Pillow is installed."""
        text = html.escape(repr(self))
        try:
            pictures = importlib.import_module("PIL.Image")
        except ImportError:
            return f"<p>{text}</p>"
        if self.images.shape[1] not in (1, 3):
            return f"<p>{text}</p>"
        shown = []
        for image, before, after in zip(self.images[:8], self.initial_uncertainty, self.uncertainty, strict=False):
            flat = image if image.ndim == 3 else image[:, image.shape[1] // 2]  # a volume's middle slice
            pixels = to_uint8(flat[None])[0]
            file = io.BytesIO()
            pictures.fromarray(pixels).save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            shown.append(
                f'<figure style="display:inline-block;margin:4px"><img width="96" src="data:image/png;base64,{data}" '
                f'alt="targeted image"><figcaption>{before:.3f} → {after:.3f}</figcaption></figure>'
            )
        return f"<p>{text}</p>{''.join(shown)}"

    def save(self, path: str | Path, class_names: tuple[str, ...] | None = None) -> Path:
        """Write the result: a path that ends in ``.npz`` gets one archive, any other a folder of PNG per class.

        The archive's ``images`` [N, H, W] or [N, H, W, 3] (volumes: [N, D, H, W]) are uint8 as in MedMNIST, so that
        :func:`tsynd.load_data` reads it; the other fields are stored as they are. A description in Croissant 1.1
        lies beside the archive or in the folder.

        Args:
            path: a file name or a folder that does not exist yet.
            class_names: folder names; the class numbers when None.

        Raises:
            InputError: the path cannot be written, or class folders are wanted for images without labels.
        """
        path = Path(path)
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {name: value for name, value in self._tensors().items() if value is not None}
            arrays |= {_QUALITY + name: value for name, value in self.quality.items()}
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
        write_croissant(path, self, class_names)
        return path

    def push_to_hub(
        self,
        repo: str,
        class_names: Sequence[str] | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        private: bool = True,
        token: str | None = None,
    ) -> str:
        """Put the images (no latents, which are the real images encoded) on the Hugging Face hub as a data set.

        With them go a card, which marks them as synthetic and names their limits, and Croissant metadata.

        Args:
            repo: ``USER/NAME``, made where it is not there.
            class_names: of the labels.
            facts: of the run that made them, as its ``metrics.json``, for the card.
            private: for a repository that is made.
            token: of the hub; None takes the one that is logged in.

        Returns:
            Its address.

        Raises:
            InputError: the hub refuses it.
            MissingExtraError: huggingface_hub is not installed.
        """
        return push_images(self, repo, class_names, facts=facts, private=private, token=token)


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
    names = [part.name for part in fields(SynthesisResult) if part.name != "quality"]
    missing = set(names) - {"labels"} - set(arrays)
    if missing:
        raise InputError(f"path: {path} lacks {', '.join(sorted(missing))}, wanted an .npz of SynthesisResult.save")
    arrays["images"] = check_images(channels_first(arrays["images"].numpy(), f"path: {path}: images"))
    arrays.setdefault("labels", None)  # type: ignore[arg-type]
    quality = {key.removeprefix(_QUALITY): value for key, value in arrays.items() if key.startswith(_QUALITY)}
    return SynthesisResult(**{name: arrays[name] for name in names}, quality=quality)
