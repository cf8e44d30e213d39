"""vLLM's log: warnings go to stderr, and errors also to a file.

The file is needed because only the log says why one of vLLM's processes died. Import this module before vLLM: vLLM, and
each process that it starts, reads the environment variables when it is imported.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

_PREFIX = "eagleray-vllm-"
_FOLDER = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
_ERRORS = Path(_FOLDER.name, "errors")

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # INFO writes a line per request

# The user's own configuration is kept. A configuration of ours in the environment comes from the parent process.
if _PREFIX in os.environ.get("VLLM_LOGGING_CONFIG_PATH", _PREFIX):
    _config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s"}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "level": os.environ["VLLM_LOGGING_LEVEL"], "formatter": "plain"},
            "errors": {"class": "logging.FileHandler", "filename": str(_ERRORS), "delay": True, "level": "ERROR"},
        },
        "loggers": {"vllm": {"handlers": ["stderr", "errors"], "level": "DEBUG", "propagate": False}},
    }
    Path(_FOLDER.name, "logging.json").write_text(json.dumps(_config))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = f"{_FOLDER.name}/logging.json"


def size() -> int:
    """Bytes in the error file: the start of the errors of an engine that starts now."""
    return _ERRORS.stat().st_size if _ERRORS.is_file() else 0


def last_error(start: int) -> str | None:
    """The last exception logged after the first `start` bytes, in one line; None if there is none."""
    text = _ERRORS.read_bytes()[start:].decode(errors="replace") if _ERRORS.is_file() else ""
    found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .+", text, re.MULTILINE)
    return " ".join(str(found[-1]).split())[:500] if found else None
