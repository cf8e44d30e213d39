"""`engine=transformers`: any causal language model of Hugging Face transformers, on any device it runs on.

Models that see take images, too, through their processor (engines/local/vision.py).

One thread owns the model. It takes the oldest waiting row and those nearest to it in prompt length, decodes them
together (left padding, one KV cache), and drops rows from the batch as they finish. Every row has its own sampling
settings, random numbers, stops and limit, so what shares a batch with it changes nothing but the last bits of
its logits: in float32 answers are the same alone and in company; in bfloat16 and float16 a near-tie may fall otherwise.

The decode loop is ours, not `model.generate`: that one has a single generator and one set of settings for a batch.
What it does to the logits is done by the same classes here, in the same order.

`model` is a checkpoint directory or a hub id (`HF_HUB_OFFLINE=1` keeps to the local cache). `adapter` is a LoRA of
peft, merged into the weights unless they are quantised. `kwargs` are those of `from_pretrained` (`torch_dtype`,
`device_map`, `attn_implementation`, `quantization_config`, …), the attributes of the model's config and
  `load_in_4bit`, `load_in_8bit`   quantise with bitsandbytes; its `bnb_4bit_*` and `llm_int8_*` go along
  `max_batch_size`                 rows decoded together (default: `max_concurrency`, or 32)
  `continuous_batching`            transformers' own, for rows that it can do (default: where flash attention is
                                   installed on a GPU); or its settings, as transformers' `ContinuousBatchingConfig`
  `max_model_len`                  the context, prompt and answer (default: the config's `max_position_embeddings`)
  `chat_template`                  a template's text, or the path of a file of it
  `chat_template_kwargs`           further variables for it (`enable_thinking`, say)

Every token computed counts, but for the one that ends an answer (end of sequence, `stop_token_ids`): it is in neither
the text nor the usage nor the logprobs. Logprobs are the model's own, before penalties and temperature.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import queue
import random
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from llguidance.hf import from_tokenizer
from torch.nn.utils.rnn import pad_sequence

from engines.base import ModelEngine
from engines.config import Capabilities
from engines.errors import ConfigError, EngineError, invalid
from engines.local.continuous_batching import Continuous
from engines.local.continuous_batching import check as check_continuous
from engines.local.continuous_batching import suits as suits_continuous
from engines.local.grammar import Grammars
from engines.local.transformers_row import GenerationRow
from engines.local.vision import Vision, has_images, sees, shapes, together
from engines.params import GenerationParams
from engines.text import check_kwargs, cut_at_stop, for_template, load_chat_template, one_line, parse_tool_calls
from engines.types import DEFAULT_MAX_TOKENS, Choice, Completion, Message, Request, answer
from engines.usage import Usage

_DEFAULT_BATCH = 32
# Rows in the engine where it batches continuously: as many as transformers runs at once.
_CONTINUOUS = 1024
# Requests that start together arrive one by one: the first waits this long after the latest for company.
_GATHER_S = 0.01
# Rows share a batch when their prompts differ by no more than this, or by the oldest's length: padding is computed too.
_LENGTH_SLACK = 256

_OWN_KWARGS = {"max_batch_size": int, "max_model_len": int, "chat_template": str, "chat_template_kwargs": dict}
_OWN_KWARGS |= {"continuous_batching": object}
_QUANTIZE_KWARGS = inspect.signature(transformers.BitsAndBytesConfig).parameters.keys() - {"kwargs"}
# What says where the config and the tokenizer are, too.
_HUB_KWARGS = {"trust_remote_code", "code_revision", "cache_dir", "local_files_only", "token", "subfolder", "gguf_file"}
# `from_pretrained` takes anything and fails late: these are what it documents.
_MODEL_KWARGS = {"torch_dtype", "dtype", "device_map", "max_memory", "offload_folder", "offload_buffers", "variant"}
_MODEL_KWARGS |= {"attn_implementation", "quantization_config", "use_safetensors", "weights_only", "use_kernels"}


class TransformersEngine(ModelEngine):
    kind = "transformers"
    capabilities = Capabilities(response_formats=frozenset(("json_object", "json_schema", "regex", "choice")))

    # Typed loosely: what these are depends on the checkpoint.
    model: Any
    tokenizer: Any

    def _load(self) -> None:
        if not self.config.model:
            raise ConfigError("engine.model is needed: a checkpoint directory or a hub id")
        transformers.utils.logging.disable_progress_bar()
        self._load_model(_place("engine.model", self.config.model))
        self.device: torch.device = self.model.device
        self.inbox: queue.SimpleQueue[GenerationRow | None] = queue.SimpleQueue()  # None: look whether the engine is closed
        self.waiting: list[GenerationRow] = []  # out of the inbox, in no batch yet; the thread's own
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="eagleray-transformers", daemon=True)
        self.thread.start()

    def _load_model(self, source: str) -> None:
        hub = {name: value for name, value in self.config.kwargs.items() if name in _HUB_KWARGS}
        if self.config.revision:
            hub["revision"] = self.config.revision
        with _loading("engine.model", source):
            settings = transformers.AutoConfig.from_pretrained(source, **hub)
        self.sees = sees(settings)
        passed = {*_HUB_KWARGS, *_MODEL_KWARGS, *_QUANTIZE_KWARGS, *settings.to_dict(), *settings.attribute_map}
        types = {**dict.fromkeys(passed, object), **_OWN_KWARGS}
        kwargs = check_kwargs(self.kind, self.config.kwargs, types, positive=("max_batch_size", "max_model_len"))

        batching = check_continuous(kwargs.get("continuous_batching", False))
        options = hub | {name: value for name, value in kwargs.items() if name not in {*_OWN_KWARGS, *_QUANTIZE_KWARGS}}
        options.setdefault("dtype", options.pop("torch_dtype", "auto"))
        options.setdefault("device_map", "auto" if torch.cuda.is_available() else "cpu")
        quantize = {name: value for name, value in kwargs.items() if name in _QUANTIZE_KWARGS}
        quantized = quantize.get("load_in_4bit") or quantize.get("load_in_8bit")
        if not quantized and (detail := quantize.keys() - {"load_in_4bit", "load_in_8bit"}):
            raise ConfigError(f"engine.kwargs.{min(detail)} needs load_in_4bit or load_in_8bit beside it")
        with _loading("engine.model", source):
            if quantized:
                options["quantization_config"] = transformers.BitsAndBytesConfig(**quantize)
            auto = transformers.AutoModelForImageTextToText if self.sees else transformers.AutoModelForCausalLM
            self.model = auto.from_pretrained(source, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub)
        self.vision = self._processor(source, hub) if self.sees else None
        self.forward_takes = inspect.signature(self.model.forward).parameters.keys()
        if self.config.adapter:
            adapter = _place("engine.adapter", self.config.adapter)
            with _loading("engine.adapter", adapter):
                import peft

                adapted = peft.PeftModel.from_pretrained(self.model, adapter)
                # Merging saves two small products a layer and step; into quantised weights it would round twice.
                self.model = adapted if getattr(self.model, "is_quantized", False) else adapted.merge_and_unload()
        self.model.eval()
        if "continuous_batching" not in kwargs and suits_continuous(self.model) and not self.sees:
            batching = {}
        if batching is not None and self.sees:
            raise ConfigError("engine.kwargs.continuous_batching is for models of text only")
        self.continuous = None if batching is None else Continuous(self.model, batching, self._hand_back)

        self.max_batch_size: int = kwargs.get("max_batch_size") or self.config.max_concurrency or _DEFAULT_BATCH
        settings = self.model.config.get_text_config()
        self.vocab: int = settings.vocab_size
        self.context: int | None = kwargs.get("max_model_len") or getattr(settings, "max_position_embeddings", None)
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self.eos = frozenset(t for t in [*ends, self.tokenizer.eos_token_id] if t is not None)
        size = max(self.vocab, len(self.tokenizer))
        self.grammars = Grammars(lambda: from_tokenizer(self.tokenizer, n_vocab=size, eos_token=sorted(self.eos)))
        # A stop text that is a token of its own never shows in the text, which leaves such tokens out.
        self.special: dict[str, int] = self.tokenizer.get_added_vocab()
        self.template_variables: dict[str, Any] = kwargs.get("chat_template_kwargs", {})
        own = self.vision.processor.chat_template if self.vision else self.tokenizer.chat_template
        self.tokenizer.chat_template = load_chat_template(kwargs.get("chat_template")) or own
        if not self.tokenizer.chat_template:
            raise ConfigError(f"'{self.config.model}' has no chat template: give one in engine.kwargs.chat_template")

    def _processor(self, source: str, hub: dict[str, Any]) -> Vision | None:
        """None, said aloud, where only the images' part fails: text goes without it."""
        try:
            return Vision(source, hub)
        except Exception as error:  # a package that is missing, most often
            warnings.warn(f"'{source}' answers text only, its processor cannot be loaded: {one_line(error)}", stacklevel=2)
            return None

    def capabilities_for(self, request: Request) -> Capabilities:
        return replace(self.capabilities, images=self.vision is not None)

    @property
    def concurrency(self) -> int:
        # More than one batch, so that there are lengths to choose from and the next batch is there in time.
        return self.config.max_concurrency or (_CONTINUOUS if self.continuous else 4 * self.max_batch_size)

    async def _generate(self, request: Request) -> Completion:
        # Images take their time to be fetched and cut up; text does not, and a thread would cost more.
        rows = await asyncio.to_thread(self._rows, request) if has_images(request.messages) else self._rows(request)
        for row in rows:
            self.inbox.put(row)
        try:
            if self.closed:  # asked only now: what is in the inbox before `closed` is set, the thread finds there
                raise EngineError("cancelled", "the engine is closed")
            await asyncio.gather(*(asyncio.wrap_future(row.future) for row in rows))
        finally:
            for row in rows:  # cancelled, or one failed: the others leave their batch at its next step
                row.future.cancel()
        usage = Usage(input=len(rows[0].prompt), output=sum(len(row.tokens) for row in rows))
        return Completion([self._choice(row) for row in rows], usage)

    def _rows(self, request: Request) -> list[GenerationRow]:
        """The request, tokenised and checked before anything is spent on it, as one row for each of its answers."""
        params = request.generation
        if params.repetition_penalty == 0:
            raise invalid("repetition_penalty must be more than 0")
        for token in params.logit_bias or ():
            if not 0 <= int(token) < self.vocab:
                raise invalid(f"logit_bias names the token {token}, the vocabulary has {self.vocab}")
        prompt, images = self._prompt(request.messages, params)
        limit = params.max_tokens or DEFAULT_MAX_TOKENS
        if self.context is not None:
            if len(prompt) >= self.context:
                reason = f"the prompt has {len(prompt)} tokens, the context holds {self.context}"
                raise EngineError("context_length", reason)
            limit = min(limit, self.context - len(prompt))
        stop_tokens = {self.special[stop] for stop in params.stop or () if stop in self.special}
        stop_ids = self.eos | stop_tokens | frozenset(params.stop_token_ids or ())
        seed = random.getrandbits(62) if params.seed is None else params.seed
        generators = [torch.Generator(self.device).manual_seed((seed + i) % 2**63) for i in range(params.n or 1)]
        wanted = params.response_format
        return [
            GenerationRow(
                prompt, params, limit, stop_ids, generator, self.grammars.matcher(wanted) if wanted else None, images
            )
            for generator in generators
        ]

    def _prompt(self, messages: list[Message], params: GenerationParams) -> tuple[list[int], dict[str, torch.Tensor]]:
        if params.tool_choice not in (None, "auto", "none"):
            raise invalid("engine=transformers supports tool_choice auto and none only")
        tools = None if params.tool_choice == "none" else params.tools
        template: str = self.tokenizer.get_chat_template(tools=tools)
        wanted = {"tools": tools, "reasoning_effort": params.reasoning_effort}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        for name in wanted:
            if name not in template:
                raise invalid(f"the chat template of '{self.config.model}' has no place for {name}")
        variables = self.template_variables | wanted
        images: dict[str, torch.Tensor] = {}
        prompt: list[int]
        try:
            if self.vision and has_images(messages):
                prompt, images = self.vision.read(messages, self.tokenizer.chat_template, variables)
            else:
                shown = [for_template(message, parts=self.sees) for message in messages]
                prompt = self.tokenizer.apply_chat_template(
                    shown, add_generation_prompt=True, return_dict=False, **variables
                )
        except EngineError:
            raise
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise invalid(f"the chat template refuses these messages: {one_line(error)}") from error
        if not prompt:
            raise invalid("the chat template makes an empty prompt of these messages")
        return prompt, images

    def _choice(self, row: GenerationRow) -> Choice:
        text = cut_at_stop(self._text(row.tokens), row.params.stop or ())
        if row.finish == "length":
            text = text.rstrip("\ufffd")  # cut within a character
        logprobs = None if row.params.logprobs is None else row.logprobs
        if row.params.tools and row.params.tool_choice != "none":
            rest, calls = parse_tool_calls(text)
            if calls:
                return Choice(answer(rest, calls), "tool_calls", logprobs)
        return Choice(answer(text), row.finish, logprobs)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def close(self) -> None:
        """Stops the thread and frees the model; what runs or waits fails with `cancelled`."""
        self.closed = True
        self.inbox.put(None)
        self.thread.join()
        self.model = None
        gc.collect()
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

    # --- what follows runs in the engine's own thread

    def _work(self) -> None:
        rows: list[GenerationRow] = []
        while not self.closed:
            rows = self._next_batch()
            try:
                with self.continuous.paused() if self.continuous and rows else contextlib.nullcontext():
                    self._run(rows)
            except BaseException as error:  # a bug of ours or the library's: whoever asked gets it, the engine goes on
                for row in rows:
                    row.settle(error)
        if self.continuous:
            self.continuous.close()
        self._receive()
        for row in [*rows, *self.waiting]:
            row.settle(EngineError("cancelled", "the engine was closed before this request was answered"))

    def _receive(self) -> None:
        """Empties the inbox; where there is not enough for a batch, waits for more."""
        with contextlib.suppress(queue.Empty):
            while True:
                patience = 0 if self.closed or len(self.waiting) >= self.max_batch_size else _GATHER_S
                row = self.inbox.get(timeout=patience if self.waiting or self.closed else None)
                if row is not None and (row.failed or not self.continuous or not self.continuous.take(row)):
                    self.waiting.append(row)

    def _hand_back(self, row: GenerationRow) -> None:
        """For a row that transformers' continuous batching fails at; from any thread."""
        row.failed = True
        self.inbox.put(row)

    def _next_batch(self) -> list[GenerationRow]:
        """The oldest waiting row, so that nobody starves, and those near to it in length and alike in their images.

        Cut from all that wait, sorted by length: taking the nearest ones would leave both ends for the last batch.
        """
        self._receive()
        self.waiting = [row for row in self.waiting if not row.future.done()]
        if not self.waiting:
            return []
        oldest = self.waiting[0]
        slack = max(_LENGTH_SLACK, len(oldest.prompt))
        alike = [row for row in self.waiting if shapes(row) == shapes(oldest)]
        order = sorted(alike, key=lambda row: len(row.prompt))
        start = order.index(oldest) // self.max_batch_size * self.max_batch_size
        cut = order[start : start + self.max_batch_size]
        batch = [row for row in cut if abs(len(row.prompt) - len(oldest.prompt)) <= slack]
        self.waiting = [row for row in self.waiting if row not in batch]
        return batch

    def _run(self, rows: list[GenerationRow]) -> None:
        """Decodes `rows`, in halves where the device has no memory for all of them; what they have so far they keep."""
        rows = [row for row in rows if not row.future.done()]
        if not rows:
            return
        try:
            with torch.inference_mode():
                self._decode(rows)
            return
        except torch.OutOfMemoryError:
            pass  # go on outside: the traceback holds on to the batch's tensors
        except Exception as error:  # a bug, or a CPU without memory: one row's, if it is one row's
            if len(rows) == 1:
                return rows[0].settle(error)
        torch.cuda.empty_cache()
        if len(rows) == 1:
            reason = f"out of device memory on one request with {len(rows[0].prompt)} prompt tokens"
            rows[0].settle(EngineError("server", reason, retryable=True))
        else:
            self._run(rows[: len(rows) // 2])
            self._run(rows[len(rows) // 2 :])

    def _decode(self, rows: list[GenerationRow]) -> None:
        texts = [torch.tensor(row.prompt + row.tokens, device=self.device) for row in rows]
        ids = pad_sequence(texts, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True, padding_side="left")
        images = together(rows, self.device, self.model.dtype)
        # Along with the mask, or in more than one dimension where the model has images in the plane.
        positions = self.model._prepare_position_ids_for_generation(ids, {"attention_mask": mask, **images})
        cache = None
        while not self.closed:
            inputs = {
                "input_ids": ids,
                "attention_mask": mask,
                "position_ids": positions,
                "past_key_values": cache,
                "use_cache": True,
                "logits_to_keep": 1,
            }
            known = {name: value for name, value in inputs.items() if name in self.forward_takes}
            output = self.model(**known, **(images if cache is None else {}))
            cache = output.past_key_values
            logits = output.logits[:, -1].to(self.device, torch.float32)
            tokens = _choose(rows, logits)
            for row, token, scores in zip(rows, tokens.tolist(), logits, strict=True):
                if not row.future.done():
                    self._advance(row, token, scores)
            live = [i for i, row in enumerate(rows) if not row.future.done()]
            if not live:
                return
            ids, positions = tokens[:, None], positions[..., -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if len(live) < len(rows):
                index = torch.tensor(live, device=self.device)
                rows = [rows[i] for i in live]
                ids, mask, positions = ids[index], mask[index], positions[..., index, :]
                cache.reorder_cache(index)  # like `batch_select_indices`, but every kind of cache layer has it

    def _advance(self, row: GenerationRow, token: int, logits: torch.Tensor) -> None:
        """One token more for `row`; settles it where this was the last. `logits` are those the model gave."""
        if token in row.stop_ids:
            return row.settle()
        row.tokens.append(token)
        if row.matcher is not None:
            row.matcher.accept(token)
        if row.params.logprobs is not None:
            row.logprobs.append(self._logprob(token, logits.log_softmax(-1), row.params.logprobs))
        if self._stopped(row):
            row.settle()
        elif len(row.tokens) >= row.limit:
            row.finish = "length"
            row.settle()

    def _stopped(self, row: GenerationRow) -> bool:
        """Whether a stop text is complete. A token is one byte or more, so the last tokens tell."""
        stops = row.params.stop
        if not stops:
            return False
        longest = max(len(stop.encode()) for stop in stops)
        tail = self._text(row.tokens[-longest - 4 :])  # 4 more: what is decoded alone may lose its first character
        return any(stop in tail for stop in stops)

    def _logprob(self, token: int, logprobs: torch.Tensor, alternatives: int) -> dict[str, Any]:
        """The entry of OpenAI's `logprobs.content` for one token of an answer."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
            piece = self.tokenizer.convert_ids_to_tokens(token) or ""
            if piece.startswith("\u2581"):  # SentencePiece's space, which decoding drops at the start
                text = piece.replace("\u2581", " ")
            # A part of a character is no text, and has no bytes that every tokenizer would tell.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        values, tokens = logprobs.topk(min(alternatives, self.vocab))
        top = [entry(t, value) for t, value in zip(tokens.tolist(), values.tolist(), strict=True)]
        return {**entry(token, logprobs[token].item()), "top_logprobs": top}


def _choose(rows: list[GenerationRow], logits: torch.Tensor) -> torch.Tensor:
    """One token for each row, by its own settings and random numbers. Rows of equal settings are filtered together."""
    scores = logits.clone()
    sampled: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        _penalise(row, scores[i])
        if row.matcher is not None:
            try:
                allowed = torch.from_numpy(row.matcher.allowed(scores.shape[1]))
                scores[i].masked_fill_(~allowed.to(scores.device), -torch.inf)
            except EngineError as error:
                row.settle(error)
        p = row.params
        if p.temperature:
            sampled.setdefault((p.temperature, p.top_k, p.top_p, p.min_p), []).append(i)
    chosen = scores.argmax(-1)
    for settings, members in sampled.items():
        probs = _warpers(*settings)(None, scores[members]).softmax(-1)
        # As `torch.multinomial` draws, but for each row with its own generator.
        noise = torch.empty_like(probs)
        for place, i in enumerate(members):
            noise[place].exponential_(generator=rows[i].generator)
        chosen[members] = (probs / noise).argmax(-1)
    return chosen


def _penalise(row: GenerationRow, scores: torch.Tensor) -> None:
    """Changes one row's scores by its bias and penalties. Repetition counts the prompt in, as in transformers; the
    other two count the answer only, as OpenAI does."""
    p = row.params
    if p.logit_bias:
        scores[[int(token) for token in p.logit_bias]] += scores.new_tensor(list(p.logit_bias.values()))
    if p.repetition_penalty:
        seen = torch.tensor([row.prompt + row.tokens], device=scores.device)
        scores[:] = transformers.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(seen, scores[None])[0]
    if row.tokens and (p.frequency_penalty or p.presence_penalty):
        used, counts = torch.tensor(row.tokens, device=scores.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
        scores[used] -= counts * (p.frequency_penalty or 0.0) + (p.presence_penalty or 0.0)


def _warpers(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Any:
    warpers: list[Any] = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k is not None and top_k > 0:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    return transformers.LogitsProcessorList(warpers)


def _place(key: str, name: str) -> str:
    """A directory's path, or a hub id as it is. What can only be a path must be there: the hub's error misleads."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: there is no directory {path}")
    return name


@contextlib.contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    """What a library raises while it loads follows from the configuration: say it in one line."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"{key} '{name}' could not be loaded: {one_line(error)}") from error
