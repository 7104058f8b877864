"""Hugging Face ``datasets`` objects: a Dataset, or a DatasetDict of splits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tsynd.data.readers.image_file import START, Image, kind_of, read_image
from tsynd.data.readers.listing import Entry
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.tables import class_numbers, named_split
from tsynd.utils.errors import InputError, require

__all__ = ["is_dataset", "read_dataset"]


def is_dataset(source: object) -> bool:
    """Whether it is an object of the package ``datasets``; imports nothing."""
    return type(source).__module__.partition(".")[0] == "datasets"


def read_dataset(source: Any, options: ReadOptions) -> tuple[Iterator[tuple[Entry, Image]], tuple[str, ...], str]:
    """Images with labels, class names and the data set's name.

    The image column is the one with the feature ``Image`` (or ``path_column``), the label column ``label``, else the
    only ``ClassLabel`` (or ``label_column``): a ``ClassLabel``, integers, text, or a list of ``ClassLabel``, which is
    multilabel. Files are decoded by the readers of this package, from the bytes or path that the data set holds.

    Raises:
        InputError: another kind of object, or columns that cannot be used.
    """
    datasets = require("datasets", "huggingface")
    if isinstance(source, datasets.Dataset):
        parts = {"": source}
    elif isinstance(source, datasets.DatasetDict) and source:
        parts = {named_split(name, "source"): part for name, part in source.items()}
        parts = {"": next(iter(parts.values()))} if set(parts) == {"train"} else parts
    else:
        raise InputError(
            f"source: a {type(source).__name__} of datasets; wanted a Dataset or DatasetDict, not streamed"
        )
    first = next(iter(parts.values()))
    if any(part.features != first.features for part in parts.values()):
        raise InputError("source: splits with different features; wanted the same in all")
    image, label = _image_column(first, datasets, options), _label_column(first, datasets, options)
    if options.named("group_column") and options.group_column not in first.features:
        raise InputError(f"group_column: {options.group_column!r}; wanted one of {', '.join(first.features)}")
    labels, names = _labels(parts, label, first.features[label], datasets)
    info = first.info.dataset_name or first.info.builder_name or "dataset"
    return _items(parts, image, labels, datasets, options), names, info


def _image_column(part: Any, datasets: Any, options: ReadOptions) -> str:
    found = [name for name, feature in part.features.items() if isinstance(feature, datasets.Image)]
    if options.named("path_column"):
        found = [name for name in found if name == options.path_column]
    if len(found) != 1:
        raise InputError(
            f"source: features {', '.join(part.features)}, {len(found)} of them wanted as images; wanted one of the "
            "kind Image, or path_column=NAME"
        )
    return str(found[0])


def _label_column(part: Any, datasets: Any, options: ReadOptions) -> str:
    if options.label_column in part.features:
        return options.label_column
    found = [name for name, feature in part.features.items() if isinstance(feature, datasets.ClassLabel)]
    if options.named("label_column") or len(found) != 1:
        raise InputError(
            f"source: features {', '.join(part.features)}, without {options.label_column!r}; label_column=NAME says "
            "which is the label"
        )
    return str(found[0])


def _labels(
    parts: dict[str, Any], column: str, feature: Any, datasets: Any
) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """Labels of every split, and the classes' names."""
    cells = {split: list(part[column]) for split, part in parts.items()}
    if any(cell is None for part in cells.values() for cell in part):
        raise InputError(f"source: a row has no {column}; wanted a label in every row")
    if isinstance(feature, datasets.ClassLabel):
        return cells, tuple(feature.names)
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
    if isinstance(inner, datasets.ClassLabel):
        many = {
            split: [[int(number in cell) for number in range(inner.num_classes)] for cell in part]
            for split, part in cells.items()
        }
        return many, tuple(inner.names)
    if inner is not None or not all(isinstance(cell, (int, str)) for part in cells.values() for cell in part):
        raise InputError(f"source: {column} is {feature}; wanted ClassLabel, integers, text or a list of ClassLabel")
    numbers, names = class_numbers([str(cell) for part in cells.values() for cell in part])
    cut, out = 0, {}
    for split, part in cells.items():
        out[split] = numbers[cut : cut + len(part)]
        cut += len(part)
    return out, names


def _items(
    parts: dict[str, Any], image: str, labels: dict[str, Any], datasets: Any, options: ReadOptions
) -> Iterator[tuple[Entry, Image]]:
    for split, part in parts.items():
        grouped = options.group_column in part.features
        raw = part.select_columns([image, options.group_column] if grouped else [image])
        raw = raw.with_format(None).cast_column(image, datasets.Image(decode=False))
        for index, row in enumerate(raw):
            where = f"row {index}" + (f" of {split}" if split else "")
            cell = row[image]
            if cell is None or (cell.get("bytes") is None and not cell.get("path")):
                raise InputError(f"source: {where} has no image")
            content = cell.get("bytes")
            if content is None:
                with datasets.utils.file_utils.xopen(cell["path"], "rb") as file:
                    content = file.read()
            kind = kind_of(cell.get("path") or "", lambda content=content: content[:START]) or "picture"  # type: ignore[misc]
            patient = row[options.group_column] if grouped else None
            entry = Entry((where,), labels[split][index], split, None if patient is None else str(patient))
            yield entry, read_image(content, kind, where, options)
