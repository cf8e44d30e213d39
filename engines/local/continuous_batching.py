"""transformers' own continuous batching, for the rows of `engine=transformers` that it can do.

It admits rows as others finish and keeps one paged KV cache. It has one set of sampling settings: those of the first
row that it could do. Rows of other settings, with seeds, penalties, stop texts, a response format or log probabilities
stay with the engine's own batches, and so does every row where the library fails: it is new, and not for every model
and device.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers

from engines.errors import ConfigError
from engines.params import GenerationParams
from engines.text import check_kwargs, one_line

if TYPE_CHECKING:
    from engines.local.transformers_row import GenerationRow

# Of the free memory, after the model: the engine's own batches need some, too.
_MEMORY_PERCENT = 0.7
# How often to look whether the library's thread still lives, in seconds.
_LOOK_S = 0.5

_Settings = tuple[float, int | None, float | None]  # temperature, top_k, top_p


def check(given: Any) -> dict[str, Any] | None:
    """The fields of transformers' `ContinuousBatchingConfig`; None where it is switched off. Raises `ConfigError`."""
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, dict):
        raise ConfigError(f"engine.kwargs.continuous_batching must be true, false or a mapping, not {given!r:.80}")
    prefix = "continuous_batching."  # as it is named in an error
    known = dict.fromkeys((prefix + name for name in transformers.ContinuousBatchingConfig.__dataclass_fields__), object)
    checked = check_kwargs("transformers", {prefix + str(name): value for name, value in given.items()}, known)
    return {name.removeprefix(prefix): value for name, value in checked.items()}


def suits(model: Any) -> bool:
    """Whether it is worth it by default: only flash attention leaves out what rows of a batch are to each other."""
    from transformers.utils import import_utils

    flash = import_utils.is_flash_attn_2_available() or import_utils.is_flash_attn_3_available()
    half = model.dtype in (torch.float16, torch.bfloat16)
    return flash and half and model.device.type == "cuda" and isinstance(model, transformers.PreTrainedModel)


class Continuous:
    """Takes rows and settles them; gives `back` those that the library fails at. Used from one thread."""

    def __init__(self, model: Any, options: dict[str, Any], back: Callable[[GenerationRow], None]) -> None:
        self.model, self.options, self.back = model, options, back
        self.manager: Any = None
        self.settings: _Settings | None = None
        self.broken = False
        self.number = 0
        self.lock = threading.Lock()  # around `rows`, which the results' thread empties
        self.rows: dict[str, GenerationRow] = {}

    def take(self, row: GenerationRow) -> bool:
        """Whether the row is in good hands now."""
        settings = _settings(row.params)
        if self.broken or settings is None or (self.settings is not None and settings != self.settings):
            return False
        if self.manager is None:
            try:
                self._start(settings)
            except Exception as error:  # a library as new as this, on a device unknown: anything
                self._give_up(error)
                return False
        prompt = row.prompt + row.tokens
        if len(row.prompt) + row.limit > self.manager.batch_processor.cache.max_tokens_read:
            return False  # it would never fit, and end the library's thread
        self.number += 1
        name = str(self.number)
        with self.lock:
            self.rows[name] = row
        ends = sorted(row.stop_ids) or -1
        if self.manager.add_request(prompt, name, max_new_tokens=row.limit - len(row.tokens), eos_token_id=ends) is None:
            with self.lock:
                return self.rows.pop(name, None) is None  # else the results' thread has given it back
        row.future.add_done_callback(lambda future: self._cancel(name) if future.cancelled() else None)
        return True

    def _start(self, settings: _Settings) -> None:
        temperature, top_k, top_p = settings
        sampling = {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p or 1.0} if temperature else {}
        self.manager = self.model.init_continuous_batching(
            transformers.GenerationConfig(do_sample=bool(temperature), eos_token_id=-1, **sampling),
            transformers.ContinuousBatchingConfig(**{"max_memory_percent": _MEMORY_PERCENT, **self.options}),
        )
        self.manager.warmup()
        self.manager.start()
        self.settings = settings
        self.results = threading.Thread(target=self._settle, name="eagleray-continuous", daemon=True)
        self.results.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The model is the caller's alone in here."""
        with contextlib.ExitStack() as stack:
            if self.manager is not None:
                with contextlib.suppress(RuntimeError):  # its thread has ended
                    stack.enter_context(self.manager.pause())
            yield

    def _cancel(self, name: str) -> None:
        with self.lock:
            self.rows.pop(name, None)
        self.manager.cancel_request(name)

    def _give_up(self, error: object) -> None:
        self.broken = True
        warnings.warn(
            f"continuous batching failed, and is switched off: {one_line(Exception(error))}; "
            "engine.kwargs.continuous_batching=false does so beforehand",
            stacklevel=2,
        )

    def close(self) -> None:
        """Stops at once, and gives the unfinished rows back."""
        self.broken = True
        if self.settings is not None:
            self.manager.stop(block=True, hard_stop=True)
            self.results.join()
            self.manager.destroy()

    # --- in the results' thread

    def _settle(self) -> None:
        while True:
            output = self.manager.get_result(timeout=_LOOK_S)
            if output is not None:
                with self.lock:
                    row = self.rows.pop(output.request_id, None)
                if row is not None:
                    self._finish(row, output)
            elif not self.manager.is_running():
                break
        if not self.broken:
            self._give_up(self.manager.background_thread_status.fatal_error or "its thread ended")
        with self.lock:
            left, self.rows = list(self.rows.values()), {}
        for row in left:
            self.back(row)

    def _finish(self, row: GenerationRow, output: Any) -> None:
        if output.error is not None:
            return self.back(row)
        row.tokens += output.generated_tokens
        if row.tokens and row.tokens[-1] in row.stop_ids:
            row.tokens.pop()
        else:
            row.finish = "length"
        row.settle()


def _settings(params: GenerationParams) -> _Settings | None:
    """What rows must share; None for what the library cannot do, or not for a single row."""
    special = (params.logit_bias, params.frequency_penalty, params.presence_penalty, params.logprobs is not None)
    if any(special) or params.response_format or params.repetition_penalty not in (None, 1) or params.stop:
        return None
    if not params.temperature:
        return (0.0, None, None)
    if params.seed is not None or params.min_p:
        return None
    return (params.temperature, params.top_k, params.top_p)
