"""Imports vLLM in the process from which its engine process is forked (`vllm_fork_server.py`)."""

import contextlib

from vllm.entrypoints.openai.chat_completion import protocol  # noqa: F401
from vllm.v1.engine import core  # noqa: F401
from vllm.v1.executor import multiproc_executor  # noqa: F401
from vllm.v1.worker import cpu_worker  # noqa: F401

import engines.local.vllm_executor  # noqa: F401

with contextlib.suppress(ImportError):
    from setproctitle import getproctitle

    getproctitle()  # it finds the place of the title by the environment, which each fork replaces
