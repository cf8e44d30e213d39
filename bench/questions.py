"""The questions that the benches ask: GSM8K where it is, or a few of our own."""

from __future__ import annotations

import json
import os
from pathlib import Path

BUILT_IN = [
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take?",
    "Mia has 3 boxes of 12 pencils and gives away 7 pencils. How many pencils are left?",
    "A shirt costs 24 dollars after a discount of 20 percent. What did it cost before?",
    "A tank holds 90 litres and loses 4 litres an hour. How much is in it after 6 hours?",
]


def questions(data: Path | None, rows: int) -> list[str]:
    path = data or Path(os.environ.get("EAGLERAY_GSM8K", "../shared/data/gsm8k_test.jsonl"))
    if data is None and not path.is_file():
        return [BUILT_IN[i % len(BUILT_IN)] for i in range(rows)]
    with path.open() as file:
        return [json.loads(line)["question"] for line, _ in zip(file, range(rows), strict=False)]
