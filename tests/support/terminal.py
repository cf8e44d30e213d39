"""A command on a pseudo terminal: what a person types, and what the screen shows."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path

import pyte

from tests.support.processes import PATIENCE_S

ROOT = Path(__file__).parents[2]
ENDED = "<the end>"


class Terminal:
    """`python -m ARGV`, or the program `ARGV` if it is an absolute path. `screen` is the state of the terminal; `shown` is
    all output so far, with `ENDED` at its end."""

    def __init__(self, *argv: str, columns: int = 100, term: str = "xterm-256color") -> None:
        self.screen = pyte.Screen(columns, 30)
        self.stream = pyte.ByteStream(self.screen)
        self.shown = ""
        self.seen = 0  # `said` searches after this
        self.status: int | None = None
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
            ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
            os.chdir(ROOT)
            environment = {**os.environ, "TERM": term, "PYTHONPATH": str(ROOT)}
            environment.pop("COLUMNS", None)  # pytest-xdist's, which would count for more than the terminal's own width
            command = argv if argv[0].startswith("/") else (sys.executable, "-m", *argv)
            os.execve(command[0], command, environment)

    @property
    def text(self) -> str:
        """The screen's lines."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, true: Callable[[str], bool], press: str = "") -> str:
        """Reads until `true(text)`, and returns the text of the screen. `press` is typed each second, as a person does who
        sees no effect: `input` does not hear control characters between its prompt and its reading."""
        deadline, again = time.monotonic() + PATIENCE_S, 0.0
        while not true(self.text):
            assert time.monotonic() < deadline and not self.shown.endswith(ENDED), repr(self.shown)
            if press and time.monotonic() >= again:
                again = time.monotonic() + 1
                self.type(press)
            self._read()
        return self.text

    def said(self, pattern: str, press: str = "") -> str:
        """Reads until the pattern is in the output that was not returned yet, and returns this output."""
        found: list[re.Match[str]] = []

        def search(_: str) -> bool:
            found[:] = re.compile(pattern).finditer(self.shown, self.seen)
            return bool(found)

        self.until(search, press)
        new, self.seen = self.shown[self.seen : found[0].end()], found[0].end()
        return new

    def end(self, press: str = "") -> int:
        """Reads to the end, and returns the exit status."""
        self.until(lambda _: self.shown.endswith(ENDED), press)
        return self._wait()

    def close(self) -> None:
        """Kills the command if it still runs."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._wait()
        os.close(self.fd)

    def _wait(self) -> int:
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def _read(self) -> None:
        if not select.select([self.fd], [], [], 0.1)[0]:
            return
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # how Linux reports the end
            data = b""
        self.stream.feed(data)
        self.shown += data.decode(errors="replace") or ENDED
