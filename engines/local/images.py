"""Opens images on this machine, with a limit of their pixels."""

from __future__ import annotations

import io

import PIL.Image

from engines.errors import invalid
from engines.text import one_line

# Pillow reads many more formats, some of them with other programs.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP")


def open_image(data: bytes, max_pixels: int) -> PIL.Image.Image:
    """An image whose head is read and whose pixels are not decoded yet.

    Raises `EngineError("invalid_input")` if it is no image, or has more than `max_pixels`: a small file may hold billions.
    """
    try:
        image = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.UnidentifiedImageError:
        raise invalid("an image is not a PNG, JPEG, GIF or WebP file, or it is damaged") from None
    except PIL.Image.DecompressionBombError:
        raise _too_large(max_pixels) from None
    except Exception as error:  # decoders raise many types
        raise invalid(f"an image cannot be read: {one_line(error)}") from None
    if image.width * image.height > max_pixels:
        raise _too_large(max_pixels)
    return image


def _too_large(max_pixels: int) -> Exception:
    return invalid(f"an image has more than engine.media_max_pixels={max_pixels} pixels")
