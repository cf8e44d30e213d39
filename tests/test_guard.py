"""Processes that must not outlive whoever started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

OWNER = """
import subprocess, sys, time
from engines.local import process_guard
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
follower = process_guard.follow([child.pid])
print(child.pid, follower.pid, flush=True)
if sys.argv[1] == "dismiss":
    follower.kill(), follower.wait()
time.sleep(600)
"""


def gone(pid: int, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def kill_owner(how: str) -> tuple[int, int]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, how], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child, follower = map(int, owner.stdout.readline().split())
    time.sleep(1)  # the follower looks at whom it follows
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    return child, follower


def test_what_a_killed_process_leaves_is_killed() -> None:
    child, follower = kill_owner("keep")
    assert gone(child, 30) and gone(follower, 30)


def test_a_guard_that_is_dismissed_kills_nobody() -> None:
    child, follower = kill_owner("dismiss")
    try:
        assert gone(follower, 30) and not gone(child, 2)
    finally:
        psutil.Process(child).kill()
