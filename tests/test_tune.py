"""`eagleray tune`: the search, the sample, the changes in a run file; with engines that run in processes of their own."""

from __future__ import annotations

import io
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines import EngineConfig
from engines.errors import ConfigError
from engines.params import GenerationParams
from engines.registry import tuning_settings
from engines.tuning import Machine, Option, Setting
from engines.types import Request
from jobs import tune
from pipeline.configuration.compose import compose, compose_all
from pipeline.configuration.edit import edited
from pipeline.configuration.run_file import RunFile
from pipeline.errors import Stopped
from pipeline.tuning import report
from pipeline.tuning.sample import expected_costs, sample_requests
from pipeline.tuning.search import Found, Search
from pipeline.tuning.trials import Measured, Trials, _summed, with_changes
from pipeline.tuning.tune import Spending
from tests.support.checkpoint import checkpoint_dir
from tests.support.provider_server import ProviderServer

# -- the search -------------------------------------------------------------------------------------------------------


def ladder(*values: int) -> tuple[Option, ...]:
    return tuple({"slots": value} for value in values)


def measured(rate: Callable[[Option, int], float | str | None]) -> tuple[Search, list[Option]]:
    """A search over `rate(changes, number of the measurement)`: tokens a second, or an error, or None for a cut one."""
    asked: list[Option] = []

    def measure(changes: Option, limit_s: float, load_limit_s: float) -> Measured:
        asked.append(dict(changes))
        found = rate(changes, len(asked))
        if isinstance(found, str):
            return Measured(changes, error=found)
        return Measured(changes, rows=64, seconds=1.0, output=round(found or 1), is_cut=found is None)

    return Search(measure, lambda rows: None, seconds=60), asked


def test_a_ladder_is_climbed_while_it_gains_and_the_best_is_measured_again_in_turns() -> None:
    search, asked = measured(lambda changes, _: {8: 1000, 16: 1500, 32: 1800, 64: 1700}[changes.get("slots", 8)])
    found = search.run(lambda: [Setting((ladder(16, 32, 64, 128), ladder(4, 2)), True)])
    assert found.changes == {"slots": 32} and found.gain == pytest.approx(0.8)
    slots = [changes.get("slots", 8) for changes in asked]
    assert slots == [8, 8, 16, 32, 64, 32, 8, 8, 32]  # 128 comes after a loss, 4 and 2 are in the other direction


def test_a_ladder_goes_down_if_up_does_not_gain() -> None:
    search, _ = measured(lambda changes, _: {8: 1000, 16: 900, 4: 1100, 2: 1090}[changes.get("slots", 8)])
    assert search.run(lambda: [Setting((ladder(16, 32), ladder(4, 2)), True)]).changes == {"slots": 4}


def test_gains_below_the_noise_do_not_win() -> None:
    rates = iter([1000, 1060, 1200, 1000, 1190, 1010, 1020])  # equal settings differ by 6%, and later by 19%
    search, asked = measured(lambda changes, _: next(rates))
    found = search.run(lambda: [Setting((ladder(16),))])
    assert asked[2:] == [{"slots": 16}, {"slots": 16}, {}, {}, {"slots": 16}]
    assert found.changes == {} and found.tried == {"slots": 16}
    assert found.noise == pytest.approx(0.19)


def test_settings_are_added_up_and_a_try_that_dies_is_a_line() -> None:
    def rate(changes: Option, _: int) -> float | str | None:
        if changes.get("slots") == 16:
            return "no memory for 16 sequences"
        gains = {"batch": 1.5, "threads": 1.2}
        return None if "flash" in changes else 1000 * math.prod(gains.get(name, 1) for name in changes)

    search, asked = measured(rate)
    found = search.run(lambda: [
        Setting((ladder(16, 32),), True), Setting((({"batch": 1024},),)), Setting((({"flash": True},),)),
        Setting((({"threads": 2},),)),
    ])  # fmt: skip
    assert found.changes == {"batch": 1024, "threads": 2} and found.gain == pytest.approx(0.8)
    assert [each.error for each in found.measured if each.changes.get("slots")] == ["no memory for 16 sequences"]
    assert {"slots": 32} not in asked and {"batch": 1024, "flash": True} in asked


def test_more_failed_rows_do_not_win() -> None:
    def measure(changes: Option, *_: float) -> Measured:
        return Measured(changes, rows=64, failed=len(changes), seconds=1.0, output=2000 if changes else 1000)

    assert Search(measure, lambda rows: None, 60).run(lambda: [Setting((ladder(16),))]).changes == {}


def test_the_search_ends_with_the_budget_and_keeps_enough_for_the_confirmation() -> None:
    left = [7]  # measurements that the budget allows

    def rate(changes: Option, number: int) -> float:
        left[0] -= 1
        return 1000.0 * changes.get("slots", 1)

    search, asked = measured(rate)
    search.affordable = lambda count: count <= left[0]
    found = search.run(lambda: [Setting((ladder(2, 4, 8), ()), True)])
    assert found.ended_by == "run.budget_usd" and found.changes == {"slots": 2}
    assert len(asked) == 7


@pytest.mark.parametrize(("allowed", "made"), [(1, 0), (2, 1)])
def test_a_budget_that_is_too_small_for_the_configuration_itself_is_not_spent(allowed: int, made: int) -> None:
    """The second one is too expensive when the first one has cost more than was expected."""
    search, asked = measured(lambda *_: 1000.0)
    search.affordable = lambda count: count + 2 * len(asked) <= allowed
    with pytest.raises(Stopped, match="run.budget_usd is too small for two measurements"):
        search.run(list)
    assert len(asked) == made


def test_a_sample_that_takes_too_long_is_cut_and_a_configuration_that_fails_stops() -> None:
    cut = []
    results = [Measured({}, rows=20, seconds=7.5, output=100, is_cut=True)]

    def measure(changes: Option, limit_s: float, load_limit_s: float) -> Measured:
        return results.pop() if results else Measured(changes, rows=20, seconds=7.0, output=100)

    assert Search(measure, cut.append, 60).run(list).measured[0].rows == 20
    assert cut == [20]
    search, _ = measured(lambda *_: "there is no file model.gguf")
    with pytest.raises(Stopped, match="cannot be measured: there is no file model.gguf"):
        search.run(list)
    few = Search(lambda *_: Measured({}, rows=3, seconds=7.5, output=9, is_cut=True), cut.append, 60)
    with pytest.raises(Stopped, match="3 rows are done in 8 s"):
        few.run(list)


def test_a_measurement_of_unknown_cost_counts_as_the_most_expensive_one() -> None:
    """A request failed, or the process died, while requests were in flight."""
    words = ["engine=openai", "engine.model=gpt-6-luna", "run.budget_usd=1"]
    spent = Spending(compose(words), Trials(compose(words), requests(4), []), 8)
    spent.add(Measured({}, cost_usd=0.25))
    spent.add(_summed(Measured({}), [{"error": "its process died (SIGKILL)"}], 4))
    assert spent.spent == 0.5 and spent.allows(2) and not spent.allows(3)


@pytest.mark.parametrize(
    ("words", "model", "keys"),
    [
        (["engine=openai", "engine.model=new"], None, "openai new: set engine.price.input and engine.price.output"),
        (["engine=openai", "engine.model=new", "engine.price.input=0"], None, "openai new: set engine.price.input"),
        (
            ["engine=openai", "engine.model=gpt-6-luna", "run.budget_usd=1"],
            "new",
            "openai new: set its rates in engine.prov",
        ),
        (["engine=openai_compatible", "engine.api_key_env=MY_KEY"], None, "openai_compatible: set engine.price.input"),
        (["engine=openai_compatible", "engine.headers={authorization: Bearer abc}"], None, "set engine.price.input"),
    ],
)
def test_requests_of_unknown_cost_are_not_sent(
    words: list[str], model: str | None, keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-test")
    config = compose(words)
    spent = Spending(
        config, Trials(config, [*requests(4), Request(requests(1)[0].messages, config.params(), model)], []), 8
    )
    with pytest.raises(ConfigError, match=re.escape(keys)) as raised:
        spent.check()
    assert ("run.budget_usd" in str(raised.value)) == (config.run.budget_usd is None)
    assert spent.allows(1) == (config.run.budget_usd is None)


@pytest.mark.parametrize(
    "words",
    [
        ["engine=echo"],
        ["engine=remote_vllm", "engine.api_key_env=MY_KEY"],
        ["engine=openai_compatible"],
        ["engine=openai", "engine.model=new", "engine.price.input=0", "engine.price.output=0"],
    ],
)
def test_requests_that_are_free_need_no_budget(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-test")
    spent = Spending(compose(words), Trials(compose(words), requests(4), []), 8)
    spent.check()
    assert spent.allows(100)


def test_the_cost_is_by_the_model_that_a_row_names() -> None:
    config = compose(["engine=openai", "engine.model=gpt-6-luna", "engine.price.input=0", "engine.price.output=0"])
    own, other = requests(1, max_tokens=100)[0], requests(1, max_tokens=100)[0]
    other.model = "gpt-5.4-mini"
    none, some = expected_costs(config.engine, [own, other])
    assert none == 0.0 and some is not None and some > 0


def test_an_error_of_a_library_is_one_line_in_tables_and_in_comments() -> None:
    failed = _summed(Measured({"x": 1}), [{"error": "CUDA error\nhardware: {replicas: 64}\x1b[2J"}], 4)
    assert failed.error == "CUDA error hardware: {replicas: 64}\\x1b[2J"
    lines = report.comment(EngineConfig(kind="echo"), Found([Measured({}, "baseline", 4, 0, 1.0, output=9), failed]), 4)
    assert not [line for line in lines if "\n" in line] and "CUDA error hardware" in lines[-1]


def test_a_configuration_that_answers_no_row_in_time_has_a_line() -> None:
    none = Measured({}, "baseline", seconds=75.0, load_s=2.0, is_cut=True)
    assert report.rows(EngineConfig(kind="echo"), Found([none])) == [
        ("the configuration", "0", "0", "", "2 s", "stopped: slower")
    ]


# -- the settings -----------------------------------------------------------------------------------------------------


def options(config: EngineConfig, machine: Machine) -> list[Option]:
    return [option for setting in tuning_settings(config, machine) for chain in setting.chains for option in chain]


@pytest.mark.parametrize("kind", ["llamacpp", "transformers", "vllm", "sglang_offline", "openai"])
def test_every_engine_has_settings_that_are_not_its_own_values(kind: str) -> None:
    config = compose([f"engine={kind}", "engine.model=m"])
    for gpus in (0, 8):
        found = options(config.engine, Machine(gpus, 1024))
        assert found
        for option in found:
            assert with_changes(config, option) != config
            with_changes(config, option).check(runs=False)


def test_eight_gpus_are_divided_among_replicas() -> None:
    found = options(EngineConfig("vllm", "m", kwargs={"tensor_parallel_size": 4}), Machine(8, 1024, replicas=2))
    names = ("engine.kwargs.tensor_parallel_size", "hardware.replicas")
    parallel = [tuple(option[name] for name in names) for option in found if names[1] in option]
    assert parallel == [(1, 8), (2, 4), (8, 1)]  # the configuration has two replicas of four GPUs


def test_slots_need_twice_as_many_rows() -> None:
    (setting,) = tuning_settings(EngineConfig("echo", max_concurrency=8), Machine(0, 64))
    assert setting.chains == (
        ({"engine.max_concurrency": 16}, {"engine.max_concurrency": 32}), ({"engine.max_concurrency": 4},)
    )  # fmt: skip
    assert setting.left_out == {"engine.max_concurrency": 64}


# -- the sample -------------------------------------------------------------------------------------------------------


def test_the_sample_comes_from_all_files_and_is_the_same_for_a_seed(tmp_path: Path) -> None:
    for file in range(5):
        rows = ({"messages": [{"role": "user", "content": f"{file} {row % 90}"}]} for row in range(100))
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    console = Console(quiet=True)

    def sample(count: int, seed: int = 0) -> list[str]:
        config = compose(["engine=echo", f"dataset.path={tmp_path}", f"tune.seed={seed}"])
        return [str(request.messages[0]["content"]) for request in sample_requests(config, count, console)]

    found = sample(20)
    assert len(set(found)) == 20 and {text[0] for text in found} == set("01234")
    assert sample(20) == found and sample(20, seed=1) != found
    assert len(sample(1000)) == 450  # different ones


# -- the run file -----------------------------------------------------------------------------------------------------

FILE = """\
# My run.
dataset:
  path: in.jsonl   # the rows
engine:
  name: llamacpp
  max_concurrency: 8  # slots
  kwargs: {n_ctx: 1024, n_batch: 512}

generation.max_tokens: 64
"""
CHANGES = {"engine.max_concurrency": 32, "engine.kwargs.n_batch": 1024, "engine.kwargs.n_ubatch": 1024}


def test_values_change_in_place_and_comments_and_order_stay() -> None:
    text = edited("run.yaml", FILE, CHANGES, ["Tuned by eagleray tune on 2026-11-26: faster.", "  a table"])
    assert text == FILE.replace("max_concurrency: 8", "max_concurrency: 32").replace("n_batch: 512", "n_batch: 1024") + (
        "\n# Tuned by eagleray tune on 2026-11-26: faster.\n#   a table\nengine.kwargs.n_ubatch: 1024\n"
    )
    text = text.replace("#   a table\n", "#   a table\n#  mine\n")
    again = edited("run.yaml", text, {"engine.max_concurrency": 16}, ["Tuned by eagleray tune on 2026-11-27: again."])
    assert again is not None and again.count("# Tuned by") == 1 and "a table" not in again and "#  mine\n" in again
    values = RunFile.of("run.yaml", again).values["engine"]
    assert values == {"max_concurrency": 16, "kwargs": {"n_ctx": 1024, "n_batch": 1024, "n_ubatch": 1024}}


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("engine: echo\r\ndataset.path: x\r\n", "engine.max_concurrency: 32\r\n"),
        ("engine: echo", "engine.max_concurrency: 32\n"),
        ("engine:\n  name: echo\n  max_concurrency:\n", "max_concurrency: 32\n\n# Tuned\n"),
        ("engine.max_concurrency: null\nengine: echo # last", "engine: echo # last\n\n# Tuned\n"),
    ],
)
def test_files_of_all_forms(text: str, ending: str) -> None:
    found = edited("run.yaml", text, {"engine.max_concurrency": 32}, ["Tuned"])
    assert found is not None and found.endswith(ending)
    assert RunFile.of("run.yaml", found).values["engine"]["max_concurrency"] == 32
    assert found.count("\r\n") == (found.count("\n") if "\r\n" in text else 0)


@pytest.mark.parametrize(
    "text",
    [
        "{engine: echo, dataset.path: x}",
        "run.flush_s: &n 8\nengine: {name: echo, max_concurrency: *n}",
        "x: &e {max_concurrency: 8}\nengine: {name: echo, <<: *e}".replace("x:", "hardware.label_selector:"),
    ],
)
def test_a_file_that_cannot_be_changed_safely_is_not(text: str) -> None:
    RunFile.of("run.yaml", text)
    assert edited("run.yaml", text, {"engine.max_concurrency": 32}, ["Tuned"]) is None


# -- whole commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = ({"messages": [{"role": "user", "content": f"Name {n} things."}]} for n in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def requests(count: int, **generation: Any) -> list[Request]:
    params = GenerationParams(**generation)
    return [Request([{"role": "user", "content": f"Name {n} things."}], params) for n in range(count)]


def test_a_process_that_dies_or_cannot_load_is_a_result() -> None:
    config = compose(["engine=echo", "engine.kwargs.crash_text=Name 3 things."])
    trials = Trials(config, requests(8), requests(1))
    died = trials.measure({}, 60, 240)
    assert died.error is not None and died.error.startswith("its process died (SIG")
    wrong = trials.measure({"engine.kwargs.latency": 1}, 60, 240)
    assert wrong.error is not None and "engine.kwargs.latency" in wrong.error
    two = compose(["engine=echo", "hardware.replicas=2", "hardware.gpus=1"])
    few = Trials(two, requests(1), [], ["0", "1"]).measure({}, 60, 240)
    assert (few.error, few.rows) == (None, 1)


def test_a_process_takes_no_module_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "queue.py").write_text("raise ImportError('not a module of the standard library')\n")
    monkeypatch.chdir(tmp_path)
    found = Trials(compose(["engine=echo"]), requests(1), []).measure({}, 60, 240)
    assert (found.error, found.rows) == (None, 1)


@pytest.mark.slow
def test_the_command_writes_what_is_faster_into_the_run_file(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    text = "# mine\ndataset.path: in.jsonl\nengine:\n  name: echo\n  max_concurrency: 4 # few\n  kwargs: {latency_s: 1.0}\n"
    file.write_text(f"{text}output.path: out\n")
    assert tune.main([str(file), "tune.rows=32", "--write", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"] == {"engine.max_concurrency": 16} and result["written"] == str(file)
    assert result["gain"] > 1 and {each["role"] for each in result["measured"]} == {"baseline", "try", "confirm"}
    assert file.read_text().startswith(text.replace(": 4 #", ": 16 #"))
    assert "# Tuned by eagleray tune" in file.read_text()
    assert not (tmp_path / "out").exists()


def test_without_a_flag_the_changes_are_only_shown(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(FILE)
    shown = io.StringIO()
    composed = compose_all([], run_file=RunFile.read(str(file)))

    def write(writes: bool, text: str) -> str | None:
        file.write_text(text)
        tuning = tune.Tuning(composed, RunFile.read(str(file)), writes, False)
        return tuning.write(str(file), text, CHANGES, ["Tuned"], Console(file=shown, width=200))

    assert write(False, FILE) is None and file.read_text() == FILE
    assert "-  max_concurrency: 8  # slots" in shown.getvalue() and "+  max_concurrency: 32  # slots" in shown.getvalue()
    assert write(True, FILE) == str(file) and "max_concurrency: 32  # slots" in file.read_text()
    whole = "{engine: {name: llamacpp, kwargs: {n_batch: 512}}, dataset.path: in.jsonl}"  # no line can be added to it
    assert write(True, whole) == str(tmp_path / "run.tuned.yaml") and file.read_text() == whole
    beside = RunFile.read(str(tmp_path / "run.tuned.yaml")).values
    assert beside["engine"]["kwargs"]["n_ubatch"] == 1024 and beside["dataset"]["path"].endswith("in.jsonl")


def test_the_keys_of_the_result_can_be_pasted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"engine.kwargs.speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}
    monkeypatch.setattr("pipeline.tuning.tune.tune", lambda config, console: (Found(changes=changes), 4))
    words = ["engine=vllm", "engine.model=m", "dataset.path=in.jsonl"]
    assert tune.Tuning(compose_all(words), None, False, False).run(Console(quiet=True)) == 0
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Keys: "))
    assert compose([*words, *shlex.split(printed.removeprefix("Keys: "))]) == with_changes(compose(words), changes)


def test_a_provider_of_unknown_price_is_not_asked(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with ProviderServer() as server:
        words = ["engine=openai", "engine.model=new", f"engine.base_url={server.url}/v1", f"dataset.path={rows}"]
        assert tune.main([*words, "tune.rows=8", "tune.minutes=0.2"]) == 2
        found = capsys.readouterr().err
        assert "set engine.price.input and engine.price.output" in found and "and run.budget_usd" in found
        assert not server.requests


@pytest.mark.slow
def test_a_provider_needs_a_budget_and_the_limits_of_the_run_apply(
    rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with ProviderServer() as server:
        server.latency_s = 1.0
        words = [
            "engine=openai", "engine.model=gpt-6-luna", f"engine.base_url={server.url}/v1", f"dataset.path={rows}",
            "tune.rows=16", "engine.max_concurrency=4", "generation.max_tokens=8",
        ]  # fmt: skip
        assert tune.main(words) == 2
        assert "set run.budget_usd" in capsys.readouterr().err and not server.requests
        assert tune.main([*words, "run.budget_usd=1", "--json"]) == 0
        found = capsys.readouterr()
    result = json.loads(found.out)
    assert re.search(r"At most \d+ measurements of 20 requests, about \$", found.err)
    assert len(server.requests) == sum(each["rows"] + 4 for each in result["measured"])
    assert all(each["cost_usd"] > 0 for each in result["measured"])
    assert "sk-test" not in found.out + found.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["engine=llamacpp", "engine.kwargs.n_ctx=256"], {"engine.kwargs.n_batch": 64, "engine.kwargs.flash_attn": True}),
        (["engine=transformers", "engine.model=CHECKPOINT"], {"engine.kwargs.max_batch_size": 2, "hardware.cpus": 1}),
    ],
)
def test_real_engines_are_measured_with_changes(words: list[str], change: Option) -> None:
    config = compose([word.replace("CHECKPOINT", str(checkpoint_dir())) for word in words])
    found = Trials(config, requests(4, max_tokens=8), requests(1, max_tokens=8)).measure(change, 120, 240)
    assert found.error is None and (found.rows, found.failed, found.is_cut) == (4, 0, False)
    assert 0 < found.output <= 32 and found.rate > 0 and found.load_s > 0
