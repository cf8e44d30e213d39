"""`eagleray plan`: whether the model fits the hardware, and what the dataset asks for, before anything is asked."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.infer import start
from pipeline.config import Config, HardwareConfig

PROBLEM = 3  # the exit status where something does not fit
SHOWN = 3  # examples of what is wrong
BAR = 30  # characters of the histogram's longest bar
UTILIZATION = 0.9  # vLLM's own default: the rest is for the system
MOST_TENSOR = 8  # GPUs of a node, where nobody says

Line = tuple[str, str, bool]  # title, text, whether it tells a problem


def main(argv: list[str]) -> int:
    return start(argv, help_text, _plan)


def help_text() -> str:
    return """\
Says what a run would take, without Ray and without loading weights: whether the model fits the hardware, what the
dataset holds, and what it costs, where that can be known.

  eagleray plan engine=… engine.model=… hardware=… dataset.path=IN [key=value …]

Takes the keys of `eagleray infer`, which lists them. output.path is not needed; without dataset.path only the model is
looked at. hardware.gpu_memory tells the GiB of each GPU. A GGUF file on the hub is fetched whole.

Exit status: 0 it fits; 3 it does not, or rows cannot be read or are too long; 2 wrong configuration."""


def _plan(config: Config) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from engines.footprint import footprint
    from engines.types import ConfigError

    config.check(runs=False)
    console, model = Console(highlight=False), footprint(config.engine)
    if model is None and not config.dataset.path:
        raise ConfigError(f"engine={config.engine.kind} holds no model here and dataset.path is missing: nothing to plan")
    about_model = _model(config, model) if model else []
    about_dataset = _dataset(config, model.context if model else None, console) if config.dataset.path else []
    for lines in filter(None, (about_model, about_dataset)):
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        for title, text, bad in lines:
            # As Text: a row's own words may be in it and must not be obeyed as markup.
            table.add_row(title, Text(text, "red" if bad else ""))
        console.print(table, "")
    return PROBLEM if any(bad for _, _, bad in about_model + about_dataset) else 0


# --- the model -------------------------------------------------------------------------------------------------------


def _model(config: Config, model: Any) -> list[Line]:
    from engines.types import ConfigError
    from pipeline.placement import placement

    engine, hardware, context = config.engine, config.hardware, model.context
    placed = placement(hardware, engine)
    gpus = sum(bundle.get("GPU", 0) for bundle in placed.bundles)
    tensor, stages = (engine.kwargs.get(f"{name}_parallel_size") or 1 for name in ("tensor", "pipeline"))
    if engine.kind != "vllm":  # layers are spread over the GPUs
        tensor, stages = 1, max(1, int(gpus))
    on_gpu = gpus > 0 and (engine.kind != "llamacpp" or bool(engine.kwargs.get("n_gpu_layers")))
    place = "GPU" if on_gpu else "process"
    memory = (hardware.memory * 2**30 or _machine_memory()) / (tensor * stages)
    if on_gpu:
        # vLLM takes its share of the whole GPU, also where it has but a part of it.
        memory = hardware.gpu_memory * 2**30 * (1 if engine.kind == "vllm" else min(1, gpus))
    share = engine.kwargs.get("gpu_memory_utilization") or UTILIZATION
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ConfigError(f"engine.kwargs.gpu_memory_utilization must be above 0 and at most 1, not {share!r}")
    # llama.cpp reserves the cache of all its sequences when it starts; the others share what there is.
    needed = int(engine.kwargs.get("n_seq_max") or engine.max_concurrency or 1) if engine.kind == "llamacpp" else 1

    def left(tensor: int, stages: int) -> float:
        return memory * share - model.weight_bytes / (tensor * stages)

    def fitting(tensor: int, stages: int) -> int:
        # At least a byte: a model without attention keeps no cache.
        return max(0, int(left(tensor, stages) // max(1, model.sequence_bytes(context, tensor) / stages)))

    many = f"{placed.low:,}" + (f" to {placed.high:,}" if placed.high > placed.low else "")
    told = "counted in its files" if model.counted else "by the dimensions in its config"
    each = [f"; {_size(size / stages)} on each {place}" if tensor * stages > 1 else "" for size in (
        model.weight_bytes / tensor, model.sequence_bytes(context, tensor)
    )]  # fmt: skip
    lines: list[Line] = [
        ("model", f"{engine.model}: {model.parameters / 1e9:,.3g} billion parameters, {told}", False),
        ("replicas", f"{many}, {tensor * stages} × {place} each", False),
        ("weights", f"{_size(model.weight_bytes)}, {model.numbers}{each[0]}", False),
        (
            "KV cache",
            f"{_size(model.sequence_bytes(1))} a token, {_size(model.sequence_bytes(context))} a sequence of "
            f"{context:,} tokens{each[1]}",
            False,
        ),
    ]
    if not memory:
        return [*lines, ("fits", "not known: hardware.gpu_memory tells the GiB of each GPU", False)]
    room, found = left(tensor, stages), fitting(tensor, stages)
    rest = f"{_size(room)} left after the weights" if room > 0 else f"the weights need {_size(-room)} more"
    lines.append(("memory", f"{_size(memory)} for each {place}, {share:.0%} of it used: {rest}", False))
    text = f"{found:,} sequences of {context:,} tokens at once" + (f", {needed:,} needed" if needed > 1 else "")
    lines.append(("fits", f"{'yes' if found >= needed else 'no'}: {text}", found < needed))
    if on_gpu and engine.kind == "vllm":
        best = next((way for way in _ways(hardware, model) if fitting(*way) >= needed), None)
        wanted = "none of these GPUs: more or larger ones, fewer bits, or a smaller engine.kwargs.max_model_len"
        if best is not None:
            wanted = f"engine.kwargs.tensor_parallel_size={best[0]}"
            wanted += f" engine.kwargs.pipeline_parallel_size={best[1]}" if best[1] > 1 else ""
        lines.append(("suggested", wanted, False))
    return lines


def _ways(hardware: HardwareConfig, model: Any) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline sizes that divide this model, the smallest first; over several nodes, all GPUs of each."""
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
    try:  # a container's limit, or "max"
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return memory


# --- the dataset -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rows:
    """What the dataset holds. Tokens are those of distinct requests: equal deterministic ones are asked once."""

    exact: bool = True  # the prompts' tokens
    files: int = 0
    rows: int = 0
    keys: set[bytes] = field(default_factory=set)  # 8 bytes of each distinct request's
    prompts: array[int] = field(default_factory=lambda: array("q"))
    output: float = 0.0  # tokens all answers may have
    bounded: bool = True  # by max_tokens
    invalid: int = 0
    reasons: list[str] = field(default_factory=list)
    too_long: int = 0  # prompts that do not fit the context
    cut: int = 0  # answers that max_tokens allows and the context does not
    long: list[str] = field(default_factory=list)  # examples of both


def _read(config: Config, context: int | None, console: Any) -> Rows:
    from engines.footprint import prompt_counter
    from engines.remote.engine import BYTES_PER_TOKEN, FIRST_OUTPUT
    from engines.text import for_template
    from engines.types import DEFAULT_MAX_TOKENS, EngineError, Message
    from engines.types import answer as said
    from pipeline.feed import Interpreter
    from pipeline.formats import RowParser
    from pipeline.keys import Keyer
    from pipeline.lossless import dumps
    from pipeline.run import list_pieces

    base, dataset, count = config.params(), config.dataset, prompt_counter(config.engine)
    parser = RowParser(dataset.format, dataset.columns, dataset.template)
    interpreter = Interpreter(parser, Keyer(config.engine, base), dataset.max_row_bytes)
    pieces = list_pieces(config, console)
    found = Rows(count is not None, len({piece.chunk.file for piece in pieces}))
    usual = FIRST_OUTPUT if config.engine.provider else DEFAULT_MAX_TOKENS
    for item in (item for piece in pieces for items in interpreter.read(piece) for item in items):
        found.rows += 1
        failure, tokens = item.failure.message if item.failure else "", 0
        params = base.override(item.parsed.generation) if item.parsed else base
        turns = item.parsed.turns if item.parsed else []
        try:
            # Of a script: its last request, without what the model says before.
            between: list[Message] = [m for turn in turns for m in (said(""), Message(role="user", content=turn))]
            if item.parsed and count:
                tokens = count([*item.parsed.messages, *between], params)
            elif item.parsed:  # as a remote engine reserves, before the provider has told better; images are left out
                shown = [*map(for_template, [*item.parsed.messages, *between]), *(params.tools or ())]
                tokens = round(len(dumps(shown)) / BYTES_PER_TOKEN)
        except EngineError as error:
            failure = f"{item.id}: {error}"
        if failure or not item.key:
            found.invalid += 1
            found.reasons += [failure] if len(found.reasons) < SHOWN else []
            continue
        if context and tokens + (params.max_tokens or 1) > context:  # without max_tokens an answer gets what is left
            found.too_long += tokens >= context
            found.cut += tokens < context
            answer = f" and {params.max_tokens:,} for the answer" if params.max_tokens else ""
            found.long += [f"{item.id}: {tokens:,} tokens{answer}"] if len(found.long) < SHOWN else []
        if item.key[:8] not in found.keys:
            found.keys.add(item.key[:8])
            found.prompts.append(tokens)
            limit = params.max_tokens or usual
            found.output += (len(turns) + (params.n or 1)) * (max(0, min(limit, context - tokens)) if context else limit)
            found.bounded &= bool(params.max_tokens or not config.engine.provider)
    return found


def _dataset(config: Config, context: int | None, console: Any) -> list[Line]:
    import numpy as np

    found = _read(config, context, console)
    asked, prompts = len(found.keys), np.array(found.prompts or [0])
    duplicates = found.rows - found.invalid - asked
    rows = f"{found.rows:,} in {found.files:,} files: {asked:,} requests to ask, {duplicates:,} duplicates"
    lines: list[Line] = [("rows", rows, False)]
    if found.invalid:
        lines.append(("invalid", f"{found.invalid:,} cannot be asked", True))
        lines += [("", reason, True) for reason in found.reasons]
    way = "by the model's tokenizer and template" if found.exact else "estimated: 4 bytes of JSON each"
    least, median, most_of, most = (int(value) for value in np.percentile(prompts, (0, 50, 99, 100)))
    spread = f"least {least:,}, median {median:,}, 99% {most_of:,}, most {most:,}"
    lines.append(("prompt tokens", f"{prompts.sum():,} ({way}); {spread}", False))
    edges = [1 << power for power in range(max(0, least - 1).bit_length(), max(0, most - 1).bit_length() + 1)]
    counts = np.histogram(prompts, [0, *(edge + 0.5 for edge in edges)])[0]
    for edge, rows_here in zip(edges, counts.tolist(), strict=True):
        lines.append((f"  to {edge:,}", f"{'█' * -(-BAR * rows_here // max(counts.tolist()))} {rows_here:,}", False))
    words = "at most" if found.bounded else "about (nothing bounds all of them; see generation.max_tokens)"
    lines.append(("output tokens", f"{words} {found.output:,.0f}", False))
    if context is None:
        lines.append(("too long", "not known: the engine's context is not known here", False))
    elif found.too_long + found.cut:
        text = f"{found.too_long:,} prompts do not fit {context:,} tokens; {found.cut:,} answers may be cut short by it"
        lines += [("too long", text, True), *(("", example, True) for example in found.long)]
    else:
        lines.append(("too long", f"none: all fit {context:,} tokens", False))
    return lines + _cost_and_time(config, asked, int(prompts.sum()), found)


def _cost_and_time(config: Config, asked: int, prompt: int, found: Rows) -> list[Line]:
    engine, price = config.engine, config.engine.price
    if not engine.provider:
        return [("time", "not known beforehand: eagleray infer with dataset.limit=100 measures it", False)]
    cost = "not known: engine.price.input and engine.price.output tell it"
    if price.input or price.output:
        dollars = (prompt * price.input + found.output * price.output) / 1e6
        cost = f"{'at most' if found.bounded else 'about'} ${dollars:,.2f}, with nothing from the provider's cache"
    limits = (
        ("requests_per_minute", asked),
        ("input_tokens_per_minute", prompt),
        ("output_tokens_per_minute", found.output),
    )
    minutes = [(amount / getattr(engine, name), name) for name, amount in limits if getattr(engine, name)]
    time = "not known: no limits a minute are set"
    if minutes:
        time = f"about {max(minutes)[0]:,.1f} minutes by engine.{max(minutes)[1]}, if the provider is fast enough for it"
    return [("cost", cost, False), ("time", time, False)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
