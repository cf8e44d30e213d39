"""Every example of the documentation is executed; what needs a model or a bucket nobody has here is at least composed.

The examples of docs/engines.md, which need models and servers, are in test_docs_engines.py. test_howto.py executes pages
that show how to do a task.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from engines.config import EngineConfig
from engines.errors import ConfigError, EaglerayError, ErrorCode, ErrorType, unknown_kwarg
from engines.prices import priced
from engines.registry import REGISTRY, missing_package
from jobs import infer, plan
from jobs.cli import JOBS
from jobs.guide import anchor, place, see_type
from pipeline import run
from pipeline.config import known_keys
from pipeline.configuration.compose import compose
from pipeline.configuration.run_file import RunFile
from pipeline.errors import Stopped
from pipeline.executors.stop_reasons import stop_reason
from pipeline.monitor.status import RunStatus
from pipeline.signals import INTERRUPTED
from tests.support.marks import slow
from tests.support.pages import (
    CONFIGURED,
    PAGES,
    ROOT,
    Block,
    Command,
    anchors,
    blocks,
    commands,
    generator,
    leads_somewhere,
    links,
)

README, DOCS = ROOT / "README.md", ROOT / "docs"
MORE_PAGES = [ROOT / "CHANGELOG.md", ROOT / "bench" / "results.md"]
COMMANDS = [command for page in PAGES for command in commands(page)]
HERE = [c for c in COMMANDS if c.runs and c.page not in ("engines.md", "adding-an-engine.md")]
ANCHORS = {page.resolve(): anchors(page) for page in PAGES}


# -- models -------------------------------------------------------------------------------------------------------------


def test_the_models_of_the_examples_are_in_the_price_lists_and_stay_for_a_while() -> None:
    """The lists have only models that the provider still has on the day of the list."""
    named = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"engine=(openai|anthropic|gemini) engine\.model=(\S+)", text))
        named |= {(kind.lower(), model) for kind, model in re.findall(r'(OpenAI|Anthropic)Engine\(model="([^"]+)"', text)}
    assert len(named) >= 3
    for kind, model in named:
        price = priced(EngineConfig(kind, model))
        assert price.known and price.as_of is not None, (kind, model)
        soon = datetime.date.fromisoformat(price.as_of) + datetime.timedelta(days=60)
        assert price.ends is None or datetime.date.fromisoformat(price.ends) > soon, (kind, model)


# -- commands -----------------------------------------------------------------------------------------------------------


def test_the_docs_show_enough_examples() -> None:
    assert len([c for c in COMMANDS if c.page == "README.md"]) >= 8
    assert len([c for c in COMMANDS if c.page == "engines.md"]) >= 40
    assert len([c for c in HERE if c.job == "infer"]) >= 5
    assert [c for c in HERE if c.job == "plan"]
    assert len([c for c in COMMANDS if c.language == "sh"]) >= 20
    assert {c.job for c in COMMANDS} <= set(JOBS)


@pytest.fixture
def own_files(tmp_path: Path) -> str:
    """A directory with the YAML files that the docs tell readers to write."""
    (tmp_path / "engine").mkdir()
    for page, needle, name in (("providers.md", "kind: acme", "acme"), ("from-oumi.md", "kind: remote_vllm", "llama")):
        text = next(b.text for b in blocks(DOCS / page) if b.language == "yaml" and needle in b.text)
        (tmp_path / "engine" / f"{name}.yaml").write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.job in CONFIGURED and c.language != "sh"], ids=str)
def test_every_command_is_a_valid_configuration(command: Command, own_files: str) -> None:
    if command.page == "adding-an-engine.md":
        pytest.skip("its engine is made in test_docs_engines.py")
    config_dir = own_files if "--config-dir" in command.text else None
    run_file = RunFile.read(command.run_file) if command.run_file else None
    compose(command.overrides, config_dir, run_file=run_file).check(runs=command.job in ("infer", "batch"))


@pytest.mark.parametrize("command", [c for c in HERE if c.job == "plan"], ids=str)
def test_the_plans_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.main([*filter(None, [command.run_file]), *command.overrides]) in (0, 3)


# Other tests cover the columns and templates of datasets.md.
@pytest.mark.parametrize(
    "command", [slow(c) if c.page in ("datasets.md", "concepts.md") else c for c in HERE if c.job == "infer"], ids=str
)
def test_the_commands_run(command: Command, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = [*filter(None, [command.run_file]), *command.overrides]
    args = [arg for arg in args if not arg.startswith("output.path=")]
    shorter = [] if any(arg.startswith("task=") for arg in args) else ["generation.max_tokens=8"]
    status = infer.main([*args, f"output.path={tmp_path}/out", *shorter])
    assert status in (0, 3)
    assert (tmp_path / "out" / "manifest.json").exists() != ("run.dry_run=true" in args)


# -- what the pages name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, name = link.partition("#")
        target = (page.parent / path).resolve() if path else page.resolve()
        assert target.exists(), f"{page.name}: {link}"
        if name:
            assert name in ANCHORS.get(target, anchors(target)), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    sections = {key.partition(".")[0] for key in known_keys()}
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)):
        named = re.match(rf"({'|'.join(sections)})\.(\w+)", code)
        if named and "(" not in code and named[2] not in ("py", "yaml"):
            assert f"{named[1]}.{named[2]}" in known_keys(), f"{page.name}: {code}"


def test_every_page_is_in_the_readme() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert {page.resolve() for page in DOCS.glob("*.md")} <= linked


# A file that adding-an-engine.md tells its reader to write.
WRITTEN = {"engines/parrot.py", "conf/engine/parrot.yaml"}


def test_every_file_and_directory_of_ours_that_a_page_names_exists() -> None:
    named = set()
    for page in (*PAGES, ROOT / "CHANGELOG.md"):
        for path in re.findall(r"`((?:engines|pipeline|jobs|conf|tests|bench|docs)/[\w./-]+)`", page.read_text()):
            if path not in WRITTEN:
                assert (ROOT / path).exists(), f"{page.name}: {path}"
                named.add(path)
        for name in re.findall(r"`(\w+\.py)`", page.read_text()):
            assert any(list((ROOT / room).rglob(name)) for room in ("engines", "pipeline", "jobs")), f"{page.name}: {name}"
    assert len([path for path in named if path.startswith(("engines/", "pipeline/"))]) > 40


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page) if b.language == "yaml"], ids=str)
def test_yaml_is_yaml(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


# -- what the code knows ------------------------------------------------------------------------------------------------


def test_generated_pages_are_what_the_code_says() -> None:
    for path, text in generator().pages().items():
        assert path.read_text() == text, f"{path.name} is not what the code says: run make docs"


def test_every_key_and_every_engine_has_an_anchor() -> None:
    assert {anchor(key) for key in known_keys()} <= ANCHORS[(DOCS / "configuration.md").resolve()]
    assert set(REGISTRY) <= ANCHORS[(DOCS / "engines.md").resolve()]
    assert len({anchor(key) for key in known_keys()}) == len(known_keys())


def test_every_error_type_and_exit_status_is_explained() -> None:
    found = ANCHORS[(DOCS / "errors.md").resolve()]
    for error_type in get_args(ErrorType):
        assert error_type in found
        assert leads_somewhere(see_type(error_type).strip("()").removeprefix("see "))
    text = (DOCS / "errors.md").read_text()
    for status in (run.OK, run.BUG, run.WRONG, run.WITH_FAILURES, run.STOPPED, INTERRUPTED):
        assert f"\n| {status} | " in text


# -- where errors lead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (ConfigError("x", key="engine.model"), "configuration.md#enginemodel"),
        (ConfigError("x", key="engine"), "configuration.md#engine"),
        (ConfigError("x", key="engine=nosuch"), "configuration.md#engine"),
        (ConfigError("engine.model is in the text, which does not matter", key="run"), "configuration.md#run"),
        (ConfigError("run.max_error_rate is wrong"), "errors.md#2-wrong-configuration"),
        (unknown_kwarg("n_ctxx", "llamacpp", ()), "engines.md#llamacpp"),
        (missing_package("vllm") or ConfigError("x", code=ErrorCode.PACKAGE_MISSING, key="engine=vllm"),
         "engines.md#vllm"),
        (ConfigError("x", code=ErrorCode.KEY_MISSING, key="engine.api_key_env"), "configuration.md#engineapi_key_env"),
        (ConfigError("x", code=ErrorCode.OUTPUT_BUSY), "errors.md#another-run-writes-there"),
        (ConfigError("'a' is not of the form key=value"), "errors.md#2-wrong-configuration"),
        (Stopped("x", code=ErrorCode.KEY_REFUSED), "errors.md#auth"),
        (stop_reason(compose(["run.max_errors=12"]).run, RunStatus(rows_failed=12)), "errors.md#too-many-failed-rows"),
        (Stopped("something new; the same command continues"), "errors.md#4-stopped-early"),
    ],
)  # fmt: skip
def test_an_error_says_where_it_is_explained(error: EaglerayError, where: str) -> None:
    assert place(error) == f"docs/{where}"
    assert leads_somewhere(place(error))


def test_every_place_that_an_error_may_name_exists() -> None:
    for code in ErrorCode:
        assert leads_somewhere(place(ConfigError("", code=code))), code
        assert leads_somewhere(place(Stopped("", code=code))), code
    for key in known_keys():
        for name in (key, f"{key}.inner", key.partition(".")[0]):
            assert leads_somewhere(place(ConfigError("x", key=name))), name
            assert place(ConfigError("x", key=name)).startswith("docs/configuration.md#")
    for kind in REGISTRY:
        assert leads_somewhere(place(ConfigError("x", key=f"engine={kind}"))), kind
        assert place(ConfigError("x", key=f"engine={kind}")) == f"docs/engines.md#{kind}"
    assert leads_somewhere(place(Stopped(""))) and leads_somewhere(place(ConfigError("")))


@pytest.mark.parametrize(
    ("override", "anchor"),
    [
        ("engine=llamcpp", "configuration.md#engine"),
        ("hardware=9xh100", "configuration.md#hardware"),
        ("run.budgett=1", "configuration.md#runbudget_usd"),
        ("run.wholly=1", "configuration.md#run"),
        ("run.max_error_rate=2", "configuration.md#runmax_error_rate"),
        ("run.flush_s=null", "configuration.md#runflush_s"),
        ("dataset.columns.promt=q", "configuration.md#datasetcolumns"),
        ("engine.fallback=[{engine: echo, timeout_s: 0}]", "configuration.md#enginetimeout_s"),
        ("output.columns=[a]", "configuration.md#outputcolumns"),
    ],
)
def test_a_wrong_override_ends_with_its_place_in_the_docs(
    override: str, anchor: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    assert infer.main(["engine=echo", f"dataset.path={tmp_path}/in.jsonl", f"output.path={tmp_path}/o", override]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"(see docs/{anchor})")


def test_a_wrong_configuration_ends_with_its_place_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert infer.main(["engine.modle=x"]) == 2
    line = (
        "eagleray: there is no key 'engine.modle' (did you mean 'engine.model'?) (see docs/configuration.md#enginemodel)\n"
    )
    assert capsys.readouterr().err == line


def test_a_stop_and_failed_rows_end_with_their_place_in_the_docs(
    local_ray: None, write_jsonl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    rows = write_jsonl([{"prompt": "a"}, {"messages": 1}])
    args = [f"dataset.path={rows}", f"output.path={tmp_path}/out", "engine=echo"]
    assert infer.main([*args, "engine.kwargs.failure_rate=1", "run.max_errors=1"]) == run.STOPPED
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Stopped:")]
    assert [line.endswith("(see docs/errors.md#too-many-failed-rows)") for line in said] == [True]
    assert infer.main(args) == run.WITH_FAILURES
    assert f"failed rows: {tmp_path}/out/errors (see docs/errors.md#invalid_input)" in capsys.readouterr().err
