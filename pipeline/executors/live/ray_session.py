"""Joins a Ray cluster, or starts Ray on this machine, and checks that replicas have room."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tenacity import retry, stop_after_attempt

from engines.environment import changed_environment
from engines.errors import ConfigError, EaglerayError, ErrorCode
from engines.text import one_line
from pipeline.errors import EnginesDied, Stopped
from pipeline.executors.live.placement import ReplicaGroup, lack, room, without
from pipeline.executors.live.ray_processes import end_processes, few_processes
from pipeline.executors.live.scratch import Scratch, remove_leftovers
from pipeline.monitor.console import warn

# After this time without a working replica, the user gets a message. An engine may take minutes to load.
PATIENCE_S = 20.0


def starts_here() -> bool:
    """True if a run of this process starts Ray, and does not join a cluster."""
    ray = sys.modules.get("ray")  # importing it takes half a second
    return not (ray is not None and ray.is_initialized()) and not os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def running_ray(environment: Mapping[str, str] | None = None) -> Iterator[bool]:
    """Joins the cluster of RAY_ADDRESS, or one that this process has joined. Otherwise it starts Ray on this machine for
    this run alone, and yields True.

    `environment` has further environment variables for Ray's processes. A cluster that this process has joined before does
    not get them.
    """
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray.is_initialized():
        yield False
    elif address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet, **({"runtime_env": {"env_vars": dict(environment)}} if environment else {}))
        except (
            ConnectionError,
            RuntimeError,
            ray.exceptions.RayError,
        ) as error:  # no cluster there, a missing token, another version of Ray
            hint = " (if it needs a token, set RAY_AUTH_MODE=token)" if "RAY_AUTH_MODE" not in os.environ else ""
            text = f"cannot join the Ray cluster at RAY_ADDRESS={address}: {one_line(error)}{hint}"
            raise ConfigError(text, code=ErrorCode.NO_RAY_CLUSTER) from None
        yield False
    else:
        # Ray never removes its files, which would fill the disk. After a bug, and after engines died repeatedly, they are
        # kept for the logs.
        remove_leftovers()
        scratch = Scratch()
        keep = True
        try:
            with changed_environment({**_token(), **(environment or {})}):
                _start(scratch.path, **quiet)
            yield True
            keep = False
        except EnginesDied as stop:
            raise EnginesDied(f"{stop} (their logs: {scratch.path}/session_latest/logs)") from None
        except EaglerayError:
            keep = False
            raise
        except Exception as error:
            error.add_note(f"Ray's own logs are in {scratch.path}/session_latest/logs.")
            raise
        finally:
            end_processes()
            if keep:
                scratch.keep()
            else:
                scratch.remove()


def _token() -> dict[str, str]:
    """A token for Ray if it cannot keep one in the home directory: a system user may have no such directory."""
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ):
        return {}
    try:
        (Path.home() / ".ray").mkdir(parents=True, exist_ok=True)
    except OSError:
        return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return {}


@retry(stop=stop_after_attempt(2), reraise=True, before_sleep=lambda _: _shut_down())
def _start(scratch: str, **options: Any) -> None:
    """Starts Ray on this machine. Ray gives up after half a minute, which may be too short. Then it is tried again."""
    import ray

    try:
        with few_processes():
            ray.init(address="local", include_dashboard=False, _temp_dir=scratch, **options)
    except Exception as error:  # Ray has no error class for it
        raise Stopped(f"Ray did not start on this machine: {one_line(error)}") from None


def _shut_down() -> None:
    import ray

    ray.shutdown()


def own_ray_ended(patience_s: float = 0.0) -> bool:
    """True if this process started Ray, and one of its processes has ended or its server (GCS) takes no connections, now or
    within `patience_s`. After a signal the server stops at once, but its process stays. Calls to Ray would wait for a
    minute, and end this process."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is None or not node.all_processes:  # no Ray, or one that other processes started
        return False
    host, _, port = node.gcs_address.rpartition(":")
    until = time.monotonic() + patience_s
    while True:
        if any(info.process.poll() is not None for infos in node.all_processes.values() for info in infos):
            return True
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
        except OSError:
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.05)


def look_for_room(groups: Sequence[ReplicaGroup], own: bool, console: Console) -> None:
    """Warns about replicas without room. Raises `ConfigError` if none of any group has room and no node can join."""
    import ray

    nodes = left = ray.nodes()
    found, missing = 0, []
    for group in groups:
        if (text := lack(group.placement, left)) is not None:
            rest = "the rest wait for nodes to join" if not own else "the rest wait"
            rest = "they are left out" if own and not room(group.placement, nodes) else rest
            missing.append((text if len(groups) == 1 else f"{group.name}: {text}", rest))
        found += room(group.placement, left)
        left = without(group.placement, left)
    if missing and own and not found:
        raise ConfigError(f"{missing[0][0]} (see hardware=…)", code=ErrorCode.NO_ROOM)
    for text, rest in missing:
        warn(console, f"{text[0].upper() if len(groups) == 1 else text[0]}{text[1:]}; {rest}.")


def here() -> Any:
    """A scheduling strategy: on the driver's node. Actors there are not lost when a node of the workers goes away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
