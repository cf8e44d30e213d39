"""Validates the answers of all engines against `response_format`, and asks again for those that do not match.

A grammar makes local engines keep to the format. Providers may ignore it, or support only a part of JSON Schema.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import orjson

from engines.errors import EngineError, Failure, invalid
from engines.params import GenerationParams, json_schema_of
from engines.text import fenced_json, split_thought
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


async def generate_validated(generate: Generate, request: Request, null_for_absent: bool = False) -> Completion:
    """Asks, and asks again for a wrong answer with the reason, up to `schema_retries` times; then fails: `schema_mismatch`.

    `null_for_absent`: the engine's model writes null for a property that is absent; see `schema_error`.
    Of several choices, each wrong one is asked for again by itself. The completion has the usage of all tries. An answer
    that a reader has begun to see (`stream`) is not asked for again.
    """
    completion = await generate(request)
    for at in range(len(completion.choices)):
        tries = 0
        seen = request.stream is not None and request.stream.begun
        while error := schema_error(completion.choices[at], request.generation, tries, null_for_absent, keep_text=seen):
            tries += 1
            # A correction would be a new answer, which does not continue the given beginning.
            final = seen or request.continue_answer
            if isinstance(error, SchemaMismatch) and error.retryable and not final:
                again = await generate(_corrected(request, completion.choices[at].message, error.reason, f"{at}.{tries}"))
                again.accumulate(completion)
                for name in ("usage", "cost_usd", "attempts", "latency_s", "queued_s"):  # `again` has the sums now
                    setattr(completion, name, getattr(again, name))
                if again.error is None:
                    completion.choices[at] = again.choices[0]
                    completion.reasoning = again.reasoning if at == 0 else completion.reasoning
                    continue
                if again.error.retryable or again.error.type in ("cancelled", "engine_crash"):
                    return again
                error.retryable = False  # such as a conversation that is now too long; the first error is the reason
            return _failed(completion, error)
    _move_thought(completion)
    return completion


def checked_once(completion: Completion, generation: GenerationParams, null_for_absent: bool = False) -> Completion:
    """The completion if it matches its format, else one with the error. For answers that cannot be asked for again."""
    error = first_schema_error(completion, generation, sys.maxsize, null_for_absent)
    return completion if error is None else _failed(completion, error)


def first_schema_error(
    completion: Completion, generation: GenerationParams, tries: int, null_for_absent: bool = False
) -> EngineError | None:
    """The error of the first choice that has one; see `schema_error`."""
    for choice in completion.choices:
        if error := schema_error(choice, generation, tries, null_for_absent):
            return error
    _move_thought(completion)
    return None


def _failed(completion: Completion, error: EngineError) -> Completion:
    return dataclasses.replace(completion, choices=[], reasoning=None, error=Failure.of(error))


def _move_thought(completion: Completion) -> None:
    """Reasoning that was taken out of the first choice's text is the completion's reasoning."""
    if completion.choices and not completion.reasoning:
        completion.reasoning = completion.choices[0].message.get("reasoning_content") or None  # type: ignore[assignment]


def schema_error(
    choice: Choice, generation: GenerationParams, tries: int, null_for_absent: bool = False, keep_text: bool = False
) -> EngineError | None:
    """The error of an answer that was asked for again `tries` times already; None if it matches its format.

    JSON in a code fence or after reasoning in tags is taken out first. With `null_for_absent`, properties that may not be
    null are taken out if they are. The JSON that matches becomes the choice's text, unless `keep_text`. Tool calls and
    refusals are not checked. A truncated answer is not retryable: it would be truncated again.
    """
    wanted = generation.response_format
    if wanted is None or wanted["type"] not in ("json_schema", "json_object"):
        return None
    if choice.message.get("tool_calls") or choice.finish_reason == "content_filter":
        return None
    text, cut = text_of(choice.message) or "", choice.finish_reason == "length"
    try:
        reason, found, thought = _judged(text, wanted, null_for_absent)
    except EngineError as error:
        return error
    if reason is None:
        if found != text and not keep_text:
            more = {"reasoning_content": thought} if thought and "reasoning_content" not in choice.message else {}
            choice.message = {**choice.message, "content": found, **more}  # type: ignore[typeddict-item]
        return None
    if cut:
        limit = f"generation.max_tokens={generation.max_tokens}" if generation.max_tokens else "the limit of its tokens"
        reason = f"it was cut off by {limit}"
    retries = DEFAULT_SCHEMA_RETRIES if generation.schema_retries is None else generation.schema_retries
    return SchemaMismatch(reason, text, retryable=tries < retries and not cut)


def _judged(text: str, wanted: Mapping[str, Any], null_for_absent: bool) -> tuple[str | None, str, str]:
    """The reason why a text does not match `response_format` (None: it matches), the JSON in it, and the reasoning before.

    The reason is that of the first JSON in the text. Raises `EngineError` for an invalid schema.
    """
    not_json, wrong = "", None
    for thought, candidate in _candidates(text):
        try:
            value = orjson.loads(candidate)
        except ValueError as error:
            not_json = not_json or f"it is not JSON: {error}"
            continue
        reason, found = _mismatch(value, candidate, wanted, null_for_absent)
        if reason is None:
            return None, found, thought
        wrong = wrong or reason
    return wrong or not_json, text, ""


def _candidates(text: str) -> Iterator[tuple[str, str]]:
    """The parts of an answer that may be its JSON, each with the reasoning before it: all of it; what follows the
    reasoning; and code blocks, of which a later one corrects an earlier one.

    A block inside the reasoning is a draft. One that ends behind it has a text like `</think>` in its JSON.
    """
    yield "", text
    thought, start = split_thought(text)
    if start:
        yield thought, text[start:].strip()
    for begin, end in fenced_json(text):
        if end > start:
            yield thought if begin >= start else "", text[begin:end]


def _mismatch(value: Any, text: str, wanted: Mapping[str, Any], null_for_absent: bool) -> tuple[str | None, str]:
    """The reason why a JSON value does not match `response_format` (None: it matches), and its text without the nulls."""
    if wanted["type"] == "json_object":
        return (None if isinstance(value, dict) else "it is JSON, but not an object"), text
    try:
        errors = _errors(_as_json(json_schema_of(wanted)))
        reason, nulls = errors(value)
        if reason is not None and nulls and null_for_absent:
            value = json.loads(text)  # unlike orjson, keeps numbers of any size
            for *above, name in nulls:
                del functools.reduce(operator.getitem, above, value)[name]
            if errors(value)[0] is None:
                return None, json.dumps(value, ensure_ascii=False)
        return reason, text
    except EngineError:
        raise
    except RecursionError:
        return "it is nested too deeply", text
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
def _errors(schema: bytes) -> Callable[[Any], tuple[str | None, list[list[Any]]]]:
    """A function that returns what is wrong with a value (None: nothing), and the paths of the nulls that are wrong.

    Cached: most rows of a dataset share a schema.
    """
    from jsonschema.exceptions import best_match
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    from engines import schema_patterns

    parsed = json.loads(schema)  # unlike orjson, reads numbers of any size
    check_schema(parsed)
    if b'"unevaluatedProperties"' in schema and b'"patternProperties"' in schema:  # the library's matching has no limit
        raise invalid("the schema in response_format has patternProperties beside unevaluatedProperties: use one of them")
    # An empty registry: the library's default would fetch references from the network.
    bounded = schema_patterns.bounded(validator_for(parsed, default=Draft202012Validator))
    validator = bounded(parsed, registry=Registry())

    def found(value: Any) -> tuple[str | None, list[list[Any]]]:
        schema_patterns.start()
        errors = list(validator.iter_errors(value))
        if not errors:
            return None, []
        return _describe(best_match(errors)), [list(path) for path in dict.fromkeys(_null_properties(errors))]

    return found


def _null_properties(errors: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """The paths of properties whose value is null, where the schema does not allow it."""
    for error in errors:
        if error.instance is None and error.absolute_path and isinstance(error.absolute_path[-1], str):
            yield tuple(error.absolute_path)
        yield from _null_properties(error.context)


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
