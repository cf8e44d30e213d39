"""Renders chat templates as transformers does, without importing transformers."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from engines.errors import ConfigError, invalid
from engines.text import for_template, load_chat_template
from engines.types import Message

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Marks the end of an answer to continue, in characters that no text has: the template's own end of the message follows.
_END = "\ue000end of answer\ue001"


class ChatTemplate:
    """The template in `kwargs["chat_template"]`, else the model's `own`, else ChatML.

    `bos` and `eos` are the texts of the model's first and last token. Raises `ConfigError` for invalid Jinja.
    """

    def __init__(self, kwargs: dict[str, Any], own: str | None, bos: str, eos: str) -> None:
        text = load_chat_template(kwargs.get("chat_template")) or own or _CHATML
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            # The `generation` tag only marks the text that training uses.
            self.template = environment.from_string(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text))
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}", key="engine.kwargs") from None
        self.variables = {"bos_token": bos, "eos_token": eos, **kwargs.get("chat_template_kwargs", {})}

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        effort: str | None,
        continues: bool = False,
        whole: bool = False,
    ) -> str:
        """The text of the prompt. If `continues`, it ends with the last message, whose text the answer continues.

        If `whole`, it is the conversation alone, without the beginning of a next answer.

        Raises `EngineError("invalid_input")` if the template raises an exception or does not show the last message.
        """
        variables = {"tools": tools, "add_generation_prompt": not (continues or whole), **self.variables}
        if effort is not None:
            variables["reasoning_effort"] = effort
        plain = [for_template(message) for message in messages]
        if continues:
            plain[-1]["content"] += _END
        try:
            text = self.template.render(messages=plain, **variables)
        except Exception as error:  # a template is a program: it may raise any exception
            raise invalid(f"the chat template refused the messages: {error}"[:300]) from None
        if not continues:
            return text
        before, mark, _ = text.rpartition(_END)
        if not mark:
            raise invalid("the chat template does not show the last message, so no answer can continue it")
        return before


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
