"""Image files of every kind as arrays, through one face: bytes and a name in, finished images out.

    pictures  PNG, JPEG, BMP, TIFF (Pillow)     dicom  DICOM (pydicom)     nifti  NIfTI-1 and -2 (nibabel, MONAI)
    folders, tables, huggingface  which files there are, their labels, splits and patients

Nothing of a header leaves a reader but pixels and, to keep a patient's images together, who the patient is.
"""

from __future__ import annotations

from tsynd.data.readers.image_file import PICTURES, kind_of, read_image
from tsynd.data.readers.options import ReadOptions

__all__ = ["PICTURES", "ReadOptions", "kind_of", "read_image"]
