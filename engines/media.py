"""Reads images in messages: each becomes a URL, or bytes with their media type."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from engines.errors import invalid

# The first bytes of PNG, JPEG and GIF files. With WebP these are the formats that every provider takes.
_STARTS = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"))


@dataclass(frozen=True, slots=True)
class Image:
    """Either `url`, which the provider fetches, or `data` with its `media_type`."""

    url: str | None = None
    data: bytes = b""
    media_type: str = ""

    def data_url(self) -> str:
        """The URL itself, or the bytes as a data: URL."""
        return self.url or f"data:{self.media_type};base64,{self.base64()}"

    def base64(self) -> str:
        return base64.b64encode(self.data).decode()


def image_of(part: Any) -> Image:
    """The image in an `image_url` content part. Its URL is https://, http://, data:, file:// or a path.

    Raises `EngineError("invalid_input")` if there is no image or it cannot be read.
    """
    source = part.get("image_url")
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str) or not url:
        raise invalid("an image_url part has no url")
    if url.startswith(("http://", "https://")):
        return Image(url)
    if url.startswith("data:"):
        head, _, body = url.partition(",")
        if not head.endswith(";base64"):
            raise invalid("an image given as a data URL must be base64")
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            raise invalid("an image's data URL is not valid base64") from None
        return Image(data=data, media_type=_media_type(data) or head[5:].partition(";")[0])
    try:
        path = Path(unquote(urlsplit(url).path) if url.startswith("file://") else url).expanduser()
        data = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # an invalid URL, a home of an unknown user, a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise invalid(f"the image {url[:200]!r} cannot be read: {reason}") from None
    media_type = _media_type(data)
    if media_type is None:
        raise invalid(f"{path} is not a PNG, JPEG, GIF or WebP image")
    return Image(data=data, media_type=media_type)


def _media_type(data: bytes) -> str | None:
    """The media type by the file's first bytes; None if it is not PNG, JPEG, GIF or WebP."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((name for start, name in _STARTS if data.startswith(start)), None)
