"""Every example of the README is executed; what needs a model or a bucket nobody has here is at least composed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs import plan
from jobs.compose import compose
from jobs.infer import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for line in README.splitlines() if re.match(r"(\w+=\S+ )*(eagleray (infer|plan|serve|chat)|ray job submit) ", line)
]
RUNNABLE = [line for line in COMMANDS if "docs/examples" in line]
PLANS = [line for line in RUNNABLE if "eagleray plan " in line]


def overrides(command: str) -> list[str]:
    words = shlex.split(command)
    start = next(at for at, word in enumerate(words) if word in ("infer", "plan", "serve", "chat", "jobs.infer"))
    return words[start + 1 :]


def test_the_readme_shows_enough_examples() -> None:
    assert len(COMMANDS) >= 8
    assert len(RUNNABLE) >= 5
    assert PLANS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_a_valid_configuration(command: str) -> None:
    compose(overrides(command)).check(runs=re.search("eagleray (plan|serve|chat) ", command) is None)


@pytest.mark.parametrize("command", PLANS)
def test_the_plans_of_the_readme_run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.main(overrides(command)) in (0, 3)


@pytest.mark.parametrize("command", [command for command in RUNNABLE if command not in PLANS])
def test_the_commands_of_the_readme_run(
    command: str, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    args = [arg for arg in overrides(command) if not arg.startswith("output.path=")]
    status = main([*args, f"output.path={tmp_path}/out", "generation.max_tokens=8"])
    assert status in (0, 3)
    assert (tmp_path / "out" / "manifest.json").exists() != ("run.dry_run=true" in args)


def test_the_library_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) >= 2
    assert all(line.endswith("None") for line in lines[-1:])
