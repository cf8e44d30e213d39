"""Lines of the core, by room: each folder of `engines`, `pipeline` and `jobs` with modules."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def run() -> dict[str, int]:
    """Room -> lines of its modules, with blank lines and comments."""
    found: dict[str, int] = {}
    for top in ("engines", "pipeline", "jobs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            room = str(path.parent.relative_to(ROOT))
            found[room] = found.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return {room: lines for room, lines in found.items() if lines > 1}
