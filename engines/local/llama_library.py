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

from engines.errors import OutOfMemory

__all__ = ["L", "check_decoded", "lltokenizer_from_vocab", "log"]

# Results of `llama_decode`: the cache has no room for the batch; there is no memory to compute it.
_NO_ROOM, _NO_MEMORY = 1, -2
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


def check_decoded(status: int) -> None:
    """Raises for a result of `llama_decode` other than success: `OutOfMemory`, or `RuntimeError`."""
    text = f"llama_decode failed with status {status}{log.reason()}"
    if status in (_NO_ROOM, _NO_MEMORY):
        raise OutOfMemory(f"llama.cpp has not enough memory: {text}", alone=True)
    if status != 0:
        raise RuntimeError(text)
