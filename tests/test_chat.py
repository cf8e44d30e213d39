"""`eagleray chat`: in a terminal, which here is a pty, and through a pipe."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.text import visible
from jobs import chat
from jobs.chat import UNSEEN
from tests.provider_server import ProviderServer

ROOT = Path(__file__).parent.parent
PATIENCE_S = 120
ENDED = "<the end>"


class Terminal:
    """A person at a terminal: types, and waits for what the screen shows."""

    def __init__(self, *args: str) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it, and hand that on
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, "-m", "jobs.chat", *args], {**os.environ, "TERM": "dumb"})
        self.shown = ""
        self.seen = 0

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, pattern: str, press: str = "") -> str:
        """What came since the last time, up to this. `press` is typed every second, as a person would who sees nothing
        happen: between its prompt and its reading, `input` does not hear control characters."""
        deadline, again = time.monotonic() + PATIENCE_S, 0.0
        while not (found := re.compile(pattern).search(self.shown, self.seen)):
            assert time.monotonic() < deadline and not self.shown.endswith(ENDED), repr(self.shown)
            if press and time.monotonic() >= again:
                again = time.monotonic() + 1
                self.type(press)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.fd, 65536).decode(errors="replace")
                except OSError:  # Linux' way of telling the end
                    self.shown += ENDED
        new, self.seen = self.shown[self.seen : found.end()], found.end()
        return new

    def end(self, press: str) -> int:
        """Its exit status."""
        self.until(ENDED, press)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal() -> Iterator[Any]:
    opened: list[Terminal] = []

    def open_one(*args: str) -> Terminal:
        opened.append(Terminal(*args))
        return opened[-1]

    yield open_one
    for one in opened:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
        os.close(one.fd)


def piped(lines: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.chat", *args], input=lines, capture_output=True, text=True, cwd=ROOT,
        timeout=PATIENCE_S, env={**os.environ, **env},
    )  # fmt: skip


def test_in_a_terminal_an_answer_streams_and_ctrl_c_stops_it_and_not_the_chat(terminal: Any) -> None:
    chat = terminal("engine=llamacpp", "engine.kwargs.n_ctx=2048", "generation.max_tokens=1500")
    chat.until("Ctrl-C stops an answer.*\\n> ")
    chat.type("Count from 1 to 1000, each number on a line of its own.\n")
    chat.until("\\d\\D+\\d\\D+\\d")  # it has begun
    chat.type("\x03")
    chat.until("\\n> $")
    chat.type("/nwe\n")
    chat.until("there is no command '/nwe' \\(did you mean '/new'\\?\\)")
    chat.type("/new\n")
    chat.until("> $")
    chat.type("What is the capital of France?\n")
    assert "Paris" in chat.until("Paris[^>]*> $")
    chat.until("Ctrl-D leaves", press="\x03")
    assert chat.end(press="\x04") == 0


@pytest.fixture
def server() -> Iterator[ProviderServer]:
    with ProviderServer() as running:
        yield running


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
    assert chat.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "/system" in text and "generation.temperature" in text
    assert "dataset.path" not in text
