"""NIfTI by nibabel through MONAI's reader: volumes in one orientation and, on demand, one spacing."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from typing import Any

import numpy as np
import torch

from tsynd.data.limits import check_expansion, check_limit
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pixels import Array, quietly, to_unit, windowed
from tsynd.utils.errors import InputError, require

__all__ = ["read_nifti"]

PERCENTILES = (0.5, 99.5)


def read_nifti(content: bytes, where: str, options: ReadOptions) -> list[Array]:
    """The volume in a file, or its slices.

    Axes are brought to the nearest anatomical ones and laid out as DICOM's axial slices are: depth from feet to head,
    rows from front to back, columns from the patient's right to left. ``options.spacing`` resamples. Values (with the
    file's own slope) are scaled by ``options.window``, or from the 0.5th to the 99.5th percentile of the volume (where
    these are equal: from minimum to maximum). Not-a-number is background, the volume's minimum.

    Returns:
        Float32 in [0, 1]: one [1, D, H, W]; with ``options.slices``, or of a file of one slice, [1, H, W] each.

    Raises:
        InputError: no NIfTI, a damaged one, a time series or colour.
        MissingExtraError: nibabel or MONAI is not installed.
    """
    nibabel = require("nibabel", "medical")
    reader = require("monai.data", "medical").NibabelReader(as_closest_canonical=True)
    try:
        if content[:2] == b"\x1f\x8b":
            content = _unpacked(content, where)
        kinds = {content[344:348]: nibabel.Nifti1Image, content[4:8]: nibabel.Nifti2Image}
        kind = kinds.get(b"n+1\0") or kinds.get(b"n+2\0")
        if kind is None:
            raise InputError(f"{where}: no NIfTI file of header and voxels in one (neither n+1 nor n+2 in its header)")
        with quietly():
            image = kind.from_bytes(content)
            shape, dtype = tuple(image.shape), image.get_data_dtype()
            check_limit("VALUES", math.prod(map(int, shape)), where)
            image = _placed(image, where)
    except InputError:
        raise
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{where}: damaged or truncated file ({type(error).__name__})") from None
    except Exception as error:  # the header parser's own kinds
        raise InputError(f"{where}: no NIfTI file, or a damaged one ({type(error).__name__})") from None
    if dtype.kind not in "iuf":
        raise InputError(f"{where}: colour or complex values; wanted one number per voxel")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(f"{where}: shape {list(image.shape)}; wanted one volume [X, Y, Z], without time or channels")
    try:
        reader.filenames = (where,)  # what reader.read() would note; it reads paths alone
        image = (
            image.slicer[(...,) + (0,) * (len(image.shape) - len(shape))] if len(image.shape) > len(shape) else image
        )
        with quietly():
            values, about = reader.get_data(image)
        volume, affine = np.ascontiguousarray(values, np.float32), np.asarray(about["affine"], np.float64)
    except Exception as error:
        raise InputError(f"{where}: truncated or damaged voxels ({type(error).__name__})") from None
    hidden = np.isnan(volume)
    if hidden.all() or np.isinf(volume).any():
        raise InputError(f"{where}: holds a voxel that is not finite")
    if hidden.any():  # no number says that nothing was measured there
        volume[hidden] = volume[~hidden].min()
    volume = volume.reshape(*volume.shape[: len(shape)], *(1,) * (3 - len(shape)))
    if options.spacing is not None:
        try:
            volume = _resampled(volume, affine, options.spacing)
        except Exception as error:
            raise InputError(f"{where}: its affine cannot be resampled ({type(error).__name__})") from None
    low, high = np.percentile(volume, PERCENTILES)
    if not high > low:  # what is to be seen fills less than the percentiles leave out
        low, high = volume.min(), volume.max()
    unit = windowed(volume, options.window) if options.window is not None else to_unit(volume, low, high)
    unit = unit.transpose(2, 1, 0)[:, ::-1, ::-1]
    if options.slices is None:
        return [np.ascontiguousarray(unit[None] if len(unit) > 1 else unit)]
    return _slices(unit, options.slices, where)


def _unpacked(content: bytes, where: str) -> bytes:
    """The content of a .gz, read no further than the limit."""
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        parts, size = [], 0
        while part := file.read(2**24):
            size += len(part)
            check_expansion(len(content), size, where)
            parts.append(part)
    return b"".join(parts)


def _placed(image: Any, where: str) -> Any:
    """The image with an affine that can be used: where the sform cannot, the qform's.

    Raises:
        InputError: neither can.
    """
    affine: Any = np.asarray(image.affine, np.float64)
    if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12:
        return image
    try:
        affine = image.header.get_qform(coded=True)[0]
    except Exception:  # a quaternion that is none
        affine = None
    if affine is None or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) <= 1e-12:
        raise InputError(f"{where}: its sform (affine) is singular or not finite and no qform stands in for it")
    return type(image)(image.dataobj, affine, image.header)


def _resampled(volume: Array, affine: Array, spacing: tuple[float, float, float]) -> Array:
    tensor = require("monai.data", "medical").MetaTensor(
        torch.from_numpy(volume)[None], affine=torch.from_numpy(affine)
    )
    spacer: Any = require("monai.transforms", "medical").Spacing(spacing, mode="bilinear", padding_mode="border")
    return np.asarray(spacer(tensor).as_tensor()[0].numpy(), np.float32)


def _slices(volume: Array, slices: str, where: str) -> list[Array]:
    """Slices of [D, H, W] as one stands before them: axial from the feet, the others head up."""
    plane, _, which = slices.partition(":")
    axis = ("axial", "coronal", "sagittal").index(plane)
    upright = volume if plane == "axial" else volume[::-1]
    along = np.moveaxis(upright, axis, 0)
    if which:
        return [np.ascontiguousarray(along[len(along) // 2][None])]
    full = [np.ascontiguousarray(one[None]) for one in along if one.max() > one.min()]
    if not full:
        raise InputError(f"{where}: every {plane} slice is constant; wanted an image")
    return full
