"""Parses the events of a streamed answer. Text is passed on at once; the wire's accumulator builds the whole answer."""

from __future__ import annotations

from typing import Any

import orjson

from engines.remote.wire import StreamAccumulator, bad_response
from engines.types import Stream


class SSEParser:
    """Reads the bytes of one answer. Raises `EngineError("bad_response")` for an event that cannot be read and for an
    answer that breaks off."""

    def __init__(self, accumulator: StreamAccumulator, stream: Stream) -> None:
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
                    self.stream.put(delta)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise bad_response("an event cannot be read", data[:200]) from None

    def payload(self) -> dict[str, Any]:
        """The whole answer; or the error that came in its place, with the usage that was told before it."""
        if self.error is not None:
            told = self.accumulator.payload().get("usage")
            return {"usage": told, **self.error} if told else self.error
        if not (self.accumulator.finished or self.ended):
            raise bad_response("the answer broke off", self.rest[:200])
        return self.accumulator.payload()
