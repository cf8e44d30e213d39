"""`eagleray infer`: the main job. Also the parts that all jobs share: flags, error lines and the help on keys."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import ConfigError, EngineError, ErrorCode
from jobs.env_file import load
from jobs.guide import see
from pipeline.config import Config
from pipeline.configuration.compose import Composed, as_yaml, compose_all
from pipeline.configuration.errors import GROUPS, SECTIONS
from pipeline.configuration.options import options
from pipeline.configuration.run_file import RunFile, is_run_file
from pipeline.configuration.saved import DIRECTORY, HIDDEN_KEYS, REFERENCES, RUN_FILE
from pipeline.monitor.startup import first_line
from pipeline.origin import Origin

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: list[str]) -> int:
    """Runs the main job. Returns the exit status."""
    return begin_infer(argv)


def begin_infer(argv: list[str]) -> int:
    """Runs the main job, also for other jobs that end in it."""
    return begin(
        "infer",
        argv,
        help_text,
        lambda config, origin: guarded(
            lambda console: finish(config, console, origin=origin), origin.command(config.output.path)
        ),
    )


def changed(command: str, keys: Mapping[str, str]) -> str:
    """The command with these keys set to these values."""
    words = [word for word in shlex.split(command) if word.lstrip("+").partition("=")[0] not in keys]
    return shlex.join([*words, *(f"{name}={value}" for name, value in keys.items())]) if keys else command


def start(argv: list[str], help_text: Callable[[], str], run: Callable[[Config], int]) -> int:
    """As `begin`, for a job that writes no output."""
    return begin("", argv, help_text, lambda config, _: run(config))


def begin(job: str, argv: list[str], help_text: Callable[[], str], run: Callable[[Config, Origin], int]) -> int:
    """As `begin_composed`, for a job that needs the configuration alone."""
    return begin_composed(job, argv, help_text, lambda composed, origin, _: run(composed.config, origin))


def begin_composed(
    job: str, argv: list[str], help_text: Callable[[], str], run: Callable[[Composed, Origin, RunFile | None], int]
) -> int:
    """Handles the flags and the run file, composes the configuration and calls `run`. A `ConfigError` is one line."""
    if "-h" in argv or "--help" in argv:
        print(help_text())
        return 0
    words, run_file = argv, None
    try:
        argv, config_dir = _take(argv, "--config-dir")
        argv, env_file = _take(argv, "--env-file")
        if env_file is not None:  # before the configuration, which may name its variables
            load(env_file)
        argv, again = _take(argv, "--again")
        argv, cfg = _take(argv, "--cfg")
        argv, save = _take(argv, "--save")
        if cfg is not None and cfg != "job":
            raise ConfigError(f"--cfg {cfg} is not known; --cfg job prints the configuration")
        argv, run_file = _run_file(argv, again)
        saved = saved_config(again) if again is not None else None
        with run_file.located(argv) if run_file else contextlib.nullcontext():
            with first_line("reading the configuration"):
                composed = compose_all(argv, config_dir, saved, run_file)
            if cfg is not None:
                print(as_yaml(composed.config), end="")
                return 0
            if save is not None:
                from jobs.write_run_file import save_command

                return save_command(save, composed, job)
            content = (run_file.path, run_file.content) if run_file else None
            origin = Origin.of(job, words, composed.varies, composed.references, content)
            if saved is not None:  # the run file of that run
                origin = dataclasses.replace(origin, run_file=saved[RUN_FILE])
            return run(composed, origin, run_file)
    except ConfigError as error:
        text = " ".join(str(error).split())
        print(f"eagleray: {text} {see(error)}", file=sys.stderr)
        return 2


def _run_file(argv: list[str], again: str | None) -> tuple[list[str], RunFile | None]:
    """The arguments without the run file, and the run file that they name."""
    argv, path = _take(argv, "-c")
    named = [word for word in argv if is_run_file(word)]
    if path is not None:
        named.append(path)
    if not named:
        return argv, None
    if len(named) > 1:
        raise ConfigError(f"only one run file is possible, not {' and '.join(named)}", code=ErrorCode.RUN_FILE)
    if again is not None:
        raise ConfigError(f"--again {again} takes the configuration of that output: leave {named[0]} out")
    return [word for word in argv if word != named[0]], RunFile.read(named[0])


def saved_config(path: str) -> dict[str, Any]:
    """The configuration of the last run into this output directory. Raises `ConfigError` if there is none."""
    from jobs.reading import open_output

    out = open_output(path)
    if not out.config:
        text = f"--again {path}: this output has no saved configuration; use the command of its run"
        raise ConfigError(text, code=ErrorCode.NO_SAVED_CONFIGURATION)
    # A run that is continued must not remove its results, nor replace those of another dataset.
    place = os.path.abspath(out.path) if out.directory and "://" not in out.path else out.path
    run, output = {**out.config["run"], "resume": True}, {**out.config["output"], "path": place, "overwrite": False}
    more = {
        HIDDEN_KEYS: out.hidden,
        REFERENCES: out.references,
        DIRECTORY: out.directory,
        RUN_FILE: out.entries.get(RUN_FILE),
    }
    return {**out.config, "run": run, "output": output, **more}


def finish(config: Config, console: Console, step: str = "", origin: Origin | None = None) -> int:
    """Runs the main job and prints its result. Returns the exit status."""
    from pipeline.config import STDOUT
    from pipeline.run import run

    if config.output.path == STDOUT:
        from jobs.stdout import run_to_stdout

        return run_to_stdout(config, console)
    outcome = run(config, console, step, origin)
    if outcome.manifest:
        from jobs.outcome import show_outcome

        show_outcome(outcome.manifest, str(config.output.path), console)
    return outcome.exit_status


def guarded(work: Callable[[Console], int], again: str = "") -> int:
    """Runs `work`. If something stops it, prints the reason in one line, and the command `again` that continues."""
    with first_line("loading the libraries"):
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
            resume = {"run.resume": "true"} if "run.resume=" in again else {}  # `false` would remove the results
            console.print(Text(f"To continue: {changed(again, {**resume, **(changes or {})})}"), soft_wrap=True)
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
        return go_on(INTERRUPTED, interrupt.changes)
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
    """Raises `ConfigError` if another distribution has a package with one of our names: their files would be mixed.

    It only searches the lists of files. `importlib.metadata` parses them, which takes a third of a second.
    """
    for info in (info for place in map(Path, sys.path) for info in (*place.glob("*.dist-info"), *place.glob("*.egg-info"))):
        files = packages = b""
        with contextlib.suppress(OSError):
            packages = b"\n%s\n" % (info / "top_level.txt").read_bytes()
        with contextlib.suppress(OSError):
            files = b"\n" + (info / "RECORD").read_bytes()
        for name in ("engines", "pipeline", "jobs", "conf"):
            if f"\n{name}\n".encode() in packages or f"\n{name}/".encode() in files:
                other = info.stem.partition("-")[0]
                if other != "eagleray":
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
        "  eagleray infer run.yaml [key=value …]",
        "  eagleray infer dataset.path=IN output.path=OUT [group=option …] [key=value …]",
        "",
        *keys_help((*SECTIONS, "task")),
        "",
        "A run file has these keys in YAML; eagleray init writes one. -c FILE also names it. --save FILE writes the keys",
        "of a command into a new run file and runs nothing.",
        "Flags: --again OUT takes the configuration of the last run into OUT; keys change it. --cfg job only prints the",
        "configuration. --config-dir DIR adds your own engine/, dataset/, … files. --env-file FILE sets environment",
        "variables, such as API keys, from lines NAME=value; only the owner may have access to the file (mode 600).",
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
