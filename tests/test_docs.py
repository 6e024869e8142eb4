"""Every Python example of the documentation runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in sorted(ROOT.glob("*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
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


COMMANDS = re.findall(r"(?m)^    (ebpfstream .*)$", (ROOT / "README.md").read_text())


@pytest.mark.kernel
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path: Path) -> None:
    """Ends by itself, or goes on until it is told to end."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true documented; done"]) as producer:
        done = subprocess.run(
            ["timeout", "12", "bash", "-c", command],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        producer.kill()
    assert done.returncode in (0, 124)  # 124: timeout(1) had to end it
    output = done.stdout + "".join(file.read_text() for file in tmp_path.iterdir())
    assert '"args":' in output
    if "execve " in command and "schema" not in command:
        assert re.match(r"ebpfstream: \d+ delivered; ", done.stderr)
    assert all(line.startswith("ebpfstream: ") for line in done.stderr.splitlines())


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5
    assert len(COMMANDS) >= 3
