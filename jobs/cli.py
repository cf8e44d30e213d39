"""The `eagleray` command: `eagleray <job> [Hydra overrides]`, the same as `python -m jobs.<job> [Hydra overrides]`."""

from __future__ import annotations

import importlib
import os
import sys

# job -> its description
JOBS = {
    "infer": "send every conversation of a dataset to a model",
    "batch": "the same through a provider's batch API, mostly for half the price: submit, status, fetch, list, cancel",
    "serve": "serve an engine over HTTP for OpenAI clients",
    "init": "write a run file: asks a few questions, or takes keys",
    "rerun": "repeat the run of an output directory, into a new directory",
    "from-oumi": "write a run file from an inference configuration of Oumi",
    "chat": "talk to an engine in the terminal",
    "plan": "check that a model fits the hardware and that a dataset can be read, before a run",
    "tune": "measure settings of an engine on a sample of your rows, and write the fastest into the run file",
    "engines": "list the engines: where each runs, what it needs, what it supports, and if it is usable here",
    "models": "list the models of an engine, from the provider's own list, with shutdown dates and list prices",
    "status": "show the progress of a run, also after it stopped or completed",
    "wait": "wait until an output is complete, for a job that reads the output of another job",
    "show": "show conversations with their answers in the terminal",
    "errors": "show why rows failed, what to do, and the command that sends them again",
    "export": "write the finished rows into one CSV, JSON lines or Parquet file, also of a run that is not complete",
    "cost": "add up the cost of several runs, by run, lane, model and day",
    "diff": "compare two or more outputs, for example of several models or prompts",
    "completion": "print the script that lets bash, zsh or fish complete the words of a command",
}
# The first job of each group -> the heading of the group.
HEADINGS = {
    "infer": "Inference",
    "engines": "Choose an engine",
    "status": "Inspect an output directory (eagleray status OUT)",
    "completion": "Your shell",
}


def main() -> int:
    """Runs a job and returns its exit status. A pipe whose reader has left, such as `head`, is no error."""
    try:
        status = _run(sys.argv[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(args: list[str]) -> int:
    """Imports only the module of the job, so that `--help` is fast."""
    if args and args[0] == "--version":
        from importlib.metadata import version

        print(f"eagleray {version('eagleray')}")
        return 0
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    job, rest = args[0], args[1:]
    if job not in JOBS:
        from engines.errors import no_such

        print(f"eagleray: {no_such('job', job, JOBS)}", file=sys.stderr)
        return 2
    status: int = importlib.import_module(f"jobs.{job.replace('-', '_')}").main(rest)
    return status


def _help() -> str:
    jobs = "".join(
        (f"\n{HEADINGS[name]}:\n" if name in HEADINGS else "") + f"  {name:<12}{what}\n" for name, what in JOBS.items()
    )
    return f"""\
Eagleray: batch inference over conversation datasets, exactly once, in order.

  eagleray <job> [key=value …]
{jobs}
Examples:
  eagleray init
  eagleray infer run.yaml
  eagleray infer dataset.path=in.jsonl output.path=out
  eagleray plan engine=vllm engine.model=path/to/checkpoint hardware=8xh100 dataset.path=in.jsonl
  eagleray infer engine=transformers engine.model=path/to/checkpoint dataset.path='data/*.parquet' output.path=out

`eagleray <job> --help` lists the keys; `--cfg job` prints the configuration of a command and does not run it."""


if __name__ == "__main__":
    sys.exit(main())
