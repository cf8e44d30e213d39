"""The styles of JSONL output lines. `eagleray` is the row unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engines.errors import EngineError
from engines.tasks import CHAT
from pipeline.dataset.task_inputs import body_inputs
from pipeline.dataset.values import json_value
from pipeline.output.openai_bodies import values_body

OutputRow = Mapping[str, Any]
# Takes a row of the output, its task, and its columns in the input.
Style = Callable[..., OutputRow]


def eagleray(row: OutputRow, task: str = CHAT, own: Mapping[str, Any] | None = None) -> OutputRow:
    """The row unchanged."""
    return row


def openai_batch(row: OutputRow, task: str = CHAT, own: Mapping[str, Any] | None = None) -> OutputRow:
    """A line of an OpenAI batch output file. `vllm run-batch` writes the same form."""
    error = row["error"]
    if error is not None:
        failure: dict[str, Any] = {"error": {"message": error["message"], "type": error["type"], "code": error["status"]}}
        response = {"status_code": error["status"] or 500, "request_id": row["id"], "body": failure}
        return {"id": f"batch_req_{row['index']}", "custom_id": row["id"], "response": response,
                "error": {"code": error["type"], "message": error["message"]}}  # fmt: skip
    if task != CHAT:
        return _line(row, _values_body(row, task, own or {}))
    message = {**row["messages"][-1], "content": row["response"]}  # only the new text, not the beginning that it continues
    choices = row.get("choices") or [
        {"message": message, "finish_reason": row["finish_reason"], "logprobs": row.get("logprobs")}
    ]
    usage = row["usage"]
    body: dict[str, Any] = {
        "id": f"chatcmpl-{row['index']}",
        "object": "chat.completion",
        "model": row["model"],
        "choices": [
            {
                "index": at,
                "message": choice["message"],
                "finish_reason": choice["finish_reason"],
                "logprobs": {"content": choice["logprobs"]} if choice.get("logprobs") else None,
            }
            for at, choice in enumerate(choices)
        ],
        "usage": usage
        and {
            "prompt_tokens": usage["input"],
            "completion_tokens": usage["output"],
            "total_tokens": usage["input"] + usage["output"],
            "prompt_tokens_details": {"cached_tokens": usage["cached_input"]},
            "completion_tokens_details": {"reasoning_tokens": usage["reasoning"] or 0},
        },
    }
    return _line(row, body)


def _values_body(row: OutputRow, task: str, own: Mapping[str, Any]) -> dict[str, Any]:
    try:
        asked = json_value(own.get("body"), "body", dict)
    except EngineError:  # not the line of a batch file
        asked = {}
    try:
        inputs = asked | body_inputs(task, asked)[1]
    except EngineError:
        inputs = asked | own
    url = str(own.get("url") or "")
    return values_body(task, row["index"], row, inputs, row["model"], row["usage"], url, asked.get("encoding_format"))


def _line(row: OutputRow, body: dict[str, Any]) -> OutputRow:
    response = {"status_code": 200, "request_id": row["id"], "body": body}
    return {"id": f"batch_req_{row['index']}", "custom_id": row["id"], "response": response, "error": None}


def oumi(row: OutputRow, task: str = CHAT, own: Mapping[str, Any] | None = None) -> OutputRow:
    """An Oumi conversation. All columns other than its messages go into its metadata."""
    rest = {name: value for name, value in row.items() if name not in ("id", "messages", "conversation_id", "metadata")}
    own = row.get("metadata")
    metadata = {**(own if isinstance(own, Mapping) else {}), "eagleray": rest}
    return {"conversation_id": row["id"], "messages": row["messages"] or [], "metadata": metadata}


STYLES: dict[str, Style] = {"eagleray": eagleray, "openai_batch": openai_batch, "oumi": oumi}
