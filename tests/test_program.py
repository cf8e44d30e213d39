"""A whole run from a program: `from pipeline import infer`."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from engines import ConfigError, Conversation, GenerationParams
from engines.errors import ErrorCode
from jobs import infer as command
from pipeline import infer
from pipeline.dataset.spool import spooled
from pipeline.errors import Interrupted, Stopped
from pipeline.program.keys import GivenKeys
from pipeline.signals import Interrupts, note_signals
from tests.support.outputs import durable

ROOT = Path(__file__).parent.parent
ECHO: dict[str, Any] = {"engine": "echo", "run": {"flush_s": 0.2}, "progress": False}


def prompts(count: int) -> Iterator[dict[str, Any]]:
    return ({"id": f"r{i}", "prompt": f"question {i}", "n": i} for i in range(count))


# -- datasets ---------------------------------------------------------------------------------------------------------


def frames() -> dict[str, Any]:
    rows = list(prompts(3))
    named = pd.DataFrame(rows).set_index("id")  # a named index is a column
    return {
        "table": pa.Table.from_pylist(rows), "stream": pa.Table.from_pylist(rows).to_reader(1), "pandas": named,
        "filtered": pd.DataFrame([{"id": "x"}, *rows])[lambda frame: frame.id != "x"].astype({"n": int}),
        "polars": pl.DataFrame(rows), "rows": prompts(3),
        "conversations": [Conversation([{"role": "user", "content": f"question {i}"}], f"r{i}") for i in range(3)],
    }  # fmt: skip


def test_a_program_gives_a_frame_and_gets_a_table(local_ray: None, tmp_path: Path) -> None:
    frame = pl.DataFrame([{"id": "a", "prompt": "<script>alert(1)</script>", "n": 1}, {"id": "b", "prompt": None, "n": 2}])
    result = infer(frame, output=tmp_path / "out", **ECHO)
    table = result.table()
    assert table.select(["id", "n", "response"]).to_pydict() == {
        "id": ["a", "b"],
        "n": [1, 2],
        "response": ["<script>alert(1)</script>", None],
    }
    assert [row["response"] for row in result.rows()] == table["response"].to_pylist()
    assert result.to_pandas().shape == (2, table.num_columns)
    assert (result.done, result.failed, result.path) == (1, 1, str(tmp_path / "out"))
    assert result.manifest == json.loads((tmp_path / "out/manifest.json").read_text())
    assert result.errors()["error"].to_pylist()[0]["type"] == "invalid_input"
    assert "1 of 2 rows done, 1 failed (1 invalid_input)" in repr(result)
    page = result._repr_html_()  # answers are not trusted
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "1 of 2 rows done" in page and str(tmp_path / "out/report.html") in page


def written(data: Any) -> tuple[str, list[dict[str, Any]]]:
    """The name of the dataset file, and its rows."""
    with spooled(data) as spool:
        if spool.name.endswith(".jsonl"):
            return spool.name, [json.loads(line) for line in Path(spool.path).read_bytes().splitlines()]
        return spool.name, pa.parquet.read_table(spool.path).to_pylist()


@pytest.mark.parametrize("kind", frames())
def test_all_kinds_of_rows_are_written_exactly(kind: str) -> None:
    _, rows = written(frames()[kind])
    if kind == "conversations":
        assert rows[1] == {"id": "r1", "messages": [{"role": "user", "content": "question 1"}]}
    else:
        assert rows == [dict(sorted(row.items(), key=lambda item: list(rows[0]).index(item[0]))) for row in prompts(3)]
    assert written(frames()[kind])[0] == written(frames()[kind])[0]


def test_the_digest_depends_on_the_values_only() -> None:
    texts = [f"{i}" * (i % 7) if i % 5 else None for i in range(2000)]
    long = pa.table({"a": texts, "b": [[{"c": i}] for i in range(2000)]})
    parts = pa.concat_tables([long.slice(0, 777), long.slice(777)])
    assert written(long)[0] == written(parts)[0] == written(long.to_reader(100))[0]
    assert written(long)[0] != written(long.set_column(0, "a", pa.array(["x"] * 2000)))[0]
    _, rows = written([{"a": np.int64(5), "b": np.array([1.5, 2]), "nan": float("nan"), "big": 1 << 70}])
    assert rows[0].pop("nan") != 0
    assert rows == [{"a": 5, "b": [1.5, 2.0], "big": 1 << 70}]


def test_rows_of_an_iterable_do_not_stay_in_memory() -> None:
    tracemalloc.start()
    with spooled({"prompt": f"{i} " * 2000} for i in range(5000)) as spool:
        assert Path(spool.path).stat().st_size > 40e6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (5, "a int is not a path"), ({"prompt": "a"}, "a dict is not a path"),
        ([{"prompt": "a"}, "b"], "row 2 is a str, not a dict or a Conversation"),
        ([{"prompt": "\ud800"}], "row 1 cannot be written as JSON"),
        (pd.DataFrame({"a": [1, "x"]}), "this DataFrame cannot be read as a table"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_is_refused_and_writes_nothing(dataset: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        infer(dataset, output=tmp_path / "out", **ECHO)
    assert not (tmp_path / "out").exists()


# -- the output -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_rows_continue_and_other_rows_are_refused(local_ray: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results: list[Any] = []

    async def in_a_loop() -> None:
        results.append(infer(prompts(3), output=out, **ECHO))

    asyncio.run(in_a_loop())
    thread = threading.Thread(target=lambda: results.append(infer(prompts(3), output=out, **ECHO)))
    thread.start()
    thread.join()
    assert [result.manifest["this_run"]["requests_sent"] for result in results] == [3, 0]
    with pytest.raises(ConfigError, match="other rows that a program gave") as refused:
        infer(prompts(2), output=out, **ECHO)
    assert refused.value.code == ErrorCode.OTHER_DATASET
    before = list((out / "_dataset").iterdir())
    (out / "_dataset/mine.txt").write_text("mine")
    result = infer(prompts(2), output={"path": out, "overwrite": True}, **ECHO)
    assert result.done == 2 and result.manifest["this_run"]["requests_sent"] == 0
    left = sorted(path.name for path in (out / "_dataset").iterdir())
    assert len(before) == 1 and before[0].name not in left and len(left) == 2 and "mine.txt" in left
    # The command continues the run of the program.
    assert command.main(["--again", str(out)]) == 0


def test_a_wrong_configuration_leaves_no_rows_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "nothing")
    (tmp_path / "out").mkdir()
    engine = {"name": "anthropic", "model": "claude-haiku-4-5"}
    with pytest.raises(ConfigError, match="generation.seed is not supported"):
        infer(prompts(2), engine=engine, generation={"seed": 1}, output=tmp_path / "out", progress=False)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out/_dataset").mkdir()
    (tmp_path / "out/_dataset/rows.jsonl").write_text("the user's own")
    with pytest.raises(ConfigError, match="not an output of Eagleray") as refused:
        infer(prompts(2), output=tmp_path / "out", **ECHO)
    assert refused.value.code == ErrorCode.OUTPUT_NOT_OURS
    assert [path.name for path in (tmp_path / "out/_dataset").iterdir()] == ["rows.jsonl"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = infer(prompts(2), {"run.dry_run": True}, output=tmp_path / "out", engine="echo", progress=False)
    assert result.manifest == {} and "dry run" in repr(result) and "dry run" in result._repr_html_()
    assert not (tmp_path / "out").exists()


# -- keys -------------------------------------------------------------------------------------------------------------


def test_keys_are_nested_or_dotted_and_replace_those_of_a_run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = tmp_path / "run.yaml"
    path.write_text("engine: {name: openai, model: gpt-4o, headers: {a: b}}\ndataset.path: in.jsonl\noutput.path: out\n"
                    "generation:\n  max_tokens: 5\n  temperature: 1.0\n")  # fmt: skip
    given = GivenKeys.of(path, None)
    given.add({"generation": {"max_tokens": 7, "response_format": {"type": "object", "$defs": {"a/b": {}}}}})
    given.add({"engine.headers": {"c": "d"}, "output.path": Path("mine"), "generation.stop": ("x", "y")})
    config = given.compose().config
    assert config.engine.model == "gpt-4o" and config.engine.headers == {"a": "b", "c": "d"}
    assert config.dataset.path == str(tmp_path / "in.jsonl") and config.output.path == str(tmp_path / "here/mine")
    assert config.generation["max_tokens"] == 7 and config.generation["temperature"] == 1.0
    assert config.generation["response_format"]["$defs"] == {"a/b": {}} and config.generation["stop"] == ["x", "y"]
    given.add({"engine": "echo", "generation": GenerationParams(max_tokens=9)})
    config = given.compose().config
    assert config.engine.kind == "echo" and config.engine.model != "gpt-4o" and config.generation["max_tokens"] == 9
    assert given.origin.entries()["run_file"]["path"] == str(path)
    path.write_text("engine: echo\noutput.path: out\ndataset.path: in.jsonl\nrun.max_errors: many\n")
    with pytest.raises(ConfigError, match=rf"{path}:4: run.max_errors must be a whole number"):
        GivenKeys.of(path, None).compose()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"engine": "opnai"}, ["engine=opnai"]),
        ({"engine": {"modle": "a"}}, ["engine.modle=a"]),
        ({"generation": {"max_tokns": 5}}, ["generation.max_tokns=5"]),
        ({"generation": {"temperature": -1}}, ["generation.temperature=-1"]),
        ({"max_tokens": 5}, ["max_tokens=5"]),
        ({"run.budget_usd": 0}, ["run.budget_usd=0"]),
        ({"run": {"max_errors": "many"}}, ["run.max_errors=many"]),
    ],
)
def test_errors_have_the_words_of_the_command(
    keys: dict[str, Any], words: list[str], tmp_path: Path, write_jsonl: Callable[..., Path], capsys: Any
) -> None:
    path = write_jsonl([{"prompt": "a"}])
    base = {} if "engine" in keys else {"engine": "echo"}
    with pytest.raises(ConfigError) as error:
        infer(path, keys, output=tmp_path / "out", progress=False, **base)
    typed = [f"{name}={value}" for name, value in base.items()]
    assert command.main([*typed, *words, f"dataset.path={path}", f"output.path={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    if words == ["run.max_errors=many"]:  # the command shows what was typed
        assert str(error.value).startswith("run.max_errors must be a whole number")
    else:
        assert said.startswith(f"eagleray: {error.value} (see docs/")


# -- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stop_is_an_exception_and_the_next_call_continues(local_ray: None, tmp_path: Path) -> None:
    priced = {**ECHO, "engine": {"name": "echo", "price": {"input": 1e5, "output": 1e5}}, "generation": {"max_tokens": 2}}
    with pytest.raises(Stopped) as stop:
        infer(prompts(6), {"run.budget_usd": 2.5}, output=tmp_path / "out", **priced)
    assert stop.value.code == ErrorCode.BUDGET_SPENT
    more = stop.value.changes["run.budget_usd"]
    assert stop.value.__notes__[0].endswith(f"with the same dataset and output with run.budget_usd={more}.")
    result = infer(prompts(6), {"run.budget_usd": 100}, output=tmp_path / "out", **priced)
    assert result.done == 6 and result.cost_usd is not None and result.cost_usd > 2


@pytest.mark.slow
def test_an_interrupt_drains_and_gives_the_signals_back(local_ray: None, tmp_path: Path) -> None:
    slow = {**ECHO, "engine": {"name": "echo", "max_concurrency": 1, "kwargs": {"latency_s": 0.1}}}
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt() -> None:
        while not durable(tmp_path / "out"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(Interrupted) as interrupted:
        infer(prompts(200), output=tmp_path / "out", **slow)
    thread.join()
    assert "the same dataset and output" in interrupted.value.__notes__[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    done = durable(tmp_path / "out")
    assert 0 < done < 200
    result = infer(prompts(200), output=tmp_path / "out", **ECHO)
    assert result.done == 200 and result.manifest["this_run"]["requests_sent"] == 200 - done


def test_a_second_interrupt_raises_and_does_not_end_the_program() -> None:
    seen = Interrupts(in_program=True)
    with pytest.raises(KeyboardInterrupt), note_signals(seen):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert seen == [signal.SIGINT, signal.SIGINT]


# -- names ------------------------------------------------------------------------------------------------------------


def test_the_package_eagleray_has_the_names_of_a_program_and_is_light() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = ROOT / setuptools["package-dir"]["eagleray"]
    assert "eagleray" in setuptools["packages"] and "py.typed" in setuptools["package-data"]["*"]
    assert all((place / "py.typed").is_file() for place in (folder, ROOT / "engines", ROOT / "pipeline"))
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("eagleray", {str(folder / "__init__.py")!r})
eagleray = sys.modules["eagleray"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(eagleray)
from eagleray import Conversation, GenerationParams, Stopped, infer, load_engine
import engines, pipeline
assert infer is pipeline.infer and (load_engine, eagleray.ConfigError) == (engines.load_engine, engines.ConfigError)
assert eagleray.EchoEngine().infer([{{"messages": [{{"role": "user", "content": "a"}}]}}])[0].text == "a"
heavy = "torch transformers llama_cpp vllm ray pyarrow hydra omegaconf aiohttp rich".split()
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_installed_package_is_this_one() -> None:
    found = importlib.util.find_spec("eagleray")
    assert found is not None and str(found.origin).endswith("eagleray/__init__.py")
