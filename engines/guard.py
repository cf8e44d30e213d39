"""`python -m engines.guard COMMAND…`: runs a command that must not outlive whoever started it.

It ends when the command does, or when its standard input closes, which whatever kills the owner closes, too. Start it in
a session of its own: it ends its whole process group.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0  # between asking the group to end and ending it


def main() -> int:
    if os.getpid() != os.getpgid(0):
        raise SystemExit("engines.guard must lead a process group: start it in a new session")
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
