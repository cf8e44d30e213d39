"""`eagleray chat`: in a terminal, which here is a pty, and through a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.text import visible
from jobs import chat
from jobs.chat import UNSEEN
from tests.support.processes import PATIENCE_S
from tests.support.provider_server import ProviderServer
from tests.support.terminal import Terminal

ROOT = Path(__file__).parent.parent


@pytest.fixture
def terminal() -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_one(*args: str) -> Terminal:
        opened.append(Terminal("jobs.chat", *args, term="dumb"))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def piped(lines: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.chat", *args], input=lines, capture_output=True, text=True, cwd=ROOT,
        timeout=PATIENCE_S, env={**os.environ, **env},
    )  # fmt: skip


def test_in_a_terminal_an_answer_streams_and_ctrl_c_stops_it_and_not_the_chat(terminal: Any) -> None:
    chat = terminal("engine=llamacpp", "engine.kwargs.n_ctx=2048", "generation.max_tokens=1500")
    chat.said("Ctrl-C stops an answer.*\\n> ")
    chat.type("Count from 1 to 1000, each number on a line of its own.\n")
    chat.said("\\d\\D+\\d\\D+\\d")  # it has begun
    chat.type("\x03")
    chat.said("\\n> $")
    chat.type("/nwe\n")
    chat.said("there is no command '/nwe' \\(did you mean '/new'\\?\\)")
    chat.type("/new\n")
    chat.said("> $")
    chat.type("What is the capital of France?\n")
    assert "Paris" in chat.said("Paris[^>]*> $")
    chat.said("Ctrl-D leaves", press="\x03")
    assert chat.end(press="\x04") == 0


def remote(server: ProviderServer, *more: str) -> list[str]:
    return ["engine=openai_compatible", "engine.model=m", f"engine.base_url={server.url}", *more]


def test_a_pipe_is_a_conversation_of_a_turn_a_line(server: ProviderServer) -> None:
    lines = "/system Be brief.\none\n\ntwo\n/new\nthree\n/system\nfour\n/exit\nnever\n"
    done = piped(lines, *remote(server, "generation.temperature=0.5"))
    assert (done.stdout, done.stderr, done.returncode) == ("one\ntwo\nthree\nfour\n", "", 0)
    asked = [[(m["role"], m["content"]) for m in seen.body["messages"]] for seen in server.requests]
    system, one, three = ("system", "Be brief."), [("user", "one"), ("assistant", "one")], [("user", "three")]
    assert asked == [
        [system, one[0]], [system, *one, ("user", "two")], [system, *three],
        [*three, ("assistant", "three"), ("user", "four")],
    ]  # fmt: skip
    assert {seen.body["temperature"] for seen in server.requests} == {0.5}


def test_an_error_is_a_line_and_the_conversation_goes_on_as_it_was(server: ProviderServer) -> None:
    server.plan["bad"] = ["say=400=no \x1b[31mred\x1b[0m today"]
    server.plan["a b c d e f g h"] = ["break"]
    done = piped("one\nbad\na b c d e f g h\ntwo\n", *remote(server))
    assert done.returncode == 3
    first, second = done.stderr.splitlines()
    assert first == "eagleray: HTTP 400: no \ufffd[31mred\ufffd[0m today"
    assert second.startswith("eagleray: ")
    assert [m["content"] for m in server.requests[-1].body["messages"]] == ["one", "one", "two"]
    assert done.stdout.endswith("\ntwo\n")


def test_what_a_model_says_cannot_command_the_terminal(server: ProviderServer) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eabc"
    done = piped(f"{evil} 日本\u3000語 👩\u200d💻\n", *remote(server))
    assert done.stdout == "\ufffd]0;owned\ufffd\ufffd[2J\ufffd31m\ufffdabc 日本\u3000語 👩\u200d💻\n"
    assert visible("a\r\nb\tc\x00\x7f", UNSEEN) == "a\nb\tc\ufffd\ufffd"


def test_bytes_that_are_no_text_end_no_conversation(server: ProviderServer) -> None:
    command = [sys.executable, "-m", "jobs.chat", *remote(server)]
    done = subprocess.run(command, input=b"a\xff\nb\n", capture_output=True, cwd=ROOT, timeout=PATIENCE_S)
    assert (done.stdout.decode(), done.returncode) == ("a\ufffd\nb\n", 0)


def test_what_cannot_be_loaded_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(["engine=llamacpp", "engine.model=nowhere.gguf"]) == 2
    assert capsys.readouterr().err.startswith("eagleray: ")
    assert chat.main(["engine=echo", "task=embed"]) == 2
    assert "task=embed: eagleray chat has conversations only" in capsys.readouterr().err
    assert chat.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "/system" in text and "generation.temperature" in text
    assert "dataset.path" not in text
