"""engine=llamacpp against llama.cpp's own C++ server: `python -m bench --only llamacpp.server`, or one case of it:
`--only llamacpp.server.json`.

The server comes from the package `xllamacpp` (prebuilt). $EAGLERAY_XLLAMACPP names its folder, if it is not installed. Each
side is a process of its own that keeps its model loaded and has been warmed up. The sides take turns, with the same GGUF
file, threads, slots and batch sizes, and the same questions of GSM8K. Each turn has questions that no turn had before, so
that neither side finds them in a cache. The file is the packaged model in Q4_1. The server computes it as it is; the engine
converts it to f16 when it is first used, as it does by default. In the cases `f16` and `q4_1` both compute in this format.
The server is called in its process, without HTTP: a thread for each request.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.llamacpp import questions

# The answers are short, and have room for `_JSON_TOKENS`: one that is cut is an error.
_JSON_TOKENS = 320
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": -100000, "maximum": 100000},
        "unit": {"type": "string", "maxLength": 12},
        "reason": {"type": "string", "maxLength": 80},
    },
    "required": ["answer", "unit", "reason"],
    "additionalProperties": False,
}
SYSTEM = " ".join(
    f"Rule {i}: read the question twice, write each step on a line of its own, name the unit of each number, and never "
    f"give more than {i + 2} steps for a question of kind {i}."
    for i in range(1, 17)
)
# Slots, generation, system prompt.
CASES: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "greedy": (16, {}, None),
    "f16": (16, {}, None),
    "q4_1": (16, {}, None),
    "json": (16, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, None),
    "system": (16, {}, SYSTEM),
    "slots64": (64, {}, None),
}
CONTEXT, BATCH = 1024, 512


def _conversations(case: str, asked: list[str]) -> list[list[dict[str, str]]]:
    system = CASES[case][2]
    first = [{"role": "system", "content": system}] if system else []
    return [[*first, {"role": "user", "content": question}] for question in asked]


Side = Callable[[str, list[str], int], list[int]]  # case, questions, tokens: tokens of each answer


def _ours(model: str, slots: int, threads: int) -> Side:
    from engines.local.llamacpp import LlamaCppEngine

    kwargs = {"n_ctx": CONTEXT, "n_batch": BATCH, "n_seq_max": slots, "n_threads": threads, "n_threads_batch": threads}
    engine = LlamaCppEngine(model=model, kwargs=kwargs)

    def answer(case: str, asked: list[str], tokens: int) -> list[int]:
        rows = [{"messages": messages} for messages in _conversations(case, asked)]
        done = engine.infer(rows, {"max_tokens": tokens, "temperature": 0, **CASES[case][1]})
        failed = [each.error for each in done if each.error]
        if failed:
            raise RuntimeError(f"{len(failed)} rows failed: {failed[0]}")
        return [each.usage.output for each in done]

    return answer


def installed() -> bool:
    return bool(os.environ.get("EAGLERAY_XLLAMACPP")) or importlib.util.find_spec("xllamacpp") is not None


def _theirs(model: str, slots: int, threads: int) -> Side:
    if folder := os.environ.get("EAGLERAY_XLLAMACPP"):
        sys.path.append(folder)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_parallel = CONTEXT * slots, BATCH, BATCH, slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    if flash := os.environ.get("EAGLERAY_XLLAMACPP_FLASH"):  # "0" is off; the server's default is automatic
        params.flash_attn_type = getattr(
            xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{'DISABLED' if flash == '0' else 'ENABLED'}"
        )
    params.verbosity = -1
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(256)

    def answer(case: str, asked: list[str], tokens: int) -> list[int]:
        def one(messages: list[dict[str, str]]) -> int:
            done = server.handle_chat_completions(
                {"messages": messages, "max_tokens": tokens, "temperature": 0, **CASES[case][1]}
            )
            return int(done["usage"]["completion_tokens"])

        return list(pool.map(one, _conversations(case, asked)))

    return answer


def _serve(side: str, model: str, slots: int, threads: int) -> None:
    """The process of one side: reads requests as JSON lines, writes tokens and seconds."""
    answer = (_ours if side == "ours" else _theirs)(model, slots, threads)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print does not mix with the answers
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        began, used = time.perf_counter(), time.process_time()
        made = answer(given["case"], given["asked"], given["tokens"])
        found = {"tokens": sum(made), "s": time.perf_counter() - began, "cpu_s": time.process_time() - used}
        print(json.dumps(found), file=out, flush=True)


class _Process:
    def __init__(self, side: str, model: str, slots: int, threads: int) -> None:
        command = [sys.executable, "-m", "bench.llamacpp_server", side, model, str(slots), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[3]} ended with status {self.process.wait()}")  # type: ignore[index]
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, case: str, asked: list[str], tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case, "asked": asked, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def run(
    data: Path | None, step: str = "", rows: int = 64, tokens: int = 128, repeats: int = 2, threads: int = 0
) -> dict[str, Any]:
    """For each case: tokens a second of both sides, and the median of the ratios of one turn each."""
    from engines.config import EngineConfig
    from engines.local.cores import physical_cores
    from engines.local.gguf_files import requantized, resolve_model

    packaged = resolve_model(EngineConfig("llamacpp"), None)
    threads = threads or physical_cores()
    asked = questions(data, rows * (repeats + 1))
    found: dict[str, Any] = {}
    for case, (slots, *_) in CASES.items():
        if step not in ("", case):
            continue
        most = _JSON_TOKENS if case == "json" else tokens
        models = {
            "ours": packaged if case == "q4_1" else requantized(packaged, "f16"),
            "server": requantized(packaged, "f16") if case == "f16" else packaged,
        }
        sides = {side: _Process(side, str(model), slots, threads) for side, model in models.items()}
        try:
            for process in sides.values():
                process.ask(case, asked[: max(slots, 16)], _JSON_TOKENS if case == "json" else 8)
            turns = [
                {side: sides[side].ask(case, asked[rows * turn :][:rows], most) for side in order}
                for turn in range(1, repeats + 1)
                for order in (("ours", "server") if turn % 2 else ("server", "ours"),)
            ]
        finally:
            for process in sides.values():
                process.close()
        settings = {"rows": rows, "max_tokens": most, "slots": slots, "threads": threads}
        found[f"server_{case}"] = one = {**_figures(turns), **settings}
        print(case, json.dumps(one), flush=True)
    return found


def _figures(turns: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    def rate(turn: dict[str, dict[str, float]], side: str, by: str = "s") -> float:
        return turn[side]["tokens"] / turn[side][by]

    ratios = [rate(turn, "ours") / rate(turn, "server") for turn in turns]
    return {
        "tokens_per_s": round(statistics.median(rate(turn, "ours") for turn in turns), 1),
        "server_tokens_per_s": round(statistics.median(rate(turn, "server") for turn in turns), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(rate(t, "ours", "cpu_s") / rate(t, "server", "cpu_s") for t in turns), 3),
        "tokens": [[turn[side]["tokens"] for side in ("ours", "server")] for turn in turns],
    }


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ("ours", "server"):
        _serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        from bench.__main__ import gsm8k

        parser = argparse.ArgumentParser()
        for name, default in (("rows", 64), ("tokens", 128), ("repeats", 2), ("threads", 0)):
            parser.add_argument(f"--{name}", type=int, default=default)
        parser.add_argument("--step", default="")
        print(json.dumps(run(gsm8k(), **vars(parser.parse_args()))))
