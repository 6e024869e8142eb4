"""The guard of hot paths: that nothing has become slower, and that it would be noticed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import guard
from benchmarks.guard import ALLOWED, ALLOWED_ELSEWHERE, BASELINE, Baseline, Cost, GuardError
from benchmarks.hot_paths import HOT_PATHS

ROOT = Path(__file__).resolve().parents[1]
SLOWED = "ring buffer, mixed lengths"
SLOWER = """
_quick = RingBuffer.drain


def _slow(self: RingBuffer, limit: int) -> Records | None:
    for _ in range(10_000):
        pass
    return _quick(self, limit)


RingBuffer.drain = _slow
"""

valgrind = pytest.mark.skipif(
    shutil.which("valgrind") is None, reason="valgrind is not installed: apt-get install valgrind"
)
slow = pytest.mark.timeout(600)

VERSIONS = {"machine": "x86_64", "python": "3.11.7", "anyio": "4.6"}
BEFORE: Baseline = {"versions": VERSIONS, "instructions": {"path": 2000, "reference": 1000}}


@pytest.fixture(scope="module")
def counted() -> dict[str, Cost]:
    return guard.count()


@valgrind
@slow
def test_no_hot_path_takes_more_instructions(counted: dict[str, Cost]) -> None:
    baseline: Baseline = json.loads(BASELINE.read_text())
    assert counted.keys() == baseline["instructions"].keys() == HOT_PATHS.keys()
    findings = [*guard.compared(counted, baseline, guard.versions())]
    said = guard.verdict(findings, baseline, guard.versions())
    assert not said, f"{said}\n\n{guard.table(findings)}"


@valgrind
@slow
def test_a_path_that_became_slower_fails(counted: dict[str, Cost], tmp_path: Path) -> None:
    """By some 15 %, in a copy of the sources."""
    for folder in ("benchmarks", "ebpfstream", "fuzz", "sinks", "bpf"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "benchmarks/baseline.json").write_text(json.dumps(guard.made(counted)))
    with (tmp_path / "ebpfstream/kernel/ringbuf.py").open("a") as file:
        file.write(SLOWER)
    done = subprocess.run(
        [sys.executable, "benchmarks/guard.py", SLOWED], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{SLOWED} is slower: " in done.stderr
    assert guard.RENEW in done.stderr
    assert [line[: len(SLOWED)] for line in done.stdout.splitlines() if line.endswith("!")] == [SLOWED]


@pytest.mark.parametrize("reference", [1000, 900, 1120])
@pytest.mark.parametrize(
    ("python", "allowed"), [("3.11.7", ALLOWED), ("3.11.2", ALLOWED), ("3.13.0", ALLOWED_ELSEWHERE)]
)
def test_what_passes(reference: int, python: str, allowed: float) -> None:
    """What lies between no change and that of the reference, and a tenth more or less."""
    scale = reference / 1000

    def said(instructions: float) -> str:
        here = VERSIONS | {"python": python}
        costs = {"path": Cost(instructions, "event"), "reference": Cost(reference, "round")}
        findings = [*guard.compared(costs, BEFORE, here)]
        assert ("!" in guard.table(findings)) == any(finding.wrong for finding in findings)
        return guard.verdict(findings, BEFORE, here)

    most, least = 2000 * max(scale, 1) * allowed, 2000 * min(scale, 1) / allowed
    assert said(most * 0.999) == said(2000) == said(2000 * scale) == said(least * 1.001) == ""
    slower, faster = said(most * 1.001), said(least * 0.999)
    assert f"path is slower: {most * 1.001:,.0f} instructions for each event, and 2,000 in" in slower
    assert f"path is faster: {least * 0.999:,.0f} instructions" in faster
    for message in (slower, faster):
        assert guard.RENEW in message
        assert (f"python {python} (the baseline: 3.11.7)" in message) == (python != "3.11.7")


def test_a_new_path_needs_a_baseline() -> None:
    costs = {"new": Cost(1, "event"), "reference": Cost(1000, "round")}
    findings = [*guard.compared(costs, BEFORE, VERSIONS)]
    assert guard.verdict(findings, BEFORE, VERSIONS).startswith("new has no baseline\n")


def test_three_digits_are_kept() -> None:
    costs = {"path": Cost(123_456.7, "event"), "reference": Cost(98.76, "round")}
    assert guard.made(costs)["instructions"] == {"path": 123_000, "reference": 98.8}


def test_without_valgrind_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GuardError, match="valgrind is not installed: apt-get install valgrind"):
        guard.count()
