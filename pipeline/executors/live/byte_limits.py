"""Limits in bytes, in addition to limits in rows: a row may be a short question or hold images of many megabytes.

Each limit admits at least one row. The processes need a few times as much memory as these limits: a row in an engine exists
as JSON, as Python objects and as the body of a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engines.types import Choice, Completion

# Rows that the dispatcher holds ready, and their bytes.
BUFFER_ROWS, BUFFER_BYTES = 8 * 1024, 64 << 20
# Rows of one lease.
LEASE_BYTES = 16 << 20
# Rows that all workers hold. The dispatcher keeps them until they are durable. Workers get equal parts.
LEASED_BYTES = 512 << 20
# Rows that one worker holds, and the part of them in its engine.
HELD_BYTES, ENGINE_BYTES = 192 << 20, 128 << 20
# Results of SEGMENT_BYTES are written at once, before `run.flush_s`. While more than UNWRITTEN_BYTES wait, no row enters
# the engine.
SEGMENT_BYTES, UNWRITTEN_BYTES = 16 << 20, 96 << 20

# Bytes of a result in addition to its texts, and of one alternative of `logprobs`.
_RECORD_BYTES, _LOGPROB_BYTES = 200, 100


def count_within(sizes: Iterable[int], limit: float) -> int:
    """The number of leading items that together have up to `limit` bytes; at least 1, if there is an item."""
    count = total = 0
    for size in sizes:
        total += size
        if total > limit and count:
            break
        count += 1
    return count


def result_bytes(completion: Completion) -> int:
    """The approximate bytes of memory that a result takes."""
    size = _RECORD_BYTES + len(completion.reasoning or "")
    size += sum(map(_choice_bytes, completion.choices))
    if completion.values:
        size += sum(map(_value_bytes, completion.values.values()))
    return size + (sum(map(_text_bytes, completion.dialogue)) if completion.dialogue else 0)


def _value_bytes(value: Any) -> int:
    """The bytes of a value of a task other than a chat: an array, or a list of numbers or of objects with a few."""
    return value.nbytes if hasattr(value, "nbytes") else len(value) * _LOGPROB_BYTES if isinstance(value, list) else 8


def _choice_bytes(choice: Choice) -> int:
    content = choice.message.get("content")
    size = len(content) if len(choice.message) == 2 and type(content) is str else _text_bytes(choice.message)
    if choice.logprobs:
        size += len(choice.logprobs) * (1 + len(choice.logprobs[0].get("top_logprobs") or ())) * _LOGPROB_BYTES
    return size


def _text_bytes(value: Any) -> int:
    """The characters of all texts in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_bytes, value.values()))
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0
