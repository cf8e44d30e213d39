"""LoRA adapters for `engine=vllm`: finding them, their ranks, and keeping rows with and without one apart."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from pathlib import Path

from engines.errors import ConfigError, EngineError, invalid
from engines.text import one_line

# The ranks that vLLM has kernels for.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class AdapterGate:
    """Keeps rows with an adapter and rows without one from being in vLLM at the same time.

    On CPU, vLLM computes rows without an adapter with the weights of the last adapter, without an error
    (vllm-project/vllm, pull request 48421). When a kind of rows gets its turn, all waiting rows of this kind enter. New
    rows of this kind enter as long as no row of the other kind waits.
    """

    def __init__(self) -> None:
        self.adapted = False
        self.inside = 0
        self.waiting: dict[bool, deque[asyncio.Future[None]]] = {False: deque(), True: deque()}

    async def enter(self, adapted: bool) -> None:
        """Waits until a row may be in vLLM; `adapted`: it has an adapter. Call `leave` afterwards."""
        if not self.inside or (adapted == self.adapted and not self.waiting[not adapted]):
            self.adapted = adapted
            self.inside += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self.waiting[adapted].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self.waiting[adapted]:
                self.waiting[adapted].remove(turn)
            elif not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self.inside -= 1
        if self.inside:
            return
        if self.waiting[not self.adapted]:
            self.adapted = not self.adapted
        for turn in self.waiting[self.adapted]:
            if not turn.done():
                turn.set_result(None)
                self.inside += 1
        self.waiting[self.adapted].clear()


def adapter_path(adapter: str) -> Path:
    """The directory of an adapter. An adapter on the hub is downloaded once per node.

    Raises `EngineError("invalid_input")` if there is no such adapter.
    """
    try:
        path = Path(adapter).expanduser()
        here = path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # the name is too long or has a NUL, or `~user` does not exist
        raise invalid(f"there is no adapter {adapter[:200]!r}: {one_line(error)}") from None
    if not here and (adapter.count("/") != 1 or adapter.startswith((".", "/", "~"))):
        raise invalid(f"there is no adapter '{adapter}': it is not a directory and not a hub id")
    if not here:
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(adapter))
        except Exception as error:  # the hub's client raises many types
            raise invalid(f"adapter '{adapter}' cannot be downloaded from the hub: {one_line(error)}") from None
    if not (path / "adapter_config.json").is_file():
        raise invalid(f"adapter '{adapter}' has no adapter_config.json")
    return path


def adapter_rank(adapter: str) -> int:
    """The smallest of vLLM's ranks that holds the adapter. Raises `ConfigError` if there is none."""
    try:
        rank = int(json.loads((adapter_path(adapter) / "adapter_config.json").read_text())["r"])
    except EngineError as error:
        raise ConfigError(f"engine.adapter: {error}", key="engine.adapter") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"engine.adapter: {adapter}/adapter_config.json has no rank r", key="engine.adapter") from None
    found = next((known for known in LORA_RANKS if known >= rank), None)
    if found is None:
        raise ConfigError(
            f"engine.adapter: rank {rank} is above {LORA_RANKS[-1]}, the highest rank of vLLM", key="engine.adapter"
        )
    return found
