"""Response formats that constrain an answer, each with the pattern that the answer must match."""

from __future__ import annotations

from typing import Any

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
STRUCTURES: list[tuple[dict[str, Any], str]] = [
    ({"type": "regex", "regex": "[a-z]{3}-[0-9]{2}"}, r"[a-z]{3}-[0-9]{2}"),
    ({"type": "choice", "choice": ["Rome", "Oslo"]}, "Rome|Oslo"),
    ({"type": "grammar", "grammar": 'root ::= "yes" | "no"'}, "yes|no"),
    ({"type": "json_schema", "json_schema": {"schema": SCHEMA}}, r'\s*{\s*"n"\s*:\s*-?\d+\s*}\s*'),
]
