"""Regular expressions of JSON schemas, matched within a time limit: a schema may come from a client that is not trusted.

Python's `re` has no limit: `^(a|a)+$` would hold the process for years, and with it the event loop of a server.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import attrs
import regex
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

# Seconds for all patterns in the validation of one answer.
LIMIT_S = 1.0
_budget = threading.local()


class PatternTooSlow(Exception):
    """The patterns of a schema need more than `LIMIT_S` for one answer."""


def start() -> None:
    """Starts the time limit of one validation in this thread."""
    _budget.ends = time.monotonic() + LIMIT_S


def matches(pattern: str, text: str) -> bool:
    left = _budget.ends - time.monotonic()
    try:
        if left > 0:
            return regex.search(pattern, text, timeout=left) is not None
    except TimeoutError:
        pass
    raise PatternTooSlow(f"its patterns need more than {LIMIT_S:g} s, for example {pattern!r:.100}")


@functools.cache
def bounded(validator: Any) -> Any:
    """The validator class with bounded matching in `pattern`, `patternProperties` and `additionalProperties`."""
    made = extend(validator, {"pattern": _pattern, "patternProperties": _properties, "additionalProperties": _additional})
    evolve = made.evolve

    def bounded_evolve(self: Any, **changes: Any) -> Any:
        evolved = evolve(self, **changes)
        if isinstance(evolved, made):
            return evolved
        # A part of the schema names its draft in `$schema`: the library takes its own class of that draft.
        draft: Any = type(evolved)
        return bounded(draft)(**{each.alias: getattr(evolved, each.name) for each in attrs.fields(draft) if each.init})

    made.evolve = bounded_evolve
    return made


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "string") and not matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if validator.is_type(instance, "object"):
        for pattern, inner in patterns.items():
            for name, value in instance.items():
                if matches(pattern, name):
                    yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional(validator: Any, inner: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not validator.is_type(instance, "object"):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    extras = [name for name in instance if name not in known and not any(matches(each, name) for each in patterns)]
    if validator.is_type(inner, "object"):
        for name in extras:
            yield from validator.descend(instance[name], inner, path=name)
    elif not inner and extras:
        names, verb = ", ".join(map(repr, extras)), "was" if len(extras) == 1 else "were"
        yield ValidationError(f"Additional properties are not allowed ({names} {verb} unexpected)")
