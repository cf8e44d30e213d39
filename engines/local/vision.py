"""The eyes of `engine=transformers`: messages with images become tokens and tensors by the checkpoint's processor."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import httpx
import PIL.Image
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from engines.errors import invalid
from engines.media import image_of
from engines.text import for_template, one_line
from engines.types import Message

if TYPE_CHECKING:
    from engines.local.transformers_row import GenerationRow

_FETCH_S = 60.0
# Models that look at the images anew with each token (Llama 3.2 Vision, the first Idefics) want these kept up.
_EACH_STEP = ("cross_attention_mask", "image_attention_mask")


def sees(settings: Any) -> bool:
    """Whether a checkpoint of this config takes images beside text."""
    return settings.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def has_images(messages: Sequence[Message]) -> bool:
    contents = (message.get("content") for message in messages)
    return any(isinstance(content, list) and any(part["type"] != "text" for part in content) for content in contents)


class Vision:
    """A checkpoint's processor. Threads may share it."""

    def __init__(self, source: str, hub: dict[str, Any]) -> None:
        self.processor: Any = transformers.AutoProcessor.from_pretrained(source, **hub)
        self.lock = threading.Lock()  # a tokenizer changes its settings from call to call

    def read(
        self, messages: Sequence[Message], template: str, variables: dict[str, Any]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The prompt's tokens, and what else the model's `forward` takes with them, as a batch of one.

        Raises `EngineError("invalid_input")` for an image that cannot be had, and what the template raises.
        """
        shown = [for_template(message, parts=True) for message in messages]
        for message in shown:
            message["content"] = [_part(part) for part in message["content"]]
        with self.lock:
            found = self.processor.apply_chat_template(
                shown,
                chat_template=template,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                **variables,
            )
        inputs = {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}
        if any(name in inputs for name in _EACH_STEP):
            raise invalid(f"images are not supported for this kind of model: it takes {', '.join(sorted(inputs))}")
        return found["input_ids"][0].tolist(), inputs


def shapes(row: GenerationRow) -> tuple[Any, ...]:
    """What rows of one batch have in common: each processor's own way to pad images of other shapes is not for us."""
    return tuple(
        (name, None if _per_token(row, value) else tuple(value.shape[1:])) for name, value in sorted(row.images.items())
    )


def together(rows: Sequence[GenerationRow], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The images' inputs of a batch: what goes with the tokens padded at the left like them, the rest one after another."""
    batch = {}
    for name, first in rows[0].images.items():
        values = [row.images[name] for row in rows]
        if _per_token(rows[0], first):
            lines = [torch.cat([v[0], v.new_zeros(len(row.tokens))]) for row, v in zip(rows, values, strict=True)]
            batch[name] = pad_sequence(lines, batch_first=True, padding_side="left").to(device)
        else:
            joined = torch.cat(values)
            batch[name] = joined.to(device, dtype if joined.is_floating_point() else None)
    return batch


def _per_token(row: GenerationRow, value: torch.Tensor) -> bool:
    return tuple(value.shape) == (1, len(row.prompt))


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    if part["type"] != "image_url":
        raise invalid(f"engine=transformers takes text and images only, not a part of type '{part['type']}'")
    given = image_of(part)
    try:
        data = given.data if given.url is None else _fetch(given.url)
        image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    except PIL.UnidentifiedImageError:
        raise invalid("an image is of no kind that Pillow reads") from None
    except Exception as error:  # the web and image files: anything
        raise invalid(f"an image cannot be read: {one_line(error)}") from None
    return {"type": "image", "image": image}


def _fetch(url: str) -> bytes:
    return httpx.get(url, follow_redirects=True, timeout=_FETCH_S).raise_for_status().content
