"""A mixed fleet: replicas of several hardware entries in one run; those without memory, and those that cannot be loaded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engines import ConfigError
from engines.config import EngineConfig
from engines.errors import ErrorCode, Failure, OutOfMemory, engine_died
from engines.identity import identity
from pipeline.configuration.compose import compose
from pipeline.configuration.run_file import RunFile, RunFileError
from pipeline.errors import EnginesDied
from pipeline.executors.live.memory_limit import MemoryLimit
from pipeline.executors.live.placement import replica_groups
from pipeline.executors.live.ray_session import without
from pipeline.executors.live.recorder import LeasedRow
from pipeline.hardware import HardwareConfig
from pipeline.monitor.status import ReplicaProblem, RunStatus
from pipeline.preflight.checks import examine
from tests.support.clusters import Raylets
from tests.support.clusters import raylets as raylets
from tests.support.infer import Infer, ask
from tests.support.outputs import check, write
from tests.support.processes import finish, own_ray, until
from tests.support.together import Together
from tests.test_cluster import start


def groups(*overrides: str, engine: str = "echo") -> list[tuple[Any, ...]]:
    config = compose([f"engine={engine}", *overrides])
    config.check(runs=False)
    return [
        (group.name, group.placement.high, group.placement.bundles, group.engine.kwargs, group.engine.max_concurrency)
        for group in replica_groups(config.hardware, config.engine)
    ]


# -- the configuration ------------------------------------------------------------------------------------------------


def test_a_list_of_hardware_has_profiles_and_mappings() -> None:
    found = groups(
        "hardware=[laptop,{name: gpu, replicas: 2, engine: {kwargs: {latency_s: 0.5}, max_concurrency: 8}}]",
        "engine.kwargs.jitter_s=0.1",
    )
    assert found == [
        ("hardware[0]", 1, ({},), {"jitter_s": 0.1}, None),
        ("hardware[1]", 2, ({"CPU": 1, "GPU": 1.0},), {"jitter_s": 0.1, "latency_s": 0.5}, 8),
    ]
    sizes = "hardware=[8xh100,{name: 8xh100, engine: {kwargs: {tensor_parallel_size: 4}}}]"
    assert [(high, bundles) for _, high, bundles, *_ in groups(sizes, engine="vllm")] == [
        (8, ({"CPU": 1, "GPU": 1.0},)),
        (2, ({"CPU": 1, "GPU": 4.0},)),
    ]
    assert groups("hardware=laptop") == groups() == [("hardware", 1, ({},), {}, None)]


@pytest.mark.parametrize(
    ("entry", "key", "said"),
    [
        ("{gpu: 2}", "hardware[1]", "there is no key 'hardware[1].gpu' (did you mean 'gpus'?)"),
        ("{gpus: 1.5}", "hardware[1].gpus", "hardware[1].gpus above 1 must be a whole number, not 1.5"),
        ("{nodes: 1.5}", "hardware[1].nodes", "hardware[1].nodes must be a whole number of at least 1, not 1.5"),
        ("{label_selector: a}", "hardware[1].label_selector", "hardware[1].label_selector must be keys with values"),
        ("{replicas: auto}", "hardware[1].replicas", "it needs hardware[1].gpus_per_node"),
        ("laptopp", "hardware[1]", "hardware[1]: there is no hardware 'laptopp' (did you mean 'laptop'?)"),
        ("3", "hardware[1]", "hardware[1] must be the name of a profile, or a mapping, not 3"),
        ("{engine: {model: x}}", "hardware[1].engine", "all replicas answer with the same engine and model"),
        ("{engine: {max_concurrency: 0}}", "hardware[1].engine.max_concurrency", "must be at least 1, not 0"),
        ("{engine: {kwargs: {seed: 3}}}", "hardware[1].engine", "engine.kwargs.seed would change answers: set"),
        (
            "{engine: {kwargs: {tensor_parallel_size: 0}}}",
            "hardware[1].engine.kwargs",
            "hardware[1].engine.kwargs.tensor_parallel_size must be a number of at least 1, not 0",
        ),
    ],
)
def test_an_error_names_its_entry(entry: str, key: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        groups(f"hardware=[laptop,{entry}]")
    assert said in str(error.value)
    assert error.value.key == key


def test_a_run_file_has_a_list_and_an_error_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    lines = ["engine: echo", "hardware:", "  - laptop", "  - replicas: 2", "    engine:", "      kwargs: {latency_s: 1}"]
    path.write_text("\n".join(lines))
    config = compose([], run_file=RunFile.read(str(path)))
    assert config.hardware.profiles == [{"replicas": 1}, {"replicas": 2, "engine": {"kwargs": {"latency_s": 1}}}]
    typed = compose(["hardware=[{replicas: 3}]"], run_file=RunFile.read(str(path)))
    assert typed.hardware.profiles == [{"replicas": 3}]
    assert compose(["hardware=cpu"], run_file=RunFile.read(str(path))).hardware.profiles == []
    path.write_text("\n".join([*lines, "    gpus: 1.5"]))
    file = RunFile.read(str(path))
    with pytest.raises(RunFileError, match=r"run.yaml:7: hardware\[1\].gpus above 1"), file.located([]):
        compose([], run_file=file).check(runs=False)


def test_other_keys_of_hardware_are_refused_beside_a_list() -> None:
    with pytest.raises(ConfigError, match="hardware.replicas has no effect beside a list of hardware"):
        groups("hardware=gpu", "hardware.profiles=[laptop]")


def test_the_keywords_of_an_entry_do_not_change_the_keys_of_requests() -> None:
    plain, mixed = compose(["engine=echo"]), compose(["engine=echo", "hardware=[{engine: {kwargs: {latency_s: 1}}}]"])
    assert identity(plain.engine) == identity(mixed.engine)


def test_preflight_checks_each_entry_and_names_it() -> None:
    config = compose(["engine=echo", "hardware=[laptop,{engine: {kwargs: {latencys: 1}}}]"])
    (finding,) = examine(config, thorough=False).wrong
    assert finding.text.startswith("hardware[1]: engine.kwargs.latencys is not known to engine=echo")


def test_eagleray_serve_refuses_a_list() -> None:
    from rich.console import Console

    from pipeline.serve.server import serve_engine

    config = compose(["engine=echo", "hardware=[laptop,laptop]"])
    with pytest.raises(ConfigError, match="eagleray serve has one kind of replica"):
        serve_engine(config, Console())


def test_an_entry_gets_the_room_that_the_others_leave() -> None:
    hardware = HardwareConfig(profiles=[{"replicas": 2, "gpus": 1}, {"replicas": 1, "gpus": 1}])
    first, second = (group.placement for group in replica_groups(hardware, EngineConfig(kind="echo")))
    nodes = [{"Alive": True, "Resources": {"CPU": 4, "GPU": 2}, "Labels": {}}]
    left = without(first, nodes)
    assert (left[0]["Resources"]["GPU"], nodes[0]["Resources"]["GPU"]) == (0, 2)  # type: ignore[index]
    assert without(second, left) == left


# -- memory -----------------------------------------------------------------------------------------------------------


def row(name: str) -> LeasedRow:
    return LeasedRow(1, 0, 0, name.encode(), name, b"")


def crowded() -> Failure:
    return Failure.of(OutOfMemory("no room", alone=False))


def test_rows_that_run_out_of_memory_together_halve_the_limit_once_and_are_asked_again() -> None:
    limit, rows = MemoryLimit(8), [row(f"{at}") for at in range(8)]
    for each in rows:
        limit.enter(each)
    verdicts = [limit.judge(each, crowded(), 8 - at) for at, each in enumerate(rows)]
    assert all(verdict.again for verdict in verdicts)
    assert [verdict.halved_to for verdict in verdicts] == [4, *[None] * 7]
    assert limit.at_once == 4


def test_a_row_that_does_not_fit_alone_fails_and_the_others_get_their_room_back() -> None:
    limit, large = MemoryLimit(8), row("large")
    limit.enter(large)
    assert [limit.judge(large, crowded(), 8).again, limit.at_once] == [True, 4]
    limit.enter(large)
    assert [limit.judge(large, crowded(), 2).again, limit.at_once] == [True, 1]
    limit.enter(large)
    verdict = limit.judge(large, Failure.of(OutOfMemory("no room", alone=True)), 1)
    assert (verdict.again, verdict.departure, limit.at_once) == (False, None, 8)


def test_a_replica_that_fails_one_row_after_the_other_ends() -> None:
    limit, alone = MemoryLimit(1), Failure.of(OutOfMemory("no room", alone=True))
    ends = []
    for at in range(5):
        if at == 2:
            limit.note_answer(None)
        limit.enter(each := row(f"{at}"))
        ends.append(limit.judge(each, alone, 1).departure is not None)
    assert ends == [False, False, False, False, True]


def test_a_crash_without_memory_halves_the_requests_also_if_a_request_has_many_rows() -> None:
    """SGLang's embeddings: 64 texts a request, so 64 requests have 4,096 rows. At one request the crash counts."""
    crash, requests = Failure.of(engine_died("SGLang died: CUDA out of memory")), 64
    halved: list[int] = []
    while True:
        limit, each = MemoryLimit(64 * requests, requests), row("text")
        limit.enter(each)
        departure = limit.judge(each, crash, 64 * requests).departure
        if departure is None:
            break
        halved.append(requests := departure.at_once or 0)
    assert halved == [32, 16, 8, 4, 2, 1]


def test_problems_of_one_reason_are_one() -> None:
    status = RunStatus(problems=[ReplicaProblem("hardware[1]", "load", "no memory")])
    status.add(RunStatus(problems=[ReplicaProblem("hardware[1]", "load", "no memory")]))
    memory = [ReplicaProblem("hardware", "memory", "why", at_once=at) for at in (8, 4)]
    found = RunStatus(problems=memory).plus(status).problems
    assert [problem.sentence() for problem in found] == [
        "A replica of hardware[1] could not be loaded (2 times): no memory",
        "A replica ran out of memory and now takes at most 4 requests at once: why",
    ]


# -- runs -------------------------------------------------------------------------------------------------------------

MEMORY = "engine=echo was told to run out of memory"
NO_LOAD = "engine=echo was told to have no memory"


def entries(*kwargs: dict[str, Any], **more: Any) -> str:
    return "hardware=" + json.dumps([{"engine": {"kwargs": each, **more}} for each in kwargs])


def test_replicas_without_memory_are_told_and_the_others_answer_all_rows(
    infer: Infer, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry cannot be loaded, and the other one runs out of memory at more than five requests at once."""
    monkeypatch.setattr("pipeline.executors.live.live_run.Dispatcher", Together)
    from jobs import status
    from jobs.reading import open_output

    data = write_jsonl([ask(f"{at}") for at in range(100)])
    small = {"memory_rows": 5, "latency_s": 0.02}
    outcome = infer(data, entries(small, {"memory_at_load": True}, max_concurrency=16), "engine.kwargs.jitter_s=0")
    assert outcome.exit_status == 0
    assert [r["response"] for r in infer.rows()] == [f"{at}" for at in range(100)]
    assert outcome.manifest["this_run"] | {"requests_sent": 100} == {
        "asked": 100, "failed": 0, "requests_sent": 100, "engine_deaths": 0,
    }  # fmt: skip
    found = {(each["entry"], each["kind"]): each for each in outcome.manifest["replica_problems"]}
    assert found.keys() == {("hardware[0]", "memory"), ("hardware[1]", "load")}
    assert found["hardware[0]", "memory"] | {"count": 0} == {
        "entry": "hardware[0]", "kind": "memory", "reason": MEMORY, "count": 0, "at_once": 4,
    }  # fmt: skip
    said = (
        ReplicaProblem(**found["hardware[1]", "load"]).sentence(),
        f"A replica of hardware[0] ran out of memory and now takes at most 4 requests at once: {MEMORY}",
    )
    shown = status._shown(status.look(open_output(str(infer.out)))).plain
    for sentence in said:
        assert sentence in shown
        assert sentence in (infer.out / "report.html").read_text()
    assert f"A replica of hardware[1] could not be loaded: {NO_LOAD}." in infer.printed.replace("\n", " ")


@pytest.mark.slow
def test_a_row_that_is_too_large_fails_alone(infer: Infer, write_jsonl: Any) -> None:
    texts = [f"{at}" for at in range(60)]
    texts[30] = "large"
    kwargs = ("engine.kwargs.memory_text=large", "engine.kwargs.latency_s=0.02", "engine.max_concurrency=8")
    assert infer(write_jsonl([ask(text) for text in texts]), *kwargs).exit_status == 3
    failed = [r for r in infer.rows() if r["error"]]
    assert [(r["index"], r["error"]["type"], r["error"]["message"]) for r in failed] == [(30, "server", MEMORY)]


@pytest.mark.slow
def test_an_engine_that_must_be_loaded_again_gets_half_the_requests(infer: Infer, write_jsonl: Any) -> None:
    kwargs = ("memory_rows=5", "memory_dies=true", "latency_s=0.05")
    more = [f"engine.kwargs.{each}" for each in kwargs]
    outcome = infer(write_jsonl([ask(f"{at}") for at in range(80)]), *more, "engine.max_concurrency=16")
    assert outcome.exit_status == 0
    assert outcome.manifest["this_run"]["engine_deaths"] == 0
    assert [(each["kind"], each["at_once"]) for each in outcome.manifest["replica_problems"]] == [("memory", 4)]


@pytest.mark.slow
def test_a_run_ends_if_no_replica_has_memory(infer: Infer, write_jsonl: Any) -> None:
    data = write_jsonl([ask(f"large {at}") for at in range(20)])
    with pytest.raises(EnginesDied, match=NO_LOAD) as error:
        infer(data, entries({"memory_at_load": True}, {"memory_at_load": True}))
    assert error.value.code == ErrorCode.OUT_OF_MEMORY
    text = "had too little memory for single rows"
    with pytest.raises(EnginesDied, match=text) as error:
        infer(data, "engine.kwargs.memory_text=large", "engine.max_concurrency=2")
    assert error.value.code == ErrorCode.OUT_OF_MEMORY


@pytest.mark.slow
def test_a_run_ends_if_the_only_replicas_left_have_no_node(tmp_path: Path) -> None:
    """No node joins the Ray of a run, so an entry for which this machine is too small is left out."""
    fleet = entries({"memory_at_load": True}).removesuffix("]") + ', {"gpus": 64}]'
    data, out = write(tmp_path / "in.jsonl", 20), tmp_path / "out"
    printed = " ".join(finish(start(data, out, own_ray(), fleet), 4).split())
    assert "hardware[1]: there is room for 0 of 1 replica" in printed and "; they are left out." in printed
    assert NO_LOAD in printed


@pytest.mark.slow
def test_an_entry_whose_engines_die_is_given_up(infer: Infer, write_jsonl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.executors.live.live_run.Dispatcher", Together)
    data = write_jsonl([ask(f"{at}") for at in range(200)])
    outcome = infer(data, entries({"latency_s": 0.2}, {"crash_rate": 1}, max_concurrency=8), "run.max_engine_deaths=0")
    assert outcome.exit_status == 0
    assert [(each["entry"], each["kind"]) for each in outcome.manifest["replica_problems"]] == [("hardware[1]", "died")]


@pytest.mark.slow
def test_one_run_uses_two_kinds_of_nodes(raylets: Raylets, tmp_path: Path) -> None:
    rows = 16_000  # the second replica has 40 s to come
    data, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    for name in ("large", "small"):
        raylets.tell("add", name)
    fleet = [
        {"cpus": 1, "label_selector": {"name": name}, "engine": {"kwargs": {"latency_s": latency}, "max_concurrency": 8}}
        for name, latency in (("large", 0.02), ("small", 0.08))
    ]
    run = start(data, out, raylets.env, f"hardware={json.dumps(fleet)}")
    until(lambda: raylets.busy() == {"large", "small"}, run)
    finish(run)
    check(out, rows)
    latency = pq.read_table(out / "_segments", columns=["latency_s"])["latency_s"].to_pylist()
    answered = Counter(latency)
    assert answered.keys() == {0.02, 0.08}
    assert answered[0.02] > 1.5 * answered[0.08]
