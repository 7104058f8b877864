"""Targeted images from an exported file: needs numpy and onnxruntime, and works where torch is not installed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsynd.utils.errors import InputError, check_whole, first_line, require

__all__ = ["FORMAT_VERSION", "KINDS", "OnnxSynthesizer", "RuntimeResult", "read_metadata"]

FORMAT_VERSION = 1
"""Of the exported files: names of inputs, outputs and metadata."""

KINDS = ("classifier", "encoder", "decoder", "step", "synthesizer")

_OUTPUTS = ("targeted", "latents", "initial_uncertainty", "uncertainty", "status")
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_TILE = 16  # as in tsynd.synthesize: whole tiles give every image the same arithmetic in any batch

# the digest of a file's content, in its own metadata: with zeros in its place it is the SHA-256 of the whole
_DIGEST = re.compile(rb'tsynd\.sha256\x12\x42"([0-9a-f]{64})"')
NO_DIGEST = "0" * 64

Array = NDArray[Any]


def sealed(content: bytes) -> bytes:
    """A file of which the metadata's ``sha256`` is :data:`NO_DIGEST` with its digest there.

    Raises:
        ValueError: it has no such place, or several.
    """
    (place,) = _DIGEST.finditer(content)
    start, stop = place.span(1)
    plain = content[:start] + NO_DIGEST.encode() + content[stop:]
    return content[:start] + hashlib.sha256(plain).hexdigest().encode() + content[stop:]


def _check_digest(path: str | Path) -> None:
    content = Path(path).expanduser().read_bytes()
    try:
        same = sealed(content) == content
    except ValueError:
        raise InputError(f"path: {path} holds no digest of its content, wanted a file of this version") from None
    if not same:
        raise InputError(f"path: {path} is not as it was exported: its content does not fit its digest")


@dataclass(frozen=True)
class RuntimeResult:
    """Row i belongs to source image i.

    Attributes:
        images: [N, C, H, W] or [N, C, D, H, W] float32 in [0, 1].
        latents: [N, ...] float32.
        initial_uncertainty: [N] float32, of the reconstructions, in nats.
        uncertainty: [N] float32, of the images, in nats.
        status: [N] int8: 0 raised, 1 unchanged, 2 not finite.
    """

    images: Array
    latents: Array
    initial_uncertainty: Array
    uncertainty: Array
    status: Array

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: str | Path, labels: Array | None = None, class_names: Sequence[str] | None = None) -> Path:
        """Write a MedMNIST-style ``.npz`` (images as uint8 [N, H, W], [N, H, W, 3] or [N, D, H, W]), whole.

        Raises:
            InputError: the path is no ``.npz`` or cannot be written.
        """
        target = Path(path).expanduser()
        if target.suffix != ".npz":
            raise InputError(f"path: got {path}, wanted a name that ends in .npz")
        pixels = np.moveaxis(np.rint(self.images * 255).astype(np.uint8), 1, -1)
        arrays = asdict(self) | {"images": pixels[..., 0] if pixels.shape[-1] == 1 else pixels}
        if labels is not None:
            arrays["labels"] = np.asarray(labels)
        if class_names is not None:
            arrays["class_names"] = np.array(list(class_names))
        temporary = target.with_name(f".{target.stem}-{secrets.token_hex(4)}.npz")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(f"path: {path} cannot be written ({error.strerror})") from error
        finally:
            temporary.unlink(missing_ok=True)
        return target


class OnnxSynthesizer:
    """Runs a file of ``tsynd.export_onnx(..., kind="synthesizer")``.

    Args:
        path: the file.
        device: ``cuda``, ``cpu``, or None for a GPU where onnxruntime has one.
        threads: on the CPU; onnxruntime's choice when None.

    Attributes:
        metadata: what the export wrote: ``image_shape``, ``samples``, ``steps``, ``radius``, ``seed``, ...
        providers: what onnxruntime runs the file with, first choice first.

    Raises:
        InputError: the file cannot be read, is not such a file, or comes from a newer tsynd; or the device is not
            to be had.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path, *, device: str | None = None, threads: int | None = None) -> None:
        runtime = require("onnxruntime", "onnx")
        available = runtime.get_available_providers()
        if device not in (None, "cuda", "cpu"):
            raise InputError(f"device: got {device!r}, wanted 'cuda', 'cpu' or None")
        wanted = [p for p in _PROVIDERS if p in available and not (device == "cpu" and p == _PROVIDERS[0])]
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.use_deterministic_compute = True
        check_whole("threads", threads, optional=True)
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = _open(runtime, path, options, wanted)
        self.metadata = read_metadata(self._session, path)
        kind = self.metadata.get("kind")
        if kind != "synthesizer":
            raise InputError(f"path: {path} is of kind {kind!r}, wanted 'synthesizer'")
        _check_digest(path)
        self.providers: list[str] = self._session.get_providers()
        if device == "cuda" and _PROVIDERS[0] not in self.providers:
            raise InputError(f"device: got 'cuda', but onnxruntime offers {', '.join(available)}")
        self._bind = _PROVIDERS[0] in self.providers

    def __call__(self, images: object, batch_size: int = 64) -> RuntimeResult:
        """Targeted images.

        On one machine, with the same number of threads, results are the same bit for bit in every run.

        Args:
            images: [N, C, H, W] or [N, C, D, H, W], N > 0, of the file's shape: uint8, or float in [0, 1].
            batch_size: images at once, rounded up to a multiple of 16.

        Raises:
            InputError: wrong type, shape, dtype or range.
        """
        check_whole("batch_size", batch_size)
        pixels = _check_images(images, self.metadata["image_shape"])
        size = -(-batch_size // _TILE) * _TILE
        parts = [self._run(pixels[at : at + size]) for at in range(0, len(pixels), size)]
        return RuntimeResult(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _run(self, pixels: Array) -> list[Array]:
        count = len(pixels)
        spare = -count % _TILE
        full = np.concatenate([pixels, np.repeat(pixels[:1], spare, axis=0)]) if spare else pixels
        feed = np.ascontiguousarray(full)
        if self._bind:
            binding = self._session.io_binding()
            binding.bind_cpu_input("images", feed)
            for name in _OUTPUTS:
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            arrays = binding.copy_outputs_to_cpu()
        else:
            arrays = self._session.run(list(_OUTPUTS), {"images": feed})
        return [array[:count] for array in arrays]


def _open(runtime: Any, path: str | Path, options: Any, providers: list[str]) -> Any:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"path: {path} is no file, wanted one of tsynd.export_onnx")
    try:
        return runtime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # onnxruntime's own classes, which share no base of their own
        raise InputError(f"path: {path} is truncated, damaged or no ONNX file ({first_line(error)})") from error


def read_metadata(session: Any, path: str | Path = "model") -> dict[str, Any]:
    """What the export wrote into the file of an ``onnxruntime.InferenceSession``.

    Raises:
        InputError: not a file of tsynd, or one of a newer tsynd.
    """
    raw = session.get_modelmeta().custom_metadata_map
    try:
        values = {key.removeprefix("tsynd."): json.loads(text) for key, text in raw.items() if key[:6] == "tsynd."}
    except (ValueError, RecursionError):
        values = {}
    version = values.get("format")
    if not isinstance(version, int):
        raise InputError(f"path: {path} was not exported by tsynd, wanted a file of tsynd.export_onnx")
    if version > FORMAT_VERSION:
        raise InputError(
            f"path: {path} has format {version} of tsynd {values.get('version')}, wanted at most {FORMAT_VERSION}: "
            "update tsynd"
        )
    return values


def _check_images(images: object, shape: Sequence[int]) -> Array:
    x = np.asarray(images)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise InputError(f"images: dtype {x.dtype}; wanted uint8, or float in [0, 1]")
    if list(x.shape[1:]) != list(shape) or len(x) == 0:
        wanted = ", ".join(map(str, shape))
        raise InputError(f"images: shape {list(x.shape)}; wanted [N, {wanted}] with N > 0, as the file was exported")
    if x.dtype == np.uint8:
        unit: Array = x.astype(np.float32) / np.float32(255)
        return unit
    x = x.astype(np.float32)
    low, high = float(x.min()), float(x.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise InputError(f"images: values from {low:g} to {high:g}; wanted finite ones in [0, 1] (or uint8)")
    clipped: Array = np.clip(x, 0, 1)
    return clipped
