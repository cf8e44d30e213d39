"""`dataset.template`: Jinja templates that build a conversation from the columns of a row."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engines.errors import ConfigError, EngineError, invalid, nearest
from engines.text import one_line
from engines.types import ROLES
from pipeline.dataset.values import column_names, kind_word

# A text that was meant as a mapping of roles, such as `{user: Hi {{ q }}}` without quotes around the message.
_UNQUOTED = re.compile(rf"\{{\s*['\"]?({'|'.join(ROLES)})['\"]?\s*:")


def template_text(template: Any) -> Any:
    """`dataset.template` with the content of each file that it names: `@prompt.j2`, alone or as a message.

    Relative paths are relative to the working directory. The last line feed of a file is left out. A text with braces is a
    template, not the name of a file. Raises `ConfigError` if a file cannot be read.
    """
    if isinstance(template, Mapping):
        return {role: template_text(part) for role, part in template.items()}
    if isinstance(template, (list, tuple)):
        return [template_text(part) for part in template]
    if not isinstance(template, str) or not template.startswith("@") or "{" in template:
        return template
    path = Path(template[1:]).expanduser()
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        hint = nearest(path.name, [each.name for each in path.parent.glob("*")])
        raise ConfigError(
            f"dataset.template: cannot read the file {path}: {error.strerror}{hint}", key="dataset.template"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"dataset.template: the file {path} is not UTF-8 text", key="dataset.template") from None


class Template:
    """A compiled `dataset.template`. Raises `ConfigError` if it is not valid."""

    def __init__(self, given: Any) -> None:
        messages = _messages(given)
        self.text = messages[-1][1]
        environment = _environment()
        self.parts: list[tuple[str, jinja2.Template]] = []
        self.varies = False  # some message has a variable, so rows may give different conversations
        for role, text in messages:
            where = f"the {role} message, " if len(messages) > 1 else ""
            try:
                self.varies |= bool(jinja2.meta.find_undeclared_variables(environment.parse(text)))
                self.parts.append((role, environment.from_string(text)))
            except Exception as error:  # constant expressions are evaluated here, and may raise anything
                line = getattr(error, "lineno", 1)
                raise ConfigError(
                    f"dataset.template: {where}line {line}: {one_line(error)}", key="dataset.template"
                ) from None

    def without_variable(self) -> ConfigError:
        """The error of a template that does not vary, for several rows."""
        return ConfigError(
            "dataset.template has no variable such as {{ question }}: every row would ask the same, "
            f"{self.text[:60]!r}. @ names a file: dataset.template=@prompt.j2",
            key="dataset.template",
        )

    def render(self, columns: Mapping[str, Any]) -> list[Any]:
        """The messages of a row. Raises `EngineError("invalid_input")` if the template fails."""
        messages = []
        try:
            for role, template in self.parts:
                text = template.render({**columns, "row": dict(columns)})
                text.encode()  # a lone surrogate, from an escape in the template, must fail here and not later in the run
                messages.append({"role": role, "content": text})
        except EngineError:
            raise
        except jinja2.UndefinedError as error:
            raise invalid(f"the template failed: {one_line(error)}; this row has {column_names(columns)}") from None
        except Exception as error:  # a template may raise any type; the error concerns only this row
            raise invalid(f"the template failed: {type(error).__name__}: {one_line(error)}") from None
        return messages


def _messages(given: Any) -> list[tuple[str, str]]:
    """The roles and texts of `dataset.template`."""
    if isinstance(given, str):
        if _UNQUOTED.match(given):
            raise ConfigError(
                "dataset.template: a mapping needs quotes around its texts: {user: 'Hi {{ name }}'}", key="dataset.template"
            )
        given = {"user": given}
    if isinstance(given, Mapping):
        given = [{"role": role, "content": content} for role, content in given.items()]
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(part, Mapping) and set(part) == {"role", "content"} for part in given
    ):
        raise ConfigError(
            "dataset.template must be a text, a list of {role, content}, or {system: …, user: …}", key="dataset.template"
        )
    if not given:
        raise ConfigError("dataset.template is empty", key="dataset.template")
    for part in given:
        role, text = part["role"], part["content"]
        if str(role) not in ROLES:
            raise ConfigError(
                f"dataset.template: there is no role {role!r:.60}{nearest(str(role), ROLES)}", key="dataset.template"
            )
        if not isinstance(text, str):
            raise ConfigError(
                f"dataset.template: the {role} message must be a text, not {kind_word(text)}", key="dataset.template"
            )
    return [(str(part["role"]), part["content"]) for part in given]


def _environment() -> jinja2.Environment:
    jinja = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_printed)
    # Jinja's own `tojson` escapes characters for HTML.
    jinja.filters["tojson"] = lambda v, indent=None: json.dumps(v, ensure_ascii=False, indent=indent, default=str)
    return jinja


def _printed(value: Any) -> Any:
    """Called for every value that a template prints. Raises `EngineError` for None: a prompt must not contain "None"."""
    if value is None:
        raise invalid("the template prints a null; write {{ column or '' }} where a value may be null")
    return value
