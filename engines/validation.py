"""The checks of configuration keys, engine keywords and generation parameters: small functions in tables beside each key.

A check takes the name of a value (for the message) and the value. It returns the value in its canonical type, or raises
`Refused`. `check_value` and `check_fields` make a `ConfigError` of that; `engines/params.py` makes an `EngineError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from engines.errors import ConfigError, must_be, nearest, unknown_key, unknown_kwarg

Check = Callable[[str, Any], Any]

# The name of a type in Python -> its name in messages.
TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "dict": "a mapping",
    "list": "a list",
}
# Characters of a large value (tools, a schema) that a message shows.
SHOWN = 200


class Refused(ValueError):
    """A check does not allow a value. The text is the whole message."""

    @classmethod
    def value(cls, name: str, wanted: str, value: Any, limit: int | None = None) -> Refused:
        return cls(must_be(name, wanted, value, limit))


# -- running checks -------------------------------------------------------------------------------------------------


def check_value(name: str, value: Any, check: Check) -> Any:
    """The value of a configuration key in its canonical type. Raises `ConfigError`."""
    try:
        return check(name, value)
    except Refused as refused:
        raise ConfigError(str(refused), key=name) from None


def check_fields(section: str, values: Any) -> None:
    """Checks the fields of a dataclass that have a `check` in their metadata. None means unset and is always allowed.

    The field `name` is the key `section.name`, or `name` if `section` is empty.
    """
    for item in fields(values):
        check, value = item.metadata.get("check"), getattr(values, item.name)
        if check is not None and value is not None:
            check_value(f"{section}.{item.name}".lstrip("."), value, check)


def check_keys(given: Iterable[Any], known: Collection[str], where: str) -> None:
    """Raises `ConfigError` for the first key that is not known; `where` is the dotted path above the keys."""
    for name in given:
        if name not in known:
            raise unknown_key(name, known, where)


def check_kwargs(
    kind: str, kwargs: Mapping[str, Any], types: Mapping[str, Any], positive: Collection[str] = ()
) -> dict[str, Any]:
    """The keywords of an engine (`engine.kwargs`) that are not None, with the types in `types`.

    The type `object` allows any value. Keywords in `positive` are at least 1. Raises `ConfigError` for a wrong type or
    value, and for an unknown keyword; the message names the nearest known one.
    """
    checked = {}
    for name, value in kwargs.items():
        if name not in types:
            raise unknown_kwarg(name, kind, types)
        if value is None:
            continue
        want = types[name]
        if want is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, want) or (want in (int, float) and isinstance(value, bool)):
            raise ConfigError(must_be(f"engine.kwargs.{name}", TYPE_WORDS[want.__name__], value, 80), key=f"engine={kind}")
        if name in positive:
            check_value(f"engine.kwargs.{name}", value, at_least(1))
        checked[name] = value
    return checked


# -- checks -----------------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def whole(low: int | None = None, below: int | None = None) -> Check:
    """A whole number. 256.0 counts as one: Parquet and YAML may hold 256 so."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if below is not None and isinstance(value, int) and value >= below:
            raise Refused(f"{name} must be below {below:,}")
        if not is_whole(value) or (low is not None and value < low):
            raise Refused.value(name, "a whole number" + (f" of at least {low}" if low is not None else ""), value)
        return int(value)

    return check


def number(low: float, high: float | None = None) -> Check:
    """A number of at least `low`, and of at most `high` if that is given."""
    wanted = f"a number of at least {low}" if high is None else f"a number between {low} and {high}"

    def check(name: str, value: Any) -> float:
        if not is_number(value) or not low <= value <= (math.inf if high is None else high):
            raise Refused.value(name, wanted, value)
        try:
            return float(value)
        except OverflowError:
            raise Refused(f"{name} is too large a number") from None

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise Refused.value(name, "a text", value, SHOWN)
    return value


@dataclass(frozen=True, slots=True)
class OneOf:
    """The check that `one_of` returns."""

    known: Collection[str]

    def __call__(self, name: str, value: Any) -> Any:
        if value not in self.known:
            raise Refused(f"{name}={value} is not known{nearest(str(value), self.known)}")
        return value


def one_of(known: Collection[str]) -> Check:
    """One of these names. `known` is read at each check, so it may grow."""
    return OneOf(known)


# The following three leave the type to the dataclass. They also refuse a value that cannot be compared with a number.


def at_least(low: float) -> Check:
    return _range(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Check:
    return _range(f"above {low}", lambda value: value > low)


def between(low: float, high: float) -> Check:
    return _range(f"between {low} and {high}", lambda value: low <= value <= high)


def _range(wanted: str, inside: Callable[[Any], bool]) -> Check:
    def check(name: str, value: Any) -> Any:
        if not is_number(value) or not inside(value):
            raise Refused.value(name, wanted, value)
        return value

    return check
