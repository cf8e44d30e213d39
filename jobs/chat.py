"""`eagleray chat`: a conversation with an engine in the terminal, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from typing import TYPE_CHECKING

from engines.errors import ConfigError, EngineError, no_such
from engines.tasks import CHAT
from engines.text import visible
from engines.types import Completion, Message, Request, answer
from jobs.infer import guarded, keys_help, start
from pipeline.config import Config

if TYPE_CHECKING:
    from engines.base import Engine

COMMANDS = {
    "/new": "start a new conversation with the same system prompt",
    "/system": "TEXT sets the system prompt; without TEXT, the system prompt is removed",
    "/exit": "or Ctrl-D: leave",
    "/help": "show these commands",
}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
UNSEEN = "\ufffd"  # replaces control characters


def main(argv: list[str]) -> int:
    """Chats until the input ends. Returns the exit status."""
    return start(argv, help_text, lambda config: guarded(lambda _: _run(config)))


def _run(config: Config) -> int:
    from engines.registry import load_engine

    config.check(runs=False)
    if config.task != CHAT:
        raise ConfigError(f"task={config.task}: eagleray chat has conversations only; use eagleray infer", key="task")
    for stream in (sys.stdin, sys.stdout):  # invalid characters must not end the conversation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with load_engine(config.engine) as engine:
        engine.check(config.params())
        return Chat(config, engine).run()


class Chat:
    """The conversation so far. Each line of input is a command or a user message."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.engine, self.generation = engine, config.params()
        self.system: list[Message] = []
        self.turns: list[Message] = []
        self.failed = False
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        """Reads lines until the input ends. If the input is a pipe, the exit status says whether a line failed."""
        from pipeline.run import OK, WITH_FAILURES

        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrows and history in `input`
            model = self.engine.config.model or self.engine.kind
            print(f"Chatting with {visible(model, UNSEEN)}. Ctrl-C stops an answer, /help lists the commands.")
        while True:
            try:
                line = input("> " if self.terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line == "/exit":
                break
            if line.startswith("/"):
                self.command(*line.split(maxsplit=1))
            elif line:
                self.turn(line)
        if self.terminal:
            print()
        return WITH_FAILURES if self.failed and not self.terminal else OK

    def command(self, name: str, text: str = "") -> None:
        if name == "/new":
            self.turns = []
        elif name == "/system":
            self.system = [{"role": "system", "content": text}] if text else []
        elif name == "/help":
            print("\n".join(f"{command:<9}{what}" for command, what in COMMANDS.items()))
        else:
            self.complain(no_such("command", name, COMMANDS))

    def turn(self, text: str) -> None:
        """Sends the text and prints the answer as it arrives. A failed request does not change the conversation."""
        asked: Message = {"role": "user", "content": text}
        said: list[str] = []
        try:
            completion = asyncio.run(self.ask(Request([*self.system, *self.turns, asked], self.generation), said))
        except KeyboardInterrupt:  # the part of the answer so far stays in the conversation
            print(PLAIN if self.terminal else "")
            if not said:
                return
        except EngineError as error:
            self.complain(str(error))
            return
        else:
            print()
            if completion.error is not None:
                self.complain(completion.error.message)
                return
            if completion.finish_reason == "length" and self.terminal:
                print(f"{DIM}(cut off: generation.max_tokens or the context is used up){PLAIN}")
        self.turns += [asked, answer("".join(said))]

    async def ask(self, request: Request, said: list[str]) -> Completion:
        """Streams the answer to the terminal, and appends its pieces to `said`."""
        thinking = False
        async for item in self.engine.stream(request):
            if isinstance(item, Completion):
                for call in item.tool_calls or ():
                    said.append(json.dumps(call.get("function") or call.get("custom") or call, ensure_ascii=False))
                    _print(said[-1])
                return item
            if item.index:  # of several answers, only the first joins the conversation
                continue
            if item.reasoning and self.terminal:
                _print(item.reasoning, "" if thinking else DIM)
                thinking = True
            if item.text:
                _print(item.text, f"{PLAIN}\n" if thinking else "")
                thinking = False
                said.append(item.text)
        raise AssertionError("a stream ends with a completion")

    def complain(self, reason: str) -> None:
        self.failed = True
        sys.stdout.flush()
        print(f"eagleray: {visible(' '.join(reason.split()), UNSEEN)}", file=sys.stderr, flush=True)


def _print(text: str, before: str = "") -> None:
    print(before + visible(text, UNSEEN), end="", flush=True)


def help_text() -> str:
    """The help text: the commands and the keys of the engine and of generation."""
    commands = (f"  {command:<9}{what}" for command, what in COMMANDS.items())
    lines = [
        "Talk to an engine in the terminal. If the input is a pipe, each line is one user message.",
        "",
        "  eagleray chat engine=ENGINE [group=option …] [key=value …]",
        "",
        "In the conversation (Ctrl-C stops an answer):",
        *commands,
        "",
        *keys_help(("engine", "generation")),
        "",
        "Exit status: 0; 3 if a line of a pipe got no answer; 2 wrong configuration.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
