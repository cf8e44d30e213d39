"""The attention of `engine=transformers` for one new token a row, against the function of transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engines.local.transformers_attention import attention

ROWS, LENGTH, WIDTH = 3, 11, 8


class Layer(torch.nn.Module):
    """What the function reads of a layer of a model."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def hidden(*shape: int) -> torch.Tensor:
    """True where a row may look: row i has i tokens of padding at its start."""
    return (torch.arange(LENGTH) >= torch.arange(ROWS)[:, None])[:, None, None].expand(ROWS, *shape, LENGTH)


def added(*shape: int) -> torch.Tensor:
    return torch.zeros(ROWS, *shape, LENGTH).masked_fill(~hidden(*shape), -1e30)


@pytest.mark.parametrize(
    ("heads", "keys", "tokens", "mask"),
    [
        (6, 2, 1, lambda: None),
        (6, 2, 1, lambda: hidden(1, 1)),
        (6, 2, 1, lambda: added(1, 1)),
        (6, 1, 1, lambda: hidden(1, 1)),
        (6, 6, 1, lambda: hidden(1, 1)),
        (6, 2, 1, lambda: added(6, 1) * 0.5 + torch.randn(6, 1, 1)),
        (6, 2, 4, lambda: hidden(1, 4)),
    ],
    ids=["no mask", "mask", "bias", "one key head", "as many key heads", "a bias of each head", "several tokens"],
)
def test_the_result_is_that_of_repeated_keys(heads: int, keys: int, tokens: int, mask: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    query = torch.randn(ROWS, heads, tokens, WIDTH)
    key, value = torch.randn(ROWS, keys, LENGTH, WIDTH), torch.randn(ROWS, keys, LENGTH, WIDTH)
    given = (Layer(heads // keys), query, key, value, mask())
    expected, _ = sdpa_attention_forward(*given, scaling=0.3)
    found, _ = attention(*given, scaling=0.3)
    assert found.shape == (ROWS, tokens, heads, WIDTH)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_bias_of_positions_is_added() -> None:
    query, key, value = (
        torch.randn(ROWS, 6, 1, WIDTH),
        torch.randn(ROWS, 2, LENGTH, WIDTH),
        torch.randn(ROWS, 2, LENGTH, WIDTH),
    )
    bias = torch.randn(1, 6, 1, LENGTH)
    given = (Layer(3), query, key, value, hidden(1, 1))
    expected, _ = sdpa_attention_forward(*given, position_bias=bias)
    assert torch.allclose(attention(*given, position_bias=bias)[0], expected, atol=1e-6)


class Largest(TorchDispatchMode):
    """Measures the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(each.numel() for each in [made] if isinstance(each, torch.Tensor))])
        return made


def test_keys_and_values_are_not_repeated() -> None:
    query, key = torch.randn(ROWS, 6, 1, WIDTH), torch.randn(ROWS, 2, LENGTH, WIDTH)
    given = (Layer(3), query, key, key, hidden(1, 1))
    with Largest() as original:
        sdpa_attention_forward(*given)
    with Largest() as ours:
        attention(*given)
    assert original.size == 3 * key.numel()
    assert ours.size < key.numel()
