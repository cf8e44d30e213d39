"""report.html: its figures against data/, its sums against numpy, and the page in a real browser, with hostile rows."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import axe_core_python
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from engines.errors import Failure
from engines.text import visible
from engines.types import Completion
from engines.usage import Usage
from pipeline.report.advice import ADVICE, TRUNCATED
from pipeline.report.charts import LEFT, RIGHT, WIDTH, Drawing, latency_over_time, series_of, short, short_seconds, ticks
from pipeline.report.conversation import ROW_CHARS, shown_row
from pipeline.report.costs import cost_of, dollars
from pipeline.report.page import write_report
from pipeline.report.rows import SAMPLE_BYTES
from pipeline.report.shared_texts import alike
from pipeline.report.stats import MOST_BUCKETS, PAUSE_MS, SAMPLED, Stats
from pipeline.storage.filesystem import resolve
from pipeline.storage.ledger import COMPLETION_COLUMNS, completion_columns
from tests.support.infer import Infer, ask
from tests.support.outputs import figure
from tests.support.processes import until
from tests.support.provider_server import ProviderServer

Write = Callable[..., Path]
KEY = "sk-0123456789-a-key-that-nobody-may-see"
# A bin is 2.2% wide.
NEAR = 0.023

HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\"><svg onload=\"document.title = 'owned'\">",
    '"><iframe src="javascript:parent.document.title=1"></iframe><style>body { display: none }</style>',
    "<!--<script>",
    "-->]]></body></html>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7}",
    "line\u2028separator\u2029paragraph",
    "bell\x07 escape\x1b[31mred null\x00 delete\x7f next\x85",
    "right\u202eto left\u202c isolate\u2067 and on",
    "\ufeffzero\u200bwidth é e\u0301 👩‍👩‍👧 اللغة العربية 日本語",
    "x" * 150_000,
]
SEEN = [visible(text)[:2600] for text in HOSTILE]


def in_seconds(text: str) -> float:
    value, unit = text.split()
    return float(value) * {"ms": 0.001, "s": 1.0}[unit]


def under(page: str, title: str) -> dict[str, str]:
    """The figures under a histogram."""
    part = page[page.index(f'aria-label="{title}"') :]
    part = part[: part.index("</figure>")]
    return dict(re.findall(r"<dt>(\w+)</dt><dd>(.*?)</dd>", part))


def test_the_figures_are_those_of_the_output(infer: Infer, write_jsonl: Write) -> None:
    rows: list[Any] = [ask(" ".join(f"w{i}-{j}" for j in range(1 + i * 7 % 90)), id=f"r{i}") for i in range(600)]
    rows += [ask("the same", id=f"same-{i}") for i in range(5)] + ["{broken"]
    kwargs = [f"engine.kwargs.{name}" for name in ("latency_s=0.05", "jitter_s=0.045", "failure_rate=0.1")]
    outcome = infer(write_jsonl(rows), *kwargs, "engine.price.input=2", "engine.price.output=10")
    page = (infer.out / "report.html").read_text()
    table = list({row["messages"]: row for row in reversed(infer.rows())}.values())  # equal requests are asked once
    good = [row for row in table if not row["error"]]
    read, written = (np.array([row["usage"][name] for row in good]) for name in ("input", "output"))
    assert len(good) > 450
    assert figure(page, "Rows done") == str(sum(not row["error"] for row in infer.rows()))
    assert figure(page, "Output tokens") == f"{written.sum():,}"
    assert figure(page, "Input tokens") == f"{read.sum():,}"
    assert figure(page, "Cost") == f"${(2 * read.sum() + 10 * written.sum()) / 1e6:.4g}"
    for title, values in (("Input tokens", read), ("Output tokens", written)):
        told = {name: float(value.replace(",", "")) for name, value in under(page, title).items()}
        assert (told["min"], told["max"]) == (values.min(), values.max())
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
            assert told[name] == pytest.approx(np.quantile(values, q), rel=NEAR, abs=1)
    latency = np.array([row["latency_s"] for row in good])
    seconds = {name: in_seconds(value) for name, value in under(page, "Latency").items()}
    assert seconds["max"] == pytest.approx(latency.max(), rel=0.01)
    for name, q in (("p50", 0.5), ("p95", 0.95)):
        assert seconds[name] == pytest.approx(np.quantile(latency, q), rel=2 * NEAR)
    slowest = re.findall(r'<a href="#row-(\d+)">', page[page.index('id="slowest"') :])
    timed = sorted(table, key=lambda row: -row["latency_s"])
    assert [int(index) for index in slowest] == [row["index"] for row in timed[:10]]
    manifest = outcome.manifest
    counts = re.findall(r'class="type">(\w+)</h3>\n<p class="count">([\d,]+) rows? ', page)
    assert {name: int(count.replace(",", "")) for name, count in counts} == manifest["errors"]
    assert manifest["errors"]["invalid_input"] == 1
    assert re.search("<bdi>in.jsonl:606</bdi>(</a>)?</b> <bdi>invalid JSON: ", page)
    assert all(unescape(page).count(ADVICE[type]) == 1 and f"docs/errors.md#{type}" in page for type in manifest["errors"])
    million = sum(entry["cost_usd"] for entry in manifest["costs"]) / manifest["rows"]["done"] * 1e6
    assert figure(page, "Cost of a million rows") == dollars(million)
    assert [(e["lane"], e["model"], e["requests"]) for e in manifest["costs"]] == [("live", "echo", len(table) - 1)]
    assert sum(manifest["cost_parts_usd"].values()) == manifest["cost_usd"]
    answered = sum(int(n.replace(",", "")) for n in re.findall(r": ([\d,]+) done", page))
    failed = sum(int(n.replace(",", "")) for n in re.findall(r"done, ([\d,]+) failed", page))
    assert (answered, answered + failed) == (len(good), manifest["rows"]["requests"])


@pytest.mark.slow
def test_nothing_new_leaves_the_report_and_deleting_it_makes_it_anew(infer: Infer, write_jsonl: Write) -> None:
    path = write_jsonl([ask(f"{i}") for i in range(10)])
    infer(path)
    report = infer.out / "report.html"
    before = report.stat().st_mtime_ns
    infer(path)
    assert report.stat().st_mtime_ns == before
    report.unlink()
    infer(path)
    assert "No request was sent" not in infer.printed
    assert "All 10 rows." in report.read_text()


def test_an_input_column_named_done_at_is_left_alone(infer: Infer, write_jsonl: Write) -> None:
    infer(write_jsonl([ask("x", done_at="yesterday")]))
    assert infer.rows()[0]["done_at"] == "yesterday"


def test_an_input_without_rows_has_a_report_too(infer: Infer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    infer(tmp_path / "in.jsonl")
    assert figure((infer.out / "report.html").read_text(), "Rows done") == "0"


def test_a_bug_in_the_report_costs_no_run_and_is_told(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    fs, root = resolve(str(tmp_path))
    broken = Stats()
    broken.add(np.array([0]), 0, pa.table({"no": ["<b>such"]}), None, ["r"], lambda row: {})
    for stats, reason in ((Stats(), "KeyError: 'config'"), (broken, 'KeyError: \'Field "error"')):
        write_report(fs, root, {}, stats, console)
        page = (tmp_path / "report.html").read_text()
        assert "Traceback" in page
        assert reason in unescape(page)
        assert "<b>" not in page
        assert reason in console.file.getvalue()  # type: ignore[attr-defined]


# -- the sums ---------------------------------------------------------------------------------------------------------


def completions(rows: list[tuple[float, float, int, bool]]) -> tuple[pa.Table, pa.ChunkedArray]:
    """Columns as finalize has them, of (done_at, latency, tokens, failed)."""
    found = [
        Completion(latency_s=latency, error=Failure("server", f"{at}", 500))
        if failed
        else Completion(latency_s=latency, usage=Usage(tokens * 2, 0, tokens))
        for at, (_, latency, tokens, failed) in enumerate(rows)
    ]
    table = pa.Table.from_arrays(completion_columns(found), names=list(COMPLETION_COLUMNS))
    done = pa.chunked_array([pa.array([int(row[0] * 1000) for row in rows], pa.timestamp("ms", tz="UTC"))])
    return pa.table({name: pa.chunked_array([table[name].combine_chunks()]) for name in table.column_names}), done


ROW = st.tuples(st.floats(1e9, 1e9 + 1e6), st.floats(0.001, 5000), st.integers(0, 100_000), st.booleans())


def stats_of(rows: list[tuple[float, float, int, bool]], cuts: list[int]) -> Stats:
    whole, done = completions(rows)
    total = Stats()
    for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        part = Stats()
        ids = [f"r{at}" for at in range(start, end)]
        at = np.arange(start, end)
        mine = whole.slice(start, end - start)
        columns = {
            "tokens": pc.struct_field(mine["usage"].combine_chunks(), "output"),
            "size": pc.if_else(pc.less(mine["latency_s"], 1), "short", "long"),
            "marks": pa.array([["a", "b"]] * len(mine)),
        }
        part.add(at, start, mine, done.slice(start, end - start), ids, lambda row: {}, columns)
        assert part.broken is None, part.broken
        total.merge(part)
    assert total.broken is None, total.broken
    return total


# Parts whose timelines have buckets of different widths, the wider one first and last.
LONG = [(1e9 + at, 1.0, at, at % 7 == 0) for at in range(1000)]


@settings(max_examples=60)
@example(LONG, [900])
@example(LONG, [100])
@given(st.lists(ROW, min_size=1, max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_the_sums_do_not_depend_on_how_the_rows_are_cut_into_parts(
    rows: list[tuple[float, float, int, bool]], cuts: list[int]
) -> None:
    cuts = sorted(min(cut, len(rows)) for cut in cuts)
    cut, whole = stats_of(rows, cuts), stats_of(rows, [])
    good = np.array([row[2] for row in rows if not row[3]])
    for histogram in (cut.output, whole.output):
        assert len(histogram) == len(good)
        if len(good):
            assert (histogram.least, histogram.most, histogram.sum) == (good.min(), good.max(), good.sum())
            for q in (0.0, 0.5, 0.95, 0.99, 1.0):
                low, high = (np.quantile(good, q, method=method) for method in ("lower", "higher"))
                assert low * (1 - NEAR) - 1 <= histogram.quantile(q) <= high * (1 + NEAR) + 1
    assert (cut.latency.counts == whole.latency.counts).all()
    assert (cut.timeline.active_intervals == whole.timeline.active_intervals).all()
    assert cut.timeline.width_ms == whole.timeline.width_ms
    order = [("bucket", "ascending"), ("latency", "ascending")]
    assert cut.timeline.cells.sort_by(order).equals(whole.timeline.cells.sort_by(order))
    for stats in (cut, whole):
        cells = stats.timeline.cells.to_pandas()
        assert cells.bucket.nunique() <= MOST_BUCKETS
        assert (cells.answered.sum(), cells.failed.sum(), cells.output.sum()) == (
            len(good),
            len(rows) - len(good),
            good.sum() if len(good) else 0,
        )
        for values in stats.columns.values():
            assert (values.rows, values.missing) == (len(good), 0)
        assert stats.columns["size"].counts == Counter("short" if row[1] < 1 else "long" for row in rows if not row[3])
        assert stats.columns["marks"].counts == ({"a": len(good), "b": len(good)} if len(good) else {})
        if len(good):
            numbers = stats.columns["tokens"]
            assert (numbers.least, numbers.most, numbers.sum) == (good.min(), good.max(), good.sum())
            assert sorted(numbers.numbers) == sorted(good) and numbers.counts == Counter(good.tolist())
    for name in ("size", "marks"):
        found = [{v: [s.at for s in shown] for v, shown in s.columns[name].examples.items()} for s in (cut, whole)]
        assert found[0] == found[1]
    for kind in ("sample", "failed", "slowest"):
        assert [shown.at for shown in getattr(cut, kind)] == [shown.at for shown in getattr(whole, kind)]
    assert cut.examples == whole.examples


def test_pauses_are_not_counted_as_time_in_which_rows_were_answered() -> None:
    rows = [(1e9 + t, 2.0, 1, False) for t in range(10)] + [(1e9 + 5000 + t, 2.0, 1, False) for t in range(10)]
    stats = stats_of(rows, [3, 15])
    assert len(stats.timeline.active_intervals) == 2
    assert stats.timeline.seconds == 22
    near = stats_of([(1e9, 1.0, 1, False), (1e9 + PAUSE_MS / 1000 + 0.9, 1.0, 1, False)], [1])
    assert len(near.timeline.active_intervals) == 1


@pytest.mark.parametrize("pause_s", [70, 300, 5000])
def test_no_answer_is_drawn_twice_around_a_pause(pause_s: int) -> None:
    begins = [0, *range(20_000, 20_000 + 9 * pause_s, pause_s)]  # a long stretch, by which columns get wide, and short ones
    times = [*range(0, begins[1] - pause_s, 20), *begins[1:]]
    stats = stats_of([(1e9 + at, 2.0, 1, False) for at in times], [len(times) // 2])
    assert len(stats.timeline.active_intervals) == 10
    series = series_of(stats.timeline)
    assert sum(column.rows for column in series.columns) == len(times)
    assert sum(column.output for column in series.columns) == len(times)


def test_the_axis_of_latencies_has_short_labels() -> None:
    drawn = latency_over_time(series_of(stats_of([(1e9 + at, 250.0, 1, False) for at in range(5)], [5]).timeline))
    assert re.findall('class="end" x="[^"]*" y="[^"]*">([^<]*)', drawn)[:3] == ["0 s", "100 s", "200 s"]


def test_the_sample_is_spread_over_the_whole_input() -> None:
    stats = stats_of([(1e9 + at / 100, 1.0, 1, False) for at in range(5000)], [1000, 1100, 4000])
    found = sorted(shown.at for shown in stats.sample)
    assert len(found) == SAMPLED
    assert max(np.diff([0, *found, 5000])) < 5000 / SAMPLED * 3


def test_a_row_shown_is_bounded_whatever_is_in_it() -> None:
    huge = [{"role": "user", "content": "\x00<" * 5_000} for _ in range(500)]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
    signed = {"type": "image_url", "image_url": {"url": f"https://bucket.example/a.png?X-Signature={KEY}"}}
    huge[1] = {"role": "user", "content": [{"type": "text", "text": "see"}, image, signed, {"type": "input_audio"}]}  # type: ignore[dict-item]
    columns, _ = completions([(1e9, 1.0, 5, False)])
    completion = {**columns.to_pylist()[0], "response": "y" * 100_000}
    row = shown_row("i" * 5000, 3, json.dumps(huge).encode(), None, {}, completion)
    text = json.dumps(row)
    assert len(text) < 2 * ROW_CHARS * 6
    assert KEY not in text
    assert row["turns"][1]["parts"] == [
        {"kind": "text", "text": "see"},
        {"kind": "image", "text": "image/png, 292 KiB"},
        {"kind": "image", "text": "https://bucket.example/a.png"},
        {"kind": "other", "text": "input_audio"},
    ]
    assert row["turns"][-1]["parts"][0]["text"].startswith("yyyy")
    assert {"kind": "note", "text": "480 messages are left out here"} in row["turns"][4]["parts"]


def test_texts_are_told_apart_by_what_differs() -> None:
    begin, end = "Read this review of a customer and give it stars.\n", "\nAnswer with one number between 1 and 5."
    texts = [f"{begin}{text}{end}" for text in ("good", "bad", "great")] + ["another question", "the same", "the same"]
    groups = {tuple(group.at): group for group in alike(texts)}
    assert (groups[0, 1, 2].before, groups[0, 1, 2].after) == (begin, end)
    assert [groups[0, 1, 2].differing(text) for text in texts[:3]] == ["good", "bad", "great"]
    assert all(not group.before for at, group in groups.items() if at != (0, 1, 2))
    assert not alike(["equal " * 20] * 3)[0].before  # nothing differs


@pytest.mark.parametrize(
    ("cost", "known", "done", "total", "million"),
    [(2.0, 2.0, 1000, "$2.00", "$2,000.00"), (None, 0.5, 1000, "unknown", "unknown"), (None, 0.0, 10, "unknown", "unknown"),
     (1.0, 1.0, 0, "$1.00", "unknown")],
)  # fmt: skip
def test_an_unknown_cost_stays_unknown(cost: float | None, known: float, done: int, total: str, million: str) -> None:
    manifest = {"cost_usd": cost, "cost_known_usd": known, "cost_unknown_requests": 7, "rows": {"done": done},
                "config": {"engine": {"provider": {}}}}  # fmt: skip
    found = cost_of(manifest)
    assert (found.total, found.million, found.free) == (total, million, False)
    assert ("for 7 requests" in found.note) == (cost is None)
    assert [dollars(value) for value in (0.0, 7.31e-5, 0.01198, 1234.5)] == ["$0.00", "$0.000073", "$0.01198", "$1,234.50"]


@pytest.mark.slow
def test_a_report_of_a_million_hostile_rows_stays_small(infer: Infer, write_jsonl: Write) -> None:
    rows = [ask(f"{i} " + "<&\x01\u2028" * 4000, id="<" * 300 + str(i)) for i in range(300)]
    infer(write_jsonl(rows), "engine.kwargs.failure_rate=0.3")
    assert SAMPLE_BYTES < (infer.out / "report.html").stat().st_size + 200_000 < 2_000_000


# -- the page, in a browser -------------------------------------------------------------------------------------------


WEATHER = {
    "id": "c",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": None,
                "reasoning_content": "I should <b>look</b> it up.",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "<i>Paris"}'}}
                ],
            },
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}},
}
CHOICES = {
    "id": "c",
    "model": "m",
    "choices": [
        {"index": n, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        for n, text in enumerate(["first <u>choice", "second choice"])
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4},
}
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def report(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Infer, ProviderServer]]:
    """A run against a provider, in which much goes wrong and everything is hostile."""
    folder = tmp_path_factory.mktemp("report")
    with ProviderServer(latency_s=0.02) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("REPORT_KEY", KEY)
        rows: list[Any] = [ask(text, id=f"{n}-{text[:80]}") for n, text in enumerate(HOSTILE)]
        rows += [ask(f"refuse {n}", id=f"refused-{n}") for n in range(3)]
        rows += [{"messages": [{"role": "<script>robot", "content": "x"}], "id": "odd"}, '{"broken": "<script>']
        picture = {"type": "image_url", "image_url": {"url": PIXEL}}
        remote = {"type": "image_url", "image_url": {"url": f"{server.url}/seen.png?signature=s3cr3t"}}
        content = [{"type": "text", "text": "What is this?"}, picture, remote]
        rows += [ask("weather?", id="weather"), ask("twice", id="choices", generation={"n": 2})]
        rows += [{"messages": [{"role": "user", "content": content}], "id": "picture"}]
        rows += [ask(f"plain {n}", id=f"plain-{n}") for n in range(20)]
        rows += [ask("cut", id="cut"), ask("again", id="again")]
        server.plan |= {"cut": ["length"], "again": ["500"]}
        server.plan["weather?"] = ["body=" + json.dumps(WEATHER)]
        server.plan["twice"] = ["body=" + json.dumps(CHOICES)]
        for n in range(3):
            server.plan[f"refuse {n}"] = [f"say=400={HOSTILE[n]}"]
        path = folder / "in <b>put.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        infer = Infer(folder / "out")
        base = f"engine.base_url={server.url}"
        price = ["engine.price.input=1", "engine.price.cached_input=0.1", "engine.price.output=4"]
        more = ["engine.api_key_env=REPORT_KEY", "engine.model='<script>m'", *price]
        infer(f'"{path}"', base, *more, "engine.provider.fetches_media=true", engine="openai_compatible")
        yield infer, server


class Page:
    """The report as a person has it before them."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.browser = browser
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())

    def __call__(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(f"return {script}", *arguments)

    def cdp(self, command: str, **arguments: Any) -> Any:
        return self.browser.execute_cdp_cmd(command, arguments)

    def click(self, selector: str) -> None:
        self.browser.find_element("css selector", selector).click()

    def find(self, text: str) -> None:
        self("(document.getElementById('find').value = arguments[0], document.getElementById('find').oninput())", text)

    def chat(self) -> str:
        return self("document.getElementById('chat').textContent")

    def complaints(self) -> list[Any]:
        return [entry for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def asked_for(self) -> set[str]:
        """The URLs that the page wanted."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {url for url in urls if not url.startswith("data:")}


@pytest.fixture
def page(browser: Any, report: tuple[Infer, ProviderServer]) -> Iterator[Page]:
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen(1280))
    yield Page(browser, report[0].out / "report.html")


def screen(width: int) -> dict[str, Any]:
    return {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}


def test_hostile_rows_are_seen_as_they_are_and_run_nothing(page: Page, report: tuple[Infer, ProviderServer]) -> None:
    title = page("document.title")
    rows = json.loads(page("document.getElementById('rows').textContent"))
    assert [row["index"] for row in rows] == list(range(len(rows)))
    for index, text in enumerate(SEEN):
        page.browser.execute_script(f"location.hash = '#row-{index}'")
        page.browser.execute_async_script("setTimeout(arguments[0], 50)")
        assert page.chat().count(text) >= 2, text  # the question, and its echo
    assert page("document.title") == title
    assert "<script>m" in title
    allowed = page("document.querySelectorAll('script, style, iframe, img, object, embed, form, base').length")
    assert allowed == 3  # one style, one script, one island
    assert (
        page("[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))") is False
    )
    assert page("document.getElementById('errors').textContent").count("<script>") >= 1
    assert page.complaints() == []


def test_the_page_asks_the_network_for_nothing(page: Page, report: tuple[Infer, ProviderServer]) -> None:
    _, server = report
    page.find("picture")
    assert "image: image/png" in page.chat()
    assert f"image: {server.url}/seen.png" in page.chat()
    assert "s3cr3t" not in page("document.documentElement.outerHTML")
    assert page.asked_for() == {page("location.href")}
    assert not any(seen.path == "/seen.png" for seen in server.requests)


def test_the_policy_of_the_page_lets_nothing_else_in(page: Page, report: tuple[Infer, ProviderServer]) -> None:
    _, server = report
    page(
        "(() => { const s = document.createElement('script'); s.textContent = 'document.title = 1';"
        " document.body.append(s);"
        " const i = document.createElement('img'); i.src = arguments[0]; document.body.append(i);"
        " const p = document.createElement('p'); p.setAttribute('style', 'color: red'); document.body.append(p);"
        " window.colour = getComputedStyle(p).color; })()",
        f"{server.url}/stolen.png",
    )
    complaints: list[Any] = []
    until(lambda: complaints.extend(page.complaints()) or len(complaints) >= 3)
    assert page("document.title") != "1"
    assert page("window.colour") != "rgb(255, 0, 0)"
    assert not any(seen.path == "/stolen.png" for seen in server.requests)


def test_calls_reasoning_and_choices_are_shown(page: Page) -> None:
    page.find("weather?")
    assert "I should <b>look</b> it up." in page.chat()
    assert '"city": "<i>Paris"' in page("document.querySelector('#chat .call pre').textContent")
    assert page("document.querySelector('#chat .call b').textContent") == "weather"
    page.find("choices")
    assert "first <u>choice" in page.chat()
    assert "2 of 2" in page.chat()


def test_the_sample_is_browsed_searched_and_filtered(page: Page) -> None:
    def place() -> str:
        return page("document.getElementById('place').textContent")

    total = len(json.loads(page("document.getElementById('rows').textContent")))
    assert place() == f"1 of {total}"
    assert page("document.getElementById('before').disabled")
    page.click("#after")
    assert place() == f"2 of {total}"
    page.browser.find_element("css selector", "body").send_keys("\ue014")  # the right arrow
    assert place() == f"3 of {total}"
    page.click("#before")
    assert place() == f"2 of {total}"
    page.find("PLAIN ")
    shown = page("[...document.querySelectorAll('#list bdi')].map(e => e.textContent)")
    assert shown
    assert all(id.startswith("plain-") for id in shown)
    page.find("")
    page.click("#bad")
    errors = page("document.querySelectorAll('#list li').length")
    assert errors == 5
    said = page("[...document.querySelectorAll('#list button')].map(b => (b.click(), document.body.textContent)).join()")
    assert '{"messages":[{"role":"<script>robot"' in said
    assert '{"broken": "<script>' in said
    page.find("no such words")
    assert place() == "none"
    assert "No conversation matches." in page.chat()
    link = page.browser.find_element("css selector", "#slowest a")
    name = link.text
    link.click()
    page.browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert page("document.querySelector('#chat h3').textContent").startswith(name[:20])
    assert page.complaints() == []


def test_the_charts_are_there(page: Page) -> None:
    assert page("[...document.querySelectorAll('figure svg[role=img]')].map(e => e.getAttribute('aria-label'))") == [
        "Input tokens",
        "Output tokens",
        "Answers per second over time",
        "Output tokens per second over time",
        "Latency over time",
        "Latency",
        "Queueing",
    ]
    for kind in ("answered", "tokens", "counted"):
        heights = page(f"[...document.querySelectorAll('svg .{kind}')].map(e => e.getBoundingClientRect().height)")
        assert max(heights) > 40
    lines = page("[...document.querySelectorAll('svg .p95')].map(e => e.getBoundingClientRect().width)")
    assert sum(lines) > 10  # a line for each stretch of time with answers
    outside = "[...document.querySelectorAll('svg text, svg rect')].filter(e => { const a = e.getBoundingClientRect(), b ="
    outside += " e.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1; })"
    assert page(f"{outside}.map(e => e.outerHTML)") == []
    # Nor of any run whose answers take longer, or are more.
    tops = [10.0**power * by for power in range(-3, 6) for by in (1, 2.1, 4.3, 8.9)]
    labels = [text(value) for text in (short, short_seconds) for top in tops for value in ticks(0, top, 4)]
    label = "document.querySelector('svg text.end')"
    found = page(f"{json.dumps(labels)}.map(text => ({label}.textContent = text, {label}.getComputedTextLength()))")
    assert max(zip(found, labels, strict=True)) <= (LEFT - 5, "")


def test_no_label_of_an_axis_is_cut_off_wherever_its_mark_is(page: Page) -> None:
    drawing = Drawing([], RIGHT, WIDTH - RIGHT, 1.0, RIGHT)  # its values are user units
    for label in ("0", "29 ms", "888 ms", "0.888 ms", "1 min 20 s", "23 h 59 min", "888k", "1,888"):
        for distance in range(RIGHT, 60):
            drawing.mark_x(distance, label)
            drawing.mark_x(WIDTH - distance, label)
    cut = "(() => { const s = document.querySelector('figure svg'); s.innerHTML = arguments[0];"
    cut += " return [...s.querySelectorAll('text')].map(e => [e.getBBox(), e.outerHTML])"
    cut += " .filter(([b]) => b.x < 0 || b.x + b.width > s.viewBox.baseVal.width).map(([, html]) => html); })()"
    assert page(cut, "".join(drawing.parts)) == []


def test_light_and_dark_follow_the_system_and_the_button(page: Page) -> None:
    def colour() -> str:
        return page("getComputedStyle(document.body).backgroundColor")

    found = []
    for scheme in ("light", "dark"):
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        found.append(colour())
    light, dark = found
    assert light != dark
    page.click("#theme")
    assert colour() == light
    page.click("#theme")
    assert colour() == dark
    page.cdp("Emulation.setEmulatedMedia", media="print", features=[])
    assert page("getComputedStyle(document.body).colorScheme") == "light"
    assert page("getComputedStyle(document.getElementById('list')).display") == "none"
    page.cdp("Emulation.setEmulatedMedia", media="", features=[])
    assert base64.b64decode(page.cdp("Page.printToPDF")["data"]).startswith(b"%PDF")


@pytest.mark.parametrize("width", [340, 360, 768, 1600])
def test_no_width_scrolls_sideways(page: Page, width: int) -> None:
    page.cdp("Emulation.setDeviceMetricsOverride", **screen(width))
    for index in range(len(HOSTILE)):
        page.browser.execute_script(f"location.hash = '#row-{index}'")
        page.browser.execute_async_script("setTimeout(arguments[0], 20)")
        assert page("document.documentElement.scrollWidth") <= width
        assert page("document.getElementById('chat').scrollWidth <= document.getElementById('chat').clientWidth")
    page.browser.execute_script(
        "document.querySelectorAll('.figures dd').forEach(dd => { dd.textContent = '123.45 min'; })"
    )
    assert page("document.documentElement.scrollWidth") <= width


def test_axe_finds_nothing(page: Page) -> None:
    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
    page.cdp("Runtime.evaluate", expression=axe)
    for width, scheme in ((360, "light"), (768, "dark"), (1600, "light")):
        page.cdp("Emulation.setDeviceMetricsOverride", **screen(width))
        page.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        run = "axe.run().then(found => arguments[0](found.violations.map(v => [v.impact, v.id, v.nodes[0].html])))"
        assert page.browser.execute_async_script(run) == [], (width, scheme)
    page.cdp("Emulation.setEmulatedMedia", media="", features=[])


def test_the_keyboard_reaches_everything(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(60):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page("document.activeElement.id || document.activeElement.getAttribute('aria-label')"))
        if page("document.activeElement.tagName") == "SUMMARY":
            break
    assert {"theme", "Answers", "find", "bad", "after"} <= set(reached)
    assert reached.index("theme") < reached.index("Answers") < reached.index("find")


def test_truncated_answers_and_failures_have_advice(page: Page) -> None:
    assert page("document.querySelector('#truncated .count').textContent").startswith("1 row ")
    text = page("document.getElementById('truncated').textContent")
    assert TRUNCATED in text and "docs/errors.md#truncated-answers" in text
    link = page.browser.find_element("css selector", "#truncated a")
    assert link.text == "cut"
    link.click()
    page.browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert page("document.querySelector('#chat h3').textContent") == "cut"
    assert "finish reason: length" in page.chat()


def test_each_section_names_its_scope_in_the_order_of_the_readers_questions(page: Page) -> None:
    every, this = "all runs of this output", "this run"
    assert page("[...document.querySelectorAll('h2')].map(e => [e.id, e.querySelector('.scope').textContent])") == [
        ["dataset", this], ["results", every], ["problems", every], ["costs", every], ["speed", every], ["run", this],
        ["settings", this],
    ]  # fmt: skip


def test_queueing_is_apart_from_the_answers_own_time(page: Page, report: tuple[Infer, ProviderServer]) -> None:
    infer, server = report
    rows = {row["id"]: row for row in json.loads(page("document.getElementById('rows').textContent"))}
    tried = next(row for row in rows.values() if row["id"] == "again")
    assert (tried["attempts"], tried["queued"] >= server.latency_s) == (2, True)  # the failed try is in it
    assert "queued_s" not in infer.table().column_names


def test_no_secret_is_in_the_report(report: tuple[Infer, ProviderServer]) -> None:
    infer, server = report
    assert any(KEY in seen.headers.get("authorization", "") for seen in server.requests)
    assert KEY not in (infer.out / "report.html").read_text()
