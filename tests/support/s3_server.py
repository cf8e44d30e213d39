"""S3 on loopback (moto), which may throttle and fail in passing, and remembers what it was asked."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Self
from urllib.parse import parse_qs

import httpx
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SLOW_DOWN = ("503 Slow Down", b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")
INTERNAL = ("500 Internal Server Error", b"<Error><Code>InternalError</Code><Message>We erred.</Message></Error>")


class S3Server:
    """One bucket, `bucket`. A `failing` share of all requests is refused, by turns with a 503 and a 500."""

    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}

    def __init__(self, seed: int = 0) -> None:
        self.failing = 0.0
        self.refused: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.random = random.Random(seed)
        # Called with (method, key) of each request: before it is answered, and when its answer is ready.
        self.before: Callable[[str, str], object] = lambda method, key: None
        self.after: Callable[[str, str], object] = lambda method, key: None
        self.app = DomainDispatcherApplication(create_backend_app)

    def __enter__(self) -> Self:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.options = f"?endpoint_override=127.0.0.1:{self.server.server_port}&scheme=http&region=us-east-1"
        self.thread = threading.Thread(target=self.server.serve_forever, name="s3-server", daemon=True)
        self.thread.start()
        httpx.post(f"{self.endpoint}/moto-api/reset")  # what it holds belongs to the process
        self.client().create_bucket(Bucket="bucket")
        self.asked.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()

    def client(self) -> Any:
        """boto3's, for looking at it from the side."""
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )

    def uri(self, key: str) -> str:
        return f"s3://bucket/{key}{self.options}"

    def put(self, key: str, data: bytes) -> None:
        self.client().put_object(Bucket="bucket", Key=key, Body=data)

    def begin(self, key: str) -> None:
        """An upload that nobody ends."""
        self.client().create_multipart_upload(Bucket="bucket", Key=key)

    def uploads(self) -> list[str]:
        return [upload["Key"] for upload in self.client().list_multipart_uploads(Bucket="bucket").get("Uploads", [])]

    def objects(self, prefix: str) -> dict[str, bytes]:
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        keys = [found["Key"] for page in pages for found in page.get("Contents", [])]
        return {key.removeprefix(prefix): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}

    def age(self, key: str, seconds: float) -> None:
        """Makes an object older, as if its writer had been suspended."""
        from moto.s3.models import s3_backends

        found = s3_backends["123456789012"]["aws"].get_object("bucket", key)
        found.last_modified -= timedelta(seconds=seconds)

    def delete(self, key: str) -> None:
        self.client().delete_object(Bucket="bucket", Key=key)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        what = _what(environ)
        self.asked[what] += 1
        if self.random.random() < self.failing:
            self.refused[what] += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, body = (SLOW_DOWN, INTERNAL)[self.refused.total() % 2]
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]
        place = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix("/bucket/")
        self.before(*place)
        answer = self.app(environ, start)
        self.after(*place)
        return answer


def _what(environ: dict[str, Any]) -> str:
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    if "uploads" in query or "uploadId" in query:
        return f"{method} multipart"
    if environ.get("HTTP_X_AMZ_COPY_SOURCE"):
        return f"{method} copy"
    return f"{method} list" if "list-type" in query else method
