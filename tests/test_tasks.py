"""Tasks other than a chat, through the whole pipeline with engine=echo."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from engines import load_engine
from engines.tasks import TASKS
from jobs import diff, show
from jobs.reading import in_our_format
from pipeline.dataset.task_inputs import url_task
from pipeline.output.summary import first_rows
from pipeline.storage.ledger import VALUE_COLUMNS, list_segments, read_segment
from pipeline.storage.ledger_index import read_index
from tests.support.infer import Infer, ask

Write = Callable[..., Path]
WORDS = ["alpha", "beta gamma", "delta", "alpha"]


def segments(infer: Infer) -> list[pa.Table]:
    fs = pafs.LocalFileSystem()
    return [read_segment(fs, path) for path in list_segments(fs, str(infer.out))]


def echo(inputs: dict[str, Any], task: str, **generation: Any) -> dict[str, Any]:
    with load_engine("echo") as engine:
        [found] = engine.infer([{"task": task, "inputs": inputs}], generation)
    return found.values


def test_embeddings_are_a_column_of_fixed_size(infer: Infer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.csv"
    with path.open("w") as file:
        csv.writer(file).writerows([["review", "embedding"], *([word, "mine"] for word in WORDS)])
    outcome = infer(path, "task=embed", "dataset.columns.text=review")
    assert (outcome.exit_status, outcome.manifest["rows"]["done"], outcome.manifest["rows"]["requests"]) == (0, 4, 3)
    assert outcome.manifest["tokens"]["output"] == 0 and outcome.manifest["tokens"]["input"] == 4
    table = infer.table()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    assert table["input_embedding"].to_pylist() == ["mine"] * 4
    expected = np.stack([echo({"text": word}, "embed")["embedding"] for word in WORDS])
    found = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=True).reshape(4, 8)
    assert np.array_equal(found, expected)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    for name in ("response", "messages", "finish_reason", "tool_calls", "reasoning"):
        assert table[name].null_count == 4
    assert table["usage"].to_pylist()[1]["input"] == 2
    assert infer(path, "task=embed", "dataset.columns.text=review").manifest["this_run"]["asked"] == 0
    # The terminal
    assert "embedding: 8 numbers" in "".join(row[2] for row in first_rows(outcome.manifest, str(infer.out)))
    other = shutil.copytree(infer.out, tmp_path / "other")
    part = other / "data" / "part-00000.parquet"
    vectors = pa.array([*found[:3].tolist(), [1.0] * 8], pa.list_(pa.float32(), 8))
    pq.write_table(table.set_column(table.column_names.index("embedding"), "embedding", vectors), part)
    assert diff.main([str(infer.out), str(other), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["rows"]["equal"], counts["rows"]["differ"]) == (3, 1)
    assert show.main([str(other), "--row", "4"]) == 0 and "embedding: 8 numbers: 1, 1, 1, 1, …" in capsys.readouterr().out


def test_a_chat_has_no_column_of_a_task_in_its_segments_or_output(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("a", score=1, label="x")]))
    assert infer.table().column_names[:4] == ["id", "index", "score", "label"]
    assert all("embedding" not in table.column_names and "score" not in table.column_names for table in segments(infer))


def test_the_lines_of_a_batch_file_mix_tasks(infer: Infer, write_jsonl: Write) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one two"}]
    bodies = {
        "chat/completions": {"messages": talk[:1]},
        "embeddings": {"input": "alpha"},
        "classify": {"messages": talk[:1]},
        "score": {"messages": talk},
        "rerank": {"query": "q", "documents": ["a", "b", "c"]},
        "completions": {"prompt": "one two", "echo": True, "max_tokens": 0, "logprobs": 1},
        "moderations": {"input": "x"},
    }
    lines = [{"custom_id": name, "url": f"/v1/{name}", "body": body} for name, body in bodies.items()]
    path, given = write_jsonl(lines), ("generation.max_tokens=3", "generation.temperature=0")
    outcome = infer(path, *given)
    assert outcome.manifest["rows"] | {"requests": 0} == outcome.manifest["rows"] | {"done": 6, "failed": 1, "requests": 0}
    rows = {row["id"]: row for row in infer.rows()}
    values = {name for kind in TASKS.values() for name in kind.columns}
    assert values <= set(infer.table().column_names)
    for name, row in rows.items():
        found = {name for name in values if row[name] is not None}
        task = url_task(f"/v1/{name}", "chat")
        assert found == (set(TASKS[task].columns) if name != "moderations" else set()), name
        assert (row["response"] is None) == (task != "chat" or name == "moderations")
    assert json.loads(rows["score"]["messages"]) == talk and rows["embeddings"]["messages"] is None
    assert json.loads(rows["chat/completions"]["messages"])[-1] == {"role": "assistant", "content": "q"}
    assert rows["rerank"]["ranking"] == echo({"query": "q", "documents": ["a", "b", "c"]}, "rerank")["ranking"]
    likely = rows["completions"]
    assert likely["tokens"] == len(likely["token_logprobs"]) == 2
    assert likely["loglikelihood"] == sum(likely["token_logprobs"])
    assert np.isclose(likely["perplexity"], np.exp(-likely["loglikelihood"] / 2))
    label = rows["classify"]
    assert label["label"] == label["scores"][0]["label"] and len(label["scores"]) == 3
    for name, said in (("embeddings", "Norms of the embeddings"), ("rerank", "ranking: the best score")):
        assert said in (infer.out / "report.html").read_text(), name
    [segment] = [table for table in segments(infer) if "embedding" in table.column_names]
    assert segment.schema.field("embedding").type == pa.list_(pa.float32())
    outcome = infer(path, *given, "output.format=jsonl", "output.style=openai_batch")
    assert outcome.manifest["this_run"]["asked"] == 0
    answers = [json.loads(line) for line in (infer.out / "data" / "part-00000.jsonl").read_text().splitlines()]
    bodies = {answer["custom_id"]: answer["response"]["body"] for answer in answers}
    usage = {"prompt_tokens": 1, "completion_tokens": 0, "total_tokens": 1}
    assert bodies["embeddings"] == {
        "id": "embd-1", "object": "list", "model": "echo", "usage": usage,
        "data": [{"object": "embedding", "index": 0, "embedding": rows["embeddings"]["embedding"]}],
    }  # fmt: skip
    assert bodies["chat/completions"]["choices"][0]["message"]["content"] == "q"
    assert bodies["rerank"]["results"][0] == {
        "index": rows["rerank"]["ranking"][0]["index"],
        "relevance_score": rows["rerank"]["ranking"][0]["score"],
        "document": {"text": "abc"[rows["rerank"]["ranking"][0]["index"]]},
    }
    assert bodies["score"]["data"] == [{"index": 0, "object": "score", "score": rows["score"]["score"]}]
    assert answers[-1]["error"]["code"] == "invalid_input"
    for answer in answers:  # `show` and `diff` read them
        values = {name for name in in_our_format(answer, "openai_batch") if name in VALUE_COLUMNS}
        assert values == {name for name in VALUE_COLUMNS if rows[answer["custom_id"]][name] is not None}


def test_failed_rows_have_no_values_and_are_run_again(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([{"text": f"text {n}"} for n in range(20)] + [{"other": 1}])
    words = ("task=embed", "engine.max_retries=0", "run.max_error_rate=null")
    outcome = infer(path, *words, "engine.kwargs.failure_rate=0.5")
    assert outcome.exit_status == 3 and 1 < outcome.manifest["rows"]["failed"] < 20
    table = infer.table()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 8)
    assert table["embedding"].null_count == outcome.manifest["rows"]["failed"]
    errors = pq.read_table(infer.out / "errors")
    assert set(errors.column_names) == {"id", "text", "other", "raw", "error"}
    outcome = infer(path, *words)
    assert outcome.manifest["rows"]["failed"] == 1
    assert infer.rows()[-1]["error"]["message"].startswith("in.jsonl:21: task=embed needs text")


@pytest.mark.slow
def test_other_lengths_of_earlier_runs_do_not_change_the_type(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([{"text": word} for word in WORDS])
    infer(path, "task=embed")
    infer(path, "task=embed", "generation.dimensions=3", "output.embedding=float16")
    assert read_index(pafs.LocalFileSystem(), str(infer.out)).lengths == {8, 3}
    column = infer.table()["embedding"]
    assert column.type == pa.list_(pa.float16(), 3)
    whole = echo({"text": "delta"}, "embed")["embedding"][:3]
    assert np.allclose(column.to_pylist()[2], whole / np.linalg.norm(whole), atol=1e-3)
    infer(path, "task=embed")
    assert infer.table()["embedding"].type == pa.list_(pa.float32(), 8)
    mixed = write_jsonl([{"text": "a"}, {"text": "b", "generation": {"dimensions": 2}}], "mixed.jsonl")
    infer(mixed, "task=embed", "output.overwrite=true")
    assert infer.table()["embedding"].type == pa.list_(pa.float32())
    assert [len(row) for row in infer.table()["embedding"].to_pylist()] == [8, 2]
