"""Memory of finalize with embeddings: it must not grow with the number of rows, except for the index (56 bytes a row).

The ledger is written directly, with the keys of the rows, so that no engine is measured. A fresh process then writes the
output of all rows, job after job, as the tasks of finalize do. Its peak memory is that of the process.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from engines.types import Completion
from engines.usage import Usage
from pipeline.configuration.compose import compose
from pipeline.dataset.formats import RowParser
from pipeline.dataset.keys import RequestHasher
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import Record, write_segment

DIMENSIONS, SEGMENT_ROWS = 384, 8192

FINALIZE = """
import json, resource, sys, time
from rich.console import Console
from pipeline.configuration.compose import compose
from pipeline.context import resolve_context
from pipeline.dataset.plan import split_input
from pipeline.output.export import _summaries
from pipeline.output.part_writer import PartWriter
from pipeline.output.plan import embedding_type, plan_columns, plan_jobs
from pipeline.report.stats import Stats
from pipeline.storage.ledger_index import read_index

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
config = compose(sys.argv[1:])
context = resolve_context(config, Console(stderr=True, quiet=True))
splits = split_input(config, context.console, None).splits
before = peak()
began = time.perf_counter()
index = read_index(context.fs, context.root)
summaries = _summaries(splits, context.row_reader)
read = peak()
kind = embedding_type(config.output.embedding, index.lengths)
writer = PartWriter(context.row_reader, plan_columns(splits, summaries, context.row_reader, (), (), kind), config.output)
stats, rows, parts = Stats(), 0, 0
jobs = plan_jobs(splits, summaries, index.answer_bytes)
for job in jobs:
    result = writer.run(job, index)
    assert not result.missing, result.missing
    stats.merge(result.stats)
    rows, parts = rows + result.rows, parts + len(result.files)
assert stats.broken is None, stats.broken
print(json.dumps({"rows": rows, "parts": parts, "jobs": len(jobs), "type": str(kind), "imported_mib": before,
                  "read_mib": read, "peak_mib": peak(), "seconds": time.perf_counter() - began}))
"""


def write_ledger(rows: int, data: Path, words: list[str]) -> None:
    """The dataset, and a ledger with an embedding for each of its rows."""
    config = compose(words)
    parser, hasher = RowParser.of(config), RequestHasher(config.engine, config.params())
    fs, root = resolve(str(config.output.path))
    random = np.random.default_rng(0)
    with data.open("w") as file:
        for start in range(0, rows, SEGMENT_ROWS):
            records = []
            vectors = random.standard_normal((min(SEGMENT_ROWS, rows - start), DIMENSIONS), np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            for at, vector in enumerate(vectors):
                row = {"id": f"r{start + at}", "text": f"Text number {start + at}, of the usual length of a sentence."}
                file.write(json.dumps(row) + "\n")
                completion = Completion(usage=Usage(input=12), model="m", engine="echo", values={"embedding": vector})
                records.append(Record(hasher.key(parser.parse(row), ""), row["id"], completion, time.time()))
            write_segment(fs, root, "w1", records)


def run(sizes: tuple[int, ...] = (50_000, 1_000_000)) -> dict[str, Any]:
    """One figure for each number of rows."""
    found = []
    for rows in sizes:
        work = Path(tempfile.mkdtemp(prefix="eagleray-embed-"))
        try:
            data, out = work / "in.jsonl", work / "out"
            words = ["task=embed", "engine=echo", f"dataset.path={data}", f"output.path={out}"]
            write_ledger(rows, data, words)
            told = subprocess.run([sys.executable, "-c", FINALIZE, *words], check=True, capture_output=True, text=True)
            one = {
                name: round(value, 1) if isinstance(value, float) else value
                for name, value in json.loads(told.stdout).items()
            }
            one["rows_per_s"] = round(one["rows"] / one["seconds"])
            one["ledger_mib"] = round(sum(path.stat().st_size for path in out.glob("_segments/*")) / 2**20)
            one["output_mib"] = round(sum(path.stat().st_size for path in out.glob("data/*")) / 2**20)
            found.append(one)
            print("embeddings", one, file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return {"embeddings": found}
