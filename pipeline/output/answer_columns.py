"""`output.columns`: properties of JSON answers as output columns. The schema of the request gives their types.

`answers.py` reads the answers from the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from engines.errors import ConfigError, EngineError, nearest
from engines.params import json_schema_of
from engines.remote.schemas import inline_refs
from pipeline.dataset.column_types import kind_of, type_of
from pipeline.dataset.formats import OUTPUT_COLUMNS, REFERENCE
from pipeline.storage.exact_json import dumps, loads

_SIMPLE = {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_(), "null": pa.string()}


@dataclass(frozen=True, slots=True)
class AnswerColumn:
    """An output column with one property of the answers. `type` None means JSON text."""

    name: str
    path: tuple[str, ...]
    type: pa.DataType | None


def plan_answer_columns(wanted: Any, response_format: Mapping[str, Any] | None) -> list[AnswerColumn]:
    """The columns of `output.columns`. Raises `ConfigError` if they do not fit `response_format`."""
    if wanted is None:
        return []
    if response_format is None or response_format["type"] != "json_schema":
        raise ConfigError(
            "output.columns needs a generation.response_format of type json_schema: the schema gives the types",
            key="output.columns",
        )
    try:
        schema = json_schema_of(response_format)
    except EngineError as error:
        raise ConfigError(f"generation.{error}", key="generation.response_format") from None
    try:
        schema = inline_refs(schema)
    except ValueError:  # a recursive schema: its columns become JSON text
        pass
    if wanted == "schema" or wanted is True:
        paths = {name: name for name in _properties(schema)}
    elif isinstance(wanted, list):
        paths = {path: path for path in wanted}
    elif isinstance(wanted, Mapping):
        paths = dict(wanted)
    else:
        raise ConfigError(
            f"output.columns must be schema, a list of properties or a mapping of names to properties, not {wanted!r}",
            key="output.columns",
        )
    found: list[AnswerColumn] = []
    for name, path in paths.items():
        if not isinstance(path, str) or not isinstance(name, str):
            raise ConfigError(f"output.columns: {path!r} is not the name of a property of the schema", key="output.columns")
        parts, node = _parts(path, schema), schema
        for part in parts:
            known = _properties(node)
            if part not in known:
                raise ConfigError(
                    f"output.columns: the schema has no property '{part}' ({path}){nearest(part, known)}",
                    key="output.columns",
                )
            node = known[part]
        while name in (*OUTPUT_COLUMNS, REFERENCE) or any(answer_column.name == name for answer_column in found):
            name = f"response_{name}"
        found.append(AnswerColumn(name, parts, arrow_type(node)))
    return found


def _parts(path: str, schema: Any) -> tuple[str, ...]:
    return (path,) if path in _properties(schema) else tuple(path.split("."))


def _properties(schema: Any) -> Mapping[str, Any]:
    schema = _plain(schema)
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _plain(schema: Any) -> Any:
    """The schema without a "null" alternative, and without an `anyOf`, `oneOf` or `allOf` that has only one member."""
    while isinstance(schema, Mapping):
        name = next((name for name in ("anyOf", "oneOf", "allOf") if name in schema), None)
        if name is None or not isinstance(schema[name], list):
            break
        rest = [part for part in schema[name] if part != {"type": "null"} or name == "allOf"]
        if len(rest) != 1:
            break
        schema = rest[0]
    return schema


def arrow_type(schema: Any) -> pa.DataType | None:
    """The Arrow type that holds every value of a JSON schema exactly. None if only JSON text holds it."""
    schema = _plain(schema)
    if not isinstance(schema, Mapping) or "$ref" in schema:
        return None
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
        bits = 0
        for value in values:
            bits |= kind_of(value)
        return type_of(bits)
    kinds = schema.get("type")
    if isinstance(kinds, list):
        rest = [kind for kind in kinds if kind != "null"]
        kinds = "number" if set(rest) == {"integer", "number"} else rest[0] if len(rest) == 1 else None
    if kinds == "array":
        item = arrow_type(schema.get("items")) if not schema.get("prefixItems") else None
        return pa.list_(item) if item is not None else None
    if kinds == "object":
        fields = {name: arrow_type(part) for name, part in _properties(schema).items()}
        # A struct cannot hold properties that the schema does not name.
        if not fields or schema.get("additionalProperties") is not False or "patternProperties" in schema:
            return None
        return pa.struct(list(fields.items())) if None not in fields.values() else None
    return _SIMPLE.get(kinds) if isinstance(kinds, str) else None


def answer_arrays(answer_columns: Sequence[AnswerColumn], texts: Sequence[str | None]) -> dict[str, pa.Array]:
    """The arrays of the columns, of the values that `answer_values` finds in the answers."""
    rows = [answer_values(answer_columns, text) for text in texts]
    return {
        column.name: pa.array([row[at] for row in rows], column.type or pa.string())
        for at, column in enumerate(answer_columns)
    }


def answer_values(answer_columns: Sequence[AnswerColumn], text: str | None) -> list[Any]:
    """The values of the columns in one answer. A value is None if there is no answer (None), or if the answer has no value
    of the type at the column's path."""
    answer: Any = None
    if text is not None and answer_columns:
        try:
            answer = loads(text.encode())
        except ValueError:  # for example, the row sets its own response format
            pass
    values = []
    for column in answer_columns:
        value = answer
        for part in column.path:
            value = value.get(part) if isinstance(value, dict) else None
        values.append(fitted(value, column.type))
    return values


def fitted(value: Any, type: pa.DataType | None) -> Any:
    """The value converted to `type`. None if the value does not fit."""
    if value is None:
        return None
    if type is None:
        return dumps(value).decode()
    if pa.types.is_list(type):
        return [fitted(item, type.value_type) for item in value] if isinstance(value, list) else None
    if pa.types.is_struct(type):
        return {part.name: fitted(value.get(part.name), part.type) for part in type} if isinstance(value, dict) else None
    if pa.types.is_string(type):
        return value if isinstance(value, str) else None
    if pa.types.is_boolean(type):
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if pa.types.is_floating(type):
        try:
            return float(value)
        except OverflowError:
            return None
    whole = int(value) if isinstance(value, int) or value.is_integer() else None  # in JSON Schema, 3.0 is an integer
    return whole if whole is not None and -(1 << 63) <= whole < 1 << 63 else None
