"""Tables: a CSV, TSV or Parquet file that lists image files with their labels, splits and patients."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tsynd.data.filetree import FileTree
from tsynd.data.readers.listing import SPLITS, Entry, Listing
from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError, require

__all__ = ["SUFFIXES", "class_numbers", "list_table", "named_split", "zero_one"]

SUFFIXES = (".csv", ".tsv", ".parquet")
_OTHER_NAMES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}


def list_table(path: Path, options: ReadOptions) -> Listing:
    """The files that a table names; their paths count from the table's folder.

    Labels are any text or numbers: classes are numbered in sorted order, whole numbers by value. Several label
    columns hold 0 and 1 each. A path may be a folder of slices where ``options.volumes`` says so.

    Raises:
        InputError: a column, a cell or a file is missing or cannot be used.
        MissingExtraError: pyarrow is not installed (Parquet).
    """
    columns = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    wanted = options.label_column.split(",")
    needed = {options.path_column: "path_column"} | dict.fromkeys(wanted, "label_column")
    needed |= {getattr(options, n): n for n in ("split_column", "group_column") if options.named(n)}
    for column, name in needed.items():
        if column not in columns:
            raise InputError(
                f"{path}: holds the columns {', '.join(columns)}; missing {column} ({name}=NAME, --"
                f"{name.replace('_', '-')} names another)"
            )
    names = _cells(columns, options.path_column, path)
    if not names:
        raise InputError(f"{path}: holds no row; wanted one per image")
    labels: Sequence[int | list[int]]
    if len(wanted) > 1:
        cells = [_cells(columns, column, path) for column in wanted]
        labels = [
            [zero_one(cell, f"{path}: row {r}") for cell in row] for r, row in enumerate(zip(*cells, strict=True), 1)
        ]
        class_names = tuple(wanted)
    else:
        labels, class_names = class_numbers(_cells(columns, options.label_column, path))
    splits = [""] * len(names)
    if options.split_column in columns:
        cells_ = _cells(columns, options.split_column, path)
        splits = [named_split(cell, f"{path}: row {r}") for r, cell in enumerate(cells_, 1)]
    patients: Sequence[str | None] = [None] * len(names)
    if options.group_column in columns:
        patients = _cells(columns, options.group_column, path)
    tree = FileTree(str(path.parent))
    entries = [
        Entry(_files(tree, name, options), label, split, patient)
        for name, label, split, patient in zip(names, labels, splits, patients, strict=True)
    ]
    gone = [row for row, entry in enumerate(entries, 1) if not entry.names]
    if gone:
        raise InputError(
            f"{path}: {len(gone)} of {len(entries)} files are not there, first that of row {gone[0]}, "
            f"{names[gone[0] - 1]!r}; paths count from the table's folder"
        )
    return Listing(tree, entries, class_names)


def class_numbers(cells: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Class numbers and names of labels given as text."""
    names = sorted(set(cells))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    number = {name: index for index, name in enumerate(names)}
    return [number[cell] for cell in cells], tuple(names)


def named_split(cell: str, where: str) -> str:
    """``train``, ``val`` or ``test`` of what a source calls it."""
    name = _OTHER_NAMES.get(cell.lower(), cell.lower())
    if name not in SPLITS:
        raise InputError(f"{where}: split {cell!r}; wanted train, val (or validation) or test")
    return name


def zero_one(cell: str, where: str) -> int:
    """0 or 1 of a cell."""
    if cell not in ("0", "1"):
        raise InputError(f"{where}: label {cell!r} among several label columns; wanted 0 or 1")
    return int(cell)


def _files(tree: FileTree, name: str, options: ReadOptions) -> tuple[str, ...]:
    """The file, or the slices in the folder; empty where nothing is there."""
    path = tree.path(name)
    if options.volumes and os.path.isdir(path):
        inside = [entry.name for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
        return tuple(f"{name.rstrip('/')}/{file}" for file in sorted(inside) if file.upper() != "DICOMDIR")
    return (name,) if os.path.isfile(path) else ()


def _cells(columns: dict[str, Sequence[Any]], column: str, path: Path) -> list[str]:
    """A column as text, without an empty cell."""
    cells = []
    for row, value in enumerate(columns[column], 1):
        whole = isinstance(value, float) and value.is_integer()
        text = "" if value is None or value != value else str(int(value) if whole or isinstance(value, bool) else value)
        if not text.strip():
            raise InputError(f"{path}: row {row} has an empty {column}; wanted a value in every row")
        cells.append(text.strip())
    return cells


def _csv(path: Path) -> dict[str, Sequence[Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: unreadable table ({error}); wanted UTF-8 text with commas") from None
    rows = [row for row in rows if row]
    if not rows:
        raise InputError(f"{path}: holds nothing; wanted a line of column names, then one line per image")
    head = [name.strip() for name in rows[0]]
    if len(set(head)) < len(head):
        raise InputError(f"{path}: two columns of one name; wanted each once")
    for line, row in enumerate(rows[1:], 1):
        if len(row) != len(head):
            raise InputError(f"{path}: row {line} has {len(row)} cells, the head {len(head)}")
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(head)}


def _parquet(path: Path) -> dict[str, Sequence[Any]]:
    pyarrow = require("pyarrow", "tables")
    try:
        table = require("pyarrow.parquet", "tables").read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: unreadable Parquet file ({type(error).__name__})") from None
    return dict(table.to_pydict())
