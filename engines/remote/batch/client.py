"""The interface of all batch APIs, and the HTTP client below it, which streams large files."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, BinaryIO, ClassVar, Protocol
from urllib.parse import urljoin, urlsplit

import httpx
import orjson
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from engines.config import EngineConfig
from engines.errors import EngineError
from engines.params import GenerationParams
from engines.remote.auth import Auth
from engines.remote.concurrency import EndpointPool
from engines.remote.errors import broken, failure
from engines.remote.provider import Provider
from engines.types import Completion, Request
from engines.usage import Usage

# Sending a file of hundreds of MB takes minutes, in which the server says nothing.
TIMEOUT = httpx.Timeout(connect=10.0, read=600.0, write=600.0, pool=10.0)
MOST_REDIRECTS = 5
# Waits before a broken download starts again. After the last one, the next poll tries again.
DOWNLOAD_WAITS_S = (1.0, 5.0, 20.0)

# The custom_id of a row, and the body of its answer or its error.
BatchAnswer = tuple[str, dict[str, Any] | EngineError]


class BatchState(StrEnum):
    """The state of a batch. All but `IN_PROGRESS` are final, and each of those may have results."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class BatchStatus:
    """A batch as its provider reports it. Counts are rows."""

    id: str
    status: BatchState
    total: int = 0
    done: int = 0
    failed: int = 0
    created_at: float = 0.0  # seconds since the epoch
    name: str | None = None  # our name for it, where the API keeps one
    input: str | None = None  # the file with its requests
    outputs: list[str] = field(default_factory=list)  # files or URLs that `results` reads
    error: str | None = None  # why the whole batch failed
    lines: dict[int, str] = field(default_factory=dict)  # input lines (from 1) that made it fail, with the reason
    queue_full: bool = False  # it failed only because the queue was full, or because of a rate limit
    refusal: EngineError | None = None  # it failed because of the account, key, model or a parameter; `lines` is empty
    refused_line: int | None = None  # the input line (from 1) that `refusal` names
    counts_rows: bool = True  # False: counts are percentages


@dataclass(frozen=True, slots=True)
class Requests:
    """A file of requests for one batch. `open` returns it from its start."""

    name: str
    model: str
    rows: int
    size: int  # bytes
    open: Callable[[], BinaryIO]
    submission: int = 1  # the number of the submission

    @property
    def idempotency_key(self) -> str:
        """Differs for each submission: a provider answers a key that it knows with the batch that it made for it."""
        return self.name if self.submission == 1 else f"{self.name}-{self.submission}"


class Client:
    """JSON over HTTP with retries. Raises `EngineError`, whose text never holds the key."""

    def __init__(
        self, base: str, headers: Mapping[str, str], clean: Callable[[str], str], patience_s: float, query: str = ""
    ) -> None:
        self.base, self.headers, self.clean, self.patience_s = base.rstrip("/"), dict(headers), clean, patience_s
        self.query = query  # of every request, such as `api-version=…`
        self.http = httpx.Client(timeout=TIMEOUT, follow_redirects=False)

    def json(self, method: str, path: str, **more: Any) -> Any:
        """Sends a request and returns the JSON of the answer."""
        answer = self.send(method, path, **more)
        try:
            return orjson.loads(answer.content)
        except ValueError:
            raise EngineError("bad_response", f"{path}: the answer is not JSON", retryable=True) from None

    def send(
        self,
        method: str,
        path: str,
        *,
        body: Callable[[], dict[str, Any]] = dict,
        once: bool = False,
        accepted: tuple[int, ...] = (),
        signed: bool = False,
    ) -> httpx.Response:
        """Sends one request. `body` makes httpx's arguments for each try; `once` means one try only.

        `accepted` are statuses beside 2xx that are not errors. A request to a `signed` address is sent without the key.
        """

        def attempt() -> httpx.Response:
            given = body()
            headers = {**({} if signed else self.headers), **given.pop("headers", {})}
            try:
                answer = self.http.request(method, self.url(path), headers=headers, **given)
            except httpx.HTTPError as error:
                raise self._clean(broken(error)) from None
            except httpx.InvalidURL:
                raise EngineError("bad_response", "the provider gave an invalid URL", retryable=True) from None
            if not answer.is_success and answer.status_code not in accepted:
                raise self._clean(failure(answer.status_code, answer.content, answer.headers))
            return answer

        return attempt() if once else self._retrying()(attempt)

    def lines(self, path: str, *, signed: bool = False) -> Iterator[dict[str, Any]]:
        """The JSON lines of a file. When the connection breaks, they start again from the first."""
        for wait in (*DOWNLOAD_WAITS_S, None):
            try:
                with _Download(self, self.url(path), {} if signed else self.headers) as answer:
                    yield from _objects(answer.iter_bytes())
                return
            except EngineError as error:
                if wait is None or not error.retryable:
                    raise
                time.sleep(wait)

    def url(self, path: str) -> str:
        if "://" in path:
            return path
        url = f"{self.base}{path}"
        return f"{url}{'&' if '?' in path else '?'}{self.query}" if self.query else url

    def resolve(self, url: str) -> str:
        """The full URL of a file or page that the provider named. Its URL may be relative to the API's."""
        return urljoin(f"{self.base}/", url)

    def ours(self, url: str) -> bool:
        """True if this is a full URL of the API's own server, so that the key may be sent there."""
        return urlsplit(url)[:2] == urlsplit(self.base)[:2]

    def _retrying(self) -> Retrying:
        backoff = wait_random_exponential(0.5, max=60)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(backoff(state), getattr(error, "retry_after", None) or 0.0)

        def passing(error: BaseException) -> bool:
            return isinstance(error, EngineError) and error.retryable

        return Retrying(wait=wait, stop=stop_before_delay(self.patience_s), retry=retry_if_exception(passing), reraise=True)

    def batch_error(self, error: Any) -> EngineError:
        """An error of a batch that failed as a whole. The provider gives an object or a text, without an HTTP status."""
        found = failure(400, orjson.dumps({"error": error}), {})
        found.status, found.args = None, (str(found).removeprefix("HTTP 400: "),)
        return self._clean(found)

    def _clean(self, error: EngineError) -> EngineError:
        error.args = (self.clean(str(error)),)
        return error

    def close(self) -> None:
        self.http.close()


class _Download:
    """A response read as a stream. Redirects are followed without the key."""

    def __init__(self, client: Client, url: str, headers: Mapping[str, str]) -> None:
        self.client, self.url, self.headers = client, url, headers

    def __enter__(self) -> httpx.Response:
        url, headers = self.url, self.headers
        try:
            for _ in range(MOST_REDIRECTS):
                request = self.client.http.build_request("GET", url, headers=headers)
                self.answer = self.client.http.send(request, stream=True)
                if not self.answer.has_redirect_location:
                    break
                url, headers = urljoin(url, self.answer.headers["location"]), {}
                self.answer.close()
            else:
                raise EngineError("bad_response", f"more than {MOST_REDIRECTS} redirects", retryable=True)
            if not self.answer.is_success:
                said = self.answer.read()
                self.answer.close()
                raise self.client._clean(failure(self.answer.status_code, said, self.answer.headers))
        except httpx.HTTPError as error:
            raise self.client._clean(broken(error)) from None
        except httpx.InvalidURL:
            raise EngineError("bad_response", "the provider gave an invalid URL", retryable=True) from None
        return self.answer

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        self.answer.close()
        if isinstance(error, httpx.HTTPError):
            raise self.client._clean(broken(error)) from None


def _objects(chunks: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects in lines. A line that is not an object is skipped: its row is asked again."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")  # only at \n: JSON text may contain other line separators
        for line in lines:
            if (found := _object(line)) is not None:
                yield found
    if rest.strip():
        if (found := _object(rest)) is None:
            raise EngineError("bad_response", "the results end within a line", retryable=True)
        yield found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class BatchEngine(Protocol):
    """The part of a remote engine that a batch API uses."""

    kind: ClassVar[str]
    config: EngineConfig
    provider: Provider
    endpoints: EndpointPool
    headers: dict[str, str]
    auth: Auth

    def body(self, request: Request) -> dict[str, Any]: ...

    def load_media_sync(self, request: Request) -> Request: ...

    def served_model(self, request: Request) -> str | None: ...

    def encode(self, body: dict[str, Any]) -> tuple[Any, int]: ...

    def read_batched(self, answer: dict[str, Any] | EngineError, request: Request) -> Completion: ...

    def cost(
        self, usage: Usage, asked: str | None, answered: str | None = None, *, batch: bool = False
    ) -> float | None: ...

    def prepared(self, request: Request) -> Request: ...

    def null_for_absent(self, model: str | None) -> bool: ...

    def check(self, generation: GenerationParams) -> None: ...

    def close(self) -> None: ...


class BatchWire(ABC):
    """One provider's batch API. All methods raise `EngineError`."""

    # The provider's documented limits for one batch.
    max_rows: ClassVar[int] = 50_000
    max_bytes: ClassVar[int] = 200_000_000
    # False: `find` may take the batch of another program for ours, because nothing at the provider names the batch.
    names_batches: ClassVar[bool] = True

    def __init__(self, client: Client, path: str, idempotency_header: str | None = None) -> None:
        self.client = client
        self.path = path  # of the API that answers the requests, for example "/chat/completions"
        self.idempotency_header = idempotency_header

    def once(self, requests: Requests) -> dict[str, str]:
        """The idempotency header, if the provider has one. It makes a repeated submission harmless."""
        return {self.idempotency_header: requests.idempotency_key} if self.idempotency_header else {}

    def explain_failure(self, status: BatchStatus, errors: Sequence[Any]) -> None:
        """Fills in why a whole batch failed, from the provider's errors: objects or texts."""
        texts = [(error.get("message") or error.get("code")) if isinstance(error, dict) else error for error in errors]
        status.error = "; ".join(str(text) for text in texts[:3] if text) or "the batch failed"
        for error, text in zip(errors, texts, strict=True):
            fields, found = error if isinstance(error, dict) else {}, self.client.batch_error(error)
            line = fields["line"] if type(fields.get("line")) is int else None
            if found.type == "rate_limit" or fields.get("code") == "token_limit_exceeded":
                status.queue_full = True
            elif found.scope != "row" and status.refusal is None:
                status.refusal, status.refused_line = found, line
            elif line is not None:
                status.lines[line] = str(text)
        if status.refusal is not None:  # a line that it names is only the first one with a problem of all lines
            status.queue_full, status.lines = False, {}

    @abstractmethod
    def line(self, custom_id: str, body: dict[str, Any]) -> dict[str, Any]:
        """One line of the request file."""

    @abstractmethod
    def upload(self, requests: Requests) -> str | None:
        """Sends the request file and returns its id. None if `submit` sends the requests itself."""

    @abstractmethod
    def submit(self, requests: Requests, file: str | None) -> str:
        """Creates the batch and returns its id. It is never retried: see `find`."""

    @abstractmethod
    def find(self, requests: Requests, file: str | None, since: float, known: set[str]) -> str | None:
        """The batch that an interrupted `submit` may have created after `since`, other than those `known`; or None.

        Raises `EngineError`, also if the provider has no way to look for a batch.
        """

    @abstractmethod
    def status(self, id: str) -> BatchStatus:
        """The state of a batch."""

    @abstractmethod
    def results(self, status: BatchStatus) -> Iterator[BatchAnswer]:
        """The results of an ended batch, in any order. A row may be in them twice, or not at all."""

    @abstractmethod
    def cancel(self, id: str) -> None:
        """Asks the provider to end a batch. Results so far stay."""

    @abstractmethod
    def list(self) -> Iterator[BatchStatus]:
        """All batches of the account, the newest first."""


def outcome(line: dict[str, Any]) -> BatchAnswer:
    """Reads a result line in OpenAI's form, which other providers have too."""
    custom_id = str(line.get("custom_id"))
    response, error = line.get("response"), line.get("error")
    if isinstance(response, dict):
        status = response.get("status_code")
        status = status if isinstance(status, int) else 200
        body = response.get("body", response)
        if status < 300 and isinstance(body, dict) and not error:
            return custom_id, body
        return custom_id, failure(status if status >= 300 else 500, orjson.dumps(body or error), {})
    code = error.get("code") if isinstance(error, dict) else None
    if code == "batch_expired":
        return custom_id, expired()
    if code in ("batch_cancelled", "batch_canceled"):
        return custom_id, cancelled()
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return custom_id, failure(status, orjson.dumps({"error": error}), {})


def expired() -> EngineError:
    return EngineError("timeout", "the batch expired before this row's turn", retryable=True)


def cancelled() -> EngineError:
    return EngineError("cancelled", "the batch was cancelled before this row's turn", retryable=True)
