"""Signatures and tokens in the query of a URL, which no message and no file may show."""

from __future__ import annotations

import re

# `X-Amz-Signature`, `X-Goog-Credential`, `sig` (Azure), `Signature`, `token`, `api_key`, and their like.
_SECRET = re.compile(
    r"([?&][\w.%-]*(?:sig|signature|token|credential|secret|password|key|auth|authorization)=)[^&#\s\"'<>|]+", re.IGNORECASE
)


def without_url_secrets(text: str) -> str:
    """The text with `***` in place of the secrets in the queries of its URLs."""
    return _SECRET.sub(r"\1***", text) if "=" in text and "://" in text else text
