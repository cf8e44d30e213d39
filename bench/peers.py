"""Rows a second of whole programs that echo the same Parquet rows: `python -m bench --only pipeline.peers`.

- `eagleray`: `eagleray infer engine=echo`. Each row gets a key, a record that is durable after two seconds, the
  conversation with its answer, and a place in the report.
- `ray_data`: `read_parquet → map_batches → write_parquet` of Ray Data, with an actor that returns its batches as they are.
- `ray_data_llm`: a processor of `ray.data.llm` with one stage, which answers with the last message.

All of them read and write files of the same size, on the same cores, in turns. Starting Python and Ray counts.
"""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow.json as pj
import pyarrow.parquet as pq

from bench.commands import timed
from bench.pipeline import write_rows

# Files of the dataset: as many parts as the output has.
FILE_ROWS = 32_768

START = """
import logging, sys
import ray
path, out = sys.argv[1:]
ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
ray.data.DataContext.get_current().enable_progress_bars = False
"""

RAY_DATA = f"""{START}
class Identity:
    def __call__(self, batch):
        return batch

rows = ray.data.read_parquet(path).map_batches(Identity, batch_format="pyarrow", batch_size=4096, concurrency=1)
rows.write_parquet(out)
"""

RAY_DATA_LLM = f"""{START}
from ray.data.llm import Processor, ProcessorConfig
from ray.llm._internal.batch.stages.base import StatefulStage, StatefulStageUDF

class Echo(StatefulStageUDF):
    async def udf(self, rows):
        for row in rows:
            at = self.IDX_IN_BATCH_COLUMN
            yield {{at: row[at], "response": row["messages"][-1]["content"]}}

stage = StatefulStage(fn=Echo, map_batches_kwargs={{"concurrency": 1}})
Processor(ProcessorConfig(batch_size=1024, concurrency=1), [stage])(ray.data.read_parquet(path)).write_parquet(out)
"""


def write_parquet_rows(work: Path, rows: int) -> Path:
    """The rows of `write_rows`, in Parquet files."""
    lines, folder = work / "peers.jsonl", work / "peers"
    write_rows(lines, rows)
    folder.mkdir()
    table = pj.read_json(lines, pj.ReadOptions(block_size=16 << 20))
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        pq.write_table(table.slice(start, FILE_ROWS), folder / f"{number:05d}.parquet", compression="zstd")
    lines.unlink()
    return folder


def run(work: Path, rows: int = 1_000_000, repeats: int = 2) -> dict[str, Any]:
    """Rows a second of each, and the ratios to the medians of the others."""
    data = write_parquet_rows(work, rows)
    seconds: dict[str, list[float]] = {}
    for turn in range(repeats):
        outs = {name: work / f"peers-{name}-{turn}" for name in ("eagleray", "ray_data", "ray_data_llm")}
        commands = {
            "eagleray": ["-m", "jobs.infer", "engine=echo", f"dataset.path={data}", f"output.path={outs['eagleray']}"],
            "ray_data": ["-c", RAY_DATA, str(data), str(outs["ray_data"])],
            "ray_data_llm": ["-c", RAY_DATA_LLM, str(data), str(outs["ray_data_llm"])],
        }
        turns = list(commands) if turn % 2 == 0 else list(reversed(commands))
        for name, taken in timed({name: commands[name] for name in turns}).items():
            if isinstance(taken, str):
                raise RuntimeError(f"{name}: {taken}")
            folder = outs[name] / "data" if name == "eagleray" else outs[name]
            written = pq.read_table(folder, columns=["id"]).num_rows
            if written != rows:
                raise RuntimeError(f"{name} wrote {written:,} of {rows:,} rows")
            shutil.rmtree(outs[name])
            seconds.setdefault(name, []).append(taken)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "rows": rows,
        "rows_per_s": {name: round(rows / taken) for name, taken in middle.items()},
        "over_ray_data": round(middle["ray_data"] / middle["eagleray"], 2),
        "over_ray_data_llm": round(middle["ray_data_llm"] / middle["eagleray"], 2),
    }
