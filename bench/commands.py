"""Whole commands, one after the other, and the commit that is measured."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def commit() -> str:
    """The commit of this checkout; "unknown" outside of one."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(head, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def timed(commands: Mapping[str, Sequence[str]]) -> dict[str, float | str]:
    """The seconds that each of these arguments of Python takes, by name; the end of its output if it fails."""
    found: dict[str, float | str] = {}
    for name, command in commands.items():
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900)
        taken = round(time.perf_counter() - began, 1)
        found[name] = taken if done.returncode == 0 else f"failed: {(done.stderr or done.stdout).strip()[-300:]}"
        print(name, found[name], flush=True)
    return found
