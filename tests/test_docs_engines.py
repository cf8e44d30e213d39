"""The examples of docs/engines.md and docs/adding-an-engine.md: local models are loaded, servers and providers are asked on
loopback, what needs a GPU is composed only (in test_docs.py)."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engines
from engines import load_engine
from engines.config import config_from_keys
from engines.registry import HTTP_ENGINES, REGISTRY, capabilities_of, engine_class
from jobs import infer
from pipeline.configuration.compose import compose
from tests.support.batch_server import BatchServer
from tests.support.checkpoint import adapter_dir, checkpoint_dir
from tests.support.google_account import google_account
from tests.support.infer import ask
from tests.support.marks import slow
from tests.support.pages import PAGES, ROOT, Block, Command, blocks, commands
from tests.support.provider_server import ProviderServer

ENGINES, ADDING = ROOT / "docs" / "engines.md", ROOT / "docs" / "adding-an-engine.md"
REMOTE = {*HTTP_ENGINES, "bedrock"}
CLASSES = {name: kind for kind, name in HTTP_ENGINES.items()} | {
    entry.target.partition(":")[2]: kind for kind, entry in REGISTRY.items() if kind not in HTTP_ENGINES
}
KEY = "sk-of-some-length-0123456789"
# A small cache and no compilation: vLLM's CPU build is loaded several times here.
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20}
LOCAL = {"transformers": "transformers", "vllm": "vllm", "llamacpp": "llama_cpp", "echo": "json"}


def kind_of(command: Command) -> str:
    given = re.search(r"\bengine=(\w+)", command.text)
    return given[1] if given else "llamacpp"


def slow_with_vllm(example: Block | Command) -> Any:
    starts_vllm = "engine=vllm" in example.text or re.search(r"\bVLLMEngine\(", example.text)
    return slow(example) if starts_vllm else example


def need(text: str) -> None:
    for kind, package in LOCAL.items():
        if (f"engine={kind}" in text or next(n for n, k in CLASSES.items() if k == kind) in text) and (
            importlib.util.find_spec(package) is None
        ):
            pytest.skip(f"{package} is not installed here")


def with_real_paths(text: str) -> str:
    if "path/to/checkpoint" in text:
        text = text.replace("path/to/checkpoint", str(checkpoint_dir()))
    if "path/to/lora" in text:
        text = text.replace("path/to/lora", str(adapter_dir()))
    return text


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in REMOTE:
        if variable := config_from_keys(kind, {}).api_key_env:
            monkeypatch.setenv(variable, KEY)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GROQ_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("PROJECT_ID", "p")
    monkeypatch.setenv("REGION", "r")
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


# -- commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",  # test_transformers.py and other commands of the page cover the slow ones
    [
        slow(c) if "engine=transformers" in c.text or c.text.endswith("out/llamacpp") else slow_with_vllm(c)
        for c in commands(ENGINES)
        if c.runs
    ],
    ids=str,
)
def test_commands_with_local_engines_run(command: Command, local_ray: None, tmp_path: Path) -> None:
    need(command.text)
    text = with_real_paths(command.text)
    small = [f"engine.kwargs.{name}={value}" for name, value in SMALL.items()] if kind_of(command) == "vllm" else []
    args = [arg for arg in Command("", text).overrides if not arg.startswith("output.path=")]
    assert infer.main([*args, *small, f"output.path={tmp_path}/out", "generation.max_tokens=8"]) in (0, 3)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rows"]["done"] > 2
    assert manifest["engine"]["kind"] == kind_of(command)


ASKED = [
    c
    for page in PAGES
    for c in commands(page)
    if c.job == "infer" and c.language != "sh" and kind_of(c) in REMOTE and "--config-dir" not in c.text
]


def test_every_remote_engine_has_an_example() -> None:
    assert {kind_of(command) for command in ASKED if command.page == "engines.md"} == REMOTE


@pytest.mark.parametrize("command", ASKED, ids=str)
def test_commands_with_remote_engines_are_answered(command: Command, server: ProviderServer, tmp_path: Path) -> None:
    config = compose(command.overrides)
    with google_account(tmp_path) if kind_of(command) == "vertex" else contextlib.nullcontext((None, None)) as (account, _):
        kwargs = {**config.engine.kwargs, "credentials": str(account)} if account else config.engine.kwargs
        with load_engine(dataclasses.replace(config.engine, base_url=server.url, kwargs=kwargs)) as engine:
            (done,) = engine.infer([ask("Hello")], config.params())
    assert (done.text, done.error, done.engine) == ("Hello", None, kind_of(command))
    if kind_of(command) != "bedrock":  # there it is in the path
        wanted = {config.engine.model, config.engine.adapter, f"{config.engine.model}:{config.engine.adapter}"}
        assert server.requests[-1].body["model"] in wanted


# -- programs -----------------------------------------------------------------------------------------------------------

# test_notebook.py runs docs/python.md, whose programs are the cells of one notebook. test_serve_tasks.py runs
# docs/serving.md, and test_howto.py those after it.
OTHERS = (
    ADDING.name, "python.md", "serving.md", "score-a-table.md", "from-ray-data-llm.md", "tasks.md", "deduplicate.md",
    "perplexity-filter.md", "best-of-n.md", "quality-classifier.md",
)  # fmt: skip
PROGRAMS = [b for page in PAGES for b in blocks(page) if b.language == "python" and page.name not in OTHERS]


@pytest.mark.parametrize("block", map(slow_with_vllm, PROGRAMS), ids=str)
def test_programs_run(block: Block, server: ProviderServer, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in CLASSES if re.search(rf"\b{name}\(", block.text)]
    if "oumi" in block.text:
        ast.parse(block.text)
        return
    if "tensor_parallel_size" in block.text:  # GPUs
        check_only(block)
        return
    need(block.text)
    text = with_real_paths(block.text)
    if "VLLMEngine(model=" in text and "Remote" not in text:
        text = text.replace("kwargs={", f"kwargs={{**{SMALL}, ")
    with BatchServer() if "infer_batch" in text else contextlib.nullcontext(server) as asked:
        for name in names:
            if CLASSES[name] in REMOTE:
                text = re.sub(r', base_url="[^"]*"', "", text)
                text = text.replace(f"{name}(", f'{name}(base_url="{asked.url}", ')
        exec(compile(text, str(block), "exec"), {})
    said = capsys.readouterr().out
    assert said.strip()
    assert "Failure(" not in said


def check_only(block: Block) -> None:
    """Every engine of the program could be made: its class exists, its keys are known."""
    found = 0
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES:
            assert hasattr(engines, node.func.id) or importlib.util.find_spec(LOCAL[CLASSES[node.func.id]]) is None
            config_from_keys(
                CLASSES[node.func.id], {word.arg or "": ast.literal_eval(word.value) for word in node.keywords}
            )
            found += 1
    assert found


def test_the_capabilities_of_an_engine_are_known_without_its_library() -> None:
    """The registry has them, for the library of a local engine need not be here."""
    for kind, package in LOCAL.items():
        found = capabilities_of(config_from_keys(kind, {}))
        if importlib.util.find_spec(package) is not None:
            able = engine_class(kind).capabilities
            assert found.tasks <= able.tasks  # those of the configured model
            assert dataclasses.replace(found, tasks=able.tasks) == able


# -- adding one ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_added_as_the_page_says_runs(tmp_path: Path) -> None:
    found = blocks(ADDING)
    module = next(b.text for b in found if b.language == "python")
    line = next(b.text for b in found if "engines.parrot:ParrotEngine" in b.text and b.language == "")
    (yaml_file,) = [b.text for b in found if b.language == "yaml"]
    (command,) = commands(ADDING)
    for package in ("engines", "pipeline", "jobs", "conf", "docs/examples"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "engines" / "parrot.py").write_text(module)
    (tmp_path / "conf" / "engine" / "parrot.yaml").write_text(yaml_file)
    base = tmp_path / "engines" / "registry.py"
    text = base.read_text()
    opening = "REGISTRY: dict[str, EngineKind] = {\n"
    assert opening in text
    base.write_text(text.replace(opening, opening + line))
    (tmp_path / "words.json").write_text('{"legs": "wings"}')
    run = [sys.executable, "-m", "jobs.infer", *command.overrides, "engine.kwargs.pause_s=0.01"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "out" / "parrot" / "data").to_pylist()
    assert [row["response"] for row in rows][:1] == ["How many wings has a spider?"]
    refused = subprocess.run([*run, "generation.seed=1"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "generation.seed is not supported by engine=parrot" in refused.stderr
