"""`eagleray chat`: a conversation with any engine in the terminal, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from typing import TYPE_CHECKING

from engines.errors import EngineError, nearest
from engines.text import visible
from engines.types import Completion, Message, Request, answer
from jobs.infer import guarded, keys_help, start
from pipeline.config import Config

if TYPE_CHECKING:
    from engines.base import Engine

COMMANDS = {
    "/new": "start over, with the same system prompt",
    "/system": "TEXT sets the system prompt; without a text there is none",
    "/exit": "or Ctrl-D: leave",
    "/help": "these lines",
}
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
UNSEEN = "\ufffd"  # stands for what would command the terminal


def main(argv: list[str]) -> int:
    """Chats until the input ends; returns the exit status."""
    return start(argv, help_text, lambda config: guarded(lambda _: _run(config)))


def _run(config: Config) -> int:
    from engines.registry import load_engine

    config.check(runs=False)
    for stream in (sys.stdin, sys.stdout):  # whatever they hold or cannot hold ends no conversation
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with load_engine(config.engine) as engine:
        engine.check(config.params())
        return Chat(config, engine).run()


class Chat:
    """The conversation so far, and what is done with each line."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.engine, self.generation = engine, config.params()
        self.system: list[Message] = []
        self.turns: list[Message] = []
        self.failed = False
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> int:
        """Until the input ends. Of a pipe, whose lines nobody watches, the status tells whether one failed."""
        from pipeline.run import OK, WITH_FAILURES

        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # arrows and history in `input`
            model = self.engine.config.model or self.engine.kind
            print(f"Chatting with {visible(model, UNSEEN)}. Ctrl-C stops an answer, /help lists what else there is.")
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
            self.complain(f"there is no command '{name}'{nearest(name, COMMANDS)}")

    def turn(self, text: str) -> None:
        """Asks, and shows the answer as it comes. One that failed leaves the conversation as it was before."""
        asked: Message = {"role": "user", "content": text}
        said: list[str] = []
        try:
            completion = asyncio.run(self.ask(Request([*self.system, *self.turns, asked], self.generation), said))
        except KeyboardInterrupt:  # what was said until then stands
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
                print(f"{DIM}(cut off: generation.max_tokens, or the context, ends here){PLAIN}")
        self.turns += [asked, answer("".join(said))]

    async def ask(self, request: Request, said: list[str]) -> Completion:
        """Prints the answer into the terminal and into `said`."""
        thinking = False
        async for item in self.engine.stream(request):
            if isinstance(item, Completion):
                for call in item.tool_calls or ():
                    said.append(json.dumps(call["function"], ensure_ascii=False))
                    _print(said[-1])
                return item
            if item.index:  # of several answers the first is the conversation's
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
    """The commands, and the keys that matter here."""
    commands = (f"  {command:<9}{what}" for command, what in COMMANDS.items())
    lines = [
        "Talk to an engine in the terminal; a pipe works too, one line a turn.",
        "",
        "  eagleray chat engine=ENGINE [group=option …] [key=value …]",
        "",
        "In the conversation (Ctrl-C stops an answer):",
        *commands,
        "",
        *keys_help(("engine", "generation")),
        "",
        "Exit status: 0; 3 where a line of a pipe was not answered; 2 wrong configuration.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
