"""Tables: a CSV, TSV or Parquet file that lists image files with their labels, splits and patients."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tsynd.data.filetree import FileTree
from tsynd.data.limits import check_limit
from tsynd.data.readers.listing import Entry, Listing, split_name
from tsynd.data.readers.options import ReadOptions
from tsynd.utils.errors import InputError, require

__all__ = ["SUFFIXES", "class_numbers", "list_table", "named_split", "zero_one"]

SUFFIXES = (".csv", ".tsv", ".parquet")


def list_table(path: Path, options: ReadOptions) -> Listing:
    """The files that a table names; their paths count from the table's folder.

    Labels are any text or numbers: classes are numbered in sorted order, whole numbers by value. Several label
    columns hold 0 and 1 each. A path may be a folder of slices where ``options.volumes`` says so.

    Raises:
        InputError: a column, a cell or a file is missing or cannot be used.
        MissingExtraError: pyarrow is not installed (Parquet).
    """
    wanted = options.label_column.split(",")
    needed = {options.path_column: "path_column"} | dict.fromkeys(wanted, "label_column")
    needed |= {getattr(options, n): n for n in ("split_column", "group_column") if options.named(n)}
    try:
        check_limit("TABLE", path.stat().st_size, str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    read = _parquet if path.suffix.lower() == ".parquet" else _csv
    columns = read(path, {*needed, options.split_column, options.group_column})
    for column, name in needed.items():
        if column not in columns or columns[column] is None:
            raise InputError(
                f"{path}: holds the columns {', '.join(columns)}; missing {column} ({name}=NAME, --"
                f"{name.replace('_', '-')} names another)"
            )
    columns = {name: cells for name, cells in columns.items() if cells is not None}
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
    tree = FileTree(str(path.parent), tars=False)
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
    name = split_name(cell)
    if name is None:
        raise InputError(f"{where}: split {cell!r}; wanted train, val (or validation) or test")
    return name


def zero_one(cell: str, where: str) -> int:
    """0 or 1 of a cell."""
    whole = re.fullmatch(r"([01])(?:[.,]0+)?", cell)  # also as spreadsheets write them
    if whole is None:
        raise InputError(f"{where}: label {cell!r} among several label columns; wanted 0 or 1")
    return int(whole[1])


def _files(tree: FileTree, name: str, options: ReadOptions) -> tuple[str, ...]:
    """The file, or the slices in the folder; empty where nothing is there."""
    path = tree.path(name)
    if options.volumes and os.path.isdir(path):
        inside = [entry.name for entry in os.scandir(path) if entry.is_file() and not entry.name.startswith(".")]
        return tuple(f"{name.rstrip('/')}/{file}" for file in sorted(inside) if file.upper() != "DICOMDIR")
    if not os.path.isfile(path) and "\\" in name:  # written on Windows
        return _files(tree, name.replace("\\", "/"), options)
    return (name,) if os.path.isfile(path) else ()


def _cells(columns: Mapping[str, Any], column: str, path: Path) -> list[str]:
    """A column as text, without an empty cell."""
    cells = []
    for row, value in enumerate(columns[column], 1):
        if isinstance(value, (dict, list, bytes)):
            raise InputError(
                f"{path}: {column} holds {type(value).__name__} values; wanted text or numbers (pictures inside "
                "Parquet: datasets.load_dataset('parquet', data_files=...) gives what load_data takes)"
            )
        whole = isinstance(value, float) and value.is_integer()
        text = "" if value is None or value != value else str(int(value) if whole or isinstance(value, bool) else value)
        if not text.strip():
            raise InputError(f"{path}: row {row} has an empty {column}; wanted a value in every row")
        cells.append(text.strip())
    return cells


def _text(path: Path) -> str:
    """A table's text: UTF-8, UTF-16 with its mark, or where semicolons tell of a spreadsheet, cp1252."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b";" not in content.partition(b"\n")[0]:
            raise
        return content.decode("cp1252")


def _csv(path: Path, needed: Iterable[str]) -> dict[str, Sequence[Any] | None]:
    """Columns by their names; None for those that are not needed."""
    try:
        text = _text(path)
        first, _, rest = text.partition("\n")
        if re.fullmatch(r'"?sep=.?"?\s*', first):  # a spreadsheet's own word for its separator
            text, first = rest, rest.partition("\n")[0]
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        if separator not in first:
            separator = next((other for other in ";\t|" if other in first), separator)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
        head = [name.strip() for name in next((row for row in reader if row), [])]
        chosen = {name: index for index, name in enumerate(head) if name in set(needed)}
        columns: dict[str, list[Any]] = {name: [] for name in chosen}
        count = 0
        for row in reader:
            if row:
                count += 1
                check_limit("ROWS", count, str(path))
                if len(row) != len(head):
                    raise InputError(f"{path}: row {count} has {len(row)} cells, the head {len(head)}")
                for name, index in chosen.items():
                    columns[name].append(row[index])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = type(error).__name__ if isinstance(error, UnicodeDecodeError) else error
        raise InputError(f"{path}: unreadable table ({reason}); wanted UTF-8 text with commas") from None
    if not head:
        raise InputError(f"{path}: holds nothing; wanted a line of column names, then one line per image")
    if len(set(head)) < len(head):
        raise InputError(f"{path}: two columns of one name; wanted each once")
    return {name: columns.get(name) for name in head}


def _parquet(path: Path, needed: Iterable[str]) -> dict[str, Sequence[Any] | None]:
    """As :func:`_csv`."""
    parquet = require("pyarrow.parquet", "tables")
    try:
        with parquet.ParquetFile(path) as file:
            head = list(file.schema_arrow.names)
            chosen = [name for name in head if name in set(needed)]
            check_limit("ROWS", file.metadata.num_rows, str(path))
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            parts = [group.column(index) for group in groups for index in range(group.num_columns)]
            size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in chosen)
            check_limit("TABLE", size, str(path))
            columns = file.read(chosen).to_pydict()
    except InputError:
        raise
    except Exception as error:  # damaged bytes lead anywhere
        raise InputError(f"{path}: unreadable Parquet file ({type(error).__name__})") from None
    return {name: columns.get(name) for name in head}
