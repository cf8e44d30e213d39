"""What a person sees while a run goes on, on a real terminal and in a log; and that the terminal is theirs again after."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from engines.config import EngineConfig, Price
from pipeline.monitor.progress import RunProgress, flow
from pipeline.monitor.status import ReplicaHeartbeat, RunStatus
from pipeline.origin import Origin
from tests.support.infer import Infer, ask
from tests.support.outputs import figure
from tests.support.terminal import Terminal

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_narrow_terminal_shows_the_run_and_is_restored_after_ctrl_c(tmp_path: Path) -> None:
    data, out = tmp_path / "in.jsonl", tmp_path / "it's out"
    data.write_text("".join(json.dumps(ask(f"row {i}")) + "\n" for i in range(3000)))
    argv = [
        "engine=echo", "engine.kwargs.latency_s=2", "engine.max_concurrency=32", "engine.price.input=1",
        "engine.price.output=1", "run.flush_s=0.5", f"dataset.path={data}", f"output.path={out}",
    ]  # fmt: skip
    terminal = Terminal("jobs.infer", *argv, columns=60)
    shown = terminal.until(lambda text: "working" in text and "projected" in text and " left" in text)
    # From the first moment on, it said what was being started. (A replica of echo may work before the first frame.)
    steps = (
        "reading the configuration …", "loading the libraries …", "checking the configuration", "listing the input files",
        "reading the first rows", "starting Ray", "starting the replicas",
    )  # fmt: skip
    places = [terminal.shown.find(step) for step in steps]
    assert places == sorted(places) and min(places) == 0, dict(zip(steps, places, strict=True))
    assert terminal.screen.cursor.hidden
    lines = [line for line in shown.splitlines() if line.strip()]
    assert any(line.startswith("echo echo") for line in lines)
    assert "of 3,000 rows done · 0 failed" in shown and "requests in flight" in shown and "tokens/s out" in shown
    terminal.type("\x03")
    assert terminal.end() == 130
    assert not terminal.screen.cursor.hidden
    after = " ".join("".join(terminal.screen.display).split())
    # Without spaces: a line that is just full has none at its end.
    assert "inflight(asecondsignalendstherunatonce)" in after.replace(" ", ""), terminal.text
    # The live view is gone, and the last line is the same command, to be copied.
    assert "━" not in after and "working" not in after, terminal.text
    last = after[after.index("To continue: ") :].removeprefix("To continue: ").strip()
    assert shlex.split(last) == ["eagleray", "infer", *argv]
    assert f"'output.path={tmp_path}/it'\"'\"'s out'" in last
    # Nothing of Ray's own.
    assert "raylet" not in after and "core_worker" not in after


@pytest.mark.slow
def test_a_log_gets_a_line_every_so_often(infer: Infer, write_jsonl: Callable[..., Path]) -> None:
    data = write_jsonl([ask(f"row {i}") for i in range(400)])
    more = ["engine.kwargs.latency_s=0.2", "engine.max_concurrency=8", "run.progress_s=0.5"]
    infer(data, *more, "engine.price.input=1", "engine.price.output=1")
    lines = [line for line in infer.printed.splitlines() if "rows/s" in line]
    assert len(lines) >= 3
    assert any(" left · $" in line and " projected · " in line for line in lines)
    assert all("\x1b" not in line for line in lines)
    assert lines[-1].startswith("400 of 400 rows done · 0 failed · ")  # the counts of the report
    assert figure((infer.out / "report.html").read_text(), "Rows done") == "400"


# -- the view, at moments of a run ------------------------------------------------------------------------------------


def view(status: RunStatus, width: int, monkeypatch: pytest.MonkeyPatch, expected: int = 0, **more: float) -> str:
    """What is shown 10 s after nothing was done yet."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    now = [1000.0]
    monkeypatch.setattr("pipeline.monitor.progress.time.monotonic", lambda: now[0])
    engine = EngineConfig("openai", "gpt-4o-mini", price=Price(1, None, 2))
    progress = RunProgress(console, 10, engine, more.get("budget"))
    progress.show(RunStatus(replicas={name: ReplicaHeartbeat("working") for name in status.replicas}))
    now[0] += 10
    progress.show(status, expected)
    console.print(progress.render())
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_first_line_needs_no_heavy_library() -> None:
    heavy = "hydra", "numpy", "pyarrow", "ray", "rich"
    code = f"import sys, jobs.infer; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert ran.stdout == "[]\n"


def test_replicas_that_start_are_named_until_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, one = ReplicaHeartbeat(), {"w1": ReplicaHeartbeat()}
    assert "loading the model in 2 replicas" in view(RunStatus(read=10, replicas=one), 80, monkeypatch, expected=2)
    for status in (
        RunStatus(read=10, replicas={"w1": working(1, 0), "w2": loading}),
        RunStatus(read=10, rows_done=10),  # at the end, when the replicas have left
        RunStatus(read=10, answered=10, finished=True),
    ):
        assert "loading the model" not in view(status, 80, monkeypatch, expected=2)


def working(busy: int, done: int, **more: float) -> ReplicaHeartbeat:
    return ReplicaHeartbeat("working", busy, done, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_no_line_is_wider_than_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeats = {
        f"w{i}": working(32, 10 * i, admitted=16.0, most=64, retried=3, throttled=2, waited_s=7.0) for i in range(12)
    }
    status = RunStatus(
        read=123_456, done=900, failed=3, rows_done=1000, rows_failed=3, output_tokens=50_000,
        cost_usd=1.25, fed=True, replicas=heartbeats, spent=1.5, trouble="HTTP 503: " + "the server is away " * 9,
    )  # fmt: skip
    text = view(status, width, monkeypatch, expected=14, budget=20.0)
    assert all(len(line) <= width for line in text.splitlines())
    for part in (
        "of 123,456 rows done",
        "3 failed",
        "384 requests in flight",
        "$1.25 in this run",
        "of $20",
        "rows/s",
        "5,000 tokens/s out",
    ):
        assert part in text
    assert (
        "192 of 768 requests at once" in text and "36 retries" in text and "24 × 429" in text and "84 s for limits" in text
    )
    assert "retrying: HTTP 503" in text
    # Four of twelve, what the others do together, and those that are still on their way.
    assert sum(line.strip().startswith("w") for line in text.splitlines()) == 4
    assert "8 more" in text and "8 working" in text and "256 in flight" in text and "2 more" in text and "starting" in text


def test_rates_are_of_late_and_tell_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), width=120)
    now = [0.0]
    monkeypatch.setattr("pipeline.monitor.progress.time.monotonic", lambda: now[0])
    progress = RunProgress(console, 1e9)
    for second in range(200):  # a row a second, then ten
        now[0] = float(second)
        done = second if second < 100 else 100 + 10 * (second - 100)
        progress.show(RunStatus(read=2000, done=done, rows_done=done, output_tokens=2 * done, fed=True))
    rows, tokens = progress._recent()
    assert (rows, tokens) == (pytest.approx(10), pytest.approx(20))
    assert progress._left() == "0:01:31 left"
    assert len(progress.samples) < 70


def test_a_price_that_is_not_known_is_not_shown_as_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = RunProgress(Console(file=io.StringIO()), 10, EngineConfig("openai", "m"))
    progress.show(RunStatus(read=10, done=5, fed=True))
    assert not list(progress._cost())


def test_a_servers_words_are_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = view(RunStatus(read=10, trouble="[red]no[/] \x1b[2J"), 80, monkeypatch)
    assert "[red]no[/]" in text
    assert "\x1b[2J" not in text


def test_cells_are_not_broken() -> None:
    assert flow(["aaaa", "bbbb", "", "cc"], 11) == ["aaaa · bbbb", "cc"]
    assert flow(["aaaa"], 2) == ["aaaa"]


def test_the_command_to_go_on_with_is_quoted_and_holds_no_typed_secret() -> None:
    argv = ["dataset.path=a b.jsonl", "engine.headers.authorization=Bearer x", "dataset.template={{ q }}"]
    text = Origin.of("infer", argv, False, {}, None).command(None)
    assert "Bearer" not in text
    assert shlex.split(text)[:3] == ["eagleray", "infer", "dataset.path=a b.jsonl"]
    assert shlex.split(text)[-1] == "dataset.template={{ q }}"
