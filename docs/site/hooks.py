"""Pages of the website that are not in docs/, and links between them and the others.

On the forge, a link in docs/ may lead to `../README.md`. On the website, the README is the first page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# File in the repository -> page of the website.
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changes.md", "bench/results.md": "measurements.md"}
SOURCES = {page: source for source, page in PAGES.items()}
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()([^)\s#:]+)([^)\s:]*\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages of the website. All pages are in one folder."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        return f"{link[1]}{PAGES.get(target, target.removeprefix('docs/'))}{link[3]}"

    parts = _CODE.split(markdown)
    return "".join(part if at % 2 else _LINK.sub(rewritten, part) for at, part in enumerate(parts))
