"""Errors have codes: each is used, leads to a section of the docs that exists, and survives the way through pickle."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import get_args

import pytest

from engines.errors import ConfigError, EaglerayError, EngineError, ErrorCode, ErrorType, Outage, docs_link
from pipeline.errors import EnginesDied, Interrupted, Stopped
from tests.support.pages import leads_somewhere

ROOT = Path(__file__).parent.parent
PACKAGES = ("engines", "pipeline", "jobs")


@pytest.mark.parametrize("code", [*ErrorCode, *get_args(ErrorType)])
def test_each_code_has_its_section_in_the_docs(code: str) -> None:
    assert leads_somewhere(docs_link(code)), code


def used_codes() -> set[str]:
    """Names of `ErrorCode` members that some module reads."""
    found = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ErrorCode":
                    found.add(node.attr)
    return found


def test_no_code_is_unused() -> None:
    assert {code.name for code in ErrorCode} == used_codes()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), "configuration"),
        (ConfigError("x", code=ErrorCode.OUTPUT_BUSY, key="output.path"), "output-busy"),
        (Outage("x"), "server-outage"),
        (Stopped("x"), "stopped"),
        (EnginesDied("x"), "engines-died"),
        (Interrupted("x"), "interrupted"),
        (EngineError("timeout", "x"), "timeout"),
        (EngineError("invalid_input", "x", code=ErrorCode.UNKNOWN_PARAMETER, key="generation"), "unknown-parameter"),
    ],
)
def test_codes_survive_pickling(error: EaglerayError, code: str) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert (there.code, there.key, str(there)) == (code, error.key, "x")
    assert docs_link(there.code) == docs_link(error.code)
