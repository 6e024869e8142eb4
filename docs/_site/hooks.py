"""What mkdocs does beside building pages: links to the repository's files, and from names to the reference."""

from __future__ import annotations

import html
import logging
import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import ebpfstream

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.site")  # a warning fails a strict build
OUTSIDE = re.compile(r"\]\(((?:\.\./)+[^)#\s]*)")
PICTURES = "benchmarks/pictures"
FILE = re.compile(r'<a href="repo:([^"#]*)(#[^"]*)?">(.*?)</a>', re.DOTALL)

_PUBLIC = sorted(ebpfstream._HOME_OF)  # noqa: SLF001
# Names such as LostError mean ours wherever they stand; Event, Sink or forward only as code.
_PLAIN = [name for name in _PUBLIC if re.match(r"([A-Z][a-z]+){2}", name)]
NAME = re.compile(
    r"<(a|h[1-6]|pre|autoref)\b.*?</\1>"  # is a link already, or should be none
    rf"|<code>((?:{'|'.join(_PUBLIC)})(?:\.[a-z_]+)?)(?:\([^<]*\))?</code>"
    r"|<code>.*?</code>|<[^>]*>"
    rf"|(?<![\w./])({'|'.join(_PLAIN)})\b",
    re.DOTALL,
)


def on_files(files: Files, *, config: Any, **_: object) -> Files:
    """The pictures that benchmarks have made are files of the site, too."""
    for path in (ROOT / PICTURES).iterdir():
        files.append(File.generated(config, f"{PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, *, page: Any, **_: object) -> str:
    """Links to the repository's files are relative in the text, as whoever reads it there wants them."""
    here = Path("docs", page.file.src_uri).parent

    def link(match: re.Match[str]) -> str:
        path = os.path.normpath(here / match[1])
        if path.startswith("docs/"):
            return match[0]
        return f"]({os.path.relpath(f'docs/{path}', here) if path.startswith(PICTURES) else f'repo:{path}'}"

    return OUTSIDE.sub(link, text)


def on_page_content(text: str, *, page: Any, config: Any, **_: object) -> str:
    """The page's HTML, with links."""
    return NAME.sub(_to_reference, _files_linked(text, page, config))


def _files_linked(text: str, page: Any, config: Any) -> str:
    """A file leads to the repository where that is published; where it is not, its path is shown."""

    def link(match: re.Match[str]) -> str:
        path, anchor, shown = html.unescape(match[1]).strip("/"), match[2] or "", match[3]
        if not (ROOT / path).exists():
            LOG.warning("%s names %s, which the repository does not have", page.file.src_uri, path)
        if config.repo_url:
            url = f"{config.repo_url.rstrip('/')}/blob/HEAD/{path}{anchor}"
            return f'<a href="{html.escape(url)}">{shown}</a>'
        code = f"<code>{html.escape(path)}</code>"
        plain = html.unescape(re.sub(r"<[^>]*>", "", shown)).strip("/")
        return code if path.endswith(plain) else f"{shown} ({code})"

    return FILE.sub(link, text)


def _to_reference(match: re.Match[str]) -> str:
    name = match[2] or match[3]
    if not name:
        return match[0]
    # mkdocstrings makes a link of it once it has seen all pages.
    return f'<autoref optional identifier="ebpfstream.{name}">{match[0]}</autoref>'
