"""What is not Eagleray's stays as it is: no file of the user's is changed, removed or taken for input or output."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engines.errors import ConfigError, ErrorCode
from jobs.batch import main as batch_main
from jobs.infer import main as infer_main
from jobs.plan import main as plan_main
from pipeline.configuration.compose import compose
from pipeline.dataset.source import list_file_splits
from pipeline.errors import Stopped
from pipeline.output.ownership import NEW, OLD, OWN, Ownership, check_inputs, same_dataset, same_typed
from pipeline.storage.filesystem import canonical_place, child, resolve
from pipeline.storage.output_files import MARKER
from tests.support.infer import Infer, ask
from tests.support.outputs import snapshot
from tests.support.s3_server import S3Server

Write = Callable[..., Path]
OLD_OUTPUTS = Path(__file__).parent / "data" / "output_v0"


def untouched(before: dict[str, Any], root: Path) -> None:
    after = snapshot(root)
    assert {key: after.get(key) for key in before} == before


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def line(text: str) -> str:
    return json.dumps(ask(text)) + "\n"


def look(dataset: Any, out: Any, *more: str) -> Ownership:
    config = compose(["engine=echo", f"dataset.path={dataset}", f"output.path={out}", *more])
    return Ownership.look(config, *resolve(str(out)))


def names_of(path: Any) -> list[str]:
    return [split.name for split in list_file_splits(path)]


# -- a directory of the user's ----------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder whose files have the names of Eagleray's."""
    root = tmp_path / "project"
    put(root, {
        "data/in.jsonl": line("a") + line("b"), "errors/notes.txt": "notes", "report.html": "<p>mine</p>",
        "manifest.json": '{"name": "my app", "rows": 3}', "_run.json": "{}", "data/part-00000.parquet": "mine",
    })  # fmt: skip
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("dataset", ["data/in.jsonl", "data", "data/*.jsonl", "../elsewhere.jsonl"])
@pytest.mark.parametrize("more", [(), ("run.resume=false",), ("run.dry_run=true",), ("output.overwrite=true",)])
def test_a_project_folder_is_refused_before_anything_is_touched(
    project: Path, capsys: pytest.CaptureFixture[str], dataset: str, more: tuple[str, ...]
) -> None:
    before = snapshot(project.parent)
    words = ["engine=echo", f"dataset.path={dataset}", "output.path=.", *more]
    assert infer_main(words) == 2
    said = capsys.readouterr().err
    assert "output.path" in said and said.count("\n") == 1
    assert ("would hold its own input" if dataset.startswith("data") else "not an output of Eagleray") in said
    assert snapshot(project.parent) == before
    if not more:
        assert plan_main(words) == 2 and snapshot(project.parent) == before


def test_a_folder_beside_the_dataset_that_is_not_empty_is_refused(infer: Infer, write_jsonl: Write) -> None:
    put(infer.out, {"notes.txt": "n"})
    with pytest.raises(
        ConfigError, match=r"is not empty, and is not an output of Eagleray \(it contains notes.txt\)"
    ) as raised:
        infer(write_jsonl([ask("a")]))
    assert raised.value.code == ErrorCode.OUTPUT_NOT_OURS
    assert snapshot(infer.out) == {"notes.txt": b"n"}


@pytest.mark.parametrize("step", ["status", "cancel"])
def test_the_batch_steps_refuse_a_folder_that_is_not_an_output_and_write_nothing(
    tmp_path: Path, write_jsonl: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    put(tmp_path / "mine", {"notes.txt": "n"})
    words = [step, "engine=openai", "engine.model=m", f"dataset.path={write_jsonl([ask('a')])}"]
    before = sorted(tmp_path.rglob("*"))
    assert batch_main([*words, f"output.path={tmp_path / 'mine'}"]) == 2
    assert "not an output of Eagleray (it contains notes.txt)" in capsys.readouterr().err
    assert batch_main([*words, f"output.path={tmp_path / 'new'}"]) == 0
    assert "0 rows under way in 0 batches" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_the_place_of_the_output_is_refused(infer: Infer, write_jsonl: Write) -> None:
    infer.out.write_text("mine")
    with pytest.raises(ConfigError, match="not a directory"):
        infer(write_jsonl([ask("a")]))
    assert infer.out.read_text() == "mine"


def test_an_empty_directory_and_one_with_a_torn_marker_are_taken(infer: Infer, write_jsonl: Write) -> None:
    infer.out.mkdir()
    (infer.out / f".eagleray-{'0' * 32}.tmp").write_text("{")  # of a run that was killed before its first file was whole
    infer(write_jsonl([ask("a")]))
    assert json.loads((infer.out / MARKER).read_text())["dataset"] == os.path.realpath(write_jsonl([ask("a")]))


@pytest.mark.parametrize(
    ("dataset", "out"),
    [
        ("in/a.jsonl", "in"), ("in", "in"), ("in/", "./in"), ("in/*.jsonl", "in"), ("in/deep/*.jsonl", "in"),
        ("[in/deep/b.jsonl,other.jsonl]", "in"), ("link", "in"), ("in/deep", "link"), ("in/a.jsonl", "."),
    ],
)  # fmt: skip
def test_an_input_inside_the_output_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, out: str
) -> None:
    put(tmp_path, {"in/a.jsonl": line("a"), "in/deep/b.jsonl": line("b"), "other.jsonl": line("c")})
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="would hold its own input") as raised:
        look(dataset, out)
    assert raised.value.code == ErrorCode.INPUT_IN_OUTPUT


@pytest.mark.parametrize(("dataset", "out"), [("s3://b/x/in.jsonl", "s3://b/x"), ("s3://b/x/?region=r", "s3://b/x/"),
                                              ("gs://b/x/*.jsonl", "gcs://b/x")])  # fmt: skip
def test_an_input_inside_the_output_is_an_error_on_stores(dataset: str, out: str) -> None:
    with pytest.raises(ConfigError, match="would hold its own input"):
        check_inputs(dataset, out)


@pytest.mark.slow
def test_an_output_below_the_dataset_is_no_input(infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    infer.out = tmp_path / "in" / "out"
    data = write_jsonl([ask("a"), ask("b")], "in/x.jsonl").parent
    for _ in range(2):
        assert infer(data).manifest["rows"]["total"] == 2


# -- files of the user's in an output ---------------------------------------------------------------------------------

STRAY = {
    "notes.txt": "n", "data/notes.txt": "n", "data/part-00000.jsonl": "n", "data/part-00007.parquet": "n",
    "errors/part-1.parquet": "n",
    "errors/deep/part-00000.parquet": "n", "_segments/mine.parquet": "n", "_segments/_lock-mine.json": "n",
    "data/.hidden.tmp": "n",
    "_batches/copy.jsonl": "n", "_batches/eagleray.parquet": "n", "sub/manifest.json": "{}",
}  # fmt: skip


@pytest.mark.slow
def test_strays_survive_resuming_shrinking_and_starting_over(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("a"), ask("b")]), "engine.kwargs.failure_rate=1")
    put(infer.out, STRAY)
    (infer.out / "link").symlink_to("notes.txt")
    before = {key: value for key, value in snapshot(infer.out).items() if key in STRAY or key == "link"}
    assert len(before) == len(STRAY) + 1
    infer(write_jsonl([ask("a"), ask("b"), ask("c")]))
    assert not (infer.out / "errors" / "part-00000.parquet").exists()  # ours, and stale
    untouched(before, infer.out)
    infer(write_jsonl([ask("d")]), "run.resume=false")
    assert pq.read_table(infer.out / "data" / "part-00000.parquet")["response"].to_pylist() == ["d"]
    untouched(before, infer.out)


@pytest.mark.parametrize("name", ["report.html", "manifest.json", "_run.json", "data/part-00000.parquet", "_segments/.lock",
                                  "errors/part-00000.parquet", "_files.json", "data"])  # fmt: skip
def test_a_file_in_the_way_is_an_error_before_a_row_is_asked(infer: Infer, write_jsonl: Write, name: str) -> None:
    data = write_jsonl([ask("a"), ask("b")])
    look(data, infer.out).begin()
    put(infer.out, {name: "mine"})
    before = snapshot(infer.out)
    for more in ((), ("run.dry_run=true",), ("run.resume=false",)):
        said = f"{name} was not written by Eagleray and would be overwritten: move it away"
        with pytest.raises(ConfigError, match=said) as raised:
            infer(data, *more)
        assert raised.value.code == ErrorCode.FILE_IN_THE_WAY
    assert snapshot(infer.out) == before


@pytest.mark.slow
def test_a_part_in_the_way_is_found_before_any_part_is_overwritten(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.output import finalize

    monkeypatch.setattr(finalize.plan_jobs, "__defaults__", (0.0, 10))
    infer(write_jsonl([ask(f"{i}") for i in range(10)]))
    put(infer.out, {"data/part-00002.parquet": "mine"})
    before = snapshot(infer.out / "data")
    data = write_jsonl([ask(f"{i}") for i in range(30)])
    with pytest.raises(Stopped, match="data/part-00002.parquet was not written by Eagleray") as raised:
        infer(data)
    assert raised.value.code == ErrorCode.FILE_IN_THE_WAY
    assert snapshot(infer.out / "data") == before
    (infer.out / "data" / "part-00002.parquet").unlink()
    assert infer(data).manifest["this_run"]["asked"] == 0
    assert len(infer.rows()) == 30


@pytest.mark.slow
def test_a_manifest_that_is_taken_away_leaves_its_parts_eaglerays(infer: Infer, write_jsonl: Write) -> None:
    data = write_jsonl([ask("a")])
    infer(data)
    (infer.out / "manifest.json").unlink()
    (infer.out / "report.html").unlink()
    assert infer(data).manifest["this_run"]["asked"] == 0


# -- another dataset --------------------------------------------------------------------------------------------------


def test_another_dataset_is_refused_and_replaces_only_by_word(infer: Infer, write_jsonl: Write) -> None:
    one, two = write_jsonl([ask("a"), ask("b")], "one.jsonl"), write_jsonl([ask("b"), ask("c")], "two.jsonl")
    infer(one)
    before = snapshot(infer.out)
    for more in ((), ("run.dry_run=true",), ("run.resume=false",)):
        said = r"answers to another dataset \(.*one.jsonl\).*output.overwrite=true"
        with pytest.raises(ConfigError, match=said) as raised:
            infer(two, *more)
        assert raised.value.code == ErrorCode.OTHER_DATASET
    assert snapshot(infer.out) == before
    outcome = infer(two, "output.overwrite=true")
    assert outcome.manifest["this_run"]["asked"] == 1  # what was paid for stays usable
    assert [row["response"] for row in infer.rows()] == ["b", "c"]
    assert infer(two).manifest["rows"]["total"] == 2
    with pytest.raises(ConfigError, match="another dataset"):
        infer(one)


def test_a_directory_without_answers_takes_another_dataset(infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        infer(tmp_path / "mistyped.jsonl")
    assert infer(write_jsonl([ask("a")])).exit_status == 0


def test_an_entry_of_a_directory_keeps_the_options_of_its_uri() -> None:
    options = "?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1"
    assert child(f"s3://b/out/{options}", "errors") == f"s3://b/out/errors{options}"
    assert resolve(child(f"s3://b/out{options}", "errors"))[1] == "b/out/errors"
    assert child("out/", "errors") == "out/errors" and child("what?a=b", "errors") == "what?a=b/errors"


def test_spellings_of_a_dataset_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {"in/a.jsonl": "", "in/x[1].jsonl": ""})
    (tmp_path / "link").symlink_to("in")
    for one, other in (
        ("in", f"{tmp_path}/in/"), ("in", "./link"), ("in/a.jsonl", f"file://{tmp_path}/in/../link/a.jsonl"),
        ("in/*.jsonl", f"{tmp_path}/link/*.jsonl"), ("in/x[1].jsonl", "link/x[1].jsonl"),
        ("./in/**/*.jsonl", "link/**/*.jsonl"),
        ("s3://b/in", "s3://b/in/?region=eu"), ("gs://b/in", "gcs://b/in/"), ("az://c/in", "abfss://c/in"),
    ):  # fmt: skip
        assert canonical_place(one) == canonical_place(other)
    assert (
        len({canonical_place(p) for p in ("in", "in/*", "in/*.jsonl", "in/**", "s3://b/in", "gs://b/in", "s3://c/in")}) == 7
    )


def test_which_datasets_are_the_same() -> None:
    assert same_dataset(["/p/a"], "/p/out", ["/p/a"], "/p/out")
    assert same_dataset(["/p/a"], "/p/out", ["/p/b", "/p/a"], "/p/out")  # a list that grew
    assert not same_dataset(["/p/a", "/p/b"], "/p/out", ["/p/a"], "/p/out")
    assert not same_dataset(["/p/a"], "/p/out", ["/p/b"], "/p/out")
    assert same_dataset(["/p/a"], "/p/out", ["/q/a"], "/q/out")  # the whole project moved
    assert same_dataset(["s3://b/p/a"], "s3://b/p/out", ["s3://b/q/a"], "s3://b/q/out")
    assert not same_dataset(["/p/a"], "/p/out", ["/q/a"], "/p/out")
    assert same_dataset(["s3://b/a"], "/p/out", ["s3://b/a"], "/q/out")
    assert not same_dataset(["s3://b/a"], "/p/out", ["s3://c/a"], "/p/out")
    assert same_typed(["in.jsonl"], ["/anywhere/in.jsonl"]) and same_typed(["../d/*.jsonl"], ["/x/d/*.jsonl"])
    assert not same_typed(["in.jsonl"], ["/anywhere/begin.jsonl"]) and not same_typed(["/a/in.jsonl"], ["/b/in.jsonl"])


# -- outputs of before the marker -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["complete", "stopped"])
def test_an_old_output_is_adopted_for_its_own_dataset(infer: Infer, tmp_path: Path, name: str) -> None:
    shutil.copytree(OLD_OUTPUTS, tmp_path / "p")
    infer.out = tmp_path / "p" / name
    put(infer.out, {"data/notes.txt": "n", "mine.html": "n"})
    before = {"data/notes.txt": b"n", "mine.html": b"n"}
    put(tmp_path, {"p/other.jsonl": line("x")})
    with pytest.raises(ConfigError, match=r"another dataset \(in.jsonl\)"):
        infer(tmp_path / "p" / "other.jsonl")
    assert not (infer.out / MARKER).exists()
    infer(tmp_path / "p" / "in.jsonl")
    assert json.loads((infer.out / MARKER).read_text())["dataset"] == os.path.realpath(tmp_path / "p" / "in.jsonl")
    untouched(before, infer.out)
    infer(tmp_path / "p" / "in.jsonl", "run.resume=false")
    untouched(before, infer.out)


def test_what_makes_an_output_of_before_the_marker(tmp_path: Path) -> None:
    whole, data = OLD_OUTPUTS / "complete", OLD_OUTPUTS / "in.jsonl"

    def copied(*names: str) -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for name in names:
            target = tmp_path / "out" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(whole / name, target) if (whole / name).is_dir() else shutil.copy(whole / name, target)
        return tmp_path / "out"

    assert look(data, copied("manifest.json")).state == OLD
    assert look(data, copied("_segments/.lock")).state == OLD  # killed at once
    killed = look(data, copied("_segments", "data", "errors", "report.html"))  # before its manifest
    assert killed.files == {"data/part-00000.parquet", "errors/part-00000.parquet", "report.html"}
    for names in (("data",), ("errors",), ("report.html",), ("data", "report.html")):
        with pytest.raises(ConfigError, match="not an output of Eagleray"):
            look(data, copied(*names))
    out = copied("report.html", "_segments/.lock")
    with pytest.raises(ConfigError, match="not an output of Eagleray"):
        look(data, out)
    put(out, {"_segments/w1-0123456789ab.parquet": "PAR1"})
    pq.write_table(pq.read_table(whole / "errors"), out / "_segments" / "w2-0123456789ab.parquet")
    with pytest.raises(ConfigError, match="not an output of Eagleray"):
        look(data, out)


# -- outputs as input -------------------------------------------------------------------------------------------------


def test_outputs_and_links_are_no_input_twice(tmp_path: Path) -> None:
    put(tmp_path, {"in/a.jsonl": line("a"), "in/sub/b.jsonl": line("b"), "outside/c.jsonl": line("c")})
    shutil.copytree(OLD_OUTPUTS / "complete", tmp_path / "in" / "old")
    shutil.copytree(OLD_OUTPUTS / "complete", tmp_path / "in" / "sub" / "new")
    look(tmp_path / "outside", tmp_path / "marked").begin()
    put(tmp_path, {"marked/data/part-00000.jsonl": line("x")})
    for name, target in {
        "again": "sub", "up": "..", "loop": ".", "one.jsonl": "a.jsonl", "far": "../outside", "result": "../marked",
        "rows": "../marked/data", "row.jsonl": "../marked/data/part-00000.jsonl", "gone.jsonl": "nowhere",
    }.items():  # fmt: skip
        (tmp_path / "in" / name).symlink_to(target)
    expected = ["a.jsonl", "far/c.jsonl", "sub/b.jsonl"]
    assert names_of(tmp_path / "in") == expected
    assert names_of(f"{tmp_path}/in/**/*.jsonl") == expected
    assert names_of(f"{tmp_path}/in/*.jsonl") == ["a.jsonl"]
    assert names_of([f"{tmp_path}/in/one.jsonl", f"{tmp_path}/in"]) == ["one.jsonl", *expected[1:]]
    assert names_of(f"{tmp_path}/in/ag*/*.jsonl") == ["again/b.jsonl"]
    # Named, an output's rows are a dataset like any other.
    assert names_of(tmp_path / "in/old/data") == ["part-00000.parquet"]
    assert names_of(f"{tmp_path}/in/*/data/*.parquet") == ["old/data/part-00000.parquet"]
    with pytest.raises(ConfigError, match=r"in/old is an output of Eagleray's, which is read only where .*in/old/data"):
        list_file_splits(tmp_path / "in" / "old")


def test_on_a_store_directories_of_others_are_refused_and_outputs_are_no_input(s3: S3Server) -> None:
    s3.put("in/a.jsonl", line("a").encode())
    s3.put("mine/data/notes.txt", b"n")
    for path in OLD_OUTPUTS.joinpath("complete").rglob("*"):
        if path.is_file():
            s3.put(f"in/old/{path.relative_to(OLD_OUTPUTS / 'complete')}", path.read_bytes())
    before = s3.objects("")
    with pytest.raises(ConfigError, match="not an output of Eagleray"):
        look(s3.uri("in"), s3.uri("mine"))
    with pytest.raises(ConfigError, match="would hold its own input"):
        look(s3.uri("in/a.jsonl"), s3.uri("in"))
    assert names_of(s3.uri("in")) == ["a.jsonl"]
    assert names_of(s3.uri("in/*/data/*.parquet")) == ["old/data/part-00000.parquet"]
    assert look(s3.uri("in"), s3.uri("out")).state == NEW and s3.objects("") == before
    look(s3.uri("in"), s3.uri("in/out")).settle()
    s3.put("in/out/data/part-00000.jsonl", line("x").encode())
    assert names_of(s3.uri("in")) == ["a.jsonl"]
    with pytest.raises(ConfigError, match="data/part-00000.jsonl was not written by Eagleray"):
        look(s3.uri("in"), s3.uri("in/out"), "output=jsonl")
    own = look(s3.uri("in"), s3.uri("in/out"))
    own.clear()
    assert own.state == OWN and s3.objects("in/out/")["data/part-00000.jsonl"] == line("x").encode()
