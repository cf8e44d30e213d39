"""The `eagleray` command: `eagleray <job> [Hydra overrides]`, the same as `python -m jobs.<job> [Hydra overrides]`."""

from __future__ import annotations

import importlib
import sys

# job -> its description
JOBS = {
    "infer": "send every conversation of a dataset to a model",
    "batch": "the same through a provider's batch API, mostly for half the price: submit, status, fetch, list, cancel",
    "serve": "serve an engine over HTTP for OpenAI clients",
    "chat": "talk to an engine in the terminal",
    "plan": "check that a model fits the hardware and that a dataset can be read, before a run",
    "status": "show the progress of a run, also after it stopped or completed",
    "show": "show conversations with their answers in the terminal",
    "errors": "show why rows failed, what to do, and the command that sends them again",
    "diff": "compare two outputs, for example of two models or two prompts",
}
# The first job of each group -> the heading of the group.
HEADINGS = {"infer": "Inference", "status": "Inspect an output directory (eagleray status OUT)"}


def main() -> int:
    """Runs a job and returns its exit status. Imports only this job's module, so that `--help` is fast."""
    args = sys.argv[1:]
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
    status: int = importlib.import_module(f"jobs.{job}").main(rest)
    return status


def _help() -> str:
    jobs = "".join(
        (f"\n{HEADINGS[name]}:\n" if name in HEADINGS else "") + f"  {name:<10}{what}\n" for name, what in JOBS.items()
    )
    return f"""\
Eagleray: batch inference over conversation datasets, exactly once, in order.

  eagleray <job> [key=value …]
{jobs}
Examples:
  eagleray infer dataset.path=in.jsonl output.path=out
  eagleray plan engine=vllm engine.model=path/to/checkpoint hardware=8xh100 dataset.path=in.jsonl
  eagleray infer engine=transformers engine.model=path/to/checkpoint dataset.path='data/*.parquet' output.path=out

`eagleray <job> --help` lists the keys; `--cfg job` prints the configuration of a command and does not run it."""


if __name__ == "__main__":
    sys.exit(main())
