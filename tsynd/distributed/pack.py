"""From the shards of a finished job to one MedMNIST-style .npz or to class folders, without holding the images."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from tsynd.data.formats import folder_names
from tsynd.data.sources import decode_image
from tsynd.distributed.shards import image_bytes
from tsynd.utils.atomic import atomic_path, clear_leftovers, durable
from tsynd.utils.errors import InputError
from tsynd.utils.fingerprint import hash_file, is_sealed
from tsynd.utils.progress import progress_bar

__all__ = ["pack", "read_manifest"]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished job.

    Raises:
        InputError: there is none, or the job is not finished.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        complete = manifest["complete"]
        whole = is_sealed(manifest)
    except FileNotFoundError:
        raise InputError(f"shards: {folder} holds no manifest.json, wanted the output of a sharded synthesis") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"shards: {path} cannot be read ({type(error).__name__})") from None
    if not complete:
        raise InputError(f"shards: the job in {folder} is not finished; run the same tsynd synthesize again")
    if not whole:
        raise InputError(f"shards: {path} is damaged; run the same tsynd synthesize again to repair it")
    return cast("dict[str, Any]", manifest)


def _samples(folder: Path, manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """Row, image file's suffix and bytes of every sample; each shard's checksum is compared before it is read."""
    for shard in manifest["shards"]:
        name, wanted = next((n, f) for n, f in shard["files"].items() if n.endswith(".tar"))
        path = folder / name
        if not path.is_file() or path.stat().st_size != wanted["size"] or hash_file(path) != wanted["sha256"]:
            raise InputError(f"shards: {path} is damaged or gone; run the same tsynd synthesize again to repair it")
        with tarfile.open(path, "r:") as archive:
            waiting: tuple[str, bytes] | None = None
            expected = iter(range(shard["start"], shard["stop"]))
            for member in archive:
                file = archive.extractfile(member)
                content = b"" if file is None else file.read()
                if waiting is None:  # the image stands before its JSON
                    waiting = Path(member.name).suffix, content
                else:
                    row = json.loads(content)
                    if row["sample_id"] != next(expected, None):
                        raise InputError(f"shards: {path} holds sample {row['sample_id']} out of its place")
                    yield row, *waiting
                    waiting = None
            if waiting is not None or (rest := next(expected, None)) is not None:
                raise InputError(f"shards: {path} ends before sample {rest}; wanted {shard['images']} images")


def _pixels(content: bytes, suffix: str) -> np.ndarray[Any, Any]:
    """Uint8 [H, W] or [H, W, C], of a volume [D, H, W] or [D, H, W, C]."""
    image = decode_image(content, suffix)
    if image.dtype != np.uint8:
        image = np.rint(image * 255).astype(np.uint8)
    return np.asarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1))


def pack(shards: str | Path, output: str | Path, *, progress: bool = True) -> int:
    """Write the samples of a finished sharded job as one .npz (for a path that ends so) or as class folders.

    The .npz holds ``images``, ``labels``, ``class_names``, ``sample_ids``, ``initial_uncertainty``, ``uncertainty``,
    not compressed, so that it can be mapped. PNG files are copied as they are.

    Args:
        shards: output folder of the job.
        output: a file or folder that is not there yet.
        progress: show a bar where rich is installed.

    Returns:
        Number of images.

    Raises:
        InputError: the job is unfinished or damaged, or the output cannot be written.
    """
    folder, path = Path(shards).expanduser(), Path(output).expanduser()
    manifest = read_manifest(folder)
    clear_leftovers(path.parent, path.stem)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise InputError(f"output: {path} exists already, wanted a new file or folder")
    write = _write_npz if path.suffix == ".npz" else _write_folders
    with progress_bar("packing", manifest["images"], progress) as advance:
        try:
            write(folder, manifest, path, lambda: advance(1, ""))
        except OSError as error:
            raise InputError(f"output: {path} cannot be written ({error.strerror or error})") from error
    return int(manifest["images"])


def _write_npz(folder: Path, manifest: dict[str, Any], path: Path, done: Callable[[], None]) -> None:
    count, (channels, *sides) = manifest["images"], manifest["image_shape"]
    if channels not in (1, 3):
        raise InputError(f"shards: {channels} channels; wanted 1 or 3 for an .npz of this kind")
    shape = (count, *sides) if channels == 1 else (count, *sides, channels)
    rows: list[dict[str, Any]] = []
    with durable(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(cast("Any", member), header)
            for row, suffix, content in _samples(folder, manifest):
                member.write(np.ascontiguousarray(_pixels(content, suffix)).tobytes())
                rows.append(row)
                done()
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "sample_ids": np.array([row["sample_id"] for row in rows], np.int64),
            "initial_uncertainty": np.array([row["uncertainty_before"] for row in rows], np.float32),
            "uncertainty": np.array([row["uncertainty"] for row in rows], np.float32),
        }
        if rows[0]["label"] is not None:
            arrays["labels"] = np.array([row["label"] for row in rows], np.int64)
        if manifest["class_names"]:
            arrays["class_names"] = np.array(manifest["class_names"])
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.save(cast("Any", member), array, allow_pickle=False)


def _write_folders(folder: Path, manifest: dict[str, Any], path: Path, done: Callable[[], None]) -> None:
    if manifest["task"] != "multiclass":
        raise InputError("output: class folders hold one class per image, the shards are multilabel; wanted an .npz")
    if len(manifest["image_shape"]) > 3:
        raise InputError("output: class folders hold pictures, the shards hold volumes; wanted an .npz")
    names = folder_names(manifest["class_names"])
    with atomic_path(path) as temporary:
        temporary.mkdir()
        for row, suffix, content in _samples(folder, manifest):
            label = row["label"]
            if label is None:
                raise InputError("output: the shards have no labels, wanted some for class folders; pack into an .npz")
            target = temporary / (names[label] if label < len(names) else str(label))
            target.mkdir(exist_ok=True)
            png = content if suffix == ".png" else image_bytes(_pixels(content, suffix), "png")
            (target / f"{row['sample_id']:012d}.png").write_bytes(png)
            done()
