"""`eagleray completion`: the candidates are those of the code, and bash, zsh and fish complete words with them."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.registry import REGISTRY
from jobs import batch, completion, cost
from jobs.cli import JOBS
from jobs.completion import DIRECTORIES, FILES, FLAGS, SECTIONS, SHELLS, candidates
from jobs.export_files import FORMATS
from pipeline.config import known_keys
from pipeline.configuration.errors import GROUPS
from pipeline.configuration.options import options
from tests.support.pages import ROOT
from tests.support.terminal import Terminal

BREAKS = " \t\n\"'><=;|&(:"  # bash's own COMP_WORDBREAKS


def words(*given: str, current: str = "") -> set[str]:
    found = candidates(given, current)
    assert not isinstance(found, str)
    return {word for word, _ in found if word.startswith(current)}


# -- candidates ---------------------------------------------------------------------------------------------------------


def test_commands_flags_engines_keys_and_options_are_those_of_the_code() -> None:
    assert words() == {*JOBS, "--help", "--version"}
    assert words("infer", current="engine=") == {f"engine={kind}" for kind in REGISTRY}
    for group in GROUPS:
        assert words("plan", current=f"{group}=") == {f"{group}={option}" for option in options(group)}
    assert words("models") == {*REGISTRY, "engine=", "engine."}
    assert set(batch.STEPS) <= words("batch") and not set(batch.STEPS) & words("batch", "run.mode=batch")
    for section in GROUPS:
        keys = {f"{key}=" for key in known_keys() if key.startswith(f"{section}.") and key != "engine.kind"}
        assert {word for word in words("infer", current=f"{section}.") if word.count(".") == 1} == keys
    assert words("infer", current="engine.price.") >= {"engine.price.input=", "engine.price.output="}
    assert "dataset.limit=" not in words("infer", "dataset.limit=3", current="dataset.l")
    assert words("chat", current="dataset.") == set()
    assert words("completion") == set(SHELLS)


def test_values_and_flags_have_their_own_words() -> None:
    assert words("infer", current="dataset.last_answer=") == {
        "dataset.last_answer=drop", "dataset.last_answer=keep", "dataset.last_answer=continue",
    }  # fmt: skip
    assert words("infer", current="run.resume=") == {"run.resume=true", "run.resume=false"}
    assert words("infer", current="dataset.limit=") == words("infer", current="no.such=") == set()
    assert words("export", "out", "--format") == set(FORMATS)
    assert words("cost", "out", "--by") == set(cost.BY)
    assert words("cost", "out", current="--by=") == {f"--by={name}" for name in cost.BY}
    assert words("show", "out", "--id", current="x") == set()
    assert "--json" not in words("diff", "a", "b", "--json", current="--")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (["show"], DIRECTORIES), (["diff", "a"], DIRECTORIES), (["infer", "--config-dir"], DIRECTORIES),
        (["infer", "--env-file"], FILES), (["infer", "dataset.path="], FILES), (["infer", "output.path=o"], FILES),
    ],
)  # fmt: skip
def test_paths_are_completed_by_the_shell(line: list[str], found: str) -> None:
    before, current = (line[:-1], line[-1]) if "=" in line[-1] else (line, "")
    assert candidates(before, current) == found


def test_run_files_are_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "my run.yml", "rows.csv", "sub/other.yml", "sub/deep/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert words("infer", current="ru") == {"run.yaml", "run."}
    assert words("batch", "submit", current="sub/") == {"sub/other.yml", "sub/deep/"}


def test_the_users_own_options_are_candidates(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mine.yaml").write_text("# My server. https://x\nkind: echo\n")
    found = dict(candidates(["infer", "--config-dir", str(tmp_path)], "engine=mi"))
    assert found["engine=mine"] == "My server." and "engine=echo" in found


@pytest.mark.parametrize("job", JOBS)
def test_the_flags_of_a_command_are_those_of_its_help(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A new command or flag needs a line in `FLAGS` of jobs/completion.py."""
    assert importlib.import_module(f"jobs.{job.replace('-', '_')}").main(["--help"]) == 0
    said = {"--help", *re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)}
    assert said <= set(FLAGS[job]), f"a flag of {job} has no line in FLAGS"
    if job not in SECTIONS and job != "completion":
        assert set(FLAGS[job]) == said


def test_bash_gets_the_part_after_the_character_that_separates_words(capsys: pytest.CaptureFixture[str]) -> None:
    for line, said in (
        ("eagleray infer engine=ech", "echo \n"),
        ("eagleray infer engine.fallb", "engine.fallback=\n"),
        ("eagleray exp", "export \n"),
        ("eagleray 'a b", ""),  # inside quotes, bash completes names of files
    ):
        assert completion.main(["--complete", "bash", BREAKS, line]) == 0
        assert capsys.readouterr().out == said
    assert completion.main(["--complete", "bash", BREAKS.replace("=", ""), "eagleray infer engine=ech"]) == 0
    assert capsys.readouterr().out == "engine=echo \n"


def test_a_press_of_the_tab_key_imports_nothing_heavy() -> None:
    code = (
        "import sys, jobs.cli; sys.argv = ['eagleray', 'completion', '--complete', 'zsh', 'infer', 'engine.'];"
        "jobs.cli.main();"
        "print([m for m in 'ray hydra omegaconf pyarrow numpy rich httpx aiohttp yaml jinja2'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "engine.model=\tthe model" in done.stdout


def test_a_shell_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["bsh"]) == 2
    assert "there is no shell 'bsh' (did you mean 'bash'?)" in capsys.readouterr().err
    assert completion.main([]) == 2
    assert "missing: the shell, one of bash, zsh, fish" in capsys.readouterr().err


# -- shells -------------------------------------------------------------------------------------------------------------

START = {
    "bash": (["--norc", "--noprofile", "-i"], 'PS1="$ "', 'eval "$(eagleray completion bash)"'),
    "zsh": (["-f", "-i"], 'PS1="$ "; autoload -Uz compinit && compinit -u -D', 'eval "$(eagleray completion zsh)"'),
    "fish": (["--no-config", "-i"], "function fish_prompt; echo -n '$ '; end; set fish_autosuggestion_enabled 0",
             "eagleray completion fish | source"),
}  # fmt: skip
INSTALLED = [pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed"))
             for name in SHELLS]  # fmt: skip


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command `eagleray` of these sources."""
    (tmp_path / "bin").mkdir()
    file = tmp_path / "bin" / "eagleray"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -m jobs.cli "$@"\n')
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    yield


@pytest.mark.parametrize("shell", INSTALLED)
def test_words_are_completed_in_the_shell(shell: str, command: None) -> None:
    flags, prompt, script = START[shell]
    terminal = Terminal(str(shutil.which(shell)), *flags, columns=160)
    try:
        for line in (prompt, script, "echo rea''dy"):
            terminal.type(f"{line}\n")
        terminal.until(lambda text: "\nready" in text)
        for typed, completed in (
            ("eagleray exp", "eagleray export"),
            ("eagleray infer engine=ech", "eagleray infer engine=echo"),
            ("eagleray infer engine.fallb", "eagleray infer engine.fallback="),
            ("eagleray infer --config-d", "eagleray infer --config-dir"),
            ("eagleray infer engine=echo dataset.path=docs/examples/dem", "dataset.path=docs/examples/demo.jsonl"),
            ("eagleray show docs/exam", "eagleray show docs/examples/"),
            ("eagleray infer --config-dir=con", "eagleray infer --config-dir=conf/"),
            ("eagleray cost out --by la", "eagleray cost out --by lane"),
        ):
            terminal.type(f"{typed}\t")
            terminal.until(lambda text, completed=completed: completed in text)
            terminal.type("\x15")  # Ctrl-U empties the line
            terminal.until(lambda text, completed=completed: completed not in text)
    finally:
        terminal.close()


@pytest.mark.parametrize("shell", INSTALLED)
def test_the_script_has_no_syntax_error(shell: str) -> None:
    script = ROOT / "jobs" / f"completion.{shell}"
    subprocess.run([shell, "-n", str(script)], check=True, capture_output=True)
