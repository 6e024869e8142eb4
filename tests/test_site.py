"""The documentation's site: it builds without a warning, is whole, and can be read without a network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import ebpfstream
import ebpfstream.testing

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS) for page in DOCS.rglob("*.md")}
LARGEST = 150_000  # bytes of a picture

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "pyte")),
    reason="pip install --group docs",
)


@dataclass
class Page(HTMLParser):
    """What a page has that can be linked to, what it links to, and what a browser fetches for it."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a":
            self.links.append(given.get("href", ""))
        else:
            self.fetched += [given[name] for name in ("src", "href", "data", "poster") if name in given]
        if tag == "img":
            self.images.append(given["src"])


@dataclass
class Site:
    """The site, built."""

    folder: Path
    said: str
    pages: dict[Path, Page]

    def target(self, page: Page, link: str) -> tuple[Path, str]:
        """The file and the anchor that a link within the site leads to."""
        path, fragment = unquote(urlsplit(link).path), unquote(urlsplit(link).fragment)
        return (page.path.parent / path).resolve() if path else page.path, fragment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site").resolve()
    done = subprocess.run(
        # Not --quiet: warnings that are not said do not count for --strict.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Not the page for addresses that there are not: its links are those of a server's root.
    found = {path: Page(path) for path in folder.rglob("*.html") if path.name != "404.html"}
    return Site(folder, done.stdout + done.stderr, found)


def local(link: str) -> bool:
    address = urlsplit(link)
    return not address.scheme and not address.netloc


def test_nothing_is_warned_of(site: Site) -> None:
    assert [line for line in site.said.splitlines() if not line.startswith("INFO    -  ")] == []


def test_every_page_is_in_the_contents_once(site: Site) -> None:
    home = site.pages[site.folder / "index.html"]
    text = home.path.read_text()
    contents = text[text.index('<nav class="md-nav md-nav--primary') :]
    contents = contents[: contents.index('<div class="md-sidebar md-sidebar--secondary')]
    listed = [link for link in re.findall(r'href="([^"]*)" class="md-nav__link', contents) if link[0] != "#"]
    pages = [(page.with_suffix(".html")).as_posix() for page in PAGES]
    assert {site.target(home, link)[0] for link in listed} == {site.folder / page for page in pages}
    assert set(site.pages) == {site.folder / page for page in pages}


def test_nothing_is_fetched_from_another_host(site: Site) -> None:
    assert [
        (name.name, link)
        for name, page in site.pages.items()
        for link in page.fetched
        if not local(link) and not link.startswith("data:")
    ] == []
    for sheet in site.folder.rglob("*.css"):
        addresses = re.findall(r"""(?:url\(|@import\s)\s*["']?([^"')\s]+)""", sheet.read_text())
        assert [link for link in addresses if not local(link) and not link.startswith("data:")] == [], sheet
    for picture in site.folder.rglob("*.svg"):
        text = picture.read_text()
        assert not re.search(r"""<script|@import|url\(\s*["']?(?!#)|href=["'](?!#)""", text), picture


def test_links_lead_somewhere(site: Site) -> None:
    broken = []
    for page in site.pages.values():
        for link in [*page.links, *page.fetched]:
            if not local(link) or not link:
                if link.startswith("repo:"):
                    broken.append((page.path.name, link))
                continue
            path, anchor = site.target(page, link)
            if not path.is_file() or (
                anchor and path in site.pages and anchor not in site.pages[path].ids | {"__top"}
            ):
                broken.append((page.path.name, link))
    assert broken == []


def test_every_public_name_is_in_the_reference(site: Site) -> None:
    ids = {each for path, page in site.pages.items() if path.parent.name == "reference" for each in page.ids}
    assert set(ebpfstream._HOME_OF) - {each.removeprefix("ebpfstream.") for each in ids} == set()
    names = {f"ebpfstream.testing.{name}" for name in ebpfstream.testing.__all__}
    assert names - ids == set()


def test_search_finds_names_of_the_reference(site: Site) -> None:
    index = (site.folder / "search" / "search_index.js").read_text()  # what pages from the disk read
    assert "reference/streams.html#ebpfstream.trace_execve" in index


def module(path: Path) -> ModuleType:
    """A module of the site's own, which is not in any package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def linked(text: str, url: str | None = None) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    hooks: Any = module(DOCS / "_site" / "hooks.py")
    return str(hooks.on_page_content(text, page=page, config=SimpleNamespace(repo_url=url)))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('<a href="repo:deploy">deploy/</a>', "<code>deploy</code>"),
        ('<a href="repo:deploy/README.md"><code>README.md</code></a>', "<code>deploy/README.md</code>"),
        ('<a href="repo:examples/hello.c">a program</a>', "a program (<code>examples/hello.c</code>)"),
    ],
)
def test_files_of_the_repository_are_shown_where_it_has_no_address(text: str, shown: str) -> None:
    assert linked(text) == shown


def test_files_of_the_repository_are_links_where_it_has_one() -> None:
    shown = linked('see <a href="repo:deploy/README.md#unit">this</a>', "https://host.invalid/project/")
    assert shown == 'see <a href="https://host.invalid/project/blob/HEAD/deploy/README.md#unit">this</a>'


def test_relative_links_to_the_repository() -> None:
    hooks: Any = module(DOCS / "_site" / "hooks.py")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="guides/page.md"))
    text = "[a](../../deploy/README.md#unit) [b](../start.md) ![c](../../benchmarks/pictures/x.png) [d](other.md)"
    assert hooks.on_page_markdown(text, page=page) == (
        "[a](repo:deploy/README.md#unit) [b](../start.md) ![c](../benchmarks/pictures/x.png) [d](other.md)"
    )


def test_a_file_that_there_is_not_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    linked('<a href="repo:deploy/nothing.md">nothing</a>')
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "page.md names deploy/nothing.md" in caplog.text


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<p><code>forward</code></p>", "forward"),
        ("<p><code>EventStream.detach()</code></p>", "EventStream.detach"),
        ("<p>raises LostError, then</p>", "LostError"),
        ("<p>forward, Sink and Event are words</p>", None),
        ("<h2><code>forward</code></h2>", None),
        ('<a href="x"><code>forward</code></a>', None),
        ("<pre><code>forward</code></pre>", None),
        ("<p><code>forward(events, sink)</code></p>", "forward"),
        ("<p><code>x = LostError</code></p>", None),
        ('<img alt="LostError">', None),
        ("<p>MyLostError, ebpfstream.LostError</p>", None),
    ],
)
def test_names_lead_to_the_reference(text: str, name: str | None) -> None:
    found = re.findall(r'<autoref optional identifier="ebpfstream\.([^"]*)">', linked(text))
    assert found == ([name] if name else [])
    assert re.sub(r"</?autoref[^>]*>", "", linked(text)) == text


def pictures() -> Iterator[tuple[Path, Path]]:
    """Those that pages name, with the page."""
    for page in sorted(PAGES):
        for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)", (DOCS / page).read_text()):
            yield page, Path(os.path.normpath(page.parent / link))


def test_pictures_that_pages_name_are_there() -> None:
    assert [(page, link) for page, link in pictures() if not (DOCS / link).is_file()] == []


def test_pictures_are_those_that_are_recorded() -> None:
    record: Any = module(DOCS / "pictures" / "record.py")
    drawn = {"way-of-the-data.svg"}  # by hand
    made = set(record.PICTURES)
    assert {
        path.name for path in (DOCS / "pictures").iterdir() if path.suffix not in (".py", "")
    } - drawn == made
    assert made <= {link.name for _, link in pictures()}
    for name in made:
        picture = (DOCS / "pictures" / name).read_text()
        assert f"<title>{record.PICTURES[name].command}</title>" in picture
        assert len(picture.encode()) < LARGEST
