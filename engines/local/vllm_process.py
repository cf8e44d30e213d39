"""vLLM's engine process as a fork of the server of `vllm_fork_server.py`. A module of its own: the process imports it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from multiprocessing.context import ForkServerContext, ForkServerProcess

# OpenMP's variables that bind threads to cores. vLLM sets them for a process that has not loaded OpenMP yet.
BINDING = ("OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")


class EngineProcess(ForkServerProcess):
    """A process with the environment that its parent has at `start`, as a spawned process has. It ends with its parent."""

    def start(self) -> None:
        self.environment = dict(os.environ)
        try:
            super().start()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the server that starts vLLM's engine process has died ({error})") from error

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self.environment)
        _set_threads()
        # Ray kills only the processes that an actor has started itself, and its guard is one of them.
        threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
        super().run()


class EngineContext(ForkServerContext):
    Process = EngineProcess


def _set_threads() -> None:
    """Applies the settings of OpenMP in the environment, which it read when the server loaded it.

    The cores come first: they are those of this thread and of the threads that it starts. Nothing is left for a second
    library of OpenMP, which would bind this thread to one core.
    """
    import torch

    cores = [os.environ.pop(name, "") for name in BINDING]
    # One place with all cores, as vLLM writes it: {0,1} or, with libgomp in LD_PRELOAD, "0 1".
    if found := next(filter(None, (re.fullmatch(r"\{?(\d+(?:[ ,]\d+)*)\}?", text) for text in cores)), None):
        os.sched_setaffinity(0, map(int, re.split("[ ,]", found[1])))
    if threads := re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", "")):
        torch.set_num_threads(int(threads[0]))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
