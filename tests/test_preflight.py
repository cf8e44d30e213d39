"""What is told before a run: dry runs that ask and write nothing, and runs that end at once where nothing could work."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
from rich.console import Console

from engines.errors import ConfigError
from pipeline.configuration.compose import compose
from pipeline.preflight import dry_run
from pipeline.run import Outcome, run
from pipeline.storage.lock import held, run_lock
from tests.support.checkpoint import smollm2_checkpoint  # noqa: F401
from tests.support.infer import Infer, ask
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
KEY = "sk-0123456789-a-key-that-nobody-may-see"


class Dry:
    """`dry(dataset, "key=value", …)`: the exit status and everything that was printed."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __call__(self, dataset: Any, *overrides: str, real: bool = False) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=200)
        base = [f"dataset.path={dataset}", f"output.path={self.out}", f"run.dry_run={not real}"]
        outcome: Outcome = run(compose([*base, *overrides]), console)
        return outcome.exit_status, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dry:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    # Whether packages and keys are missing is certain only where Ray is started here.
    monkeypatch.setattr("pipeline.preflight.checks.joins_a_cluster", lambda: False)
    return Dry(tmp_path / "out")


OPENAI = ["engine=openai", "engine.model=gpt-5.4-mini"]


# -- dry runs ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_rows_tokens_cost_and_output_and_touches_nothing(
    dry: Dry, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = [ask("x" * 3000, id="long"), ask("a"), ask("a"), ask("b"), "{", {"messages": []}]
    status, text = dry(write_jsonl(rows), *OPENAI, "generation.max_tokens=100", "generation.temperature=0")
    assert status == 3
    assert "6 rows in 1 file: 0 done, 2 invalid, 4 open: 3 requests to send, 1 duplicate." in text
    assert "in.jsonl:5: invalid JSON" in text and "in.jsonl:6: messages is empty" in text
    assert "tokens out  at most 300" in text
    assert "cost        at most $0.0019 by the list price of 2026-" in text
    assert "is new" in text and "cannot run" not in text
    assert KEY not in text
    assert not dry.out.exists()


def test_the_first_requests_are_shown_just_as_they_are_sent(
    dry: Dry, infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("MY_SECRET", "another-secret-value")
    system = {"role": "system", "content": "Be brief."}
    data = write_jsonl([{"messages": [system, *ask(f"row {i}")["messages"]], "id": f"r{i}"} for i in range(5)])
    more = [
        "engine.model=m", f"engine.base_url={server.url}", "generation.max_tokens=7", "engine.extra_body.tag=x",
        "engine.headers.x-own=${oc.env:MY_SECRET}", "engine.headers.x-plain=seen",
    ]  # fmt: skip
    status, text = dry(data, "engine=anthropic", *more)
    assert status == 0
    assert not server.requests
    assert KEY not in text and "another-secret-value" not in text
    assert f"POST {server.url}/v1/messages" in text
    for line in ("x-api-key: ***", "x-own: ***", "x-plain: seen", "anthropic-version: 2023-06-01"):
        assert line in text
    shown = [json.loads(block[block.index("\n{") :]) for block in text.split("POST ")[1:] for block in [cut(block)]]
    assert len(shown) == 3
    assert infer(data, *more, engine="anthropic").exit_status == 0
    sent = [seen.body for seen in server.requests]
    assert all(body in sent for body in shown)
    assert shown[0]["system"] and shown[0]["max_tokens"] == 7 and shown[0]["tag"] == "x"
    # The names of the headers are those that came, but for what every client adds.
    came = set(server.requests[0].headers)
    told = {line.split(":")[0].lower() for line in text.splitlines() if line.split(":")[0].lower() in came}
    assert came - told <= {"host", "accept", "accept-encoding", "user-agent", "content-length"}


def cut(block: str) -> str:
    """Up to the end of its JSON."""
    return block[: block.index("\n}") + 2]


def test_a_local_model_is_shown_the_prompt_of_its_template(dry: Dry, write_jsonl: Write) -> None:
    rows = [
        ask("Why?", id="plain"),
        ask("word " * 400, id="endless"),
        ask("b", id="greedy", generation={"max_tokens": 250}),
    ]
    status, text = dry(write_jsonl(rows), "engine.kwargs.n_ctx=256", "generation.max_tokens=20")
    assert status == 3
    assert "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant" in text
    assert "max_tokens: 20" in text and "max_tokens: 250" in text
    assert "by the model's tokenizer and template" in text
    assert (
        "1 prompt does not fit into the context of 256 tokens; 1 answer may be truncated by it" in text
        and "endless: 4" in text
    )
    assert "cost        none: the engine runs on your machines" in text


def test_rows_that_the_engine_does_not_take_are_found(
    dry: Dry, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    image = [{"type": "image_url", "image_url": {"url": str(tmp_path / "nowhere.png")}}]
    rows = [
        ask("a"),
        ask("b", id="odd", generation={"top_k": 3}),
        {"id": "blind", "messages": [{"role": "user", "content": image}]},
    ]
    status, text = dry(write_jsonl(rows), *OPENAI)
    assert status == 3
    assert "refused     2 requests are refused by this engine" in text
    assert "odd: engine=openai does not support generation.top_k" in text and "blind: " in text
    status, text = dry(write_jsonl(rows[:2]), *OPENAI, "engine.unsupported=drop")
    assert (status, "refused" in text) == (0, False)
    # Without loading a model: llama.cpp takes text only.
    rows[2]["messages"][0]["content"][0]["image_url"]["url"] = "https://example.org/a.png"
    status, text = dry(write_jsonl(rows[2:]), "generation.max_tokens=8")
    assert (status, "engine=llamacpp takes text only" in text) == (2, True)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (OPENAI, "engine=openai needs its key in the environment: export OPENAI_API_KEY=…"),
        (["engine=anthropic", "engine.model=m", "engine.api_key_env=MINE"], "export MINE=…"),
        (["engine=sglang_offline", "engine.model=m"], "pip install 'eagleray[sglang]'"),
        (["engine=openai_compatible", "engine.model=m"], "needs engine.base_url"),
        (["engine=openai_compatible", "engine.base_url=a:1"], "needs engine.model"),
        (["engine=echo", "engine.kwargs.latencys=1"], "did you mean 'latency_s'?"),
        (["engine=echo", "run.mode=batch"], "engine=echo has no batch API"),
        (["engine.kwargs.n_ctxx=1"], "did you mean 'n_ctx'?"),
        (["engine=echo", "engine.fallback=[remote_vllm]"], "engine=remote_vllm needs engine.base_url"),
    ],
)
def test_what_could_not_run_at_all_is_told_and_a_real_run_ends_with_it_at_once(
    dry: Dry, write_jsonl: Write, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sglang" in said and importlib.util.find_spec("sglang"):
        pytest.skip("sglang is installed here")
    data = write_jsonl([ask("a")])
    status, text = dry(data, *overrides)
    assert status == 2
    assert "cannot run" in text and said in " ".join(text.split())
    assert "1 row in 1 file" in text  # and all the rest is told as well

    def no_ray() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("pipeline.executors.live.cluster.running_ray", no_ray)
    with pytest.raises(ConfigError) as raised:
        dry(data, *overrides, real=True)
    assert said in str(raised.value)
    assert not dry.out.exists()


def test_a_parameter_that_no_row_could_have_ends_a_run_at_once(
    dry: Dry, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = write_jsonl([ask("a")])
    status, text = dry(data, *OPENAI, "generation.top_k=3")
    assert (status, "generation.top_k is not supported by engine=openai" in text) == (2, True)
    monkeypatch.setattr("pipeline.executors.live.cluster.running_ray", lambda: 1 / 0)
    with pytest.raises(ConfigError, match="generation.top_k is not supported by engine=openai"):
        dry(data, *OPENAI, "generation.top_k=3", real=True)


def test_where_a_cluster_is_joined_its_machines_may_have_what_this_one_lacks(
    dry: Dry, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.preflight.checks.joins_a_cluster", lambda: True)
    status, text = dry(write_jsonl([ask("a")]), *OPENAI)
    assert (status, "the replicas' machines may have it" in text) == (0, True)


def test_the_output_directory_is_told_in_all_its_states(dry: Dry, infer: Infer, write_jsonl: Write) -> None:
    data = write_jsonl([ask("a"), ask("b")])
    base = ["engine=echo"]
    assert "is new" in dry(data, *base)[1]
    infer(data)
    before = {path: path.stat().st_mtime_ns for path in dry.out.rglob("*")}
    assert "is complete for exactly this input" in dry(data, *base)[1]
    assert "has 2 results of another configuration" in dry(data, *base, "engine.model=x")[1]
    more = write_jsonl([ask("a"), ask("b"), ask("c")])
    assert "can be continued: 2 rows are done" in dry(more, *base)[1]
    (dry.out / "manifest.json").rename(dry.out / "m")
    assert "has 2 results of other requests" in dry(data, *base, "engine.model=x")[1]
    (dry.out / "m").rename(dry.out / "manifest.json")
    with run_lock(pafs.LocalFileSystem(), str(dry.out)):
        status, text = dry(data, *base)
        assert (status, "another run is writing into" in text) == (2, True)
    assert not held(pafs.LocalFileSystem(), str(dry.out))
    after = {path: path.stat().st_mtime_ns for path in dry.out.rglob("*") if path.name != ".lock"}
    assert after.items() <= before.items() | {(p, t) for p, t in after.items() if p.is_dir()}


def test_an_output_that_cannot_be_written_is_told(dry: Dry, write_jsonl: Write) -> None:
    data = write_jsonl([ask("a")])
    dry.out = data / "out"
    status, text = dry(data, "engine=echo")
    assert (status, f"cannot write into {dry.out}: {data} is not a directory" in " ".join(text.split())) == (2, True)


def test_terminal_escapes_and_markup_of_rows_are_shown_not_obeyed(dry: Dry, write_jsonl: Write) -> None:
    evil = "\x1b[2J\x9b31m [red]boo[/] \x07"
    status, text = dry(write_jsonl([ask(evil, id=f"{evil}id")]), "engine=echo")
    assert status == 0
    assert not {"\x1b", "\x9b", "\x07"} & set(text)
    assert "[red]boo[/]" in text


def test_a_long_text_is_cut_where_it_is_shown(dry: Dry, write_jsonl: Write) -> None:
    _, text = dry(write_jsonl([ask("x" * 50_000)]), "engine=echo")
    assert "… (50,000 characters)" in text and len(text) < 10_000


def test_a_checkpoints_own_template_is_used(dry: Dry, write_jsonl: Write, smollm2_checkpoint: Path) -> None:  # noqa: F811
    _, text = dry(write_jsonl([ask("Why?")]), "engine=transformers", f"engine.model={smollm2_checkpoint}")
    assert "<|im_start|>user\nWhy?<|im_end|>" in text
    assert "torch" not in text


# -- real runs --------------------------------------------------------------------------------------------------------


def test_a_real_run_says_in_a_line_what_it_will_take(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    data = write_jsonl([*(ask(f"{i:03}" + "x" * 900) for i in range(10)), ask("a", generation={"min_p": 0.5}), "{"])
    more = ["engine.model=gpt-5.4-mini", f"engine.base_url={server.url}", "generation.max_tokens=50"]
    assert infer(data, *more, engine="openai").exit_status == 3
    first, *rest = infer.printed.splitlines()
    assert first.startswith("12 rows in 1 file: about 2,3") and "at most 550 out; cost: at most $" in first
    assert "1 of them cannot be read and becomes an error row, for example in.jsonl:12: invalid JSON" in rest[0]
    assert "1 of them is refused by this engine and becomes an error row" in rest[1]
    assert "generation.min_p" in rest[1]


@pytest.mark.parametrize(("seconds", "shown"), [(600.0, "1,000 rows"), (0.0, "32 rows")])
def test_a_real_run_looks_at_the_first_rows_only(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, seconds: float, shown: str
) -> None:
    monkeypatch.setattr(dry_run, "FIRST_S", seconds)
    rows = [ask(f"row {i:06}") for i in range(5000)]
    infer(write_jsonl(rows))
    assert infer.printed.startswith("About 5,")
    assert f"by the first {shown}:" in infer.printed.splitlines()[0]


def test_neither_torch_nor_ray_is_loaded_to_look_ahead(tmp_path: Path, write_jsonl: Write) -> None:
    import subprocess

    code = f"""
import sys
from jobs.infer import main
assert main(["engine=openai", "engine.model=m", "dataset.path={write_jsonl([ask("x")])}", "output.path={tmp_path}/o"]) == 2
print([name for name in ("ray", "torch", "transformers", "vllm", "llama_cpp") if name in sys.modules])"""
    environment = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "RAY_ADDRESS")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
    assert done.stderr.count("\n") == 1 and "export OPENAI_API_KEY=…" in done.stderr


def test_a_lock_that_somebody_holds_is_seen_without_touching_it(tmp_path: Path) -> None:
    folder = tmp_path / "_segments"
    folder.mkdir()
    (folder / ".lock").touch()
    with (folder / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert held(pafs.LocalFileSystem(), str(tmp_path))
    assert not held(pafs.LocalFileSystem(), str(tmp_path))
    assert not held(pafs.LocalFileSystem(), str(tmp_path / "nowhere"))


def test_no_row_ends_the_look_ahead(infer: Infer, write_jsonl: Write) -> None:
    odd = {"messages": [{"role": "assistant", "content": "x", "tool_calls": 5}, {"role": "user", "content": "y"}]}
    outcome = infer(write_jsonl([odd, ask("a", generation={"max_tokens": 10**400}), ask("b")]))
    assert outcome.manifest["rows"]["done"] >= 1 and outcome.manifest["errors"] == {"invalid_input": 1}


def test_a_model_that_is_not_there_is_told_before_ray_starts(
    write_jsonl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.executors.live.cluster.running_ray", lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "ray", None)
    data = [f"dataset.path={write_jsonl([ask('a')])}", f"output.path={tmp_path}/out"]
    for engine, model in (("llamacpp", "nope.gguf"), ("transformers", "/nope")):
        with pytest.raises(ConfigError, match=f"engine.model={model}: there is no such file or directory"):
            run(compose([f"engine={engine}", f"engine.model={model}", *data]), Console(file=io.StringIO()))


@pytest.mark.slow
def test_an_output_is_not_given_up_for_a_run_that_cannot_start(
    infer: Infer, write_jsonl: Write, server: ProviderServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl([ask("a")])
    more = ["engine.model=m", f"engine.base_url={server.url}"]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert infer(data, *more, engine="openai").exit_status == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setattr("pipeline.preflight.checks.joins_a_cluster", lambda: False)
    assert infer(data, *more, engine="openai").exit_status == 0  # it is complete, and needs no key
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        infer(data, *more, "run.resume=false", engine="openai")
    assert len(infer.rows()) == 1
