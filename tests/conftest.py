"""Fixtures: one Ray for the whole session, and a way to run the main job in this process."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.compose import compose
from pipeline.run import Outcome, run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none; `-rs`, in pyproject.toml, lists them."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and shutil.which("nvidia-smi") is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and nvidia-smi finds none here"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


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


@pytest.fixture
def infer(local_ray: None, tmp_path: Path) -> Infer:
    return Infer(tmp_path / "out")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "in.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def ask(text: str, **more: Any) -> dict[str, Any]:
    """A one-turn conversation row."""
    return {"messages": [{"role": "user", "content": text}], **more}
