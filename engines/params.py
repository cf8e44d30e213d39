"""Generation parameters and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import invalid, nearest


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How to sample. `None` leaves the choice to the engine; local engines then decode greedily."""

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
    logit_bias: dict[str, float] | None = None  # token id (as text, like OpenAI's) -> bias added to its logit
    logprobs: int | None = None  # alternatives per generated token; 0 gives the chosen token's alone
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    schema_retries: int | None = None  # of answers that are not what response_format asks for

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> GenerationParams:
        """Checked parameters from plain values. Raises `EngineError("invalid_input")` naming the field."""
        return cls().override(values)

    def override(self, values: Mapping[str, Any]) -> GenerationParams:
        """These parameters with `values` laid over them; a value of None leaves the field as it is."""
        given = {name: value for name, value in values.items() if value is not None}
        if not given:
            return self
        return dataclasses.replace(self, **{name: _check_param(name, value) for name, value in given.items()})

    def given(self) -> dict[str, Any]:
        """Only the fields somebody set, in declaration order, of those that shape an answer."""
        names = (name for name in GENERATION_FIELDS if name != "schema_retries")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


GENERATION_FIELDS = tuple(f.name for f in dataclasses.fields(GenerationParams))

_POSITIVE_INT = {"max_tokens", "n"}
_INT = {"top_k", "seed", "logprobs", "schema_retries"}
# name -> (lowest, highest), both allowed
_FLOAT_RANGE = {
    "temperature": (0.0, float("inf")),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, float("inf")),
}
RESPONSE_FORMATS = ("text", "json_object", "json_schema", "regex", "choice", "grammar")


def _check_param(name: str, value: Any) -> Any:
    """One generation parameter, checked and in its canonical type."""
    if name in _POSITIVE_INT or name in _INT:
        if name == "logprobs" and isinstance(value, bool):  # OpenAI's chat form: true, with top_logprobs beside it
            return 0 if value else None
        if isinstance(value, float) and value.is_integer():  # Parquet and YAML may carry 256 as 256.0
            value = int(value)
        least = 1 if name in _POSITIVE_INT else (0 if name in ("logprobs", "schema_retries") else None)
        if name in _POSITIVE_INT and isinstance(value, int) and value >= 1 << 31:
            raise invalid(f"{name} must be below 2,147,483,648")
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            bound = f" of at least {least}" if least is not None else ""
            raise invalid(f"{name} must be a whole number{bound}, not {value!r}")
        return value
    if name in _FLOAT_RANGE:
        low, high = _FLOAT_RANGE[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise invalid(f"{name} must be a number between {low} and {high}, not {value!r}")
        try:
            return float(value)
        except OverflowError:
            raise invalid(f"{name} is too large a number") from None
    if name == "stop":
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise invalid(f"stop must be a non-empty text or a list of them, not {value!r}")
        return stops or None
    if name == "stop_token_ids":
        if not isinstance(value, list) or not all(isinstance(t, int) and not isinstance(t, bool) for t in value):
            raise invalid(f"stop_token_ids must be a list of token ids, not {value!r}")
        return value or None
    if name == "logit_bias":
        if not isinstance(value, Mapping):
            raise invalid(f"logit_bias must map token ids to numbers, not {value!r}")
        try:
            return {str(int(token)): float(bias) for token, bias in value.items()} or None
        except (TypeError, ValueError, OverflowError):
            raise invalid(f"logit_bias must map token ids to numbers, not {value!r}") from None
    if name == "response_format":
        if isinstance(value, Mapping) and value.get("type") == "object":  # a schema alone
            return {"type": "json_schema", "json_schema": {"schema": dict(value)}}
        if not isinstance(value, Mapping) or value.get("type") not in RESPONSE_FORMATS:
            raise invalid(f"response_format needs a 'type' among {', '.join(RESPONSE_FORMATS)}, not {value!r:.200}")
        return None if value["type"] == "text" else dict(value)
    if name == "tools":
        if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
            raise invalid(f"tools must be a list of tool definitions, not {value!r:.200}")
        return value or None
    if name == "tool_choice":
        if not isinstance(value, (str, Mapping)):
            raise invalid(f"tool_choice must be a text or an object, not {value!r:.200}")
        return value
    if name == "reasoning_effort":
        if not isinstance(value, str):
            raise invalid(f"reasoning_effort must be a text, not {value!r:.200}")
        return value
    raise invalid(f"'{name}' is not a generation parameter{nearest(name, GENERATION_FIELDS)}")


def json_schema_of(response_format: Mapping[str, Any]) -> dict[str, Any]:
    """The schema inside `{"type": "json_schema", "json_schema": {"schema": …}}`, or with the schema put there directly."""
    outer = response_format.get("json_schema", response_format.get("schema"))
    schema = outer.get("schema", outer) if isinstance(outer, Mapping) else None
    if not isinstance(schema, Mapping):
        raise invalid("response_format of type json_schema needs a 'json_schema' object holding a 'schema'")
    return dict(schema)
