"""Imports `llama_cpp` with the environment it needs, and keeps llama.cpp's log.

Modules of this package import `L` from here and never `llama_cpp` itself, because libgomp reads its environment when
`llama_cpp` is imported for the first time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from typing import Any

# llama.cpp's threads meet at hundreds of barriers per token, and libgomp spins at each one. If a core is shared (with Ray
# or a second engine), a thread spins while the thread that it waits for is not running. A short spin avoids that.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import llama_cpp as L
from llguidance.llamacpp import lltokenizer_from_vocab  # imports llama_cpp

__all__ = ["L", "lltokenizer_from_vocab", "log"]

_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class Log:
    """llama.cpp's log of this process: printed only if `verbose`. The last errors are kept for our error messages."""

    def __init__(self) -> None:
        self.verbose = False
        self.errors: deque[str] = deque(maxlen=4)
        self.callback = L.llama_log_callback(self._write)  # llama.cpp holds only the pointer; this keeps it alive

    def install(self, verbose: bool) -> None:
        """Makes llama.cpp log here, and forgets earlier errors."""
        self.verbose = verbose
        self.errors.clear()
        L.llama_log_set(self.callback, ctypes.c_void_p(0))

    def _write(self, level: int, text: bytes, _: Any) -> None:
        if self.verbose:
            sys.stderr.write(text.decode("utf-8", "replace"))
        if level == _LEVEL_ERROR and text.strip():
            self.errors.append(" ".join(text.decode("utf-8", "replace").split()))

    def reason(self) -> str:
        """The first of the kept errors as the end of a message: `: text`. Empty if there is no error."""
        return f": {self.errors[0][:200]}" if self.errors else ""


log = Log()
