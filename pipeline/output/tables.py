"""The tables of data/ and errors/, made of input rows and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from engines.tasks import CHAT
from engines.types import answer, text_of
from pipeline.dataset.arrow_rows import to_values
from pipeline.dataset.column_types import input_name
from pipeline.dataset.formats import OUTPUT_COLUMNS, REFERENCE, Parsed
from pipeline.output.answer_columns import answer_arrays
from pipeline.output.answers import FoundAnswers
from pipeline.output.input_rows import InputRows
from pipeline.output.plan import OutputColumns
from pipeline.storage.exact_json import dumps, loads
from pipeline.storage.ledger import ERROR


def data_table(rows: InputRows, own: pa.Table, answers: FoundAnswers, index: int, columns: OutputColumns) -> pa.Table:
    """The table with all rows. `index`: the position of the first row in the whole input."""
    schema, completions = columns.data_schema, answers.completions
    found: dict[str, Any] = {
        "id": pa.array([item.id for item in rows.items], pa.string()),
        "index": pa.array(np.arange(index, index + len(rows))),
        "messages": _messages(rows, completions),
    }
    found.update({c.name: own[c.source] for c in columns.own if c.name is not None})
    given = set(schema.names) & set(OUTPUT_COLUMNS) & set(completions.column_names)
    found.update({name: completions[name] for name in given})
    found.update({name: completions[name].cast(kind) for name, kind in columns.values.items()})
    if columns.references:
        references = [item.parsed.reference if item.parsed else None for item in rows.items]
        found[REFERENCE] = pa.array(references, pa.string())
    if columns.answers:  # a failed row has no response
        found.update(answer_arrays(columns.answers, to_values(completions["response"])))
    return pa.table([found[name] for name in schema.names], schema=schema)


def error_table(rows: InputRows, own: pa.Table, answers: FoundAnswers, columns: OutputColumns) -> pa.Table:
    """The failed rows with the input's own columns under their own names, so that they can be run again, and the error."""
    wrong = np.flatnonzero(answers.failed)
    found: dict[str, Any] = {}
    if "id" not in own.column_names:
        found["id"] = pa.array([rows.items[row].id for row in wrong], pa.string())
    own = rows.columns_of(wrong, own, columns.own)
    for name, renamed in error_names(own.column_names).items():
        found[renamed] = own[name]
    if columns.raw and "raw" not in found:
        raw = [(rows.items[row].row.raw or b"").decode("utf-8", "backslashreplace") or None for row in wrong]
        found["raw"] = pa.array(raw, pa.string())
    found["error"] = answers.completions["error"].take(pa.array(wrong)).cast(ERROR)
    return pa.table(found)


def error_names(names: Sequence[str]) -> dict[str, str]:
    """The names in errors/ of the input's own columns. Only `error` gets another one."""
    return {name: input_name(name, names) if name == "error" else name for name in names}


def _messages(rows: InputRows, completions: pa.Table) -> pa.Array:
    """The conversations, with the answers of chats appended."""
    failed = np.asarray(completions["error"].is_valid()).tolist()
    more = (to_values(completions[name]) for name in ("dialogue", "response", "tool_calls", "message_fields"))
    given = zip(rows.items, failed, *more, strict=True)
    return pa.array([_conversation(item.parsed, *answered) for item, *answered in given], pa.string())


def _conversation(
    parsed: Parsed | None, failed: bool, dialogue: str | None, text: str | None, calls: str | None, more: str | None
) -> bytes | None:
    """The messages of a row, the turns after them, and the answer of a chat, as JSON. None if the row has none."""
    if parsed is None or not parsed.messages:
        return None
    messages = dumps(parsed.messages)
    if dialogue is not None:
        messages = messages[:-1] + b"," + dialogue[1:].encode()
    if failed or parsed.task != CHAT:
        return messages
    reply: Any = {**answer(text, loads(calls.encode()) if calls else None), **(loads(more.encode()) if more else {})}
    if parsed.continue_answer:  # the beginning and its continuation are one message
        before = loads(messages)
        before[-1] |= {**reply, "content": (text_of(before[-1]) or "") + (text or "")}
        return dumps(before)
    return messages[:-1] + b"," + dumps(reply) + b"]"
