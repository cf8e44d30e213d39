"""The tables of data/ and errors/, made of input rows and their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from engines.types import answer
from pipeline.dataset.formats import OUTPUT_COLUMNS
from pipeline.output.answer_columns import answer_arrays
from pipeline.output.answers import FoundAnswers
from pipeline.output.input_rows import InputRows
from pipeline.output.plan import OutputColumns
from pipeline.storage.exact_json import dumps, loads
from pipeline.storage.ledger import ERROR


def data_table(rows: InputRows, own: pa.Table, answers: FoundAnswers, index: int, columns: OutputColumns) -> pa.Table:
    """Every row. `index` is the first row's in the whole input."""
    schema, completions = columns.data_schema, answers.completions
    found: dict[str, Any] = {
        "id": pa.array(rows.ids, pa.string()),
        "index": pa.array(np.arange(index, index + len(rows))),
        "messages": _messages(rows, completions),
    }
    found.update({c.name: own[c.source] for c in columns.own if c.name is not None})
    given = set(schema.names) & set(OUTPUT_COLUMNS) & set(completions.column_names)
    found.update({name: completions[name] for name in given})
    if columns.answers:  # a failed row has no response
        found.update(answer_arrays(columns.answers, completions["response"].to_pylist()))
    return pa.table([found[name] for name in schema.names], schema=schema)


def error_table(rows: InputRows, own: pa.Table, answers: FoundAnswers, columns: OutputColumns) -> pa.Table:
    """The failed rows with the input's own columns under their own names, so that they can be run again, and the error."""
    wrong = np.flatnonzero(answers.failed)
    take = pa.array(wrong)
    found: dict[str, Any] = {}
    if "id" not in own.column_names:
        found["id"] = pa.array([rows.ids[row] for row in wrong], pa.string())
    for name in own.column_names:
        found["input_error" if name == "error" else name] = own[name].take(take)
    if columns.raw and "raw" not in found:
        found["raw"] = pa.array([(rows.raw[row] or b"").decode("utf-8", "backslashreplace") or None for row in wrong])
    found["error"] = answers.completions["error"].take(take).cast(ERROR)
    return pa.table(found)


def _messages(rows: InputRows, completions: pa.Table) -> pa.Array:
    """The conversations, with the answers appended."""
    names = ("dialogue", "response", "tool_calls", "message_fields", "error")
    given = zip(rows.messages, *(completions[name].to_pylist() for name in names), strict=True)
    texts = [
        _with_answer(messages, turns, text, calls, more, error is None)
        for messages, turns, text, calls, more, error in given
    ]
    return pa.array(texts, pa.string())


def _with_answer(
    messages: bytes | None, dialogue: str | None, text: str | None, calls: str | None, more: str | None, answered: bool
) -> bytes | None:
    if messages is not None and dialogue is not None:
        messages = messages[:-1] + b"," + dialogue[1:].encode()
    if messages is None or not answered:
        return messages
    reply = dumps({**answer(text, loads(calls.encode()) if calls else None), **(loads(more.encode()) if more else {})})
    return messages[:-1] + b"," + reply + b"]"
