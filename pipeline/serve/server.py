"""`eagleray serve`: any engine behind OpenAI's chat completions API, as replicas of Ray Serve."""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from engines.errors import ConfigError, ErrorCode
from engines.free_port import check_port, free_port
from engines.registry import secret_variables
from engines.text import one_line
from pipeline.config import Config
from pipeline.errors import Stopped
from pipeline.executors.live.placement import ReplicaGroup, not_ready, replica_groups, serve_options
from pipeline.executors.live.rate_limiter import NAMESPACE, rate_limit_actor
from pipeline.executors.live.ray_session import PATIENCE_S, look_for_room, running_ray
from pipeline.executors.live.secrets import Secrets
from pipeline.serve.front import front_environment
from pipeline.serve.replica import ReplicaConfig, SecretsBroker, ServeReplica
from pipeline.signals import note_signals

NAME = "eagleray"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Requests per replica until the first replica has loaded and reports the concurrency of its engine.
FIRST_CONCURRENCY = 64
# Ray Serve adds replicas when the requests reach this share of the replicas' concurrency.
FULL = 0.7
# Seconds between Ray Serve's health checks of a replica. A replica is replaced after three failed checks; until then its
# requests fail.
HEALTH_S = 1.0
# Seconds between the driver's looks at the state. Shorter than the start of a replica, so that no failure is missed.
LOOK_S = 0.5


def serve_engine(config: Config, console: Console) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises `ConfigError` or `Stopped` if it cannot serve."""
    import ray
    from ray import serve
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config.check(runs=False)
    group, *others = replica_groups(config.hardware, config.engine)
    if others:
        text = "eagleray serve has one kind of replica: hardware must not be a list of several entries"
        raise ConfigError(text, key="hardware.profiles")
    secrets = _secrets(config)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        # A thread of Ray prints notices to stdout, such as the death of its controller at a normal end.
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        own = stack.enter_context(running_ray(front_environment(config.serve)))
        interrupts = stack.enter_context(note_signals())  # after the start of Ray, which sets its own handlers
        look_for_room([group], own, console)
        if (found := serve.status()).proxies or found.applications:
            raise ConfigError("Ray Serve already runs on this cluster: end it first with `serve shutdown`")
        address, port = _address(config, own), _port(config, own)
        name = f"eagleray-serve-{uuid.uuid4().hex[:8]}"
        # On this process's node and owned by it, like the rate limiter: it ends with this process, not with another node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
        broker = ray.remote(SecretsBroker).options(**options).remote()
        ray.get(broker.open.remote(secrets))
        limits = rate_limit_actor(config.engine) if config.engine.provider else None
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(serve.shutdown)  # runs before the pool ends, and ends the deployment that the pool waits for
        loopback = address == "127.0.0.1"
        try:
            serve.start("HeadOnly" if loopback else "EveryNode", {"host": config.serve.host, "port": port})
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"cannot listen at serve.host={config.serve.host} serve.port={port}: {one_line(error)}",
                key="serve.host",
            ) from None

        def deploy(concurrency: int) -> bool:
            return _wait(pool.submit(_deploy, config, group, name, concurrency), broker, interrupts, group, console)

        concurrency = FIRST_CONCURRENCY
        while deploy(concurrency):
            wanted, _ = ray.get(broker.news.remote())
            if wanted == concurrency:
                break
            concurrency = wanted
        if interrupts:
            return
        _show(config, f"http://{address}:{port}", console)
        _watch(interrupts, console)
        console.print(f"Ending. Running requests have {config.run.drain_s:g} s to finish.", highlight=False)
        with contextlib.suppress(TimeoutError):  # the timeout is 60 s for any `drain_s`
            serve.delete(NAME)  # lets requests finish; `serve.shutdown` does not
        del limits


def _secrets(config: Config) -> Secrets:
    """The environment variables that replicas need. Raises `ConfigError` if the endpoint's key is missing."""
    variable = config.serve.api_key_env
    if variable and not os.environ.get(variable, "").strip():
        text = f"serve.api_key_env={variable}: there is no such environment variable, or it is empty"
        raise ConfigError(text, code=ErrorCode.KEY_MISSING, key="serve.api_key_env")
    names = secret_variables(config.engine) | ({variable} if variable else set())
    return Secrets({name: os.environ[name] for name in names if name in os.environ})


def _address(config: Config, own: bool) -> str:
    """The host at which clients on this machine reach the endpoint. Raises `ConfigError` if they cannot."""
    import ray

    host = config.serve.host
    if own:
        return "127.0.0.1" if host in ("0.0.0.0", "::", *LOOPBACK) else host
    head = next(node["NodeManagerAddress"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    if host not in LOOPBACK:
        return str(head)
    if head not in ("127.0.0.1", ray.util.get_node_ip_address()):
        raise ConfigError(
            f"serve.host={host} is reachable only on the head node ({head}): set serve.host=0.0.0.0", key="serve.host"
        )
    return "127.0.0.1"


def _port(config: Config, own: bool) -> int:
    """The port to listen at; a free one for port 0. Raises `ConfigError` if this machine cannot listen at it."""
    host, port = config.serve.host, config.serve.port
    if port and not own:
        return port
    try:
        if not port:
            return free_port(host)
        check_port(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at serve.host={host} serve.port={port}: {error.strerror or error}", key="serve.host"
        ) from None
    return port


def _deploy(config: Config, group: ReplicaGroup, broker: str, concurrency: int) -> None:
    """Creates or updates the deployment. An update changes only its concurrency, which does not restart replicas."""
    from ray import serve

    replica = ReplicaConfig(
        engine=group.engine,
        generation=config.params(),
        serve=config.serve,
        max_outage_s=config.run.max_outage_s,
        cpus=group.cpus,
        broker=broker,
    )
    placed = group.placement
    scale: dict[str, Any] = {"num_replicas": placed.low}
    if placed.high > placed.low:
        target = max(1.0, FULL * concurrency)
        bounds = {"min_replicas": placed.low, "max_replicas": placed.high}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": target}}
    deployment = serve.deployment(ServeReplica).options(
        name="engine",
        version="1",  # of the code; the default is a new version each time, which would restart all replicas
        _internal=True,
        max_ongoing_requests=concurrency,
        max_queued_requests=config.serve.max_queued,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=config.run.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_S,
        **scale,
        **serve_options(placed),
    )
    serve.run(deployment.bind(replica), name=NAME, route_prefix="/")


def _wait(deployed: Future[None], broker: Any, interrupts: list[int], group: ReplicaGroup, console: Console) -> bool:
    """Waits for a deployment. False if Ctrl-C came first. Raises `ConfigError` or `Stopped` if no engine can be loaded."""
    import ray

    began, warned = time.monotonic(), False
    while not interrupts:
        with contextlib.suppress(TimeoutError):
            failure = deployed.exception(timeout=0.1)
            break
        if (refusal := ray.get(broker.news.remote())[1]) is not None:
            raise refusal
        if not warned and time.monotonic() - began > PATIENCE_S:
            warned = True
            console.print(Text(not_ready([group]), "yellow"), soft_wrap=True)
    else:
        return False
    if failure is not None:
        refusal = ray.get(broker.news.remote())[1]
        raise refusal or Stopped(f"no replica could start: {one_line(failure)}")
    return True


def _show(config: Config, url: str, console: Console) -> None:
    engine = config.engine
    key = f' -H "authorization: Bearer ${config.serve.api_key_env}"' if config.serve.api_key_env else ""
    console.print(
        f"Serving {engine.model or engine.kind} at {url}/v1, until Ctrl-C. For example:", highlight=False, markup=False
    )
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}]}'
    curl = f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{body}'"
    console.print(curl, highlight=False, markup=False, soft_wrap=True)
    if config.serve.host not in LOOPBACK and not key:
        text = "Anyone who can reach this machine can use the endpoint. Set serve.api_key_env to require a key."
        console.print(Text(text, "yellow"))


def _watch(interrupts: list[int], console: Console) -> None:
    """Waits until Ctrl-C. Prints when a replica fails and when all work again. Raises `Stopped` if Ray Serve was ended."""
    from ray import serve

    state, looked = "RUNNING", time.monotonic()
    while not interrupts:
        time.sleep(0.1)
        if time.monotonic() > looked + LOOK_S:
            looked = time.monotonic()
            app = serve.status().applications.get(NAME)
            if app is None:
                raise Stopped("another process ended Ray Serve")
            if app.status != state and app.status in ("RUNNING", "UNHEALTHY"):
                state = app.status
                text = "All replicas work." if state == "RUNNING" else "A replica failed; Ray Serve starts another."
                console.print(Text(text, "yellow"), soft_wrap=True)
