"""The processes of a Ray that a run starts on this machine: only those that a run needs, and started cheaply."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENDS_S = 5.0  # for processes to end after they were killed
UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")  # methods of Ray's `Node`


@contextmanager
def few_processes() -> Iterator[None]:
    """Inside, Ray starts without its autoscaler, log monitor and web server, and with stand-ins for its agents. One machine
    does not need them, and they cost several seconds of processor time. Ray would also wait for them. If a later Ray has
    other methods or arguments, it starts as usual.

    Ray's processes get their own process groups: a signal to the group of this process, as `timeout` sends it, would end
    Ray before the run could finish what is in flight, and the run would wait for Ray for a minute."""
    try:
        from ray._private import services, utils
        from ray._private.node import Node

        popen = services.ConsolePopen
    except (ImportError, AttributeError):
        yield
        return

    def start(command: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with suppress(AttributeError, LookupError, TypeError, ValueError):
            command = _lighter(list(command))
        if kwargs.pop("preexec_fn", None) is not None:
            command = [sys.executable, "-IS", str(HERE / "ray_launch.py"), str(os.getpid()), *command]
        return popen(command, *args, process_group=0, **kwargs)

    os.environ.setdefault("RAY_worker_niceness", "0")  # normal priority: this Ray serves one run
    with ExitStack() as stack:
        stack.enter_context(_replaced(services, "ConsolePopen", start))
        # It imports the agents' libraries, to find out if they are here.
        stack.enter_context(_replaced(utils, "get_dashboard_dependency_error", lambda: "not needed"))
        for name in UNUSED:
            stack.enter_context(_replaced(Node, name, lambda *_, **__: None))
        yield


@contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name, None)
    if before is None:
        yield
        return
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def _lighter(command: list[str]) -> list[str]:
    """The command of raylet with stand-ins for its agents and with our script for its workers. Other commands stay."""
    import ray._raylet

    names: Any = ray._raylet
    given = dict(word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word)
    unused = [
        getattr(names, f"{name}_PORT_NAME", None) for name in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN")
    ]
    agent = getattr(names, "RUNTIME_ENV_AGENT_PORT_NAME", None)
    needed = {"session_dir", "node_id", "node_ip_address", "dashboard_agent_command", "runtime_env_agent_command"}
    if not needed <= given.keys() or None in (*unused, agent):
        return command
    session, node, stand_in = given["session_dir"], given["node_id"], [sys.executable, "-IS", str(HERE / "ray_agent.py")]
    port_file = f"{session}/{names.get_port_filename(node, agent)}"
    given["dashboard_agent_command"] = subprocess.list2cmdline([*stand_in, session])
    real = shlex.split(given["runtime_env_agent_command"])
    given["runtime_env_agent_command"] = subprocess.list2cmdline([*stand_in, given["node_ip_address"], port_file, *real])
    worker = shlex.split(given["python_worker_command"])
    if Path(worker[1]).name == "setup_worker.py":
        worker.insert(1, str(HERE / "ray_worker.py"))
        given["python_worker_command"] = subprocess.list2cmdline(worker)
    for name in unused:
        names.persist_port(session, node, name, -1)  # the agent would write it: this port is not in use
    return [
        f"--{name}={given[name]}" if (name := word[2:].partition("=")[0]) in given and word.startswith("--") else word
        for word in command
    ]


def end_processes() -> None:
    """Disconnects from the Ray of this process, and kills its processes at once. Ray ends one after the other and waits for
    each; but they have nothing left to do, and their files are removed."""
    import ray
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is not None and node.all_processes:
        node.kill_all_processes = lambda **_: _kill(info.process for infos in node.all_processes.values() for info in infos)
    ray.shutdown()


def _kill(processes: Iterable[subprocess.Popen[Any]]) -> None:
    """Kills processes and all that they started, and waits for their end.

    Ray calls it again when this process ends. The numbers of processes that have ended may be those of others by then.
    """
    import psutil  # type: ignore[import-untyped]  # comes with Ray

    children = []
    for process in (own := [process for process in processes if process.poll() is None]):
        with suppress(psutil.Error):
            (parent := psutil.Process(process.pid)).suspend()  # it starts no other process
            children += parent.children(recursive=True)
    for each in (*children, *own):
        with suppress(psutil.Error):
            each.kill()
    for process in own:
        process.wait()
    psutil.wait_procs(children, timeout=ENDS_S)
