"""The values of tasks in the ledger, in the tables of other libraries, and in the report. Without Ray."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from engines.errors import EngineError
from engines.tasks import check_values, task_of
from engines.types import Choice, Completion, answer
from jobs import show
from jobs.export_files import CSVFile
from pipeline.configuration.compose import compose
from pipeline.context import resolve_context
from pipeline.dataset.plan import split_input
from pipeline.executors.cost_budget import CostBudget
from pipeline.executors.live.byte_limits import result_bytes
from pipeline.output.export import ExportedRows
from pipeline.output.openai_bodies import body_values, values_body
from pipeline.output.plan import OutputColumns, embedding_type
from pipeline.preflight.dataset_estimate import DatasetEstimate
from pipeline.report.task_values import values_text
from pipeline.report.value_stats import Shown
from pipeline.report.vector_stats import PAIRS, SAMPLED, VectorStats
from pipeline.storage.ledger import FAN, SEGMENT_SCHEMA, Compactor, Record, list_segments, read_segment, write_segment
from pipeline.storage.ledger_index import read_index

FS = pafs.LocalFileSystem()
VALUES: dict[str, dict[str, Any]] = {
    "embed": {"embedding": np.array([0.5, -0.25, 2.0], np.float32)},
    "classify": {"label": "a", "scores": [{"label": "a", "score": 0.75}, {"label": "b", "score": 0.25}]},
    "score": {"score": -1.5},
    "rerank": {"ranking": [{"index": 1, "score": 0.5}, {"index": 0, "score": 0.25}]},
    "loglikelihood": {"loglikelihood": -3.0, "tokens": 2, "perplexity": 4.5, "token_logprobs": [-1.0, -2.0]},
}


def record(number: int, completion: Completion) -> Record:
    return Record(number.to_bytes(32, "big"), f"r{number}", completion, 1.0 + number)


# -- the ledger -----------------------------------------------------------------------------------------------------------


def test_segments_have_the_columns_of_their_tasks_and_merge(tmp_path: Path) -> None:
    compactor = Compactor(FS, str(tmp_path), "w1")
    chat = [Completion([Choice(answer("x"), "stop")])]
    each = [*([Completion(values=values)] for values in VALUES.values()), chat, [*chat, Completion(values=VALUES["score"])]]
    for number in range(FAN):
        completions = each[number % len(each)]
        path = write_segment(FS, str(tmp_path), "w1", [record(2 * number + at, c) for at, c in enumerate(completions)])
        names = read_segment(FS, path).column_names
        assert names[: len(SEGMENT_SCHEMA)] == SEGMENT_SCHEMA.names
        assert set(names[len(SEGMENT_SCHEMA) :]) == {name for c in completions for name in c.values}
        compactor.add(path)
    [merged] = list_segments(FS, str(tmp_path))
    rows = {int(row["id"][1:]): row for row in read_segment(FS, merged).to_pylist()}
    assert len(rows) == FAN + FAN // len(each)
    for number in range(FAN):
        for at, completion in enumerate(each[number % len(each)]):
            row = rows[2 * number + at]
            for name in (name for values in VALUES.values() for name in values):
                expected = completion.values.get(name)
                assert row[name] == (expected.tolist() if isinstance(expected, np.ndarray) else expected)
    assert read_index(FS, str(tmp_path)).lengths == {3}


def test_a_large_embedding_counts_for_the_byte_limits() -> None:
    assert result_bytes(Completion(values={"embedding": np.zeros(4096, np.float32)})) > 16_384


# -- tables of other libraries --------------------------------------------------------------------------------------------


def data(tmp_path: Path, kind: pa.DataType) -> Path:
    path = tmp_path / "part.parquet"
    vectors = pa.array([[1.0, 0.0, 0.5], None, [0.25, 0.5, 1.0]], kind)
    pq.write_table(pa.table({"id": ["a", "b", "c"], "embedding": vectors}), path)
    return path


@pytest.mark.parametrize("number", ["float32", "float16"])
def test_embeddings_are_read_without_a_conversion(tmp_path: Path, number: str) -> None:
    path = data(tmp_path, embedding_type(number, {3}))
    column = pq.read_table(path)["embedding"].combine_chunks()
    assert column.type == pa.list_(pa.type_for_alias(number), 3)
    found = column.slice(2).flatten().to_numpy(zero_copy_only=True)
    assert found.dtype == number and found.tolist() == [0.25, 0.5, 1.0]
    frame = polars.read_parquet(path)
    assert frame["embedding"].dtype == polars.Array(getattr(polars, number.title()), 3)
    assert frame.drop_nulls()["embedding"].to_numpy().tolist() == [[1.0, 0.0, 0.5], [0.25, 0.5, 1.0]]


def test_lance_takes_embeddings(tmp_path: Path) -> None:
    import lance  # it warns at every fork after its import

    lance.write_dataset(pq.read_table(data(tmp_path, embedding_type("float32", {3}))), str(tmp_path / "x.lance"))
    table = lance.dataset(str(tmp_path / "x.lance")).to_table()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 3)
    near = lance.dataset(str(tmp_path / "x.lance")).to_table(nearest={"column": "embedding", "q": [0.25, 0.5, 1.0], "k": 1})
    assert near["id"].to_pylist() == ["c"]


def test_duckdb_takes_embeddings(tmp_path: Path) -> None:
    path = data(tmp_path, embedding_type("float32", {3}))
    near = "array_cosine_similarity(embedding::float[3], [0.25, 0.5, 1.0]::float[3])"
    found = duckdb.sql(f"select id, embedding from '{path}' order by {near} desc nulls last").fetchall()
    assert found == [("c", [0.25, 0.5, 1.0]), ("a", [1.0, 0.0, 0.5]), ("b", None)]


def test_a_csv_file_has_a_list_as_json() -> None:
    table = pa.table({"embedding": pa.array([[1.0, 0.5], None], pa.list_(pa.float16(), 2))})
    stream = io.BytesIO()
    file = CSVFile(stream, table.schema)
    file.add(ExportedRows(table, [{}, {}], OutputColumns([], [], (), raw=False, references=False)))
    file.close()
    assert stream.getvalue() == b'"embedding"\n"[1.0,0.5]"\n\n'


def test_values_name_their_task() -> None:
    assert [task_of(values) for values in VALUES.values()] == list(VALUES)
    assert task_of({}) == "chat"


@pytest.mark.parametrize("task", VALUES)
def test_a_body_holds_all_values(task: str) -> None:
    values = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in VALUES[task].items()}
    body = json.loads(json.dumps(values_body(task, 7, values, {"documents": ["x", "y"]}, "m", {"input": 3})))
    assert body_values(body) == values
    assert body["id"].endswith("-7") and body["usage"]["total_tokens"] == 3
    if task == "embed":
        body = values_body(task, 7, values, {}, "m", None, encoding="base64")
        assert isinstance(body["data"][0]["embedding"], str) and body_values(body) == values
    if task == "rerank":
        assert body["results"][0] == {"index": 1, "relevance_score": 0.5, "document": {"text": "y"}}
        body = values_body(task, 7, values, {}, "m", None, url="/v1/score")
        assert [each["score"] for each in body["data"]] == [0.25, 0.5] and body_values(body) == values
        assert len(values_body(task, 7, values, {"top_n": 1}, "m", None)["results"]) == 1


# -- for people -----------------------------------------------------------------------------------------------------------


def test_values_in_words() -> None:
    said = "\n".join(values_text({name: np.asarray(value).tolist() if name == "embedding" else value
                                  for name, value in values.items()}) for values in VALUES.values())  # fmt: skip
    assert said.splitlines() == [
        "embedding: 3 numbers: 0.5, -0.25, 2", "label: a", "scores: a 0.75, b 0.25", "score: -1.5",
        "ranking: 1 0.5, 0 0.25", "loglikelihood: -3", "tokens: 2", "perplexity: 4.5", "token_logprobs: 2 numbers: -1, -2",
    ]  # fmt: skip
    assert values_text({"embedding": [0.0] * 384}) == "embedding: 384 numbers: 0, 0, 0, 0, …"


def test_show_prints_the_values_of_a_row() -> None:
    console = Console(file=io.StringIO(), width=100)
    row = {"id": "a", "index": 0, "text": "t", "score": -1.5, "response": None, "messages": None, "error": None}
    show._show(row, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "text: t\nresult\n  score: -1.5\n" in printed


def vectors_of(vectors: list[list[float] | None], cuts: list[int]) -> VectorStats:
    """The statistics of rows that finalize divides into parts."""
    total = VectorStats()
    for start, end in zip([0, *cuts], [*cuts, len(vectors)], strict=True):
        part, ranks = VectorStats(), np.array([at * 7 % 11 for at in range(start, end)], np.float64)
        column = pa.array(vectors[start:end], pa.list_(pa.float32()))
        part.add(column, ranks, np.ones(end - start, np.bool_), lambda row, start=start: Shown(0, start + row, {"id": "x"}))
        total.merge(pickle.loads(pickle.dumps(part)))
    return total


def test_norms_and_pairs_do_not_depend_on_the_division_into_parts() -> None:
    vectors: list[list[float] | None] = [[1, 0], [0, 2], None, [3, 0.1], [-1, 0], [0.5, 0.5], [], [0.2, -1]]
    for cuts in ([], [3], [1, 2, 5]):
        found = vectors_of(vectors, cuts)
        assert (found.lengths, found.norms.rows, found.norms.most) == ({2}, 6, np.float32(np.hypot(3, 0.1)).round(4))
        cosines, nearest, farthest = found.pairs()
        assert len(cosines) == 15 and len(nearest) == len(farthest) == PAIRS
        assert {nearest[0].one.at, nearest[0].two.at} == {0, 3} and np.isclose(nearest[0].cosine, 3 / np.hypot(3, 0.1))
        assert {farthest[0].one.at, farthest[0].two.at} == {0, 4} and np.isclose(farthest[0].cosine, -1)


def test_the_sample_of_embeddings_is_bounded_and_has_each_answer_once() -> None:
    rng = np.random.default_rng(0)
    found = VectorStats()
    for part in range(3):
        column = pa.array(list(rng.standard_normal((200, 4), np.float32)), pa.list_(pa.float32(), 4))
        first = np.arange(200) % 2 == 0
        found.add(column, np.arange(200) + part / 10, first, lambda row, part=part: Shown(0, 200 * part + row, {}))
    assert len(found.sample) == SAMPLED and all(vector.at % 2 == 0 for vector in found.sample)
    assert len(found.pairs()[0]) == SAMPLED * (SAMPLED - 1) // 2


# -- money ----------------------------------------------------------------------------------------------------------------

PRICED = ("engine=echo", "engine.price.input=1", "engine.price.output=1000")


def test_a_task_has_no_output_tokens_in_an_estimate_or_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * 100}) + "\n" for _ in range(3)))
    config = compose([f"dataset.path={path}", f"output.path={tmp_path / 'out'}", "task=embed", *PRICED])
    context = resolve_context(config, Console(quiet=True))
    splits = split_input(config, context.console, None).splits
    found = DatasetEstimate(config).read(splits, context.row_reader)
    assert (found.requests, found.output, found.answers) == (1, 0, "at most 0")
    assert 90 < sum(found.prompts) < 200
    budget = CostBudget(1.0, config.engine, config.params(), 0.0)
    request = b'{"messages":[],"inputs":{"text":"word"},"task":"embed"}'
    assert budget.max_cost(request) < 1e-3 < budget.max_cost(b'{"messages":[{"role":"user","content":"word"}]}')


def test_a_batch_api_without_the_task_is_refused_before_a_run() -> None:
    from pipeline.executors.registry import executor_of

    words = ["engine=openai", "engine.model=text-embedding-3-small", "dataset.path=x", "output.path=y", "run.mode=batch"]
    config = compose([*words, "task=embed"])
    config.engine.provider["batch"].pop("tasks", None)
    [finding] = executor_of(config).findings(config)
    said = "the batch API of engine=openai does not support task=embed (it supports chat); run.mode=live sends requests"
    assert (finding.text, finding.key) == (said, "run.mode")
    config.engine.provider["batch"]["tasks"] = ["embed"]
    assert executor_of(config).findings(config) == []


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_nan_is_no_result(values: dict[str, Any]) -> None:
    check_values(values)
    check_values({"loglikelihood": -math.inf})  # the model gives the text the probability 0
    for name, value in values.items():
        for broken in with_nan(value):
            with pytest.raises(EngineError, match=f"NaN .* in '{name}'"):
                check_values({name: broken})


def with_nan(value: Any) -> list[Any]:
    """The value, with NaN in the place of each of its floats."""
    if isinstance(value, float):
        return [math.nan]
    if isinstance(value, dict):
        return [{**value, name: broken} for name, each in value.items() for broken in with_nan(each)]
    if isinstance(value, (list, np.ndarray)):
        changed = []
        for at, each in enumerate(value):
            for broken in with_nan(each if isinstance(value, list) else float(each)):
                changed.append(copy.copy(value))
                changed[-1][at] = broken
        return changed
    return []
