"""Pages of the documentation that are executed from top to bottom: README.md, and the pages that show how to do a task.

The blocks of a page are steps, in one empty directory with `docs/examples`: a file that the text above it names is
written, lines of ```sh are typed, and Python is run. Blocks without a language are checked in test_docs.py only.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from jobs import cli
from tests.support.batch_server import BatchServer
from tests.support.checkpoint import adapter_dir, checkpoint_dir
from tests.support.head_checkpoints import mean_embedder_dir, quality_dir, reward_dir
from tests.support.pages import PAGES, ROOT, Block, blocks
from tests.support.provider_server import ProviderServer
from tests.support.s3_server import S3Server
from tests.test_schedules import Machine

KEY = "sk-of-some-length-0123456789"
# vLLM's CPU build starts faster with these.
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 256 << 20, "max_lora_rank": 8}
# Placeholder in a page -> its model on this machine.
MODELS: dict[str, Callable[[], Path]] = {
    "checkpoint": checkpoint_dir, "lora": adapter_dir, "other-lora": lambda: adapter_dir(1), "reward": reward_dir,
    "embedder": mean_embedder_dir, "classifier": quality_dir,
}  # fmt: skip
# The page on S3 has a test of its own.
EXECUTED = [
    page for page in PAGES
    if any(block.language == "sh" for block in blocks(page)) and page.name != "quality-classifier.md"
]  # fmt: skip


class Reader:
    """Does what a page says. `said` is what the commands printed."""

    def __init__(self, page: Path, here: Path, server: str, capsys: pytest.CaptureFixture[str], *more: str) -> None:
        self.page, self.here, self.server, self.capsys, self.more = page, here, server, capsys, more
        self.said = ""
        self.names: dict[str, Any] = {}

    def follow(self) -> None:
        text = self.page.read_text(encoding="utf-8").splitlines()
        for block in blocks(self.page):
            if block.language == "sh":
                for line in block.text.replace("\\\n", " ").splitlines():
                    self.type(line)
            elif block.language == "python":
                self.run(block)
            elif block.language and (name := re.search(r"`([\w-]+\.\w+)`:$", self._before(text, block))):
                (self.here / name[1]).write_text(_real(block.text))

    @staticmethod
    def _before(text: list[str], block: Block) -> str:
        """The last line of text above a block."""
        return next((line for line in reversed(text[: block.line - 1]) if line.strip()), "")

    def type(self, line: str) -> None:
        words = shlex.split(_real(line))
        if words[0] == "export":  # the tests' own key
            return
        if words[0] != "eagleray":
            done = subprocess.run(["bash", "-c", _real(line)], cwd=self.here, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, (line, done.stderr)
            self.said += done.stdout
            return
        status = cli._run([*words[1:], *self._additions(words)])
        printed = self.capsys.readouterr()
        self.said += printed.out + printed.err
        assert status == 0 or (status == 3 and "demo" in line), f"{line}: {status}\n{printed.err}"

    def _additions(self, words: list[str]) -> list[str]:
        """Keys that make a command smaller, or send its requests to a server on loopback."""
        keys = " ".join(words)
        if words[1] not in ("infer", "batch", "plan"):
            return []
        if "engine=vllm" in words:
            return [f"engine.kwargs.{name}={value}" for name, value in SMALL.items()]
        if "engine=openai" in words or "engine=remote_vllm" in words or "run.yaml" in words:
            return [f"engine.base_url={self.server}"]
        return [] if "engine=" in keys or words[1] != "infer" else list(self.more)

    def run(self, block: Block) -> None:
        if "ray.data.llm" in block.text or self.page.name == "from-oumi.md":  # the program that is replaced; GPUs
            return
        text = _real(block.text).replace('"enforce_eager": True', ", ".join(f'"{k}": {v}' for k, v in SMALL.items()))
        exec(compile(text, str(block), "exec"), self.names)
        printed = self.capsys.readouterr()
        self.said += printed.out + printed.err


def _real(text: str) -> str:
    """Replaces the placeholders of a page by a model and adapters of this machine."""
    for name, path in MODELS.items():
        if f"path/to/{name}" in text:
            text = re.sub(rf"path/to/{name}\b", str(path()), text)
    return text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def batches() -> Iterator[BatchServer]:
    with BatchServer(delay_s=0.1) as running:
        yield running


def rows(here: Path, out: str) -> list[dict[str, Any]]:
    return pq.read_table(here / "out" / out / "data").to_pylist()


# -- what a reader has at the end of each page ----------------------------------------------------------------------------


def readme(here: Path, said: str) -> None:
    table = csv.read_csv(here / "scores.csv", parse_options=csv.ParseOptions(newlines_in_values=True))
    assert {"id", "product", "review", "why", "stars", "mood", "topics"} <= set(table.column_names)
    assert all(isinstance(row["stars"], int) and isinstance(row["topics"], list) for row in rows(here, "score"))
    assert "This run sent 0 requests" in said
    assert (here / "out" / "score" / "report.html").exists()


def score(here: Path, said: str) -> None:
    assert {row["stars"] for row in rows(here, "score")} <= {1, 2, 3, 4, 5}
    assert [row["stars"] for row in rows(here, "typed")] == [row["stars"] for row in rows(here, "score")]
    assert all(isinstance(row["positive"], bool) for row in rows(here, "positive"))
    assert len(list((here / "out").glob("scores-20*/manifest.json"))) == 1


def overnight(here: Path, said: str) -> None:
    manifest = json.loads((here / "out" / "overnight" / "manifest.json").read_text())
    assert manifest["rows"]["done"] == 8
    assert [(cost["lane"], cost["requests"]) for cost in manifest["costs"]] == [("batch", 8)]
    assert "batch" in said


def adapters(here: Path, said: str) -> None:
    base, formal, short = rows(here, "adapters")
    assert base["error"] is formal["error"] is short["error"] is None
    assert [row["model"] for row in (base, formal, short)] == [
        str(checkpoint_dir()),
        str(adapter_dir()),
        str(adapter_dir(1)),
    ]
    assert [row["model"] for row in rows(here, "server")] == [row["model"] for row in rows(here, "customers")]
    assert [row["model"] for row in rows(here, "customers")] == ["my-model", "formal"]


def vllm_batch(here: Path, said: str) -> None:
    (part,) = (here / "out" / "results" / "data").glob("*.jsonl")
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["q1", "q2"]
    assert all(line["response"]["body"]["choices"] for line in lines)


def ray_data(here: Path, said: str) -> None:
    assert [row["question"] for row in rows(here, "answers")] == [row["response"] for row in rows(here, "echo")]
    assert "This run sent 0 requests. All runs: 3 sent" in said


def oumi(here: Path, said: str) -> None:
    (part,) = here.glob("answers*/data/*.jsonl")
    (line,) = part.read_text().splitlines()
    assert json.loads(line)["messages"][-1]["role"] == "assistant"


def unique(here: Path, said: str) -> None:
    """Each copy has gone, and its first text has stayed. Both ways agree."""
    pages = [json.loads(line)["id"] for line in (here / "docs/examples/pages.jsonl").read_text().splitlines()]
    assert len([name for name in pages if name.endswith("-copy")]) == 3
    for file in ("unique.parquet", "unique-faiss.parquet"):
        table = pq.read_table(here / file)
        assert table["id"].to_pylist() == [name for name in pages if not name.endswith("-copy")]
        assert table.column_names == ["id", "text"]


def clean(here: Path, said: str) -> None:
    pages = [row["id"] for row in rows(here, "perplexity")]
    assert pq.read_table(here / "clean.parquet")["id"].to_pylist() == [
        name for name in pages if name not in ("keys", "menu", "codes")
    ]
    assert [row["expected"] for row in rows(here, "answers")] == ["8", "42", "white"]
    assert all(row["perplexity"] > 1 for row in rows(here, "answers"))


def best(here: Path, said: str) -> None:
    """All answers have a score, by the reward model alone, and the files have the highest and the lowest."""
    candidates, scored = rows(here, "candidates"), rows(here, "scores")
    given = {row["id"]: [choice["message"]["content"] for choice in json.loads(row["choices"])] for row in candidates}
    assert len(given) == 3 and all(len(answers) == 4 for answers in given.values())
    talks = {row["id"]: json.loads(row["messages"]) for row in scored}
    assert {name: [talks[f"{name}-{n}"][-1]["content"] for n in range(1, 5)] for name in given} == given
    assert all([message["role"] for message in talk] == ["user", "assistant"] for talk in talks.values())
    chosen, pairs = ([json.loads(line) for line in (here / f"{name}.jsonl").open()] for name in ("best", "pairs"))
    assert [row["id"] for row in chosen] == sorted(given) and pairs
    for row in chosen:
        score, name = max((each["score"], each["id"]) for each in scored if each["question"] == row["id"])
        assert (row["score"], row["messages"]) == (score, talks[name])
    for pair in pairs:
        name = min((each["score"], each["id"]) for each in scored if each["question"] == pair["id"])[1]
        assert pair["rejected"] == talks[name] and pair["chosen"][0] == talks[name][0]


def nothing(here: Path, said: str) -> None:
    assert said


ENDS: dict[str, Callable[[Path, str], None]] = {
    "README.md": readme,
    "score-a-table.md": score,
    "overnight-batch.md": overnight,
    "lora-per-row.md": adapters,
    "from-vllm-run-batch.md": vllm_batch,
    "from-ray-data-llm.md": ray_data,
    "from-oumi.md": oumi,
    "deduplicate.md": unique,
    "perplexity-filter.md": clean,
    "best-of-n.md": best,
}


def _case(page: Path) -> Any:
    slow = page.name in ("score-a-table.md", "best-of-n.md", "deduplicate.md", "perplexity-filter.md")
    slow = slow or ("engine=vllm" in page.read_text() and page.name != "README.md")
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("page", [_case(page) for page in EXECUTED])
def test_a_page_works_from_top_to_bottom(
    page: Path,
    here: Path,
    local_ray: None,
    server: ProviderServer,
    batches: BatchServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = batches if page.name == "overnight-batch.md" else server
    reader = Reader(page, here, asked.url, capsys, *(["dataset.limit=3"] if "score.yaml" in page.read_text() else []))
    reader.follow()
    ENDS.get(page.name, nothing)(here, reader.said)


@pytest.mark.slow
def test_a_classifier_labels_files_on_s3_every_night(
    here: Path, s3: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page in a shell, and its line of a crontab as cron runs it, after more rows have arrived. Each run starts its
    own Ray, because its workers need the variables of the store."""
    page, home = ROOT / "docs" / "quality-classifier.md", here / "srv/eagleray"
    store = {**S3Server.environment, "AWS_ENDPOINT_URL": s3.endpoint, "AWS_REGION": "us-east-1"}
    for name, value in store.items():
        monkeypatch.setenv(name, value)
    texts = [json.loads(line) for line in (here / "docs/examples/pages.jsonl").read_text().splitlines()]
    days = [str(datetime.date.today() + datetime.timedelta(days=ahead)) for ahead in (0, 1)]

    def arrive(file: str, found: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(found), here / file)
        for day in days:  # the test may run at midnight
            s3.put(f"pages/{day}/{file}", (here / file).read_bytes())

    arrive("a.parquet", texts[:6])
    (run_file,), (program,) = ([b for b in blocks(page) if b.language == language] for language in ("yaml", "python"))
    home.mkdir(parents=True)
    (home / "quality.yaml").write_text(_real(run_file.text))
    script = "".join(b.text for b in blocks(page) if b.language == "sh").replace(
        "eagleray ", f"{sys.executable} -m jobs.cli "
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-ec", script], cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    exec(compile(program.text, str(program), "exec"), {})
    assert re.search(r"[1-5] good texts, [1-5] of them for sure", capsys.readouterr().out)

    arrive("b.parquet", texts[6:])
    (home / ".venv").symlink_to(sys.prefix)
    machine = Machine(here, ProviderServer(), home / "keys.env")
    machine.keys.touch(0o600)
    machine.keys.write_text("".join(f"{name}={value}\n" for name, value in store.items()))
    (line,) = [line for block in blocks(page) for line in block.text.splitlines() if line.startswith("0 2-6")]
    assert machine.cron(line) == 0, (home / "quality.log").read_text()
    assert "This run sent 6 requests" in (home / "quality.log").read_text()
    [table] = [pq.read_table(f"s3://bucket/quality/{day}/data") for day in days if s3.objects(f"quality/{day}/")]
    labels = {row["id"]: row["label"] for row in table.to_pylist()}
    assert list(labels) == [text["id"] for text in texts]
    assert [labels[name] for name in ("sun", "bread", "library", "keys", "menu", "codes")] == ["good"] * 3 + ["poor"] * 3


@pytest.mark.slow
def test_the_readme_works_in_a_shell_with_all_rows(here: Path) -> None:
    """As a newcomer types it: the command `eagleray`, Ray of its own, no key changed."""
    commands = [b.text for b in blocks(ROOT / "README.md") if b.language == "sh"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    script = "".join(commands).replace("eagleray ", f"{sys.executable} -m jobs.cli ")
    done = subprocess.run(["bash", "-c", script], cwd=here, env=environment, capture_output=True, text=True, timeout=600)
    assert "33 of 34 rows done, 1 failed" in done.stdout + done.stderr and "demo.jsonl:25" in done.stdout
    readme(here, done.stdout + done.stderr)
    assert len(rows(here, "score")) == 8
