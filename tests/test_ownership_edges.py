"""Rare states of an output directory: a moved working directory, two runs that start together, damaged and foreign files,
and outputs of earlier versions that were killed near their end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engines.errors import ConfigError
from pipeline.output.ownership import typed_equally
from pipeline.storage.output_files import MARKER
from tests.support.infer import Infer
from tests.test_ownership import line, put


def marker(out: Path) -> Any:
    return json.loads((out / MARKER).read_text())


# -- the working directory is another one -----------------------------------------------------------------------------


def test_a_relative_dataset_resumes_from_another_working_directory(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {f"{package}/{name}.jsonl": line("a") for package in ("pkg1", "pkg2") for name in ("in", "other")})
    monkeypatch.chdir(tmp_path / "pkg1")
    infer("in.jsonl")
    monkeypatch.chdir(tmp_path / "pkg2")
    for other in ("other.jsonl", tmp_path / "pkg2" / "in.jsonl", "../pkg2/in.jsonl"):
        with pytest.raises(ConfigError, match="another dataset"):
            infer(other)
    assert infer("./in.jsonl").manifest["this_run"]["asked"] == 0
    assert marker(infer.out)["dataset"] == os.path.realpath(tmp_path / "pkg2" / "in.jsonl")
    assert infer(tmp_path / "pkg2" / "in.jsonl").manifest["this_run"]["asked"] == 0  # the same place, typed otherwise


def test_a_marker_without_the_typed_paths_is_compared_by_places(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"pkg1/in.jsonl": line("a"), "pkg2/in.jsonl": line("a")})
    monkeypatch.chdir(tmp_path / "pkg1")
    infer("in.jsonl")
    found = marker(infer.out)
    assert found.pop("typed") == ["in.jsonl"]
    (infer.out / MARKER).write_text(json.dumps(found))
    monkeypatch.chdir(tmp_path / "pkg2")
    with pytest.raises(ConfigError, match="another dataset"):
        infer("in.jsonl")
    monkeypatch.chdir(tmp_path / "pkg1")
    infer("in.jsonl")
    assert marker(infer.out)["typed"] == ["in.jsonl"]


def test_which_typed_paths_are_the_same() -> None:
    assert typed_equally(["/a/x"], ["x"], ["/b/x"], ["./x"])
    assert typed_equally(["/a/x"], ["x"], ["/b/y", "/b/x"], ["y", "d/../x"])  # a list that grew
    assert typed_equally(["/a/x", "/c"], ["x", "/c"], ["/b/x", "/c"], ["x", "/c"])
    assert not typed_equally(["/a/x", "/c"], ["x", "/c"], ["/b/x", "/d"], ["x", "/d"])
    assert not typed_equally(["/a/x", "/a/y"], ["x", "y"], ["/b/x"], ["x"])
    assert not typed_equally(["/a/x"], ["/a/x"], ["/b/x"], ["/b/x"])
    assert not typed_equally(["s3://b/x"], ["s3://b/x"], ["s3://c/x"], ["s3://c/x"])
    assert not typed_equally(["/a/x"], ["x"], ["/b/x"], ["/b/x"])
    assert not typed_equally(["/home/a/x"], ["~/x"], ["/home/b/x"], ["~/x"])
    assert not typed_equally(["/a/x"], [], ["/b/x"], ["x"])
