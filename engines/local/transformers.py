"""`engine=transformers`: any causal language model of Hugging Face transformers, on any device that it supports.

Models with image input take images through their processor (engines/local/vision.py).

One thread owns the model. It takes the oldest waiting row and rows with prompts of similar length, decodes them together
(left padding, one KV cache), and drops rows from the batch as they finish. Each row has its own sampling settings, random
numbers, stop texts and limit. In float32 a row's answer does not depend on the other rows of its batch. In bfloat16 and
float16 the last bits of its logits do, so a near-tie between two tokens may be decided differently.

`model` is a checkpoint directory or a hub id (`HF_HUB_OFFLINE=1` uses only the local cache). `adapter` is a LoRA adapter of
peft, merged into the weights unless they are quantised. `kwargs` are those of `from_pretrained` (`torch_dtype`,
`device_map`, `attn_implementation`, `quantization_config`, …), the attributes of the model's config, and
  `load_in_4bit`, `load_in_8bit`   quantise with bitsandbytes; the `bnb_4bit_*` and `llm_int8_*` keywords refine it
  `max_batch_size`                 rows decoded together (default: `max_concurrency`, or 32)
  `continuous_batching`            transformers' own, for rows that it supports (default: if flash attention is
                                   installed on a GPU); or its settings, as transformers' `ContinuousBatchingConfig`
  `max_model_len`                  the context, prompt and answer (default: the config's `max_position_embeddings`)
  `chat_template`                  a template's text, or the path of its file
  `chat_template_kwargs`           further variables of the template (for example `enable_thinking`)
  `pooling`, `normalize`, `prompt_name`, `truncate`   of tasks other than chats: see docs/engines.md

Usage counts every generated token except the one that ends an answer (end of sequence, `stop_token_ids`): that token is
not in the text, the usage or the logprobs. Logprobs are the model's own, before penalties and temperature.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from dataclasses import replace
from typing import Any

import torch

from engines.base import ModelEngine
from engines.config import Capabilities
from engines.errors import EngineError, invalid
from engines.local.transformers_batching import Batcher
from engines.local.transformers_decoding import decode_text
from engines.local.transformers_model import TransformersModel
from engines.local.transformers_row import GenerationRow
from engines.local.transformers_tasks import TransformersTasks
from engines.local.vision import has_images
from engines.media import in_thread_with_media
from engines.params import GenerationParams
from engines.registry import declared_capabilities
from engines.tasks import CHAT
from engines.text import counted, cut_at_stop, for_template, one_line, parse_tool_calls
from engines.types import DEFAULT_MAX_TOKENS, Choice, Completion, Message, Request, answer
from engines.usage import Usage

_DEFAULT_BATCH = 32
# Requests in flight with continuous batching: as many as transformers runs at once.
_CONTINUOUS = 1024
# Requests in flight of an encoder or a classifier: so many texts are sorted by length at once.
_TEXTS = 1024


class TransformersEngine(ModelEngine):
    """A checkpoint of Hugging Face transformers. Loading raises `ConfigError` for a wrong configuration."""

    kind = "transformers"
    capabilities = declared_capabilities("transformers")

    loaded: TransformersModel
    batcher: Batcher | None = None  # None: the checkpoint has no chats
    _tasks: TransformersTasks | None = None  # made by the first request of another task

    def _load(self) -> None:
        self.loaded = TransformersModel(self.config)
        self.device: torch.device = self.loaded.model.device
        kwargs = self.loaded.kwargs
        self.template_variables: dict[str, Any] = kwargs.get("chat_template_kwargs", {})
        if CHAT in self.loaded.tasks:
            most = kwargs.get("max_batch_size") or self.config.max_concurrency or _DEFAULT_BATCH
            self.batcher = Batcher(self.loaded, most)

    def capabilities_for(self, request: Request) -> Capabilities:
        return replace(self.capabilities, images=self.loaded.vision is not None, tasks=self.loaded.tasks)

    @property
    def concurrency(self) -> int:
        # More than one batch: the batcher can choose between lengths, and the next batch is there in time.
        if self.config.max_concurrency:
            return self.config.max_concurrency
        if self.batcher is None:
            return _TEXTS
        return _CONTINUOUS if self.batcher.continuous else 4 * self.batcher.max_batch_size

    @property
    def lowered_to(self) -> int | None:
        return self.batcher.lowered_to if self.batcher else None

    async def _evaluate(self, request: Request) -> Completion:
        return await self.tasks.evaluate(request)

    @property
    def tasks(self) -> TransformersTasks:
        """Answers requests of tasks other than chats."""
        if self._tasks is None:
            use = self.batcher.exclusive if self.batcher else contextlib.nullcontext
            self._tasks = TransformersTasks(self.loaded, self.loaded.kwargs.get("max_batch_size"), use, self._render)
        return self._tasks

    def _render(self, messages: list[Message], continues: bool) -> str:
        """A whole conversation as text; if `continues`, without the template's end of the last message."""
        self._check_template()
        plain = [for_template(message) for message in messages]
        try:
            return str(
                self.loaded.tokenizer.apply_chat_template(
                    plain, tokenize=False, continue_final_message=continues, **self.template_variables
                )
            )
        except Exception as error:  # as in `_prompt`
            raise invalid(f"the chat template refuses these messages: {one_line(error)}") from error

    def _check_template(self) -> None:
        if not self.loaded.tokenizer.chat_template:
            reason = f"'{self.config.model}' has no chat template: give one in engine.kwargs.chat_template"
            raise EngineError("bad_request", reason, scope="run")

    async def _generate(self, request: Request) -> Completion:
        assert self.batcher is not None
        rows = await in_thread_with_media(self._rows, request)
        submitted = time.perf_counter()
        try:
            self.batcher.submit(rows)
            await asyncio.gather(*(asyncio.wrap_future(row.future) for row in rows))
        finally:
            for row in rows:  # if cancelled, or if one failed: the others leave their batch at its next step
                row.future.cancel()
        usage = Usage(input=len(rows[0].prompt), output=sum(len(row.tokens) for row in rows))
        # transformers' continuous batching does not tell when it admits a row.
        starts = [row.started for row in rows]
        queued_s = min(starts) - submitted if all(starts) else None
        return Completion([self._choice(row) for row in rows], usage, queued_s=queued_s)

    def _rows(self, request: Request) -> list[GenerationRow]:
        """The tokenised request, as one row per answer. Raises `EngineError` for a request that the model cannot take."""
        params, loaded = request.generation, self.loaded
        if params.repetition_penalty == 0:
            raise invalid("repetition_penalty must be more than 0")
        for token in params.logit_bias or ():
            if not 0 <= int(token) < loaded.vocab:
                raise invalid(f"logit_bias names the token {token}, the vocabulary has {loaded.vocab}")
        prompt, images = self._prompt(request.messages, params, request.continue_answer)
        limit = params.max_tokens or DEFAULT_MAX_TOKENS
        if loaded.context is not None:
            if len(prompt) >= loaded.context:
                reason = f"the prompt has {counted(len(prompt), 'token')}, the context holds {loaded.context}"
                raise EngineError("context_length", reason)
            limit = min(limit, loaded.context - len(prompt))
        stop_tokens = {loaded.special[stop] for stop in params.stop or () if stop in loaded.special}
        stop_ids = loaded.eos | stop_tokens | frozenset(params.stop_token_ids or ())
        seed = random.getrandbits(62) if params.seed is None else params.seed
        generators = [torch.Generator(self.device).manual_seed((seed + i) % 2**63) for i in range(params.n or 1)]
        wanted = params.response_format
        return [
            GenerationRow(
                prompt, params, limit, stop_ids, generator, loaded.grammars.matcher(wanted) if wanted else None, images
            )
            for generator in generators
        ]

    def _prompt(
        self, messages: list[Message], params: GenerationParams, continues: bool
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The prompt's token ids, and the processor's tensors for its images."""
        self._check_template()
        variables = {
            "add_generation_prompt": not continues,
            "continue_final_message": continues,
            **self.template_variables,
            **self._template_arguments(params),
        }
        loaded, images = self.loaded, dict[str, torch.Tensor]()
        prompt: list[int]
        try:
            if loaded.vision and has_images(messages):
                prompt, images = loaded.vision.read(messages, loaded.tokenizer.chat_template, variables)
            else:
                plain = [for_template(message, parts=loaded.takes_images) for message in messages]
                prompt = loaded.tokenizer.apply_chat_template(plain, return_dict=False, **variables)
        except EngineError:
            raise
        except Exception as error:  # a template is a program that came with the model: it may raise any exception
            raise invalid(f"the chat template refuses these messages: {one_line(error)}") from error
        if not prompt:
            raise invalid("the chat template renders an empty prompt for these messages")
        return prompt, images

    def _template_arguments(self, params: GenerationParams) -> dict[str, Any]:
        """The request's variables of the chat template. Raises `EngineError("invalid_input")` if it does not use them."""
        if params.tool_choice not in (None, "auto", "none"):
            raise invalid("engine=transformers supports tool_choice auto and none only")
        tools = None if params.tool_choice == "none" else params.tools
        template: str = self.loaded.tokenizer.get_chat_template(tools=tools)
        wanted = {"tools": tools, "reasoning_effort": params.reasoning_effort}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        for name in wanted:
            if name not in template:
                raise invalid(f"the chat template of '{self.config.model}' has no place for {name}")
        return wanted

    def _choice(self, row: GenerationRow) -> Choice:
        text = cut_at_stop(decode_text(self.loaded.tokenizer, row.tokens), row.params.stop or ())
        if row.finish == "length":
            text = text.rstrip("\ufffd")  # the limit cut a character
        logprobs = None if row.params.logprobs is None else row.logprobs
        if row.params.tools and row.params.tool_choice != "none":
            rest, calls = parse_tool_calls(text)
            if calls:
                return Choice(answer(rest, calls), "tool_calls", logprobs)
        return Choice(answer(text), row.finish, logprobs)

    def close(self) -> None:
        """Stops the thread and frees the model. Requests that run or wait fail with "cancelled". Can be called twice."""
        if self.batcher:
            self.batcher.close()
        if self._tasks:
            self._tasks.close()
        self.loaded.model = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing if CUDA is not in use
