"""Commands that write run files, and `eagleray rerun`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs import from_oumi, infer, init, rerun
from jobs.show import main as show
from pipeline.config import hidden_keys
from pipeline.configuration.compose import compose
from pipeline.configuration.run_file import RunFile
from tests.support.infer import ask
from tests.support.pages import ROOT, blocks
from tests.support.terminal import Terminal


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- init ---------------------------------------------------------------------------------------------------------------


def test_init_without_a_dataset_writes_a_run_that_runs(
    local_ray: None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init.main(["engine=echo"]) == 0
    assert "run.yaml is written: echo answers questions.jsonl" in capsys.readouterr().out
    assert infer.main(["run.yaml", f"output.path={here}/out"]) == 0
    assert json.loads((here / "out" / "manifest.json").read_text())["rows"]["done"] == 3
    before = (here / "run.yaml").read_bytes()
    assert init.main([]) == 2
    assert "run.yaml exists and is not overwritten" in capsys.readouterr().err
    assert (here / "run.yaml").read_bytes() == before


def test_init_chooses_an_engine_that_is_installed(here: Path) -> None:
    assert init.main(["sub.yaml"]) == 0
    config = compose([], run_file=RunFile.read("sub.yaml"))
    assert (config.engine.kind, config.engine.model) == ("llamacpp", "smollm2")


def test_init_finds_the_table_and_makes_a_prompt_of_its_longest_text(here: Path) -> None:
    (here / "reviews.csv").write_text("id,product,the review\n1,kettle,It boils fast\n")
    assert init.main(["score.yaml", "engine=openai", "engine.model=gpt-6-luna", "generation.seed=3"]) == 0
    config = compose([], run_file=RunFile.read("score.yaml"))
    assert (config.dataset.path, config.dataset.template) == ("reviews.csv", "{{ row['the review'] }}")
    assert (config.engine.model, config.generation["seed"], config.output.path) == ("gpt-6-luna", 3, "out/reviews")
    assert "# The columns of the dataset: id, product, the review" in (here / "score.yaml").read_text()


def test_every_suggestion_of_init_is_a_key_that_works(here: Path) -> None:
    (here / "schema.json").write_text('{"type": "object", "properties": {"a": {"type": "string"}}}')
    (here / "in.csv").write_text("column\nx\n")
    assert init.main(["engine=echo"]) == 0
    text = re.sub(r"^  # (?!template)(\w+: )", r"  \1", (here / "run.yaml").read_text(), flags=re.MULTILINE)
    (here / "all.yaml").write_text(text)
    config = compose([], run_file=RunFile.read("all.yaml"))
    config.engine.price.input = config.engine.price.output = 1.0  # for the budget
    config.check()
    assert (config.dataset.limit, config.run.budget_usd, config.output.columns) == (10, 5.0, "schema")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("review\ntext", "review text"),
        ("note\nhardware: {replicas: 64}", "note hardware: {replicas: 64}"),
        ("note\u2028hardware.replicas: 64", "note hardware.replicas: 64"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
    ],
)
def test_no_name_of_a_column_ends_the_comment_of_a_run_file(
    name: str, shown: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "in.csv").write_text(f'id,"{name}"\n1,It boils fast\n', encoding="utf-8")
    asked: list[str] = []
    monkeypatch.setattr(init, "_asked", lambda question, default: asked.append(question) or default)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert init.main(["dataset.path=in.csv", "engine=echo", "output.path=out"]) == 0
    assert f"# The columns of the dataset: id, {shown}\n" in (here / "run.yaml").read_text()
    config = compose([], run_file=RunFile.read("run.yaml"))
    assert config.hardware == compose([]).hardware and config.dataset.template == f"{{{{ row[{name!r}] }}}}"
    assert [question for question in asked if shown in question]  # a terminal gets no control characters either


def test_a_text_that_is_no_run_file_is_not_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "in.csv").write_text("prompt,\uffff\nGo,x\n", encoding="utf-8")  # YAML has no such character
    assert init.main(["dataset.path=in.csv", "engine=echo", "output.path=out"]) == 2
    assert "run.yaml is not written: run.yaml:4: there is a character that YAML does not allow" in capsys.readouterr().err
    assert not (here / "run.yaml").exists()


@pytest.mark.parametrize("text", ["a\u2028b", "a\u2029b\nc", "a\u2028\n", "a\x85b", "a\n\n  b"])
def test_save_keeps_every_line_break_of_a_text(text: str, here: Path) -> None:
    template = f"{text} {{{{ x }}}}"
    assert infer.main(["--save", "run.yaml", "dataset.path=in.csv", f"dataset.template={template}", "engine=echo"]) == 0
    assert compose([], run_file=RunFile.read("run.yaml")).dataset.template == template


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["engine=opnai"], "did you mean 'openai'?"),
        (["dataset.path=nowhere.csv"], "there is no file or directory 'nowhere.csv'"),
        (["a.yaml", "b.yaml"], "only one run file is possible"),
        (["no/such/run.yaml", "engine=echo"], "cannot write no/such/run.yaml: No such file or directory"),
    ],
)
def test_init_reports_what_is_wrong_and_writes_nothing(
    argv: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init.main(argv) == 2
    assert said in capsys.readouterr().err
    assert not list(here.iterdir())


def test_init_asks_on_a_terminal(here: Path) -> None:
    (here / "a.csv").write_text("review\nGood\n")
    terminal = Terminal("jobs.init", f"{here}/run.yaml")
    for question, answer in (
        ("The dataset", f"{here}/a.csv"),
        ("The prompt", "Rate: {{ review }}"),
        ("The engine", "echo"),
        ("The model", ""),
        ("The output directory", ""),
    ):
        terminal.until(lambda text, question=question: question in text)
        terminal.type(f"{answer}\n")
    terminal.until(lambda text: "To run it:" in text)
    config = compose([], run_file=RunFile.read(str(here / "run.yaml")))
    assert (config.engine.kind, config.dataset.template, config.dataset.path) == (
        "echo",
        "Rate: {{ review }}",
        f"{here}/a.csv",
    )
    assert terminal.end() == 0


# -- rerun --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rerun_repeats_a_run_into_a_new_directory(
    local_ray: None, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "sk-very-secret-0123")
    (here / "in.jsonl").write_text(json.dumps(ask("a")) + "\n" + json.dumps(ask("b")) + "\n")
    (here / "p.j2").write_text("Say {{ messages[0].content }}")
    (here / "run.yaml").write_text(
        f"dataset: {{path: in.jsonl, template: '@p.j2'}}\nengine: echo\noutput.path: {here}/out\n"
        "engine.headers: {authorization: '${oc.env:MY_API_KEY}'}\n"
    )
    assert infer.main(["run.yaml", "dataset.limit=2"]) == 0
    first = (here / "out" / "manifest.json").read_bytes()
    (here / "p.j2").write_text("Another prompt: {{ messages[0].content }}")
    (here / "sub").mkdir()
    monkeypatch.chdir(here / "sub")
    capsys.readouterr()
    assert rerun.main([f"{here}/out"]) == 0
    assert f"The answers go into {here}/out-rerun; {here}/out stays as it is." in capsys.readouterr().err
    again = json.loads((here / "out-rerun" / "manifest.json").read_text())
    assert again["this_run"]["requests_sent"] == 2 and (here / "out" / "manifest.json").read_bytes() == first
    assert again["run_file"] == json.loads(first)["run_file"] and again["run_file"]["path"] == str(here / "run.yaml")
    assert show([f"{here}/out-rerun"]) == 0
    assert "Say a" in capsys.readouterr().out  # the prompt of the first run
    assert rerun.free_name(f"{here}/out-rerun") == f"{here}/out-rerun-2"
    (here / "in.jsonl").write_text("{}\n")
    assert rerun.main([f"{here}/out", "--cfg", "job"]) == 0
    assert "in.jsonl is not the file of that run any more" in capsys.readouterr().err


@pytest.mark.parametrize("engine", sorted(path.stem for path in (ROOT / "conf" / "engine").glob("*.yaml")))
def test_no_setting_of_ours_counts_as_a_secret_that_a_rerun_would_need(engine: str) -> None:
    """Such as `finish_reasons.eos_token`."""
    assert hidden_keys(compose([f"engine={engine}", "dataset.path=in.jsonl", "output.path=out"])) == []


@pytest.mark.parametrize("name, hidden", [("eos_token", False), ("token", True), ("hf_token", True), ("api-key", True)])
def test_only_names_of_secrets_are_hidden(name: str, hidden: bool) -> None:
    config = compose([f"+engine.kwargs.{name}=x", "engine=vllm", "dataset.path=in.jsonl", "output.path=out"])
    assert hidden_keys(config) == ([f"engine.kwargs.{name}"] if hidden else [])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dataset.limit=3"], "name an output directory first: eagleray rerun OUT dataset.limit=3"),
        (["dataset.path=my file.csv"], "eagleray rerun OUT 'dataset.path=my file.csv'"),
        (["nowhere"], "there is no directory nowhere"),
    ],
)
def test_rerun_needs_an_output(argv: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rerun.main(argv) == 2
    assert said in capsys.readouterr().err


# -- from-oumi ----------------------------------------------------------------------------------------------------------


def test_the_configuration_of_the_docs_becomes_the_command_of_the_docs(here: Path) -> None:
    page = ROOT / "docs" / "from-oumi.md"
    given = next(block.text for block in blocks(page) if block.language == "yaml" and "engine: REMOTE_VLLM" in block.text)
    (here / "oumi.yaml").write_text(given)
    assert from_oumi.main(["oumi.yaml"]) == 0
    words = [
        "engine=remote_vllm", "engine.model=meta-llama/Llama-3.1-8B-Instruct", "engine.adapter=path/to/lora",
        "engine.base_url=http://localhost:6864", "engine.max_retries=3", "engine.max_concurrency=50",
        "engine.requests_per_minute=600", "generation.max_tokens=512", "generation.temperature=0.7", "generation.top_p=0.9",
        "generation.stop=['</answer>']", "dataset.path=conversations.jsonl", "output=jsonl", "output.style=oumi",
        "output.path=answers", "engine.unsupported=drop",
    ]  # fmt: skip
    assert compose([], run_file=RunFile.read("run.yaml")) == compose(words)


def test_what_has_no_counterpart_is_said_and_an_api_key_is_not_copied(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "oumi.yaml").write_text(
        "model: {model_name: m, compile: true, model_max_length: 99, torch_dtype_str: bfloat16, model_kwargs: {seed: 1}}\n"
        "generation: {num_beams: 4, min_p: 0.0, guided_decoding: {regex: 'a+'}}\nengine: VLLM\n"
        "remote_params: {api_key: sk-0123456789, politeness_policy: 60}\n"
    )
    assert from_oumi.main(["oumi.yaml", "new.yaml"]) == 0
    said, text = capsys.readouterr().out, (here / "new.yaml").read_text()
    for name in ("model.compile", "num_beams", "remote_params.api_key", "politeness_policy", "input_path"):
        assert name in said and name in text
    assert "sk-0123" not in said + text
    config = compose(["dataset.path=x"], run_file=RunFile.read("new.yaml"))
    assert config.engine.kwargs == {"seed": 1, "max_model_len": 99, "dtype": "bfloat16"}
    assert (config.generation["temperature"], config.generation["min_p"]) == (0.0, None)  # Oumi's defaults
    assert config.generation["response_format"] == {"type": "regex", "regex": "a+"}
    assert from_oumi.main(["oumi.yaml", "new.yaml"]) == 2
    assert "new.yaml exists and is not overwritten" in capsys.readouterr().err


def test_the_commands_of_from_oumi_can_be_pasted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "oumi.yaml").write_text('model: {model_name: m}\nengine: VLLM\n"x\\u2028hardware.replicas: 64": 1\n7: 8\n')
    assert from_oumi.main(["oumi.yaml", "my run.yaml"]) == 0
    said, text = capsys.readouterr().out, (here / "my run.yaml").read_text()
    assert "To check it: eagleray plan 'my run.yaml'\n" in said and "To run it:   eagleray infer 'my run.yaml'\n" in said
    assert "Run it: eagleray infer 'my run.yaml'\n" in text
    assert "- x hardware.replicas: 64 has no counterpart.\n- 7 has no counterpart.\n" in said
    config = compose(["dataset.path=x"], run_file=RunFile.read("my run.yaml"))
    assert config.hardware == compose([]).hardware


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {model_name: x}\ngeneration: 5", "generation"),
        ("model: {model_name: x}\nremote_params: [1]", "remote_params"),
        ("model: {model_name: x}\ngeneration: {guided_decoding: abc}", "generation.guided_decoding"),
        ("model: {model_name: x, model_kwargs: abc, chat_template: c}", "model.model_kwargs"),
        ("model: {model_name: x, chat_template: c, model_kwargs: [1]}", "model.model_kwargs"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(text: str, key: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "oumi.yaml").write_text(f"{text}\nengine: VLLM\n")
    assert from_oumi.main(["oumi.yaml"]) == 2
    assert f"eagleray: oumi.yaml: {key} must be a mapping of keys to values " in capsys.readouterr().err
    assert not (here / "run.yaml").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", "oumi.yaml is not an inference configuration of Oumi: it has no key model"),
        ("model: {model_name: m}\nengine: VLMM\n", "there is no engine of Oumi 'VLMM' (did you mean 'VLLM'?)"),
        ("model: [\n", "oumi.yaml:1: "),
    ],
)
def test_a_file_that_is_not_oumis_is_refused(text: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "oumi.yaml").write_text(text)
    assert from_oumi.main(["oumi.yaml"]) == 2
    assert said in capsys.readouterr().err and not (here / "run.yaml").exists()
