"""What an engine streams, read to its end."""

from __future__ import annotations

import asyncio
from typing import Any

from engines import Completion
from engines.base import Engine
from engines.params import GenerationParams
from engines.types import Delta, to_request
from tests.support.infer import ask


def streamed(engine: Engine, text: str, row: dict[str, Any] | None = None, **generation: Any) -> tuple[Any, Completion]:
    """The pieces, and the completion after them."""

    async def read() -> list[Any]:
        request = to_request(ask(text, **(row or {})), GenerationParams.parse(generation))
        return [item async for item in engine.stream(request)]

    *pieces, completion = asyncio.run(read())
    assert isinstance(completion, Completion)
    assert all(isinstance(piece, Delta) for piece in pieces)
    return pieces, completion


def joined(pieces: list[Delta], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)
