"""Images for `engine=transformers`: the checkpoint's processor turns messages with images into tokens and tensors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from engines.errors import invalid
from engines.local.images import open_image
from engines.media import image_of
from engines.text import for_template, one_line
from engines.types import Message

if TYPE_CHECKING:
    from engines.local.transformers_row import GenerationRow

# Inputs of models that attend to the images at each decoded token (Llama 3.2 Vision, the first Idefics). The decode loop
# does not extend these from step to step.
_EACH_STEP = ("cross_attention_mask", "image_attention_mask")


def takes_images(settings: Any) -> bool:
    """A checkpoint with this config takes images and text."""
    return settings.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def has_images(messages: Sequence[Message]) -> bool:
    """A message has a content part that is not text."""
    contents = (message.get("content") for message in messages)
    return any(isinstance(content, list) and any(part["type"] != "text" for part in content) for content in contents)


class Vision:
    """A checkpoint's processor. Threads can share it. The constructor raises what transformers raises."""

    def __init__(self, source: str, hub: dict[str, Any], max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.processor: Any = transformers.AutoProcessor.from_pretrained(source, **hub)
        self.lock = threading.Lock()  # a tokenizer changes its own settings during a call

    def read(
        self, messages: Sequence[Message], template: str, variables: dict[str, Any]
    ) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The prompt's token ids, and the other inputs of the model's `forward`, with a batch size of 1.

        Raises `EngineError("invalid_input")` for an image that cannot be read, and any exception of the template.
        """
        plain = [for_template(message, parts=True) for message in messages]
        for message in plain:
            message["content"] = [_part(part, self.max_pixels) for part in message["content"]]
        with self.lock:
            found = self.processor.apply_chat_template(
                plain,
                chat_template=template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **variables,
            )
        inputs = {name: value for name, value in found.items() if name not in ("input_ids", "attention_mask")}
        if any(name in inputs for name in _EACH_STEP):
            raise invalid(f"images are not supported for this kind of model: it takes {', '.join(sorted(inputs))}")
        return found["input_ids"][0].tolist(), inputs


def image_shapes(row: GenerationRow) -> tuple[Any, ...]:
    """A key that is equal for rows whose images fit into one batch: each processor pads other shapes in its own way."""
    return tuple(
        (name, None if _per_token(row, value) else tuple(value.shape[1:])) for name, value in sorted(row.images.items())
    )


def batch_images(rows: Sequence[GenerationRow], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The image inputs of a batch. Inputs with a value per token are padded at the left; the others are concatenated."""
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
    """`value` has one element per prompt token: its shape is (1, tokens)."""
    return tuple(value.shape) == (1, len(row.prompt))


def _part(part: dict[str, Any], max_pixels: int) -> dict[str, Any]:
    """A content part as processors take it, with images as `PIL.Image`. Raises `EngineError("invalid_input")`."""
    if part["type"] == "text":
        return part
    if part["type"] != "image_url":
        raise invalid(f"engine=transformers takes text and images only, not a part of type '{part['type']}'")
    image = open_image(image_of(part).data, max_pixels)
    try:
        image = image.convert("RGB")
    except Exception as error:  # decoders raise many types
        raise invalid(f"an image cannot be read: {one_line(error)}") from None
    return {"type": "image", "image": image}
