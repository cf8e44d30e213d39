"""Random directory trees: a run changes no byte that Eagleray did not write, also a run that is killed.

EAGLERAY_TREES sets the number of trees (20 by default). 500 trees take some minutes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from engines.errors import ConfigError
from pipeline.configuration.compose import compose
from pipeline.errors import Stopped
from pipeline.executors import registry
from pipeline.run import run
from pipeline.storage.output_files import MARKER
from tests.support.infer import ask
from tests.support.length_executor import LengthExecutor
from tests.support.outputs import snapshot

TREES = int(os.environ.get("EAGLERAY_TREES", "20"))
OLD_OUTPUTS = Path(__file__).parent / "data" / "output_v0"

FOLDERS = ("", "a", "a/b", "out", "out/data", "out/errors", "out/_segments", "out/_batches", "data")
# Names of the user's files; some are those of files that Eagleray writes.
NAMES = (
    "notes.txt", "in.jsonl", "more.jsonl", "part-00000.parquet", "part-00001.jsonl", "manifest.json", "report.html",
    "_run.json", "_files.json", "_budget.json", ".lock", "eagleray-0123abcd-00001.json", "x.tmp",
)  # fmt: skip
PLACES = ("a", "a/b", "out", "out/data", "data")


@pytest.fixture(scope="module", autouse=True)
def length() -> Iterator[None]:
    registry.register("length", type("Length", (LengthExecutor,), {"passes": []}))
    yield
    registry.unregister("length")


def infer(dataset: Path, out: Path, *more: str) -> None:
    base = ["engine=echo", f"dataset.path='{dataset}'", f"output.path='{out}'", "run.mode=length"]
    with contextlib.suppress(ConfigError, Stopped):
        run(compose([*base, *more]), Console(file=io.StringIO(), width=200))


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Earlier outputs: of today's version, complete; of the version before markers, complete and stopped."""
    root = tmp_path_factory.mktemp("earlier")
    (root / "in.jsonl").write_text(text("x"))
    infer(root / "in.jsonl", root / "out")
    assert pq.read_table(root / "out" / "data")["response"].to_pylist() == ["1", "2"]
    return [root / "out", OLD_OUTPUTS / "complete", OLD_OUTPUTS / "stopped"]


def text(word: str) -> str:
    return json.dumps(ask(word)) + "\n" + json.dumps(ask(f"{word}2")) + "\n"


LINKS = ("a/link", "data/link", "out/link", "link")
TARGETS = ("a", "data", "out", "a/in.jsonl", ".")
DATASETS = ("a/in.jsonl", "a", "data", ".", "a/*.jsonl", "out/data", "link", "other/in.jsonl")
OUTPUTS = ("out", "new", "a/out", ".", "data", "link", "a")
MORE = ((), ("run.resume=false",), ("output.overwrite=true",), ("output.format=jsonl",), ("run.dry_run=true",))


def pairs(first: Any, second: Any, at_least: int = 0, at_most: int = 2, key: int = 0) -> Any:
    return st.lists(st.tuples(first, second), min_size=at_least, max_size=at_most, unique_by=lambda pair: pair[key])


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    every = [(folder, name) for folder in FOLDERS for name in NAMES]
    return {
        "outputs": draw(pairs(st.integers(0, 2), st.sampled_from(PLACES), key=1)),  # number of an earlier output, place
        "files": draw(st.lists(st.sampled_from(every), min_size=1, max_size=8, unique=True)),
        "links": draw(pairs(st.sampled_from(LINKS), st.sampled_from(TARGETS))),
        "dataset": draw(st.sampled_from(DATASETS)),
        "out": draw(st.sampled_from(OUTPUTS)),
        "more": draw(st.lists(st.sampled_from(MORE), min_size=1, max_size=3)),  # of each run
    } | (draw(owned()) if draw(st.booleans()) else {})


@st.composite
def owned(draw: st.DrawFn) -> dict[str, Any]:
    """An earlier output with files of the user's in it, into which a run writes to its end."""
    inside = [
        (folder, name) for folder in FOLDERS if folder.startswith("out") for name in ("notes.txt", "part-00009.parquet")
    ]
    more = st.sampled_from([(), ("run.resume=false",), ("output.format=jsonl",)])
    return {
        "outputs": [(draw(st.integers(0, 2)), "out")],
        "files": [("a", "in.jsonl"), *draw(st.lists(st.sampled_from(inside), min_size=1, max_size=5, unique=True))],
        "links": [],
        "dataset": "a/in.jsonl",
        "out": "out",
        "more": [("output.overwrite=true", *draw(more)) for _ in range(2)],
    }


def plant(root: Path, tree: dict[str, Any], earlier: list[Path]) -> set[str]:
    """Makes a tree. Returns the paths of the files in it that Eagleray wrote."""
    own: set[str] = set()
    (root / "other").mkdir(parents=True)
    (root / "other" / "in.jsonl").write_text(text("other"))
    for number, place in tree["outputs"]:
        if not (root / place).exists():
            shutil.copytree(earlier[number], root / place)
            own |= {str(path.relative_to(root)) for path in (root / place).rglob("*") if path.is_file()}
    for folder, name in tree["files"]:
        path = root / folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(f"{folder}/{name}") if name.endswith(".jsonl") else f"the user's {folder}/{name}")
    for name, target in tree["links"]:
        path = root / name
        if not path.is_symlink() and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(root / target)
    return own


@settings(max_examples=TREES, suppress_health_check=list(HealthCheck))
@given(tree=trees())
def test_no_byte_of_the_users_changes(tree: dict[str, Any], earlier: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "project"
        own = plant(root, tree, earlier)
        before = {name: data for name, data in snapshot(root).items() if name not in own}
        for more in tree["more"]:
            infer(root / tree["dataset"], root / tree["out"], *more)
            after = snapshot(root)
            assert {name: after.get(name) for name in before} == before
            # What is new lies in an output with a marker.
            out = (root / tree["out"]).resolve()
            for name in after.keys() - before.keys() - own:
                assert (root / name).resolve().is_relative_to(out) and (out / MARKER).is_file(), name


KILLED = """
import os, sys
from tests.test_ownership_trees import infer
from tests.support.length_executor import LengthExecutor
from pipeline.executors import registry
from pathlib import Path
registry.register("length", type("Length", (LengthExecutor,), {"passes": []}))
left = int(sys.argv[1])
def count(event, args):
    global left
    if event in ("os.rename", "os.remove"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(count)
infer(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("run.resume=false",), ("output.format=jsonl",)], ids=["resume", "anew", "jsonl"])
def test_a_run_that_is_killed_at_any_write_keeps_the_users_files_and_can_be_finished(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    root = tmp_path.resolve()
    data, out = root / "data" / "in.jsonl", root / "data" / "out"
    data.parent.mkdir()
    data.write_text(text("a") + text("?"))
    infer(data.parent, out)
    users = {
        "notes.txt": "n",
        "data/notes.txt": "n",
        "data/part-00007.parquet": "mine",
        "errors/x": "x",
        "_segments/x": "x",
    }
    for name, content in users.items():
        (out / name).write_text(content)
    data.write_text(text("a") + text("?") + text("more"))
    before = {name: value for name, value in snapshot(root).items() if name.removeprefix("data/out/") in users}
    before["data/in.jsonl"] = data.read_bytes()
    killed = 0
    for at in range(100):
        command = [sys.executable, "-c", KILLED, str(at), str(data.parent), str(out), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = snapshot(root)
        assert {name: after.get(name) for name in before} == before
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        killed += 1
    assert killed >= 3
    infer(data.parent, out)
    answers = pq.read_table(out / "data" / "part-00000.parquet")["response"].to_pylist()
    assert answers == ["1", "2", None, "2", "4", "5"]
    after = snapshot(root)
    assert {name: after.get(name) for name in before} == before
