"""transformers' own continuous batching, for the rows of `engine=transformers` that it supports.

It admits rows as others finish, and keeps one paged KV cache. It has one set of sampling settings: those of the first row
that it takes. Rows with other settings, or with seeds, penalties, stop texts, a response format or log probabilities, stay
with the engine's own batches. So does every row at which the library fails: it is new, and does not support every model and
device.
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
from engines.text import one_line
from engines.validation import check_kwargs

if TYPE_CHECKING:
    from engines.local.transformers_row import GenerationRow

# The part of the memory left after loading that the library's cache may take. The engine's own batches need the rest.
_MEMORY_PERCENT = 0.7
_POLL_S = 0.5  # how often to check that the library's thread is alive

_Settings = tuple[float, int | None, float | None]  # temperature, top_k, top_p


def parse_settings(given: Any) -> dict[str, Any] | None:
    """`engine.kwargs.continuous_batching` as fields of transformers' `ContinuousBatchingConfig`; None if switched off.

    Raises `ConfigError` for a wrong type or an unknown field.
    """
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, dict):
        raise ConfigError(
            f"engine.kwargs.continuous_batching must be true, false or a mapping, not {given!r:.80}", key="engine.kwargs"
        )
    prefix = "continuous_batching."  # so that an error names the full key
    known = dict.fromkeys((prefix + name for name in transformers.ContinuousBatchingConfig.__dataclass_fields__), object)
    checked = check_kwargs("transformers", {prefix + str(name): value for name, value in given.items()}, known)
    return {name.removeprefix(prefix): value for name, value in checked.items()}


def default_settings(model: Any) -> dict[str, Any] | None:
    """The settings if the user sets none: on with flash attention on a GPU, else off.

    Without flash attention, each row's attention is computed over the other rows of the batch too.
    """
    from transformers.utils import import_utils

    flash = import_utils.is_flash_attn_2_available() or import_utils.is_flash_attn_3_available()
    half = model.dtype in (torch.float16, torch.bfloat16)
    suitable = flash and half and model.device.type == "cuda" and isinstance(model, transformers.PreTrainedModel)
    return {} if suitable else None


class ContinuousBatching:
    """Takes rows and settles them. Rows at which the library fails go to `hand_back`. Used from one thread."""

    def __init__(self, model: Any, options: dict[str, Any], hand_back: Callable[[GenerationRow], None]) -> None:
        self.model, self.options, self.hand_back = model, options, hand_back
        self.manager: Any = None
        self.settings: _Settings | None = None
        self.broken = False
        self.number = 0  # rows taken so far
        self.lock = threading.Lock()  # guards `rows`, which the results' thread empties
        self.rows: dict[str, GenerationRow] = {}

    def take(self, row: GenerationRow) -> bool:
        """True if this object answers the row; False if the caller must."""
        settings = _settings(row.params)
        if self.broken or settings is None or (self.settings is not None and settings != self.settings):
            return False
        if self.manager is None:
            try:
                self._start(settings)
            except Exception as error:  # the library is new: on an unknown device it may raise any exception
                self._give_up(error)
                return False
        prompt = row.prompt + row.tokens
        if len(row.prompt) + row.limit > self.manager.batch_processor.cache.max_tokens_read:
            return False  # it does not fit into the cache, and would end the library's thread
        self.number += 1
        name = str(self.number)
        with self.lock:
            self.rows[name] = row
        ends = sorted(row.stop_ids) or -1
        if self.manager.add_request(prompt, name, max_new_tokens=row.limit - len(row.tokens), eos_token_id=ends) is None:
            with self.lock:
                return self.rows.pop(name, None) is None  # if it is gone, the results' thread has handed it back
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
        self.results = threading.Thread(target=self._settle_rows, name="eagleray-continuous", daemon=True)
        self.results.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the context the library does not use the model."""
        with contextlib.ExitStack() as stack:
            if self.manager is not None:
                with contextlib.suppress(RuntimeError):  # the library's thread has ended
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
            "to avoid this warning, set engine.kwargs.continuous_batching=false",
            stacklevel=2,
        )

    def close(self) -> None:
        """Stops at once, and hands back the unfinished rows."""
        self.broken = True
        if self.settings is not None:
            self.manager.stop(block=True, hard_stop=True)
            self.results.join()
            self.manager.destroy()

    # --- The results' thread

    def _settle_rows(self) -> None:
        while True:
            output = self.manager.get_result(timeout=_POLL_S)
            if output is not None:
                with self.lock:
                    row = self.rows.pop(output.request_id, None)
                if row is not None:
                    self._settle(row, output)
            elif not self.manager.is_running():
                break
        if not self.broken:
            self._give_up(self.manager.background_thread_status.fatal_error or "its thread ended")
        with self.lock:
            left, self.rows = list(self.rows.values()), {}
        for row in left:
            self.hand_back(row)

    def _settle(self, row: GenerationRow, output: Any) -> None:
        if output.error is not None:
            return self.hand_back(row)
        row.tokens += output.generated_tokens
        if row.tokens and row.tokens[-1] in row.stop_ids:
            row.tokens.pop()
        else:
            row.finish = "length"
        row.settle()


def _settings(params: GenerationParams) -> _Settings | None:
    """The settings that all rows share; None for parameters that the library does not support, or not per row."""
    special = (params.logit_bias, params.frequency_penalty, params.presence_penalty, params.logprobs is not None)
    if any(special) or params.response_format or params.repetition_penalty not in (None, 1) or params.stop:
        return None
    if not params.temperature:
        return (0.0, None, None)
    if params.seed is not None or params.min_p:
        return None
    return (params.temperature, params.top_k, params.top_p)
