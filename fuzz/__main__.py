"""Fuzz some targets or all, each for its share of the time, and say how each went; ends with 1 if anything was found.

Repeat one input with `--input FILE NAME`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FOLDER: Final = ROOT / ".fuzz"
_PROGRESS: Final = re.compile(r"#\d")
_CHATTER: Final = re.compile(r"#\d|INFO|WARNING|stat::")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", metavar="NAME", nargs="*", help="targets (default: all)")
    parser.add_argument("--seconds", type=int, default=0, help="for all of them together (default: no limit)")
    parser.add_argument("--runs", type=int, default=0, help="inputs for each (default: no limit)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where inputs are kept from run to run")
    parser.add_argument("--input", type=Path, help="give the targets this file, and do nothing else")
    options = parser.parse_args()

    from fuzz.targets import TARGETS

    names = options.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"there is no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.input:
        for name in names:
            TARGETS[name].run(options.input.read_bytes())
        return
    failed = [name for name in names if not _fuzzed(name, options, -(-options.seconds // len(names)))]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _fuzzed(name: str, options: argparse.Namespace, seconds: int) -> bool:
    folder: Path = options.folder.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    (options.folder / ".gitignore").write_text("*\n")
    limits = map(str, (options.seed, options.runs, seconds))
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.engine", name, *limits, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
    )
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if _PROGRESS.match(line)), "did not begin")
    print(f"{name}: {last}", flush=True)
    if done.returncode:
        told = [line for line in lines if not _CHATTER.match(line)]
        print(*told, f"Repeat it with: python -m fuzz --input FILE {name}", sep="\n", flush=True)
    return not done.returncode


if __name__ == "__main__":
    main()
