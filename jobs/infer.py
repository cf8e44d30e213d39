"""`eagleray infer`: the main job. Also the parts that all jobs share: flags, error lines and the help on keys."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from engines.errors import ConfigError, EngineError, ErrorCode
from jobs.compose import as_yaml, compose, options
from jobs.compose_errors import GROUPS, SECTIONS
from jobs.guide import see
from pipeline.config import Config, without_typed_secret

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: list[str]) -> int:
    """Runs the main job. Returns the exit status."""
    return start(argv, help_text, lambda config: guarded(lambda console: finish(config, console), command("infer", argv)))


def command(job: str, argv: list[str]) -> str:
    """The command line of a job, to run again. Secrets in it are replaced by `***`."""
    return shlex.join(["eagleray", job, *map(without_typed_secret, argv)])


def changed(command: str, keys: Mapping[str, str]) -> str:
    """The command with these keys set to these values."""
    words = [word for word in shlex.split(command) if word.lstrip("+").partition("=")[0] not in keys]
    return shlex.join([*words, *(f"{name}={value}" for name, value in keys.items())]) if keys else command


def start(argv: list[str], help_text: Callable[[], str], run: Callable[[Config], int]) -> int:
    """Handles the flags, composes the configuration and calls `run`. A `ConfigError` is printed as one line."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    try:
        argv, config_dir = _take(argv, "--config-dir")
        argv, cfg = _take(argv, "--cfg")
        if cfg is not None and cfg != "job":
            raise ConfigError(f"--cfg {cfg} is not known; --cfg job prints the configuration")
        config = compose(argv, config_dir)
        if cfg is not None:
            print(as_yaml(config), end="")
            return 0
        return run(config)
    except ConfigError as error:
        text = " ".join(str(error).split())
        print(f"eagleray: {text} {see(error)}", file=sys.stderr)
        return 2


def finish(config: Config, console: Console, step: str = "") -> int:
    """Runs the main job and prints its result. Returns the exit status."""
    from pipeline.run import run

    outcome = run(config, console, step)
    if outcome.manifest:
        from jobs.outcome import show_outcome

        show_outcome(outcome.manifest, str(config.output.path), console)
    return outcome.exit_status


def guarded(work: Callable[[Console], int], again: str = "") -> int:
    """Runs `work`. If something stops it, prints the reason in one line, and the command `again` that continues."""
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    from pipeline.errors import Interrupted, Stopped
    from pipeline.run import BUG, STOPPED
    from pipeline.signals import INTERRUPTED

    _check_clash()
    console = Console(stderr=True)

    def go_on(status: int, changes: Mapping[str, str] | None = None) -> int:
        if again:  # the last line, not wrapped: users copy it
            console.print(Text(f"To go on: {changed(again, changes or {})}"), soft_wrap=True)
        return status

    try:
        return work(console)
    except EngineError as error:  # a provider refused a step of `eagleray batch`
        console.print(f"[red]Stopped:[/] {escape(str(error))} {see(error)}", highlight=False)
        return STOPPED
    except Stopped as stop:
        console.print(f"[red]Stopped:[/] {escape(str(stop))} {see(stop)}", highlight=False)
        return go_on(STOPPED, stop.changes)
    except Interrupted as interrupt:
        console.print(f"[yellow]{interrupt}[/]", highlight=False)
        return go_on(INTERRUPTED)
    except KeyboardInterrupt:  # before Ray started: no request was sent
        console.print("[yellow]interrupted[/]")
        return go_on(INTERRUPTED)
    except ConfigError:
        raise
    except Exception as error:
        path = _log_traceback()
        console.print(f"[red]This is a bug in Eagleray.[/] The traceback is in {path}.", highlight=False)
        messages = [*traceback.format_exception_only(error)[:1], *getattr(error, "__notes__", ())]  # for example Ray's logs
        console.print("\n".join(line.strip() for line in messages), markup=False, highlight=False)
        return BUG


def _check_clash() -> None:
    """Raises `ConfigError` if another distribution has a package with one of our names: their files would be mixed."""
    from importlib.metadata import packages_distributions

    installed = packages_distributions()
    for name in ("engines", "pipeline", "jobs", "conf"):
        for other in set(installed.get(name, ())) - {"eagleray"}:
            text = f"'{other}' also installs a package '{name}': run pip uninstall {other}"
            raise ConfigError(text, code=ErrorCode.PACKAGE_CLASH)


def _log_traceback() -> str:
    handle, path = tempfile.mkstemp(prefix="eagleray-", suffix=".log")
    with os.fdopen(handle, "w") as file:
        file.write(traceback.format_exc())
    logging.getLogger("eagleray").debug("traceback in %s", path)
    return path


def _take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """The arguments without `--flag value` or `--flag=value`, and the value."""
    for at, arg in enumerate(argv):
        if arg == flag:
            if at + 1 == len(argv):
                raise ConfigError(f"{flag} needs a value")
            return argv[:at] + argv[at + 2 :], argv[at + 1]
        if arg.startswith(f"{flag}="):
            return argv[:at] + argv[at + 1 :], arg[len(flag) + 1 :]
    return argv, None


def help_text() -> str:
    """The help text: each group with its options, each key with its default and description."""
    lines = [
        "Send every conversation of a dataset to a model. output.path gets each result once, in input order.",
        "",
        "  eagleray infer dataset.path=IN output.path=OUT [group=option …] [key=value …]",
        "",
        *keys_help(SECTIONS),
        "",
        "Flags: --cfg job only prints the configuration; --config-dir DIR adds your own engine/, dataset/, … files.",
        "Exit status: 0 all rows done, 3 finished with failed rows, 4 stopped early, 2 wrong configuration,",
        "130 interrupted. After 4 and 130, run the same command again to continue.",
    ]
    return "\n".join(lines)


def keys_help(sections: Collection[str], more: Collection[str] = ()) -> list[str]:
    """Lines of help: the groups and keys of these sections, and the keys in `more`."""
    from pipeline.config import known_keys

    lines = [
        "Groups:",
        *(
            textwrap.fill(f"{group}={' | '.join(options(group))}", 110, initial_indent="  ", subsequent_indent="    ")
            for group in GROUPS
            if group in sections and len(options(group)) > 1
        ),
        "",
        "Keys:",
    ]
    for name, item in known_keys().items():
        if name != "engine.kind" and (name.partition(".")[0] in sections or name in more):
            default = item.default if item.default_factory is not item.default else None
            shown = "" if default is None or not isinstance(default, (str, int, float, bool)) else f" [{default}]"
            lines.append(f"  {name:<34}{item.metadata.get('help', '')}{shown}".rstrip())
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
