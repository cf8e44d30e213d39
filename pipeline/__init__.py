"""Runs a model over a dataset: `from pipeline import infer`. Importing this loads no heavy library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.program.infer import infer as infer


def __getattr__(name: str) -> Any:
    if name == "infer":
        from pipeline.program.infer import infer

        return infer
    raise AttributeError(f"module 'pipeline' has no attribute '{name}'")
