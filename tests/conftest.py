"""Fixtures: one Ray for the whole session, and a way to run the main job in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.infer import Infer
from tests.support.provider_server import ProviderServer

# These take longest: pytest-xdist gives a worker a whole file, and the last file must not be a long one.
LONGEST = (
    "test_vllm", "test_losses", "test_batch", "test_transformers", "test_stores", "test_servers", "test_serve", "test_kill",
    "test_jobs", "test_cluster", "test_llamacpp", "test_docs", "test_docs_engines", "test_pipeline", "test_inspect",
    "test_report",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first. Tests that need a GPU are skipped where there is none, which `-rs` lists."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))  # stable: the order in a file stays
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and nvidia-smi finds none here"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


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


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    """A provider on loopback, of this test only. A file that needs another one has a fixture of the same name."""
    with ProviderServer() as running:
        yield running
