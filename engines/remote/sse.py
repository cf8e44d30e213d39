"""An answer that comes as server-sent events: its pieces go on as they come, and the wire joins them to the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from engines.remote.openai_chat import bad_response
from engines.types import Delta, Stream


class StreamAccumulator(Protocol):
    """A wire's half: `add` takes an event and tells the text in it, `payload` is then what a plain answer would be."""

    @property
    def finished(self) -> bool: ...

    def add(self, event: dict[str, Any]) -> Iterable[Delta]: ...

    def payload(self) -> dict[str, Any]: ...


class SSEParser:
    """Raises `EngineError("bad_response")` for what is no event, and for an answer that breaks off."""

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
            if data == line.strip() or not data:  # an event's name, a comment, the end of an event
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
        """The whole answer, or the error that came in its place."""
        if self.error is not None:
            return self.error
        if not (self.accumulator.finished or self.ended):
            raise bad_response("the answer broke off", self.rest[:200])
        return self.accumulator.payload()
