"""Work units on disk: a unit is a shard is a range of sample ids, whole or not there, checked before it is believed.

A job's folder::

    manifest.json                 what the job is; at the end also every shard's size and checksum
    shard-000000.tar              WebDataset: KEY.png (or .npy) and KEY.json of every sample
    index/shard-000000.parquet    a row per sample
    units/shard-000000.json       receipt: ids, sizes and checksums of the two files above; written last

A unit counts as done when its receipt is there, is of this job and is whole by its own digest, and both files are as it
says. Any number of writers may share the folder: what a unit holds depends on the job alone, so two that make the same
one write the same bytes, each under a temporary name of its own.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tsynd.utils.atomic import check_writable, clear_leftovers, durable
from tsynd.utils.errors import InputError, check_whole, require
from tsynd.utils.fingerprint import differences, hash_file, read_sealed, seal

__all__ = ["Sample", "ShardFolder", "Unit", "image_bytes", "plan_units"]

FORMATS = ("png", "npy")
_OURS = re.compile(r"manifest\.json|units|index|shard-\d{6,}\.tar")


@dataclass(frozen=True)
class Unit:
    """Sample ids ``start`` .. ``stop`` - 1."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """``shard-000042``."""
        return f"shard-{self.number:06d}"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Sample:
    """One targeted image: ``image`` uint8 [H, W] or [H, W, C], or float32 [C, ...] for npy; and its row."""

    sample_id: int
    image: np.ndarray[Any, Any]
    label: int | list[int] | None
    uncertainty_before: float
    uncertainty: float
    status: str

    def row(self) -> dict[str, Any]:
        """What stands in the JSON and the index."""
        return {name: value for name, value in vars(self).items() if name != "image"}


def plan_units(count: int, shard_size: int) -> list[Unit]:
    """All units of ``count`` samples, ``shard_size`` each; the last may be smaller.

    Raises:
        InputError: a size below 1, or more than 2^32 samples.
    """
    check_whole("shard_size", shard_size)
    if not 1 <= count <= 2**32:
        raise InputError(f"data: {count} images, wanted 1 .. 2^32")
    starts = range(0, count, shard_size)
    return [Unit(number, start, min(start + shard_size, count)) for number, start in enumerate(starts)]


def _sync_folder(folder: Path) -> None:
    """Make a rename last: it is an entry of the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is on the disk under its name when the block ends, or not there.

    Raises:
        InputError: the disk is full, or cannot be written to.
    """
    try:
        with durable(path) as file:
            yield file
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"output: {path} cannot be written ({error.strerror or error}); finished shards are kept, "
            "the same command goes on behind them"
        ) from error


def image_bytes(image: np.ndarray[Any, Any], kind: str) -> bytes:
    """An image as a file: ``png`` of uint8 [H, W] or [H, W, C], or ``npy``."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, np.ascontiguousarray(image), allow_pickle=False)
    else:
        require("PIL.Image", "data").fromarray(image).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


class ShardFolder:
    """The folder of a sharded job.

    Args:
        folder: new, empty, or that of the same job.
        fingerprint: everything that decides the samples, JSON-able; holds ``images`` and ``shard_size``.
        facts: further content of the manifest.

    Attributes:
        units: all units of the job.
        notes: what was found wrong and put right, for people.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any], facts: dict[str, Any]) -> None:
        self.folder = folder.expanduser()
        self.fingerprint, self.facts = fingerprint, facts
        self.units = plan_units(fingerprint["images"], fingerprint["shard_size"])
        self.notes: list[str] = []

    def open(self) -> None:
        """Claim the folder for this job.

        Raises:
            InputError: it holds something else, or another job: the difference is shown; or it cannot be written to.
        """
        manifest = self.folder / "manifest.json"
        held = sorted(item.name for item in self.folder.iterdir()) if self.folder.is_dir() else []
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output: {self.folder} is a file, wanted a new folder or that of the same job")
        visible = [name for name in held if not name.startswith(".")]
        known = _read_json(manifest)
        if known is not None:
            self._compare(known["fingerprint"])
        else:
            receipts = map(_read_json, sorted((self.folder / "units").glob("shard-*.json")))
            older = [receipt["fingerprint"] for receipt in receipts if receipt]
            ours = {"units", "index"} <= set(visible) and all(map(_OURS.fullmatch, visible))
            if visible and not older and not ours:
                raise InputError(
                    f"output: {self.folder} holds {', '.join(visible[:3])} and no manifest.json of a sharded job, "
                    "wanted a new or empty folder"
                )
            for fingerprint in older:
                self._compare(fingerprint)
            if older:
                self.notes.append("manifest.json was missing or damaged: written again, the shards' receipts agree")
        check_writable(manifest)
        if known is None:  # before the folders, which say less of whose they are
            self._write_manifest(None)
        for part in ("units", "index", ""):
            (self.folder / part).mkdir(exist_ok=True)
            clear_leftovers(self.folder / part)

    def _compare(self, then: dict[str, Any]) -> None:
        if changes := differences(then, self.fingerprint):
            raise InputError(f"output: {self.folder} holds another job ({changes}); wanted another folder")

    def _paths(self, unit: Unit) -> tuple[Path, Path, Path]:
        name = unit.name
        return self.folder / f"{name}.tar", self.folder / f"index/{name}.parquet", self.folder / f"units/{name}.json"

    def fault(self, unit: Unit, checksum: bool = True) -> str | None:
        """Why a unit has to be made: ``missing``, or what is wrong with it; None where it is done.

        Args:
            unit: of this job.
            checksum: also read the files and compare their SHA-256; else only their sizes.
        """
        *paths, sheet = self._paths(unit)
        if not sheet.exists():
            return "missing" if not any(path.exists() for path in paths) else "missing: its receipt was never written"
        receipt = _read_json(sheet)
        if receipt is None:
            return f"{sheet.name}: the receipt is damaged"
        if changes := differences(receipt["fingerprint"], self.fingerprint):
            return f"{sheet.name}: the receipt is of another job ({changes})"
        if [receipt.get("start"), receipt.get("stop")] != [unit.start, unit.stop]:
            return f"{sheet.name}: the receipt is for other samples"
        if receipt.get("images") != len(unit):
            return f"{sheet.name}: {receipt.get('images')} images, wanted {len(unit)}"
        for path in paths:
            try:
                wanted = receipt["files"][path.name]
                size = path.stat().st_size
                if size != wanted["size"]:
                    return f"{path.name}: {size} bytes, wanted {wanted['size']}"
                if checksum and hash_file(path) != wanted["sha256"]:
                    return f"{path.name}: its checksum is not the receipt's"
            except FileNotFoundError:
                return f"{path.name}: is gone"
            except (KeyError, TypeError):
                return f"{sheet.name}: the receipt is damaged"
            except OSError as error:
                return f"{path.name}: cannot be read ({error.strerror})"
        return None

    def missing(self, units: Sequence[Unit], checksum: bool = True) -> list[Unit]:
        """Those of the units that have to be made; damage goes into ``notes``."""
        todo = []
        for unit in units:
            reason = self.fault(unit, checksum)
            if reason is not None:
                todo.append(unit)
                if not reason.startswith("missing"):
                    self.notes.append(f"{reason}; made again")
        return todo

    def write(self, unit: Unit, samples: Iterable[Sample], kind: str) -> dict[str, Any]:
        """Make a unit from its samples, in the order of their ids; returns the receipt.

        Raises:
            InputError: the disk is full or cannot be written to; nothing of the unit is left then.
        """
        tar, index, sheet = self._paths(unit)
        if not sheet.parent.is_dir():
            raise InputError(f"output: {self.folder} was removed or emptied while the job was at work in it")
        for path in (tar, index, sheet):
            clear_leftovers(path.parent, unit.name)
        rows: list[dict[str, Any]] = []
        with _written(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for sample in samples:
                rows.append(sample.row())
                key = f"{sample.sample_id:012d}"
                _add(archive, f"{key}.{kind}", image_bytes(sample.image, kind))
                _add(archive, f"{key}.json", json.dumps(rows[-1]).encode())
            ids = [row["sample_id"] for row in rows]
            if ids != list(range(unit.start, unit.stop)):
                raise RuntimeError(f"{unit.name}: made {len(ids)} samples, not {unit.start} .. {unit.stop - 1}")
        with _written(index) as file:
            _write_index(file, unit, rows)
        receipt = {
            "unit": unit.number,
            "start": unit.start,
            "stop": unit.stop,
            "images": len(rows),
            "mean_uncertainty_before": float(np.mean([row["uncertainty_before"] for row in rows])),
            "mean_uncertainty": float(np.mean([row["uncertainty"] for row in rows])),
            "files": {p.name: {"size": p.stat().st_size, "sha256": hash_file(p)} for p in (tar, index)},
            "fingerprint": self.fingerprint,
        }
        with _written(sheet) as file:
            file.write(json.dumps(seal(receipt)).encode())
        return receipt

    def finish(self) -> dict[str, Any] | None:
        """Write the complete manifest if every unit has its receipt; None where one has not (yet)."""
        receipts = []
        for unit in self.units:
            receipt = _read_json(self._paths(unit)[2])
            if receipt is None or self.fault(unit, checksum=False) is not None:
                return None
            receipts.append({key: value for key, value in receipt.items() if key not in ("fingerprint", "digest")})
        return self._write_manifest(receipts)

    def _write_manifest(self, shards: list[dict[str, Any]] | None) -> dict[str, Any]:
        content: dict[str, Any] = {
            "format": 1,
            "complete": shards is not None,
            "images": self.fingerprint["images"],
            **self.facts,
            "fingerprint": self.fingerprint,
            "shards": shards or [],
        }
        with _written(self.folder / "manifest.json") as file:
            file.write(json.dumps(seal(content), indent=1).encode() + b"\n")
        return content


def _write_index(file: BinaryIO, unit: Unit, rows: list[dict[str, Any]]) -> None:
    pyarrow, parquet = require("pyarrow", "big"), require("pyarrow.parquet", "big")
    label = rows[0]["label"]
    columns = {
        "sample_id": pyarrow.int64(),
        "label": pyarrow.list_(pyarrow.int8()) if isinstance(label, list) else pyarrow.int64(),
        "uncertainty_before": pyarrow.float32(),
        "uncertainty": pyarrow.float32(),
        "status": pyarrow.string(),
    }
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema(list(columns.items())))
    table = table.append_column("shard", pyarrow.array([f"{unit.name}.tar"] * len(rows), pyarrow.string()))
    parquet.write_table(table, file)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A manifest or receipt; None where there is none that is whole."""
    content = read_sealed(path)
    return content if content is not None and isinstance(content.get("fingerprint"), dict) else None
