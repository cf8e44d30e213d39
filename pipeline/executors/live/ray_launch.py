"""`python ray_launch.py PID COMMAND…`: becomes COMMAND, and ends with the thread of process PID that started it.

Ray does this in a function between fork and exec (`preexec_fn`). For such a function Python runs the fork handlers of all
libraries, and one may wait for a lock that another thread held at the fork, for ever: huggingface_hub's does so while a
dataset is read.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # Linux: prctl(2)


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was asked
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
