"""The soak run, for half a minute; `make soak` goes on for longer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import LANES

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[1]


def soak(root: Path, seconds: int, every: int, folder: Path) -> tuple[int, str, dict[str, Any]]:
    """The exit status, what was printed, and the report."""
    found = folder / "report.json"
    arguments = ("--minutes", str(seconds / 60), "--every", str(every), "--json", str(found))
    done = subprocess.run(
        [sys.executable, "benchmarks/soak.py", *arguments],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout, json.loads(found.read_text()) if found.exists() else {}


def test_nothing_is_violated(tmp_path: Path) -> None:
    """On each of three loops in turn."""
    status, printed, report = soak(ROOT, 24, 8, tmp_path)
    assert (status, report.get("violations")) == (0, []), printed
    assert report["rounds"].keys() == set(LANES)
    assert report["ledgers checked"] > 0
    assert report["processes killed"] > 0
    assert 0 < report["events"]["delivered"] <= report["events"]["submitted"] <= report["events"]["tried"]
    assert report["at rest"]["bpf_objects"] == [0]
    assert "memory: too short to tell" in printed


PLANTED = {
    "received != submitted": (
        "stream.py",
        "self._received += count",
        "self._received += count + 1",
    ),
    "left behind": ("readymade.py", "self._owned.callback(made.close)", "globals()[id(made)] = made"),
}


@pytest.mark.parametrize("message", PLANTED)
def test_a_bug_is_found(message: str, tmp_path: Path) -> None:
    for folder in ("ebpfstream", "benchmarks", "tests", "bpf", "sinks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=ignored)
    name, right, wrong = PLANTED[message]
    source = tmp_path / "ebpfstream" / name
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    status, printed, report = soak(tmp_path, 6, 6, tmp_path)
    assert status == 1, printed
    assert any(message in violation for violation in report["violations"]), printed
