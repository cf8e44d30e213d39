"""JSON schemas in the form that a provider takes.

A provider takes a part of JSON Schema. A constraint outside of it goes into the description, which the model reads. The
answer is validated against the original schema (`engines/structured.py`), so such a constraint still holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from engines.errors import invalid

_NULL = {"type": "null"}
_PRIMITIVES = (str, int, float, bool, type(None))
# Keywords that neither constrain a value nor tell the model anything.
_SILENT = ("$schema", "$id", "$comment")


@dataclass(frozen=True, slots=True)
class SchemaSubset:
    """The part of JSON Schema that a provider takes. Objects are always closed (`additionalProperties: false`)."""

    keywords: frozenset[str]  # constraints beside types, properties, items, enum, const, anyOf and references
    formats: frozenset[str]
    all_required: bool = False  # each property is required; an optional one may be null instead
    typed_literals: bool = False  # enum and const need a type beside them; else they have none
    all_of: bool = False
    recursion: bool = False  # a schema may refer to itself
    most_min_items: int | None = None  # the largest `minItems`; None: any, if it is in `keywords`


# https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
_OPENAI = SchemaSubset(
    keywords=frozenset(
        ("pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
         "minItems", "maxItems")
    ),
    formats=frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")),
    all_required=True,
    typed_literals=True,
    recursion=True,
)  # fmt: skip
SUBSETS = {
    "openai": _OPENAI,
    "openai_fine_tuned": dataclasses.replace(_OPENAI, keywords=frozenset(), formats=frozenset()),
    # https://docs.claude.com/en/docs/build-with-claude/structured-outputs#json-schema-limitations; Bedrock takes the same.
    "anthropic": SchemaSubset(
        keywords=frozenset(),
        formats=_OPENAI.formats | {"uri"},
        all_of=True,
        most_min_items=1,
    ),
}


def in_subset(schema: Mapping[str, Any], subset: str) -> dict[str, Any]:
    """The schema in a subset named in `SUBSETS`. Raises `ValueError`, which says where the schema cannot be expressed."""
    taken = SUBSETS[subset]
    if not taken.recursion:
        inline_refs(schema)  # raises
    if taken.all_required and isinstance(ref := schema.get("$ref"), str):  # the root must be an object, not a reference
        schema = {**_target(schema, ref), **{name: value for name, value in schema.items() if name != "$ref"}}
    found = _Converter(schema, taken).convert(schema, "")
    if taken.all_required and found.get("type") != "object":
        raise ValueError("the root is not an object")
    return found


def provider_schema(schema: dict[str, Any], subset: str | None, no_references: bool) -> dict[str, Any]:
    """A schema as a provider takes it. Raises `EngineError("invalid_input")` if the provider has no form for it."""
    try:
        if no_references:
            schema = inline_refs(schema)
        return in_subset(schema, subset) if subset else schema
    except ValueError as error:
        raise invalid(f"this provider cannot take the JSON schema: {error}") from None
    except (TypeError, AttributeError, RecursionError):
        raise invalid("the JSON schema is invalid, or nested too deeply") from None


# https://platform.openai.com/docs/guides/structured-outputs#supported-schemas: properties, levels of objects, values of all
# enums, and characters of names and values. An enum of more than 250 values may have 15,000 characters.
_MOST_PROPERTIES, _MOST_LEVELS, _MOST_VALUES, _MOST_CHARACTERS = 5_000, 10, 1_000, 120_000
_LONG_ENUM, _MOST_CHARACTERS_OF_ONE = 250, 15_000


def exceeds_limits(schema: Mapping[str, Any]) -> bool:
    """True if a converted schema is larger than OpenAI's strict mode allows."""
    properties = values = characters = 0
    left: list[tuple[Any, int]] = [(schema, 0)]
    while left:
        node, level = left.pop()
        level += "properties" in node
        enum = node.get("enum", ())
        texts = sum(len(value) for value in enum if isinstance(value, str))
        values, characters, properties = (
            values + len(enum),
            characters + texts,
            properties + len(node.get("properties", ())),
        )
        if level > _MOST_LEVELS or (len(enum) > _LONG_ENUM and texts > _MOST_CHARACTERS_OF_ONE):
            return True
        for name in ("properties", "$defs", "definitions"):
            inner = node.get(name, {})
            characters += sum(map(len, inner))
            left += [(each, level if name == "properties" else 0) for each in inner.values()]
        left += [(each, level) for each in [*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())]]
    return properties > _MOST_PROPERTIES or values > _MOST_VALUES or characters > _MOST_CHARACTERS


class _Converter:
    """Converts one schema. Its methods move keywords from `left`, the rest of a schema, to `out`."""

    def __init__(self, root: Mapping[str, Any], subset: SchemaSubset) -> None:
        self.root, self.subset = root, subset
        self.inlined: list[str] = []  # the references whose targets are being converted

    def convert(self, node: Any, place: str) -> dict[str, Any]:
        """One schema; `place` is its path in the whole."""
        if not isinstance(node, Mapping) or not node:
            raise ValueError(f"{place or 'the root'} takes any value; give it a type")
        left = {name: value for name, value in node.items() if name not in _SILENT}
        out: dict[str, Any] = {}
        for name in ("$defs", "definitions"):
            if isinstance(inner := left.pop(name, None), Mapping):
                out[name] = {key: self.convert(value, f"{place}/{name}/{key}") for key, value in inner.items()}
        if isinstance(ref := left.pop("$ref", None), str):
            # A reference must stand alone. If it has keywords beside it, its target takes its place.
            if not left or ref in self.inlined:
                return {**out, "$ref": ref}
            self.inlined.append(ref)
            found = self.convert({**_target(self.root, ref), **left}, place)
            self.inlined.pop()
            return {**out, **found}
        types = self._types(left)
        self._literals(left, out, types)
        if not types and not out.keys() & {"enum", "const"}:
            parts = left.get("allOf")
            if isinstance(parts, list) and len(parts) == 1 and not self.subset.all_of:
                return {**out, **self.convert({**parts[0], **{k: v for k, v in left.items() if k != "allOf"}}, place)}
            self._unions(left, out, place)
        if types:
            out["type"] = types[0] if len(types) == 1 else types
            if "object" in types:
                self._object(left, out, place)
            if "array" in types:
                self._array(left, out, place)
        self._constraints(left, out)
        return out

    def _constraints(self, left: dict[str, Any], out: dict[str, Any]) -> None:
        """Copies what the subset has; the rest becomes a part of the description."""
        if left.get("format") in self.subset.formats:
            out["format"] = left.pop("format")
        for name in [name for name in left if name in self.subset.keywords]:
            out[name] = left.pop(name)
        for name in ("title", "description"):
            if isinstance(text := left.pop(name, None), str):
                out[name] = text
        if left:
            said = "{" + ", ".join(f"{name}: {_shown(value)}" for name, value in left.items()) + "}"
            out["description"] = f"{out['description']}\n\n{said}" if out.get("description") else said

    def _types(self, left: dict[str, Any]) -> list[str]:
        given = left.pop("type", None)
        if given is not None:
            return list(given) if isinstance(given, list) else [given]
        if "properties" in left:
            return ["object"]
        return ["array"] if "items" in left else []

    def _literals(self, left: dict[str, Any], out: dict[str, Any], types: list[str]) -> None:
        """Moves `enum` and `const`. Values that are lists or objects stay, and are described."""
        values = left.get("enum")
        if isinstance(values, list) and values and all(isinstance(value, _PRIMITIVES) for value in values):
            out["enum"] = left.pop("enum")
        if "const" in left and isinstance(left["const"], _PRIMITIVES):
            if self.subset.typed_literals:  # then one of one value
                out["enum"] = [left.pop("const")]
            else:
                out["const"] = left.pop("const")
        if not self.subset.typed_literals and out.keys() & {"enum", "const"}:
            types.clear()
        elif "enum" in out and not types:
            types += dict.fromkeys(map(_type_of, out["enum"]))

    def _unions(self, left: dict[str, Any], out: dict[str, Any], place: str) -> None:
        names = ("anyOf", "oneOf", *(("allOf",) if self.subset.all_of else ()))
        name = next((name for name in names if isinstance(left.get(name), list)), None)
        if name is None:
            raise ValueError(f"{place or 'the root'} takes any value, or has an allOf; give it a type")
        # No provider checks of `oneOf` that only one matches.
        parts = [self.convert(each, f"{place}/{name}/{at}") for at, each in enumerate(left.pop(name))]
        out["allOf" if name == "allOf" else "anyOf"] = parts

    def _object(self, left: dict[str, Any], out: dict[str, Any], place: str) -> None:
        properties, others = left.pop("properties", None) or {}, left.pop("additionalProperties", None)
        if isinstance(others, Mapping) or (not properties and others is not False):
            raise ValueError(f"{place or 'the root'} is an object with any property names; list its properties")
        required = list(left.pop("required", None) or ())
        out["properties"] = {}
        for name, inner in properties.items():
            found = self.convert(inner, f"{place}/properties/{name}")
            optional = self.subset.all_required and name not in required
            out["properties"][name] = _nullable(found) if optional else found
        out["additionalProperties"] = False
        required = list(properties) if self.subset.all_required else required
        if required:
            out["required"] = required

    def _array(self, left: dict[str, Any], out: dict[str, Any], place: str) -> None:
        items = left.pop("items", None)
        if items is not None or self.subset.all_required:
            out["items"] = self.convert(items, f"{place}/items")
        most = self.subset.most_min_items
        if most is not None and left.get("minItems", 0) <= most and "minItems" in left:
            out["minItems"] = left.pop("minItems")


def _nullable(node: dict[str, Any]) -> dict[str, Any]:
    """The schema, or null."""
    if "type" in node:
        types = node["type"] if isinstance(node["type"], list) else [node["type"]]
        more = {"enum": [*node["enum"], None]} if None not in node.get("enum", [None]) else {}
        return {**node, **({} if "null" in types else {"type": [*types, "null"]}), **more}
    if "anyOf" in node:
        return node if _NULL in node["anyOf"] else {**node, "anyOf": [*node["anyOf"], _NULL]}
    return {"anyOf": [node, _NULL]}


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    return {str: "string", int: "integer"}.get(type(value), "number")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _target(root: Any, ref: str) -> dict[str, Any]:
    """The schema that a local reference names. Raises `ValueError`."""
    target: Any = root
    try:
        for name in _steps(ref):
            target = target[int(name)] if isinstance(target, list) else target[name]
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"the schema has nothing at {ref}") from None
    return target if isinstance(target, dict) else {}


def _steps(ref: str) -> Iterator[str]:
    if not ref.startswith("#"):
        raise ValueError(ref)
    for name in ref.lstrip("#/").split("/") if ref != "#" else ():
        yield name.replace("~1", "/").replace("~0", "~")


def inline_refs(schema: Any) -> Any:
    """A JSON schema with every local `$ref` replaced by its target. Raises `ValueError` if a target contains itself."""

    def resolve(node: Any, above: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            return [resolve(item, above) for item in node]
        if not isinstance(node, dict):
            return node
        ref = node.get("$ref")
        if isinstance(ref, str) and ref.startswith("#"):
            if ref in above:
                raise ValueError(f"the schema refers to itself at {ref}")
            beside = {name: resolve(value, above) for name, value in node.items() if name != "$ref"}
            return {**resolve(_target(schema, ref), (*above, ref)), **beside}
        return {name: resolve(value, above) for name, value in node.items() if name not in ("$defs", "definitions")}

    return resolve(schema, ())
