"""What vLLM logs: warnings to stderr, and errors to a file as well, for only there is told what its processes died of.

Import this before vLLM: environment variables are read then, by it and by every process it starts.
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
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # or every request has its line

# A configuration of the user's own is left alone; one of ours belongs to the process that started this one.
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
    """How many bytes of errors there are: where an engine's own begin."""
    return _ERRORS.stat().st_size if _ERRORS.is_file() else 0


def last_error(start: int) -> str | None:
    """The last exception logged since there were `start` bytes, in one line; None where none was."""
    text = _ERRORS.read_bytes()[start:].decode(errors="replace") if _ERRORS.is_file() else ""
    found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception): .+", text, re.MULTILINE)
    return " ".join(str(found[-1]).split())[:500] if found else None
