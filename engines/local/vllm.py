"""`engine=vllm`: vLLM in this process, `AsyncLLM` behind vLLM's own request handlers, without HTTP.

The engine hands vLLM's chat layer the body that a vLLM server would get, and `engines.remote.openai_chat` reads the answer.
So templates, tools, reasoning parsers, structured output, images, log probabilities and adapters are vLLM's own.
`engine.kwargs` are the arguments of `vllm serve` (`tensor_parallel_size`, `max_model_len`, `tool_call_parser`, …).
Tasks other than a chat are in `vllm_tasks.py`. The checkpoint, `runner` and `convert` decide which ones the engine has.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from engines.local import vllm_log  # isort: skip  # first: vLLM configures its log when it is imported
from engines.local import vllm_fork_server  # isort: skip  # second: its server imports vLLM while this process does

from starlette.datastructures import State
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncEngineArgs, AsyncLLM

from engines.base import ModelEngine
from engines.config import Capabilities
from engines.environment import changed_environment
from engines.errors import ConfigError, EngineError, engine_died, invalid, nearest
from engines.local import process_guard, vllm_executor
from engines.local.images import open_image
from engines.local.vllm_adapters import AdapterGate, adapter_path, adapter_rank
from engines.local.vllm_tasks import VLLMTasks
from engines.media import in_thread_with_media
from engines.params import GenerationParams
from engines.registry import declared_capabilities
from engines.remote import openai_chat
from engines.remote.errors import failure
from engines.remote.provider import Provider
from engines.remote.sse import SSEParser
from engines.remote.wire_format import read_answer
from engines.text import one_line
from engines.types import DEFAULT_MAX_TOKENS, Completion, Request

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

vllm_fork_server.use()
T = TypeVar("T")

PROVIDER = Provider(
    formats={name: f"structured_outputs.{name}" for name in ("regex", "choice", "grammar")},
    developer_role=True,
    reasoning_history="all",
    finish_reasons={"repetition": "length"},
    prefill="continue_final_message",
)


class VLLMEngine(ModelEngine):
    """One model on the GPUs that its parallel sizes need. Rows may have different adapters.

    Loading raises `ConfigError` for a wrong configuration, and `EngineError("engine_crash")` if a process of vLLM dies.
    """

    kind = "vllm"
    capabilities = declared_capabilities("vllm")

    def _load(self) -> None:
        config = self.config
        if config.model is None:
            raise ConfigError("engine=vllm needs engine.model: a checkpoint directory or a hub id", key="engine.model")
        args = self._arguments()
        self.log_start = vllm_log.size()
        self.adapters: dict[str, asyncio.Task[None]] = {}
        self.state: Any = State()
        # vLLM's tasks need one event loop; callers may be in any other.
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
                raise ConfigError(f"engine=vllm cannot start: {one_line(error)}", key="engine=vllm") from error
            # vLLM's processes died. The cause may be this node, so the worker may try again on another one.
            text = vllm_log.last_error(self.log_start) or one_line(error)
            raise engine_died(f"engine=vllm cannot start: {text}") from error

    def _arguments(self) -> Any:
        """vLLM's arguments: its defaults, then `kwargs`. Raises `ConfigError` for an unknown one."""
        config = self.config
        args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        given = {**config.kwargs, "model": config.model, "revision": config.revision}
        if "chat_template_kwargs" in given:  # the name that all local engines use
            given["default_chat_template_kwargs"] = given.pop("chat_template_kwargs")
        if config.adapter is not None:
            given = {"enable_lora": True, "max_lora_rank": adapter_rank(config.adapter), **given}
        for name, value in given.items():
            if not hasattr(args, name):
                raise ConfigError(
                    f"engine.kwargs.{name} is not known to engine=vllm{nearest(name, vars(args))}", key="engine=vllm"
                )
            if value is not None:
                setattr(args, name, value)
        if given.get("tool_call_parser"):
            args.enable_auto_tool_choice = True
        # vLLM fetches nothing: requests come with their media (`load_media`). No server has a name under `invalid`.
        args.allowed_media_domains = given.get("allowed_media_domains") or ["media.invalid"]
        # Sampling parameters come from the request, not from the checkpoint's generation_config.json.
        args.generation_config = given.get("generation_config", "vllm")
        vllm_executor.choose(args)
        return args

    async def _start(self, args: Any) -> None:
        # The defaults for offline use: batches are several times as large as those of a server (16,384 tokens on an H100).
        offline = UsageContext.LLM_CLASS
        vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=offline)
        if vllm_config.parallel_config.distributed_executor_backend == "ray":  # other nodes do not have the file
            vllm_config.logging_config.pylogging_config_file = None
            os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)
        with _cpu_threads(vllm_config):
            self.llm = AsyncLLM.from_vllm_config(vllm_config, usage_context=offline)
        self.guard = process_guard.follow(process.pid or 0 for process in multiprocessing.active_children())
        supported = await self.llm.get_supported_tasks()
        await init_app_state(self.llm, self.state, args, supported)
        self.tasks = VLLMTasks(self.llm, self.state, supported)
        self.able = replace(self.capabilities, tasks=self.tasks.tasks)
        self.max_model_len = vllm_config.model_config.max_model_len
        self.max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        self.lora = vllm_config.lora_config is not None
        self.gate = AdapterGate() if self.lora and current_platform.is_cpu() else None
        if self.config.adapter is not None:
            try:
                await self._adapter(self.config.adapter)
            except EngineError as error:
                if error.type == "engine_crash":  # it may work on another node
                    raise
                raise ConfigError(f"engine.adapter: {error}", key="engine.adapter") from None

    def _call(self, work: Coroutine[Any, Any, T]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    @property
    def concurrency(self) -> int:
        # Twice the rows that vLLM runs at once: rows of equal length end together, and the next ones must be queued then.
        return self.config.max_concurrency or 2 * self.max_num_seqs

    def inspect_image(self, data: bytes) -> None:
        open_image(data, self.config.media_max_pixels).close()

    def capabilities_for(self, request: Request) -> Capabilities:
        return self.able

    async def _generate(self, request: Request) -> Completion:
        return await asyncio.wrap_future(self._call(self._ask(request)))

    async def _evaluate(self, request: Request) -> Completion:
        return await asyncio.wrap_future(self._call(self._values(request)))

    async def _ask(self, request: Request) -> Completion:
        """Answers a chat; runs in vLLM's event loop."""
        body = await in_thread_with_media(self._body, request)
        answer = await self._inside(request, lambda: self._chat(request, body))
        completion = read_answer(openai_chat, answer if isinstance(answer, dict) else answer.model_dump(), PROVIDER)
        completion.model = self._name(request)
        completion.queued_s = None  # vLLM's answers do not tell it
        return completion

    async def _values(self, request: Request) -> Completion:
        """Answers a request of another task; runs in vLLM's event loop."""
        name, fields = str(self._name(request)), {**self.config.extra_body, **request.extra_body}
        messages = openai_chat.body(replace(request, generation=GenerationParams()), name, PROVIDER)["messages"]
        work = functools.partial(self.tasks.evaluate, request, name, fields, messages)
        completion: Completion = await self._inside(request, work)
        completion.model, completion.queued_s = name, None
        return completion

    def _name(self, request: Request) -> str | None:
        return request.adapter or self.config.adapter or self.config.model

    async def _inside(self, request: Request, work: Callable[[], Awaitable[Any]]) -> Any:
        """The result of work in vLLM with the request's adapter. An error of vLLM becomes an `EngineError`."""
        adapter = request.adapter or self.config.adapter
        if adapter is not None:
            await self._adapter(adapter)
        if self.gate is not None:
            await self.gate.enter(adapter is not None)
        try:
            answer = await work()
        except EngineError:
            raise
        except Exception as error:  # vLLM's server turns exceptions into answers in the same way
            answer = create_error_response(error)
        finally:
            if self.gate is not None:
                self.gate.leave()
        self._check_alive()
        if isinstance(answer, ErrorResponse):
            raise failure(answer.error.code, answer.model_dump_json().encode(), {})
        return answer

    def _body(self, request: Request) -> dict[str, Any]:
        """The body of a chat completion request."""
        body = openai_chat.body(request, self._name(request), PROVIDER)
        # The defaults of all local engines: greedy, with a limit of output tokens.
        defaults = {"temperature": 0.0, "max_tokens": DEFAULT_MAX_TOKENS}
        body = {**defaults, **body, **self.config.extra_body, **request.extra_body}
        body["max_tokens"] = min(body["max_tokens"], self.max_model_len)  # vLLM subtracts the prompt by itself
        return body if request.stream is None else body | openai_chat.STREAM

    async def _chat(self, request: Request, body: dict[str, Any]) -> Any:
        """vLLM's answer: an object of vLLM, or a dict if it was streamed."""
        asked = ChatCompletionRequest.model_validate(body)
        answer = await self.state.openai_serving_chat.create_chat_completion(asked)
        if request.stream is None or isinstance(answer, ErrorResponse):
            return answer
        parser = SSEParser(openai_chat.accumulator(), request.stream)
        async for event in answer:
            parser.feed(event.encode())
        payload = parser.payload()
        if error := payload.get("error"):
            return ErrorResponse(error=error)
        return payload

    async def _adapter(self, adapter: str) -> None:
        """Loads an adapter into vLLM, once. Raises `EngineError("invalid_input")` if it cannot be loaded."""
        if not self.lora:
            raise invalid(f"adapter '{adapter}': set engine.adapter, or engine.kwargs.enable_lora=true and max_loras")
        if adapter not in self.adapters:
            self.adapters[adapter] = asyncio.create_task(self._load_adapter(adapter))
        try:
            await asyncio.shield(self.adapters[adapter])
        except EngineError as error:
            self.adapters.pop(adapter, None)  # the next row tries again: the cause may be gone
            self._check_alive()
            raise invalid(str(error)) from None  # a new exception for each row

    async def _load_adapter(self, adapter: str) -> None:
        models = self.state.openai_serving_models
        path = str(await asyncio.to_thread(adapter_path, adapter))
        answered = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=adapter, lora_path=path))
        if not isinstance(answered, str):
            raise invalid(f"adapter '{adapter}' cannot be loaded: {one_line(ValueError(answered.error.message))}")

    def _check_alive(self) -> None:
        """Raises `EngineError("engine_crash")` if vLLM's engine has died."""
        if self.llm.errored:
            text = vllm_log.last_error(self.log_start) or one_line(self.llm.dead_error)
            raise engine_died(f"vLLM's engine died: {text}")

    def close(self) -> None:
        """Stops vLLM and the processes that it started."""
        if hasattr(self, "llm"):
            self._call(self._stop()).result()
            del self.llm, self.state
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _stop(self) -> None:
        if self.llm.output_handler is not None:  # otherwise it logs the engine's end as an error
            self.llm.output_handler.cancel()
        self.llm.shutdown(timeout=10)
        self.guard.kill()
        self.guard.wait()


@contextlib.contextmanager
def _cpu_threads(vllm_config: Any) -> Iterator[None]:
    """The environment of vLLM's processes on CPUs. Both cores of a machine with two compute; vLLM would keep one free for
    its scheduler. OMP_THREAD_LIMIT is hidden: vLLM starts a thread for each of its cores in spite of it, and those over the
    limit leave their part of a product empty, without an error."""
    if not current_platform.is_cpu():
        yield
        return
    parallel, cores = vllm_config.parallel_config, os.sched_getaffinity(0)
    wanted: dict[str, str | None] = {"OMP_THREAD_LIMIT": None}
    chosen = {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"} & os.environ.keys()
    if len(cores) == 2 and parallel.world_size == 1 and not chosen:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(cores)))
    with changed_environment(wanted), vllm_executor.omp_environment(vllm_config):
        yield
