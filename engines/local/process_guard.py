"""`python -m engines.local.process_guard COMMAND…`: runs a command that must not outlive whoever started it.

It ends when the command does, or when its standard input closes, which whatever kills the owner closes, too. Start it in
a session of its own: it ends its whole process group. `follow` is for processes that something else has started.
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

GRACE_S = 10.0  # between asking the group to end and ending it


def follow(pids: Iterable[int]) -> subprocess.Popen[bytes]:
    """Watches over processes of this one's that do not notice its end themselves; killed, the watcher leaves them alone."""
    command = [sys.executable, "-m", "engines.local.process_guard", "--follow", *map(str, pids)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _follow(pids: list[int]) -> int:
    began = {pid: _began(pid) for pid in pids}
    while os.read(0, 1):
        pass
    for pid, when in began.items():
        if when is not None and _began(pid) == when:  # and not another that has its number by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return 0


def _began(pid: int) -> str | None:
    """When a process began, as Linux tells it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def main() -> int:
    if sys.argv[1] == "--follow":
        return _follow([int(pid) for pid in sys.argv[2:]])
    if os.getpid() != os.getpgid(0):
        raise SystemExit("engines.local.process_guard must lead a process group: start it in a new session")
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it asks its group, and is in it; the command has begun without this

    def stop() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGTERM)
        try:
            child.wait(GRACE_S)
        finally:
            os.killpg(0, signal.SIGKILL)

    threading.Thread(target=stop, daemon=True).start()
    status = child.wait()
    os.killpg(0, signal.SIGTERM)  # what the command left behind
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
