"""`python -m bench.progress`: docs/progress.svg, the live view of a real run, as the README shows it."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from pathlib import Path

from rich.console import Console

from engines.errors import EaglerayError
from pipeline.configuration.compose import compose
from pipeline.executors.live import live_run
from pipeline.monitor.progress import RunProgress
from pipeline.monitor.status import RunStatus
from pipeline.run import run

ROWS, AT = 4000, 0.35
SVG = Path(__file__).parent.parent / "docs" / "progress.svg"


class Kept(RunProgress):
    """Keeps the view as it stands when so much is done."""

    def show(self, status: RunStatus, expected: int = 0) -> None:
        super().show(status, expected)
        if status.rows.done >= AT * ROWS and not SVG_OF:
            picture = Console(record=True, width=88, file=io.StringIO(), force_terminal=True)
            picture.print(self.render())
            SVG_OF.append(picture.export_svg(title="eagleray infer"))
            os.kill(os.getpid(), 2)


SVG_OF: list[str] = []


def main() -> None:
    from tests.support.provider_server import ProviderServer, by_hash

    live_run.RunProgress = Kept  # type: ignore[misc]
    os.environ["OPENAI_API_KEY"] = "not-a-key"
    with tempfile.TemporaryDirectory() as folder, ProviderServer(latency_s=0.5, fault=by_hash(0.02, ("429",))) as server:
        data = Path(folder) / "in.jsonl"
        row = "Question {}: " + "what would you say about this? " * 8
        lines = [json.dumps({"messages": [{"role": "user", "content": row.format(i)}]}) for i in range(ROWS)]
        data.write_text("\n".join(lines))
        overrides = [
            "engine=openai", "engine.model=gpt-6-luna", f"engine.base_url={server.url}", "engine.max_concurrency=32",
            "hardware.replicas=2", "generation.max_tokens=200", "run.budget_usd=2", f"dataset.path={data}",
            f"output.path={folder}/out",
        ]  # fmt: skip
        try:
            run(compose(overrides), Console())
        except EaglerayError as stopped:
            print(stopped)
    # Without the fonts it would fetch.
    SVG.write_text(re.sub(r"@font-face \{.*?\}\s*", "", SVG_OF[0], flags=re.DOTALL))


if __name__ == "__main__":
    main()
