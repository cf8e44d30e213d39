"""Wire formats: the forms of requests and answers of provider APIs, and the parts that all of them share.

A wire format is a module with the members of `WireFormat`: `openai_chat`, `anthropic_messages` and `bedrock_converse`. The
key `wire` of a provider names one of them (`WIRE_PATHS` in provider.py). `RemoteEngine` sends the first two over HTTP
(`WIRE_FORMATS` in engine.py), and `BedrockEngine` sends the third through boto3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol

from engines.errors import EngineError
from engines.remote.provider import Provider
from engines.text import counted
from engines.types import Choice, Completion, Delta, FinishReason, Message, Request
from engines.usage import Usage

# The ends of an answer. `server` and `bad_response` mean that the answer is broken: they become a retryable error.
Ending = FinishReason | Literal["server", "bad_response"]


class StreamAccumulator(Protocol):
    """Joins the events of a streamed answer to the payload that the API gives without streaming."""

    @property
    def finished(self) -> bool:
        """True once the API has said why the answer ended."""
        ...

    def add(self, event: dict[str, Any]) -> Iterable[Delta]:
        """Takes one event and gives the text in it."""
        ...

    def payload(self) -> dict[str, Any]:
        """The answer so far, in the form of an answer that is not streamed."""
        ...


class WireFormat(Protocol):
    """The conversions of one API's requests and answers. The functions have no state."""

    STREAM: dict[str, Any]  # body fields that ask for a stream; empty if this format does not stream
    ROW_FIELDS: frozenset[str] | None  # the fields of a row's own body that the API takes; None: all
    FINISH_REASONS: dict[str, Ending]  # every reason the API documents; any other one is an error

    def body(self, request: Request, model: str | None, provider: Provider) -> dict[str, Any]:
        """The body of a request. Raises `EngineError("invalid_input")` for what this API cannot take."""
        ...

    def completion(self, payload: dict[str, Any], provider: Provider) -> Completion:
        """Reads an answer; see `read_answer`. Raises `EngineError` for a broken or filtered one."""
        ...

    def usage(self, payload: dict[str, Any]) -> Usage:
        """The token counts of an answer; `known=False` if it has none."""
        ...

    def accumulator(self) -> StreamAccumulator | None:
        """Joins the events of one stream; None if this format does not stream."""
        ...


def finish_reason(found: Any, table: Mapping[str, Ending], provider: Provider | None) -> FinishReason:
    """Our finish reason for the API's. The provider's own table (`provider.finish_reasons`) comes before the format's.

    Raises a retryable `EngineError` for an answer that the server broke off. An unknown reason, or none at all (`null` in a
    provider's table), is an error that is not retryable: most servers that give it once give it for every answer, and each
    try is paid.
    """
    name = str(found)[:100] if found not in (None, "") else "null"
    own: Mapping[str, Any] = provider.finish_reasons if provider is not None else {}
    for key in (name, name.partition(":")[0]):  # Gemini: "content_filter: PROHIBITED_CONTENT"
        ending: Ending | None = own.get(key) or table.get(key)
        if ending == "server":
            raise EngineError("server", f"the server broke off the answer ({name})", status=200, retryable=True)
        if ending == "bad_response":
            raise EngineError("bad_response", f"the answer is broken ({name})", status=200, retryable=True)
        if ending is not None:
            return ending
    if name == "null":  # the command line takes no `null` within braces
        said, accepts = "no finish reason", "engine.provider.finish_reasons.null=stop"
    else:
        said = f"the unknown finish reason {name!r}"
        accepts = f"engine.provider.finish_reasons={{{name.partition(':')[0]}: stop}}"
    raise EngineError("bad_response", f"the answer has {said}; {accepts} accepts it", status=200)


def complete(choices: list[Choice], usage: Usage, model: Any, reasoning: str | None) -> Completion:
    """A completion of these choices. Raises `EngineError("content_filter")` if a filter left no text in any of them.

    If only some choices are filtered, they stay, with the finish reason `content_filter`.
    """
    if all(c.finish_reason == "content_filter" and not c.message.get("content") for c in choices):
        refusal = next((text for c in choices if (text := c.message.get("refusal"))), None)
        said = f"the model refused: {str(refusal)[:500]}" if refusal else "the provider's filter removed the answer"
        raise EngineError("content_filter", said)
    return Completion(choices, usage, model if isinstance(model, str) else None, reasoning=reasoning)


def read_answer(wire_format: WireFormat, payload: dict[str, Any], provider: Provider, n: int | None = None) -> Completion:
    """The completion in an answer with `n` choices. Raises `EngineError` with the `usage` that has to be paid.

    Fewer than `n` choices are an error that is not retryable: a provider that ignores `n` would be paid for each try.
    """
    try:
        completion = wire_format.completion(payload, provider)
        if len(completion.choices) < (n or 1):
            said = f"the provider gave {counted(len(completion.choices), 'choice')} where generation.n={n} were asked for"
            raise EngineError("bad_response", said, status=200)
    except EngineError as error:
        error.usage = wire_format.usage(payload)
        raise
    return completion


def with_thinking(message: Message, blocks: list[dict[str, Any]]) -> Message:
    """The message with its `thinking_blocks`, which the next request must repeat unchanged (see `content`)."""
    if blocks:
        message["thinking_blocks"] = blocks  # type: ignore[typeddict-unknown-key]
    return message


_NUMBERS = (int, float)  # not bool


def is_count(value: Any) -> bool:
    """True if a value is a number of tokens."""
    return type(value) in _NUMBERS and 0 <= value < 2**62


def count(value: Any) -> int:
    """A number of tokens; 0 for any other value."""
    return int(value) if is_count(value) else 0


def bad_response(what: str, payload: Any) -> EngineError:
    """The retryable error of an answer with status 200 that cannot be read."""
    return EngineError("bad_response", f"{what}: {str(payload)[:200]}", status=200, retryable=True)
