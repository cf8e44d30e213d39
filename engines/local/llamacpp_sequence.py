"""The state of the llama.cpp scheduler: `Sequence` is one answer being generated, `Slot` is one KV cache."""

from __future__ import annotations

import codecs
import contextlib
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from engines.local.llamacpp_sampling import Sampler
from engines.text import safe_prefix_length
from engines.types import Delta, FinishReason, Stream


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer. The caller fills the first group of fields, the scheduler the second."""

    prompt: list[int]
    limit: int  # tokens it may generate
    sampler: Sampler
    stop: list[str]
    stop_ids: frozenset[int]
    logprobs: int | None
    index: int = 0  # among the answers of one request
    stream: Stream | None = None
    marks: list[str] = field(default_factory=list)  # the stream holds back text from the first character of any of these
    sent: int = 0  # characters that went into the stream
    future: Future[Sequence] = field(default_factory=Future)

    cached: int = 0  # prompt tokens that were not evaluated, because a cache had them
    last: int = -1  # the token sampled last; -1 while the prompt is evaluated
    output: int = 0  # tokens generated
    text: str = ""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    entries: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's `logprobs.content`
    reason: FinishReason = "stop"

    @property
    def in_prompt(self) -> bool:
        """The prompt is not evaluated to its end."""
        return self.last < 0

    def append(self, piece: bytes) -> bool:
        """Appends a token's bytes to the text. True if a stop text is complete; the text then ends before it."""
        before = len(self.text)
        self.text += self.decoder.decode(piece)
        if not self.stop:
            return False
        # A stop text may begin in an earlier token.
        found = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop]
        places = [at for at in found if at >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def send(self, stream: Stream) -> None:
        """Sends the text that no later token can take back. The rest comes with the completed answer."""
        end = safe_prefix_length(self.text, self.marks)
        if end > self.sent:
            stream.put(Delta(self.text[self.sent : end], index=self.index))
            self.sent = end

    def finish(self) -> None:
        """Hands the answer to the caller, unless the caller has cancelled."""
        with contextlib.suppress(Exception):
            self.future.set_result(self)

    def fail(self, error: BaseException) -> None:
        """Raises `error` in the caller, unless the caller has cancelled."""
        with contextlib.suppress(Exception):
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class Slot:
    """One of llama.cpp's sequences. Its KV cache keeps the tokens of the last answer until another one needs the slot."""

    id: int
    tokens: list[int] = field(default_factory=list)  # in the KV cache, by position
    running: Sequence | None = None
    waits: Wait | None = None
    used: int = 0  # the scheduler's step of its last use


@dataclass(frozen=True, slots=True)
class Wait:
    """A slot waits until `donor` has evaluated `count` tokens of the prompt of `owner`, and copies them."""

    donor: Slot
    owner: Sequence
    count: int
