"""Validates answers against `response_format`, whichever engine gave them, and asks again for those that do not match.

A grammar makes local engines keep to the format. Providers may ignore it, or support only a part of JSON Schema.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any

import orjson

from engines.errors import EngineError, Failure, invalid
from engines.params import GenerationParams, json_schema_of
from engines.types import DEFAULT_SCHEMA_RETRIES, Choice, Completion, Message, Request, answer, text_of

Generate = Callable[[Request], Awaitable[Completion]]

# Characters of an answer, and of the reason, that an error shows.
SHOWN = 200


class SchemaMismatch(EngineError):
    """An answer that does not match its format. `reason` is told to the model if the answer is asked for again."""

    def __init__(self, reason: str, said: str, retryable: bool) -> None:
        # With the beginning of the answer, which is kept nowhere else.
        shown = repr(said) if len(said) <= SHOWN else f"{said[:SHOWN]!r}…"
        super().__init__(
            "schema_mismatch", f"the answer is not in the format asked for: {reason} (it was {shown})", retryable=retryable
        )
        self.reason = reason


async def generate_validated(generate: Generate, request: Request) -> Completion:
    """Asks, and asks again for a wrong answer with the reason, up to `schema_retries` times; then fails: `schema_mismatch`.

    Of several choices, each wrong one is asked for again by itself. The completion has the usage of all tries. An answer
    that a reader has begun to see (`stream`) is not asked for again.
    """
    completion = await generate(request)
    for at in range(len(completion.choices)):
        tries = 0
        while error := schema_error(completion.choices[at], request.generation, tries):
            tries += 1
            seen = request.stream is not None and request.stream.begun
            if isinstance(error, SchemaMismatch) and error.retryable and not seen:
                again = await generate(_corrected(request, completion.choices[at].message, error.reason, f"{at}.{tries}"))
                again.accumulate(completion)
                for name in ("usage", "cost_usd", "attempts", "latency_s"):  # `again` has the sums now
                    setattr(completion, name, getattr(again, name))
                if again.error is None:
                    completion.choices[at] = again.choices[0]
                    completion.reasoning = again.reasoning if at == 0 else completion.reasoning
                    continue
                if again.error.retryable or again.error.type in ("cancelled", "engine_crash"):
                    return again
                error.retryable = False  # such as a conversation that is now too long; the first error is the reason
            return _failed(completion, error)
    return completion


def in_shape(completion: Completion, generation: GenerationParams) -> Completion:
    """The completion, or its error, if it cannot be asked for again."""
    error = first_schema_error(completion, generation, sys.maxsize)
    return completion if error is None else _failed(completion, error)


def first_schema_error(completion: Completion, generation: GenerationParams, tries: int) -> EngineError | None:
    """The error of the first choice that has one; see `schema_error`."""
    return next(filter(None, (schema_error(choice, generation, tries) for choice in completion.choices)), None)


def _failed(completion: Completion, error: EngineError) -> Completion:
    return dataclasses.replace(completion, choices=[], reasoning=None, error=Failure.of(error))


def schema_error(choice: Choice, generation: GenerationParams, tries: int) -> EngineError | None:
    """The error of an answer that was asked for again `tries` times already; None if it matches its format.

    Tool calls and refusals are not checked. A truncated answer is not retryable: it would be truncated again.
    """
    wanted = generation.response_format
    if wanted is None or wanted["type"] not in ("json_schema", "json_object"):
        return None
    if choice.message.get("tool_calls") or choice.finish_reason == "content_filter":
        return None
    text, cut = text_of(choice.message) or "", choice.finish_reason == "length"
    try:
        reason = _reason(text, wanted)
    except EngineError as error:
        return error
    if reason is None:
        return None
    if cut:
        limit = f"generation.max_tokens={generation.max_tokens}" if generation.max_tokens else "the limit of its tokens"
        reason = f"it was cut off by {limit}"
    retries = DEFAULT_SCHEMA_RETRIES if generation.schema_retries is None else generation.schema_retries
    return SchemaMismatch(reason, text, retryable=tries < retries and not cut)


def _reason(text: str, wanted: Mapping[str, Any]) -> str | None:
    """Why a text does not match `response_format`, or None. Raises `EngineError` for an invalid schema."""
    try:
        value = orjson.loads(text)
    except ValueError as error:
        return f"it is not JSON: {error}"
    if wanted["type"] == "json_object":
        return None if isinstance(value, dict) else "it is JSON, but not an object"
    try:
        return _errors(_as_json(json_schema_of(wanted)))(value)
    except EngineError:
        raise
    except RecursionError:
        return "it is nested too deeply"
    except Exception as error:  # the schema comes from a row: a dangling reference, an invalid pattern
        raise invalid(f"the schema in response_format cannot be used: {_printable(error)}") from None


def _as_json(schema: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(schema)
    except TypeError:  # keys that are numbers, or numbers beyond 64 bits
        return json.dumps(schema).encode()


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raises `EngineError("invalid_input")` for an invalid JSON schema."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise invalid(f"the schema in response_format is invalid: {_describe(error)}") from None
    except Exception as error:  # a value that only looks like a schema
        raise invalid(f"the schema in response_format is invalid: {_printable(error)}") from None


@lru_cache(maxsize=256)
def _errors(schema: bytes) -> Callable[[Any], str | None]:
    """A function that returns what is wrong with a value, or None. Cached: most rows of a dataset share a schema."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    parsed = json.loads(schema)  # unlike orjson, reads numbers of any size
    check_schema(parsed)
    # An empty registry: the library's default would fetch references from the network.
    validator = validator_for(parsed, default=Draft202012Validator)(parsed, registry=Registry())

    def first(value: Any) -> str | None:
        error = best_match(validator.iter_errors(value))
        return None if error is None else _describe(error)

    return first


def _describe(error: Any) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
    return _printable(f"{path.lstrip('.')}: {error.message}" if path else error.message)


def _printable(text: object) -> str:
    """A model's words for an error message: one line, short, without control characters."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


def _corrected(request: Request, said: Message, reason: str, name: str) -> Request:
    """The request with the wrong answer and the reason appended; `name` distinguishes it from others of its row."""
    asks = f"That is not in the format asked for: {reason}. Answer again, with JSON of that format and nothing else."
    messages: list[Message] = [
        *request.messages,
        answer(text_of(said) or "(nothing)"),  # providers refuse an empty message
        {"role": "user", "content": asks},
    ]
    return dataclasses.replace(
        request,
        messages=messages,
        generation=dataclasses.replace(request.generation, n=None),
        key=f"{request.key}-{name}" if request.key else "",
    )
