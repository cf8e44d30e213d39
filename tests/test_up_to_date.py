"""A run over a finished output reads no row if nothing changed, and notices each change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.infer import ask
from tests.support.length_executor import Job, LengthExecutor

Write = Callable[..., Path]
UP_TO_DATE = "No request was sent: the output is up to date."


@pytest.fixture
def data(job: Job, write_jsonl: Write) -> Path:
    """The input of a finished run with three answers."""
    path = write_jsonl([ask("a", id="1"), ask("bb", id="2"), ask("ccc", id="3")])
    job(path)
    return path


def test_a_finished_run_is_recognised_without_a_look_at_its_rows(
    job: Job, length: type[LengthExecutor], data: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in job.out.rglob("*.parquet")}
    again = job(data)
    assert length.passes == [3] and UP_TO_DATE in job.printed
    assert again.manifest["rows"]["done"] == 3 and again.manifest["this_run"]["asked"] == 0
    assert {path: path.stat().st_mtime_ns for path in job.out.rglob("*.parquet")} == before
    assert not (job.out / "_run.json").exists()


def test_an_input_file_with_the_size_and_time_of_the_old_one_is_another_file(
    job: Job, length: type[LengthExecutor], data: Path
) -> None:
    old = data.stat()
    other = data.with_name("other")
    other.write_text(data.read_text().replace("bb", "b!"))
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    other.replace(data)
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    job(data)
    assert length.passes == [3, 1] and job.answers() == ["1", "2", "3"]


def test_a_row_that_is_appended_while_a_run_reads_is_asked_by_the_next_run(
    job: Job, length: type[LengthExecutor], write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl([ask("a")])
    execute = length.execute

    def execute_and_append(self: LengthExecutor, *args: Any) -> Any:
        found = execute(self, *args)
        if self.passes == [1]:
            data.write_text(data.read_text() + json.dumps(ask("late")) + "\n")
        return found

    monkeypatch.setattr(length, "execute", execute_and_append)
    job(data)
    assert job.answers() == ["1"]
    job(data)
    assert length.passes == [1, 1] and job.answers() == ["1", "4"]


def test_an_altered_or_missing_file_of_the_output_is_written_again(job: Job, data: Path) -> None:
    part = job.out / "data" / "part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-20] + b"\0" * 20)  # of the same size
    assert job(data).manifest["this_run"]["asked"] == 0 and job.answers() == ["1", "2", "3"]
    for name in ("data/part-00000.parquet", "report.html"):
        (job.out / name).unlink()
        assert job(data).manifest["this_run"]["asked"] == 0 and UP_TO_DATE not in job.printed
        assert (job.out / name).exists()
    job(data)
    assert UP_TO_DATE in job.printed


def test_a_lost_segment_is_asked_again(job: Job, length: type[LengthExecutor], data: Path) -> None:
    for path in (job.out / "_segments").glob("*.parquet"):
        path.unlink()
    job(data)
    assert length.passes == [3, 3] and job.answers() == ["1", "2", "3"]


@pytest.mark.parametrize("change", ["generation.temperature=0.5", "engine.model=other"])
def test_a_setting_that_changes_answers_asks_again(job: Job, length: type[LengthExecutor], data: Path, change: str) -> None:
    job(data, change)
    assert length.passes == [3, 3]
    job(data, change, "run.flush_s=1", "engine.max_concurrency=3")
    assert length.passes == [3, 3] and UP_TO_DATE in job.printed


def test_another_order_of_a_schema_asks_again(job: Job, length: type[LengthExecutor], write_jsonl: Write) -> None:
    data, one, two = write_jsonl([ask("a")]), {"type": "string"}, {"type": "integer"}
    for properties in ({"one": one, "two": two}, {"two": two, "one": one}):  # a model writes them in this order
        schema = {"name": "n", "schema": {"type": "object", "properties": properties}}
        job(data, f"generation.response_format={json.dumps({'type': 'json_schema', 'json_schema': schema})}")
    assert length.passes == [1, 1]


def test_a_setting_of_the_output_writes_it_again(job: Job, length: type[LengthExecutor], data: Path) -> None:
    job(data, "output.format=jsonl")
    assert UP_TO_DATE not in job.printed and (job.out / "data" / "part-00000.jsonl").exists()
    job(data, "output.format=jsonl")
    assert length.passes == [3, 0] and UP_TO_DATE in job.printed


def test_rows_that_name_files_are_read_again(job: Job, length: type[LengthExecutor], write_jsonl: Write) -> None:
    image = job.out.parent / "a.png"
    part = {"type": "image_url", "image_url": {"url": str(image)}}
    data = write_jsonl([{"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}])
    job(data)  # the image is not there yet
    for content in (b"one", b"two"):
        image.write_bytes(content)
        job(data)
    assert length.passes == [1, 1, 1]
    job(data)
    assert length.passes == [1, 1, 1, 0] and UP_TO_DATE in job.printed


def test_a_manifest_of_an_earlier_version_has_no_stamps(job: Job, length: type[LengthExecutor], data: Path) -> None:
    path = job.out / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["stamps"]
    path.write_text(json.dumps(manifest))
    job(data)
    assert length.passes == [3, 0] and UP_TO_DATE in job.printed


def test_work_under_way_elsewhere_is_fetched(
    job: Job, length: type[LengthExecutor], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(length, "under_way", True)
    job(data)
    assert length.passes == [3, 0]
