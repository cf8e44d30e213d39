"""`eagleray rerun`: repeats the run of an output directory, with its saved configuration, into a new directory."""

from __future__ import annotations

import re
import shlex
import sys

from engines.errors import ConfigError, ErrorCode
from jobs.guide import see
from jobs.infer import begin_infer

_EARLIER = re.compile(r"-rerun(-\d+)?$")


def main(argv: list[str]) -> int:
    """Repeats a run. Returns the exit status of `eagleray infer`."""
    if not argv or "-h" in argv or "--help" in argv:
        print(help_text())
        return 0 if argv else 2
    try:
        out, words = argv[0], argv[1:]
        if out.startswith("-") or "=" in out:
            raise ConfigError(f"name an output directory first: eagleray rerun OUT {shlex.join(argv)}")
        typed = next((word.partition("=")[2] for word in words if word.lstrip("+").startswith("output.path=")), None)
        path = typed or free_name(out)
        words += _check(out, path)
    except ConfigError as error:
        print(f"eagleray: {error} {see(error)}", file=sys.stderr)
        return 2
    if not {"--cfg", "--save"} & {word.partition("=")[0] for word in words}:
        print(f"The answers go into {path}; {out} stays as it is.", file=sys.stderr)
    return begin_infer(["--again", out, *words, *([] if typed else [f"output.path={path}"])])


def free_name(out: str) -> str:
    """The first name that is free: OUT-rerun, OUT-rerun-2, …"""
    from pipeline.storage.filesystem import exists, resolve

    stem, number = _EARLIER.sub("", out.rstrip("/")), 1
    while exists(*resolve(name := f"{stem}-rerun" + (f"-{number}" if number > 1 else ""))):
        number += 1
    return name


def _check(out: str, path: str) -> list[str]:
    """Raises `ConfigError` if the run would continue the old output. Warns if the input changed since.

    Returns further keys: a run that read standard input has kept its rows in a file."""
    from jobs.reading import open_output
    from pipeline.storage.filesystem import canonical_place, info_of, resolve

    found = open_output(out)
    if canonical_place(path) == canonical_place(out):
        again = shlex.join(["eagleray", "infer", "--again", out])
        text = f"{out} has the answers of this run: name another output.path, or run {again} to continue"
        raise ConfigError(text, code=ErrorCode.OTHER_DATASET)
    for file in (found.manifest or {}).get("input", {}).get("files", [])[:100]:
        now = info_of(*resolve(file["path"]))
        if (now.size, now.mtime_ns) != (file["bytes"], file["modified_ns"]):
            print(f"{file['path']} is not the file of that run any more.", file=sys.stderr)
    files = (found.manifest or {}).get("input", {}).get("files", [])
    piped = found.config.get("dataset", {}).get("path") == "-" and files
    return [f"dataset.path={files[0]['path']}"] if piped else []


def help_text() -> str:
    return """\
Repeat the run of an output directory: the same dataset, prompt, engine and settings, as its manifest.json has them. All
requests are sent again. The answers go into a new directory, OUT-rerun, or the one that output.path=… names.

  eagleray rerun OUT [key=value …]

To continue a run, or to send its failed rows again, use its own command; `eagleray status OUT` shows it. To compare the
two outputs: eagleray diff OUT OUT-rerun. Secrets come from the variables that the run named (${oc.env:NAME}); other secrets
must be typed again. Flags and exit statuses are those of `eagleray infer`."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
