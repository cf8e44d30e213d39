"""Processes that must not outlive whoever started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

from tests.support.processes import gone, until

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


def kill_owner(how: str) -> tuple[int, int]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, how], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child, follower = map(int, owner.stdout.readline().split())
    if how == "dismiss":
        until(lambda: gone(follower))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    return child, follower


def test_what_a_killed_process_leaves_is_killed() -> None:
    child, follower = kill_owner("keep")
    until(lambda: gone(child) and gone(follower))


def test_a_guard_that_is_dismissed_kills_nobody() -> None:
    child, _ = kill_owner("dismiss")
    try:
        time.sleep(2)  # long enough for a follower to act, if one were left
        assert not gone(child)
    finally:
        psutil.Process(child).kill()
