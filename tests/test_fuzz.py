"""The fuzzer, for a moment: what it finds in a few seconds must not be there.  `make fuzz` goes on for longer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]

# Inputs that take a second or two.
RUNS = {
    "ring": 8_000,
    "perf_part": 12_000,
    "perf": 3_000,
    "codecs": 1_000,
    "described": 3_000,
    "trace_pipe": 80_000,
    "program": 4_000,
    "names": 10_000,
}


def fuzz(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fuzz", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(target: str, tmp_path: Path) -> None:
    """The same inputs each time."""
    done = fuzz(target, "--runs", str(RUNS[target]), "--folder", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "DONE" in done.stdout


PLANTED = {
    "ring": ("kernel/ringbuf.py", "if reach > available:", "if False:"),
    "perf_part": ("kernel/perfring.py", "if size < _LEAST or", "if"),
    "perf": ("kernel/perfring.py", "if position < self.end", ""),
}


@pytest.mark.parametrize("target", PLANTED)
def test_a_bug_is_found(target: str, tmp_path: Path) -> None:
    """And its input is kept, with which it comes again."""
    for folder in ("ebpfstream", "fuzz"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path, right, wrong = PLANTED[target]
    source = tmp_path / "ebpfstream" / path
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    done = fuzz(target, "--runs", "1000000", "--folder", tmp_path / "found", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert f"failed: {target}" in done.stdout
    (found,) = (tmp_path / "found" / target).glob("crash-*")
    assert fuzz(target, "--input", found, cwd=tmp_path).returncode == 1
    assert fuzz(target, "--input", found).returncode == 0


def test_it_does_without_atheris(tmp_path: Path) -> None:
    """Where that has no wheel, and would have to be built."""
    code = "import sys; sys.modules['atheris'] = None; from pathlib import Path; from fuzz import engine; "
    code += f"engine.main('ring', 1, 2000, 0, Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "#2000\tDONE\n")
