"""Media in messages: images, audio and video, each a web address, a data URL or a file.

`load_media` makes data URLs of them before a request goes on. So engines and servers neither fetch nor open anything
themselves, and the limits in the configuration apply to all of them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import mimetypes
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from engines.config import EngineConfig
from engines.errors import invalid
from engines.types import Message, Request

if TYPE_CHECKING:
    from engines.fetch import Fetched

T = TypeVar("T")

# The keys of content parts that name media, and the words for them in messages. The type of a part does not matter: vLLM
# reads some parts by their keys.
MEDIA_KEYS = {"image_url": "image", "audio_url": "audio", "video_url": "video"}
# Threads for all engines of a process: they bound the memory of media that are decoded at once.
THREADS = 4

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
        return self.url or _data_url(self.data, self.media_type)

    def base64(self) -> str:
        return base64.b64encode(self.data).decode()


def image_of(part: Any) -> Image:
    """The image in an `image_url` content part. Its URL is https://, http://, data:, file:// or a path.

    Raises `EngineError("invalid_input")` if there is no image or it cannot be read.
    """
    url = url_of(part, "image_url")
    kind = source_of(url)
    if kind == "web":
        return Image(url)
    data, media_type = _decoded(url, "image_url") if kind == "data" else _from_file(url, "image_url")
    return Image(data=data, media_type=media_type)


def source_of(url: str) -> Literal["web", "data", "file"]:
    """The kind of a media URL: a web address, a data URL, or else a file."""
    start = url[:8].lower()
    return "web" if start.startswith(("http://", "https://")) else "data" if start.startswith("data:") else "file"


def url_of(part: Mapping[str, Any], key: str) -> str:
    """The URL in a content part. Raises `EngineError("invalid_input")` if there is none."""
    source = part.get(key)
    url = source.get("url") if isinstance(source, Mapping) else source
    if not isinstance(url, str) or not url:
        raise invalid(f"a part with {key} has no url")
    return url


def media_in(contents: Sequence[Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Each content part that names media, and the key that does it, in the contents of messages."""
    for content in contents:
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping):
                yield from ((part, key) for key in MEDIA_KEYS if part.get(key))  # null in tables with a column for each key


def has_media(request: Request) -> bool:
    """True if a part of a message names media."""
    return not is_text(request.messages, request.turns) and any(True for _ in media_in(_contents(request)))


def is_text(messages: Sequence[Mapping[str, Any]], turns: Sequence[Any]) -> bool:
    """True if each content is one text, as in most conversations. Faster than looking for media."""
    return not turns and {type(message.get("content")) for message in messages} <= {str}


def _contents(request: Request) -> list[Any]:
    return [*(message.get("content") for message in request.messages), *request.turns]


# -- loading ----------------------------------------------------------------------------------------------------------


async def load_media(request: Request, config: EngineConfig, *, fetches: bool, inspect: Callable[[bytes], None]) -> Request:
    """The request with its media as data URLs. Web addresses stay as they are unless `fetches`.

    `inspect` gets the bytes of each image and may refuse them. Raises `EngineError("invalid_input")`.
    """
    fetched: dict[str, Fetched] = {}
    urls = {url_of(part, key) for part, key in media_in(_contents(request))}
    if fetches and (web := [url for url in urls if source_of(url) == "web"]):
        from engines.fetch import FetchLimits, fetch, parse_networks

        networks = parse_networks(config.media_private_networks)
        fetched = await fetch(web, FetchLimits(networks, config.media_max_bytes, config.media_timeout_s))
    return await in_media_thread(_loaded, request, fetched, config.media_max_bytes, inspect)


async def in_media_thread(work: Callable[..., T], *args: Any) -> T:
    """Calls `work(*args)` in one of a few threads: large media would stop the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads(), functools.partial(work, *args))


async def in_thread_with_media(work: Callable[[Request], T], request: Request) -> T:
    """Calls `work(request)`, in a thread if the request has media."""
    return await in_media_thread(work, request) if has_media(request) else work(request)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="eagleray-media")


def _loaded(request: Request, fetched: Mapping[str, Fetched], max_bytes: int, inspect: Callable[[bytes], None]) -> Request:
    def content(given: Any) -> Any:
        return [part_of(part) for part in given] if isinstance(given, list) else given

    def part_of(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        found = dict(part)
        for key in MEDIA_KEYS:
            if part.get(key) and (url := load(url_of(part, key), key)):
                found[key] = {**part[key], "url": url} if isinstance(part[key], Mapping) else url
        return found

    @functools.cache
    def load(url: str, key: str) -> str | None:
        """The data URL; None if the web address stays."""
        kind = source_of(url)
        if kind == "web" and url not in fetched:
            return None
        if kind == "web":
            data, media_type = _from_web(url, fetched[url], key)
        else:
            data, media_type = _decoded(url, key) if kind == "data" else _from_file(url, key, max_bytes)
        if len(data) > max_bytes:
            raise invalid(f"the {MEDIA_KEYS[key]} has more than engine.media_max_bytes={max_bytes} bytes")
        if key == "image_url":
            inspect(data)
        return _data_url(data, media_type)

    messages: list[Message] = [
        {**message, "content": content(message["content"])} if isinstance(message.get("content"), list) else message
        for message in request.messages
    ]
    return replace(request, messages=messages, turns=[content(turn) for turn in request.turns])


def _data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def _decoded(url: str, key: str) -> tuple[bytes, str]:
    """The bytes and the media type of a data URL."""
    head, _, body = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise invalid(f"the data URL of the {MEDIA_KEYS[key]} must be base64")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"the data URL of the {MEDIA_KEYS[key]} is not valid base64") from None
    return data, _image_type(data) or head[5:].partition(";")[0]


def _from_file(url: str, key: str, max_bytes: int | None = None) -> tuple[bytes, str]:
    """The bytes and the media type of a file. At most one byte more than `max_bytes` is read."""
    try:
        path = local_path(url)
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe may have no end
            raise invalid(f"{path} is not a file")
        with path.open("rb") as file:
            data = file.read(-1 if max_bytes is None else max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:  # an invalid URL, a home of an unknown user, a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise invalid(f"the {MEDIA_KEYS[key]} {url[:200]!r} cannot be read: {reason}") from None
    return data, _type_of(data, str(path), key, "")


def local_path(url: str) -> Path:
    """The path of a file:// URL, or of a text that is a path. Raises `ValueError` or `RuntimeError` for an invalid one."""
    return Path(unquote(urlsplit(url).path) if url.startswith("file://") else url).expanduser()


def _from_web(url: str, fetched: Fetched, key: str) -> tuple[bytes, str]:
    return fetched.data, _type_of(fetched.data, urlsplit(url).path, key, fetched.media_type)


def _type_of(data: bytes, path: str, key: str, declared: str) -> str:
    """The media type of a file. Raises `EngineError("invalid_input")` for an image in another format than the four."""
    if key == "image_url":
        if (found := _image_type(data)) is None:
            raise invalid(f"{path[:200]} is not a PNG, JPEG, GIF or WebP image")
        return found
    kind = MEDIA_KEYS[key]
    return declared if declared.startswith(f"{kind}/") else mimetypes.guess_type(path)[0] or f"{kind}/*"


def _image_type(data: bytes) -> str | None:
    """The media type by the file's first bytes; None if it is not PNG, JPEG, GIF or WebP."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((name for start, name in _STARTS if data.startswith(start)), None)
