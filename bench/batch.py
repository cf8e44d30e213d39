"""`run.mode=batch` through OpenAI's wire on loopback: `python -m bench --only batch`.

120,000 rows go in three files to the tests' server and come back: seconds, and the most memory of the process that reads,
splits, uploads and fetches, beside that of a run of 12,000 rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.batch_server import BatchServer

SIZES = (12_000, 120_000)
# So that three files of 50,000 rows at most are some 100 MB.
PADDING = "Answer in one short sentence, and show no working. " * 12


def run() -> list[dict[str, Any]]:
    """One entry for each size."""
    return [measure(rows) for rows in SIZES]


def measure(rows: int) -> dict[str, Any]:
    """Seconds of the whole command, and the most MiB its own process had."""
    with tempfile.TemporaryDirectory() as folder, BatchServer() as server:
        server.delay_s = 1.0
        data, out = Path(folder) / "in.jsonl", Path(folder) / "out"
        with data.open("w") as file:
            for i in range(rows):
                message = {"role": "user", "content": f"{PADDING}Question {i}?"}
                file.write(json.dumps({"id": f"r{i}", "messages": [message]}) + "\n")
        command = [
            sys.executable, "-m", "jobs.infer", "engine=openai", "engine.model=m", f"engine.base_url={server.url}/v1",
            f"dataset.path={data}", f"output.path={out}", "run.mode=batch", "run.batch_poll_s=1",
        ]  # fmt: skip
        began = time.perf_counter()
        environment = {**os.environ, "OPENAI_API_KEY": "sk-bench"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak))
        watcher.start()
        _, said = process.communicate()
        watcher.join()
        if process.returncode != 0:
            raise SystemExit(f"the run failed: {said[-500:]}")
        manifest = json.loads((out / "manifest.json").read_text())
        return {
            "rows": rows,
            "batches": len(server.submitted),
            "done": manifest["rows"]["done"],
            "seconds": round(time.perf_counter() - began, 1),
            "uploaded_mb": round(data.stat().st_size / 1e6),
            "peak_mib": peak[0] >> 20,
        }


def _watch(pid: int, peak: list[int]) -> None:
    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass
