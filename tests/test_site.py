"""The website that `make site` builds: complete, without a broken link, without anything from the network, with search."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.pages import PAGES, ROOT

CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
# Attributes that make a browser load something.
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data", "use": "href"}


class Links(HTMLParser):
    """The addresses that a page loads or links to, its anchors, and its text in paragraphs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.paragraphs: list[str] = []
        self._open = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        if LOADS.get(tag) in found:
            self.loads.append(found[LOADS[tag]])
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "p":
            self.paragraphs.append("")
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self.paragraphs and self._open == "p":
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    done = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path) for path in site.rglob("*.html")}


def test_every_page_of_the_docs_is_in_the_menu(site: Path, pages: dict[Path, Links]) -> None:
    names = {page.stem for page in PAGES if page.name != "README.md"} | {"index", "changes", "measurements"}
    assert {path.stem for path in pages} == names | {"404"}
    menu = {urlsplit(link).path for link in pages[site / "concepts.html"].links}
    assert {f"{name}.html" for name in names - {"concepts"}} <= menu


def test_no_link_of_the_website_is_broken(site: Path, pages: dict[Path, Links]) -> None:
    count = 0
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of a server's root
            continue
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or link.startswith("data:"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), (path.name, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids | {"__comments"}, (path.name, link)
            count += 1
    assert count > 500


def test_the_website_loads_nothing_from_the_network(site: Path, pages: dict[Path, Links]) -> None:
    for path, page in pages.items():
        outside = [address for address in page.loads if urlsplit(address).scheme not in ("", "data")]
        assert outside == [], path.name
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?https?:[^)\"']*", sheet.read_text()), sheet.name


def test_no_list_of_a_page_became_a_paragraph(pages: dict[Path, Links]) -> None:
    """Python-Markdown needs an empty line before a list; the forge does not."""
    for path, page in pages.items():
        lines = [line for text in page.paragraphs for line in text.splitlines()]
        assert [line for line in lines if re.match(r"(-|\d+\.|\|) ", line)] == [], path.name


def test_the_search_works_in_a_page_that_was_opened_as_a_file(site: Path, browser: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get((site / "cost.html").as_uri())
    browser.find_element("css selector", "[data-md-component=search-query]").send_keys("schema_retries")
    found = WebDriverWait(browser, 60).until(
        lambda driver: [
            link.get_attribute("href") for link in driver.find_elements("css selector", ".md-search-result__item a")
        ]
    )
    assert any("configuration.html" in link and "#generation" in link for link in found)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
