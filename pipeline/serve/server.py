"""`eagleray serve`: any engine behind OpenAI's chat completions API, as replicas of Ray Serve."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError, ErrorCode, Failure, invalid
from engines.params import GenerationParams
from engines.registry import load_engine, secret_variables
from engines.text import one_line
from engines.types import Completion, Delta
from pipeline.config import Config
from pipeline.errors import Stopped
from pipeline.executors.live.placement import Placement, placement, serve_options, spread
from pipeline.executors.live.rate_limiter import NAMESPACE, rate_limit_actor, reserve_through_ray
from pipeline.executors.live.ray_session import PATIENCE_S, look_for_room, running_ray
from pipeline.executors.live.secrets import Secrets, settle_environment
from pipeline.serve.openai_api import ChatRequest, Chunks, error_body, event, parse_chat_request, status_of, whole
from pipeline.signals import note_signals
from pipeline.storage.exact_json import dumps, loads

NAME = "eagleray"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Requests in one replica until the first one has loaded and tells how many its engine wants.
FIRST_CONCURRENCY = 64
# Replicas are added when those there are have so large a share of the requests they can hold.
FULL = 0.7
# How often Ray Serve asks a replica whether it is well. One that says no three times goes; meanwhile its requests fail.
HEALTH_S = 1.0
# How often the driver looks: sooner than a replica can start, or a failure may come and go unseen.
LOOK_S = 0.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    engine: EngineConfig
    generation: GenerationParams
    max_outage_s: float
    cpus: float
    api_key_env: str | None
    broker: str  # the name of the `SecretsBroker`


class SecretsBroker:
    """The actor where replicas get what may not stand in Ray's metadata, and say how their loading went."""

    def __init__(self) -> None:
        self.secrets = Secrets({})
        self.concurrency: int | None = None
        self.refusal: ConfigError | None = None

    def open(self, secrets: Secrets) -> None:
        self.secrets = secrets

    def take(self) -> Secrets:
        return self.secrets

    def loaded(self, concurrency: int) -> None:
        self.concurrency = concurrency

    def refuse(self, error: ConfigError) -> None:
        self.refusal = error

    def news(self) -> tuple[int | None, ConfigError | None]:
        """What an engine holds at once, and why none can be loaded: as far as known."""
        return self.concurrency, self.refusal


class ServeReplica:
    """One engine, and the HTTP API in front of it."""

    def __init__(self, config: ReplicaConfig) -> None:
        import ray

        broker = ray.get_actor(config.broker, namespace=NAMESPACE)
        secrets: Secrets = ray.get(broker.take.remote())
        settle_environment(secrets, config.cpus)
        self.config = config
        self.key = secrets.values[config.api_key_env].strip() if config.api_key_env else None
        self.served = config.engine.model or config.engine.kind
        self.broken: str | None = None
        try:
            self.engine = load_engine(config.engine)
            self.engine.check(config.generation)
        except ConfigError as error:
            ray.get(broker.refuse.remote(error))
            raise
        if self.engine.remote is not None:
            self.engine.remote.attach(reserve_through_ray, config.max_outage_s)
        ray.get(broker.loaded.remote(self.engine.concurrency))

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces this replica when it raises."""
        if self.broken is not None:
            raise RuntimeError(self.broken)

    def __del__(self) -> None:
        if engine := self.__dict__.pop("engine", None):
            engine.close()

    async def __call__(self, http: HttpRequest) -> Response:
        try:
            return await self._respond(http)
        except EngineError as error:
            return self._failed(Failure.of(error))
        except Exception as error:  # a bug, ours or a library's: it ends this request and no other
            logger.exception("a bug")
            return self._failed(Failure("server", f"a bug: {type(error).__name__}: {one_line(error)}"))

    async def _respond(self, http: HttpRequest) -> Response:
        path = http.url.path.rstrip("/")
        if path == "/health":
            if self.broken is not None:
                raise EngineError("engine_crash", self.broken)
            return _json({"status": "ok"})
        self._admit(http.headers.get("authorization", ""))
        if path == "/v1/chat/completions":
            if http.method != "POST":
                raise EngineError("bad_request", f"{path} takes POST", status=405)
            return await self._chat(await http.body())
        model = {"id": self.served, "object": "model", "created": 0, "owned_by": "eagleray"}
        if path == "/v1/models":
            return _json({"object": "list", "data": [model]})
        if path == f"/v1/models/{self.served}":
            return _json(model)
        raise EngineError("not_found", f"there is nothing at {path:.200}", status=404)

    def _admit(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode(), (self.key or "").encode()) and scheme.lower() == "bearer"
        if self.key is not None and not right:
            raise EngineError("auth", "this endpoint needs its API key: authorization: Bearer …", status=401)

    async def _chat(self, content: bytes) -> Response:
        try:
            body = loads(content)
        except ValueError as error:
            raise invalid(f"the body: {error}") from None
        what = parse_chat_request(body, self.served, self.config.generation)
        if not what.stream:
            completion = await self.engine.generate(what.request)
            return self._failed(completion.error) if completion.error else _json(whole(what, completion))
        items = self.engine.stream(what.request)
        first = await anext(items)  # what fails before there is any text has a status of its own
        if isinstance(first, Completion) and first.error is not None:
            await items.aclose()
            return self._failed(first.error)
        return StreamingResponse(self._events(what, first, items), media_type="text/event-stream")

    async def _events(
        self, what: ChatRequest, item: Delta | Completion, items: AsyncGenerator[Delta | Completion, None]
    ) -> AsyncIterator[bytes]:
        chunks = Chunks(what)
        try:
            async with contextlib.aclosing(items):  # who hangs up stops the engine
                while isinstance(item, Delta):
                    yield chunks.piece(item)
                    item = await anext(items)
            if item.error is not None:
                self._failed(item.error)
            for chunk in chunks.end(item):
                yield chunk
        except Exception as error:
            logger.exception("a bug")
            yield event(error_body(Failure("server", f"a bug: {type(error).__name__}: {one_line(error)}")))

    def _failed(self, failure: Failure) -> Response:
        if failure.type == "engine_crash":
            self.broken = failure.message
        return _json(error_body(failure), status_of(failure))


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(dumps(value), status, media_type="application/json")


# -- the driver's side ------------------------------------------------------------------------------------------------


def serve_engine(config: Config, console: Console) -> None:
    """Serves until Ctrl-C or SIGTERM. Raises `ConfigError` or `Stopped` where it cannot."""
    import ray
    from ray import serve
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config.check(runs=False)
    placed = placement(config.hardware, config.engine)
    secrets = _secrets(config)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        # Ray prints notices there, from a thread of its own: at the end, that its controller died of what ends it.
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        own = stack.enter_context(running_ray())
        interrupts = stack.enter_context(note_signals())  # after Ray, which sets handlers of its own
        look_for_room(placed, own, console)
        if (found := serve.status()).proxies or found.applications:
            raise ConfigError("Ray Serve runs on this cluster already: end it first, with serve shutdown")
        address, port = _address(config, own), _port(config, own)
        name = f"eagleray-serve-{uuid.uuid4().hex[:8]}"
        # Beside this process and owned by it, as the limits are: it goes when this goes, and not with another node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
        broker = ray.remote(SecretsBroker).options(**options).remote()
        ray.get(broker.open.remote(secrets))
        limits = rate_limit_actor(config.engine) if config.engine.provider else None
        pool = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(serve.shutdown)  # comes before the end of the pool, whose deployment it ends
        loopback = address == "127.0.0.1"
        try:
            serve.start("HeadOnly" if loopback else "EveryNode", {"host": config.serve.host, "port": port})
        except (RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"cannot listen at serve.host={config.serve.host} serve.port={port}: {one_line(error)}"
            ) from None

        def deploy(concurrency: int) -> bool:
            return _wait(pool.submit(_deploy, config, placed, name, concurrency), broker, interrupts, placed, console)

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
        console.print(f"Ending; requests under way get {config.run.drain_s:g} s.", highlight=False)
        with contextlib.suppress(TimeoutError):  # a minute, whatever `drain_s` is
            serve.delete(NAME)  # lets them finish, which shutdown does not
        del limits


def _secrets(config: Config) -> Secrets:
    """What the replicas need of this process's environment. Raises `ConfigError` where the endpoint's key is not there."""
    variable = config.serve.api_key_env
    if variable and not os.environ.get(variable, "").strip():
        text = f"serve.api_key_env={variable}: there is no such environment variable, or it is empty"
        raise ConfigError(text, code=ErrorCode.KEY_MISSING, key="serve.api_key_env")
    names = secret_variables(config.engine) | ({variable} if variable else set())
    return Secrets({name: os.environ[name] for name in names if name in os.environ})


def _address(config: Config, own: bool) -> str:
    """Where this machine's clients find the endpoint. Raises `ConfigError` where none could."""
    import ray

    host = config.serve.host
    if own:
        return "127.0.0.1" if host in ("0.0.0.0", "::", *LOOPBACK) else host
    head = next(node["NodeManagerAddress"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    if host not in LOOPBACK:
        return str(head)
    if head not in ("127.0.0.1", ray.util.get_node_ip_address()):
        raise ConfigError(f"serve.host={host} would be the head node's ({head}) own, out of reach: set serve.host=0.0.0.0")
    return "127.0.0.1"


def _port(config: Config, own: bool) -> int:
    """Raises `ConfigError` where the port is taken, as far as this machine tells."""
    host, port = config.serve.host, config.serve.port
    if port and not own:
        return port
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(f"cannot listen at serve.host={host} serve.port={port}: {error.strerror or error}") from None


def _deploy(config: Config, placed: Placement, broker: str, concurrency: int) -> None:
    """Brings the deployment to this; of one that runs only the limits may differ, which leaves its replicas alone."""
    from ray import serve

    replica = ReplicaConfig(
        engine=spread(config.engine, placed),
        generation=config.params(),
        max_outage_s=config.run.max_outage_s,
        cpus=config.hardware.cpus,
        api_key_env=config.serve.api_key_env,
        broker=broker,
    )
    scale: dict[str, Any] = {"num_replicas": placed.low}
    if placed.high > placed.low:
        target = max(1.0, FULL * concurrency)
        bounds = {"min_replicas": placed.low, "max_replicas": placed.high}
        scale = {"autoscaling_config": {**bounds, "target_ongoing_requests": target}}
    deployment = serve.deployment(ServeReplica).options(
        name="engine",
        version="1",  # of the code: another one, which is the default, would start all replicas anew
        _internal=True,
        max_ongoing_requests=concurrency,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=config.run.drain_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_S,
        **scale,
        **serve_options(placed),
    )
    serve.run(deployment.bind(replica), name=NAME, route_prefix="/")


def _wait(deployed: Future[None], broker: Any, interrupts: list[int], placed: Placement, console: Console) -> bool:
    """Waits for a deployment; False where Ctrl-C came first. Raises `ConfigError` or `Stopped` where no engine loads."""
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
            text = f"No replica works yet: each asks for {placed.wish()}, and may be loading its model."
            console.print(Text(text, "yellow"), soft_wrap=True)
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
        console.print(Text("Whoever reaches this machine can use it: serve.api_key_env asks for a key.", "yellow"))


def _watch(interrupts: list[int], console: Console) -> None:
    """Until Ctrl-C; says when replicas die and when they are back."""
    from ray import serve

    state, looked = "RUNNING", time.monotonic()
    while not interrupts:
        time.sleep(0.1)
        if time.monotonic() > looked + LOOK_S:
            looked = time.monotonic()
            app = serve.status().applications.get(NAME)
            if app is None:
                raise Stopped("Ray Serve was ended by somebody else")
            if app.status != state and app.status in ("RUNNING", "UNHEALTHY"):
                state = app.status
                text = "All replicas work." if state == "RUNNING" else "A replica failed; Ray Serve starts another."
                console.print(Text(text, "yellow"), soft_wrap=True)
