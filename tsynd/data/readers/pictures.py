"""PNG, JPEG, BMP and TIFF by Pillow, 8 or 16 bits, grey or colour."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pixels import Array, quietly, to_unit, windowed
from tsynd.utils.errors import InputError, require

__all__ = ["read_picture"]

_PHOTOMETRIC, _BITS = 262, 258  # TIFF tags


def read_picture(content: bytes, where: str, options: ReadOptions) -> list[Array]:
    """The pictures in a file: one, or with ``frames`` or ``volumes`` the pages of a TIFF.

    Grey of 16 bits is scaled by its full range, 0 to 65535 (a TIFF of 12 bits: 4095), or by ``options.window``;
    whole numbers of 32 bits need a window; float pixels are taken in [0, 1] or by a window. Colour of 16 bits
    keeps its upper eight. Transparency is dropped, palettes become RGB, a JPEG's orientation mark is obeyed.

    Returns:
        uint8, or float32 in [0, 1]: [1 or 3, H, W] each; with ``volumes`` one [1 or 3, D, H, W] of several pages.

    Raises:
        InputError: no picture, a damaged one, CMYK, or several pages.
        MissingExtraError: pillow is not installed.
    """
    pillow, sequence = require("PIL.Image", "data"), require("PIL.ImageSequence", "data")
    try:
        with quietly("PIL"), pillow.open(io.BytesIO(content)) as image:
            count = getattr(image, "n_frames", 1)
            if count > 1 and options.frames is None and not options.volumes:
                raise InputError(
                    f"{where}: {count} pages; frames='split' (--frames split) takes each as an image, volumes=True"
                    " (--volumes) all as one volume"
                )
            pages = [_pixels(page, where, options) for page in sequence.Iterator(image)]
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them to
        raise InputError(f"{where}: unreadable picture ({type(error).__name__}: {error})") from None
    if count > 1 and options.volumes:
        if len({page.shape for page in pages}) > 1:
            raise InputError(f"{where}: pages of several sizes; wanted one size in a volume")
        return [np.stack(pages, 1)]
    return pages


def _pixels(image: Any, where: str, options: ReadOptions) -> Array:
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    if mode[0] in "IF":
        return _deep(image, tags, where, options)[None]
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"):
        raise InputError(f"{where}: colour mode {mode}; wanted grey or RGB, convert it first")
    grey = mode in ("1", "L", "LA", "La")
    if options.window is not None and not grey:
        raise InputError(f"window: {where} is a colour picture; wanted a window with grey images alone")
    image = require("PIL.ImageOps", "data").exif_transpose(image)
    if mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette's transparency first, or Pillow warns
    pixels = np.array(image.convert("L" if grey else "RGB"))
    if options.window is not None:
        pixels = windowed(pixels, options.window)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _deep(image: Any, tags: Any, where: str, options: ReadOptions) -> Array:
    """Pixels of more than eight bits [H, W] as float32 in [0, 1]."""
    # older Pillows read a PNG of 16 bits as whole numbers of 32
    short = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    values = np.asarray(image)
    bits = tags.get(_BITS, (16,))
    full = 2 ** (bits if isinstance(bits, int) else bits[0]) - 1
    if short and tags.get(_PHOTOMETRIC) == 0:  # white is zero; Pillow inverts eight bits alone
        values = full - values.astype(np.int64)
    if options.window is not None:
        return windowed(values, options.window)
    if short:
        return to_unit(values.astype(np.float32), 0, full)
    if image.mode == "F" and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        return values.astype(np.float32)
    raise InputError(
        f"{where}: {'float' if image.mode == 'F' else '32-bit'} pixels from {values.min():g} to {values.max():g}; "
        "window=(centre, width) (--window CENTRE WIDTH) says which are black and white"
    )
