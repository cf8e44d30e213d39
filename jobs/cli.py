"""The `eagleray` command: `eagleray <job> [Hydra overrides]`, the same as `python -m jobs.<job> [Hydra overrides]`."""

from __future__ import annotations

import importlib
import sys

# job -> what it does
JOBS = {
    "infer": "ask a model every conversation of a dataset",
    "batch": "the same through a provider's batch API, for half the price: submit, status, fetch, list, cancel",
    "serve": "an engine as an endpoint for OpenAI's clients",
    "chat": "talk to an engine in the terminal",
    "plan": "whether a model fits the hardware, and what a dataset holds, before anything is asked",
    "status": "how a run stands: while it goes on, after it stopped, when it is complete",
    "show": "conversations with their answers, as a chat in the terminal",
    "errors": "why rows failed, what that means, and how to ask them again",
    "diff": "two outputs side by side: two models, say, or two prompts",
}
# The first of each group, with its heading.
HEADINGS = {"infer": "Asking", "status": "Looking at an output directory (eagleray status OUT)"}


def main() -> int:
    """Runs a job and returns its exit status. Imports nothing but the job that is asked for."""
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
        from engines.errors import nearest

        print(f"eagleray: there is no job '{job}'{nearest(job, JOBS)}", file=sys.stderr)
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

`eagleray <job> --help` lists the keys; `--cfg job` prints the configuration a command stands for."""


if __name__ == "__main__":
    sys.exit(main())
