"""`eagleray serve`: serves an engine over HTTP for OpenAI clients."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from engines.errors import ConfigError, ErrorCode
from jobs.infer import guarded, keys_help, start
from pipeline.config import Config

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: list[str]) -> int:
    """Serves until Ctrl-C or SIGTERM. Returns the exit status."""
    return start(argv, help_text, lambda config: guarded(lambda console: _run(config, console)))


def _run(config: Config, console: Console) -> int:
    try:
        import ray.serve  # noqa: F401
        import starlette  # noqa: F401
    except ImportError:
        text = "eagleray serve needs Ray Serve: run pip install 'eagleray[serve]'"
        raise ConfigError(text, code=ErrorCode.PACKAGE_MISSING) from None
    from pipeline.serve.server import serve_engine

    serve_engine(config, console)
    return 0


def help_text() -> str:
    """The help text: the keys that an endpoint uses."""
    lines = [
        "Serve an engine over HTTP with OpenAI's API: POST /v1/chat/completions, GET /v1/models, GET /health.",
        "",
        "  eagleray serve engine=ENGINE [hardware=PROFILE] [group=option …] [key=value …]",
        "",
        "With hardware.replicas={min: 1, max: 8}, the number of replicas follows the load. Generation keys are defaults: a",
        "request may set other values.",
        "",
        *keys_help(("engine", "hardware", "generation", "serve"), ("run.drain_s", "run.max_outage_s")),
        "",
        "Exit status: 0 ended by Ctrl-C or SIGTERM; 2 wrong configuration; 4 no replica could start.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
