"""JSON that keeps every value: orjson where it is exact, the standard library for what orjson rounds or refuses."""

from __future__ import annotations

import base64
import itertools
import json
from typing import Any

import orjson

# orjson writes 254 levels at most; what we add around a row needs a few of them.
MAX_DEPTH = 200

# orjson reads integers beyond 64 bits as floats; every one of them has a run of 19 digits.
_TO_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * 19


def has_long_number(data: bytes) -> bool:
    """Whether orjson may round an integer in `data`; costs less than a tenth of parsing it."""
    return _LONG_NUMBER in data.translate(_TO_ZEROS)


def loads(data: bytes, long_number: bool = True) -> Any:
    """JSON without loss: integers of any size, `NaN` and `Infinity` as floats; of a repeated key the last wins.

    `long_number` False promises that `has_long_number` is false. Raises `ValueError` with a one-line reason.
    """
    try:
        value = orjson.loads(data)
        if long_number and has_long_number(data):
            value = json.loads(data.decode())
    except (ValueError, RecursionError):
        value = _parse_slowly(data)
    # As many brackets as levels at least; counting them is cheap, and most rows have few.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _too_deep(value):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return value


def _parse_slowly(data: bytes) -> Any:
    """The standard library accepts a little more than orjson, and says what is wrong in better words."""
    try:
        value = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}") from None
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    except ValueError:  # Python refuses to convert very long integers, because that takes quadratic time
        raise ValueError("an integer of more than 4,300 digits") from None
    if b"\\ud" in data or b"\\uD" in data:
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: Any) -> None:
    """Half a UTF-16 pair is no character: it cannot be written as UTF-8, to a file or to a model."""
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
    """Compact UTF-8 JSON of any integers; see `plain` for what JSON has no form of."""
    try:
        return orjson.dumps(value, default=plain, option=orjson.OPT_SORT_KEYS if sort_keys else None)
    except TypeError:  # an integer beyond 64 bits
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort_keys, default=plain)
        return text.encode()


def plain(value: Any) -> Any:
    """JSON has no bytes, exact decimals, dates or durations; all become text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def canonical(value: Any) -> bytes:
    """JSON that is equal for equal values, whatever the order of their keys."""
    return dumps(value, sort_keys=True)
