"""vLLM's executor for one rank on CPUs: the model is in the engine process itself, as it is on a GPU.

On CPUs, vLLM starts a worker process even for one rank: OpenMP reads its settings when a process loads it, and vLLM makes
these settings for workers only. `omp_environment` makes them for the engine process, so that no worker is needed. vLLM is
then imported twice and not three times, and no step goes through shared memory.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class OneProcess(UniProcExecutor):
    """A class of our own: on CPUs, vLLM replaces its own `uni` by `mp`."""


NAME = f"{OneProcess.__module__}.{OneProcess.__qualname__}"


def choose(args: Any) -> None:
    """Sets the executor in vLLM's arguments, on CPUs, for one rank, if the user chose none."""
    kinds = ("tensor", "pipeline", "data", "prefill_context")
    one = all(getattr(args, f"{kind}_parallel_size", 1) == 1 for kind in kinds)
    if current_platform.is_cpu() and args.distributed_executor_backend is None and one:
        args.distributed_executor_backend = NAME


def omp_environment(vllm_config: Any) -> AbstractContextManager[None]:
    """Inside, this process has OpenMP's settings for an engine process with `OneProcess`, and starts it with them."""
    if vllm_config.parallel_config.distributed_executor_backend != NAME:
        return contextlib.nullcontext()
    return OMPProcessManager(vllm_config).configure_omp_envs(rank=0, local_rank=0)
