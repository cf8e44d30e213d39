"""JSON without loss of values. Uses orjson, and the standard library for values that orjson rounds or refuses."""

from __future__ import annotations

import base64
import itertools
import json
import math
from typing import Any

import orjson

# orjson writes at most 254 levels. The structure that we add around a row needs a few of them.
MAX_DEPTH = 200

# orjson reads integers beyond 64 bits as floats. Each such integer has at least 19 consecutive digits.
_TO_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * 19


def has_long_number(data: bytes) -> bool:
    """True if orjson may round an integer in `data`. The check takes less than a tenth of the time of parsing."""
    return _LONG_NUMBER in data.translate(_TO_ZEROS)


def loads(data: bytes, long_number: bool = True) -> Any:
    """Parses JSON without loss: integers of any size, and `NaN` and `Infinity` as floats. The last of repeated keys wins.

    Pass `long_number=False` only if `has_long_number(data)` is false. Raises `ValueError` with a one-line reason.
    """
    try:
        value = orjson.loads(data)
        if long_number and has_long_number(data):
            value = json.loads(data.decode())
    except (ValueError, RecursionError):
        value = _parse_slowly(data)
    # A value has at least as many brackets as levels. Counting brackets is cheap, and for most rows it is enough.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _too_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def _parse_slowly(data: bytes) -> Any:
    """Parses with the standard library, which accepts a little more than orjson and gives better error messages."""
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:  # Python refuses to convert very long integers, because the conversion takes quadratic time
        raise ValueError("an integer of more than 4,300 digits") from None
    if b"\\ud" in data or b"\\uD" in data:
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: Any) -> None:
    """Raises `ValueError` for a lone half of a UTF-16 pair: UTF-8 cannot encode it."""
    parts = value.items() if isinstance(value, dict) else [("the value", value)]
    for name, part in parts:
        try:
            json.dumps([name, part], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = ord(str(error.object)[error.start])
            raise ValueError(f"a lone surrogate (\\u{code:04x}) in {ascii(name)[:80]}") from None
        except RecursionError:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        children = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list)))
        level = list(itertools.chain.from_iterable(children))
        if not level:
            return False
    return True


def dumps(value: Any, *, sort_keys: bool = False) -> bytes:
    """Compact UTF-8 JSON with integers of any size. `plain` converts values that JSON cannot represent. NaN and the
    infinities, which JSON does not have, become the strings "NaN", "Infinity" and "-Infinity"."""
    try:
        data = orjson.dumps(value, default=plain, option=orjson.OPT_SORT_KEYS if sort_keys else None)
        if b"null" not in data:  # orjson writes null for NaN and the infinities
            return data
        named = finite(value)
        return data if named is value else dumps(named, sort_keys=sort_keys)
    except TypeError:  # an integer beyond 64 bits
        named = finite(value)
        text = json.dumps(named, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys, default=plain)
        return text.encode()


def finite(value: Any) -> Any:
    """Replaces NaN and the infinities by their names. Returns the same object if the value has none of them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Infinity"
    if isinstance(value, dict):
        named = {key: finite(item) for key, item in value.items()}
        return named if any(named[key] is not item for key, item in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [finite(item) for item in value]
        return items if any(one is not other for one, other in zip(items, value, strict=True)) else value
    return value


def plain(value: Any) -> Any:
    """What stands in JSON for a value that it cannot represent: text for bytes, an exact decimal, a date or a duration; the
    numbers of NumPy's scalars and arrays."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return dumps(value, sort_keys=True)
