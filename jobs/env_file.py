"""`--env-file PATH`: environment variables from a file that only its owner can read, for cron and submitted jobs."""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from engines.errors import ConfigError, ErrorCode


def load(path: str) -> None:
    """Sets the variables of the file, one `NAME=value` a line. A variable that is set already keeps its value.

    Raises `ConfigError` if the file cannot be read, has a line of another form, or can be read by other users. No message
    contains a line of the file.
    """
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            mode, lines = os.fstat(file.fileno()).st_mode, file.read().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise _wrong(f"--env-file {path} cannot be read: {reason}") from None
    if mode & (stat.S_IRWXO if _is_credential(path) else stat.S_IRWXG | stat.S_IRWXO):
        raise _wrong(f"--env-file {path} can be read by other users: run chmod 600 {shlex.quote(path)}")
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quote without its end
            words = [line, line]
        words = words[words[:1] == ["export"] :]
        name, equals, value = words[0].partition("=") if words else ("", "", "")
        if words and (len(words) > 1 or not equals or not name.isidentifier()):
            raise _wrong(f"--env-file {path}, line {number} is not of the form NAME=value (quote a value with spaces)")
        if words:
            os.environ.setdefault(name, value)


def _is_credential(path: str) -> bool:
    """True for a file of systemd's LoadCredential=. Its access list lets the service's user read it. `stat` shows this as a
    right of the group, which has none."""
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(folder) and Path(path).resolve().parent == Path(str(folder)).resolve()


def _wrong(text: str) -> ConfigError:
    return ConfigError(text, code=ErrorCode.ENV_FILE)
