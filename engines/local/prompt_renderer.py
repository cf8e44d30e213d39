"""Renders and counts prompts as a local engine does, without loading the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engines.config import EngineConfig
from engines.local.chat_template import ChatTemplate
from engines.local.checkpoint_files import gguf_metadata, is_gguf, optional_file, own_chat_template
from engines.params import GenerationParams
from engines.registry import kind_of
from engines.rendering import render_messages
from engines.types import Message, Request


@dataclass(frozen=True, slots=True)
class PromptRenderer:
    """A model's chat template and tokenizer."""

    template: ChatTemplate
    tokenize: Callable[[str], list[int]]

    def render(self, messages: list[Message], params: GenerationParams, continues: bool = False) -> str:
        """The text of the prompt. Raises `EngineError("invalid_input")` if the chat template refuses the messages."""
        tools = params.tools if params.tool_choice != "none" else None
        return self.template.render(messages, tools, params.reasoning_effort, continues)

    def render_request(self, request: Request) -> str:
        """The request as text, for people: the prompt that the model gets, and its parameters. Raises as `render`."""
        return render_messages(request, self.render(request.messages, request.generation, request.continue_answer))

    def count(self, messages: list[Message], params: GenerationParams, continues: bool = False) -> int:
        """The prompt's length in tokens. Raises as `render`."""
        return len(self.tokenize(self.render(messages, params, continues)))


def prompt_renderer(config: EngineConfig) -> PromptRenderer | None:
    """The renderer of an engine's model. None if the tokenizer or the template cannot be found, or for an engine that loads
    no model, or one in a format of its own.

    A checkpoint on the hub is downloaded, without its weights. Raises `ConfigError` if the template or a GGUF file cannot
    be read.
    """
    kind = kind_of(config)
    if not kind.holds_model or kind.own_format:
        return None
    if is_gguf(config):
        tokenizer = gguf_metadata(config).tokenizer
        template = ChatTemplate(config.kwargs, tokenizer.template(), tokenizer.special("bos"), tokenizer.special("eos"))
        return PromptRenderer(template, tokenizer.tokenize)
    path = optional_file(config, "tokenizer.json")
    own, bos, eos = own_chat_template(config)
    if path is None or not (own or config.kwargs.get("chat_template")):
        return None
    tokenize = _fast_tokenizer(path)
    return tokenize and PromptRenderer(ChatTemplate(config.kwargs, own, bos, eos), tokenize)


def _fast_tokenizer(path: Path) -> Callable[[str], list[int]] | None:
    """The tokenizer of a tokenizer.json; None without the package `tokenizers`."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return tokenize
