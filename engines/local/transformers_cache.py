"""A KV cache that a decode loop extends and shrinks in place.

The cache of transformers copies all its keys and values for every new token, and again when a row leaves the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

# Tokens for which a layer has room beyond those that it holds, when it is copied.
_ROOM = 64


class RoomyLayer(DynamicLayer):
    """The keys and values of one layer, in tensors with room for more tokens. `keys` and `values` are views of them."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values = layer.keys, layer.values
        self.stores = (layer.keys, layer.values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the tokens of one step; returns the keys and values of all tokens."""
        assert self.keys is not None and self.values is not None
        rows, length = len(self.keys), self.keys.shape[-2]
        end = length + key_states.shape[-2]
        if end > self.stores[0].shape[-2]:
            self.stores = (_copy(self.keys, end + _ROOM), _copy(self.values, end + _ROOM))
        self.keys, self.values = (store[:rows, ..., :end, :] for store in self.stores)
        self.keys[..., length:, :] = key_states
        self.values[..., length:, :] = value_states
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes the batch the rows of `beam_idx`, at most as many as it has. A row that keeps its place is not copied."""
        assert self.keys is not None and self.values is not None
        index = beam_idx.tolist()
        moved = [place for place, row in enumerate(index) if place != row]
        for states in (self.keys, self.values):
            if moved:
                states[moved] = states[[index[place] for place in moved]]
        self.keys, self.values = self.keys[: len(index)], self.values[: len(index)]


def _copy(states: torch.Tensor, length: int) -> torch.Tensor:
    """A tensor for `length` tokens that begins with those of `states`."""
    store = states.new_empty((*states.shape[:-2], length, states.shape[-1]))
    store[..., : states.shape[-2], :] = states
    return store


def make_room(cache: Any) -> None:
    """Replaces the layers of a cache that hold all tokens. A sliding window or a recurrent state stays what it is."""
    layers = getattr(cache, "layers", None)
    if layers is not None and not getattr(cache, "offloading", False):
        layers[:] = [
            RoomyLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in layers
        ]
