"""`ebpfstream bench`: the libraries that it needs are imported when it is called."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import anyio
import click

from ebpfstream.errors import ArgumentError, EbpfStreamError

_LIBRARIES: Final = ("matplotlib", "numpy", "rich")  # the extra `bench`
_PICTURES: Final = (".png", ".svg")


@click.group()
def bench() -> None:
    """Measure this machine."""


@bench.command()
@click.option(
    "--quick", is_flag=True, help="A few points, one short round: half a minute instead of a quarter hour."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.05),
    metavar="S",
    help="How long each case is measured in a round.  [default: 1; with --quick 0.15]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    metavar="N",
    help="How often, all cases in turn.  [default: 3; with --quick 1]",
)
@click.option(
    "--json",
    "data",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="All figures, for machines.",
)
@click.option(
    "--plot",
    "picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A picture of them; the name ends in .png or .svg.",
)
def buffers(
    quick: bool, seconds: float | None, rounds: int | None, data: Path | None, picture: Path | None
) -> None:
    """Compare the ring buffer with the perf buffer, by event size, rate, wakeups, buffer size and producers.

    \b
    Example
        ebpfstream bench buffers --quick --plot buffers.png

    Needs root, and a machine that does little else meanwhile: two of its CPUs are kept busy.
    """  # noqa: D301  # click wants the character
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise EbpfStreamError(f"bench needs {' and '.join(missing)}: pip install 'ebpfstream[bench]'")
    if picture is not None and picture.suffix not in _PICTURES:
        raise ArgumentError(f"--plot {picture} is no picture: let its name end in .png or .svg")
    for path in (data, picture):  # rather now than when all is measured
        if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ArgumentError(f"{path} cannot be written: give a file in a folder that is there")
    from ebpfstream.bench.plan import plan
    from ebpfstream.bench.results import measure
    from ebpfstream.bench.screen import progress, show

    chosen = plan(quick)
    seconds = seconds or (0.15 if quick else 1)
    rounds = rounds or (1 if quick else 3)
    with progress(rounds * len(chosen.cases())) as begin:
        results = anyio.run(measure, chosen, rounds, seconds, begin)
    if data is not None:
        data.write_text(json.dumps(results.as_json(), indent=1, ensure_ascii=False) + "\n")
    if picture is not None:
        from ebpfstream.bench.picture import draw  # as late as this: it is large, and memory is measured

        draw(results, picture)
    show(results)
