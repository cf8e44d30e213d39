"""Parses the events of a streamed answer. Text is passed on at once; an accumulator builds the whole answer."""

from __future__ import annotations

from typing import Any

import orjson

from engines.remote.wire_format import StreamAccumulator, bad_response
from engines.types import Stream


class SSEParser:
    """Reads the bytes of one answer; `stream` is None if nobody reads the pieces.

    Raises `EngineError("bad_response")` for an event that cannot be read and for an answer that breaks off.
    """

    def __init__(self, accumulator: StreamAccumulator, stream: Stream | None) -> None:
        self.accumulator, self.stream = accumulator, stream
        self.rest = b""
        self.error: dict[str, Any] | None = None
        self.fed = self.ended = False

    def feed(self, piece: bytes) -> None:
        self.fed = True
        *lines, self.rest = (self.rest + piece).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == line.strip() or not data:  # an event's name, a comment or an empty line
                continue
            if data == b"[DONE]":
                self.ended = True
                continue
            try:
                event = orjson.loads(data)
                if event.get("error"):
                    self.error = event
                    continue
                for delta in self.accumulator.add(event):
                    if self.stream is not None:
                        self.stream.put(delta)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise bad_response("an event cannot be read", data[:200]) from None

    @property
    def broken_off(self) -> bool:
        """True if an error came after the beginning of the answer. The usage that was told before it is not the whole."""
        so_far = self.accumulator.payload()
        begun = so_far.get("choices") or so_far.get("content")
        return self.error is not None and bool(begun) and not self.accumulator.finished

    def payload(self) -> dict[str, Any]:
        """The whole answer; or the error that came in its place, with the usage that was reported before it."""
        if self.error is not None:
            told = None if self.broken_off else self.accumulator.payload().get("usage")
            return {"usage": told, **self.error} if told else self.error
        if not (self.accumulator.finished or self.ended):
            raise bad_response("the answer broke off", self.rest[:200])
        return self.accumulator.payload()
