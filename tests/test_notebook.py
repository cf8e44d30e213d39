"""docs/python.md, cell by cell, in a real Jupyter kernel. Only the first run starts a Ray of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
# Before the first cell: the package `eagleray` of this directory, whichever one is installed.
SETUP = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("eagleray", {str(ROOT / "pipeline/eagleray/__init__.py")!r})
eagleray = sys.modules["eagleray"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(eagleray)
"""
# After the first run: it has ended the Ray that it started.
RAY = """
import ray
assert not ray.is_initialized()
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
"""


def texts(cell: Any, kind: str = "text/plain") -> str:
    return "\n".join(output.text if "text" in output else output.data.get(kind, "") for output in cell.outputs)


@pytest.mark.slow
def test_the_page_runs_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    programs = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.DOTALL | re.MULTILINE)
    cells = (SETUP, *programs[:2], RAY, *programs[2:], "print(ray.is_initialized())")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()
    _, first, table, _, frame, wrong, again, end = notebook.cells
    shown = first.outputs[-1].data["text/html"]
    assert "2 of 3 rows done, 1 failed" in shown and "What is the capital of France?" in shown
    assert "out/python/report.html" in shown
    assert not any(line in texts(first) for line in ("starting Ray", "rows/s")), "the progress line goes away"
    assert "['What is the capital of France?', 'Name three rivers.', None]" in texts(table)
    assert "2 done, 1 failed" in texts(table) and "q3" in texts(table)
    assert "Is this review positive? It broke." in texts(frame, "text/html")
    assert "there is no key 'generation.max_token' (did you mean 'generation.max_tokens'?)" in texts(wrong)
    assert texts(again).splitlines()[-1] == "0 requests were sent"
    assert texts(end) == "True\n"
