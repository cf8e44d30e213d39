"""Authentication. Keys come from the environment or from `engine.headers`, and are removed from every error message."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError, ErrorCode
from engines.remote.event_loops import PerLoop
from engines.remote.provider import Provider

# A token is renewed this long before it expires, so that it is valid until the last request that has it is answered.
RENEW_BEFORE_S = 300.0
SECRET_HEADER = re.compile(r"authorization|cookie|api[_-]?key|token|secret|password", re.IGNORECASE)
# A text that was cut can end with the beginning of a key, which is removed if it has at least so many characters. A shorter
# one has little more than the prefix of all keys of a provider.
FIRST_CHARACTERS = 12
# A shorter word before or after others in a header is no secret: `Bearer`.
SECRET_CHARACTERS = 8
# If a token younger than this is refused, a new one would be refused too.
TOO_YOUNG_S = 5.0


class Auth:
    """A fixed key in a header, or none."""

    def __init__(self, headers: dict[str, str], secret: str = "") -> None:
        self.fixed, self.secret = headers, secret
        self.given: list[str] = []  # the secrets among the headers of the configuration

    @classmethod
    def of(cls, config: EngineConfig, provider: Provider) -> Auth:
        """Raises `ConfigError` if the key is missing, with the name of its variable."""
        made = cls._of(config, provider)
        for name, value in {**provider.headers, **config.headers}.items():
            words = value.split() if SECRET_HEADER.search(name) else []
            made.given += words if len(words) == 1 else [word for word in words if len(word) >= SECRET_CHARACTERS]
        return made

    @staticmethod
    def _of(config: EngineConfig, provider: Provider) -> Auth:
        if provider.auth == "google":
            return GoogleAuth(config)
        variable = config.api_key_env
        # A key pasted with its newline would be refused as a malformed header, and the message would show the key.
        key = os.environ.get(variable, "").strip() if variable else ""
        if not key:
            if provider.auth == "optional" or any(
                name.lower() in ("authorization", "x-api-key") for name in config.headers
            ):
                return Auth({})
            raise ConfigError(
                f"engine={config.kind} needs its key in the environment: export {variable}=… "
                "(engine.api_key_env names another variable)"
                if variable
                else f"engine={config.kind} needs engine.api_key_env: the environment variable that holds the key",
                code=ErrorCode.KEY_MISSING,
                key="engine.api_key_env",
            )
        header = {"x-api-key": key} if provider.auth == "x-api-key" else {"authorization": f"Bearer {key}"}
        return Auth(header, key)

    async def headers(self) -> dict[str, str]:
        return self.fixed

    def clean(self, text: str) -> str:
        """`text` without the keys, which some servers repeat in their errors."""
        for secret in filter(None, (self.secret, *self.given)):
            text = _without(secret, text)
        return text

    def refused(self) -> bool:
        """Called if the server refuses the key. Returns True if another try may have a new token."""
        return False


def _without(secret: str, text: str) -> str:
    """`text` with `***` in the place of the secret, and of its beginning where the text was cut."""
    before, *parts = text.split(secret[:FIRST_CHARACTERS])
    rest = secret[FIRST_CHARACTERS:]
    return before + "".join("***" + part[len(os.path.commonprefix((part, rest))) :] for part in parts)  # noqa: RUF071


class GoogleAuth(Auth):
    """A bearer token from google-auth: default credentials, or the service-account file in `kwargs.credentials`.

    One task fetches it, and renews it before it expires, while the others wait.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({})
        try:
            import google.auth
            import google.auth.exceptions
            from google.oauth2 import service_account
        except ImportError:
            text = f"engine={config.kind} needs google-auth: run pip install 'eagleray[vertex]'"
            raise ConfigError(text, code=ErrorCode.PACKAGE_MISSING) from None
        scopes = ["https://www.googleapis.com/auth/cloud-platform"]
        file = config.kwargs.get("credentials")
        try:
            if file:
                self.credentials: Any = service_account.Credentials.from_service_account_file(file, scopes=scopes)
            else:
                self.credentials, _ = google.auth.default(scopes=scopes)
        except (OSError, ValueError, google.auth.exceptions.GoogleAuthError) as error:
            where = (
                f"engine.kwargs.credentials={file}" if file else "the default credentials (gcloud auth application-default)"
            )
            raise ConfigError(
                f"engine={config.kind} cannot use {where}: {' '.join(str(error).split())[:200]}",
                key=f"engine={config.kind}",
            ) from None
        self.fetched_at = 0.0
        # One task of each event loop fetches, and one loop at a time.
        self.tasks: PerLoop[asyncio.Lock] = PerLoop(asyncio.Lock)
        self.loops = threading.Lock()

    async def headers(self) -> dict[str, str]:
        if not self._fresh():
            async with self.tasks.get():
                if not self._fresh():
                    await asyncio.to_thread(self._fetch)
        return self.fixed

    def _fresh(self) -> bool:
        expiry = self.credentials.expiry
        if not self.fixed:
            return False
        return expiry is None or expiry.timestamp() - _utc_offset(expiry) - time.time() > RENEW_BEFORE_S

    def _fetch(self) -> None:
        """Raises `EngineError`."""
        with self.loops:
            if not self._fresh():
                self._fetch_token()

    def _fetch_token(self) -> None:
        from google.auth import exceptions
        from google.auth.transport import requests

        try:
            self.credentials.refresh(requests.Request())
        except exceptions.GoogleAuthError as error:
            passing = isinstance(error, exceptions.TransportError) or error.retryable
            text = f"Google gives no token: {' '.join(str(error).split())[:300]}"
            if passing:
                raise EngineError("connection", text, retryable=True) from None
            raise EngineError("auth", text, code=ErrorCode.KEY_REFUSED, scope="key") from None
        self.secret = self.credentials.token
        self.fixed = {"authorization": f"Bearer {self.secret}"}
        self.fetched_at = time.monotonic()

    def refused(self) -> bool:
        if time.monotonic() - self.fetched_at < TOO_YOUNG_S:
            return False
        self.fixed = {}
        return True


def _utc_offset(expiry: Any) -> float:
    """google-auth's expiries are naive and in UTC; `timestamp()` takes naive ones as local time."""
    if expiry.tzinfo is not None:
        return 0.0
    from datetime import UTC

    return float(expiry.timestamp() - expiry.replace(tzinfo=UTC).timestamp())
