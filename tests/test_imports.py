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
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not imported(path) & FORBIDDEN[package], path


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import engines, engines.echo", "torch transformers llama_cpp ray pyarrow hydra"),
        ("import sys; sys.argv = ['eagleray', '--help']; import jobs.cli; jobs.cli.main()", "ray hydra pyarrow numpy"),
    ],
)
def test_light_imports_stay_light(statement: str, absent: str) -> None:
    code = f"{statement}; import sys; print([m for m in {absent.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"
