"""The main job end to end with engine=echo, in this process, on real Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError
from pipeline.dataset import plan
from pipeline.errors import Stopped
from pipeline.executors.live import cluster
from pipeline.executors.live.remote_index import IndexActor, RemoteIndex
from pipeline.storage import ledger_snapshot
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import list_segments
from pipeline.storage.ledger_index import Index, read_index
from tests.support.infer import Infer, ask
from tests.support.processes import PATIENCE_S, until

Write = Callable[..., Path]

OURS_AFTER_OWN = ["response", "messages", "finish_reason", "tool_calls", "reasoning", "usage", "cost_usd", "model",
                  "engine", "attempts", "latency_s", "error"]  # fmt: skip


def asked(infer: Infer) -> int:
    return json.loads((infer.out / "manifest.json").read_text())["this_run"]["asked"]


def test_every_row_comes_out_once_in_order_with_its_own_columns(infer: Infer, write_jsonl: Write) -> None:
    rows = [ask(f"question {i}", id=f"q{i}", code=f"{i:03d}", score=i / 2, big=2**60 + i) for i in range(500)]
    outcome = infer(write_jsonl(rows))
    assert outcome.exit_status == 0
    table = infer.table()
    assert table.column_names == ["id", "index", "code", "score", "big", *OURS_AFTER_OWN]
    assert table["index"].to_pylist() == list(range(500))
    assert table["id"].to_pylist() == [f"q{i}" for i in range(500)]
    assert table["response"].to_pylist() == [f"question {i}" for i in range(500)]
    assert table["code"].to_pylist() == [f"{i:03d}" for i in range(500)]
    assert table["big"].to_pylist() == [2**60 + i for i in range(500)]
    last = json.loads(table["messages"][7].as_py())
    assert last == [{"role": "user", "content": "question 7"}, {"role": "assistant", "content": "question 7"}]
    assert table["error"].null_count == 500


@pytest.fixture
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and the output as Ray tasks, and an index that is asked from other nodes, whatever the size."""
    import ray

    nodes = ray.nodes()
    monkeypatch.setattr(plan, "SMALL_BYTES", -1)
    monkeypatch.setattr(ledger_snapshot, "SMALL_BYTES", -1)
    monkeypatch.setattr(cluster, "REMOTE_INDEX_ROWS", -1)
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, *nodes])


def test_a_task_that_looks_keys_up_keeps_its_cpus(local_ray: None, tmp_path: Path) -> None:
    """Else its node starts one more task for each one that waits: all parts of an output would be written at once."""
    import ray

    started = tmp_path / "started"

    def slowly_made() -> Index:
        until(started.exists)
        time.sleep(2)
        return Index.empty()

    def look() -> float:
        started.touch()
        assert RemoteIndex(actor, [], np.zeros(0, np.int64), 0).find([bytes(32)]).tolist() == [-1]
        return time.time()

    actor = ray.remote(IndexActor).options(num_cpus=0).remote([ray.remote(num_cpus=0)(slowly_made).remote()])
    first = ray.remote(num_cpus=2)(look).remote()
    until(started.exists)
    second = ray.remote(num_cpus=1)(lambda: time.time()).remote()
    assert ray.get(first) <= ray.get(second)
    ray.kill(actor)


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_many_files_and_small_parts_keep_the_order(
    infer: Infer, write_jsonl: Write, tmp_path: Path, large: bool, request: pytest.FixtureRequest
) -> None:
    if large:
        request.getfixturevalue("as_if_large")
    for i in range(7):
        write_jsonl([ask(f"{i}-{j}") for j in range(11)], f"in/{i}.jsonl")
    infer(tmp_path / "in", "dataset.chunk_bytes=300")
    assert [r["response"] for r in infer.rows()] == [f"{i}-{j}" for i in range(7) for j in range(11)]
    assert [r["id"] for r in infer.rows()][:2] == ["0.jsonl:1", "0.jsonl:2"]


@pytest.mark.slow
def test_a_large_run_goes_on_from_its_ledger_and_counts_each_request_once(
    infer: Infer, write_jsonl: Write, as_if_large: None
) -> None:
    rows = [ask(f"a {i // 2}", n=i) for i in range(600)]  # each asked twice
    more = ("generation.temperature=0", "generation.seed=1")
    first = infer(write_jsonl(rows), "dataset.limit=400", "engine.kwargs.failure_rate=0.1", *more)
    again = infer(write_jsonl(rows), *more)
    failed = first.manifest["rows"]["failed"] // 2
    assert failed > 5
    assert again.manifest["this_run"]["asked"] == 100 + failed
    assert again.manifest["rows"] == {
        "total": 600, "done": 600, "failed": 0, "invalid": 0, "truncated": 0, "requests": 300, "duplicates": 300,
    }  # fmt: skip
    assert again.manifest["tokens"] == {"input": 600, "cached_input": 0, "output": 600, "cache_write": 0, "reasoning": 0}
    assert [r["response"] for r in infer.rows()] == [f"a {i // 2}" for i in range(600)]


def test_bad_rows_become_error_rows_at_their_place_and_the_rest_is_answered(infer: Infer, write_jsonl: Write) -> None:
    rows = [ask("a"), "{broken", {"messages": []}, {"messages": [{"role": "robot", "content": "x"}]}, ask("b")]
    outcome = infer(write_jsonl(rows))
    assert outcome.exit_status == 3
    out = infer.rows()
    assert [r["response"] for r in out] == ["a", None, None, None, "b"]
    errors = [r["error"] for r in out]
    assert [e and e["type"] for e in errors] == [None, "invalid_input", "invalid_input", "invalid_input", None]
    assert errors[1]["message"].startswith("in.jsonl:2: ")
    assert "messages is empty" in errors[2]["message"]
    assert "unknown role 'robot'" in errors[3]["message"]
    assert outcome.manifest["rows"] == {
        "total": 5, "done": 2, "failed": 3, "invalid": 3, "truncated": 0, "requests": 2, "duplicates": 0,
    }  # fmt: skip


def test_on_bad_input_fail_stops_with_the_place(infer: Infer, write_jsonl: Write) -> None:
    with pytest.raises(Stopped, match=r"in\.jsonl:2"):
        infer(write_jsonl([ask("a"), "{broken"]), "dataset.on_bad_input=fail")


def test_equal_requests_are_asked_once_and_answer_every_row(infer: Infer, write_jsonl: Write) -> None:
    outcome = infer(write_jsonl([ask("same") for _ in range(50)] + [ask("other")]))
    assert asked(infer) == 2
    assert outcome.manifest["rows"]["total"] == 51
    assert [r["response"] for r in infer.rows()] == ["same"] * 50 + ["other"]


def test_sampled_requests_are_asked_once_for_each_row(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("same") for _ in range(50)]), "generation.temperature=1.0")
    assert asked(infer) == 50


def sampled(*overrides: str) -> tuple[str, ...]:
    return ("generation.temperature=1.0", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("large", [False, True])
def test_sampled_rows_that_share_an_id_are_each_asked_and_keep_their_answers(
    infer: Infer, write_jsonl: Write, tmp_path: Path, large: bool, request: pytest.FixtureRequest
) -> None:
    if large:
        request.getfixturevalue("as_if_large")
    rows = [ask("write a program", id=f"task/{n % 2}") for n in range(40)]

    def run(rows: list[dict[str, object]]) -> int:
        for name, some in (("a", rows[:15]), ("b", rows[15:30]), ("c", rows[30:])):
            write_jsonl(some, f"in/{name}.jsonl")
        outcome = infer(tmp_path / "in", *sampled("dataset.chunk_bytes=400"))
        assert outcome.manifest["rows"]["requests"] == len(rows)
        assert [row["id"] for row in infer.rows()] == [row["id"] for row in rows]
        return asked(infer) if "No request was sent" not in infer.printed else 0

    assert run(rows) == 40
    assert run(rows) == 0
    assert run([*rows, ask("write a program", id="task/0")]) == 1
    assert run([ask("something else", id="task/9"), *rows, ask("write a program", id="task/0")]) == 1
    segments = list_segments(*resolve(str(infer.out)))
    lost = pq.read_metadata(segments[0]).num_rows
    Path(segments[0]).unlink()
    assert run([ask("something else", id="task/9"), *rows, ask("write a program", id="task/0")]) == lost


def test_four_rows_of_one_task_get_four_answers(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("a", id="task/0") for _ in range(4)]), *sampled())
    assert asked(infer) == 4


@pytest.mark.slow
def test_an_edited_image_is_asked_again_and_going_back_gives_the_first_answer_back(
    infer: Infer, write_jsonl: Write, tmp_path: Path
) -> None:
    image = tmp_path / "a.png"
    part = {"type": "image_url", "image_url": {"url": str(image)}}
    path = write_jsonl([{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}, ask("text")])
    image.write_bytes(b"one")
    infer(path)
    first = infer.out / "manifest.json"
    contents = json.loads(first.read_text())["input"]["contents"]
    infer(path)
    assert "No request was sent" in infer.printed
    image.write_bytes(b"other")
    infer(path)
    assert asked(infer) == 1
    image.write_bytes(b"one")
    infer(path)
    assert asked(infer) == 0 and "up to date" not in infer.printed  # the output had the other answer
    assert json.loads(first.read_text())["input"]["contents"] == contents


def test_running_again_asks_nothing(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(100)])
    infer(path)
    before = {p: p.stat().st_mtime_ns for p in (infer.out / "data").iterdir()}
    infer(path, "engine.max_concurrency=3", "hardware.replicas=2")
    assert "No request was sent" in infer.printed
    assert {p: p.stat().st_mtime_ns for p in (infer.out / "data").iterdir()} == before


def test_appended_and_changed_rows_are_the_only_ones_asked(infer: Infer, write_jsonl: Write) -> None:
    rows = [ask(f"{i}") for i in range(100)]
    infer(write_jsonl(rows), "generation.temperature=0.7")
    rows[41] = ask("changed")
    infer(write_jsonl([*rows, ask("new")]), "generation.temperature=0.7")
    assert asked(infer) == 2
    assert [r["response"] for r in infer.rows()] == [*map(str, range(41)), "changed", *map(str, range(42, 100)), "new"]


@pytest.mark.slow
def test_another_temperature_asks_all_and_going_back_asks_none(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(20)])
    infer(path)
    infer(path, "generation.temperature=0.5")
    assert asked(infer) == 20
    infer(path)
    assert asked(infer) == 0
    assert infer.table()["model"].to_pylist() == ["echo"] * 20


def test_a_row_that_changes_its_own_temperature_alone_is_asked_again(infer: Infer, write_jsonl: Write) -> None:
    rows = [ask(f"{i}") for i in range(20)]
    infer(write_jsonl(rows))
    rows[3]["generation"] = {"max_tokens": 5}
    infer(write_jsonl(rows))
    assert asked(infer) == 1


def test_a_changed_column_that_is_not_asked_reaches_the_output(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("x", note="old")]))
    infer(write_jsonl([ask("x", note="new")]))
    assert asked(infer) == 0
    assert infer.rows()[0]["note"] == "new"


@pytest.mark.slow
def test_a_torn_and_a_deleted_segment_cost_their_own_rows_only(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(300)])
    infer(path, "engine.kwargs.latency_s=0.2", "engine.max_concurrency=16", "run.flush_s=0.1")
    fs, root = resolve(str(infer.out))
    segments = list_segments(fs, root)
    assert len(segments) > 2
    whole = len(read_index(fs, root))
    lost = 0
    for number, segment in enumerate(segments[:2]):
        lost += pq.read_metadata(segment).num_rows
        if number:
            Path(segment).unlink()
        else:
            data = Path(segment).read_bytes()
            Path(segment).write_bytes(data[: len(data) // 2])
    index = read_index(fs, root)
    assert (len(index), index.torn) == (whole - lost, [segments[0]])
    infer(path)
    assert asked(infer) == lost
    assert "cannot be read" in infer.printed
    assert [r["response"] for r in infer.rows()] == [str(i) for i in range(300)]


@pytest.mark.slow
def test_failed_rows_are_kept_asked_again_and_can_be_left(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(200)])
    outcome = infer(path, "engine.kwargs.failure_rate=0.2")
    failed = outcome.manifest["rows"]["failed"]
    assert outcome.exit_status == 3
    assert 10 < failed < 80
    bad = pa.concat_tables(pq.read_table(p) for p in sorted((infer.out / "errors").iterdir()))
    assert len(bad) == failed
    assert bad.column_names == ["id", "messages", "error"]
    assert infer(path, "engine.kwargs.failure_rate=0.2", "run.retry_failed=false").exit_status == 3
    assert "No request was sent" in infer.printed
    assert infer(path).exit_status == 0
    assert asked(infer) == failed
    assert not list((infer.out / "errors").iterdir())


def test_the_errors_can_be_run_again_as_a_dataset(infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    rows = [ask(f"{i}", id=f"r{i}", tag="00" + str(i)) for i in range(200)]
    infer(write_jsonl(rows), "engine.kwargs.failure_rate=0.2")
    bad = [r["id"] for r in infer.rows() if r["error"]]
    again = Infer(tmp_path / "again")
    assert again(infer.out / "errors").exit_status == 0
    assert [r["id"] for r in again.rows()] == bad
    assert again.table().column_names == ["id", "index", "tag", *OURS_AFTER_OWN]
    assert again.rows()[0]["tag"] == "00" + bad[0][1:]


def test_jsonl_output_holds_the_input_values_as_they_came(infer: Infer, write_jsonl: Write) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    rows = [ask("a", big=2**70, mixed=1, tools=tools), ask("b", big=1, mixed="1")]
    infer(write_jsonl(rows), "output=jsonl")
    lines = [json.loads(line) for line in (infer.out / "data" / "part-00000.jsonl").read_text().splitlines()]
    assert [(r["big"], r["mixed"], r["tools"]) for r in lines] == [(2**70, 1, tools), (1, "1", None)]
    assert lines[0]["messages"][-1] == {"role": "assistant", "content": "a"}


def test_parquet_input_keeps_its_types(infer: Infer, tmp_path: Path) -> None:
    import datetime as dt
    import decimal

    table = pa.table(
        {
            "id": pa.array([7, 8]),
            "messages": [json.dumps(ask("x")["messages"]), json.dumps(ask("y")["messages"])],
            "when": pa.array([dt.datetime(2026, 1, 1), None], pa.timestamp("us")),
            "sum": pa.array([decimal.Decimal("1.10"), decimal.Decimal("2.20")]),
            "raw": pa.array([b"\xff", b""]),
            "tags": pa.array([["a"], []]),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    infer(tmp_path / "in.parquet")
    out = infer.table()
    assert out["id"].to_pylist() == ["7", "8"]
    for name in ("when", "sum", "raw", "tags"):
        assert out[name].combine_chunks() == table[name].combine_chunks()


@pytest.mark.slow
def test_a_stale_longer_output_leaves_nothing_behind(infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    for i in range(3):
        write_jsonl([ask(f"{i}-{j}") for j in range(40_000 if i == 0 else 10)], f"in/{i}.jsonl")
    infer(tmp_path / "in", "engine.max_concurrency=1024")
    assert len(list((infer.out / "data").iterdir())) == 2 + 1
    (tmp_path / "in" / "0.jsonl").unlink()
    infer(tmp_path / "in")
    assert len(list((infer.out / "data").iterdir())) == 1
    assert len(infer.rows()) == 20


@pytest.mark.slow
def test_limit_takes_the_first_rows_over_files(infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    for i in range(3):
        write_jsonl([ask(f"{i}-{j}") for j in range(4)], f"in/{i}.jsonl")
    infer(tmp_path / "in", "dataset.limit=6")
    assert [r["response"] for r in infer.rows()] == ["0-0", "0-1", "0-2", "0-3", "1-0", "1-1"]


def test_a_second_run_into_the_same_output_says_so(infer: Infer, write_jsonl: Write) -> None:
    from pipeline.storage.lock import run_lock

    path = write_jsonl([ask("x")])
    with run_lock(*resolve(str(infer.out))), pytest.raises(ConfigError, match="another run is writing into"):
        infer(path)


@pytest.mark.slow
def test_a_row_that_kills_its_engine_is_found_and_the_others_are_answered(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(400)])
    outcome = infer(path, "engine.kwargs.crash_rate=0.005", "engine.kwargs.latency_s=0.01", "engine.max_concurrency=8")
    rows = infer.rows()
    crashed = [r for r in rows if r["error"]]
    assert 0 < len(crashed) < 8
    assert outcome.exit_status == 3
    assert {r["error"]["type"] for r in crashed} == {"engine_crash"}
    # Eight rows are inside at once: the first death, up to three by bisection, and one alone.
    assert {r["attempts"] for r in crashed} <= {2, 3, 4, 5}
    assert all(f"died {r['attempts']} times with this row in it" in r["error"]["message"] for r in crashed)
    assert 2 * len(crashed) <= outcome.manifest["this_run"]["engine_deaths"] <= 5 * len(crashed)
    assert [r["response"] for r in rows if not r["error"]] == [str(i) for i in range(400) if not rows[i]["error"]]


@pytest.mark.slow
def test_a_row_that_kills_an_engine_full_of_rows_is_found_by_bisection(infer: Infer, write_jsonl: Write) -> None:
    import ray

    texts = [f"{i}" for i in range(300)]
    texts[130] = "boom"
    more = ["engine.kwargs.crash_text=boom", "engine.kwargs.latency_s=0.3", "engine.max_concurrency=64"]
    outcome = infer(write_jsonl([ask(text) for text in texts]), *more)
    rows = infer.rows()
    assert [r["response"] for r in rows if not r["error"]] == [text for text in texts if text != "boom"]
    (crashed,) = [r for r in rows if r["error"]]
    assert (crashed["index"], crashed["error"]["type"]) == (130, "engine_crash")
    deaths = outcome.manifest["this_run"]["engine_deaths"]
    assert f"died {deaths} times with this row in it" in crashed["error"]["message"]
    assert 3 <= deaths <= 8  # 64 rows are inside at most
    session = Path(ray.get_runtime_context().get_temp_dir()) / ray.get_runtime_context().get_session_name()
    assert session.is_dir()
    until = time.monotonic() + PATIENCE_S  # a run that ends does not wait long for the tasks that remove them
    while list(session.glob("*.journal")) and time.monotonic() < until:
        time.sleep(0.2)
    assert not list(session.glob("*.journal"))


@pytest.mark.slow
def test_an_engine_that_dies_on_everything_stops_the_run_with_the_reason(infer: Infer, write_jsonl: Write) -> None:
    with pytest.raises(Stopped, match="engines died 3 times in a row"):
        infer(write_jsonl([ask(f"{i}") for i in range(20)]), "engine.kwargs.crash_rate=1", "run.max_engine_deaths=2")


@pytest.mark.slow
def test_too_many_errors_stop_the_run_and_keep_what_is_done(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(3000)])
    slow = ["engine.kwargs.failure_rate=0.5", "engine.kwargs.latency_s=0.05", "engine.max_concurrency=32"]
    with pytest.raises(Stopped, match="run.max_errors is 20"):
        infer(path, *slow, "run.max_errors=20")
    assert not (infer.out / "manifest.json").exists()
    assert len(read_index(*resolve(str(infer.out)))) >= 20
    with pytest.raises(Stopped, match="run.max_error_rate is 0.1"):
        infer(path, *slow, "run.max_error_rate=0.1")


def test_an_engine_that_cannot_load_is_a_configuration_error(infer: Infer, write_jsonl: Write) -> None:
    with pytest.raises(ConfigError, match="did you mean 'latency_s'"):
        infer(write_jsonl([ask("x")]), "engine.kwargs.latencys=1")


def test_dry_run_counts_and_writes_nothing(infer: Infer, write_jsonl: Write) -> None:
    outcome = infer(write_jsonl([ask("a"), ask("a"), ask("b"), "{"]), "run.dry_run=true")
    assert outcome.exit_status == 3
    assert "4 rows in 1 file: 0 done, 1 invalid, 3 open: 2 requests to send, 1 duplicate." in infer.printed
    assert not infer.out.exists()


def test_an_empty_file_gives_an_empty_output_with_the_same_columns(infer: Infer, write_jsonl: Write) -> None:
    outcome = infer(write_jsonl([""]))
    assert outcome.exit_status == 0
    assert outcome.manifest["rows"]["total"] == 0
    assert infer.table().column_names == ["id", "index", *OURS_AFTER_OWN]


def test_openai_batch_lines_go_in_and_out(infer: Infer, write_jsonl: Write) -> None:
    body = {"model": "any", "messages": ask("hello there")["messages"], "max_tokens": 1}
    rows = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(2)]
    infer(write_jsonl(rows), "output=jsonl", "output.style=openai_batch")
    lines = [json.loads(line) for line in (infer.out / "data" / "part-00000.jsonl").read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["c0", "c1"]
    choice = lines[0]["response"]["body"]["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hello", "length")


def test_several_answers_and_replicas(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask(f"{i}") for i in range(50)]), "generation.n=2", "hardware.replicas=2")
    row = infer.rows()[9]
    assert [c["message"]["content"] for c in json.loads(row["choices"])] == ["9", "9"]


def test_replicas_that_reserve_every_cpu_do_not_starve_reading(infer: Infer, write_jsonl: Write) -> None:
    assert infer(write_jsonl([ask(f"{i}") for i in range(50)]), "hardware.cpus=2").exit_status == 0


def test_an_output_inside_the_dataset_directory_is_not_read_as_input(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask("a"), "{"])
    infer(path.parent)
    infer(path.parent)
    assert len(infer.rows()) == 2


def test_columns_of_different_types_in_two_files_become_json_text(infer: Infer, tmp_path: Path) -> None:
    import decimal

    (tmp_path / "in").mkdir()
    for name, value in (("a", decimal.Decimal("1.10")), ("b", b"\xff"), ("c", 2**60)):
        pq.write_table(pa.table({"prompt": [name], "x": [value]}), tmp_path / "in" / f"{name}.parquet")
    infer(tmp_path / "in")
    assert infer.table()["x"].to_pylist() == ['"1.10"', '"/w=="', str(2**60)]


@pytest.mark.slow
def test_numbers_as_names_in_the_configuration_reach_manifest_and_report(infer: Infer, write_jsonl: Write) -> None:
    data = write_jsonl([ask("a")])
    outcome = infer(data, "generation.logit_bias={50256: -100}", "generation.seed=99999999999999999999999")
    assert outcome.exit_status == 0 and not (infer.out / "_run.json").exists()
    assert outcome.manifest["config"]["generation"]["logit_bias"] == {"50256": -100}
    with pytest.raises(Stopped, match="max_errors"):
        infer(data, "generation.logit_bias={50256: -99}", "engine.kwargs.failure_rate=1", "run.max_errors=1")
    assert "max_errors" in json.loads((infer.out / "_run.json").read_text())["ended"]
