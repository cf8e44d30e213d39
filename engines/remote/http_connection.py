"""One connection of HTTP/1.1, for one request at a time.

aiohttp's own client makes a parser, a queue and a timer for each request, and wakes its task for each part of an answer.
Here one future gets the whole answer. The parser is made anew for each request: that is cheap, and what a
server sent after its last answer cannot become the beginning of the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import httpx
import numpy as np
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpResponseParser, RawResponseMessage, StreamWriter
from aiohttp.streams import StreamReader

# A longer answer is refused: with hundreds in flight it would fill the memory of a worker. Counted after decompression.
MAX_BODY_BYTES = 64 << 20
# The longest line of a response's head; some gateways send long headers.
MAX_HEAD_LINE = 1 << 16
# A body smaller than this is copied behind its head, so that both are sent with one system call.
JOINED_BYTES = 1 << 16
# Members of a gzip body. Servers make one, or a few.
MOST_MEMBERS = 1000
# If so much of a body is still to come, it is read into one buffer, past the parser, which would copy each piece.
BUFFERED_BYTES = 1 << 18
# gzip or zlib: it finds the form by itself.
WBITS = 32 + zlib.MAX_WBITS

# Gets the pieces of a body as they arrive.
Feed = Callable[[bytes], None]


@dataclass(slots=True)
class Reply:
    """A whole response; the names in `headers` are matched in any case. `content` is decompressed.

    It may be a `memoryview` if the status is 2xx.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes | memoryview


class HTTPConnection(ResponseHandler):
    """A connection of aiohttp's connector, which uses it as a `ResponseHandler` to open a tunnel through a proxy."""

    lease: aiohttp.connector.Connection  # holds the connection's place in the connector
    idle_since = 0.0  # in the time of the loop

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.reader: HttpResponseParser | None = None
        self.answer: asyncio.Future[Reply] | None = None  # to the request under way
        self.feed: Feed | None = None
        self.head: RawResponseMessage | None = None  # of the answer under way
        self.body: AnswerBody | None = None
        self.begun = False  # a request was sent
        self.early = b""  # what came before that
        self.ended = False  # the server has ended its side
        self.arrivals: select.poll | None = None

    @property
    def reusable(self) -> bool:
        """True if another request may be sent. `force_close` ends that."""
        return not self.should_close and self.is_connected()

    @property
    def quiet(self) -> bool:
        """True if nothing has arrived that the loop has not read yet: an end, or an answer that no request asked for."""
        if self.arrivals is None:
            assert self.transport is not None
            self.arrivals = select.poll()
            self.arrivals.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not self.arrivals.poll(0)

    async def exchange(self, method: str, head: bytes, content: bytes, feed: Feed | None) -> Reply:
        """Sends a request and reads the whole answer. Raises aiohttp's exceptions, `OSError` and what `feed` raises.

        `head` lacks the length of the body and the empty line. Does not wait until the request is sent: a server may answer
        before it has all of it. After an exception, the caller must close the connection.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            raise aiohttp.ClientConnectionResetError("the connection was closed before the request was sent")
        self.reader = self._new_reader(method != "HEAD")
        self.answer, self.feed, self.head, self.body, self.begun = self._loop.create_future(), feed, None, None, True
        if content or method not in ("GET", "HEAD"):
            head += b"Content-Length: %d\r\n" % len(content)
        if len(content) < JOINED_BYTES:
            transport.write(b"%b\r\n%b" % (head, content))
        else:
            transport.write(head + b"\r\n")
            transport.write(content)
        sending = self._start_read_timeout()
        if self.early:
            early, self.early = self.early, b""
            self.data_received(early)
        try:
            reply = await self.answer
        finally:
            self.answer = self.feed = self.head = self.body = None
            if self._read_timeout:
                self._drop_timeout()
            if sending is not None:
                sending.cancel()
        # A server that refuses a request may never read the rest of it. TLS does not tell how much of that is left.
        hidden = reply.status >= 300 and len(content) >= JOINED_BYTES and transport.get_extra_info("sslcontext")
        if self.unsent or hidden:
            self.abort()
        elif method == "HEAD":
            self.force_close()
        return reply

    @property
    def unsent(self) -> int:
        """The number of bytes of the request that the kernel has not taken yet."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def end(self) -> None:
        """Closes the connection and gives its place back."""
        self.lease.close()

    def close(self) -> None:
        """Unsent bytes are dropped: a server that reads none of them would keep the connection open."""
        if self.unsent:
            self.abort()
        super().close()

    def fail(self, error: BaseException) -> None:
        """Ends the request under way with an error."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)

    def _new_reader(self, with_body: bool) -> HttpResponseParser:
        return HttpResponseParser(
            self,
            self._loop,
            MAX_BODY_BYTES,  # a body is never held back; `_take` bounds it
            payload_exception=aiohttp.ClientPayloadError,
            response_with_body=with_body,
            read_until_eof=True,
            auto_decompress=False,
            max_line_size=MAX_HEAD_LINE,
            max_field_size=MAX_HEAD_LINE,
        )

    def _start_read_timeout(self) -> asyncio.Task[None] | None:
        """For a request that is not sent yet, returns the task that starts the read timeout when it is."""
        if not self._read_timeout:
            return None
        if self.unsent:
            return asyncio.ensure_future(self._start_timeout_when_sent())
        self.start_timeout()
        return None

    async def _start_timeout_when_sent(self) -> None:
        with contextlib.suppress(OSError):  # the reader of the answer gets the error too
            await StreamWriter(self, self._loop).drain()
            self.start_timeout()

    # -- called by the transport --------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._parser is not None:  # the answer of a proxy to the connector
            super().data_received(data)
        elif not self.begun:
            self.early += data
        elif self.answer is None or self.answer.done() or self.reader is None:
            self.close()  # an answer that no request asked for; it must not answer the next one
        else:
            if self._read_timeout:
                self.start_timeout()
            try:
                self._parse(self.reader, data)
            except Exception as error:  # what is not HTTP, and what `feed` raises
                self.fail(error)

    def _parse(self, reader: HttpResponseParser, data: bytes) -> None:
        messages, upgraded, rest = reader.feed_data(data)
        for head, stream in messages:
            if 100 <= head.code < 200 and head.code != 101:  # such as 103, early hints
                continue
            if self.head is None:
                self.head = head
                self.body = AnswerBody(stream, head, self.feed)
            else:
                self.force_close()  # a second answer
        if upgraded or rest or (self.head is not None and self.head.should_close):
            self.force_close()
        self._take()

    def _take(self) -> None:
        """Takes what has arrived of the body, and gives the answer if it is whole."""
        if self.body is None:
            return
        if self.body.take():
            self.give(self.body.content)
        elif self.body.to_come >= BUFFERED_BYTES and self.transport is not None:
            self.transport.set_protocol(BodyBuffer(self, self.body))
            self.reader = None  # it is inside of this body

    def give(self, content: bytes | memoryview) -> None:
        """Gives the answer."""
        if self.answer is not None and not self.answer.done() and self.head is not None:
            self.answer.set_result(Reply(self.head.code, self.head.headers, content))

    def set_exception(self, exc: BaseException, *cause: Any, **more: Any) -> None:
        """The connection is lost, or the read timeout is over."""
        super().set_exception(exc, *cause, **more)
        self.fail(exc)

    def pause_reading(self) -> None:
        """The parser calls it for a body that nobody reads."""
        if self._parser is not None:
            super().pause_reading()

    def resume_reading(self, *args: Any, **keys: Any) -> None:
        """The parser calls it at the end of each body."""
        if self._parser is not None:
            super().resume_reading(*args, **keys)

    def eof_received(self) -> None:
        self.ended = True
        super().eof_received()
        if self.unsent:  # it reads no more: else the end is told when all is sent, which may be never
            self.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        if self.reader is not None and self.answer is not None and not self.answer.done():
            try:
                # Only the end of the connection tells that a body without a length is whole. A refusal is read even then.
                if not self.ended and self.head is not None and self.head.code < 300:
                    raise ConnectionResetError("the connection was lost")
                self.reader.feed_eof()
                self._take()  # a body without a length ends here
            except Exception as error:
                self.fail(aiohttp.ClientPayloadError(f"the answer is not complete: {error}"))
        self.reader = None
        super().connection_lost(exc)


class AnswerBody:
    """The body of one answer, as it arrives."""

    def __init__(self, stream: StreamReader, head: RawResponseMessage, feed: Feed | None) -> None:
        self.stream = stream
        self.feed = feed if feed is not None and is_stream(head.code, head.headers) else None
        self.inflate = Inflater(head.compression) if head.compression else None
        self.head = head
        self.pieces: list[bytes] = []
        self.size = 0

    @property
    def to_come(self) -> int:
        """The bytes that are still to come; 0 if that is not known, or if they need more work than reading.

        Raises `httpx.DecodingError` for a body that is too long.
        """
        if self.feed is not None or self.inflate is not None or self.head.chunked or not 200 <= self.head.code < 300:
            return 0
        length = int(self.head.headers.get("content-length", 0))
        if length > MAX_BODY_BYTES:
            raise too_long()
        return max(0, length - self.stream.total_bytes)

    @property
    def content(self) -> bytes:
        return self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)

    def take(self) -> bool:
        """Takes what has arrived. Returns True at the end. Raises `httpx.DecodingError`."""
        ended = self.stream.is_eof()
        if self.stream.total_bytes > MAX_BODY_BYTES:
            raise too_long()
        if not ended and self.feed is None:
            return False
        piece = self.stream.read_nowait()
        if self.inflate is not None:
            piece = self.inflate(piece, MAX_BODY_BYTES - self.size, ended)
            self.size += len(piece)
        if piece and self.feed is not None:
            self.feed(piece)
        elif piece:
            self.pieces.append(piece)
        return ended


class BodyBuffer(asyncio.BufferedProtocol):
    """Takes the place of a connection while the rest of a body, whose length is known, is read."""

    def __init__(self, connection: HTTPConnection, body: AnswerBody) -> None:
        self.connection = connection
        self.left, arrived = body.to_come, body.stream.read_nowait()
        # Unlike a bytearray, not filled with zeros first. One byte more than the body: it shows if another answer follows.
        self.content = np.empty(len(arrived) + self.left + 1, np.uint8).data
        self.content[: len(arrived)] = arrived
        self.room = self.content[len(arrived) :]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.room

    def buffer_updated(self, nbytes: int) -> None:
        self.room, self.left = self.room[nbytes:], self.left - nbytes
        if self.connection._read_timeout:
            self.connection.start_timeout()
        if self.left <= 0 and self.connection.transport is not None:
            if self.left < 0:
                self.connection.force_close()
            self.connection.transport.set_protocol(self.connection)
            self.connection.give(self.content[:-1])

    def pause_writing(self) -> None:
        self.connection.pause_writing()

    def resume_writing(self) -> None:
        self.connection.resume_writing()

    def eof_received(self) -> None:
        self.connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.fail(aiohttp.ClientPayloadError(f"the answer is not complete: {self.left} bytes did not come"))
        self.connection.connection_lost(exc)


class Inflater:
    """Decompresses a body. We ask for gzip only; zlib's own form is understood too."""

    def __init__(self, encoding: str) -> None:
        if encoding not in ("gzip", "deflate"):
            raise httpx.DecodingError(f"the answer has the content-encoding {encoding}, which was not asked for")
        self.made = zlib.decompressobj(wbits=WBITS)
        self.begun = False
        self.members = 0

    def __call__(self, data: bytes, room: int, last: bool) -> bytes:
        """The next piece. Raises `httpx.DecodingError` if it is longer than `room`, or if the last one is not the end."""
        self.begun |= bool(data)
        pieces: list[bytes] = []
        while data:
            if self.made.eof:  # gzip may have several members, and zeros at the end
                if not (data := data.lstrip(b"\0")):
                    break
                self.made = zlib.decompressobj(wbits=WBITS)
                self.members += 1
                if self.members > MOST_MEMBERS:  # each one costs a copy of what is left
                    raise httpx.DecodingError(f"the compressed answer has more than {MOST_MEMBERS:,} parts")
            try:
                pieces.append(self.made.decompress(data, room + 1))
            except zlib.error as error:
                raise httpx.DecodingError(str(error)) from None
            if (room := room - len(pieces[-1])) < 0:
                raise too_long()
            data = self.made.unused_data
        if last and self.begun and not self.made.eof:
            raise httpx.DecodingError("the compressed answer has no end")
        return b"".join(pieces)


def is_stream(status: int, headers: Mapping[str, str]) -> bool:
    """True if the body of a response is a stream of events."""
    return status < 300 and headers.get("content-type", "").startswith("text/event-stream")


class TooLong(httpx.DecodingError):
    """A body is longer than `MAX_BODY_BYTES`. The same request would get such a body again."""


def too_long() -> TooLong:
    return TooLong(f"the answer is longer than {MAX_BODY_BYTES >> 20} MiB: ask for less, such as fewer log probabilities")
