"""`eagleray serve` as its clients meet it: OpenAI's own SDK, plain HTTP, and a batch run of ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engines.config import EngineConfig
from jobs import serve
from pipeline.executors.live.placement import placement, serve_options
from pipeline.hardware import HardwareConfig
from tests.support import sglang_server
from tests.support.endpoint import KEY, Endpoint, start
from tests.support.infer import Infer, ask
from tests.support.processes import PATIENCE_S, family, until

openai = pytest.importorskip("openai")
pytest.importorskip(
    "ray.serve", reason="Ray Serve is not installed here: pip install 'eagleray[serve]'", exc_type=ImportError
)

ROOT = Path(__file__).parent.parent
CAPITAL: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    limits = ["engine.kwargs.n_ctx=512", "engine.kwargs.n_seq_max=4", "generation.max_tokens=24"]
    running = start(tmp_path_factory.mktemp("llama"), *limits, "serve.api_key_env=MY_KEY", MY_KEY=KEY)
    yield running
    running.stop()


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Endpoint]]:
    """`start`, for one endpoint, which ends with the test."""
    running: list[Endpoint] = []

    def begin(*args: str, **env: str) -> Endpoint:
        running.append(start(tmp_path, *args, **env))
        return running[0]

    yield begin
    for endpoint in running:
        endpoint.stop()


@contextlib.contextmanager
def load(ask_it: Callable[[], Any], clients: int = 8) -> Iterator[list[Any]]:
    """Asks all the time, by so many clients; the answers and exceptions so far, all of them at the end."""
    answers: list[Any] = []
    over = threading.Event()

    def ask_on() -> None:
        while not over.is_set():
            try:
                answers.append(ask_it())
            except Exception as error:
                answers.append(error)

    threads = [threading.Thread(target=ask_on) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_a_chat_has_text_usage_and_the_runs_defaults(llama: Endpoint) -> None:
    answer = llama.client().chat.completions.create(model="smollm2", messages=CAPITAL)
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    answer = llama.client().chat.completions.create(
        model="smollm2", messages=CAPITAL, max_completion_tokens=3, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert [len(choice.logprobs.content) for choice in answer.choices] == [3, 3]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_stream_comes_token_by_token_and_says_the_same(llama: Endpoint) -> None:
    asked = {"model": "smollm2", "messages": CAPITAL, "logprobs": True}
    whole = llama.client().chat.completions.create(**asked)
    chunks = list(llama.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 6
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    entries = [entry for chunk in chunks if chunk.choices and chunk.choices[0].logprobs
               for entry in chunk.choices[0].logprobs.content]  # fmt: skip
    assert len(entries) == len(whole.choices[0].logprobs.content)


def test_an_answer_keeps_to_a_schema_also_in_a_stream(llama: Endpoint) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2, 3]}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}}}
    asked = {"model": "smollm2", "messages": CAPITAL, "response_format": form}
    answer = llama.client().chat.completions.create(**asked)
    assert isinstance(json.loads(answer.choices[0].message.content)["n"], int)
    with llama.client().chat.completions.stream(**asked) as stream:
        assert json.loads(stream.get_final_completion().choices[0].message.content).keys() == {"n"}


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_is_called(llama: Endpoint, streams: bool) -> None:
    tool = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    call = 'root ::= "<tool_call>{\\"name\\": \\"time\\", \\"arguments\\": {}}</tool_call>"'
    asked = {"model": "smollm2", "messages": CAPITAL, "tools": [tool], "max_tokens": 99,
             "extra_body": {"response_format": {"type": "grammar", "grammar": call}}}  # fmt: skip
    if streams:
        with llama.client().chat.completions.stream(**asked) as stream:
            choice = stream.get_final_completion().choices[0]
    else:
        choice = llama.client().chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [("time", "{}")]


def test_models_and_health(llama: Endpoint) -> None:
    assert [model.id for model in llama.client().models.list().data] == ["smollm2"]
    assert llama.client().models.retrieve("smollm2").owned_by == "eagleray"
    assert httpx.get(f"{llama.url}/health").json() == {"status": "ok"}


def test_what_is_wrong_has_openais_errors(llama: Endpoint) -> None:
    ask_it = llama.client().chat.completions.create
    with pytest.raises(openai.AuthenticationError, match="needs its API key"):
        llama.client(key="wrong").chat.completions.create(model="smollm2", messages=CAPITAL)
    with pytest.raises(openai.NotFoundError, match="'gpt-9' does not exist; this endpoint serves 'smollm2'"):
        ask_it(model="gpt-9", messages=CAPITAL)
    with pytest.raises(openai.BadRequestError, match="temperature must be a number") as bad:
        ask_it(model="smollm2", messages=CAPITAL, temperature=-1)
    assert (bad.value.type, bad.value.code) == ("invalid_request_error", "invalid_input")
    for streams in (False, True):  # what fails before the first piece has its status in a stream as well
        with pytest.raises(openai.BadRequestError, match="the context holds 512") as long:
            ask_it(model="smollm2", messages=[{"role": "user", "content": "word " * 600}], stream=streams)
        assert long.value.code == "context_length_exceeded"
    image = [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]
    with pytest.raises(openai.BadRequestError, match="the image must be at an http"):
        ask_it(model="smollm2", messages=[{"role": "user", "content": image}])
    with pytest.raises(openai.BadRequestError, match="adapter: a request cannot choose it"):
        ask_it(model="smollm2", messages=CAPITAL, extra_body={"adapter": "/etc"})
    with pytest.raises(openai.BadRequestError, match=r"n may be at most 16 \(serve.max_n\)"):
        ask_it(model="smollm2", messages=CAPITAL, n=10**6)
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{llama.url}/v1/chat/completions"
    for content, said in ((b"{", "invalid JSON"), (b"[]", "must be a JSON object"), (b"{}", "no messages")):
        reply = httpx.post(url, content=content, headers=headers)
        assert reply.status_code == 400
        assert said in reply.json()["error"]["message"]
    assert httpx.get(url, headers=headers).status_code == 405
    assert httpx.get(f"{llama.url}/v1/elsewhere", headers=headers).status_code == 404


def test_the_printed_example_works_and_names_the_key(llama: Endpoint) -> None:
    assert "$MY_KEY" in llama.printed
    done = subprocess.run(["bash", "-c", llama.printed], env={**os.environ, "MY_KEY": KEY}, capture_output=True, check=True)
    assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_a_batch_run_pointed_at_it_finishes_all_rows(
    llama: Endpoint, infer: Infer, write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    data = write_jsonl([ask(f"What is {i} plus {i}?", id=str(i)) for i in range(24)])
    outcome = infer(
        data, "engine.model=smollm2", f"engine.base_url={llama.url}", "engine.api_key_env=MY_KEY",
        "generation.max_tokens=4", engine="openai_compatible",
    )  # fmt: skip
    assert outcome.exit_status == 0
    assert all(row["response"] and row["usage"]["output"] for row in infer.rows())


@pytest.mark.slow
def test_sigterm_answers_what_is_under_way_and_leaves_nothing(tmp_path: Path) -> None:
    running = start(tmp_path, "engine=echo", "engine.kwargs.latency_s=20", "hardware.replicas={min: 1, max: 2}")
    processes = [psutil.Process(running.process.pid), *family(running.process.pid)]
    assert len(processes) > 4
    slow = subprocess.Popen(["bash", "-c", "exec " + running.printed], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    until(lambda: any(line.status == "ESTABLISHED" for line in psutil.Process(slow.pid).net_connections()))
    time.sleep(5)  # from the connection to the replica
    assert slow.poll() is None
    running.process.send_signal(signal.SIGTERM)
    (answered,) = json.loads(slow.communicate(timeout=PATIENCE_S)[0])["choices"]
    assert answered["message"]["content"] == CAPITAL[0]["content"]
    assert running.process.wait(PATIENCE_S) == 0
    printed = (tmp_path / "serve.log").read_text().splitlines()
    assert len(printed) == 3, printed
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


SLOW = ("engine=echo", "engine.kwargs.latency_s=1", "engine.max_concurrency=4")
FAILED, WORK = "A replica failed; Ray Serve starts another.", "All replicas work."


def has_answered(replica: psutil.Process) -> bool:
    """By its own log of requests."""
    with contextlib.suppress(psutil.NoSuchProcess):
        logs = [Path(file.path) for file in replica.open_files() if "/serve/replica_" in file.path]
        return any(" POST / 200 " in log.read_text() for log in logs)
    return False


@pytest.mark.slow
def test_under_load_a_second_replica_comes_and_both_answer(serving: Callable[..., Endpoint]) -> None:
    running = serving(*SLOW, "hardware.replicas={min: 1, max: 2}")
    assert len(running.replicas()) == 1
    with load(running.post) as answers:
        running.until(lambda: len(found := running.replicas()) == 2 and all(map(has_answered, found)))
    assert {str(answer) for answer in answers} == {"<Response [200 OK]>"}
    assert running.news() == []


@pytest.mark.slow
def test_replicas_that_are_killed_are_replaced_and_clients_that_retry_notice_nothing(
    serving: Callable[..., Endpoint],
) -> None:
    running = serving(*SLOW, "hardware.replicas=2")
    client = running.client(retries=2)  # OpenAI's default
    with (
        load(lambda: client.chat.completions.create(model="echo", messages=CAPITAL), 4) as patient,
        load(running.post, 4) as plain,
    ):
        for deaths in (1, 2):  # one, where the other goes on; then all there are
            running.until(lambda: all(map(has_answered, running.replicas())))
            dead = running.replicas()[:deaths]
            for replica in dead:
                replica.kill()
            running.until(lambda: running.news() == [FAILED, WORK] * deaths)  # noqa: B023
            assert len(running.replicas()) == 2
            assert not {*dead} & {*running.replicas()}
    assert {answer.choices[0].message.content for answer in patient} == {CAPITAL[0]["content"]}
    lost = [reply for reply in plain if str(reply) != "<Response [200 OK]>"]
    assert {(reply.status_code, reply.json()["error"]["code"]) for reply in lost} <= {(503, "engine_crash")}
    assert len(lost) <= 4 * 3  # each client one per death


@pytest.mark.slow
def test_an_engine_that_dies_in_its_replica_is_replaced(serving: Callable[..., Endpoint], tmp_path: Path) -> None:
    sglang_server.install(tmp_path)
    running = serving(
        "engine=sglang_offline", "engine.model=some/model", "hardware.gpus=0", "hardware.replicas=1",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
    )  # fmt: skip
    [replica] = running.replicas()
    assert running.post().status_code == 200
    assert running.post("die").status_code == 503
    with load(running.post, 1) as answers:
        running.until(lambda: running.news() == [FAILED, WORK])
    for answer in answers:
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "engine_crash")
            assert error["message"] == "SGLang died: RuntimeError: out of memory"
    assert running.post().status_code == 200
    running.until(lambda: replica not in running.replicas())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "said"),
    [(["engine.model=nowhere.gguf"], "nowhere.gguf"),
     (["serve.api_key_env=NOT_THERE"], "serve.api_key_env=NOT_THERE: there is no such environment variable"),
     (["serve.prt=1"], "did you mean 'serve.port'?"), (["serve.port=70000"], "between 0 and 65535")],
)  # fmt: skip
def test_what_cannot_be_served_is_said_in_a_line(
    args: list[str], said: str, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["serve.port=0", *args]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_help_tells_the_endpoints_keys_and_no_datasets(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("serve.host", "serve.port", "serve.api_key_env", "run.drain_s", "hardware.replicas"):
        assert f"  {name}" in text
    assert "dataset.path" not in text


def test_a_replica_is_placed_as_in_a_run() -> None:
    tensor = EngineConfig("vllm", kwargs={"tensor_parallel_size": 2})
    hardware = HardwareConfig(gpus=None, gpus_per_node=8, memory=1, label_selector={"gpu": "h100"})
    one = serve_options(placement(hardware, tensor))
    actor = {"num_cpus": 0, "num_gpus": 2, "memory": 2**30, "label_selector": {"gpu": "h100"}}
    assert one == {"ray_actor_options": actor}
    over = EngineConfig("vllm", kwargs={"tensor_parallel_size": 8, "pipeline_parallel_size": 2})
    many = serve_options(placement(hardware, over))
    assert len(many["placement_group_bundles"]) == 16
    assert many["placement_group_bundle_label_selector"] == [{"gpu": "h100"}] * 16
    assert many["ray_actor_options"] == {"num_cpus": 0, "memory": 2**30}
