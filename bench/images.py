"""Memory of a run over rows with images of 1 MB: `python -m bench --only images`.

The rows are conversations with a data URL, in JSONL and in Parquet (row groups of 100 rows, as `datasets` writes images).
The output holds the conversations with the answers appended, so images pass through every part of the pipeline. The figure
is the highest private memory (without pages of Ray's object store) of each kind of process, sampled ten times a second.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bench.pipeline import Memory, infer

ROWS, IMAGE_BYTES, GROUP_ROWS = 2000, 1_000_000, 100

EVERY_S = 0.1


class AllMemory(Memory):
    """The highest memory of every kind of process, Ray's own included."""

    every_s = EVERY_S

    def kind(self, process: psutil.Process, root: psutil.Process) -> str | None:
        if (known := super().kind(process, root)) is not None:
            return known
        words = process.cmdline()
        return Path(words[0]).name if words and not words[0].startswith("ray::") else (words or [None])[0]


def conversations(rows: int) -> Iterator[list[dict[str, Any]]]:
    random_bytes = random.Random(1).randbytes(IMAGE_BYTES)
    for row in range(rows):
        image = row.to_bytes(8, "big") + random_bytes[8:]
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        parts = [{"type": "text", "text": f"What is in image {row}?"}, {"type": "image_url", "image_url": {"url": url}}]
        yield [{"role": "user", "content": parts}]


def write(folder: Path, rows: int) -> dict[str, Path]:
    paths = {form: folder / f"images.{form}" for form in ("jsonl", "parquet")}
    with paths["jsonl"].open("w") as file:
        for row, messages in enumerate(conversations(rows)):
            file.write(json.dumps({"id": f"r{row}", "messages": messages}) + "\n")
    schema = pa.schema([("id", pa.string()), ("messages", pa.string())])
    with pq.ParquetWriter(paths["parquet"], schema) as writer:
        group: list[dict[str, str]] = []
        for row, messages in enumerate(conversations(rows)):
            group.append({"id": f"r{row}", "messages": json.dumps(messages)})
            if len(group) == GROUP_ROWS or row + 1 == rows:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group.clear()
    return paths


def run(rows: int = ROWS) -> dict[str, Any]:
    """Both formats in, Parquet and JSONL out; needs 12 GB of disk."""
    work = Path(tempfile.mkdtemp(prefix="eagleray-bench-"))
    found: dict[str, Any] = {"rows": rows, "image_mb": IMAGE_BYTES / 1e6}
    try:
        for form, path in write(work, rows).items():
            out = work / f"out-{form}"
            one = infer(path, out, f"output={form}", "hardware.replicas=2", "hardware.cpus=0", memory=AllMemory)
            peak = dict(sorted(one["peak_mib"].items(), key=lambda item: -item[1]))
            found[form] = {"seconds": round(one["wall_s"]), "peak_mib": peak}
            print(form, found[form], file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):
                shutil.rmtree(out)
                path.unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


if __name__ == "__main__":
    print(json.dumps(run(*map(int, sys.argv[1:])), indent=2))
