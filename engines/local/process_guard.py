"""`python process_guard.py COMMAND…`: runs a command that ends when its owner ends.

The owner holds the guard's standard input open. When the owner dies, for any reason, the operating system closes the input,
and the guard ends its process group. Start the guard in a new session, so that the group is its own. `follow` guards
processes that are already running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

# -I: it imports no module from the working directory, which is the user's.
COMMAND = [sys.executable, "-I", __file__]
GRACE_S = 10.0  # between SIGTERM and SIGKILL to the group


def follow(pids: Iterable[int]) -> subprocess.Popen[bytes]:
    """Starts a watcher that kills `pids` when this process ends. Kill the watcher to leave them alone."""
    command = [*COMMAND, "--follow", *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _follow(pids: list[int]) -> int:
    """Waits until standard input closes, then kills `pids`."""
    began = {pid: _start_time(pid) for pid in pids}
    while os.read(0, 1):
        pass
    for pid, when in began.items():
        if when is not None and _start_time(pid) == when:  # else another process has the pid now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return 0


def _start_time(pid: int) -> str | None:
    """The start time of a process in clock ticks after boot (field 22 of /proc/PID/stat); None if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def main() -> int:
    if sys.argv[1] == "--follow":
        return _follow([int(pid) for pid in sys.argv[2:]])
    if os.getpid() != os.getpgid(0):
        raise SystemExit("process_guard.py must lead a process group: start it in a new session")
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it signals its own group; the command started before this line

    def stop() -> None:
        """Waits until standard input closes, then ends the group."""
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGTERM)
        try:
            child.wait(GRACE_S)
        finally:
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=stop, daemon=True).start()
    status = child.wait()
    os.killpg(0, signal.SIGTERM)  # child processes that the command left
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
