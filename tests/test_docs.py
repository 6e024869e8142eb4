"""Every Python example of the documentation runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebpfstream.service import config

ROOT = Path(__file__).parents[1]
BROKER = "127.0.0.1:9092"  # examples with it are run by tests/kafka/test_readme.py
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in sorted(ROOT.glob("*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
    if BROKER not in code
]

SHOWN = ("documented", "Hello World")


@pytest.mark.kernel
@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str, tmp_path: Path) -> None:
    """Runs to its end, or until it is interrupted after it has shown an exec of ours."""
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
    "program": '"message":"Hello World"',
    "count": '"message":"',
    "trace": "",
    "top": "true",
    "config": "",
    "run": '"args":',
    "schema": '"args":',
    "doctor": "an exec arrives",
}
COMMANDS = [
    command
    for command in re.findall(r"(?m)^    (ebpfstream .*)$", (ROOT / "README.md").read_text())
    if BROKER not in command
]


@pytest.mark.kernel
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    """Ends by itself, or goes on until it is told to end."""
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
    (tmp_path / "examples").symlink_to(ROOT / "examples")
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
        text
        for path in ROOT.glob("*.md")
        for text in re.findall(r"```toml\n(.*?)```", path.read_text(), re.DOTALL)
    ],
)
def test_configuration(text: str, tmp_path: Path) -> None:
    assert config.parse(text, tmp_path / "documented.toml").sources


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert len(COMMANDS) >= 3
