"""Whether the hot paths take as many machine instructions as they did: fails on a step of more than a tenth.

Valgrind's callgrind runs `benchmarks/hot_paths.py` and counts instructions between the marks of each path: in user
space, all libraries included, after a warm-up.  Runs differ by less than 0.4 %, and by 2 % where timers of an event
loop have a part, however busy the machine is.  Hashes are not randomized; the garbage collector works as in reality,
but does not look at what was there before.

What is counted is held against `benchmarks/baseline.json`.  Another build of the same Python may take 15 % more or
fewer instructions for the same; how many, a path tells that has nothing of ours (`reference`).  A path of interpreted
code changes as much as that one, one of compiled code does not, and all others lie between: so none of that counts.
Beyond it 10 % are allowed, twice what builds and CPUs were seen to differ by; 25 % where the baseline is of another
minor version of Python or another processor.  More is a failure in either direction: of a path that became
faster a later step back would not be seen, so the baseline is renewed in the same change, by

    python benchmarks/guard.py --update

Run: `python benchmarks/guard.py [--update] [PATH ...]`, with valgrind; takes some 40 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple, TypedDict

BASELINE: Final = Path(__file__).with_name("baseline.json")
LIBRARIES: Final = ("anyio", "numpy", "orjson")  # that paths lead through
ALLOWED: Final = 1.10
ALLOWED_ELSEWHERE: Final = 1.25
RENEW: Final = ".venv/bin/python benchmarks/guard.py --update"

_HOT_PATHS: Final = Path(__file__).with_name("hot_paths.py")
_MARK: Final = "sched_get_priority_max"  # as hot_paths.mark() calls it
_REFERENCE: Final = "reference"
_ENVIRONMENT: Final = {
    "PYTHONHASHSEED": "0",
    # Where glibc finds a CPU that copies well by `rep movsb`, each byte would count as an instruction.
    "GLIBC_TUNABLES": f"glibc.cpu.x86_rep_movsb_threshold={1 << 40}",
}


class Cost(NamedTuple):
    """What one unit of a path's work takes."""

    instructions: float
    unit: str


class Baseline(TypedDict):
    """What was counted once, and with what."""

    versions: dict[str, str]
    instructions: dict[str, float]


class Finding(NamedTuple):
    """A path held against the baseline; `wrong` says what is, and is empty where nothing is."""

    path: str
    cost: Cost
    before: float | None
    wrong: str


class GuardError(Exception):
    """Nothing could be counted."""


def count(paths: Sequence[str] = ()) -> dict[str, Cost]:
    """The paths, all or these, and always the reference.  Raises GuardError."""
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise GuardError(
            "valgrind is not installed: apt-get install valgrind (dnf, pacman, apk: the same name)"
        )
    chosen = [*paths, *({_REFERENCE} - {*paths})] if paths else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "counted")
        command = [
            valgrind,
            "--quiet",
            "--tool=callgrind",
            f"--dump-before={_MARK}",
            f"--callgrind-out-file={out}",
            sys.executable,
            str(_HOT_PATHS),
            *chosen,
        ]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            command, capture_output=True, text=True, env=inherited | _ENVIRONMENT, check=False
        )
        if done.returncode:
            raise GuardError(f"{' '.join(command)} failed: {done.stderr}")
        worked: dict[str, tuple[int, str]] = json.loads(done.stdout)
        # One dump at each mark, with what was done since the one before; two marks for each path.
        dumps = [Path(folder, f"counted.{number}") for number in range(1, 2 * len(worked) + 1)]
        if not all(dump.exists() for dump in dumps) or Path(folder, f"counted.{len(dumps) + 1}").exists():
            raise GuardError(
                f"there is not one of valgrind's dumps for each call of {_MARK}(): {done.stderr}"
            )
        return {
            path: Cost(_total(dump) / times, unit)
            for dump, (path, (times, unit)) in zip(dumps[1::2], worked.items(), strict=True)
        }


def _total(dump: Path) -> int:
    found = re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)
    if found is None:
        raise GuardError(f"valgrind's dump has no total: {dump.read_text()[:1000]}")
    return int(found[1])


def versions() -> dict[str, str]:
    """What else decides how many instructions it takes."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def made(counts: Mapping[str, Cost]) -> Baseline:
    """A baseline of what was counted, to three digits, so that what did not change stays the same."""
    return {
        "versions": versions(),
        "instructions": {path: _three_digits(one.instructions) for path, one in counts.items()},
    }


def _three_digits(number: float) -> float:
    rounded = float(f"{number:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def compared(counts: Mapping[str, Cost], baseline: Baseline, here: Mapping[str, str]) -> Iterator[Finding]:
    """Each path held against the baseline; `here` are this machine's versions."""
    before = baseline["instructions"]
    scale = counts[_REFERENCE].instructions / before[_REFERENCE]
    allowed = ALLOWED if _kind(here) == _kind(baseline["versions"]) else ALLOWED_ELSEWHERE
    least, most = min(scale, 1) / allowed, max(scale, 1) * allowed
    for path, one in counts.items():
        old = before.get(path)
        if old is None:
            wrong = "has no baseline"
        elif path != _REFERENCE and not least <= one.instructions / old <= most:
            slower = one.instructions > old
            wrong = (
                f"is {'slower' if slower else 'faster'}: {one.instructions:,.0f} instructions for each {one.unit}, "
                f"and {old:,.0f} in {BASELINE.name}, a ratio of {one.instructions / old:.2f}, where "
                f"{f'{most:.2f} is the most' if slower else f'{least:.2f} is the least'} that passes"
            )
        else:
            wrong = ""
        yield Finding(path, one, old, wrong)


def _kind(of: Mapping[str, str]) -> tuple[str, list[str]]:
    return of["machine"], of["python"].split(".")[:2]


def table(findings: Sequence[Finding]) -> str:
    """Text in columns."""
    lines = [f"{'path':28}{'for each':10}{'instructions':>12}{'baseline':>12}{'ratio':>8}"]
    for path, one, before, wrong in findings:
        old = f"{before:,.0f}" if before else "none"
        ratio = f"{one.instructions / before:.2f}" if before else ""
        mark = "  !" if wrong else ""
        lines.append(f"{path:28}{one.unit:10}{one.instructions:12,.0f}{old:>12}{ratio:>8}{mark}")
    return "\n".join(lines)


def verdict(findings: Sequence[Finding], baseline: Baseline, here: Mapping[str, str]) -> str:
    """What is wrong, and what to do; empty if nothing is."""
    wrong = [f"{finding.path} {finding.wrong}" for finding in findings if finding.wrong]
    if not wrong:
        return ""
    others = [
        f"{name} {here.get(name)} (the baseline: {before})"
        for name, before in baseline["versions"].items()
        if here.get(name) != before
    ]
    if others:
        wrong.append(f"What is not the same here: {', '.join(others)}.")
    wrong.append(f"If that is as it should be, renew the baseline in the same change: {RENEW}")
    return "\n".join(wrong)


def main() -> None:
    """Count, and print; fail, or rewrite the baseline."""
    parser = argparse.ArgumentParser(
        description="Whether the hot paths take as many instructions as they did."
    )
    parser.add_argument("--update", action="store_true", help="rewrite the baseline")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="these alone")
    options = parser.parse_args()
    if options.update and options.paths:
        parser.error("the baseline is rewritten as a whole: give no PATH")
    try:
        counts = count(options.paths)
    except GuardError as error:
        sys.exit(str(error))
    here = versions()
    told = ", ".join(f"{name} {which}" for name, which in here.items())
    print(f"{platform.platform()}; {told}")
    print("instructions counted by valgrind's callgrind, after a warm-up, for each unit of work\n")
    if options.update:
        BASELINE.write_text(json.dumps(made(counts), indent=2) + "\n")
    baseline: Baseline = json.loads(BASELINE.read_text())
    findings = [*compared(counts, baseline, here)]
    print(table(findings))
    if said := verdict(findings, baseline, here):
        sys.exit(f"\n{said}")


if __name__ == "__main__":
    main()
