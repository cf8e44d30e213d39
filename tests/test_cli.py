"""The command line: help a person can read, and one line with the nearest right name for what is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines.errors import ConfigError
from engines.registry import load_engine
from jobs import cli, infer, status
from jobs.cli import JOBS
from pipeline.config import known_keys
from pipeline.configuration.compose import compose
from tests.support.infer import ask
from tests.support.marks import slow
from tests.support.outputs import durable, write
from tests.support.processes import PATIENCE_S, family, finish, gone, own_ray, until

GOOD = ["engine=echo", "dataset.path=in.jsonl", "output.path=out"]


def test_help_lists_every_key_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, item in known_keys().items():
        if name != "engine.kind":
            assert f"  {name}" in text
            assert item.metadata["help"]
            assert item.metadata["help"] in text
    assert "engine=anthropic | bedrock" in text


def test_cfg_job_prints_the_whole_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main([*GOOD, "--cfg", "job"]) == 0
    text = capsys.readouterr().out
    for section in ("engine:", "hardware:", "dataset:", "generation:", "output:", "run:", "  path: in.jsonl"):
        assert section in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine=llamcpp", "there is no engine 'llamcpp' (did you mean 'llamacpp'?)"),
        ("engine=ollama", "use engine=openai_compatible engine.base_url=http://localhost:11434/v1"),
        ("engine=lm-studio", "use engine=openai_compatible engine.base_url=http://localhost:1234/v1"),
        ("engine=llama-server", "use engine=openai_compatible engine.base_url=http://localhost:8080/v1"),
        (
            "engine.fallback=[groq]",
            "engine.base_url=https://api.groq.com/openai/v1 engine.api_key_env=GROQ_API_KEY",
        ),
        ("engine.modle=x", "there is no key 'engine.modle' (did you mean 'engine.model'?)"),
        ("engin.model=x", "did you mean 'engine.model'?"),
        ("generation.temprature=1", "did you mean 'generation.temperature'?"),
        ("generation.temperature=-1", "generation.temperature must be a number between 0.0 and inf, not -1"),
        ("generation.temperature=warm", "generation.temperature must be a number"),
        ("engine.max_concurrency=many", "engine.max_concurrency must be a whole number or null, not many"),
        ("engine.max_concurrency=1.5", "engine.max_concurrency must be a whole number or null, not 1.5"),
        ("run.flush_s=null", "run.flush_s must be a number, not null"),
        ("run.resume=maybe", "run.resume must be true or false, not maybe"),
        ("output.path=[a,b]", "output.path must be a text or null, not [a,b]"),
        ("engine.headers=abc", "engine.headers must be keys with values"),
        ("engine.model.x=1", "engine.model takes a value and has no keys of its own"),
        ("engin=echo", "there is no key 'engin' (did you mean 'engine'?)"),
        ("model=x", "there is no key 'model' (did you mean 'engine.model'?)"),
        ("path=x", "(did you mean 'dataset.path' or 'output.path'?)"),
        ("ENGINE.MODEL=x", "did you mean 'engine.model'?"),
        ("run.budget=1", "did you mean 'run.budget_usd'?"),
        ("run.wholly=1", "(known: batch_fallback, batch_poll_s, budget_usd, drain_s, dry_run, flush_s"),
        ("run.budget_usd=0", "run.budget_usd must be above 0, not 0.0"),
        (
            "run.budget_usd=1",
            "run.budget_usd needs a price, and none is known for engine=echo model=echo: give engine.price",
        ),
        ("+engine.modle=x", "did you mean 'engine.model'?"),
        ("~engine.model", "keys can only be set: engine.model=null"),
        ("engine@x=echo", "is not of the form key=value"),
        ("hardware=labtop", "there is no hardware 'labtop' (did you mean 'laptop'?)"),
        ("engine.kind=ecko", "engine.kind=ecko is not known (did you mean 'echo'?)"),
        ("engine.timeout_s=0", "engine.timeout_s must be above 0, not 0.0"),
        ("engine.fallback=[{engine:echo,timeout_s:0}]", "engine.timeout_s must be above 0, not 0"),
        ("engine.requests_per_minute=-1", "engine.requests_per_minute must be above 0"),
        ("engine.price.input=-1", "engine.price.input must be a number of at least 0, not -1.0"),
        ("hardware.cpus=-1", "hardware.cpus must be at least 0"),
        ("hardware.gpus=1.5", "hardware.gpus above 1 must be a whole number, not 1.5"),
        ("hardware.replicas={mim:3}", "there is no key 'hardware.replicas.mim' (did you mean 'min'?)"),
        ("dataset.columns.promt=q", "there is no role 'promt' (did you mean 'prompt'?)"),
        ("dataset.template={usr: x}", "there is no role 'usr' (did you mean 'user'?)"),
        ("dataset.on_bad_input=explode", "dataset.on_bad_input=explode is not known"),
        ("dataset.path=5", "dataset.path must be a text or a list of them, not 5"),
        ("dataset.path=a,b", 'either a list, "dataset.path=[a,b]"'),
        ("dataset.path=in.json", "did you mean 'in.jsonl'?"),
        ("dataset.limit=0", "dataset.limit must be at least 1, not 0"),
        ("generation.stop=['${x}']", "generation.stop[0]: ${…} refers to another value, which cannot be found or used"),
        ("engine.model=${oc.env:NO_SUCH_VARIABLE}", "engine.model: the environment variable NO_SUCH_VARIABLE is not set"),
        ("engine.headers.X Y=c", "cannot read 'engine.headers.X Y=c'"),
        ("engine.max_concurrency=0", "engine.max_concurrency must be at least 1, not 0"),
        ("engine.price.inpt=1", "did you mean 'engine.price.input'?"),
        ("output.format=csv", "output.format=csv is not known (known: jsonl, parquet)"),
        ("output.style=oumi", "output.style=oumi needs output.format=jsonl"),
        ("hardware.replicas=0", "hardware.replicas must be auto, a number of at least 1"),
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


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"max_concurrency": 0}, "engine.max_concurrency must be at least 1, not 0"),
        ({"max_concurrency": "many"}, "engine.max_concurrency must be at least 1, not 'many'"),
        ({"timeout_s": float("nan")}, "engine.timeout_s must be above 0, not nan"),
        ({"unsupported": "dorp"}, r"engine.unsupported=dorp is not known \(did you mean 'drop'\?\)"),
        ({"price": {"output": True}}, "engine.price.output must be a number of at least 0, not True"),
    ],
)
def test_an_engine_built_in_python_is_checked_by_the_same_table(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_engine("echo", **keys)


def test_an_unknown_job_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eagleray", "infr"])
    assert cli.main() == 2
    assert "did you mean 'infer'?" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["infer --help", "models openai", "engines", "--help", "completion zsh"])
def test_a_reader_that_leaves_is_no_error(words: str) -> None:
    """As `| head`: the pipe is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    command = [sys.executable, "-m", "jobs.cli", *words.split()]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert done.returncode == 0 and "BrokenPipe" not in done.stderr and "Traceback" not in done.stderr


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dataset.columns={prompt: body, id: ticket_id}", {"prompt": "body", "id": "ticket_id"}),
        ("dataset.columns={model: null}", {"model": None}),
        ("engine.kwargs={latency_s: 0.1, a: {b: [1, x]}}", {"latency_s": 0.1, "a": {"b": [1, "x"]}}),
        ('engine.kwargs={"a": {"b": [1, true, null]}, "c": "x, y"}', {"a": {"b": [1, True, None]}, "c": "x, y"}),
        ("engine.headers={X-A: b, Referer: https://x.y/z}", {"X-A": "b", "Referer": "https://x.y/z"}),
        ("engine.headers={X-A: it's}", {"X-A": "it's"}),
        ("engine.extra_body={user: u, nested: {n: 1}}", {"user": "u", "nested": {"n": 1}}),
        ("engine.extra_body={}", {}),
        ("engine.provider={wire: chat}", {"wire": "chat"}),
        ("engine.provider.finish_reasons={eos: stop}", {"eos": "stop"}),
        ("hardware.label_selector={zone: a}", {"zone": "a"}),
        ("generation.logit_bias={50256: -100}", {50256: -100}),
        ('generation.tools=[{"type": "function", "function": {"name": "f"}}]',
         [{"type": "function", "function": {"name": "f"}}]),
        ('dataset.template={"system": "s", "user": "{{ q }}, please"}', {"system": "s", "user": "{{ q }}, please"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_mappings_and_lists_arrive_as_they_were_typed(override: str, expected: Any, sign: str) -> None:
    value: Any = compose([*GOOD, sign + override])
    for name in override.partition("=")[0].split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    assert value == expected


def test_a_mapping_is_added_to_the_keys_of_the_option() -> None:
    config = compose(["engine=openrouter", "engine.provider={images: false}", *GOOD[1:]])
    assert (config.engine.provider["wire"], config.engine.provider["images"]) == ("chat", False)


@pytest.mark.parametrize("job", ["infer", "plan"])
@pytest.mark.parametrize("module", [False, True], ids=["command", "module"])
def test_each_job_takes_mappings(job: str, module: bool) -> None:
    start = ["jobs." + job] if module else ["jobs.cli", job]
    words = [*GOOD, "dataset.columns={prompt: body, id: ticket_id}", "engine.kwargs={latency_s: 0.1}", "--cfg", "job"]
    done = subprocess.run([sys.executable, "-m", *start, *words], capture_output=True, text=True, check=True)
    assert "    prompt: body\n    id: ticket_id\n" in done.stdout
    assert "  kwargs:\n    latency_s: 0.1\n" in done.stdout


@pytest.mark.parametrize(
    "text",
    ["a b", "a=b", "a,b c: d", "it's", 'say "hi"', "{{ q }}, {{ r }}", "a\nb", "C:\\dir\\x", "back\\", "\\'x", "日本語 😀",
     "a#b;c|d&e", "[0-9]*?", "[x", "(x)", "$HOME", "a@b:c", "~x", "s3://b/a b/*.parquet", "1e5", "007", "true",
     "Hi, {{ name }}!\nIt's \"x\" \\ done"],
)  # fmt: skip
def test_a_text_arrives_as_it_was_typed(text: str) -> None:
    assert compose([*GOOD, f"engine.model={text}"]).engine.model == text


def test_a_sign_before_a_key_changes_nothing() -> None:
    config = compose([*GOOD, "+engine.model=a", "++run.flush_s=3", "+engine.kwargs.x=1", "+engine.kwargs.x=2"])
    assert (config.engine.model, config.run.flush_s, config.engine.kwargs) == ("a", 3.0, {"x": 2})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: echo\nmodle: x\n", "there is no key 'engine.modle' (did you mean 'engine.model'?)"),
        ("kind: echo\nmax_concurrency: many\n", "engine.max_concurrency must be a whole number"),
        ("kind: [echo\n", "is not YAML"),
        ("- a\n", "In 'engine/mine'"),
        ("model: x\n", "engine.kind is missing (known: anthropic"),
    ],
)
def test_what_is_wrong_in_a_users_own_file_is_said_in_one_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mine.yaml").write_text(text)
    assert infer.main(["engine=mine", *GOOD[1:], "--config-dir", str(tmp_path), "run.dry_run=true"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_a_directory_that_cannot_be_written_is_a_configuration_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text('{"prompt": "x"}\n')
    assert infer.main(["engine=echo", f"dataset.path={data}", f"output.path={data}/out"]) == 2
    assert f"output.path: cannot write into {data}/out: Not a directory" in capsys.readouterr().err


def test_a_secret_that_was_interpolated_is_not_printed_nor_written(
    local_ray: None,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    secret, typed = "sk-very-secret-0123456789", "typed-on-the-command-line"
    monkeypatch.setenv("MY_API_KEY", secret)
    headers = [
        "engine.headers.x-auth=Bearer ${oc.env:MY_API_KEY}", f"engine.headers.authorization={typed}",
        "engine.headers.accept=text", f"engine.extra_body.nested.token={typed}", "generation.max_tokens=7",
    ]  # fmt: skip
    out = tmp_path / "out"
    argv = ["engine=echo", *headers, f"dataset.path={write_jsonl([ask('x')])}", f"output.path={out}"]
    assert compose(argv).engine.headers["x-auth"] == f"Bearer {secret}"
    assert infer.main([*argv, "--cfg", "job"]) == 0
    assert infer.main(argv) == 0
    printed = capsys.readouterr()
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for hidden in (secret, typed):
        assert hidden not in printed.out + printed.err
        assert hidden.encode() not in written
    assert "x-auth: Bearer ***" in printed.out
    assert "max_tokens: 7" in printed.out
    assert "accept: text" in printed.out


def test_a_users_own_engine_file_is_an_option(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "slow.yaml").write_text("kind: echo\nmodel: slow\nkwargs: {latency_s: 1.0}\n")
    config = compose(["engine=slow"], str(tmp_path))
    assert (config.engine.kind, config.engine.kwargs) == ("echo", {"latency_s": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'slow'"):
        compose(["engine=slo"], str(tmp_path))
    (tmp_path / "engine" / "echo.yaml").write_text("kind: echo\n")
    with pytest.raises(ConfigError, match="echo.yaml has the name of a packaged file"):
        compose(["engine=echo"], str(tmp_path))


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


def test_the_exit_status_tells_rows_that_failed_from_none(
    local_ray: None, tmp_path: Path, write_jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl([ask(f"{i}") for i in range(30)])
    base = ["engine=echo", f"dataset.path={data}", f"output.path={tmp_path}/out"]
    assert infer.main([*base, "engine.kwargs.failure_rate=0.5"]) == 3
    assert infer.main(base) == 0
    assert "30 of 30 rows done" in capsys.readouterr().err
    assert infer.main([*base, "engine.kwargs.latencys=1", "run.resume=false"]) == 2
    assert "did you mean 'latency_s'?" in capsys.readouterr().err


def test_cfg_takes_job_only_and_flags_need_values(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in ((["--cfg", "all"], "--cfg job"), (["--cfg"], "--cfg needs a value"), (["--config-dir"], "needs")):
        assert infer.main([*GOOD, *argv]) == 2
        assert said in capsys.readouterr().err


def test_the_printed_configuration_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert infer.main([*GOOD, "engine.kwargs.a.b=[1,2]", "generation.stop=[x]", "--cfg=job"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["engine"]["kwargs"] == {"a": {"b": [1, 2]}}
    assert printed["generation"]["stop"] == ["x"]
    assert printed["run"]["flush_s"] == 2.0


@pytest.mark.parametrize("job", JOBS)
def test_the_command_and_the_module_say_the_same(job: str) -> None:
    texts = [
        subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True, check=True).stdout
        for module in ([f"jobs.{job.replace('-', '_')}", "--help"], ["jobs.cli", job, "--help"])
    ]
    assert texts[0] == texts[1] != ""


def test_an_env_file_sets_what_the_environment_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.env"
    file.write_text("# a comment\n\nEAGLERAY_A=a=b\nexport EAGLERAY_B='two words' # why\nEAGLERAY_C=file\n")
    file.chmod(0o600)
    monkeypatch.setenv("EAGLERAY_C", "environment")
    for name in ("EAGLERAY_A", "EAGLERAY_B"):
        monkeypatch.setenv(name, "")  # so that it is restored after the test
        monkeypatch.delenv(name)
    assert infer.main(["--env-file", str(file), *GOOD, "--cfg", "job"]) == 0
    assert [os.environ[f"EAGLERAY_{name}"] for name in "ABC"] == ["a=b", "two words", "environment"]


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("A=s3cr3t", 0o640, "can be read by other users: run chmod 600"),
        ("A=s3cr3t", 0o604, "can be read by other users: run chmod 600"),
        ("A=1\ns3cr3t", 0o600, "line 2 is not of the form NAME=value"),
        ("A=s3cr3t with spaces", 0o600, "line 1 is not of the form NAME=value"),
        ("A='s3cr3t", 0o600, "line 1 is not of the form NAME=value"),
        (None, 0o600, "cannot be read: No such file or directory"),
    ],
)
def test_a_wrong_env_file_is_refused_without_its_content(
    content: str | None, mode: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.env"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    assert infer.main(["--env-file", str(file), *GOOD]) == 2
    printed = "".join(capsys.readouterr())
    assert said in printed and "s3cr3t" not in printed and "docs/errors.md#a-file-with-api-keys" in printed


def test_an_input_without_rows_is_reported(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    out = tmp_path / "out"
    assert infer.main(["engine=echo", f"dataset.path={tmp_path}/in.jsonl", f"output.path={out}"]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "There was nothing to do: the input has no rows" in printed and "0 of 0 rows done" in printed
    assert status.main([str(out)]) == 0
    assert "complete: the input has no rows" in capsys.readouterr().out
    assert "Complete: the input has no rows." in (out / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["group", slow("all"), slow("all but Ray's server")])
def test_sigterm_to_all_processes_ends_a_run_that_can_be_continued(to: str, tmp_path: Path) -> None:
    """`timeout` and service managers signal more than the command itself. Ray then waits a minute for its server."""
    data, out = write(tmp_path / "in.jsonl", 2000), tmp_path / "out"
    command = [
        sys.executable, "-m", "jobs.infer", "engine=echo", "engine.kwargs.latency_s=0.5", "engine.max_concurrency=4",
        "run.flush_s=0.1", f"dataset.path={data}", f"output.path={out}",
    ]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own_ray(), start_new_session=True)
    until(lambda: durable(out), run)
    members = [psutil.Process(run.pid), *family(run.pid)]
    if to == "group":
        os.killpg(run.pid, signal.SIGTERM)
    else:
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                if to == "all" or process.name() != "gcs_server":  # on a busy machine it ends last
                    process.terminate()
    printed = finish(run, 130)
    assert "interrupted" in printed and "To continue: eagleray infer" in printed
    assert "GCS" not in printed
    psutil.wait_procs(members, timeout=PATIENCE_S)
    assert all(gone(process.pid) for process in members)
    assert durable(out) >= 4
