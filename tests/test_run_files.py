"""Run files: one YAML file for a run, its errors with file and line, and the commands that name it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engines.errors import ConfigError
from jobs import errors, infer, plan, status
from pipeline.configuration.compose import as_yaml, compose
from pipeline.configuration.run_file import RunFile
from pipeline.configuration.yaml_text import YamlText, dumped
from pipeline.origin import Origin
from tests.support.infer import ask

WORDS = ["engine=echo", "dataset.path=in.jsonl", "output.path=out"]
BASE = "dataset:\n  path: in.jsonl\nengine: echo\noutput:\n  path: out\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(ask(f"question {i}")) + "\n" for i in range(20)))
    return tmp_path


def in_ray(here: Path) -> str:
    """The keys with an absolute output: the processes of the session's Ray have another working directory."""
    return BASE.replace("path: out", f"path: {here}/out")


def composed(text: str, *typed: str, path: str = "run.yaml") -> Any:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return compose(list(typed), run_file=RunFile.read(path))


# -- the format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: {name: echo, model: m}\n", ["engine.model=m"]),
        ("engine:\n  name: echo\nengine.model: m\n", ["engine.model=m"]),
        ("engine.name: echo\n", []),
        ("engine: echo\nhardware: cpu\ngeneration: greedy\n", ["hardware=cpu", "generation=greedy"]),
        ("engine: echo\noutput: {name: jsonl, style: oumi}\n", ["output=jsonl", "output.style=oumi"]),
        ("engine: echo\nengine.kwargs.latency_s: 1e-1\n", ["engine.kwargs.latency_s=0.1"]),
        (
            "engine: {name: echo, kwargs: {latency_s: 0.1}}\nengine.kwargs.jitter_s: 2\n",
            ["engine.kwargs={latency_s: 0.1, jitter_s: 2}"],
        ),
        ("engine: {name: echo, price.input: 1, price: {output: 2}}\n", ["engine.price.input=1", "engine.price.output=2"]),
        ("engine: {name: openrouter, provider: {images: false}}\n", ["engine=openrouter", "engine.provider.images=false"]),
        ("engine: echo\ngeneration:\n  stop: [yes, '12:30', 007]\n", ["generation.stop=['yes','12:30','007']"]),
        ("engine: echo\ngeneration.logit_bias: {50256: -100}\n", ["generation.logit_bias={50256: -100}"]),
        ("engine: echo\ngeneration:\n", []),
        ("engine: {name: echo, model: &m m, adapter: *m}\n", ["engine.model=m", "engine.adapter=m"]),
        ("engine: echo\nengine.model: ${generation.seed}x\ngeneration.seed: 7\n", ["engine.model=7x", "generation.seed=7"]),
    ],
)  # fmt: skip
def test_a_file_and_a_command_give_the_same_configuration(text: str, words: list[str], here: Path) -> None:
    rest = "dataset.path: in.jsonl\n" + ("output.path: out\n" if "output:" not in text else "")
    typed = ["output.path=out"] if "output:" in text else []
    assert composed(text + rest, *typed) == compose([*WORDS, *words])


def test_a_printed_configuration_is_a_run_file(here: Path) -> None:
    given = compose(["engine=openrouter", "engine.model=a/b", *WORDS[1:], "generation.stop=[yes]"])
    assert composed(as_yaml(given)) == given


def test_a_schema_keeps_its_types_and_its_order(here: Path) -> None:
    properties = "{z: {enum: [yes, no, on]}, a.b: {type: integer}}"
    text = f"{BASE}generation:\n  response_format:\n    type: object\n    properties: {properties}\n"
    schema = composed(text).generation["response_format"]
    assert list(schema["properties"].items()) == [("z", {"enum": ["yes", "no", "on"]}), ("a.b", {"type": "integer"})]


def test_what_is_typed_replaces_the_keys_of_the_file(here: Path) -> None:
    text = (
        "engine: {name: openai, model: gpt, max_concurrency: 3, base_url: '${oc.env:NO_SUCH}'}\n"
        "dataset: {path: in.jsonl, template: {system: a}}\noutput: {path: out, format: parquet}\n"
        "hardware: {name: 8xh100, nodes: 4}\ngeneration: {response_format: {type: object, title: a}}\n"
    )
    typed = ["engine=echo", "output=jsonl", "hardware=laptop", "dataset.template={user: b}"]
    config = composed(text, *typed, "generation.response_format={type: array}", "dataset.limit=3")
    assert config == compose([*WORDS, *typed[1:], "generation.response_format={type: array}", "dataset.limit=3"])
    assert composed(text, "engine.base_url=http://x/v1").engine.model == "gpt"


def test_relative_paths_are_relative_to_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = here / "jobs"
    (folder / "lora").mkdir(parents=True)
    (folder / "p.j2").write_text("Say {{ x }}")
    (folder / "s.json").write_text('{"type": "object"}')
    text = (
        "dataset:\n  path: [in/*.jsonl, /data/a.csv, 's3://b/c', '${oc.env:DATA}/d']\n"
        "  template: {system: '@p.j2', user: '{{ q }}'}\n"
        "engine: {name: vllm, model: meta-llama/Llama, adapter: lora, kwargs: {chat_template: p.j2, dtype: lora}}\n"
        "output.path: ../out\ngeneration.response_format: s.json\n"
    )
    monkeypatch.setenv("DATA", "/mnt")
    config = composed(text, path="jobs/run.yaml")
    assert config.dataset.path == ["jobs/in/*.jsonl", "/data/a.csv", "s3://b/c", "/mnt/d"]
    assert config.dataset.template == {"system": "Say {{ x }}", "user": "{{ q }}"}
    assert (config.engine.model, config.engine.adapter, config.output.path) == ("meta-llama/Llama", "jobs/lora", "out")
    assert config.engine.kwargs == {"chat_template": "jobs/p.j2", "dtype": "lora"}
    assert config.generation["response_format"]["json_schema"]["schema"] == {"type": "object"}
    typed = compose(["dataset.path=x.jsonl"], run_file=RunFile.read(str(folder / "run.yaml")))
    assert (typed.dataset.path, typed.output.path) == ("x.jsonl", str(here / "out"))  # a typed path is as it was typed
    assert composed(text.replace("${oc.env:DATA}/d", "-"), path="jobs/run.yaml").dataset.path[3] == "-"


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: echo\ndataset:\n\tpath: in.jsonl\n", "run.yaml:3: this line is indented with a tab: use spaces"),
        (BASE + "dataset.template: {{ q }}\n", 'run.yaml:6: this text needs quotes: dataset.template: "{{ q }}"'),
        (BASE + "dataset.template: {{ q }} please\n", 'this text needs quotes: dataset.template: "{{ q }} please"'),
        (BASE + "dataset.template: @p.j2\n", 'run.yaml:6: this text needs quotes: dataset.template: "@p.j2"'),
        (BASE + "dataset.template: Be short: {{ q }}\n", 'run.yaml:6: this text needs quotes: dataset.template: "Be short'),
        ("dataset:\n  path: *.jsonl\n", 'run.yaml:2: this text needs quotes: path: "*.jsonl"'),
        ("engine:echo\nrun:\n  flush_s: 2\n", "run.yaml:1: a space is missing after the colon"),
        ("engine=echo\n", "run.yaml:1: this is not a run file: write key: value, not key=value"),
        ("- a\n", "run.yaml:1: this is not a run file"),
        ("engine: echo\ndataset:\n  path: 'in.jsonl\n  limit: 3\n", "run.yaml:3: this quote has no end"),
        ("engine: echo\ngeneration:\n  stop: [a, b\noutput.path: x\n", "run.yaml:3: this list has no end: ] is missing"),
        ("dataset:\n  path: in.jsonl\n   limit: 3\n", "run.yaml:3: the indentation is wrong"),
        ("dataset:\n    path: in.jsonl\n  limit: 3\n", "run.yaml:3: the indentation is wrong"),
        (BASE + "---\nengine: echo\n", "run.yaml:6: only one document is possible"),
        (BASE + "engine.model: !env X\n", "run.yaml:6: tags with ! are not possible"),
        (BASE + "engine.model: a\x00b\n", "run.yaml:6: there is a character that YAML does not allow, with the code 0x0"),
        ("# nothing\n", "run.yaml is empty: eagleray init writes a run file"),
        (BASE + "dataset:\n  limit: 1\n", "run.yaml:6: 'dataset' is already on line 1"),
        (BASE + "dataset.path: other\n", "run.yaml:6: 'dataset.path' is already on line 2"),
        (BASE + "generation.response_format: {a: 1, a: 2}\n", "run.yaml:6: 'a' is already on line 6"),
        ("defaults: [engine: echo]\n", "run.yaml:1: a run file has no 'defaults'; engine: openai chooses an option"),
        (BASE + "generation:\n  temprature: 1\n", "run.yaml:7: there is no key 'generation.temprature' (did you mean"),
        (BASE + "generaton:\n  temperature: 1\n", "run.yaml:6: there is no key 'generaton' (did you mean 'generation'?)"),
        (BASE + "model: gpt\n", "run.yaml:6: there is no key 'model' (did you mean 'engine.model'?)"),
        (BASE + "engine.price:\n  inpt: 3\n", "run.yaml:7: there is no key 'engine.price.inpt' (did you mean"),
        (BASE + "run:\n  max_errors: many\n", "run.yaml:7: run.max_errors must be a whole number or null, not many"),
        (BASE + "dataset.limit: {a: 1}\n", "run.yaml:6: dataset.limit must be a whole number or null, not {'a': 1}"),
        (BASE + "run:\n  flush_s: 0\n", "run.yaml:7: run.flush_s must be at least 0.05, not 0.0"),
        (BASE + "engine.kwargs.latencys: 1\n", "run.yaml:6: engine.kwargs.latencys is not known to engine=echo"),
        ("engine: opnai\n", "run.yaml:1: there is no engine 'opnai' (did you mean 'openai'?)"),
        ("engine:\n  name: ollama\n", "run.yaml:2: there is no engine 'ollama': use engine=openai_compatible"),
        ("engine: [a]\n", "run.yaml:1: engine needs the name of an option, or keys with values below it"),
        (BASE + "serve: x\n", "run.yaml:6: serve needs keys with values below it"),
        (BASE + "generation.seed: ${oc.env:NO_SEED}\n", "generation.seed: the environment variable NO_SEED is not set"),
        (BASE.replace("in.j", "im.j"), "run.yaml:2: dataset.path: there is no file or directory 'im.jsonl' (did you mean"),
        (BASE + "dataset.template: '@q.j2'\n", "run.yaml:6: dataset.template: cannot read the file q.j2"),
        (BASE + "dataset.template: '{{ q'\n", "run.yaml:6: dataset.template: line 1: unexpected end of template"),
        (BASE + "generation.response_format: s.json\n", "run.yaml:6: generation.response_format=s.json is not a file"),
        ("engine: echo\noutput.path: out\n", "eagleray: dataset.path is missing"),
    ],
)  # fmt: skip
def test_an_error_in_a_run_file_names_the_line_and_the_remedy(
    text: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run.yaml").write_text(text)
    assert infer.main(["run.yaml"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_an_error_of_a_typed_key_does_not_name_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.yaml").write_text(BASE + "dataset.limit: 3\n")
    assert infer.main(["run.yaml", "dataset.limit=0"]) == 2
    assert "eagleray: dataset.limit must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rum.yaml"], "cannot read the run file rum.yaml: No such file or directory (did you mean 'run.yaml'?)"),
        (["in.jsonl"], "is not of the form key=value: dataset.path=in.jsonl names a dataset"),
        (["run.yaml", "-c", "run.yaml"], "only one run file is possible"),
        (["--again", "out", "run.yaml"], "--again out takes the configuration of that output: leave run.yaml out"),
        (["-c"], "-c needs a value"),
        (
            ["-c", "bad.bin"],
            "bad.bin is not a run file: it must be YAML, in UTF-8; dataset.path=bad.bin reads it",
        ),
    ],
)
def test_a_wrong_name_of_a_run_file_is_reported(
    argv: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run.yaml").write_text(BASE)
    (here / "bad.bin").write_bytes(b"\xff\xfe\x00")
    assert infer.main(argv) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("engine.headers.authorization: Bearer sk-0123456789\n", "engine.headers.authorization"),
        ("engine.extra_body: {user: {token: abcdefgh1}}\n", "engine.extra_body.user.token"),
        ("engine.headers: {x-api-key: '${oc.env:KEY,sk-0123456789}'}\n", "engine.headers.x-api-key"),
        ("engine.base_url: https://me:sk-0123456789@host/v1\n", "engine.base_url"),
        ("engine.model: sk-of-the-environment\n", "engine.model"),
        ("engine.fallback: [{engine: openai, headers: {authorization: sk-0123456789}}]\n", "engine.fallback"),
    ],
)
def test_a_secret_in_a_run_file_is_refused_and_not_shown(
    text: str, key: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-of-the-environment")
    (here / "run.yaml").write_text(BASE + text)
    assert infer.main(["run.yaml"]) == 2
    error = capsys.readouterr().err
    assert f"run.yaml:6: {key} is a secret" in error and "${oc.env:NAME}" in error and "a-secret-in-a-run-file" in error
    assert "sk-" not in error.replace("sk-of-the-environment" if key == "engine.model" else "\0", "sk-")


# -- runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_keeps_its_file_and_its_commands_name_it(
    local_ray: None, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-very-secret-0123")
    secret = "engine.headers:\n  authorization: Bearer ${oc.env:MY_API_KEY}\n"
    (here / "run.yaml").write_text("# sk-in-a-comment\n" + in_ray(here) + "engine.kwargs.failure_rate: 0.5\n" + secret)
    assert infer.main(["run.yaml", "run.flush_s=0.2"]) == 3
    manifest = json.loads((here / "out" / "manifest.json").read_text())
    assert manifest["run_file"]["path"] == str(here / "run.yaml")
    assert manifest["run_file"]["content"]["engine"] == {
        "name": "echo", "kwargs": {"failure_rate": 0.5}, "headers": {"authorization": "Bearer ${oc.env:MY_API_KEY}"},
    }  # fmt: skip
    written = b"".join(path.read_bytes() for path in (here / "out").rglob("*") if path.is_file())
    assert b"sk-" not in written
    capsys.readouterr()
    assert errors.main(["out"]) == 0
    assert "  eagleray infer run.yaml run.flush_s=0.2\n" in capsys.readouterr().out
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    assert errors.main(["../out"]) == 0
    assert f"  cd {here} && eagleray infer run.yaml run.flush_s=0.2\n" in capsys.readouterr().out
    # The saved configuration knows where its paths begin, and the variable of its secret.
    assert infer.main(["--again", "../out", "engine.kwargs.failure_rate=0"]) == 0
    assert status.main(["../out"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.yaml"], "eagleray infer run.yaml"),
        (["-c", "run.yaml", "run.resume=false"], "eagleray infer -c run.yaml run.resume=true"),
        (["run.yaml", "output.path=HERE/out-${now:%Y}"], "eagleray infer --again {out}"),
        (["run.yaml", f"dataset.template={'x' * 200}{{{{ messages }}}}"], "eagleray infer --again {out}"),
    ],
)
def test_a_stopped_run_shows_a_short_command_that_continues_it(
    words: list[str], said: str, local_ray: None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "run.yaml").write_text(in_ray(here) + "run: {max_errors: 1}\nengine.kwargs: {failure_rate: 1.0}\n")
    words = [word.replace("HERE", str(here)) for word in words]
    assert infer.main(words) == 4
    out = str(next(here.glob("out*")))
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert status.main([out, "--json"]) == 4
    command = json.loads(capsys.readouterr().out)["command"]
    assert command == said.format(out=out).replace("HERE", str(here))
    assert len(words[-1]) > 200 or printed == f"To continue: {command}"


# -- --save -------------------------------------------------------------------------------------------------------------


def test_save_writes_the_file_of_a_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "p.j2").write_text("Say {{ x }}")
    words = [
        *WORDS, "output=jsonl", "dataset.template=@p.j2", "generation.stop=['yes','1e5']", "engine.kwargs={latency_s: 0.5}",
        "engine.headers.x-auth=Bearer ${oc.env:MY_API_KEY}", "dataset.columns.id=qid", "generation.max_tokens=5",
    ]  # fmt: skip
    os.environ.setdefault("MY_API_KEY", "sk-very-secret-0123")
    assert infer.main([*words, "--save", "jobs.yaml"]) == 0
    assert "jobs.yaml is written; nothing was run" in capsys.readouterr().err
    text = (here / "jobs.yaml").read_text()
    assert "# maximum tokens of an answer" in text and "sk-very" not in text and not (here / "out").exists()
    assert compose([], run_file=RunFile.read("jobs.yaml")) == compose(words)
    (here / "sub").mkdir()
    assert infer.main(["jobs.yaml", "dataset.limit=3", "--save", "sub/next.yaml"]) == 0
    assert compose([], run_file=RunFile.read("sub/next.yaml")) == compose([*words, "dataset.limit=3"])
    assert infer.main([*words, "--save", "jobs.yaml"]) == 2
    assert "jobs.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (here / "jobs.yaml").read_text() == text


@pytest.mark.parametrize(
    "word",
    ["engine.base_url=https://me:a-pass-word@host/v1", "dataset.path=[s3://id:a-pass-word@bucket/x.jsonl,b.jsonl]",
     "engine.headers.authorization=a-pass-word", "engine.system=a-pass-word"],
)  # fmt: skip
def test_the_kept_words_of_a_command_have_no_secret(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-pass-word")
    assert "a-pass-word" not in str(Origin.of("infer", [word], False, {}, None).entries())
    monkeypatch.delenv("MY_API_KEY")
    assert ("a-pass-word" in str(Origin.of("infer", [word], False, {}, None).entries())) == ("system" in word)


def test_save_refuses_a_typed_secret(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main([*WORDS, "engine.headers.authorization=Bearer sk-0123456789", "--save", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert "--save: engine.headers.authorization is a secret" in error and "sk-" not in error
    assert not (here / "run.yaml").exists()


@pytest.mark.parametrize(
    "value",
    ["1e5", "yes", "12:30", "007", "a\nb\n", "a: b", "@p", "", "{{ q }}", "x # y", " a ", "null", 1e-5, 3, True, None,
     ["a", {"b": "c: d"}], {"a.b": ["1e5"]}, ["x" * 60, "y" * 60], {"k": "line\nline"}],
)  # fmt: skip
def test_written_values_are_read_back(value: Any) -> None:
    text = YamlText(dumped("key", value) + "\n")
    assert text.root is not None
    assert text.value(text.root) == {"key": value}


def test_other_jobs_take_a_run_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "run.yaml").write_text(BASE)
    assert plan.main(["run.yaml", "dataset.limit=7"]) == 0
    assert "7 in 1 file" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is not of the form"):
        compose(["run.yaml"])
