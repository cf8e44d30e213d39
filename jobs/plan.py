"""`eagleray plan`: checks whether the model fits the hardware, and describes the dataset, without sending requests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engines.text import counted
from jobs.infer import start
from pipeline.config import Config
from pipeline.hardware import HardwareConfig, HardwareEntry, hardware_entries

PROBLEM = 3  # exit status if something does not fit
BAR = 30  # characters of the histogram's longest bar
UTILIZATION = 0.9  # vLLM's default share of the GPU's memory
MOST_TENSOR = 8  # GPUs of a node if hardware.gpus_per_node is not set

Line = tuple[str, str, bool]  # title, text, true for a problem


def main(argv: list[str]) -> int:
    return start(argv, help_text, _plan)


def help_text() -> str:
    return """\
Estimate a run without Ray and without loading weights: whether the model fits the hardware, the size of the dataset
and, if it is known, the cost.

  eagleray plan engine=… engine.model=… hardware=… dataset.path=IN [key=value …]

Takes the keys of `eagleray infer`, which lists them. output.path is not needed. Without dataset.path, only the model is
checked. hardware.gpu_memory is the memory of each GPU in GiB. A GGUF file on the hub is downloaded.

Exit status: 0 it fits; 3 it does not, or rows cannot be read or are too long; 2 wrong configuration."""


def _plan(config: Config) -> int:
    from rich.console import Console

    from engines.errors import ConfigError
    from engines.local.memory_estimate import footprint
    from pipeline.output.ownership import Ownership
    from pipeline.preflight.dry_run import show
    from pipeline.storage.filesystem import resolve

    config.check(runs=False)
    if config.output.path and config.dataset.path:
        Ownership.look(config, *resolve(config.output.path))
    entries = hardware_entries(config.hardware, config.engine)
    console, models = Console(highlight=False), [footprint(entry.engine) for entry in entries]
    model = models[0]
    if model is None and not config.dataset.path:
        raise ConfigError(
            f"engine={config.engine.kind} holds no model here and dataset.path is missing: nothing to plan",
            key="dataset.path",
        )
    abouts = [_model(entry, model) for entry, model in zip(entries, models, strict=True) if model]
    if len(abouts) > 1:  # the entries of a mixed fleet
        abouts = [[("entry", entry.name, False), *lines] for entry, lines in zip(entries, abouts, strict=True)]
    context = min((model.context for model in models if model), default=None)
    abouts.append(_dataset(config, context, console) if config.dataset.path else [])
    for lines in filter(None, abouts):
        show(lines, console)
    return PROBLEM if any(bad for lines in abouts for _, _, bad in lines) else 0


# --- the model -------------------------------------------------------------------------------------------------------


def _model(entry: HardwareEntry, model: Any) -> list[Line]:
    from engines.errors import ConfigError
    from engines.registry import kind_of
    from pipeline.executors.live.placement import placement

    engine, hardware, context = entry.engine, entry.hardware, model.context
    placed = placement(hardware, engine, entry.name)
    gpus = sum(bundle.get("GPU", 0) for bundle in placed.bundles)
    tensor, stages = (engine.kwargs.get(f"{name}_parallel_size") or 1 for name in ("tensor", "pipeline"))
    kind = kind_of(engine)
    if not kind.parallel_sizes:  # layers are spread over the GPUs
        tensor, stages = 1, max(1, int(gpus))
    on_gpu = gpus > 0 and (not kind.gpu_by_layers or bool(engine.kwargs.get("n_gpu_layers")))
    place = "GPU" if on_gpu else "process"
    memory = (hardware.memory * 2**30 or _machine_memory()) / (tensor * stages)
    if on_gpu:
        # vLLM uses its share of the whole GPU, even if the replica reserves only a part of the GPU in Ray.
        memory = hardware.gpu_memory * 2**30 * (1 if kind.parallel_sizes else min(1, gpus))
    share = engine.kwargs.get("gpu_memory_utilization") or UTILIZATION
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(
            f"engine.kwargs.gpu_memory_utilization must be above 0 and at most 1, not {share!r}", key="engine.kwargs"
        )
    # llama.cpp allocates the cache of all its sequences when it starts; other engines share one cache.
    needed = int(engine.kwargs.get("n_seq_max") or engine.max_concurrency or 1) if kind.reserves_sequences else 1

    def left(tensor: int, stages: int) -> float:
        return memory * share - model.weight_bytes / (tensor * stages)

    def fitting(tensor: int, stages: int) -> int:
        # At least a byte, because a model without attention has no cache.
        return max(0, int(left(tensor, stages) // max(1, model.sequence_bytes(context, tensor) / stages)))

    replicas = f"{placed.low:,}" + (f" to {placed.high:,}" if placed.high > placed.low else "")
    source = "counted in its files" if model.counted else "by the dimensions in its config"
    each = [f"; {_size(size / stages)} on each {place}" if tensor * stages > 1 else "" for size in (
        model.weight_bytes / tensor, model.sequence_bytes(context, tensor)
    )]  # fmt: skip
    lines: list[Line] = [
        ("model", f"{engine.model}: {model.parameters / 1e9:,.3g} billion parameters, {source}", False),
        ("replicas", f"{replicas}, {tensor * stages} × {place} each", False),
        ("weights", f"{_size(model.weight_bytes)}, {model.weight_format}{each[0]}", False),
        (
            "KV cache",
            f"{_size(model.sequence_bytes(1))} a token, {_size(model.sequence_bytes(context))} a sequence of "
            f"{context:,} tokens{each[1]}",
            False,
        ),
    ]
    if not memory:
        return [*lines, ("fits", f"unknown: set {entry.name}.gpu_memory to the GiB of each GPU", False)]
    room, found = left(tensor, stages), fitting(tensor, stages)
    rest = f"{_size(room)} left after the weights" if room > 0 else f"the weights need {_size(-room)} more"
    lines.append(("memory", f"{_size(memory)} for each {place}, {share:.0%} of it used: {rest}", False))
    text = f"{counted(found, 'sequence')} of {context:,} tokens at once" + (f", {needed:,} needed" if needed > 1 else "")
    lines.append(("fits", f"{'yes' if found >= needed else 'no'}: {text}", found < needed))
    if on_gpu and kind.parallel_sizes:
        best = next((sizes for sizes in _parallel_sizes(hardware, model) if fitting(*sizes) >= needed), None)
        lines.append(("suggested", _suggestion(best), False))
    return lines


def _suggestion(sizes: tuple[int, int] | None) -> str:
    """The keys for these tensor and pipeline parallel sizes, or what else helps if none fit."""
    if sizes is None:
        return "none of these GPUs: use more or larger GPUs, a quantized model, or a smaller engine.kwargs.max_model_len"
    text = f"engine.kwargs.tensor_parallel_size={sizes[0]}"
    return text + (f" engine.kwargs.pipeline_parallel_size={sizes[1]}" if sizes[1] > 1 else "")


def _parallel_sizes(hardware: HardwareConfig, model: Any) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline parallel sizes that divide this model, smallest first. Several nodes use all GPUs of each."""
    node = hardware.gpus_per_node or MOST_TENSOR
    for stages in range(1, hardware.nodes + 1):
        for tensor in (1 << power for power in range(node.bit_length()) if stages == 1 or 1 << power == node):
            if model.heads % tensor == 0 and (model.kv_heads % tensor == 0 or tensor % model.kv_heads == 0):
                yield tensor, stages


def _size(size: float) -> str:
    power, unit = next(((p, u) for p, u in ((30, "GiB"), (20, "MiB")) if size >= 1 << p), (10, "KiB"))
    return f"{size / (1 << power):,.1f} {unit}"


def _machine_memory() -> float:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:  # the limit of the container; the file says "max" if there is none
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return memory


# --- the dataset -----------------------------------------------------------------------------------------------------


def _dataset(config: Config, context: int | None, console: Any) -> list[Line]:
    import numpy as np

    from engines.local.prompt_renderer import prompt_renderer
    from pipeline.dataset.formats import RowParser
    from pipeline.dataset.keys import RequestHasher
    from pipeline.dataset.plan import list_splits
    from pipeline.dataset.reader import RowReader
    from pipeline.preflight.dataset_estimate import DatasetEstimate

    dataset = config.dataset
    parser = RowParser.of(config)
    row_reader = RowReader(parser, RequestHasher(config.engine, config.params()), dataset.max_row_bytes)
    found = DatasetEstimate(config, context, prompt_renderer(config.engine)).read(list_splits(config, console), row_reader)
    asked, prompts = found.requests, np.array(found.prompts or [0])
    rows = (
        f"{found.rows:,} in {counted(found.files, 'file')}: {counted(asked, 'request')} to send, "
        f"{counted(found.duplicates, 'duplicate')}"
    )
    lines: list[Line] = [("rows", rows, False)]
    if found.invalid:
        lines.append(("invalid", f"{counted(found.invalid, 'row')} cannot be read", True))
        lines += [("", reason, True) for reason in found.reasons]
    lines += [("" if at else "columns", f"{sentence}.", False) for at, sentence in enumerate(found.columns())]
    least, median, most_of, most = (int(value) for value in np.percentile(prompts, (0, 50, 99, 100)))
    spread = f"least {least:,}, median {median:,}, 99% {most_of:,}, most {most:,}"
    lines.append(("prompt tokens", f"{prompts.sum():,} ({found.way}); {spread}", False))
    edges = [1 << power for power in range(max(0, least - 1).bit_length(), max(0, most - 1).bit_length() + 1)]
    counts = np.histogram(prompts, [0, *(edge + 0.5 for edge in edges)])[0]
    for edge, rows_here in zip(edges, counts.tolist(), strict=True):
        lines.append((f"  to {edge:,}", f"{'█' * -(-BAR * rows_here // max(counts.tolist()))} {rows_here:,}", False))
    lines.append(("output tokens", found.answers, False))
    fits = (
        "unknown: the context of this engine's model is unknown" if context is None else f"none: all fit {context:,} tokens"
    )
    lines += list(found.lengths(bad=True)) or [("too long", fits, False)]
    if not config.engine.provider:
        return [*lines, ("time", "unknown: measure it with eagleray infer dataset.limit=100", False)]
    cached = ", without discounts for cached input" if config.engine.price.known else ""
    time = _time(config, asked, int(prompts.sum()), found.output)
    return [*lines, ("cost", f"{found.cost()}{cached}", False), ("time", time, False)]


def _time(config: Config, asked: int, prompt: int, output: float) -> str:
    engine = config.engine
    limits = (
        ("requests_per_minute", asked),
        ("input_tokens_per_minute", prompt),
        ("output_tokens_per_minute", output),
    )
    minutes = [(amount / getattr(engine, name), name) for name, amount in limits if getattr(engine, name)]
    time = "unknown: no limits per minute are set"
    if minutes:
        time = f"about {max(minutes)[0]:,.1f} minutes by engine.{max(minutes)[1]}, if the provider is fast enough"
    return time


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
