"""Fixtures: one Ray for the whole session, and a way to run the main job in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.infer import Infer
from tests.support.provider_server import ProviderServer

if TYPE_CHECKING:
    from tests.support.length_executor import Job, LengthExecutor
    from tests.support.s3_server import S3Server

# Without a deadline: the time of one example depends on what else the machine does.
settings.register_profile("eagleray", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("eagleray")

# These take longest: pytest-xdist gives a worker a whole file, and the last file must not be a long one.
LONGEST = (
    "test_vllm", "test_losses", "test_batch", "test_transformers", "test_stores", "test_servers", "test_serve", "test_kill",
    "test_jobs", "test_cluster", "test_llamacpp", "test_docs", "test_docs_engines", "test_howto", "test_pipeline",
    "test_inspect", "test_report",
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

    from pipeline.executors.live.ray_processes import end_processes, few_processes

    def begin() -> None:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    with few_processes():
        try:
            begin()
        except Exception:  # Ray's patience of half a minute may be too short on a busy machine; a run tries twice, too
            ray.shutdown()
            begin()
    yield
    end_processes()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    from tests.support.s3_server import S3Server  # moto takes a second to import

    for name, value in S3Server.environment.items():
        monkeypatch.setenv(name, value)
    with S3Server() as server:
        yield server


@pytest.fixture
def infer(local_ray: None, tmp_path: Path) -> Infer:
    return Infer(tmp_path / "out")


@pytest.fixture
def length() -> Iterator[type[LengthExecutor]]:
    """`run.mode=length`, of this test only."""
    from pipeline.executors import registry
    from tests.support.length_executor import LengthExecutor

    kind = type("Length", (LengthExecutor,), {"passes": []})
    registry.register("length", kind)
    yield kind
    registry.unregister("length")


@pytest.fixture
def job(tmp_path: Path, length: type[LengthExecutor], monkeypatch: pytest.MonkeyPatch) -> Job:
    """Runs the main job in `run.mode=length`. A start of Ray fails the test."""
    from tests.support.length_executor import Job

    def fail() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipeline.executors.live.cluster.running_ray", fail)
    return Job(tmp_path / "out")


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


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium. Without it, a test is skipped, and fails in CI."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        reason = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("EAGLERAY_NEEDS_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    flags += " disable-component-update disable-sync disable-dev-shm-usage"
    for flag in [*flags.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver_ = Chrome(options=options, service=Service(driver))
    driver_.set_page_load_timeout(120)
    driver_.set_script_timeout(240)
    yield driver_
    driver_.quit()
