"""The command line: help a person can read, and one line with the nearest right name for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.types import ConfigError
from jobs import cli, infer
from jobs.compose import compose
from pipeline.config import known_keys
from tests.conftest import ask

GOOD = ["engine=echo", "dataset.path=in.jsonl", "output.path=out"]


def test_help_lists_every_key_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, item in known_keys().items():
        if name != "engine.kind":
            assert f"  {name}" in text
            assert item is None or item.metadata["help"] in text
    assert "engine=echo | llamacpp | transformers" in text


def test_cfg_job_prints_the_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main([*GOOD, "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    for section in ("engine:", "hardware:", "dataset:", "generation:", "output:", "run:", "  path: in.jsonl"):
        assert section in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine=llamcpp", "there is no engine 'llamcpp' (did you mean 'llamacpp'?)"),
        ("engine.modle=x", "there is no key 'engine.modle' (did you mean 'engine.model'?)"),
        ("engin.model=x", "did you mean 'engine.model'?"),
        ("generation.temprature=1", "did you mean 'generation.temperature'?"),
        ("generation.temperature=-1", "generation.temperature must be a number between 0.0 and inf, not -1"),
        ("generation.temperature=warm", "generation.temperature must be a number"),
        ("engine.max_concurrency=many", "engine.max_concurrency: Value 'many'"),
        ("engine.max_concurrency=0", "engine.max_concurrency must be at least 1, not 0"),
        ("engine.price.inpt=1", "'inpt'"),
        ("output.format=csv", "output.format=csv is not known (known: jsonl, parquet)"),
        ("output.style=oumi", "output.style=oumi needs output.format=jsonl"),
        ("hardware.replicas=0", "hardware.replicas must be a number of at least 1"),
        ("hardware.replicas={min:3,max:2}", "a min of 3 above its max of 2"),
        ("run.flush_s=0", "run.flush_s must be at least 0.05, not 0.0"),
        ("run.max_error_rate=2", "run.max_error_rate must be between 0 and 1, not 2.0"),
        ("dataset.format=mesages", "mesages"),
        ("dataset.path=nowhere.jsonl", "nowhere.jsonl"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("--config-dir=/nowhere", "--config-dir /nowhere is not a directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    override: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    assert infer.main([*GOOD, "run.dry_run=true", override]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("eagleray: ")
    assert said in lines[0]


@pytest.mark.parametrize("missing", ["dataset.path", "output.path"])
def test_a_missing_path_is_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main([arg for arg in GOOD if not arg.startswith(missing)]) == 2
    assert f"{missing} is missing" in capsys.readouterr().err


def test_an_unknown_job_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eagleray", "infr"])
    assert cli.main() == 2
    assert "did you mean 'infer'?" in capsys.readouterr().err


def test_open_keys_need_no_plus_and_values_may_hold_anything() -> None:
    config = compose(
        [*GOOD, "engine.kwargs.latency_s=0.1", "dataset.columns.prompt=question", "engine.headers.x-a=b",
         "engine.price.input=2.5", 'dataset.template=It\'s "{{ question }}"', "dataset.path='s3://b/in/*.parquet'"]
    )  # fmt: skip
    assert config.engine.kwargs == {"latency_s": 0.1}
    assert config.dataset.columns == {"prompt": "question"}
    assert config.engine.headers == {"x-a": "b"}
    assert config.engine.price.input == 2.5
    assert config.dataset.template == 'It\'s "{{ question }}"'
    assert config.dataset.path == "s3://b/in/*.parquet"


def test_a_users_own_engine_file_is_an_option(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "slow.yaml").write_text("kind: echo\nmodel: slow\nkwargs: {latency_s: 1.0}\n")
    config = compose(["engine=slow"], str(tmp_path))
    assert (config.engine.kind, config.engine.kwargs) == ("echo", {"latency_s": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'slow'"):
        compose(["engine=slo"], str(tmp_path))


def test_secrets_reach_no_file_and_no_message(
    local_ray: None,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    data, out = write_jsonl([ask("x"), "{"]), tmp_path / "out"
    assert (
        infer.main(["engine=echo", "engine.api_key_env=OPENAI_API_KEY", f"dataset.path={data}", f"output.path={out}"]) == 3
    )
    printed = capsys.readouterr()
    assert secret not in printed.out + printed.err
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert not any(secret.encode() in path.read_bytes() for path in files)


def test_the_command_and_the_module_say_the_same() -> None:
    texts = [
        subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True, check=True).stdout
        for module in (["jobs.infer", "--help"], ["jobs.cli", "infer", "--help"])
    ]
    assert texts[0] == texts[1]
