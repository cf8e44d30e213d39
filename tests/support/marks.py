"""Which cases of a parametrized test are slow."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any, id: str | None = None) -> Any:
    """These values, in `make test-all` only."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)
