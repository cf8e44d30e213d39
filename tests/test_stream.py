"""Answers as they are made: the pieces add up to what `generate` gives, and what was seen is never asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

import engines.remote.sender
from engines import load_engine
from engines.base import Engine
from engines.errors import EngineError
from engines.params import GenerationParams
from engines.remote import anthropic_messages, openai_chat
from engines.remote.sse import SSEParser
from engines.text import safe_prefix_length
from engines.types import Delta, to_request
from tests.support.infer import ask
from tests.support.processes import PATIENCE_S
from tests.support.provider_server import ProviderServer
from tests.support.streams import joined, streamed

STORY = "Tell me a story about a fox."
TEXT = "one two three four five sechs 七 8"


@pytest.mark.parametrize(
    ("text", "marks", "end"),
    [("abc", [], 3), ("abc", ["x"], 3), ("abc", ["cd"], 2), ("abc", ["bcx", "cd"], 1), ("abc", ["b"], 1), ("", ["a"], 0),
     ("aaab", ["aab!"], 1), ("a<tool", ["<tool_call>"], 1)],
)  # fmt: skip
def test_what_may_become_a_stop_text_is_held_back(text: str, marks: list[str], end: int) -> None:
    assert safe_prefix_length(text, marks) == end


# -- llama.cpp ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Iterator[Engine]:
    with load_engine("llamacpp", kwargs={"n_ctx": 512, "n_seq_max": 4}) as engine:
        yield engine


def test_a_local_engine_says_each_token_as_it_comes(llama: Engine) -> None:
    pieces, completion = streamed(llama, STORY, max_tokens=24)
    (whole,) = llama.infer([ask(STORY)], {"max_tokens": 24})
    assert joined(pieces) == completion.text == whole.text
    assert (completion.usage.output, completion.finish_reason) == (24, "length")
    assert len(pieces) > 12


def test_a_stop_text_never_shows_and_characters_come_whole(llama: Engine) -> None:
    (whole,) = llama.infer([ask(STORY)], {"max_tokens": 24})
    stop = (whole.text or "")[20:34]
    pieces, completion = streamed(llama, STORY, max_tokens=24, stop=[stop])
    assert joined(pieces) == completion.text == (whole.text or "").partition(stop)[0]
    assert len(pieces) > 2
    pieces, completion = streamed(llama, "Repeat: 😀😃日本", max_tokens=40)
    assert joined(pieces) == completion.text
    assert "\ufffd" not in "".join(piece.text for piece in pieces[:-1])


def test_several_answers_stream_beside_each_other(llama: Engine) -> None:
    pieces, completion = streamed(llama, STORY, max_tokens=12, n=2, temperature=1.0, seed=1)
    texts = [choice.message["content"] for choice in completion.choices]
    assert [joined(pieces, 0), joined(pieces, 1)] == texts
    assert texts[0] != texts[1]
    order = [piece.index for piece in pieces]
    assert order != sorted(order)


def test_a_call_of_a_tool_comes_whole_at_the_end(llama: Engine) -> None:
    grammar = 'root ::= "Well. <tool_call>{\\"name\\": \\"f\\", \\"arguments\\": {}}</tool_call>"'
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    pieces, completion = streamed(llama, "x", response_format={"type": "grammar", "grammar": grammar}, tools=[tool])
    assert joined(pieces).strip() == completion.text == "Well."
    assert completion.tool_calls is not None
    assert completion.tool_calls[0]["function"] == {"name": "f", "arguments": "{}"}


def test_who_stops_reading_stops_the_engine(llama: Engine) -> None:
    async def read_a_little() -> None:
        items = llama.stream(to_request(ask(STORY), GenerationParams(max_tokens=400)))
        assert isinstance(await anext(items), Delta)
        await items.aclose()
        while any(slot.running for slot in llama.scheduler.slots):  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(read_a_little(), PATIENCE_S))


def test_refusals_and_errors_are_those_of_generate(llama: Engine) -> None:
    pieces, completion = streamed(llama, "x" * 4000)
    assert completion.error is not None
    assert (pieces, completion.error.type) == ([], "context_length")


def test_an_engine_that_cannot_stream_answers_whole() -> None:
    with load_engine("echo") as engine:
        pieces, completion = streamed(engine, TEXT)
        assert pieces == [Delta(TEXT)]
        assert completion.text == TEXT


# -- over HTTP ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProviderServer]:
    monkeypatch.setattr(engines.remote.sender, "BACKOFF_FIRST_S", 0.005)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "k")
    with ProviderServer() as running:
        yield running


@pytest.fixture(params=["openai_compatible", "anthropic"])
def remote(server: ProviderServer, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with load_engine(request.param, model="m", base_url=server.url, timeout_s=60.0) as engine:
        yield engine


def test_a_remote_answer_comes_in_the_providers_pieces(server: ProviderServer, remote: Engine) -> None:
    pieces, completion = streamed(remote, TEXT)
    (whole,) = remote.infer([ask(TEXT)])
    assert [piece.text for piece in pieces] == [word + " " for word in TEXT.split()[:-1]] + ["8"]
    assert completion.text == whole.text == TEXT
    assert (completion.usage, completion.finish_reason, completion.model) == (whole.usage, "stop", "m")
    assert completion.usage.output > 1


def test_what_fails_before_the_first_piece_is_asked_again(server: ProviderServer, remote: Engine) -> None:
    server.plan[TEXT] = ["500", "reset", "429"]
    pieces, completion = streamed(remote, TEXT)
    assert (joined(pieces), completion.attempts, completion.error) == (TEXT, 4, None)


@pytest.mark.parametrize(("fault", "type"), [("break", "connection"), ("end", "bad_response"), ("break-error", "server")])
def test_a_stream_that_breaks_is_an_error_and_not_asked_again(
    server: ProviderServer, remote: Engine, fault: str, type: str
) -> None:
    server.plan[TEXT] = [fault]
    pieces, completion = streamed(remote, TEXT)
    assert joined(pieces) == TEXT[: len(joined(pieces))] != ""
    assert completion.error is not None
    assert (completion.error.type, completion.error.retryable, completion.choices) == (type, True, [])
    assert (completion.usage.known, completion.cost_usd) == (False, None)  # tokens that nobody counted have to be paid
    assert server.attempts[TEXT] == 1


def test_a_server_that_does_not_stream_is_understood(server: ProviderServer, remote: Engine) -> None:
    server.plan[TEXT] = ["content-type"]
    pieces, completion = streamed(remote, TEXT)
    assert (pieces, completion.text) == ([Delta(TEXT)], TEXT)


def test_a_fallback_does_not_speak_after_the_first_engine_began(server: ProviderServer) -> None:
    keys = {"model": "m", "base_url": server.url, "max_retries": 0, "fallback": ["echo"]}
    with load_engine("openai_compatible", **keys) as engine:
        server.plan[TEXT] = ["break", "500"]
        pieces, completion = streamed(engine, TEXT)
        assert completion.error is not None
        assert TEXT.startswith(joined(pieces))
        pieces, completion = streamed(engine, TEXT)  # failed before it began: the other one answers
        assert (joined(pieces), completion.engine) == (TEXT, "echo")
        server.plan[TEXT] = ["filtered"]  # a provider's filter ends the answer after its words
        pieces, completion = streamed(engine, TEXT)
        assert (joined(pieces), completion.finish_reason) == (TEXT, "content_filter")
        assert completion.engine == "openai_compatible"


class Told:
    """Stands in for a stream: only what is put into it matters here."""

    def __init__(self) -> None:
        self.pieces: list[Delta] = []

    def put(self, delta: Delta) -> None:
        self.pieces.append(delta)


def test_calls_reasoning_and_log_probabilities_are_joined() -> None:
    told = Told()
    parser = SSEParser(openai_chat.ChatAccumulator(), told)  # type: ignore[arg-type]
    start = {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "Hm"}, {"reasoning_content": "m."}, {"tool_calls": [start]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}]},
    ]  # fmt: skip
    for delta in deltas:
        parser.feed(b"data: " + orjson_of({"choices": [{"index": 0, "delta": delta}]}) + b"\n\n")
    logprobs = {"content": [{"token": "x", "logprob": -1.0}]}
    for reason in (None, "tool_calls"):
        choice = {"index": 0, "delta": {}, "logprobs": logprobs, "finish_reason": reason}
        parser.feed(b"data:" + orjson_of({"choices": [choice]}) + b"\n\n")
    done = openai_chat.completion(parser.payload(), None)  # type: ignore[arg-type]
    assert [(call["id"], call["function"]["arguments"]) for call in done.tool_calls or ()] == [
        ("a", '{"x": 1}'),
        ("b", "{}"),
    ]
    assert (done.reasoning, done.finish_reason, len(done.logprobs or ())) == ("Hmm.", "tool_calls", 2)
    assert "".join(piece.reasoning for piece in told.pieces) == "Hmm."


def test_anthropics_calls_and_thoughts_are_joined() -> None:
    told = Told()
    parser = SSEParser(anthropic_messages.MessagesAccumulator(), told)  # type: ignore[arg-type]
    usage = {"input_tokens": None, "output_tokens": 9}
    found: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 7, "output_tokens": 1}}},
        {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "Hm."}},
        {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "s"}},
        {"type": "content_block_stop"},
        {"type": "content_block_start", "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": '{"x":'}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": " 1}"}},
        {"type": "content_block_stop"},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": usage},
        {"type": "message_stop"},
    ]
    for event in found:
        parser.feed(b"event: x\ndata: " + orjson_of(event) + b"\n\n")
    done = anthropic_messages.completion(parser.payload(), None)  # type: ignore[arg-type]
    assert (done.reasoning, done.text, done.finish_reason) == ("Hm.", None, "tool_calls")
    assert (done.usage.input, done.usage.output) == (7, 9)
    assert [call["function"] for call in done.tool_calls or ()] == [{"name": "f", "arguments": '{"x":1}'}]


@pytest.mark.parametrize("line", [b"data: {", b"data: []", b'data: {"choices": [1]}', b'data: {"choices": [{"delta": 1}]}'])
def test_what_is_no_event_is_a_bad_response(line: bytes) -> None:
    with pytest.raises(EngineError, match="an event cannot be read"):
        SSEParser(openai_chat.ChatAccumulator(), Told()).feed(line + b"\n")  # type: ignore[arg-type]


def orjson_of(value: Any) -> bytes:
    import orjson

    return orjson.dumps(value)


def test_a_call_with_an_absurd_number_takes_no_memory() -> None:
    joined = openai_chat.ChatAccumulator()
    piece = {"index": 4_000_000_000, "function": {"name": "x", "arguments": "{}"}}
    list(joined.add({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]}))
    (choice,) = joined.payload()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["x"]
