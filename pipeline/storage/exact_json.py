"""JSON without loss of values. Uses orjson, and the standard library for values that orjson rounds or refuses."""

from __future__ import annotations

import base64
import itertools
import json
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
    # A value has at least as many brackets as levels. Counting brackets is cheap and settles it for most rows.
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
    """Raises `ValueError` for half of a UTF-16 pair: UTF-8 cannot encode it for a file or a model."""
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
    """Compact UTF-8 JSON with integers of any size. `plain` converts values that JSON cannot represent."""
    try:
        return orjson.dumps(value, default=plain, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:  # an integer beyond 64 bits
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys, default=plain)
        return text.encode()


def plain(value: Any) -> Any:
    """Text for a value that JSON cannot represent: bytes, an exact decimal, a date, a duration."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys: equal values give equal bytes."""
    return dumps(value, sort_keys=True)
