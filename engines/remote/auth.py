"""How a request proves who sends it. Keys come from the environment, are held here only, and are cut from every error."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from engines.config import EngineConfig
from engines.errors import ConfigError, EngineError, ErrorType
from engines.remote.provider import Provider

# A token is renewed so long before it expires: requests under way must still be covered.
RENEW_BEFORE_S = 300.0
# A token that was refused younger than this was not refused for its age.
TOO_YOUNG_S = 5.0


class Auth:
    """A fixed key in a header, or none."""

    def __init__(self, headers: dict[str, str], secret: str = "") -> None:
        self.fixed, self.secret = headers, secret
        self.lock: asyncio.Lock  # made in the event loop that uses it

    @staticmethod
    def of(config: EngineConfig, provider: Provider) -> Auth:
        """Raises `ConfigError` where the key is missing, with the name of its variable."""
        if provider.auth == "google":
            return GoogleAuth(config)
        variable = config.api_key_env
        # A header pasted with its line's end would be refused as malformed, with the key in the message.
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
                else f"engine={config.kind} needs engine.api_key_env: the environment variable that holds the key"
            )
        header = {"x-api-key": key} if provider.auth == "x-api-key" else {"authorization": f"Bearer {key}"}
        return Auth(header, key)

    async def headers(self) -> dict[str, str]:
        return self.fixed

    def clean(self, text: str) -> str:
        """Without the key, which some servers repeat in their errors."""
        return text.replace(self.secret, "***") if self.secret else text

    def refused(self) -> bool:
        """The server refused; whether asking again with another token may help."""
        return False


class GoogleAuth(Auth):
    """A bearer token of google-auth: default credentials, or the service-account file in `kwargs.credentials`.

    Fetched once and renewed before it expires, by one task while the others wait.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__({})
        try:
            import google.auth
            import google.auth.exceptions
            from google.oauth2 import service_account
        except ImportError:
            raise ConfigError(f"engine={config.kind} needs google-auth: run pip install 'eagleray[vertex]'") from None
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
            raise ConfigError(f"engine={config.kind} cannot use {where}: {' '.join(str(error).split())[:200]}") from None
        self.fetched_at = 0.0

    async def headers(self) -> dict[str, str]:
        if not self._fresh():
            async with self.lock:
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
        from google.auth import exceptions
        from google.auth.transport import requests

        try:
            self.credentials.refresh(requests.Request())
        except exceptions.GoogleAuthError as error:
            passing = isinstance(error, exceptions.TransportError) or error.retryable
            kind: ErrorType = "connection" if passing else "auth"
            said = " ".join(str(error).split())[:300]
            raise EngineError(kind, f"Google gives no token: {said}", retryable=passing) from None
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
