"""A TCP port for a server that is about to start."""

from __future__ import annotations

import contextlib
import random
import socket

# The system gives ports above these to connections: one of those could be taken before the server listens.
FREE_PORTS = range(20_000, 32_000)


def free_port(host: str = "127.0.0.1") -> int:
    """A port at which no process listens. Raises `OSError` if this machine cannot listen at `host`."""
    *others, last = random.sample(FREE_PORTS, 20)
    for port in others:
        with contextlib.suppress(OSError):
            check_port(host, port)
            return port
    check_port(host, last)
    return last


def check_port(host: str, port: int) -> None:
    """Raises `OSError` if this machine cannot listen at the port now."""
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
        pass
