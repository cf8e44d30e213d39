"""`engine=sglang_offline`: how its server is started, asked, and ended. SGLang itself needs a GPU: tests/test_gpu.py."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from engines import ConfigError, Engine, Request, load_engine
from engines.config import EngineConfig
from engines.params import GenerationParams
from engines.usage import Usage
from pipeline.executors.live.placement import placement
from pipeline.hardware import HardwareConfig
from tests.support.processes import gone, until
from tests.support.sglang_server import install

ROOT = Path(__file__).parent.parent


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    install(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(**keys: object) -> Engine:
        return load_engine("sglang_offline", **{"model": "some/model", **keys})

    return load


def told(engine: Engine, **row: object) -> dict:
    import json

    (completion,) = engine.infer([{"messages": [{"role": "user", "content": "Hi"}], **row}])
    assert completion.error is None, completion.error
    assert completion.model == "some/model"
    assert completion.engine == "sglang_offline"
    return json.loads(completion.text or "")


def test_keywords_become_flags_and_rows_are_asked_greedily_and_bounded(start: Callable[..., Engine]) -> None:
    override = {"rope_theta": 1000}
    kwargs = {"tensor_parallel_size": 2, "json_model_override_args": override, "chat_template": None}
    with start(kwargs=kwargs) as engine:
        found = told(engine)
        assert found["flags"]["model_path"] == "some/model"
        assert found["flags"]["tensor_parallel_size"] == "2"
        assert found["flags"]["json_model_override_args"] == '{"rope_theta": 1000}'
        assert not found["flags"]["enable_lora"]
        assert engine.cost(Usage(10, 0, 5), None) == 0.0  # it runs here, so it is free without a price
        assert found["body"]["temperature"] == 0
        assert found["body"]["max_tokens"] == 1024
        assert told(engine, generation={"temperature": 0.5, "max_tokens": 3})["body"]["max_tokens"] == 3


def test_adapters_go_by_name(start: Callable[..., Engine]) -> None:
    with start(adapter="some/adapter", kwargs={"lora_paths": ["adapter=some/adapter", "other=some/other"]}) as engine:
        found = told(engine)
        assert found["flags"]["enable_lora"]
        assert found["body"]["model"] == "some/model:adapter"
        assert told(engine, adapter="some/adapter")["body"]["model"] == "some/model:adapter"
        assert told(engine, adapter="other")["body"]["model"] == "some/model:other"


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"tensor_paralel_size": 2}, "unrecognized arguments: --tensor-paralel-size 2"),
        ({"port": 1}, "engine.kwargs.port is set by engine=sglang_offline itself"),
    ],
)
def test_flags_that_do_not_go_are_named(start: Callable[..., Engine], kwargs: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        start(kwargs=kwargs)


def test_what_the_server_cannot_start_for_is_told(start: Callable[..., Engine]) -> None:
    from engines.errors import EngineError

    with pytest.raises(EngineError, match="cannot start: ValueError: there is no template of that name") as error:
        start(kwargs={"chat_template": "broken"})
    assert error.value.type == "engine_crash"  # another node may do


def test_a_server_that_dies_takes_the_rows_in_it_with_it_at_once(start: Callable[..., Engine]) -> None:
    async def ask(engine: Engine) -> list:
        rows = [Request([{"role": "user", "content": text}], GenerationParams()) for text in ("wait", "wait", "die")]
        return await asyncio.gather(*(engine.generate(row) for row in rows))

    with start() as engine:
        for completion in asyncio.run(ask(engine)):
            assert completion.error.type == "engine_crash"
            assert completion.error.message == "SGLang died: RuntimeError: out of memory"
        (later,) = engine.infer([{"messages": [{"role": "user", "content": "Hi"}]}])
        assert later.error is not None
        assert later.error.type == "engine_crash"


def test_nothing_stays_when_the_engine_is_closed_or_its_process_killed(start: Callable[..., Engine]) -> None:
    with start() as engine:
        helper = told(engine)["helper"]
        assert psutil.pid_exists(helper)
    until(lambda: gone(helper))

    code = """
import json, sys, time
from engines import load_engine
engine = load_engine("sglang_offline", model="some/model")
(found,) = engine.infer([{"messages": [{"role": "user", "content": "Hi"}]}])
print(json.loads(found.text)["helper"], flush=True)
time.sleep(1000)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    helper = int(owner.stdout.readline())
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    until(lambda: gone(helper))


def test_its_parallel_sizes_reserve_gpus() -> None:
    sizes = {"tensor_parallel_size": 4}
    found = placement(HardwareConfig(gpus=None), EngineConfig(kind="sglang_offline", kwargs=sizes))
    assert sum(bundle.get("GPU", 0) for bundle in found.bundles) == 4
