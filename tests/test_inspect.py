"""Looking at output directories: status, show, errors, diff, on real runs in every state."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from engines.errors import ConfigError, ErrorType
from engines.text import visible
from jobs import cost, diff, errors, export, rerun, show, status
from jobs.errors import ADVICE, pattern_of
from jobs.infer import guarded, saved_config
from jobs.infer import main as infer_main
from jobs.reading import StoredRows, brief, open_output
from pipeline.config import without_secrets
from pipeline.configuration.compose import as_yaml, compose
from pipeline.configuration.saved import hidden
from pipeline.errors import Stopped
from pipeline.monitor.run_state import keep_run_state
from pipeline.monitor.status import RunStatus
from pipeline.run import run as run_job
from pipeline.storage.exact_json import dumps, loads
from pipeline.storage.filesystem import resolve
from pipeline.storage.lock import held, run_lock
from pipeline.storage.output_files import STATE
from tests.support.infer import Infer, ask
from tests.support.marks import slow
from tests.support.processes import replicas, until, wait_gone
from tests.support.s3_server import S3Server

Write = Callable[..., Path]
JOBS = {"status": status.main, "show": show.main, "errors": errors.main, "diff": diff.main, "cost": cost.main,
        "export": export.main}  # fmt: skip
# What a model may say to a terminal: colours, a title, an erased line, the direction of writing, rich's markup.
HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]no[/bold] \u202egnp.exe \x9b2J \rover\u2028line"


class Look:
    """`look("status", out, …)` runs a job in this process: its exit status; what it printed is in `out` and `err`."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys, self.out, self.err = capsys, "", ""

    def __call__(self, job: str, *args: Any) -> int:
        self.capsys.readouterr()
        found = JOBS[job](list(map(str, args)))
        self.out, self.err = self.capsys.readouterr()
        return found

    def json(self, job: str, *args: Any) -> Any:
        self(job, *args, "--json")
        return json.loads(self.out)


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    monkeypatch.setenv("COLUMNS", "160")
    return Look(capsys)


def start(data: Path | str, out: Path | str, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={out}", "run.flush_s=0.2",
        "engine.kwargs.latency_s=0.5", "engine.max_concurrency=8", "engine.kwargs.failure_rate=0.3", *more,
    ]  # fmt: skip
    env = dict(os.environ)
    if "://" not in str(out):  # for the store's keys it needs a Ray of its own
        import ray

        env["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)


# -- a run that goes on, is killed, is complete -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, S3Server() as server:
        for name, value in S3Server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("store", ["disk", slow("s3")])
def test_a_run_is_seen_from_outside_while_it_goes_on_and_after_it_was_killed(
    store: str,
    s3: S3Server,
    local_ray: None,
    look: Look,
    tmp_path: Path,
    write_jsonl: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write_jsonl([*(ask(f"question {i}", id=f"r{i}") for i in range(4000)), "no json"])
    out = str(tmp_path / "out") if store == "disk" else s3.uri("seen")
    run = start(data, out, "engine.price.output=1000")
    fs, root = resolve(out)
    try:
        until(lambda: held(fs, root), run)
        told = until(lambda: (found := look.json("status", out))["rows"]["done"] and found, run)
        assert look("status", out) == 4
        assert f"process {run.pid} on" in look.out and "running: asking" in look.out
        assert told["state"] == "running" and told["pid"] == run.pid and told["rows"]["done"] < 4000
        assert told["errors"]["invalid_input"] == 1 and told["cost_usd"] > 0
        until(lambda: (look.json("status", out).get("lately") or {}).get("rows_per_s"), run)
        assert look.json("status", out)["seconds_left"] > 0
        assert look("errors", out) == 0 and "so far" in look.out and "server" in look.out
        assert look("show", out, "--limit", "1") == 0
        assert " · echo echo" in look.out and "Until it is, only the input has the prompts" in look.out
        assert look("show", out, "--index", "1") == 2 and "name an --id" in look.err
        assert look("cost", out) == 0 and "the run is in progress; this is the cost so far" in look.out
        rows = look.json("export", out, tmp_path / "live.csv")["rows"]
        assert rows["total"] == 4001 and 0 < rows["done"] < 4000 and rows["open"] > 0 and run.poll() is None
    finally:
        workers = [*replicas(run.pid), *replicas(os.getpid())]  # of its own Ray, or of this process's
        run.send_signal(signal.SIGKILL)
        run.communicate()
    wait_gone(workers)  # they commit what they have
    if store == "s3":  # a minute later
        client = s3.client()
        for found in client.list_objects_v2(Bucket="bucket", Prefix="seen/_segments/_lock-").get("Contents", []):
            client.delete_object(Bucket="bucket", Key=found["Key"])
    assert look("status", out) == 4
    assert "stopped, can be continued" in look.out and "it was killed, or its machine was lost" in look.out

    def finished() -> int:
        return sum(1 for _ in StoredRows(open_output(out)).scan("id"))

    def counted_at_rest() -> tuple[dict[str, Any], int] | None:
        """The status and the rows of the ledger, with no segment written between."""
        before, told = finished(), look.json("status", out)
        return (told, before) if finished() == before else None

    told, done = until(counted_at_rest)
    with fs.open_input_file(f"{root}/_run.json") as file:
        began = json.loads(file.read())["began_at"]
    found = fs.get_file_info(pafs.FileSelector(f"{root}/_segments"))
    segments = [info.path for info in found if info.path.endswith(".parquet")]
    times = [pq.read_table(path, columns=["done_at"], filesystem=fs)["done_at"].cast(pa.int64()) for path in segments]
    first = min(min(column.to_pylist()) for column in times) / 1000
    assert began <= first  # a result before it would not be counted
    assert told["rows"]["done"] + told["rows"]["failed"] == done + 1  # and the row that is no JSON
    assert shlex.split(told["command"]) == ["eagleray", "infer", "--again", out]
    capsys.readouterr()
    assert infer_main(["--again", out, "--cfg", "job"]) == 0
    words = ["engine=echo", f"dataset.path={data}", f"output.path={out}", "run.flush_s=0.2", "engine.kwargs.latency_s=0.5",
             "engine.max_concurrency=8", "engine.kwargs.failure_rate=0.3", "engine.price.output=1000"]  # fmt: skip
    assert capsys.readouterr().out == as_yaml(compose(words))


@pytest.mark.slow
def test_a_run_that_ends_leaves_no_state_and_one_that_stops_leaves_its_reason(
    infer: Infer, look: Look, write_jsonl: Write
) -> None:
    data = write_jsonl([ask(f"question {i}", id=f"r{i}") for i in range(200)])
    with pytest.raises(Exception, match="run.max_errors is 3"):
        infer(data, "engine.kwargs.failure_rate=0.5", "run.max_errors=3")
    assert look("status", infer.out) == 4
    assert "stopped, can be continued" in look.out and "rows failed, run.max_errors is 3" in look.out
    assert infer(data).exit_status == 0
    assert not (infer.out / STATE).exists()
    assert look("status", infer.out) == 0
    assert "200 of 200 rows done" in look.out
    told = look.json("status", f"output.path={infer.out}")
    assert told["state"] == "complete" and told["rows"]["total"] == 200


def test_a_later_run_into_the_same_output_hides_the_old_manifest_until_it_is_done(
    infer: Infer, look: Look, write_jsonl: Write
) -> None:
    data = write_jsonl([ask("a", id="a")])
    infer(data)
    fs, root = resolve(str(infer.out))
    with run_lock(fs, root), keep_run_state(compose(["engine=echo", f"output.path={infer.out}"]), fs, root) as state:
        state.write()
        assert look("status", infer.out) == 4 and "running: starting" in look.out
        left = (infer.out / STATE).read_bytes()
    assert look("status", infer.out) == 0
    (infer.out / STATE).write_bytes(left)  # as kill -9 leaves it
    assert look("status", infer.out) == 4 and "it was killed, or its machine was lost" in look.out
    manifest = json.loads((infer.out / "manifest.json").read_text())
    (infer.out / "manifest.json").write_text(json.dumps({**manifest, "finished_at": time.time() + 1}))
    assert look("status", infer.out) == 0  # killed after all was done


def test_failures_are_in_the_state_as_well(tmp_path: Path) -> None:
    """Of a Counter, which `dataclasses.asdict` takes apart."""
    fs, root = resolve(str(tmp_path))
    with pytest.raises(Stopped), keep_run_state(compose(["engine=echo"]), fs, root) as state:
        state.status = RunStatus(failed=2, errors=Counter({"server": 2}))
        raise Stopped("too bad")
    left = json.loads((tmp_path / STATE).read_text())
    assert left["ended"] == "too bad" and left["status"]["errors"] == {"server": 2}


def test_results_count_from_the_time_at_which_the_first_replica_may_have_asked(tmp_path: Path) -> None:
    fs, root = resolve(str(tmp_path))
    with keep_run_state(compose(["engine=echo", f"output.path={tmp_path}"]), fs, root) as state:
        state.begin_pass(since=100.0)
        state.write()
        assert json.loads((tmp_path / STATE).read_text())["began_at"] == 100.0


def test_an_output_without_a_state_tells_what_its_ledger_has(infer: Infer, look: Look, write_jsonl: Write) -> None:
    infer(write_jsonl([ask(f"{i}", id=f"r{i}") for i in range(50)]), "engine.kwargs.failure_rate=0.5")
    failed = look.json("status", infer.out)["rows"]["failed"]
    (infer.out / "manifest.json").unlink()
    told = look.json("status", infer.out)
    assert told["state"] == "stopped" and told["rows"]["done"] == 50 - failed and told["errors"] == {"server": failed}
    assert look("status", infer.out) == 4 and "the same command as before" in look.out


def test_whoever_looks_at_the_lock_for_a_moment_does_not_keep_a_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.lock.HELD_S", 60.0)
    fs, root = resolve(str(tmp_path))
    assert not held(fs, root)
    with run_lock(fs, root):
        assert held(fs, root)
    with (tmp_path / "_segments" / ".lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with run_lock(fs, root):
            timer.join()


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["dataset.path=in.jsonl", "output.path=out"],
        [
            "run.mode=batch",
            "engine=openai",
            "engine.model=m",
            "dataset.path=[a.jsonl,b.jsonl]",
            "output.path=s3://b/o?x=1&y=2",
        ],
        ["engine=echo", "engine.kwargs.a.b=[1,2]", "generation.stop=[x]", "generation.temperature=0.5", "hardware=8xh100"],
        [
            "engine=echo",
            "dataset.template='it''s {{ q }}: \\\\'",
            "dataset.columns.id=qid",
            "generation.logit_bias={7:-100}",
        ],
        ["engine=openai", "engine.model=007", "engine.headers.authorization=secret", "engine.price.input=0.15"],
        ["output=jsonl", "dataset.template={system: 'Be brief, please.', user: '{{ question }}'}"],
        [
            "engine=echo",
            "generation.response_format={type:json_schema,schema:{type:object,required:[a]}}",
            "dataset.limit=3",
        ],
    ],
)
def test_a_saved_configuration_composes_to_itself(words: list[str]) -> None:
    config = loads(dumps(without_secrets(compose(words))))
    secrets = [f"{name}=secret" for name in hidden(config)]
    again = loads(dumps(without_secrets(compose(secrets, saved=config))))
    assert again == config


def test_keys_change_a_saved_configuration() -> None:
    schema = {"type": "object", "$defs": {"a b": {}}, "description": "costs ${x}", "properties": {"a": {"type": "string"}}}
    saved = loads(dumps(without_secrets(compose(["engine=echo", "engine.kwargs.latency_s=2", "dataset.columns.id=qid"]))))
    saved["generation"]["response_format"] = {"type": "json_schema", "json_schema": {"schema": schema}}
    config = compose(["run.budget_usd=3", "engine.kwargs.jitter_s=1"], saved=saved)
    assert (config.run.budget_usd, config.engine.kwargs) == (3, {"latency_s": 2, "jitter_s": 1})
    assert config.generation["response_format"] == saved["generation"]["response_format"]
    other = compose(["engine=openai", "engine.model=m"], saved=saved)  # another engine has none of the saved keys
    assert (other.engine.kind, other.engine.kwargs, other.dataset.columns) == ("openai", {}, {"id": "qid"})


def test_a_secret_that_is_not_saved_must_be_given() -> None:
    config = loads(dumps(without_secrets(compose(["engine=openai", "engine.headers.authorization=secret"]))))
    with pytest.raises(ConfigError, match=r"add engine\.headers\.authorization=…"):
        compose([], saved=config)
    assert compose(["engine.headers={authorization: new}"], saved=config).engine.headers == {"authorization": "new"}


@pytest.mark.slow
def test_a_saved_configuration_continues_its_run_and_knows_which_of_its_texts_are_secrets(
    infer: Infer, look: Look, write_jsonl: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_jsonl([{"prompt": "a"}, {"prompt": "b"}]), str(infer.out)
    given = ["dataset.template=*** {{ prompt }}", "generation.stop=['***']", "engine.headers.authorization=secret"]
    infer(data, *given, "run.resume=false", "output.overwrite=true", engine="echo")
    again = saved_config(out)
    with pytest.raises(ConfigError, match=r"add engine\.headers\.authorization=… *$"):
        compose([], saved=again)
    config = compose(["engine.headers.authorization=other"], saved=again)
    assert (config.dataset.template, config.generation["stop"]) == ("*** {{ prompt }}", ["***"])
    assert config.run.resume and not config.output.overwrite
    assert run_job(config, Console(file=io.StringIO())).manifest["this_run"]["requests_sent"] == 0
    assert open_output(out).command() == f"eagleray infer --again {out} 'engine.headers.authorization=***'"

    def stopped(console: Console) -> int:
        raise Stopped("no room", {"run.budget_usd": "2"})

    capsys.readouterr()
    assert guarded(stopped, "eagleray infer dataset.path=in output.path=out run.resume=false") == 4
    assert "dataset.path=in output.path=out run.resume=true run.budget_usd=2" in capsys.readouterr().err


# -- show -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [[], ["output=jsonl"], ["output=jsonl", "output.style=oumi"]])
def test_whole_conversations_are_shown_as_a_chat(infer: Infer, look: Look, write_jsonl: Write, output: list[str]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    rows = [
        ask("first", id="a", topic="sums"),
        {"id": "b", "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "add"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "two"}, {"role": "user", "content": "so?"}]},
        "no json",
        {"id": "d", "messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, image]}]},
    ]  # fmt: skip
    infer(write_jsonl(rows), *output)
    assert look("show", infer.out) == 0
    assert look.out.index("a · row 1") < look.out.index("b · row 2") < look.out.index("in.jsonl:3 · row 3")
    assert look("show", infer.out, "--id", "b") == 0
    for text in (
        "system\n  Be brief.",
        'assistant\n  → add({"a": 1})  [c1]',
        "tool c1\n  two",
        "assistant\n  so?",
        "stop · ",
        "out · ",
    ):
        assert text in look.out, text
    assert "first" not in look.out
    assert look("show", infer.out, "--failed") == 0
    assert "error: invalid_input" in look.out and "invalid JSON" in look.out and "first" not in look.out
    [row] = [json.loads(line) for line in _lines(look, "show", infer.out, "--index", "0")]
    assert row["id"] == "a" and row["messages"][-1] == {"role": "assistant", "content": "first"} and row["topic"] == "sums"
    assert look("show", infer.out, "--id", "c") == 2 and "no row has the id 'c' (known: a, b, d, in.jsonl:3)" in look.err
    assert look("show", infer.out, "--index", "4") == 2 and "--index 4 is beyond the last row" in look.err


def test_a_message_keeps_its_name_beside_a_tool_call() -> None:
    console = Console(file=io.StringIO(), width=100)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    show.show_message({"role": "assistant", "name": "ann", "content": None, "tool_calls": [call]}, console)
    assert console.file.getvalue().splitlines()[0] == "assistant ann"  # type: ignore[attr-defined]


def _lines(look: Look, *args: Any) -> list[str]:
    look(*args, "--json")
    return look.out.splitlines()


def test_an_id_in_a_large_output_is_found_without_reading_it_all(tmp_path: Path) -> None:
    """Ids alone are read of all rows; the texts of one batch. Here a whole part is one row group, as it is in data/."""
    out, rows = tmp_path / "out", 20_000
    (out / "data").mkdir(parents=True)
    table = pa.table({
        "id": [f"r{i}" for i in range(rows)], "index": range(rows), "response": [f"{i}" * 1000 for i in range(rows)],
        "messages": ["[]"] * rows, "error": pa.nulls(rows, pa.struct([("type", pa.string()), ("message", pa.string())])),
    })  # fmt: skip
    pq.write_table(table, out / "data" / "part-00000.parquet", use_dictionary=False, compression="none")
    manifest = {"rows": {}, "config": {}, "files": {"data/part-00000.parquet": rows}, "finished_at": 0}
    (out / "manifest.json").write_text(json.dumps(manifest))
    code = (
        "import sys, pyarrow as pa, jobs.show as job; job.main(sys.argv[1:]); print(pa.default_memory_pool().max_memory())"
    )
    args = [str(out), "--id", "r19999", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    row, peak = done.stdout.splitlines()
    assert json.loads(row)["index"] == 19_999
    assert int(peak) < 40_000_000 < table.nbytes


def test_hostile_texts_reach_no_terminal(infer: Infer, look: Look, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [
        ask(HOSTILE, id=f"x{HOSTILE}", note=HOSTILE),
        {"id": "role", "messages": [{"role": "user", "name": HOSTILE, "content": HOSTILE}]},
        ask(HOSTILE + "2", id="fails", generation={"temperature": HOSTILE}),
    ]
    infer(write_jsonl(rows))
    other = Infer(tmp_path / f"other{HOSTILE.replace('/', '')}")
    other(
        write_jsonl(
            [{**row, "messages": [*row["messages"][:-1], {"role": "user", "content": "b" + HOSTILE}]} for row in rows]
        )
    )
    for args in (
        ["show", infer.out], ["errors", infer.out], ["status", other.out], ["diff", infer.out, other.out],
        ["diff", infer.out, other.out, infer.out], ["cost", infer.out, other.out],
        ["export", other.out, tmp_path / f"x{HOSTILE.replace('/', '')}.csv", "--overwrite"],
    ):  # fmt: skip
        for more in ([], ["--json"]):
            look(*args, *more)
            found = {c for c in look.out + look.err if not c.isprintable() and c not in "\n\xa0"}
            assert look.out and not found, (args, found)
    look("show", infer.out)
    assert "\\x1b[31mred" in look.out and "[bold]no[/bold]" in look.out and "\\u202egnp.exe" in look.out


def test_visible_leaves_what_is_only_text() -> None:
    kept = "Grüße\n\tनमस्ते می‌خواهم 👩‍👩‍👧 €"
    assert visible(kept) == kept
    assert visible("a\r\nb\rc") == "a\nb\\rc"
    assert brief("x" * 300, 10) == "xxxxxxxxx…" and brief({"a": "ü"}) == '{"a": "ü"}'


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_grouped_explained_and_can_be_asked_again_as_said(infer: Infer, look: Look, write_jsonl: Write) -> None:
    rows = [ask(f"question {i}", id=f"r{i}") for i in range(60)]
    data = write_jsonl([*rows, "no json", "{", ask("x", id="odd", generation={"temperature": -1})])
    infer(data, "engine.kwargs.failure_rate=0.4")
    assert look("errors", infer.out) == 0
    assert ADVICE["server"] in look.out and ADVICE["invalid_input"] in look.out and "ids: " in look.out
    told = look.json("errors", infer.out)
    failed = json.loads((infer.out / "manifest.json").read_text())
    assert {name: kind["rows"] for name, kind in told["types"].items()} == failed["errors"]
    assert sum(m["rows"] for m in told["types"]["server"]["messages"]) == failed["errors"]["server"]
    assert shlex.split(told["command"]) == ["eagleray", "infer", "--again", str(infer.out)]
    assert told["command"] in look_text(look, infer.out)
    again = compose(["engine.kwargs.failure_rate=0"], saved=saved_config(str(infer.out)))
    assert run_job(again, Console(file=io.StringIO())).manifest["this_run"]["asked"] == failed["errors"]["server"]
    assert f"dataset.path={infer.out}/errors" in look_text(look, infer.out)
    told = look.json("errors", infer.out)
    assert list(told["types"]) == ["invalid_input"] and told["failed"] == 3


def test_commands_that_are_shown_can_be_pasted(infer: Infer, look: Look, write_jsonl: Write, tmp_path: Path) -> None:
    infer.out = tmp_path / "my out"
    infer(write_jsonl([ask("a"), "no json"]))
    assert look("status", infer.out) == 3 and f"eagleray errors '{infer.out}'\n" in look.out
    assert rerun.main([str(infer.out), f"output.path={infer.out}"]) == 2
    assert f"run eagleray infer --again '{infer.out}' to continue" in look.capsys.readouterr().err


def look_text(look: Look, out: Path) -> str:
    look("errors", out)
    return look.out


def test_messages_that_differ_in_numbers_only_are_one() -> None:
    assert pattern_of("no answer within 30.0 s (request req_8fa1-x2)") == pattern_of("no answer within 7 s (request 17)")
    assert pattern_of("in.jsonl:17: 'a' is odd") == pattern_of("in.jsonl:3: 'b c' is odd")
    assert pattern_of("timeout") != pattern_of("refused")


def test_every_error_type_has_a_sentence_that_says_what_to_do() -> None:
    assert ADVICE.keys() == set(get_args(ErrorType))


def test_where_nothing_failed_that_is_said(infer: Infer, look: Look, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("a")]))
    assert look("errors", infer.out) == 0 and "0 of 1 row failed." in look.out
    assert look("show", infer.out, "--failed") == 0 and "No row failed." in look.out


# -- diff -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_outputs_are_compared_row_by_row(local_ray: None, look: Look, write_jsonl: Write, tmp_path: Path) -> None:
    a, b = Infer(tmp_path / "a"), Infer(tmp_path / "b")
    a(
        write_jsonl(
            [*(ask(f"the same {i}", id=f"r{i}") for i in range(20)), ask("only here", id="a1"), "no json"], "a.jsonl"
        )
    )
    texts = [f"the same {i}" if i % 2 else f"the very other {i}" for i in reversed(range(20))]
    rows = [ask(text, id=f"r{i}") for text, i in zip(texts, reversed(range(20)), strict=True)]
    rows[0] = ask("x", id="r19", generation={"temperature": -1})
    b(write_jsonl([*rows, ask("only there", id="b1"), ask("and", id="b2")], "b.jsonl"), "output=jsonl")
    told = look.json("diff", a.out, b.out)
    assert told["matched_by"] == "id"
    assert told["rows"] == {
        "a": 22, "b": 22, "both": 20, "equal": 9, "differ": 10, "failed_only_in_a": 0, "failed_only_in_b": 1,
        "failed_in_both": 0, "only_in_a": 2, "only_in_b": 2,
    }  # fmt: skip
    assert told["b"]["finish_reasons"] == {"stop": 19, "invalid_input": 1}
    assert told["b"]["output_tokens"] > told["a"]["output_tokens"] > 0
    assert [pair["a"]["id"] for pair in told["shown"]] == ["r0", "r2", "r4", "r6", "r8"]  # in the first one's order
    assert all(pair["a"]["id"] == pair["b"]["id"] for pair in told["shown"])
    assert look("diff", a.out, b.out, "--limit", "2") == 0
    assert "the [-same-] 0" in look.out and "the {+very other+} 0" in look.out and "9 more rows differ" in look.out
    assert look("diff", a.out, b.out, "--id", "r1") == 0 and "the same 1" in look.out
    assert look("diff", a.out, b.out, "--id", "a1") == 2 and "no common row with the id 'a1'" in look.err


@pytest.mark.slow
@pytest.mark.parametrize("style", ["oumi", "openai_batch"])
def test_styles_of_jsonl_are_compared_as_far_as_they_go(infer: Infer, look: Look, write_jsonl: Write, style: str) -> None:
    data = write_jsonl([*(ask(f"q {i}", id=f"r{i}") for i in range(5)), ask("x", id="bad", generation={"n": 0})])
    infer(data)
    other = Infer(infer.out.with_name("other"))
    other(data, "output=jsonl", f"output.style={style}")
    told = look.json("diff", infer.out, other.out)
    assert told["rows"]["equal"] == 5 and told["rows"]["failed_in_both"] == 1
    assert told["a"]["output_tokens"] == told["b"]["output_tokens"]
    look("diff", infer.out, other.out, "--id", "r1")
    assert ("without prompts and times" in look.out) == (style == "openai_batch")
    look("show", other.out, "--id", "r1")
    assert "q 1" in look.out and ("keeps neither prompts" in look.out) == (style == "openai_batch")
    assert look.json("errors", other.out)["failed"] == 1


def test_equal_tool_calls_are_equal_in_every_format(tmp_path: Path, look: Look) -> None:
    """In Parquet they are JSON text, in JSONL they are values."""
    call = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {
        "id": "a",
        "index": 0,
        "response": None,
        "messages": [],
        "tool_calls": call,
        "error": None,
        "finish_reason": "stop",
    }
    for format in ("parquet", "jsonl"):
        (tmp_path / format / "data").mkdir(parents=True)
        manifest = {"rows": {}, "config": {}, "files": {f"data/a.{format}": 1}, "finished_at": 0, "cost_usd": 0}
        (tmp_path / format / "manifest.json").write_text(json.dumps(manifest))
    table = pa.Table.from_pylist([{**row, "messages": "[]", "tool_calls": dumps(call).decode()}])
    pq.write_table(table, tmp_path / "parquet" / "data" / "a.parquet")
    (tmp_path / "jsonl" / "data" / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert look.json("diff", tmp_path / "parquet", tmp_path / "jsonl")["rows"]["equal"] == 1


@pytest.mark.slow
def test_rows_without_common_ids_are_matched_by_their_place(infer: Infer, look: Look, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("a"), ask("b")], "one.jsonl"))
    other = Infer(infer.out.with_name("other"))
    other(write_jsonl([ask("a"), ask("c"), ask("d")], "two.jsonl"))
    assert look("diff", infer.out, other.out) == 0
    assert "2 rows in both, matched by place in the input, because no id is in both" in look.out
    told = look.json("diff", infer.out, other.out)["rows"]
    assert (told["equal"], told["differ"], told["only_in_b"]) == (1, 1, 1)
    (other.out / "manifest.json").unlink()
    assert look("diff", infer.out, other.out) == 2 and "rows cannot be matched: no id is in both" in look.err


# -- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["status"], "missing: OUT"),
        (["status", "nowhere"], "there is no directory nowhere"),
        (["status", "."], ". is not an output directory of Eagleray: it has neither manifest.json nor _segments/"),
        (["status", "else"], "else/manifest.json was not written by Eagleray"),
        (["status", "torn"], "torn/manifest.json cannot be read"),
        (["status", "s4://x/y"], "there is no reader for 's4://' paths"),
        (["show", "out", "--limt", "3"], "there is no option --limt (did you mean '--limit'?)"),
        (["show", "out", "--limit", "0"], "argument --limit: must be a whole number of at least 1, not '0'"),
        (["show", "out", "more"], "unexpected argument more"),
        (["errors", "out", "--fialed"], "there is no option --fialed"),
        (["diff", "out"], "missing: OUT_B"),
        (["show", "out"], "part-00000.parquet"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    args: list[str], said: str, look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("out/data", "out/_segments", "else", "torn"):
        (tmp_path / folder).mkdir(parents=True)
    gone = {"rows": {}, "config": {}, "files": {"data/part-00000.parquet": 1}, "finished_at": 0}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(gone))
    (tmp_path / "else" / "manifest.json").write_text('{"name": "a browser extension"}')
    (tmp_path / "torn" / "manifest.json").write_text('{"rows": ')
    assert look(*args) == 2
    assert said in look.err and look.err.startswith("eagleray: ") and look.err.count("\n") == 1 and not look.out


@pytest.mark.parametrize("job", JOBS)
def test_help_has_an_example_and_no_ray_is_loaded(job: str, look: Look) -> None:
    assert look(job, "--help") == 0
    assert "examples:" in look.out and f"eagleray {job} out" in look.out and "--json" in look.out
    code = (
        f"import sys, jobs.{job} as job; job.main(['x']); print([m for m in ('ray', 'hydra', 'httpx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
