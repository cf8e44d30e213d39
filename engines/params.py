"""Generation parameters and their checks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import ErrorCode, invalid, nearest
from engines.tasks import refused_parameter
from engines.validation import SHOWN, Check, Refused, is_whole, number, text, whole


@dataclass(frozen=True)
class GenerationParams:
    """The parameters of one answer. `None` leaves the choice to the engine; local engines then decode greedily."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: int | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None  # token id (as text, as in OpenAI's API) -> bias added to its logit
    logprobs: int | None = None  # alternatives per generated token; 0 gives the chosen token only
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    dimensions: int | None = None  # of task=embed: the first numbers of each embedding, normalised again (Matryoshka)
    schema_retries: int | None = None  # how often to ask again for an answer that does not match response_format

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> GenerationParams:
        """Checked parameters from plain values. Raises `EngineError("invalid_input")` naming the parameter."""
        return cls().override(values)

    def override(self, values: Mapping[str, Any]) -> GenerationParams:
        """These parameters, replaced by `values` where given; None leaves a parameter as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        if not given:
            return self
        return dataclasses.replace(self, **{name: _check_param(name, value) for name, value in given.items()})

    def for_task(self, task: str) -> GenerationParams:
        """The parameters of a run, without those that have no meaning for the task of a row."""
        unset = {name: None for name in self.values if refused_parameter(task, (name,))}
        return dataclasses.replace(self, **unset) if unset else self

    @functools.cached_property
    def values(self) -> dict[str, Any]:
        """The parameters that are set, in declaration order. Computed once: most rows share one object."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def given(self) -> dict[str, Any]:
        """Only the parameters that are set and shape an answer, in declaration order."""
        return {name: value for name, value in self.values.items() if name != "schema_retries"}


GENERATION_FIELDS = tuple(f.name for f in dataclasses.fields(GenerationParams))
RESPONSE_FORMATS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")

# Engines keep these in 32 bits.
INT_LIMIT = 1 << 31


def _check_param(name: str, value: Any) -> Any:
    """One parameter, checked and in its canonical type."""
    check = CHECKS.get(name)
    if check is None:
        text = f"'{name}' is not a generation parameter{nearest(str(name), GENERATION_FIELDS)}"
        raise invalid(text, code=ErrorCode.UNKNOWN_PARAMETER, key="generation")
    try:
        return check(name, value)
    except Refused as refused:
        raise invalid(str(refused), key=f"generation.{name}") from None


def _logprobs(name: str, value: Any) -> int | None:
    if isinstance(value, bool):  # OpenAI's chat API has true, with top_logprobs beside it
        return 0 if value else None
    found: int = whole(low=0)(name, value)
    return found


def _stop(name: str, value: Any) -> list[str] | None:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused.value(name, "a non-empty text or a list of them", value)
    return stops or None


def _stop_token_ids(name: str, value: Any) -> list[int] | None:
    if not isinstance(value, list) or not all(map(is_whole, value)):
        raise Refused.value(name, "a list of token ids", value)
    return value or None


def _logit_bias(name: str, value: Any) -> dict[str, float] | None:
    try:
        return {str(int(token)): float(bias) for token, bias in value.items()} or None
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise Refused(f"{name} must map token ids to numbers, not {value!r}") from None


def _response_format(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, Mapping) and value.get("type") == "object":  # a schema without the envelope
        return {"type": "json_schema", "json_schema": {"schema": dict(value)}}
    if not isinstance(value, Mapping) or value.get("type") not in RESPONSE_FORMATS:
        raise Refused(f"{name} needs a 'type' among {', '.join(RESPONSE_FORMATS)}, not {repr(value)[:SHOWN]}")
    return None if value["type"] == "text" else dict(value)


def _tools(name: str, value: Any) -> list[Any] | None:
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise Refused.value(name, "a list of tool definitions", value, SHOWN)
    return value or None


def _tool_choice(name: str, value: Any) -> Any:
    if not isinstance(value, (str, Mapping)):
        raise Refused.value(name, "a text or an object", value, SHOWN)
    return value


CHECKS: dict[str, Check] = {
    "max_tokens": whole(low=1, below=INT_LIMIT),
    "temperature": number(0.0, math.inf),
    "top_p": number(0.0, 1.0),
    "top_k": whole(),
    "min_p": number(0.0, 1.0),
    "stop": _stop,
    "stop_token_ids": _stop_token_ids,
    "seed": whole(),
    "n": whole(low=1, below=INT_LIMIT),
    "frequency_penalty": number(-2.0, 2.0),
    "presence_penalty": number(-2.0, 2.0),
    "repetition_penalty": number(0.0, math.inf),
    "logit_bias": _logit_bias,
    "logprobs": _logprobs,
    "response_format": _response_format,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "reasoning_effort": text,
    "dimensions": whole(low=1, below=INT_LIMIT),
    "schema_retries": whole(low=0),
}


def json_schema_of(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """The schema in `{"type": "json_schema", "json_schema": {"schema": …}}`, also where it stands there directly."""
    outer = response_format.get("json_schema", response_format.get("schema"))
    schema = outer.get("schema", outer) if isinstance(outer, Mapping) else None
    if not isinstance(schema, Mapping):
        raise invalid("response_format of type json_schema needs a 'json_schema' object holding a 'schema'")
    return dict(schema)
