"""Dependencies point one way, jobs -> pipeline -> engines, and naming an engine is what loads its library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "engines": {"pipeline", "jobs", "ray", "hydra", "omegaconf"},
    "pipeline": {"jobs", "hydra", "omegaconf"},
    "jobs": set[str](),
}
HEAVY = "torch transformers llama_cpp vllm ray pyarrow hydra omegaconf aiohttp"


def at_the_top(path: Path) -> set[str]:
    """What a module imports as soon as it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", ["pipeline", "jobs"])
def test_only_engines_name_a_models_library_and_ray_comes_when_it_is_needed(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not imported(path) & {"torch", "transformers", "llama_cpp", "vllm"}, path
        assert not at_the_top(path) & {"ray", "hydra", "omegaconf"}, path


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_imports_what_lies_above_it(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    for path in paths:
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import engines", HEAVY),
        ("import engines.echo, engines; engines.load_engine('echo').infer([{'messages': []}])", HEAVY),
        ("import pipeline.config", HEAVY),
        ("import sys; sys.argv = ['eagleray', '--help']; import jobs.cli; jobs.cli.main()", f"{HEAVY} numpy"),
        ("import jobs.infer; jobs.infer.main(['--help'])", f"{HEAVY} numpy"),
        ("import jobs.infer; jobs.infer.main(['engine=ecko'])", "torch transformers llama_cpp vllm ray pyarrow"),
    ],
)
def test_light_imports_stay_light(statement: str, absent: str) -> None:
    code = f"{statement}; import sys; print([m for m in {absent.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
