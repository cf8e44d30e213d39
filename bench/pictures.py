"""`python -m bench.pictures`: docs/report-*.png, the report of a real run in a real browser; and docs/progress.svg."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from bench import progress
from pipeline.configuration.compose import compose
from pipeline.run import run

DOCS = Path(__file__).parent.parent / "docs"
# File -> (width, height, colour scheme, the section at its top).
PICTURES: dict[str, tuple[int, int, str, str]] = {
    "report-light": (1180, 1215, "light", "body"),
    "report-dark": (1180, 1240, "dark", "#problems"),
    "report-phone": (390, 1500, "light", "#results"),
}
ROWS = 300
REVIEWS = (
    ("Boils in two minutes, and the lid closes with one hand.", "happy", 5, ("speed", "lid")),
    ("The handle came off in the first week, with hot water in it.", "angry", 1, ("handle",)),
    ("It is a kettle. It does what it should.", "calm", 3, ("price",)),
    ("Too loud for a small kitchen, but quick.", "calm", 4, ("noise", "speed")),
    ("The second one that I buy. My mother has the first.", "happy", 5, ("price",)),
)
TEMPLATE = "Read this review of a kettle. Give it stars, a mood and up to three topics.\n\n{{ review }}"


def main() -> None:
    from tests.support.provider_server import ProviderServer, by_hash

    os.environ |= {"OPENAI_API_KEY": "not-a-key", "SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    with tempfile.TemporaryDirectory() as folder, ProviderServer(latency_s=0.3, fault=by_hash(0.02, ("429",))) as server:
        data, out = Path(folder) / "reviews.jsonl", Path(folder) / "out"
        lines = []
        chance = random.Random(0)
        for at in range(ROWS):
            text, mood, stars, topics = chance.choice(REVIEWS)
            text = f"{text} Bought in {2000 + at // 12}, month {at % 12 + 1}."
            lines.append(json.dumps({"id": f"review-{at + 1}", "review": text}))
            answer = {
                "stars": stars,
                "mood": mood,
                "topics": list(topics),
                "confidence": round(chance.betavariate(8, 2), 3),
            }
            prompt = TEMPLATE.replace("{{ review }}", text)
            server.plan[prompt] = ["400"] if at % 71 == 5 else ["body=" + json.dumps(_answer(answer, at % 29 == 7))]
        data.write_text("\n".join(lines))
        schema = {
            "type": "object", "required": ["stars", "mood", "topics", "confidence"], "additionalProperties": False,
            "properties": {"stars": {"type": "integer"}, "mood": {"enum": ["angry", "calm", "happy"]},
                           "topics": {"type": "array", "items": {"type": "string"}}, "confidence": {"type": "number"}},
        }  # fmt: skip
        (Path(folder) / "prompt.j2").write_text(TEMPLATE)
        overrides = [
            "engine=openai", "engine.model=gpt-6-luna", f"engine.base_url={server.url}", "engine.max_concurrency=24",
            f"dataset.path={data}", f"dataset.template=@{folder}/prompt.j2", f"output.path={out}", "output.columns=schema",
            "generation.response_format=" + _hydra({"type": "json_schema", "schema": schema}), "generation.max_tokens=60",
        ]  # fmt: skip
        run(compose(overrides), Console())
        _photograph(out / "report.html")
    progress.main()


def _answer(answer: dict[str, Any], cut: bool) -> dict[str, Any]:
    """A provider's response. A cut one is still valid, so that the row is done."""
    message = {"role": "assistant", "content": json.dumps(answer)}
    choice = {"index": 0, "finish_reason": "length" if cut else "stop", "message": message}
    usage = {"prompt_tokens": 96, "completion_tokens": 60 if cut else 31, "prompt_tokens_details": {"cached_tokens": 32}}
    return {"id": "c", "model": "gpt-6-luna", "choices": [choice], "usage": usage}


def _hydra(value: Any) -> str:
    """A value as an override of Hydra."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_hydra(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_hydra, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _photograph(report: Path) -> None:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    browser = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        for name, (width, height, scheme, top) in PICTURES.items():
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            browser.get(report.as_uri())
            browser.execute_script("document.querySelector(arguments[0]).scrollIntoView()", top)
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
            (DOCS / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
