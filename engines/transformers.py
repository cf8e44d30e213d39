"""`engine=transformers`: any causal language model of Hugging Face transformers, on any device it runs on.

One thread owns the model. It takes the oldest waiting request and those nearest to it in prompt length, decodes them
together (left padding, one KV cache), and drops rows from the batch as they finish. Every row has its own sampling
settings, random numbers, stops and limit, so what shares a batch with it changes nothing but the last bits of
its logits: in float32 answers are the same alone and in company; in bfloat16 and float16 a near-tie may fall otherwise.

The decode loop is ours, not `model.generate`: that one has a single generator and one set of settings for a batch.

`model` is a checkpoint directory, a hub id (`HF_HUB_OFFLINE=1` keeps to the local cache) or a `.gguf` file. `adapter`
is a LoRA of peft, merged into the weights unless they are quantised. `kwargs` are those of `from_pretrained`
(`torch_dtype`, `device_map`, `attn_implementation`, `quantization_config`, …), the attributes of the model's config and
  `load_in_4bit`, `load_in_8bit`   quantise with bitsandbytes; its `bnb_4bit_*` and `llm_int8_*` go along
  `max_batch_size`                 rows decoded together (default: `max_concurrency`, or 16)
  `max_model_len`                  the context, prompt and answer (default: the config's `max_position_embeddings`)
  `chat_template`                  a template's text, or the path of a `.jinja` file
  `chat_template_kwargs`           further variables for it (`enable_thinking`, say)

Every token computed counts, but for the one that ends an answer (end of sequence, `stop_token_ids`): it is in neither
the text nor the usage nor the logprobs. Logprobs are the model's own, before penalties and temperature.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import importlib.util
import inspect
import json
import os
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.base import Capabilities, Engine
from engines.types import (
    DEFAULT_MAX_TOKENS,
    Choice,
    Completion,
    ConfigError,
    EngineError,
    FinishReason,
    GenerationParams,
    Message,
    Request,
    Usage,
    answer,
    invalid,
    nearest,
    text_of,
)

_DEFAULT_BATCH = 16
# Requests that start together arrive one by one: the first waits this long after the latest for company.
_GATHER_S = 0.01
# Rows share a batch when their prompts differ by no more than this, or by half the oldest's: padding is computed too.
_LENGTH_SLACK = 64
# A batch is repacked when one row in so many is done; repacking copies the cache once, as every step does.
_REPACK_SHARE = 4
# Below this a temperature is greedy decoding; dividing by it would overflow.
_GREEDY_BELOW = 1e-5
# Sampling sorts this many candidates first, and the whole vocabulary only where they do not settle the draw.
_CANDIDATES = 256


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OWN_KWARGS = _names("load_in_4bit load_in_8bit max_batch_size max_model_len chat_template chat_template_kwargs")
# What says where the config and the tokenizer are, too.
_WHERE_KWARGS = _names("""
    trust_remote_code code_revision cache_dir force_download proxies local_files_only token subfolder gguf_file
""")
# `from_pretrained` takes anything and fails late: these are what it documents, less what makes no sense in a YAML file.
_MODEL_KWARGS = _WHERE_KWARGS | _names("""
    dtype torch_dtype device_map max_memory offload_folder offload_buffers offload_state_dict low_cpu_mem_usage
    attn_implementation experts_implementation quantization_config variant use_safetensors weights_only
    ignore_mismatched_sizes key_mapping disable_mmap fusion_config use_kernels kernel_config allow_all_kernels
""")
_TEMPLATE_ARGUMENTS = _names("""
    conversation messages tools documents chat_template add_generation_prompt tokenize return_dict return_tensors
""")


@dataclass(slots=True, eq=False)
class _Job:
    """One request, with its `n` rows."""

    prompt: list[int]
    params: GenerationParams
    max_new: int
    stop_ids: frozenset[int]
    future: concurrent.futures.Future[list[_Row]] = field(default_factory=concurrent.futures.Future)
    rows: list[_Row] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Row:
    """One answer in the making."""

    job: _Job
    number: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""  # as far as it is certain; kept only where there are stop texts to look for
    decoded: tuple[int, int] = (0, 0)  # tokens[a:b] is the last piece that went into `text`, tokens[b:] did not yet
    finish: FinishReason | None = None
    chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        seed = self.job.params.seed
        self.chance = random.Random(None if seed is None else f"{seed}/{self.number}")
        self.tokens, self.logprobs, self.text, self.decoded, self.finish = [], [], "", (0, 0), None

    @property
    def over(self) -> bool:
        return self.finish is not None or self.job.future.done()  # done: given up by whoever asked, or failed


class TransformersEngine(Engine):
    kind = "transformers"
    capabilities = Capabilities(response_formats=frozenset())

    def _load(self) -> None:
        config = self.config
        if not config.model:
            raise ConfigError("engine.model is needed: a checkpoint directory, a hub id or a .gguf file")
        for name in ("max_batch_size", "max_model_len"):
            value = config.kwargs.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"engine.kwargs.{name} must be a whole number of at least 1, not {value!r}")
        self.max_batch_size: int = config.kwargs.get("max_batch_size") or config.max_concurrency or _DEFAULT_BATCH
        # Typed loosely: what these are depends on the checkpoint.
        self.model: Any
        self.tokenizer: Any
        with _quiet():
            self._load_model()
        self.device: Any = self.model.get_input_embeddings().weight.device
        if self.device.type == "meta":
            self.device = "cpu"  # offloaded: accelerate's hooks take the inputs from there
        self.waiting: list[_Row] = []
        self.wake = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._work, name="eagleray-transformers", daemon=True)
        self.thread.start()

    def _load_model(self) -> None:
        import torch
        import transformers

        kwargs = dict(self.config.kwargs)
        where = {name: kwargs[name] for name in _WHERE_KWARGS & kwargs.keys()}
        if self.config.revision:
            where["revision"] = self.config.revision
        source = str(self.config.model)
        if source.endswith(".gguf"):
            file = Path(source).expanduser().absolute()
            if not file.is_file():
                raise ConfigError(f"engine.model: there is no file {file}")
            source, where["gguf_file"] = str(file.parent), file.name
        else:
            source = _place("engine.model", source)
        with _one_line(f"engine.model '{self.config.model}' could not be loaded"):
            settings = transformers.AutoConfig.from_pretrained(source, **where)
        known = _OWN_KWARGS | _MODEL_KWARGS | settings.to_dict().keys() | set(settings.attribute_map)
        for name in kwargs:
            if name not in known and not name.startswith(("bnb_4bit_", "llm_int8_")):
                raise ConfigError(f"engine.kwargs.{name} is not known to engine=transformers{nearest(name, known)}")

        options = {name: value for name, value in kwargs.items() if name not in _OWN_KWARGS} | where
        options.pop("torch_dtype", None)
        options["dtype"] = _dtype(kwargs.get("dtype", kwargs.get("torch_dtype", "auto")))
        options.setdefault("device_map", "auto" if torch.cuda.is_available() else "cpu")
        _quantize(kwargs, options)
        with _one_line(f"engine.model '{self.config.model}' could not be loaded"):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(source, **options)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
        self.forward_takes = frozenset(inspect.signature(self.model.forward).parameters)
        if "past_key_values" not in self.forward_takes:
            # Pure state-space models name their state otherwise, and no two alike.
            raise ConfigError(f"engine=transformers needs a key-value cache, which {type(self.model).__name__} has not")
        if self.config.adapter:
            self._load_adapter(_place("engine.adapter", self.config.adapter))
        self.model.eval()

        settings = self.model.config.get_text_config()
        self.vocab: int = settings.vocab_size
        self.context: int | None = kwargs.get("max_model_len") or getattr(settings, "max_position_embeddings", None)
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self.eos = frozenset(t for t in [*ends, self.tokenizer.eos_token_id] if t is not None)
        # A stop text that is a token of its own never shows in the text, which leaves such tokens out.
        self.special: dict[str, int] = self.tokenizer.get_added_vocab()
        self._load_template()

    def _load_adapter(self, adapter: str) -> None:
        if importlib.util.find_spec("peft") is None:
            raise ConfigError("engine.adapter needs the package 'peft': run pip install peft")
        import peft

        with _one_line(f"engine.adapter '{adapter}' could not be loaded"):
            adapted = peft.PeftModel.from_pretrained(self.model, adapter)
            quantized = getattr(self.model, "is_quantized", False)
            # Merging saves two small products a layer and step; into quantised weights it would round twice.
            self.model = adapted if quantized else adapted.merge_and_unload()

    def _load_template(self) -> None:
        template = self.config.kwargs.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise ConfigError(f"engine.kwargs.chat_template must be a text or a path, not {template!r:.60}")
        if template and template.endswith((".jinja", ".jinja2", ".j2")):
            try:
                template = Path(template).expanduser().read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"engine.kwargs.chat_template: {error}") from error
        if template:
            self.tokenizer.chat_template = template
        if not self.tokenizer.chat_template:
            raise ConfigError(f"'{self.config.model}' has no chat template: give one in engine.kwargs.chat_template")
        variables = self.config.kwargs.get("chat_template_kwargs") or {}
        if not isinstance(variables, Mapping):
            raise ConfigError(f"engine.kwargs.chat_template_kwargs must map names to values, not {variables!r:.60}")
        for name in _TEMPLATE_ARGUMENTS & variables.keys():
            raise ConfigError(f"engine.kwargs.chat_template_kwargs.{name} is set by the engine itself")
        self.template_variables = dict(variables)

    @property
    def concurrency(self) -> int:
        # More than one batch, so that there are lengths to choose from and the next batch is there in time.
        return self.config.max_concurrency or 4 * self.max_batch_size

    async def _generate(self, request: Request) -> Completion:
        job = self._job(request)
        with self.wake:
            if self.closed:
                raise EngineError("cancelled", "the engine is closed")
            self.waiting.extend(job.rows)
            self.wake.notify()
        # Cancelling the task that waits here cancels the future, and the row leaves its batch at the next step.
        rows = await asyncio.wrap_future(job.future)
        choices = [
            Choice(answer(row.text), row.finish or "stop", None if job.params.logprobs is None else row.logprobs)
            for row in rows
        ]
        return Completion(choices, Usage(input=len(job.prompt), output=sum(len(row.tokens) for row in rows)))

    def _job(self, request: Request) -> _Job:
        """The request, tokenised and checked, before anything is spent on it."""
        params = request.generation
        if params.repetition_penalty == 0:
            raise invalid("repetition_penalty must be more than 0")
        for token in params.logit_bias or ():
            if not 0 <= int(token) < self.vocab:
                raise invalid(f"logit_bias names the token {token}, the vocabulary has {self.vocab}")
        prompt = self._prompt(request.messages, params)
        room = DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens
        if self.context is not None:
            if len(prompt) >= self.context:
                reason = f"the prompt has {len(prompt)} tokens, the context holds {self.context}"
                raise EngineError("context_length", reason)
            room = min(room, self.context - len(prompt))
        stop_tokens = {self.special[stop] for stop in params.stop or () if stop in self.special}
        job = _Job(prompt, params, room, self.eos | stop_tokens | frozenset(params.stop_token_ids or ()))
        job.rows = [_Row(job, number) for number in range(params.n or 1)]
        return job

    def _prompt(self, messages: list[Message], params: GenerationParams) -> list[int]:
        tools = params.tools
        if params.tool_choice == "none":
            tools = None
        elif params.tool_choice not in (None, "auto"):
            raise invalid("engine=transformers supports tool_choice auto and none only")
        template: str = self.tokenizer.get_chat_template(tools=tools)
        if tools and "tools" not in template:
            raise invalid(f"the chat template of '{self.config.model}' has no place for tools")
        variables = dict(self.template_variables)
        if params.reasoning_effort is not None:
            if "reasoning_effort" not in template:
                raise invalid(f"the chat template of '{self.config.model}' has no place for reasoning_effort")
            variables["reasoning_effort"] = params.reasoning_effort
        try:
            text = self.tokenizer.apply_chat_template(
                [_for_template(message, template) for message in messages],
                tools=tools,
                add_generation_prompt=True,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template is a program that came with the model: it may raise anything
            raise invalid(f"the chat template refuses these messages: {_line(error)}") from error
        prompt: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not prompt:
            raise invalid("the chat template makes an empty prompt of these messages")
        return prompt

    def close(self) -> None:
        with self.wake:
            self.closed = True
            self.wake.notify()
        self.thread.join()
        if self.model is not None:
            self.model = None
            gc.collect()
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # --- what follows runs in the engine's own thread

    def _work(self) -> None:
        while rows := self._next_rows():
            try:
                self._run(rows)
            except BaseException as error:  # a bug of ours or the library's: whoever asked gets it, the engine goes on
                for row in rows:
                    _settle(row.job, error)
        for row in self.waiting:
            _settle(row.job, EngineError("cancelled", "the engine was closed before this request was answered"))

    def _next_rows(self) -> list[_Row]:
        """The rows of the next batch; none once the engine is closed. The oldest is among them: nobody starves."""
        with self.wake:
            while not self.closed:
                self.waiting = [row for row in self.waiting if not row.over]
                if self.waiting:
                    break
                self.wake.wait()
            seen = 0
            while not self.closed and seen < len(self.waiting) < self.max_batch_size:
                seen = len(self.waiting)
                self.wake.wait(_GATHER_S)
            if self.closed:
                return []
            length = len(self.waiting[0].job.prompt)
            slack = max(_LENGTH_SLACK, length // 2)

            def distance(row: _Row) -> int:
                return abs(len(row.job.prompt) - length)

            near = sorted((row for row in self.waiting if distance(row) <= slack), key=distance)[: self.max_batch_size]
            chosen = set(near)
            self.waiting = [row for row in self.waiting if row not in chosen]
            return near

    def _run(self, rows: list[_Row]) -> None:
        """Decodes `rows`, in halves where the device has no memory for all of them."""
        import torch

        try:
            with torch.inference_mode():
                self._decode(rows)
            return
        except torch.OutOfMemoryError:
            pass  # go on outside: the traceback holds on to the batch's tensors
        torch.cuda.empty_cache()
        rest = [row for row in rows if not row.over]
        for row in rest:
            row.restart()
        if len(rest) == 1:
            prompt = len(rest[0].job.prompt)
            reason = f"out of device memory on one request with {prompt} prompt tokens"
            _settle(rest[0].job, EngineError("server", reason, retryable=True))
        elif rest:
            self._run(rest[: len(rest) // 2])
            self._run(rest[len(rest) // 2 :])

    def _decode(self, rows: list[_Row]) -> None:
        import torch

        rows = [row for row in rows if not row.over]
        if not rows:
            return
        width = max(len(row.job.prompt) for row in rows)
        pad = next(iter(self.eos), 0)  # any token does: the mask hides it
        ids = torch.tensor([[pad] * (width - len(r.job.prompt)) + r.job.prompt for r in rows], device=self.device)
        lengths = torch.tensor([len(r.job.prompt) for r in rows], device=self.device)[:, None]
        mask = (torch.arange(width, device=self.device) >= width - lengths).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        sampler = _Sampler(rows, self.vocab, self.device)
        cache = None
        while True:
            inputs: dict[str, Any] = {
                "input_ids": ids,
                "attention_mask": mask,
                "past_key_values": cache,
                "use_cache": True,
            }
            if "position_ids" in self.forward_takes:
                inputs["position_ids"] = positions
            if "logits_to_keep" in self.forward_takes:
                inputs["logits_to_keep"] = 1
            output = self.model(**inputs)
            cache = output.past_key_values
            tokens, logprobs = sampler.step(output.logits[:, -1].to(self.device))
            del output
            for i, token in enumerate(tokens.tolist()):
                if not rows[i].over:
                    self._advance(rows[i], token, logprobs(i) if logprobs else None)
            if self.closed:
                for row in rows:
                    _settle(row.job, EngineError("cancelled", "the engine was closed before this request was answered"))
            live = [i for i, row in enumerate(rows) if not row.over]
            if not live:
                return
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            ids = tokens[:, None]
            if (len(rows) - len(live)) * _REPACK_SHARE >= len(rows):
                index = torch.tensor(live, device=self.device)
                rows = [rows[i] for i in live]
                ids, mask, positions = ids[index], mask[index], positions[index]
                cache.reorder_cache(index)  # like `batch_select_indices`, but every kind of cache layer has it
                sampler = _Sampler(rows, self.vocab, self.device)

    def _advance(self, row: _Row, token: int, logprob: tuple[list[tuple[int, float]], float] | None) -> None:
        """One token more for `row`; finishes it, and its job, where this was the last."""
        job = row.job
        if token in job.stop_ids:
            row.finish = "stop"
        else:
            row.tokens.append(token)
            if logprob is not None:
                others, own = logprob
                entry = self._logprob(token, own)
                row.logprobs.append(entry | {"top_logprobs": [self._logprob(t, value) for t, value in others]})
            if job.params.stop and self._stopped(row, job.params.stop):
                row.finish = "stop"
                return self._finished(job)
            if len(row.tokens) >= job.max_new:
                row.finish = "length"
        if row.finish:
            row.text = self._text(row.tokens)
            if row.finish == "length":  # cut within a character
                row.text = row.text.rstrip("\ufffd")
            self._finished(job)

    def _finished(self, job: _Job) -> None:
        if all(row.finish for row in job.rows):
            _settle(job, job.rows)

    def _stopped(self, row: _Row, stops: list[str]) -> bool:
        """Whether the text now holds a stop text; cuts it there. Text grows only by whole characters."""
        start, end = row.decoded
        before, now = self._text(row.tokens[start:end]), self._text(row.tokens[start:])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return False
        old = len(row.text)
        row.text += now[len(before) :]
        row.decoded = (end, len(row.tokens))
        found = [row.text.find(stop, max(0, old - len(stop) + 1)) for stop in stops]
        first = min((place for place in found if place >= 0), default=-1)
        if first >= 0:
            row.text = row.text[:first]
        return first >= 0

    def _text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _logprob(self, token: int, value: float) -> dict[str, Any]:
        text, raw = self._piece(token)
        return {"token": text, "logprob": value, "bytes": list(raw)}

    def _piece(self, token: int) -> tuple[str, bytes]:
        """A token's text and bytes; the text of a part of a character is written as OpenAI does, `bytes:\\xe2\\x80`."""
        piece = self.tokenizer.convert_ids_to_tokens(token) or ""
        text: str = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        if piece.startswith("\u2581"):  # SentencePiece's space, which decoding drops at the start
            text = piece.replace("\u2581", " ")
        if "\ufffd" not in text:
            return text, text.encode()
        if piece.startswith("<0x"):
            raw = bytes([int(piece[3:5], 16)])
        else:
            raw = bytes(_BYTE_OF[char] for char in piece if char in _BYTE_OF)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw


class _Sampler:
    """Chooses one step's tokens for the rows of a batch, each by its own settings."""

    def __init__(self, rows: list[_Row], vocab: int, device: Any) -> None:
        import torch

        self.rows = rows
        params = [row.job.params for row in rows]

        def column(values: list[float]) -> Any:
            return torch.tensor(values, device=device, dtype=torch.float32)[:, None]

        heat = [p.temperature or 0.0 for p in params]
        greedy = [t < _GREEDY_BELOW for t in heat]
        self.all_greedy = all(greedy)
        self.greedy = torch.tensor(greedy, device=device)
        self.temperature = column([1.0 if cold else t for cold, t in zip(greedy, heat, strict=True)])
        self.top_k = column([min(p.top_k, vocab) if p.top_k and p.top_k > 0 else vocab for p in params])
        self.top_p = column([1.0 if p.top_p is None else p.top_p for p in params])
        self.min_p = column([p.min_p or 0.0 for p in params])
        self.vocab = vocab

        bias = [(i, int(t), b) for i, p in enumerate(params) for t, b in (p.logit_bias or {}).items()]
        self.bias = None
        if bias:
            i, t, b = zip(*bias, strict=True)
            self.bias = (torch.tensor(i, device=device), torch.tensor(t, device=device), torch.tensor(b, device=device))
        # Repetition counts the prompt in, as transformers does; the other two count the answer only, as OpenAI does.
        self.repetition = column([p.repetition_penalty or 1.0 for p in params])
        self.frequency = column([p.frequency_penalty or 0.0 for p in params])
        self.presence = column([p.presence_penalty or 0.0 for p in params])
        self.repeats = any(p.repetition_penalty not in (None, 1.0) for p in params)
        self.penalises = self.repeats or any(p.frequency_penalty or p.presence_penalty for p in params)
        if self.penalises:
            self.counts = torch.zeros(len(rows), vocab, device=device)
            self.seen = torch.zeros(len(rows), vocab, device=device, dtype=torch.bool)
            for n, row in enumerate(rows):
                said = torch.tensor(row.tokens, device=device, dtype=torch.long)
                self.counts[n] = torch.bincount(said, minlength=vocab)[:vocab]
                self.seen[n, torch.tensor(row.job.prompt + row.tokens, device=device)] = True

        wanted = [p.logprobs for p in params]
        self.alternatives = max((w for w in wanted if w is not None), default=None)

    def step(self, raw: Any) -> tuple[Any, Any]:
        """Tokens, and None or a function that gives a row's alternatives and its token's own logprob."""
        import torch

        logits = raw
        if not (self.all_greedy and self.bias is None and not self.penalises and self.alternatives is None):
            logits = raw.float()
        scores = logits
        if self.bias is not None or self.penalises:
            logits = logits.clone()
        if self.bias is not None:
            rows, tokens, values = self.bias
            logits[rows, tokens] += values
        if self.penalises:
            if self.repeats:
                pushed = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
                logits = torch.where(self.seen, pushed, logits)
            logits -= self.counts * self.frequency + (self.counts > 0) * self.presence
        chosen = logits.argmax(-1)
        if not self.all_greedy:
            chosen = torch.where(self.greedy, chosen, self._draw(logits / self.temperature))
        if self.penalises:
            self.counts.scatter_add_(1, chosen[:, None], torch.ones_like(self.temperature))
            self.seen.scatter_(1, chosen[:, None], True)
        if self.alternatives is None:
            return chosen, None
        scores = scores.log_softmax(-1)
        own = scores.gather(1, chosen[:, None])[:, 0].tolist()
        values, tokens = scores.topk(min(max(self.alternatives, 1), self.vocab))
        values, tokens = values.tolist(), tokens.tolist()

        def logprobs(i: int) -> tuple[list[tuple[int, float]], float] | None:
            count = self.rows[i].job.params.logprobs
            return None if count is None else (list(zip(tokens[i], values[i], strict=True))[:count], own[i])

        return chosen, logprobs

    def _draw(self, logits: Any) -> Any:
        """A token for each row at random. One number a row and step from the row's own generator decides it, by the
        row's cumulative distribution, most likely tokens first."""
        import torch

        numbers = [0.0 if row.over else row.chance.random() for row in self.rows]
        u = torch.tensor(numbers, device=logits.device, dtype=torch.float32)[:, None]
        chosen, sure = self._pick(logits, u, min(_CANDIDATES, self.vocab))
        if not bool((sure | self.greedy[:, None]).all()):
            chosen, _ = self._pick(logits, u, self.vocab)
        return chosen

    def _pick(self, logits: Any, u: Any, width: int) -> tuple[Any, Any]:
        """The draw among the `width` likeliest tokens, and for which rows it is that among all of them."""
        import torch

        values, ids = logits.topk(width)
        probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
        within = torch.arange(width, device=logits.device) < self.top_k
        limited = self.top_k < self.vocab
        # top_p is a share of what top_k leaves, as in transformers; min_p compares with the likeliest, whatever is cut.
        mass = torch.where(limited, (probs * within).sum(-1, keepdim=True), 1.0)
        keep = within & (probs.cumsum(-1) - probs < self.top_p * mass) & (probs >= self.min_p * probs[:, :1])
        keep[:, 0] = True
        reached = (probs * keep).cumsum(-1)
        # `keep` is a run of the likeliest tokens: where it ends before `width`, or top_k does, nothing is beyond.
        whole = (self.top_k <= width) | ~keep[:, -1:]
        total = torch.where(whole, reached[:, -1:], 1.0)
        place = (reached <= u * total).sum(-1, keepdim=True)
        free = ~limited & (self.top_p >= 1) & (self.min_p <= 0)
        sure = whole | (free & (place < width))
        place = torch.minimum(place, keep.sum(-1, keepdim=True) - 1)
        return ids.gather(1, place)[:, 0], sure


def _settle(job: _Job, outcome: list[_Row] | BaseException) -> None:
    """Hands the outcome to whoever waits for it, if anybody still does. Only the engine's thread calls this."""
    if job.future.done() or not job.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        job.future.set_exception(outcome)
    else:
        job.future.set_result(outcome)


def _place(key: str, name: str) -> str:
    """A directory's path, or a hub id as it is. What can only be a path must be there: the hub's error misleads."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: there is no directory {path}")
    return name


def _for_template(message: Message, template: str) -> dict[str, Any]:
    """A message in the form chat templates expect: content is text, arguments are objects."""
    plain: dict[str, Any] = {**message, "content": text_of(message) or ""}
    if plain["role"] == "developer" and "developer" not in template:
        plain["role"] = "system"  # what it means to models that came before it
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_call_for_template(call) for call in calls]
    return plain


def _call_for_template(call: Any) -> Any:
    try:
        function = dict(call["function"])
        function["arguments"] = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return call  # not ours to judge: the template decides
    return {**call, "function": function}


def _dtype(value: Any) -> Any:
    import torch

    if not isinstance(value, str) or value == "auto":
        return value
    found = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        known = ("auto", "float16", "bfloat16", "float32", "float64")
        raise ConfigError(f"engine.kwargs.torch_dtype: torch has no dtype '{value}'{nearest(value, known)}")
    return found


def _quantize(kwargs: Mapping[str, Any], options: dict[str, Any]) -> None:
    """Turns `load_in_4bit` and its like into the quantization_config that transformers wants."""
    detail = {name: options.pop(name) for name in list(options) if name.startswith(("bnb_4bit_", "llm_int8_"))}
    asked = [name for name in ("load_in_4bit", "load_in_8bit") if kwargs.get(name)]
    if not asked:
        if detail:
            raise ConfigError(f"engine.kwargs.{min(detail)} needs load_in_4bit or load_in_8bit beside it")
        return
    if len(asked) > 1 or options.get("quantization_config"):
        raise ConfigError("engine.kwargs: give one of load_in_4bit, load_in_8bit and quantization_config")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"engine.kwargs.{asked[0]} needs the package 'bitsandbytes': run pip install bitsandbytes")
    import transformers

    with _one_line(f"engine.kwargs.{asked[0]}"):
        options["quantization_config"] = transformers.BitsAndBytesConfig(**{asked[0]: True}, **detail)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What a library raises while it loads follows from the configuration: say it in one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {_line(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice while a model loads; `TRANSFORMERS_VERBOSITY` brings them back."""
    from transformers.utils import logging

    if "TRANSFORMERS_VERBOSITY" in os.environ:
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's way of writing bytes as printable characters, which byte-level tokenizers share; character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTE_OF = _byte_level_alphabet()
