"""`engine=vllm`: vLLM in this process, `AsyncLLM` behind vLLM's own chat layer, with no HTTP between.

A request goes in as the body that a vLLM server would get and comes out as its answer, so templates, tools, reasoning
parsers, structured output, images, log probabilities and adapters are vLLM's own, and are read by
`engines.remote.openai_chat`. `engine.kwargs` are all that `vllm serve` takes (`tensor_parallel_size`, `max_model_len`,
`tool_call_parser`, …).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from engines.local import vllm_log  # isort: skip  # first: vLLM settles its logs when it is imported

from starlette.datastructures import State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncEngineArgs, AsyncLLM

from engines.base import ModelEngine
from engines.config import Capabilities
from engines.errors import ConfigError, EngineError, invalid, nearest
from engines.local import process_guard
from engines.remote import openai_chat
from engines.remote.errors import failure
from engines.remote.provider import Provider
from engines.remote.sse import SSEParser
from engines.text import one_line
from engines.types import DEFAULT_MAX_TOKENS, Completion, Request

T = TypeVar("T")

# The ranks vLLM has kernels for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

PROVIDER = Provider(
    formats={name: f"structured_outputs.{name}" for name in ("regex", "choice", "grammar")},
    developer_role=True,
    reasoning_history="all",
    finish_reasons={"repetition": "length"},
)


class AdapterGate:
    """Keeps rows with an adapter and rows without one from being in the engine together.

    On CPU vLLM gives the latter the last adapter's weights, without a word (vllm-project/vllm, pull request 48421).
    Each side lets in all that wait, then those that come while nobody waits on the other.
    """

    def __init__(self) -> None:
        self.side = False
        self.inside = 0
        self.waiting: dict[bool, deque[asyncio.Future[None]]] = {False: deque(), True: deque()}

    async def enter(self, side: bool) -> None:
        if not self.inside or (side == self.side and not self.waiting[not side]):
            self.side = side
            self.inside += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self.waiting[side].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self.waiting[side]:
                self.waiting[side].remove(turn)
            elif not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self.inside -= 1
        if self.inside:
            return
        if self.waiting[not self.side]:
            self.side = not self.side
        for turn in self.waiting[self.side]:
            if not turn.done():
                turn.set_result(None)
                self.inside += 1
        self.waiting[self.side].clear()


class VLLMEngine(ModelEngine):
    """One model, on as many GPUs as its parallel sizes say; adapters may differ from row to row."""

    kind = "vllm"
    capabilities = Capabilities(images=True, row_adapter=True)

    def _load(self) -> None:
        config = self.config
        if config.model is None:
            raise ConfigError("engine=vllm needs engine.model: a checkpoint directory or a hub id")
        args = self._arguments()
        self.log_start = vllm_log.size()
        self.adapters: dict[str, asyncio.Task[None]] = {}
        self.state: Any = State()
        # vLLM's tasks live in one event loop; callers may come from any.
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self.thread.start()
        try:
            self._call(self._start(args)).result()
        except (ConfigError, EngineError):
            self.close()
            raise
        except Exception as error:
            self.close()
            if not isinstance(error, RuntimeError):
                raise ConfigError(f"engine=vllm cannot start: {one_line(error)}") from error
            # What its own processes die of may be this node's fault, and another one's luck.
            text = vllm_log.last_error(self.log_start) or one_line(error)
            raise EngineError("engine_crash", f"engine=vllm cannot start: {text}") from error

    def _arguments(self) -> Any:
        """vLLM's own, with `kwargs` laid over. Raises `ConfigError` for one it does not know."""
        config = self.config
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        given = {**config.kwargs, "model": config.model, "revision": config.revision}
        if "chat_template_kwargs" in given:  # the name all local engines share
            given["default_chat_template_kwargs"] = given.pop("chat_template_kwargs")
        if config.adapter is not None:
            given = {"enable_lora": True, "max_lora_rank": _rank(config.adapter), **given}
        for name, value in given.items():
            if not hasattr(args, name):
                raise ConfigError(f"engine.kwargs.{name} is not known to engine=vllm{nearest(name, vars(args))}")
            if value is not None:
                setattr(args, name, value)
        if given.get("tool_call_parser"):
            args.enable_auto_tool_choice = True
        # How to sample is asked for, not found in the checkpoint's generation_config.json.
        args.generation_config = given.get("generation_config", "vllm")
        return args

    async def _start(self, args: Any) -> None:
        vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        if vllm_config.parallel_config.distributed_executor_backend == "ray":  # other nodes do not have our file
            vllm_config.logging_config.pylogging_config_file = None
            os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)
        with _both_cores(vllm_config.parallel_config.world_size):
            self.llm = AsyncLLM.from_vllm_config(vllm_config)
        self.guard = process_guard.follow(process.pid or 0 for process in multiprocessing.active_children())
        await init_app_state(self.llm, self.state, args, await self.llm.get_supported_tasks())
        self.max_model_len = vllm_config.model_config.max_model_len
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.lora = vllm_config.lora_config is not None
        self.turns = AdapterGate() if self.lora and current_platform.is_cpu() else None
        if self.config.adapter is not None:
            try:
                await self._adapter(self.config.adapter)
            except EngineError as error:
                if error.type == "engine_crash":  # another node may have more luck
                    raise
                raise ConfigError(f"engine.adapter: {error}") from None

    def _call(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    @property
    def concurrency(self) -> int:
        # Twice what it runs at once: rows of equal length end together, and the next ones must be inside by then.
        return self.config.max_concurrency or 2 * self.max_num_seqs

    async def _generate(self, request: Request) -> Completion:
        return await asyncio.wrap_future(self._call(self._ask(request)))

    async def _ask(self, request: Request) -> Completion:
        adapter = request.adapter or self.config.adapter
        if adapter is not None:
            await self._adapter(adapter)
        body = openai_chat.body(request, adapter or self.config.model, PROVIDER)
        # As with the other local engines: greedy, and bounded, unless told otherwise.
        body = {"temperature": 0.0, "max_tokens": DEFAULT_MAX_TOKENS, **body, **self.config.extra_body}
        body["max_tokens"] = min(body["max_tokens"], self.max_model_len)  # vLLM takes off the prompt's part by itself
        if request.stream is not None:
            body |= openai_chat.STREAM
        if self.turns is not None:
            await self.turns.enter(adapter is not None)
        try:
            answer = await self.state.openai_serving_chat.create_chat_completion(ChatCompletionRequest.model_validate(body))
            if request.stream is not None and not isinstance(answer, ErrorResponse):
                parser = SSEParser(openai_chat.accumulator(), request.stream)
                async for event in answer:
                    parser.feed(event.encode())
                answer = parser.payload()
                if error := answer.get("error"):
                    answer = ErrorResponse(error=error)
        except EngineError:
            raise
        except Exception as error:  # as its server does
            answer = create_error_response(error)
        finally:
            if self.turns is not None:
                self.turns.leave()
        self._check_alive()
        if isinstance(answer, ErrorResponse):
            raise failure(answer.error.code, answer.model_dump_json().encode(), {})
        completion = openai_chat.completion(answer if isinstance(answer, dict) else answer.model_dump(), PROVIDER)
        completion.model = adapter or self.config.model
        return completion

    async def _adapter(self, adapter: str) -> None:
        """Makes an adapter known to vLLM, once. Raises `EngineError("invalid_input")`."""
        if not self.lora:
            raise invalid(f"adapter '{adapter}': set engine.adapter, or engine.kwargs.enable_lora=true and max_loras")
        if adapter not in self.adapters:
            self.adapters[adapter] = asyncio.create_task(self._load_adapter(adapter))
        try:
            await asyncio.shield(self.adapters[adapter])
        except EngineError as error:
            self.adapters.pop(adapter, None)  # what came in its way may be gone when the next row asks
            self._check_alive()
            raise invalid(str(error)) from None  # a new one for each row that asks

    async def _load_adapter(self, adapter: str) -> None:
        models = self.state.openai_serving_models
        path = str(await asyncio.to_thread(_adapter_path, adapter))
        said = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=adapter, lora_path=path))
        if not isinstance(said, str):
            raise invalid(f"adapter '{adapter}' cannot be loaded: {one_line(ValueError(said.error.message))}")

    def _check_alive(self) -> None:
        if self.llm.errored:
            text = vllm_log.last_error(self.log_start) or one_line(self.llm.dead_error)
            raise EngineError("engine_crash", f"vLLM's engine died: {text}")

    def close(self) -> None:
        if hasattr(self, "llm"):
            self._call(self._stop()).result()
            del self.llm, self.state
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _stop(self) -> None:
        if self.llm.output_handler is not None:  # or it would report the end of the engine as a disaster
            self.llm.output_handler.cancel()
        self.llm.shutdown(timeout=10)
        self.guard.kill()
        self.guard.wait()


@contextlib.contextmanager
def _both_cores(ranks: int) -> Iterator[None]:
    """vLLM on CPU keeps a core free for its scheduler: of two that is half, and both make 1.3 times the tokens."""
    name = "VLLM_CPU_OMP_THREADS_BIND"
    cores = os.sched_getaffinity(0) if current_platform.is_cpu() and ranks == 1 else ()
    if len(cores) != 2 or {name, "VLLM_CPU_NUM_OF_RESERVED_CPU"} & os.environ.keys():
        yield
        return
    os.environ[name] = ",".join(map(str, sorted(cores)))
    try:
        yield
    finally:
        del os.environ[name]


def _adapter_path(adapter: str) -> Path:
    """The directory of an adapter; one on the hub is fetched once for a node. Raises `EngineError("invalid_input")`."""
    try:
        path = Path(adapter).expanduser()
        here = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL in it, no such user's home
        raise invalid(f"there is no adapter {adapter[:200]!r}: {one_line(error)}") from None
    if not here and (adapter.count("/") != 1 or adapter.startswith((".", "/", "~"))):
        raise invalid(f"there is no adapter '{adapter}': neither a directory nor a hub id")
    if not here:
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(adapter))
        except Exception as error:  # its kinds are many, and all mean the same here
            raise invalid(f"adapter '{adapter}' cannot be had from the hub: {one_line(error)}") from None
    if not (path / "adapter_config.json").is_file():
        raise invalid(f"adapter '{adapter}' has no adapter_config.json")
    return path


def _rank(adapter: str) -> int:
    """The rank to make room for, of those vLLM has."""
    try:
        rank = int(json.loads((_adapter_path(adapter) / "adapter_config.json").read_text())["r"])
    except EngineError as error:
        raise ConfigError(f"engine.adapter: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"engine.adapter: {adapter}/adapter_config.json tells no rank r") from None
    found = next((known for known in LORA_RANKS if known >= rank), None)
    if found is None:
        raise ConfigError(f"engine.adapter: rank {rank} is above {LORA_RANKS[-1]}, the most vLLM takes")
    return found
