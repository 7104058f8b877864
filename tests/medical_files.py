"""Small DICOM and NIfTI files that the tests make themselves."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

EXPLICIT = "1.2.840.10008.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"


def dicom(
    pixels: Any, *, stored: int | None = None, syntax: str = EXPLICIT, photometric: str = "MONOCHROME2", **header: Any
) -> bytes:
    """A DICOM file of values [H, W], [F, H, W] (with NumberOfFrames) or [H, W, 3], and more header elements.

    Args:
        pixels: integers of 8 or 16 bits, or bytes that are encapsulated already.
        stored: BitsStored; as many as allocated by default.
        syntax: transfer syntax of the file.
        photometric: interpretation.
        header: further elements by keyword; None leaves one out.
    """
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CT
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.PhotometricInterpretation = photometric
    dataset.SamplesPerPixel = 3 if photometric in ("RGB", "YBR_FULL", "YBR_ICT", "YBR_RCT") else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    values = pixels if isinstance(pixels, np.ndarray) else None
    if values is not None:
        dataset.Rows, dataset.Columns = values.shape[-3:-1] if dataset.SamplesPerPixel == 3 else values.shape[-2:]
        dataset.BitsAllocated = 8 * values.dtype.itemsize
        dataset.PixelRepresentation = int(values.dtype.kind == "i")
    else:
        dataset.BitsAllocated, dataset.PixelRepresentation = 8, 0
    for name, value in header.items():
        if value is not None:
            setattr(dataset, name, value)
    dataset.BitsStored = stored or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    raw = pixels if values is None else values.astype(values.dtype.newbyteorder("<")).tobytes()
    if raw is not None:
        dataset.PixelData = raw + b"\0" * (len(raw) % 2)
        dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
        dataset["PixelData"].is_undefined_length = values is None
    return save(dataset)


def save(dataset: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def nifti(values: Any, affine: Any = None, kind: Any = None) -> bytes:
    """The bytes of a .nii file."""
    image = (kind or nibabel.Nifti1Image)(np.asarray(values), np.eye(4) if affine is None else affine)
    return bytes(image.to_bytes())


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
