"""`response_format` -> GBNF, the grammar language of llama.cpp.

The forms an engine takes (`type` decides):

    {"type": "json_object"}
    {"type": "json_schema", "json_schema": {"schema": {…}}}     # as OpenAI's; the schema directly there is taken too
    {"type": "regex", "regex": "…"}                             # or "pattern"; matches the whole answer
    {"type": "choice", "choice": ["yes", "no"]}                 # or "choices"
    {"type": "grammar", "grammar": "root ::= …"}                # GBNF itself

A grammar is what the answer is *generated* from, so it may be narrower than what was asked for (`\\d` gives ASCII
digits) but never wider, with one exception: JSON Schema's numeric bounds, `uniqueItems`, `not` and `if` are not
enforced.
Everything that cannot be expressed is an `invalid_input` error that says what it is.
"""

from __future__ import annotations

import json
import re
import re._constants as sre  # type: ignore[import-not-found]  # the parser of `re` itself: what it reads is what `re` matches
import re._parser as sre_parser  # type: ignore[import-not-found]
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from llama_cpp.llama_grammar import PRIMITIVE_RULES, BuiltinRule, SchemaConverter

from engines.errors import EngineError, invalid
from engines.params import json_schema_of

Ranges = list[tuple[int, int]]  # inclusive ranges of code points, sorted and apart


def to_gbnf(response_format: Mapping[str, Any]) -> str:
    """The grammar, its start symbol named `root`. Raises `EngineError("invalid_input")`."""
    try:
        return _to_gbnf(json.dumps(response_format))  # rows of a dataset mostly share one format
    except (TypeError, ValueError) as error:
        raise invalid(f"response_format is not JSON: {error}") from None


@lru_cache(maxsize=256)
def _to_gbnf(text: str) -> str:
    response_format: dict[str, Any] = json.loads(text)
    kind = response_format["type"]
    if kind == "json_object":
        return schema_to_gbnf({"type": "object"})
    if kind == "json_schema":
        return schema_to_gbnf(json_schema_of(response_format))
    if kind == "regex":
        return "root ::= " + regex_to_gbnf(_text(response_format, "regex", "pattern"))
    if kind == "choice":
        choices = response_format.get("choice", response_format.get("choices"))
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise invalid("response_format of type choice needs 'choice', a list of non-empty texts")
        return "root ::= " + " | ".join(_literal(choice) for choice in choices)
    if kind == "grammar":
        return _text(response_format, "grammar", "gbnf")
    raise invalid(f"response_format of type {kind!r} has no grammar")


def _text(response_format: Mapping[str, Any], *names: str) -> str:
    for name in names:
        value = response_format.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise invalid(f"response_format of type {response_format['type']} needs a text under '{names[0]}'")


# --- JSON Schema: llama-cpp-python's converter, with its gaps filled -------------------------------------------------

_ANNOTATIONS = ("title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions")
# JSON has no control characters in its strings, and no halves of UTF-16 pairs; the converter's own rule has both.
_CHAR = BuiltinRule(
    r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-ce-fA-CE-F] [0-9a-fA-F] | [dD] [0-7]) [0-9a-fA-F] [0-9a-fA-F])', []
)
_ANYTHING = {"description": "any value"}  # a schema the converter's truth tests take for present


class _Schema(SchemaConverter):
    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)

    def _add_primitive(self, name: str, rule: Any) -> Any:
        return super()._add_primitive(name, _CHAR if rule is PRIMITIVE_RULES["char"] else rule)

    def visit(self, schema: Any, name: str) -> str:
        if schema is False:
            raise ValueError("the schema 'false' allows nothing")
        if schema is True:
            schema = _ANYTHING
        rest = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        if not rest:  # no constraint: any JSON value (the converter would give an object)
            return str(self._add_rule(name or "root", self._add_primitive("value", PRIMITIVE_RULES["value"])))
        if "const" in rest or "enum" in rest:  # they say it all; the converter would look at `type` first
            rest = {key: rest[key] for key in ("const", "enum") if key in rest}
        elif isinstance(rest.get("type"), list):  # each type with the constraints beside it
            rest = {"anyOf": [{**rest, "type": kind} for kind in rest["type"]]}
        elif rest.get("type") == "array":
            if rest.get("items") in (None, {}, True) and "prefixItems" not in rest:
                rest["items"] = _ANYTHING
        elif len(rest.get("allOf", ())) == 1 and len(rest) == 1:  # how pydantic writes a reference with a description
            rest = rest["allOf"][0]
        return str(super().visit(rest, name))

    def _visit_pattern(self, pattern: str, name: str) -> str:
        return str(self._add_rule(name, '"\\"" ' + regex_to_gbnf(pattern, in_json=True) + ' "\\"" space'))


def schema_to_gbnf(schema: dict[str, Any]) -> str:
    """Raises `EngineError("invalid_input")` for a schema that is wrong or cannot be expressed."""
    try:
        converter = _Schema()
        converter.visit(converter.resolve_refs(schema, ""), "")
        return str(converter.format_grammar())
    except EngineError:
        raise
    except RecursionError:
        raise invalid("the JSON schema is nested too deeply") from None
    except Exception as error:  # the converter asserts and indexes its way through whatever a row brings
        reason = str(error) or type(error).__name__
        raise invalid(f"the JSON schema cannot be turned into a grammar: {reason}"[:300]) from None


# --- Regular expressions: Python's own parser, its tree written as GBNF ----------------------------------------------

_TOP = 0x10FFFF
_SPACES: Ranges = [(0x09, 0x0D), (0x20, 0x20)]
_UNICODE_SPACES: Ranges = [
    *[(0x09, 0x0D), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)],
    *[(0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)],
]
_DIGITS: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
# category -> (a set inside what `re` matches, a set around it): one to generate from, one to negate
_CATEGORIES: dict[Any, tuple[Ranges, Ranges]] = {
    sre.CATEGORY_DIGIT: (_DIGITS, [*_DIGITS, (0x80, _TOP)]),
    sre.CATEGORY_WORD: (_WORD, [*_WORD, (0x80, _TOP)]),
    sre.CATEGORY_SPACE: (_SPACES, _UNICODE_SPACES),
}
_NEGATED = {
    sre.CATEGORY_NOT_DIGIT: sre.CATEGORY_DIGIT,
    sre.CATEGORY_NOT_WORD: sre.CATEGORY_WORD,
    sre.CATEGORY_NOT_SPACE: sre.CATEGORY_SPACE,
}
_JSON_ESCAPED: Ranges = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]  # what may not stand in a JSON string as it is
_UNSUPPORTED = {
    sre.ASSERT: "lookaround",
    sre.ASSERT_NOT: "lookaround",
    sre.GROUPREF: "a back reference",
    sre.GROUPREF_EXISTS: "a conditional group",
    sre.AT: "an anchor or word boundary inside the pattern",
}


def regex_to_gbnf(pattern: str, in_json: bool = False) -> str:
    """One GBNF expression for what `re.fullmatch(pattern, …)` takes. Raises `EngineError("invalid_input")`.

    `in_json`: the text stands inside a JSON string, so it is escaped as there, and, as JSON Schema has it, an
    unanchored side of the pattern may be anything.
    """
    try:
        tree = sre_parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise invalid(f"the regular expression {pattern!r:.80} is wrong: {error}") from None
    flags = tree.state.flags
    if flags & (re.IGNORECASE | re.LOCALE):
        raise invalid(f"the regular expression {pattern!r:.80} uses a flag a grammar cannot express")
    items = list(tree)
    starts = bool(items) and items[0] in ((sre.AT, sre.AT_BEGINNING), (sre.AT, sre.AT_BEGINNING_STRING))
    ends = bool(items) and items[-1] in ((sre.AT, sre.AT_END), (sre.AT, sre.AT_END_STRING))
    items = items[1 if starts else 0 : len(items) - (1 if ends and len(items) > starts else 0)]
    writer = _Regex(pattern, in_json, dotall=bool(flags & re.DOTALL))
    try:
        body = writer.sequence(items)
    except RecursionError:
        raise invalid("the regular expression is nested too deeply") from None
    if in_json:
        anything = writer.chars([(0, _TOP)]) + "*"
        body = " ".join(([] if starts else [anything]) + [f"({body})"] + ([] if ends else [anything]))
    return body


class _Regex:
    def __init__(self, pattern: str, in_json: bool, dotall: bool) -> None:
        self.pattern = pattern
        self.in_json = in_json
        self.dotall = dotall

    def sequence(self, items: Any) -> str:
        parts = [self.item(op, value) for op, value in items]
        return " ".join(parts) or '""'

    def item(self, op: Any, value: Any) -> str:
        if op is sre.LITERAL:
            return _literal(self._escaped(value))
        if op is sre.NOT_LITERAL:
            return self.chars(_complement([(value, value)]))
        if op is sre.ANY:
            return self.chars([(0, _TOP)] if self.dotall else _complement([(0x0A, 0x0A)]))
        if op is sre.IN:
            return self.chars(self._set(value))
        if op is sre.BRANCH:
            return "(" + " | ".join(self.sequence(branch) for branch in value[1]) + ")"
        if op is sre.SUBPATTERN:
            _, add_flags, del_flags, inner = value
            if add_flags or del_flags:
                raise self._refuse("flags inside the pattern")
            return f"({self.sequence(inner)})"
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
            low, high, inner = value
            many = {(0, 1): "?", (0, sre.MAXREPEAT): "*", (1, sre.MAXREPEAT): "+"}.get((low, high))
            if many is None:
                many = f"{{{low}}}" if low == high else f"{{{low},{'' if high is sre.MAXREPEAT else high}}}"
            return f"({self.sequence(inner)}){many}"
        raise self._refuse(_UNSUPPORTED.get(op, str(op).lower()))

    def _refuse(self, what: str) -> EngineError:
        return invalid(f"the regular expression {self.pattern!r:.80} uses {what}, which a grammar cannot express")

    def _set(self, items: Any) -> Ranges:
        negate = bool(items) and items[0][0] is sre.NEGATE
        ranges: Ranges = []
        for op, value in items[1:] if negate else items:
            if op is sre.LITERAL:
                ranges.append((value, value))
            elif op is sre.RANGE:
                ranges.append(value)
            elif value in _CATEGORIES:
                ranges += _CATEGORIES[value][1 if negate else 0]
            else:
                ranges += _complement(_CATEGORIES[_NEGATED[value]][0 if negate else 1])
        return _complement(ranges) if negate else ranges

    def chars(self, ranges: Ranges) -> str:
        """One character of a set; in a JSON string, those that JSON escapes stand as their escapes."""
        # NUL ends llama.cpp's strings, and surrogates are no characters.
        ranges = _minus(ranges, [(0, 0), (0xD800, 0xDFFF)])
        parts = []
        if self.in_json:
            within = {code for low, high in ranges for code in range(low, min(high, 0x5C) + 1)}
            parts = [_literal(self._escaped(ord(c))) for c in '"\\\n\t\r' if ord(c) in within]
            ranges = _minus(ranges, _JSON_ESCAPED)
        if ranges:
            parts.append("[" + "".join(_code(a) if a == b else f"{_code(a)}-{_code(b)}" for a, b in ranges) + "]")
        if not parts:
            raise self._refuse("a set without characters")
        return parts[0] if len(parts) == 1 else "(" + " | ".join(parts) + ")"

    def _escaped(self, code: int) -> str:
        return json.dumps(chr(code), ensure_ascii=False)[1:-1] if self.in_json else chr(code)


def _complement(ranges: Ranges) -> Ranges:
    return _minus([(0, _TOP)], ranges)


def _minus(ranges: Ranges, taken: Ranges) -> Ranges:
    left = sorted(ranges)
    for low, high in taken:
        left = (
            [(a, b) for start, end in left for a, b in ((start, min(end, low - 1)), (max(start, high + 1), end)) if a <= b]
            if low <= high
            else left
        )
    return sorted(set(left))


def _code(code: int) -> str:
    return f"\\U{code:08X}" if code > 0xFFFF else f"\\u{code:04X}"


def _literal(text: str) -> str:
    plain = (c if c.isprintable() and c not in '"\\' else _code(ord(c)) for c in text)
    return '"' + "".join(plain) + '"'
