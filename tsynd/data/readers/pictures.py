"""PNG, JPEG, BMP and TIFF by Pillow, 8 or 16 bits, grey or colour."""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import numpy as np

from tsynd.data.limits import check_limit
from tsynd.data.readers.options import ReadOptions
from tsynd.data.readers.pixels import Array, quietly, to_unit, windowed
from tsynd.utils.errors import InputError, require

__all__ = ["read_picture"]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")  # MPO is opened as JPEG
_PHOTOMETRIC, _BITS = 262, 258  # TIFF tags


def read_picture(content: bytes, where: str, options: ReadOptions) -> list[Array]:
    """The pictures in a file: one, or with ``frames`` or ``volumes`` the pages of a TIFF.

    Grey of 16 bits is scaled by its full range, 0 to 65535 (a TIFF of 12 bits: 4095), or by ``options.window``;
    whole numbers of 32 bits need a window; float pixels are taken in [0, 1] or by a window. Colour of 16 bits
    keeps its upper eight. Transparency is dropped, palettes become RGB, an orientation mark is obeyed whatever the
    format and depth, not-a-number is black. Of a camera's JPEG with previews or a gain map (MPO) the first is taken.
    What a file is tells its content; only FORMATS are opened.

    Returns:
        uint8, or float32 in [0, 1]: [1 or 3, H, W] each; with ``volumes`` one [1 or 3, D, H, W] of several pages.

    Raises:
        InputError: no picture, a damaged one, CMYK, or several pages.
        MissingExtraError: pillow is not installed.
    """
    pillow, sequence = require("PIL.Image", "data"), require("PIL.ImageSequence", "data")
    try:
        with quietly(), pillow.open(io.BytesIO(content), formats=FORMATS) as image:
            count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            check_limit("VALUES", math.prod(image.size) * len(image.getbands()) * count, where)
            if count > 1 and options.frames is None and not options.volumes:
                raise InputError(
                    f"{where}: {count} pages; frames='split' (--frames split) takes each as an image, volumes=True"
                    " (--volumes) all as one volume"
                )
            shown = itertools.islice(sequence.Iterator(image), count)
            pages = [_pixels(page, where, options) for page in shown]
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
    tags = getattr(image, "tag_v2", {})
    size = image.size
    image.load()
    check_limit("VALUES", math.prod(size), where)
    # a TIFF is turned when it is loaded
    image = image if image.format == "TIFF" else require("PIL.ImageOps", "data").exif_transpose(image)
    mode = image.mode
    if mode[0] in "IF":
        return _deep(image, tags, where, options)[None]
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"):
        raise InputError(f"{where}: colour mode {mode}; wanted grey or RGB, convert it first")
    grey = mode in ("1", "L", "LA", "La")
    if options.window is not None and not grey:
        raise InputError(f"window: {where} is a colour picture; wanted a window with grey images alone")
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
    if short:
        unit = windowed(values, options.window) if options.window else to_unit(values.astype(np.float32), 0, full)
        return unit
    hidden = np.isnan(values) if image.mode == "F" else np.zeros(values.shape, bool)
    if hidden.all() or not np.isfinite(values[~hidden]).all():
        raise InputError(f"{where}: holds no number, or an infinite one")
    low, high = values[~hidden].min(), values[~hidden].max()
    if options.window is not None:
        unit = windowed(values, options.window)
    elif image.mode == "F" and low >= 0 and high <= 1:
        unit = values.astype(np.float32)
    else:
        raise InputError(
            f"{where}: {'float' if image.mode == 'F' else '32-bit'} pixels from {low:g} to {high:g}; "
            "window=(centre, width) (--window CENTRE WIDTH) says which are black and white"
        )
    if tags.get(_PHOTOMETRIC) == 0:
        unit = 1 - unit
    return np.where(hidden, np.float32(0), unit)
