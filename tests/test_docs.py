"""Every example of the documentation runs: Python, commands, configurations.

Fences: `python` is a whole program; `sh` and indented lines hold commands; `toml` is a configuration. A fence with a
`title` is a file, which lies beside that page's programs and commands when they run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ebpfstream.service import config

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BROKER = "127.0.0.1:9092"  # what names it is run by tests/kafka
FENCE = re.compile(r"(?ms)^( *)```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^\1```$")


def fences(page: Path, language: str) -> list[str]:
    """What a page shows in a language."""
    return [
        textwrap.dedent(text) for _, shown, _, text in FENCE.findall(page.read_text()) if shown == language
    ]


def commands(page: Path) -> list[str]:
    """The command lines of ours that a page shows, in the order shown."""
    indented = re.findall(r"(?m)^    (ebpfstream .*)$", re.sub(FENCE, "", page.read_text()))
    fenced = [line for text in fences(page, "sh") for line in text.splitlines()]
    return [*indented, *(line for line in fenced if line.startswith("ebpfstream "))]


def write_files(page: Path, folder: Path) -> None:
    """The files that a page shows by name; and this project's examples, which it may name."""
    (folder / "examples").symlink_to(ROOT / "examples")
    for _, _, title, text in FENCE.findall(page.read_text()):
        if title:
            (folder / title).write_text(textwrap.dedent(text))


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


EXAMPLES = [
    pytest.param(page, code, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, code in enumerate(fences(page, "python"))
    if BROKER not in code
]
COMMANDS = [
    pytest.param(page, command, id=f"{name(page)}-{command}")
    for page in PAGES
    for command in commands(page)
    if BROKER not in command
]

SHOWN = ("documented", "Hello World")


@pytest.mark.kernel
@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_example(page: Path, code: str, tmp_path: Path) -> None:
    """Runs to its end, or until it is interrupted after it has shown an exec of ours."""
    write_files(page, tmp_path)
    # Read line by line below: as if to a terminal.
    with subprocess.Popen(
        [sys.executable, "-u", "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as example:
        assert example.stdout is not None
        shown = ""
        with subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true documented; done"]) as producer:
            for line in example.stdout:
                shown += line
                if any(word in line for word in SHOWN):
                    break
            producer.kill()
        try:
            rest, errors = example.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            example.kill()
            rest, errors = example.communicate()
    assert any(word in shown + rest for word in (*SHOWN, "true")), errors
    assert errors == ""
    # One that has been killed was an endless loop, which is what it shows.
    assert example.returncode in (0, -9)


SHOWN_BY = {
    "execve": '"args":',
    "syscalls": '"name":"execve"',
    "program": '"pid":',
    "count": '"message":"',
    "trace": "",
    "top": "true",
    "config": "",
    "run": '"args":',
    "schema": '"args":',
    "doctor": "an exec arrives",
    "size": "queue",
}


@pytest.mark.kernel
@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command(page: Path, command: str, tmp_path: Path) -> None:
    """Ends by itself, or goes on until it is told to end."""
    write_files(page, tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    name = command.split()[1]
    if name == "top":  # wants a terminal
        command = f"script -qec 'stty cols 80 rows 24; {command}' /dev/null"
    prepared = ""
    if "execs.toml" in command and "init" not in command:
        # Not where a service really writes.
        places = {
            "/var/log/ebpfstream-": "",
            "/var/spool/ebpfstream": tmp_path,
            "#lock_folder": "lock_folder",
        }
        places |= {"/run/ebpfstream": tmp_path}
        folders = "; ".join(f"s|{place}|{other}|" for place, other in places.items())
        prepared = f"ebpfstream config init execs.toml && sed -i '{folders}' execs.toml && "
    with subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true documented; done"]) as producer:
        done = subprocess.run(
            ["timeout", "12", "bash", "-c", f"{prepared}{command}"],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        producer.kill()
    assert done.returncode in (0, 124), done.stderr  # 124: timeout(1) had to end it
    output = done.stdout + "".join(file.read_text() for file in tmp_path.glob("*.jsonl"))
    assert SHOWN_BY[name] in output
    if name in ("execve", "syscalls", "program"):
        assert re.match(r"ebpfstream: \d+ delivered; ", done.stderr)
    said = '{"timestamp": ' if name == "run" else "ebpfstream: "
    assert all(line.startswith(said) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=f"{name(page)}-{number}")
        for page in PAGES
        for number, text in enumerate(fences(page, "toml"))
    ],
)
def test_configuration(text: str, tmp_path: Path) -> None:
    assert config.parse(text, tmp_path / "documented.toml").sources


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those within the repository; of docs/ tests/test_site.py looks at the result."""
    for link in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text()):
        file = page.parent / link[0] if link[0] else page
        assert file.exists(), link
        if link[1]:
            titles = re.findall(r"(?m)^#+ (.*)$", file.read_text())
            assert link[1][1:] in {
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            }


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert len(COMMANDS) >= 3
