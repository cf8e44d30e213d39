"""`eagleray tune`: its keys, and the settings that it tries for each kind of engine. Loads no model.

A function for each kind yields settings, most promising first. `engines/registry.py` names the function of a kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engines.config import EngineConfig, key
from engines.local.cores import physical_cores, usable_cpus
from engines.validation import above, at_least

Option = Mapping[str, Any]  # dotted key of the configuration -> value
KWARGS = "engine.kwargs."
SLOTS = "engine.max_concurrency"


@dataclass(slots=True)
class TuneConfig:
    rows: int = key(64, "number of rows in the sample of eagleray tune", at_least(4))
    seed: int = key(0, "seed of this sample: the same seed takes the same rows")
    minutes: float = key(10.0, "maximum minutes that eagleray tune takes", above(0))
    may_change_answers: bool = key(
        False, "eagleray tune also tries settings that may change answers, such as the type of the KV cache"
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts that decide which values are worth a try."""

    gpus: int  # that a replica may use
    rows: int  # in the sample
    replicas: int = 1  # of the configured engine that work on this machine at once


@dataclass(frozen=True, slots=True)
class Setting:
    """Options for the same keys, in chains. A chain ends at the first option that is not faster than all before it."""

    chains: tuple[tuple[Option, ...], ...]
    is_ladder: bool = False  # the first chain goes up, the second one down; if one gains, the other is left out
    left_out: Option | None = None  # the next option up, for which the sample is too small

    def within(self, refused: Iterable[str]) -> Setting | None:
        """This setting without the options that have a refused key; None if no option is left."""
        names = set(refused)
        chains = (tuple(option for option in chain if not names & set(option)) for chain in self.chains)
        kept = tuple(filter(None, chains))
        return dataclasses.replace(self, chains=kept) if kept else None


def _ladder(names: Iterable[str], now: float, values: Iterable[int], most: float | None = None) -> Setting:
    """Values above `now` in rising order, and those below it in falling order. `most` is the highest one to try."""
    names, values = tuple(names), sorted(values)
    up = [dict.fromkeys(names, value) for value in values if value > now and (most is None or value <= most)]
    down = [dict.fromkeys(names, value) for value in reversed(values) if value < now]
    beyond = [dict.fromkeys(names, value) for value in values if most is not None and value > max(most, now)]
    return Setting((tuple(up), tuple(down)), True, beyond[0] if beyond else None)


def _each(*options: Option) -> Setting:
    return Setting(tuple((option,) for option in options))


def _slots(now: int, machine: Machine, name: str = SLOTS, values: Iterable[int] = (4, 8, 16, 32, 64, 128, 256)) -> Setting:
    # With fewer than two rows for each slot, most of the time would be the end of the sample, where slots are empty.
    return _ladder((name,), now, values, machine.rows // machine.replicas // 2)


def _thread_counts(now: int) -> list[int]:
    counts = {physical_cores(), len(usable_cpus()), max(1, physical_cores() // 2)}
    return sorted(counts - {now}, reverse=True)


# -- the kinds of engines ---------------------------------------------------------------------------------------------


def concurrency(config: EngineConfig, machine: Machine) -> Iterator[Setting]:
    """Of a server: the requests in flight. The server and the configured limits decide how many are of use."""
    yield _slots(config.max_concurrency or 64, machine, values=(4, 8, 16, 32, 64, 128, 256, 512))


def llamacpp(config: EngineConfig, machine: Machine) -> Iterator[Setting]:
    from engines.local.llama_library import L

    kwargs = config.kwargs
    on_gpu = bool(kwargs.get("n_gpu_layers"))
    if not on_gpu and L.llama_supports_gpu_offload():
        yield _each({f"{KWARGS}n_gpu_layers": -1})
    slots = kwargs.get("n_seq_max") or config.max_concurrency or 16
    yield _slots(slots, machine, f"{KWARGS}n_seq_max" if "n_seq_max" in kwargs else SLOTS)
    batch = (f"{KWARGS}n_batch", f"{KWARGS}n_ubatch")
    yield _ladder(batch, kwargs.get("n_ubatch", min(512, kwargs.get("n_batch", 512))), (128, 256, 512, 1024, 2048))
    threads = (f"{KWARGS}n_threads", f"{KWARGS}n_threads_batch")
    yield _each(*(dict.fromkeys(threads, n) for n in _thread_counts(kwargs.get("n_threads", physical_cores()))))
    yield _each({f"{KWARGS}prompt_lookup": not kwargs.get("prompt_lookup")})
    if kwargs.get("draft_model"):
        yield _ladder((f"{KWARGS}draft_tokens",), kwargs.get("draft_tokens", 8), (2, 4, 8, 16))
    flash = f"{KWARGS}flash_attn"
    yield _each({flash: not kwargs.get("flash_attn", on_gpu)})
    if not {"type_k", "type_v"} & kwargs.keys():
        yield _each({f"{KWARGS}type_k": "q8_0", f"{KWARGS}type_v": "q8_0", flash: True})


def transformers(config: EngineConfig, machine: Machine) -> Iterator[Setting]:
    kwargs = config.kwargs
    batch = kwargs.get("max_batch_size") or config.max_concurrency or 32
    yield _slots(batch, machine, f"{KWARGS}max_batch_size", (4, 8, 16, 32, 64, 128, 256))
    if machine.gpus:
        yield _each({f"{KWARGS}continuous_batching": not kwargs.get("continuous_batching")})
    else:
        yield _each(*({"hardware.cpus": n} for n in _thread_counts(physical_cores())))
    name = "dtype" if "dtype" in kwargs else "torch_dtype"
    types = {"bfloat16", "float16" if machine.gpus else "float32"} - {kwargs.get(name)}
    yield _each(*({KWARGS + name: each} for each in sorted(types)))


def vllm(config: EngineConfig, machine: Machine) -> Iterator[Setting]:
    kwargs = config.kwargs
    yield _parallel(config, machine)
    # vLLM's defaults for offline use; those of the largest GPUs are higher.
    rows = kwargs.get("max_num_seqs") or 256
    yield _slots(rows, machine, f"{KWARGS}max_num_seqs", (16, 32, 64, 128, 256, 512, 1024))
    tokens = kwargs.get("max_num_batched_tokens") or (8192 if machine.gpus else 4096)
    yield _ladder((f"{KWARGS}max_num_batched_tokens",), tokens, (1024, 2048, 4096, 8192, 16384, 32768))
    yield _each({f"{KWARGS}enable_prefix_caching": not kwargs.get("enable_prefix_caching", True)})
    if not kwargs.get("speculative_config"):
        lookup = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
        yield _each({f"{KWARGS}speculative_config": lookup})
    if machine.gpus and not kwargs.get("kv_cache_dtype"):
        yield _each({f"{KWARGS}kv_cache_dtype": "fp8"})


def sglang(config: EngineConfig, machine: Machine) -> Iterator[Setting]:
    kwargs = config.kwargs
    yield _parallel(config, machine)
    running = kwargs.get("max_running_requests") or 256
    yield _slots(running, machine, f"{KWARGS}max_running_requests", (32, 64, 128, 256, 512, 1024))
    yield _ladder((f"{KWARGS}chunked_prefill_size",), kwargs.get("chunked_prefill_size") or 8192, (2048, 4096, 8192, 16384))
    if not kwargs.get("kv_cache_dtype"):
        yield _each({f"{KWARGS}kv_cache_dtype": "fp8_e5m2"})


def _parallel(config: EngineConfig, machine: Machine) -> Setting:
    """All GPUs of this machine as replicas of 1, 2, 4, … GPUs each."""
    name, now = f"{KWARGS}tensor_parallel_size", config.kwargs.get("tensor_parallel_size") or 1
    sizes = [1 << power for power in range(machine.gpus.bit_length()) if machine.gpus % (1 << power) == 0]
    used = {now} if now * machine.replicas == machine.gpus else set()
    return _each(
        *(
            {name: size, "hardware.gpus": None, "hardware.replicas": machine.gpus // size}
            for size in sizes
            if machine.gpus > 1 and size not in used
        )
    )
