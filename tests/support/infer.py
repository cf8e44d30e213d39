"""The main job in this process, and the rows that tests give it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from pipeline.configuration.compose import compose
from pipeline.run import Outcome, run


def ask(text: str, **more: Any) -> dict[str, Any]:
    """A one-turn conversation row."""
    return {"messages": [{"role": "user", "content": text}], **more}


class Infer:
    """`infer(dataset, "key=value", …)` runs the main job, with engine=echo if not told otherwise; keeps what it printed."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.printed = ""

    def __call__(self, dataset: Any, *overrides: str, engine: str = "echo") -> Outcome:
        base = [f"engine={engine}", f"dataset.path={dataset}", f"output.path={self.out}", "run.flush_s=0.2"]
        console = Console(file=io.StringIO(), width=200)
        try:
            return run(compose([*base, *overrides]), console)
        finally:
            self.printed = console.file.getvalue()  # type: ignore[attr-defined]
            assert "report.html could not" not in self.printed  # it costs no run, but it is a bug

    def table(self) -> pa.Table:
        return pa.concat_tables(pq.read_table(path) for path in sorted((self.out / "data").glob("*.parquet")))

    def rows(self) -> list[dict[str, Any]]:
        return self.table().to_pylist()
