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
    """One answer, or one text whose log likelihood is wanted (`scored`).

    The caller fills the first group of fields, the scheduler the second.
    """

    prompt: list[int]
    limit: int = 0  # tokens it may generate
    sampler: Sampler | None = None  # None: it generates nothing
    stop: list[str] = field(default_factory=list)
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    scored: list[int] = field(default_factory=list)  # the tokens of prompt and completion; `prompt` is all but the last
    score_from: int = 0  # the place of the completion's first token
    index: int = 0  # among the answers of one request
    stream: Stream | None = None
    marks: list[str] = field(default_factory=list)  # the stream holds back text from the first character of any of these
    sent: int = 0  # characters that went into the stream
    future: Future[Sequence] = field(default_factory=Future)

    started: float = 0.0  # `time.perf_counter()` when a slot took it
    cached: int = 0  # prompt tokens that were not evaluated, because a cache had them
    last: int = -1  # the token sampled last; -1 while the prompt is evaluated
    output: int = 0  # tokens generated
    text: str = ""
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    entries: list[dict[str, Any]] = field(default_factory=list)  # OpenAI's `logprobs.content`
    reason: FinishReason = "stop"
    scores: list[float] = field(default_factory=list)  # the log probabilities of the completion's tokens
    guesses: Guesses | None = None  # None: no token was guessed yet

    @property
    def in_prompt(self) -> bool:
        """The prompt is not evaluated to its end."""
        return self.last < 0

    @property
    def reusable(self) -> int:
        """The number of prompt tokens that may come from a cache.

        The last two are evaluated: the last one gives the logits, and no token is decoded alone (see
        `llamacpp_scheduler`). So are those whose logits are wanted.
        """
        last = len(self.prompt) - 2
        return max(0, min(last, self.score_from - 1) if self.scored else last)

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


@dataclass(slots=True)
class Guesses:
    """The state of speculative decoding of one answer; see `llamacpp_speculation`."""

    size: int  # the number of tokens to guess next
    resumes: int = 0  # until the answer has so many tokens, nothing is guessed
    failures: int = 0  # guesses in a row that were mostly wrong
    followers: dict[tuple[int, ...], int] = field(default_factory=dict)  # the place after the last occurrence of tokens
    indexed: int = 0  # tokens of prompt and answer that are in `followers`


@dataclass(frozen=True, slots=True)
class Wait:
    """A slot waits until `donor` has evaluated `count` tokens of the prompt of `owner`, and copies them."""

    donor: Slot
    owner: Sequence
    count: int
