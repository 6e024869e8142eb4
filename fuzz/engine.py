"""Runs one target in this process, which ends with 0 unless an input was found that it raises on or hangs with.

    python -m fuzz.engine NAME SEED RUNS SECONDS FOLDER

RUNS and SECONDS are limits, 0 for none.  Inputs that were worth keeping are left in FOLDER, one that failed
as FOLDER/crash-… (or timeout-…, oom-…).  The fuzzer is Atheris, which looks for inputs that take new ways
through the code; where it cannot be installed, seeds are changed at random.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

try:
    import atheris
except ImportError:
    atheris = None

if TYPE_CHECKING:
    from fuzz.targets import Target

_LONGEST: Final = 4096  # bytes of an input
_SLOWEST: Final = 10  # seconds for an input
_MEGABYTES: Final = 1024  # of memory in all


def main(name: str, seed: int, runs: int, seconds: int, folder: Path) -> None:
    """Returns if nothing was found, unless the fuzzer ends the process itself."""
    target: Target
    if atheris is None:
        target = importlib.import_module("fuzz.targets").TARGETS[name]
        _at_random(target, random.Random(seed), runs, seconds, folder)  # to be repeatable
        return
    with atheris.instrument_imports(include=["ebpfstream", "fuzz"]):
        target = importlib.import_module("fuzz.targets").TARGETS[name]
    for function in target.generated():
        atheris.instrument_func(function)
    for index, data in enumerate(target.seeds()):
        (folder / f"seed-{index:02}").write_bytes(data)
    options = {
        "seed": seed,
        "runs": runs or -1,
        "max_total_time": seconds,
        "max_len": _LONGEST,
        "timeout": _SLOWEST,
        "rss_limit_mb": _MEGABYTES,
        "artifact_prefix": f"{folder}/",
        "print_final_stats": 1,
    }
    atheris.Setup(
        [sys.argv[0], *(f"-{option}={value}" for option, value in options.items()), str(folder)], target.run
    )
    atheris.Fuzz()


def _at_random(target: Target, rng: random.Random, runs: int, seconds: int, folder: Path) -> None:
    seeds = target.seeds()
    end = time.monotonic() + seconds if seconds else float("inf")
    number = 0
    while (not runs or number < runs) and time.monotonic() < end:
        data = seeds[number] if number < len(seeds) else _changed(rng.choice(seeds), rng)
        number += 1
        faulthandler.dump_traceback_later(_SLOWEST, exit=True)
        try:
            target.run(data)
        except BaseException:
            path = folder / f"crash-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            sys.stderr.write(f"input: {path}\n")
            raise
    faulthandler.cancel_dump_traceback_later()
    sys.stderr.write(f"#{number}\tDONE\n")


def _changed(seed: bytes, rng: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.choice([1, 1, 2, 4, 30])):
        at = rng.randrange(len(data) + 1)
        size = rng.choice([0, 1, 1, 1, 2, 8, 24])
        new = rng.choice([rng.randbytes(size), bytes(size), b"\xff" * size, seed[at : at + size]])
        data[at : at + rng.choice([0, size, size, size])] = new
    return bytes(data[:_LONGEST])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
