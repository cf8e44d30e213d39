"""Runs over each kind of input file, and runs that end before Ray starts because of their input."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from engines.errors import ConfigError, ErrorCode
from jobs import show
from pipeline.configuration.compose import compose
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.dataset.plan import list_splits
from pipeline.dataset.read import read_file_split, read_table
from pipeline.dataset.reader import RowReader
from pipeline.dataset.source import list_file_splits
from pipeline.preflight.dataset_estimate import DatasetEstimate
from pipeline.storage.retry import StoreError
from tests.support.file_server import FileServer
from tests.support.hub_server import HubServer
from tests.support.infer import Infer, ask
from tests.support.marks import slow
from tests.support.s3_server import S3Server
from tests.test_input_files import good, save_to_disk, write

Write = Callable[..., Path]
QUESTIONS = 'id;question;code;limit\n1;"Why,\nor why not?";007;4\n\n2;What?;1.50;\n3;;x;5\n4;a;b\n'


def command(*overrides: str) -> subprocess.CompletedProcess[str]:
    base = [sys.executable, "-m", "jobs.infer", "engine=echo", "run.flush_s=0.2"]
    return subprocess.run([*base, *overrides], capture_output=True, text=True, timeout=300)


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_a_csv_file_is_answered_and_its_errors_can_be_run_again(infer: Infer, tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", QUESTIONS)
    columns = ("dataset.columns.prompt=question", "dataset.columns.max_tokens=limit")
    assert infer(path, *columns).exit_status == 3
    rows = infer.rows()
    assert [row["id"] for row in rows[:2]] == ["1", "2"]
    assert [(row["response"], row["code"], row["limit"]) for row in rows] == [
        ("Why,\nor why not?", "007", "4"),
        ("What?", "1.50", None),
        (None, "x", "5"),
        (None, None, None),
    ]
    assert [row["error"] and row["error"]["message"] for row in rows[2:]] == [
        "in.csv:6: the column 'question' (dataset.columns.prompt) is null",
        "in.csv:7: the row has 3 cells, the header has 4",
    ]
    assert infer.table().schema.field("code").type == infer.table().schema.field("limit").type == pa.string()
    again = Infer(tmp_path / "again")
    with pytest.raises(ConfigError) as caught:  # both rows are still invalid
        again(infer.out / "errors", *columns)
    assert caught.value.code == ErrorCode.NO_ROW


def test_generation_parameters_of_a_csv_file_are_numbers(infer: Infer, tmp_path: Path) -> None:
    path = write(tmp_path / "in.csv", 'prompt,n,stop,generation\nhi,2,x,"{""max_tokens"": 3}"\nhi,1,"[""a"", ""b""]",\n')
    assert infer(path, "dataset.columns.n=n", "dataset.columns.stop=stop").exit_status == 0
    assert [len(json.loads(row["choices"])) for row in infer.rows() if row["choices"]] == [2]


@pytest.mark.parametrize("name", [slow("in.jsonl"), slow("in.json"), slow("in.tsv"), slow("in.arrow")])
def test_the_real_command_answers_each_kind_of_file(tmp_path: Path, name: str) -> None:
    table = [{"id": f"r{i}", "prompt": f"question\t{i}\nand more"} for i in range(5)]
    if name == "in.arrow":
        save_to_disk(tmp_path / name, [pa.Table.from_pylist(table[:3]), pa.Table.from_pylist(table[3:])])
    elif name == "in.tsv":
        lines = ["id\tprompt", *(f'{row["id"]}\t"{row["prompt"]}"' for row in table)]
        write(tmp_path / name, "\ufeff" + "\n".join(lines))
    else:
        write(tmp_path / name, json.dumps(table, indent=2 if name == "in.json" else None).encode("utf-16"))
    out = tmp_path / "out"
    done = command(f"dataset.path={tmp_path / name}", f"output.path={out}")
    assert done.returncode == 0, done.stderr
    answers = pq.read_table(out / "data").to_pylist()
    assert [(row["id"], row["response"]) for row in answers] == [(row["id"], row["prompt"]) for row in table]


@pytest.mark.slow
def test_files_in_a_store_are_read_as_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3Server.environment.items():
        monkeypatch.setenv(name, value)
    table = [{"id": str(i), "prompt": f"a\n{i}"} for i in range(3000)]
    with S3Server() as s3:
        text = "id,prompt\n" + "".join(f'{row["id"]},"{row["prompt"]}"\n' for row in table)
        s3.put("in/year=2024/a.csv", text.encode("utf-16"))
        s3.put("in/year=2025/b.json", json.dumps(table).encode())
        s3.put("in/notes.txt", b"not data")
        s3.failing = 0.1
        notes: list[str] = []
        found = good(s3.uri("in"))
        list_file_splits(s3.uri("in"), note=notes.append)
        assert found == [{**row, "year": year} for year in (2024, 2025) for row in table]
        assert "they have no ending of a data file: notes.txt." in notes[0]
        s3.failing = 0.0
        done = command(f"dataset.path={s3.uri('in/*/a.csv')}", f"output.path={s3.uri('out')}", "dataset.limit=30")
        assert done.returncode == 0, done.stderr
        assert json.loads(s3.objects("out/")["manifest.json"])["rows"]["done"] == 30


@pytest.mark.slow
def test_numbers_that_json_does_not_have_are_kept(infer: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "in.jsonl",
        '{"prompt": "a", "x": -Infinity, "y": {"z": [NaN, null]}, "mixed": Infinity}\n'
        '{"prompt": "b", "x": NaN, "y": null, "mixed": "text"}\n',
    )
    infer(path)
    first, second = infer.rows()
    assert first["x"] == -math.inf and math.isnan(second["x"])
    assert json.loads(first["y"]) == {"z": ["NaN", None]}
    assert [first["mixed"], second["mixed"]] == ['"Infinity"', '"text"']
    assert show.main([str(infer.out), "--json", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["x"] == "-Infinity"
    lines = Infer(tmp_path / "lines")
    lines(path, "output=jsonl")
    (part,) = (lines.out / "data").iterdir()
    first, second = map(json.loads, part.read_text().splitlines())
    assert (first["x"], second["x"], first["y"]) == ("-Infinity", "NaN", {"z": ["NaN", None]})


def test_outputs_that_are_not_read_are_named(infer: Infer, write_jsonl: Write, tmp_path: Path) -> None:
    infer(write_jsonl([ask("a")]))
    for path, expected in (
        (tmp_path, [f"{tmp_path}: these outputs of Eagleray are not read: out."]),
        (f"{tmp_path}/**/*.jsonl", [f"{tmp_path}/**/*.jsonl: these outputs of Eagleray are not read: out."]),
        (f"{tmp_path}/*/data", []),
        (f"{tmp_path}/out/data", []),
    ):
        notes: list[str] = []
        assert len(list_file_splits(path, note=notes.append)) == 1
        assert notes == expected


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_sample_is_the_same_each_time_and_in_input_order(infer: Infer, tmp_path: Path, kind: str) -> None:
    table = pa.table({"prompt": [f"p{i}" for i in range(5000)], "number": list(range(5000))})
    for at in range(2):
        if kind == "parquet":
            pq.write_table(table.slice(2500 * at, 2500), tmp_path / f"in{at}.parquet", row_group_size=100)
        else:
            write(tmp_path / f"in{at}.jsonl", "\n".join(map(json.dumps, table.slice(2500 * at, 2500).to_pylist())))

    def taken(*more: str) -> list[int]:
        keys = [f"dataset.path={tmp_path}/in*", "output.path=x", "dataset.chunk_bytes=2000", *more]
        splits = list_splits(compose(keys), Console(file=io.StringIO()))
        read = [row.columns["number"] for split in splits for batch in read_file_split(split.file_split) for row in batch]
        if kind == "parquet":
            tables = [batch for split in splits for batch in read_table(split.file_split)]
            assert pa.Table.from_batches(tables)["number"].to_pylist() == read
        return read

    first = taken("dataset.sample=200")
    assert len(first) == 200 and first == sorted(set(first)) == taken("dataset.sample=200")
    assert first != taken("dataset.sample=200", "dataset.sample_seed=1")
    assert 60 <= sum(number < 2500 for number in first) <= 140  # from both files
    assert max(taken("dataset.sample=200", "dataset.limit=300")) < 300
    assert taken("dataset.sample=200", "dataset.limit=50") == list(range(50))
    assert taken("dataset.limit=3000") == list(range(3000))
    assert infer(f"{tmp_path}/in*", "dataset.sample=200").exit_status == 0
    assert [(row["index"], row["response"]) for row in infer.rows()] == [(at, f"p{one}") for at, one in enumerate(first)]
    assert infer.printed.count("A random sample: 200 of 5,000 rows (dataset.sample_seed=0).") == 1
    manifest = json.loads((infer.out / "manifest.json").read_text())
    assert manifest["input"]["sample"] == {"rows": 200, "seed": 0, "of_first": None}
    (infer.out / "manifest.json").unlink()  # as if the run had been killed at its end: it continues with the same rows
    again = infer(f"{tmp_path}/in*", "dataset.sample=200").manifest
    assert (again["this_run"]["asked"], again["rows"]["total"]) == (0, 200)
    assert [row["response"] for row in infer.rows()] == [f"p{one}" for one in first]


def test_a_limit_of_an_empty_input_is_empty(infer: Infer, tmp_path: Path) -> None:
    assert infer(write(tmp_path / "in.jsonl", "\n"), "dataset.limit=5").manifest["rows"]["total"] == 0


# --- runs that end before they start ------------------------------------------------------------------------------------


def refused(infer: Infer, dataset: object, *more: str) -> ConfigError:
    """The error of a run that writes nothing."""
    with pytest.raises(ConfigError) as caught:
        infer(dataset, *more)
    assert not infer.out.exists()
    return caught.value


def test_a_run_whose_rows_are_all_invalid_ends_before_it_begins(infer: Infer, tmp_path: Path) -> None:
    text = write(tmp_path / "notes.txt", "Some notes.\nMore of them.\n")
    error = refused(infer, text)
    assert error.code == ErrorCode.NO_ROW
    assert str(error) == (
        "none of the 2 rows of dataset.path can be asked: notes.txt:1: invalid JSON: Expecting value at column 1"
    )
    table = write(tmp_path / "in.csv", "question\n" + "Why?\n" * 2500)
    assert "none of the 2,500 rows of dataset.path can be asked: in.csv:2: no messages, " in str(refused(infer, table))
    assert "the only row of dataset.path cannot be asked" in str(refused(infer, table, "dataset.limit=1"))
    assert infer(table, "dataset.columns.prompt=question").exit_status == 0


def test_a_run_whose_engine_refuses_every_row_ends_before_it_begins(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    path = write_jsonl([ask("a", generation={"top_k": 3}), ask("a", generation={"top_k": 3}), "{"])
    with pytest.raises(ConfigError) as caught:
        infer(path, "engine.model=gpt-4o-mini", "engine.base_url=http://127.0.0.1:9", engine="openai")
    assert caught.value.code == ErrorCode.NO_ROW
    assert "none of the 3 rows of dataset.path can be asked: in.jsonl:3: invalid JSON" in str(caught.value)
    assert not infer.out.exists()


@pytest.mark.slow
def test_a_good_row_behind_many_bad_ones_is_found(
    infer: Infer, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl([*["bad"] * 3000, ask("good"), *["bad"] * 1000])
    outcome = infer(path)
    assert (outcome.exit_status, outcome.manifest["rows"]["done"]) == (3, 1)
    # Of an input that is too large to search, the run is started: a later row may be good.
    monkeypatch.setattr("pipeline.preflight.dry_run.SEARCH_ROWS", 2000)
    late = Infer(infer.out.with_name("late"))
    assert late(path).manifest["rows"]["failed"] == 4000


def test_a_dry_run_of_invalid_rows_ends_with_2(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([{"text": "a"}, {"text": "b"}])
    assert infer(path, "run.dry_run=true").exit_status == 2
    assert "none of the 2 rows of dataset.path can be asked: in.jsonl:1: no messages" in infer.printed


def test_the_command_says_in_one_line_what_cannot_be_read(tmp_path: Path) -> None:
    path, out = write(tmp_path / "in.xlsx", b"PK\x03\x04" + b"\0" * 100), tmp_path / "out"
    done = command(f"dataset.path={path}", f"output.path={out}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"eagleray: dataset.path: {path} is an Excel or zip file: save it as CSV, or unpack it "
        "(see docs/errors.md#input-files-that-cannot-be-read)\n"
    )
    assert not out.exists()


def test_unreadable_files_beside_good_ones_are_named_before_the_run(infer: Infer, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", json.dumps(ask("a")))
    write(tmp_path / "in" / "b.csv", b"\x7fELF\x02\x01\x01\0")
    write(tmp_path / "in" / "README.md", "about")
    assert infer(tmp_path / "in").exit_status == 3
    assert "b.csv is not text: it begins with" in infer.printed
    assert "these names are not read, because they have no ending of a data file: README.md." in infer.printed
    other = Infer(tmp_path / "other")
    assert refused(other, tmp_path / "in", "dataset.on_bad_input=fail").code == ErrorCode.INPUT_FILES


# --- Hugging Face Hub ---------------------------------------------------------------------------------------------------


PROMPT = b"prompt\nx\n"
TOKEN = "hf_0123456789abcdef"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    pytest.importorskip("huggingface_hub")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": ["from Parquet"]}), sink)
    files = {
        "README.md": b"about",
        "dataset_infos.json": b'{"default": {}}',
        "data/train.parquet": sink.getvalue().to_pybytes(),
        "more/test.csv": b"prompt\nfrom CSV\n",
    }
    with HubServer(files, token=TOKEN) as server:
        # The client reads its settings when it is imported, so what it asks runs in processes of their own.
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.mark.slow
def test_a_private_dataset_of_the_hub_is_answered_and_its_token_written_nowhere(hub: HubServer, tmp_path: Path) -> None:
    done = command("dataset.path=hf://datasets/org/name", f"output.path={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "out" / "data")["response"].to_pylist() == ["from Parquet", "from CSV"]
    assert "describe a dataset of Hugging Face: dataset_infos.json." in " ".join(done.stderr.split())
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written and TOKEN not in done.stdout + done.stderr


def looked_at(path: str) -> subprocess.CompletedProcess[str]:
    """`eagleray plan` of a dataset of the hub."""
    words = [sys.executable, "-m", "jobs.plan", "engine=echo", f"dataset.path={path}"]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_revision_of_a_dataset_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    with HubServer({"a.csv": PROMPT}, revisions={"v2": {"a.csv": PROMPT + b"y\n"}}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert "2 in 1 file: 2 requests" in looked_at("hf://datasets/org/name@v2").stdout
        for path, reason in (
            ("hf://datasets/org/name@nope", "the dataset org/name has no revision nope"),
            ("hf://datasets/org/no", "there is no dataset org/no on the hub, or it is private and HF_TOKEN is not set"),
            ("hf://datasets/org", "a dataset is hf://datasets/OWNER/NAME"),
        ):
            done = looked_at(path)
            assert done.returncode == 2
            assert done.stderr == (
                f"eagleray: dataset.path: cannot read '{path}': {reason} "
                "(see docs/errors.md#input-files-that-cannot-be-read)\n"
            )


def test_a_private_dataset_needs_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    with HubServer({"a.csv": PROMPT}, token=TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_fedcba9876543210")
        refused = looked_at("hf://datasets/org/name/*.csv")
        assert "there is no dataset org/name on the hub, or the token in HF_TOKEN may not read it" in refused.stderr
        assert "hf_fedcba" not in refused.stderr


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = command("dataset.path=hf://datasets/org/name", f"output.path={tmp_path / 'out'}")
    assert done.returncode == 2
    assert done.stderr == (
        "eagleray: dataset.path: cannot read 'hf://datasets/org/name': [Errno 111] Connection refused "
        "(see docs/errors.md#input-files-that-cannot-be-read)\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_signature_of_a_url_is_written_nowhere(infer: Infer, tmp_path: Path) -> None:
    rows = "".join(json.dumps({"id": f"r{i}", **ask(f"{i}")}) + "\n" for i in range(20)).encode()
    with FileServer({"rows.jsonl": rows}) as server:
        given = f"{server.url}/rows.jsonl?part=1&X-Amz-Signature=0123456789abcdef"
        infer(given)
        assert [row["response"] for row in infer.rows()] == [f"{i}" for i in range(20)]
        asked = len(server.queries)
        assert asked and all("0123456789abcdef" in query for query in server.queries)
        assert infer(given).manifest["this_run"]["asked"] == 0
        missing = command(f"dataset.path={given.replace('rows', 'none')}", f"output.path={tmp_path / 'none'}")
        assert missing.returncode == 2 and "/none.jsonl?part=1&X-Amz-Signature=***" in missing.stderr
    files = [path for path in infer.out.rglob("*") if path.is_file()]
    texts = [*(path.read_bytes() for path in files), infer.printed.encode(), missing.stderr.encode()]
    assert not [text for text in texts if b"0123456789abcdef" in text]
    assert b"part=1&X-Amz-Signature=***" in (infer.out / "manifest.json").read_bytes()
    tables = [str(pq.read_table(path).to_pydict()) for path in files if path.suffix == ".parquet"]
    assert not [table for table in tables if "0123456789abcdef" in table]  # the files are compressed


def test_a_broken_connection_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFile

    fsspec.filesystem("memory").pipe("/broken/in.csv", b"prompt\n" + b"a\n" * 5000)
    (file_split,) = list_file_splits("memory://broken/in.csv")

    def broken(self: MemoryFile, *size: int) -> bytes:
        raise RuntimeError("the connection broke")

    monkeypatch.setattr(MemoryFile, "read", broken)
    monkeypatch.setattr("pipeline.storage.retry.TRIES", 0)
    with pytest.raises(StoreError, match="the connection broke"):
        list(read_file_split(file_split))


# --- memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_keeps_a_few_bytes_of_each_request(tmp_path: Path) -> None:
    count = 40_000
    lines = [json.dumps(ask(f"question {i % (count - 100)}")) for i in range(count)]
    config = compose([f"dataset.path={write(tmp_path / 'in.jsonl', chr(10).join(lines))}", "output.path=x", "engine=echo"])
    del lines
    reader = RowReader(RowParser(), RequestHasher(config.engine, config.params()), 1 << 20)
    splits = list_splits(config, Console(file=io.StringIO()))
    DatasetEstimate(config).read(splits, reader, max_rows=10)
    tracemalloc.start()
    estimate = DatasetEstimate(config).read(splits, reader)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (estimate.rows, estimate.requests, estimate.duplicates) == (count, count - 100, 100)
    assert kept / count < 40
