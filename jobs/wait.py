"""`eagleray wait`: waits until an output directory is complete, for jobs that read the output of another job."""

from __future__ import annotations

import argparse
import re
import sys
import time

from rich.console import Console

from jobs.reading import Arguments, Output, find_output, print_json, say
from jobs.status import NOT_COMPLETE, OK, WITH_FAILURES, look, rows_text
from pipeline.storage.filesystem import GLOB, listing, resolve, split_options
from pipeline.storage.output_files import DATA, ERRORS, MANIFEST, is_output

# The first and the longest time between two looks. A look at a store is about five requests.
FIRST_S, LONGEST_S = 0.2, 10.0
_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def main(argv: list[str]) -> int:
    """Waits. The exit status is 0 for complete, 3 for complete with failed rows, 4 if the time is over."""
    what = (
        "Wait until an output directory has its manifest.json and no run changes it. Then the output is complete.\n"
        "The directory need not exist yet. OUT may also be its data/, as dataset.path of the next run names it.\n"
        "Exit status: 0 complete, 3 complete with failed rows, 4 not complete after --timeout."
    )
    examples = "out --timeout 6h\ns3://bucket/scores/2026-11-25 --timeout 90min && eagleray infer …"
    parser = Arguments("wait", what, examples)
    parser.add_argument("--timeout", type=_seconds, metavar="TIME",
                        help="the longest time to wait: 90s, 30min, 6h, 2d (default: no limit)")  # fmt: skip
    return parser.run(argv, _run)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h|d)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number with a unit, such as 90s, 30min, 6h or 2d, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def _run(args: argparse.Namespace, console: Console) -> int:
    until = time.monotonic() + args.timeout if args.timeout is not None else float("inf")
    pause, shown = FIRST_S, ""
    while True:
        try:
            out = find_output(_output_of(args.OUT))
            state = _state(out)
        except OSError as error:
            if not shown:  # a wrong bucket or missing credentials
                raise
            out, state = None, f"the store does not answer ({error})"
        if out is not None and out.manifest is not None:
            return _complete(out, args.json, console)
        over = time.monotonic() >= until
        if state != shown and not args.json:
            say(console, f"{args.OUT}: {state}{'' if over else '; waiting'}")
        if over:
            print(f"eagleray: {args.OUT} is not complete, and --timeout is over: {state}", file=sys.stderr)
            return NOT_COMPLETE
        shown = state
        time.sleep(max(0.0, min(pause, until - time.monotonic())))
        pause = min(1.5 * pause, LONGEST_S)


def _output_of(path: str) -> str:
    """The path of the output: without `manifest.json`, and without `data` or `errors` and a glob in it."""
    path = path.removeprefix("output.path=")
    place, options = split_options(path) if "://" in path else (path, "")
    above, _, name = place.rstrip("/").rpartition("/")
    if name == MANIFEST or (GLOB.search(name) and above):
        place = above
        above, _, name = place.rpartition("/")
    if name in (DATA, ERRORS):
        fs, root = resolve((above or ".") + options)
        if is_output(fs, root, {info.base_name for info in listing(fs, root)}):
            return (above or ".") + options
    return place + options


def _state(out: Output | None) -> str:
    if out is None:
        return "nothing is there yet"
    if out.live:
        return "a run is in progress"
    if out.run is None:
        return "it is not complete"
    why = out.run["ended"] or "it was killed, or its machine was lost"
    return f"the run stopped and was not continued ({why})"


def _complete(out: Output, as_json: bool, console: Console) -> int:
    summary = look(out)
    if as_json:
        print_json(summary)
    else:
        say(console, f"{out.path}: complete, {rows_text(summary)}")
    return WITH_FAILURES if summary["rows"]["failed"] else OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
