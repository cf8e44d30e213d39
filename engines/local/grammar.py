"""Structured output: llguidance says after each token which tokens `response_format` allows next.

The forms of `response_format` that become a matcher:

    {"type": "json_object"}
    {"type": "json_schema", "json_schema": {"schema": {…}}}     # OpenAI's form; "json_schema" may be the schema itself
    {"type": "regex", "regex": "…"}                             # or "pattern"; matches the whole answer
    {"type": "choice", "choice": ["yes", "no"]}                 # or "choices"

GBNF (`type` is "grammar") is llama.cpp's own language. Only `engine=llamacpp` supports it, and llama.cpp enforces it.

llguidance does not enforce `contains`, `uniqueItems`, `not`, `if`, `dependentRequired` and `propertyNames` of JSON Schema,
and treats an overlapping `oneOf` as `anyOf`. An answer can violate these; engines/structured.py checks every answer against
the whole schema.

An object that lists its `properties` and says nothing of others gets only these, as in OpenAI's strict mode. JSON Schema
would allow any others, and a small model would invent properties until its token limit. For the same reason, integers
without bounds have at most 53 bits, which every JSON reader keeps exactly.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from engines.errors import EngineError, invalid
from engines.params import json_schema_of
from engines.text import one_line

# JSON on one line, with at most one space after "," and ":": with free white space, a small model writes it until its
# token limit. `lenient` ignores the keywords named above. A schema's own "x-guidance" cannot override these.
_JSON_OPTIONS = {"lenient": True, "whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LIBRARY_REASON = re.compile(r"error: ([^\n]+)")


class Grammars:
    """Makes the matchers of one tokenizer. `build` makes the tokenizer at the first use: 0.2 s for 49,152 tokens."""

    def __init__(self, build: Callable[[], LLTokenizer]) -> None:
        self._build = build
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled = lru_cache(maxsize=256)(self._compile)  # most rows of a dataset share one format

    def matcher(self, response_format: Mapping[str, Any]) -> Matcher:
        """A matcher at the start of an answer. Raises `EngineError("invalid_input")`."""
        try:
            text = json.dumps(response_format, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise invalid(f"response_format is not JSON: {error}") from None
        matcher, ends = self._compiled(text)
        return Matcher(matcher.deep_copy(), ends)

    def _compile(self, text: str) -> tuple[LLMatcher, frozenset[int]]:
        response_format: dict[str, Any] = json.loads(text)
        name, grammar = _grammar(response_format)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._build()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            message = matcher.get_error()
            reason = _LIBRARY_REASON.search(message)  # for a regular expression, a drawing comes first
            raise invalid(f"{name} cannot be enforced: {reason[1] if reason else message.splitlines()[0]}"[:400])
        return matcher, frozenset(self._tokenizer.eos_tokens)


class Matcher:
    """The tokens with which one answer may continue. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = ends  # the tokens that end an answer

    def allows(self, token: int) -> bool:
        """Costs 1 to 3 µs; `masked` costs 60 µs for 49,152 tokens."""
        if token in self._ends:  # llguidance itself knows only one of them
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token]) == 1

    def allowed(self, count: int) -> Any:
        """A boolean array of shape (count,): the allowed tokens. Raises `EngineError("bad_response")` if there are none."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(count, bool)  # a model can have more logits than the tokenizer has tokens
        known = np.unpackbits(bits, count=min(count, 8 * len(bits)), bitorder="little")
        allowed[: len(known)] = known
        if self._matcher.is_error() or not allowed.any():
            reason = f": {one_line(RuntimeError(self._matcher.get_error()))}" if self._matcher.is_error() else ""
            raise EngineError("bad_response", f"response_format allows none of the model's tokens here{reason}")
        return allowed

    def masked(self, logits: Any) -> Any:
        """A copy of `logits` with -inf for each token that is not allowed. Raises as `allowed`."""
        return np.where(self.allowed(len(logits)), logits, -np.inf).astype(np.float32, copy=False)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


def _grammar(response_format: Mapping[str, Any]) -> tuple[str, str]:
    """The grammar in llguidance's language, after its name for error messages."""
    kind = response_format["type"]
    if kind == "json_object":
        return "the JSON object", _json_grammar({"type": "object"})
    if kind == "json_schema":
        return "the JSON schema of response_format", _json_grammar(json_schema_of(response_format))
    if kind == "regex":
        pattern = text_under(response_format, "regex", "pattern")
        return f"the regular expression {pattern!r:.80} of response_format", LLMatcher.grammar_from_regex(pattern)
    if kind == "choice":
        choices = response_format.get("choice", response_format.get("choices"))
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise invalid("response_format of type choice needs 'choice', a list of non-empty texts")
        return "the choice of response_format", LLMatcher.grammar_from_regex("|".join(map(re.escape, choices)))
    raise invalid(f"response_format of type {kind!r} cannot be enforced by this engine")


def _json_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(narrowed_schema(schema)), overrides=_JSON_OPTIONS)


def narrowed_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema that allows fewer answers; all of them are valid by `schema`.

    It allows no unlisted properties (if this does not forbid listed ones), and no integers beyond 53 bits (if `schema` has
    no bound of its own).
    """
    found: dict[str, Any] = _narrowed(schema, close=not _combines_objects(schema))
    return found


# Keywords whose values are subschemas: in a mapping by name, in a list, or one alone.
_BY_NAME, _IN_A_LIST = (
    ("properties", "patternProperties", "$defs", "definitions"),
    ("allOf", "anyOf", "oneOf", "prefixItems"),
)
_ALONE = ("items", "additionalProperties")
# Integers up to here are exact as floating-point numbers, too.
EXACT = (1 << 53) - 1
# The largest bound that llguidance takes on both sides: the last floating-point number of 63 bits.
_MOST = (1 << 63) - 1024
# Keywords that say what other properties an object may have.
_OTHERS = {"additionalProperties", "patternProperties"}
# Keywords that may add properties to those that an object lists.
_COMBINING = ("allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef")


def _combines_objects(schema: Any) -> bool:
    """True if several places of the schema list properties of one object. To close one place would forbid the others."""
    if isinstance(schema, list):
        return any(map(_combines_objects, schema))
    if not isinstance(schema, Mapping):
        return False
    mixed = "properties" in schema and any(name in schema for name in ("anyOf", "oneOf", "$ref"))
    return mixed or any(name in schema for name in _COMBINING) or any(map(_combines_objects, schema.values()))


def _narrowed(schema: Any, close: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for name, value in schema.items():
        if name in _BY_NAME and isinstance(value, Mapping):
            found[name] = {key: _narrowed(each, close) for key, each in value.items()}
        elif name in _IN_A_LIST and isinstance(value, list):
            found[name] = [_narrowed(each, close) for each in value]
        elif name in _ALONE:
            found[name] = _narrowed(value, close)
    if close and isinstance(found.get("properties"), Mapping) and not _OTHERS & found.keys() and not _needs_others(found):
        found["additionalProperties"] = False
    types = found.get("type")
    types = types if isinstance(types, list) else [types]
    if "integer" in types and "number" not in types:
        _bound_integer(found)
    return found


def _needs_others(schema: Mapping[str, Any]) -> bool:
    """True if an object needs properties that the schema does not list."""
    listed, required, least = schema["properties"], schema.get("required"), schema.get("minProperties")
    names = required if isinstance(required, list) else []
    return any(isinstance(name, str) and name not in listed for name in names) or (
        isinstance(least, (int, float)) and least > len(listed)
    )


def _bound_integer(schema: dict[str, Any]) -> None:
    """Adds the bounds that `schema` lacks.

    If the schema has a bound beyond 53 bits, the added bound has 64 bits: llguidance refuses some schemas without an upper
    bound. It also refuses a bound beyond 64 bits, and a bound that is not a number.
    """
    low = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    high = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    if all(isinstance(bound, (int, float)) and -_MOST < bound < _MOST for bound in low + high):
        most = EXACT if all(-EXACT < bound < EXACT for bound in low + high) else _MOST
        if not low:
            schema["minimum"] = -most
        if not high:
            schema["maximum"] = most


def text_under(response_format: Mapping[str, Any], *names: str) -> str:
    """The first text under one of `names`. Raises `EngineError("invalid_input")` if there is none."""
    for name in names:
        value = response_format.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise invalid(f"response_format of type {response_format['type']} needs a text under '{names[0]}'")
