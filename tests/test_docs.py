"""Every Python example of the documentation runs."""

from __future__ import annotations

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


@pytest.mark.kernel
@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code: str) -> None:
    """Runs to its end, or until it is interrupted after it has shown an exec of ours."""
    # Read line by line below: as if to a terminal.
    with subprocess.Popen(
        [sys.executable, "-u", "-W", "error", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as example:
        assert example.stdout is not None
        shown = ""
        with subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true documented; done"]) as producer:
            for line in example.stdout:
                shown += line
                if "documented" in line:
                    break
            producer.kill()
        try:
            rest, errors = example.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            example.kill()
            rest, errors = example.communicate()
    assert "true" in shown + rest
    assert errors == ""
    # One that has been killed was an endless loop, which is what it shows.
    assert example.returncode in (0, -9)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
