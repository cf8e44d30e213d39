"""A dataset of questions for the echo engine, and what its output must be."""

from __future__ import annotations

import contextlib
import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger_index import read_index
from tests.support.infer import ask


def write(path: Path, rows: int) -> Path:
    path.write_text("".join(json.dumps(ask(f"question {i}", id=f"r{i}")) + "\n" for i in range(rows)))
    return path


def check(out: Path, rows: int) -> dict[str, Any]:
    """Every row is there once, in order, answered. Returns the manifest."""
    table = pq.read_table(out / "data")
    assert table["id"].to_pylist() == [f"r{i}" for i in range(rows)]
    assert table["index"].to_pylist() == list(range(rows))
    assert table["response"].to_pylist() == [f"question {i}" for i in range(rows)]
    assert table["error"].null_count == rows
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return manifest


def durable(out: Path) -> int:
    """How many rows the ledger has; 0 before there is one."""
    with contextlib.suppress(FileNotFoundError):
        return len(read_index(*resolve(str(out))))
    return 0


def snapshot(root: Path) -> dict[str, Any]:
    """Every file and link below a directory, with its bytes or target."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in [*files, *folders]:
            path = Path(folder, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = str(path.readlink())
            elif path.is_file():
                found[key] = path.read_bytes()
    return found


def figure(page: str, label: str) -> str:
    """What stands in the tile of that label."""
    found = re.search(rf"<dt>{re.escape(label)}</dt><dd>(.*?)</dd>", page)
    assert found, label
    return unescape(found[1])
