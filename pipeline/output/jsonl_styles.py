"""The styles of JSONL output lines. `eagleray` is the row unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

OutputRow = Mapping[str, Any]


def eagleray(row: OutputRow) -> OutputRow:
    """The row unchanged."""
    return row


def openai_batch(row: OutputRow) -> OutputRow:
    """A line of an OpenAI batch output file. `vllm run-batch` writes the same form."""
    error = row["error"]
    if error is not None:
        failure: dict[str, Any] = {"error": {"message": error["message"], "type": error["type"], "code": error["status"]}}
        response = {"status_code": error["status"] or 500, "request_id": row["id"], "body": failure}
        return {"id": f"batch_req_{row['index']}", "custom_id": row["id"], "response": response,
                "error": {"code": error["type"], "message": error["message"]}}  # fmt: skip
    choices = row.get("choices") or [
        {"message": row["messages"][-1], "finish_reason": row["finish_reason"], "logprobs": row.get("logprobs")}
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
    response = {"status_code": 200, "request_id": row["id"], "body": body}
    return {"id": f"batch_req_{row['index']}", "custom_id": row["id"], "response": response, "error": None}


def oumi(row: OutputRow) -> OutputRow:
    """An Oumi conversation. All columns other than its messages go into its metadata."""
    rest = {name: value for name, value in row.items() if name not in ("id", "messages", "conversation_id", "metadata")}
    own = row.get("metadata")
    metadata = {**(own if isinstance(own, Mapping) else {}), "eagleray": rest}
    return {"conversation_id": row["id"], "messages": row["messages"], "metadata": metadata}


STYLES: dict[str, Callable[[OutputRow], OutputRow]] = {"eagleray": eagleray, "openai_batch": openai_batch, "oumi": oumi}
