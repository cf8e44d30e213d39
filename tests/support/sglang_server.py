"""A server in place of `sglang.launch_server`: the same command line and paths. It answers with the flags it was given."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from aiohttp import web


def install(folder: Path) -> None:
    """A package `sglang` in this folder, for a process that has the folder in its PYTHONPATH."""
    (folder / "sglang").mkdir()
    (folder / "sglang" / "__init__.py").touch()
    shutil.copy(__file__, folder / "sglang" / "launch_server.py")


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("model-path", "host", "port", "chat-template", "tensor-parallel-size", "json-model-override-args"):
        parser.add_argument(f"--{flag}")
    parser.add_argument("--lora-paths", nargs="*")
    parser.add_argument("--enable-lora", action="store_true")
    flags = parser.parse_args()
    if flags.chat_template == "broken":
        sys.exit("Traceback\nValueError: there is no template of that name\nsee the log")
    helper = subprocess.Popen(["sleep", "1000"])  # like SGLang's scheduler

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        text = body["messages"][-1]["content"]
        if text == "die":
            print("RuntimeError: out of memory", flush=True)
            os._exit(1)
        if text == "wait":
            await asyncio.sleep(1000)
        answer = {"role": "assistant", "content": json.dumps({"body": body, "flags": vars(flags), "helper": helper.pid})}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return web.json_response({"choices": [{"index": 0, "message": answer, "finish_reason": "stop"}], "usage": usage})

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/v1/chat/completions", chat)])
    web.run_app(app, host=flags.host, port=int(flags.port), print=None)


if __name__ == "__main__":
    main()
