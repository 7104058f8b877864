"""One image file, whatever its kind: bytes and a name in, finished images out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath

from tsynd.data.readers.dicom import MAGIC_AT, is_dicom, read_dicom, read_series
from tsynd.data.readers.nifti import read_nifti
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pictures import read_picture
from tsynd.data.readers.pixels import Array, finish

__all__ = ["PICTURES", "START", "Image", "kind_of", "read_image", "read_volume"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
START = MAGIC_AT + 4  # bytes that tell a DICOM file
Image = tuple[list[Array], str | None]
"""Finished images uint8 [C, H, W] or [C, D, H, W], and the patient where the file tells."""


def kind_of(name: str, start: Callable[[], bytes]) -> str | None:
    """``picture``, ``dicom`` or ``nifti``; None for any other file, hidden ones and DICOMDIR.

    Args:
        name: of the file; its suffix decides where it is known.
        start: gives the file's first bytes, ``START`` of them; called for other suffixes, or none.
    """
    base = PurePosixPath(name).name.lower()
    if base.startswith(".") or base == "dicomdir":
        return None
    if base.endswith(PICTURES):
        return "picture"
    if base.endswith((".nii", ".nii.gz")):
        return "nifti"
    return "dicom" if base.endswith((".dcm", ".dicom")) or is_dicom(start()) else None


def read_image(content: bytes, kind: str, where: str, options: ReadOptions) -> Image:
    """What a file of a kind holds.

    Raises:
        InputError: it cannot be read; ``where`` stands before the reason.
        MissingExtraError: the package for its kind is not installed.
    """
    patient = None
    if kind == "dicom":
        images, patient = read_dicom(content, where, options)
    elif kind == "nifti":
        images = read_nifti(content, where, options)
    else:
        images = read_picture(content, where, options)
    return [finish(image, options, where) for image in images], patient


def read_volume(files: Iterable[tuple[bytes, str]], where: str, options: ReadOptions) -> Image:
    """One volume of a series of DICOM slices, see :func:`tsynd.data.readers.dicom.read_series`."""
    volume, patient = read_series(files, where, options)
    return [finish(volume, options, where)], patient
