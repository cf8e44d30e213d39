"""Ray around one run: joined or started, what there is room for, and the signals that end it."""

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

# An engine may take minutes to load; that none has found room yet is worth a word before that.
PATIENCE_S = 20.0


@contextlib.contextmanager
def running_ray() -> Iterator[bool]:
    """Joins the cluster of RAY_ADDRESS (or one joined already), or starts Ray on this machine for this run alone: then
    yields True."""
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
        ) as error:  # no cluster there, a token it wants, another Ray version
            hint = " (where it wants a token, set RAY_AUTH_MODE=token)" if "RAY_AUTH_MODE" not in os.environ else ""
            text = f"cannot join the Ray cluster at RAY_ADDRESS={address}: {one_line(error)}{hint}"
            raise ConfigError(text, code=ErrorCode.NO_RAY_CLUSTER) from None
        yield False
    else:
        # Ray never removes what it wrote; a run a night would fill the disk. Kept for its logs after a bug, and after
        # engines that only died.
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
    """Starts Ray on this machine. It gives up after half a minute, which a busy machine may need: then once more."""
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
    """Within it Ray starts without its autoscaler, its reader of logs and its web server: of no use on one machine, they
    cost three seconds of processor time, and Ray waits for the last. Where it has them no more, nothing changes."""
    from ray._private.node import Node

    os.environ.setdefault("RAY_worker_niceness", "0")  # this Ray has one run, which is not there to give way
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
    """Says what is missing for the replicas. Raises `ConfigError` where none has room and no node can join."""
    import ray

    nodes = ray.nodes()
    missing = lack(placed, nodes)
    if missing and own and not room(placed, nodes):
        raise ConfigError(f"{missing} (see hardware=…)", code=ErrorCode.NO_ROOM)
    if missing:
        warn(console, f"{missing[0].upper()}{missing[1:]}; the rest wait for nodes to join.")


def here() -> Any:
    """On the driver's node; what is beside the driver dies with it anyway, and with no node that only came for the work."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
