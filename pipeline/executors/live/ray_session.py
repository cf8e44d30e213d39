"""Ray for one run: joins a cluster or starts Ray, and checks that replicas have room."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from tenacity import retry, stop_after_attempt

from engines.errors import ConfigError, EaglerayError, ErrorCode
from engines.text import one_line
from pipeline.errors import EnginesDied, Stopped
from pipeline.executors.live.placement import Placement, lack, room
from pipeline.monitor.console import warn

# After so long without a working replica the user gets a message. An engine may take minutes to load.
PATIENCE_S = 20.0


@contextlib.contextmanager
def running_ray() -> Iterator[bool]:
    """Joins the cluster of RAY_ADDRESS, or one that this process has joined. Otherwise it starts Ray on this machine for
    this run alone, and yields True."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if ray.is_initialized():
        yield False
    elif address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except (
            ConnectionError,
            RuntimeError,
            ray.exceptions.RayError,
        ) as error:  # no cluster there, a missing token, another version of Ray
            hint = " (where it wants a token, set RAY_AUTH_MODE=token)" if "RAY_AUTH_MODE" not in os.environ else ""
            text = f"cannot join the Ray cluster at RAY_ADDRESS={address}: {one_line(error)}{hint}"
            raise ConfigError(text, code=ErrorCode.NO_RAY_CLUSTER) from None
        yield False
    else:
        # Ray never removes its files, which would fill the disk. They are kept, for the logs, after a bug and after engines
        # that died again and again.
        scratch = tempfile.mkdtemp(prefix="eagleray-")
        keep = True
        try:
            _start(scratch, **quiet)
            yield True
            keep = False
        except EnginesDied as stop:
            raise EnginesDied(f"{stop} (their last words: {scratch}/session_latest/logs)") from None
        except EaglerayError:
            keep = False
            raise
        except Exception as error:
            error.add_note(f"Ray's own logs are in {scratch}/session_latest/logs.")
            raise
        finally:
            ray.shutdown()
            if not keep:
                shutil.rmtree(scratch, ignore_errors=True)


@retry(stop=stop_after_attempt(2), reraise=True, before_sleep=lambda _: _end())
def _start(scratch: str, **options: Any) -> None:
    """Starts Ray on this machine. Ray gives up after half a minute, which may be too short: so it is tried twice."""
    import ray

    try:
        with _only_what_works():
            ray.init(address="local", include_dashboard=False, _temp_dir=scratch, **options)
    except Exception as error:  # of no type of its own
        raise Stopped(f"Ray did not start on this machine: {one_line(error)}") from None


def _end() -> None:
    import ray

    ray.shutdown()


@contextlib.contextmanager
def _only_what_works() -> Iterator[None]:
    """Inside, Ray starts without its autoscaler, log monitor and web server. One machine does not need them, and they
    cost three seconds of processor time. Ray would also wait for the web server. If a later Ray has no such methods,
    nothing changes."""
    from ray._private.node import Node

    os.environ.setdefault("RAY_worker_niceness", "0")  # workers need not give way: this Ray serves one run
    unused = [name for name in ("start_monitor", "start_log_monitor", "start_api_server") if hasattr(Node, name)]
    before = {name: getattr(Node, name) for name in unused}
    for name in unused:
        setattr(Node, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name, start in before.items():
            setattr(Node, name, start)


def look_for_room(placed: Placement, own: bool, console: Console) -> None:
    """Warns about replicas without room. Raises `ConfigError` if none has room and no node can join."""
    import ray

    nodes = ray.nodes()
    missing = lack(placed, nodes)
    if missing and own and not room(placed, nodes):
        raise ConfigError(f"{missing} (see hardware=…)", code=ErrorCode.NO_ROOM)
    if missing:
        warn(console, f"{missing[0].upper()}{missing[1:]}; the rest wait for nodes to join.")


def here() -> Any:
    """A scheduling strategy: on the driver's node. Actors there are not lost when a node of the workers goes away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
