"""The providers' own SDKs ask the same server for the same: our requests are theirs, to the URL and the body."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from anthropic import Anthropic
from fireworks import Fireworks
from openai import OpenAI
from together import Together

from engines import load_engine
from tests.support.batch_server import BatchServer
from tests.support.infer import ask
from tests.support.processes import until

KEY = "sk-a-secret-of-some-length"
ASKED = [ask("one"), ask("two")]


class Sdk(Protocol):
    """One batch of the lines of `file` and another that is cancelled; the texts of the first."""

    def __call__(self, url: str, file: Path) -> list[str]: ...


def texts(lines: str) -> list[str]:
    return [json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] for line in lines.splitlines()]


def openai(url: str, file: Path) -> list[str]:
    with OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        ids = []
        for _ in range(2):
            uploaded = client.files.create(file=file, purpose="batch")
            batch = client.batches.create(
                input_file_id=uploaded.id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={"eagleray": "eagleray-0123456789abcdef"},
            )
            ids.append(batch.id)
        client.batches.cancel(ids[1])
        until(lambda: client.batches.retrieve(ids[0]).status == "completed")
        assert set(ids) <= {batch.id for batch in client.batches.list(limit=100)}
        return texts(client.files.content(str(client.batches.retrieve(ids[0]).output_file_id)).text)


def anthropic(url: str, file: Path) -> list[str]:
    requests: Any = [json.loads(line) for line in file.read_text().splitlines()]
    with Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        ids = [client.messages.batches.create(requests=requests).id for _ in range(2)]
        client.messages.batches.cancel(ids[1])
        until(lambda: client.messages.batches.retrieve(ids[0]).processing_status == "ended")
        assert set(ids) <= {batch.id for batch in client.messages.batches.list(limit=100)}
        found: list[Any] = [line.result for line in client.messages.batches.results(ids[0])]
        return [result.message.content[0].text for result in found]


def together(url: str, file: Path) -> list[str]:
    client = Together(base_url=f"{url}/together", api_key=KEY, max_retries=0)
    ids = []
    for _ in range(2):
        uploaded = client.files.upload(file, purpose="batch-api", check=False)
        made = client.batches.create(
            input_file_id=str(uploaded.id), endpoint="/v1/chat/completions", completion_window="24h"
        )
        assert made.job is not None
        ids.append(str(made.job.id))
    client.batches.cancel(ids[1])
    until(lambda: client.batches.retrieve(ids[0]).status == "COMPLETED")
    assert set(ids) <= {str(batch.id) for batch in client.batches.list()}
    return texts(client.files.content(str(client.batches.retrieve(ids[0]).output_file_id)).read().decode())


def fireworks(url: str, file: Path) -> list[str]:
    client = Fireworks(base_url=url, api_key=KEY, account_id="acme", max_retries=0)
    ids = ["sdk-one", "sdk-two"]
    for id in ids:
        client.datasets.create(dataset_id=id, dataset={"user_uploaded": {}, "example_count": "2"})
        client.datasets.upload(id, file=file)
        until(lambda id=id: client.datasets.get(id).state == "READY")  # type: ignore[misc]
        client.batch_inference_jobs.create(
            batch_inference_job_id=id,
            display_name=id,
            model="m-1",
            input_dataset_id=f"accounts/acme/datasets/{id}",
            output_dataset_id=f"accounts/acme/datasets/{id}-out",
        )
    until(lambda: client.batch_inference_jobs.get(ids[0]).state == "JOB_STATE_COMPLETED")
    listed = client.batch_inference_jobs.list(page_size=200, order_by="create_time desc")
    assert set(ids) <= {str(job.name).rsplit("/", 1)[1] for job in listed}
    urls = client.datasets.get_download_endpoint(f"{ids[0]}-out").filename_to_signed_urls or {}
    import httpx

    lines = "".join(httpx.get(address).text for address in urls.values())
    return [json.loads(line)["response"]["choices"][0]["message"]["content"] for line in lines.splitlines()]


SDKS: dict[str, tuple[str, Sdk]] = {
    "openai": ("/v1", openai),
    "parasail": ("/v1", openai),
    "anthropic": ("/v1", anthropic),
    "together": ("/together/v1", together),
    "fireworks": ("/inference/v1", fireworks),
}
# What no SDK can do, to the day.
WITHOUT = {"fireworks": {"POST /v1/accounts/acme/batchInferenceJobs/ID:cancel"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchServer]:
    monkeypatch.setenv("FIREWORKS_ACCOUNT_ID", "acme")
    for kind in SDKS:
        monkeypatch.setenv(f"{kind.upper()}_API_KEY", KEY)
    with BatchServer() as running:
        running.delay_s = 0.2
        yield running


def ours(kind: str, base_url: str) -> list[str | None]:
    with load_engine(kind, model="m-1", base_url=base_url) as engine:
        id, other = (engine.infer_batch(ASKED, {"max_tokens": 9}) for _ in range(2))
        engine.cancel_batch(other)
        until(lambda: engine.get_batch_status(id).status.value == "completed")
        assert {id, other} <= {batch.id for batch in engine.list_batches()}
        return [completion.text for completion in engine.get_batch_results(id, ASKED, {"max_tokens": 9})]


def said(server: BatchServer) -> tuple[set[str], set[str], str]:
    """What was asked, what was sent to make something, and the lines of a file of requests; names made here are ID."""
    names = sorted(map(re.escape, {*server.files, *server.jobs}), key=len, reverse=True)
    ids = re.compile("|".join([*names, r"eagleray-\w{16}", "requests(?=\\.jsonl)"]))

    def plain(text: str) -> str:
        return ids.sub("ID", text)

    asked = {plain(f"{method} {path} {' '.join(query)}".strip()) for method, path, query in server.asked}
    made = {plain(f"{path} {json.dumps(body, sort_keys=True)}") for path, body in server.created}
    file = next(iter(server.jobs.values())).file.read_text()
    return asked, made, file


@pytest.mark.parametrize("kind", SDKS)
def test_our_requests_are_those_of_the_providers_sdk(kind: str, server: BatchServer, tmp_path: Path) -> None:
    path, sdk = SDKS[kind]
    answers = ours(kind, f"{server.url}{path}")
    assert server.bad == []
    asked, made, lines = said(server)
    server.asked.clear(), server.created.clear(), server.files.clear(), server.jobs.clear()
    file = tmp_path / "requests.jsonl"
    file.write_text(lines)
    assert sorted(sdk(server.url, file)) == sorted(map(str, answers))
    sdk_asked, sdk_made, _ = said(server)
    assert asked - sdk_asked == WITHOUT.get(kind, set())
    assert made <= sdk_made
