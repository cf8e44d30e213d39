"""The processor cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus() -> list[int]:
    """The numbers of the logical CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Physical cores that this process may use. Two threads on one core would share its arithmetic units."""
    cores = set()
    for cpu in usable_cpus():
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)
