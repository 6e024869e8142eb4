"""`ebpfstream bench`: what it says of events is exact, and what it shows is what it has measured."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream.bench.measuring import (
    SERIES,
    Case,
    Figures,
    FloodSource,
    Kind,
    Policy,
    Producers,
    measure,
    producing,
)
from ebpfstream.bench.plan import Sweep, plan
from ebpfstream.bench.results import MEANINGS
from ebpfstream.kernel.perfbuf import PerfBuffer
from tests.kernel import flood

pytestmark = pytest.mark.kernel

COMMAND = [sys.executable, "-m", "ebpfstream", "bench", "buffers"]


@pytest.fixture(scope="module")
def producers() -> Iterator[Producers]:
    with producing(2) as found:
        yield found


def measured(case: Case, producers: Producers, seconds: float = 0.2) -> Figures:
    return anyio.run(measure, case, seconds, producers)


@pytest.mark.parametrize(("kind", "policy"), SERIES)
def test_every_event_offered_is_delivered_or_lost(kind: Kind, policy: Policy, producers: Producers) -> None:
    """measure() itself compares the calls that the producers made with the program's counters."""
    paced = measured(Case(kind, policy, rate=5000), producers)
    # The producer makes up for what it is late with, up to the last millisecond.
    assert 0 < paced.offered <= 1001
    assert (paced.delivered, paced.lost, paced.lost_part) == (paced.offered, 0, 0)
    assert 0 < paced.p50 <= paced.p99 <= paced.p999
    # What has no room in a small buffer is known as well, of both producers.
    full = measured(Case(kind, policy, 4096, buffer_size=1 << 16, producers=2), producers)
    assert full.offered == full.delivered + full.lost
    assert full.lost > 0
    assert full.lost_part == full.lost / full.offered


@pytest.mark.parametrize(("kind", "policy"), SERIES)
def test_the_policies_wake_when_they_say(kind: Kind, policy: Policy) -> None:
    anyio.run(check_wakeups, Case(kind, policy))


async def check_wakeups(case: Case) -> None:
    """Of a reader that takes nothing out."""
    with flood.producing(cpu=os.sched_getaffinity(0).pop()) as producer, select.epoll() as epoll:
        source = FloodSource(case, [producer.pid])
        buffer = await source.open()
        try:
            rings = buffer._rings if isinstance(buffer, PerfBuffer) else []
            for fd in [ring.waking.fd for ring in rings] or [buffer.map.fd]:
                epoll.register(fd, select.EPOLLIN | select.EPOLLET)  # tells of wakeups, not of what there is

            def wakes(calls: int) -> bool:
                producer.start(calls)
                producer.wait()
                return bool(epoll.poll(0))

            if case.policy == "watermark":
                assert case.wake_every == 65536 // 72
                assert [wakes(case.wake_every - 1), wakes(1), wakes(1)] == [False, True, False]
            else:
                every = case.kind == "perf" or case.policy == "forced"
                assert [wakes(1), wakes(1), wakes(1)] == [True, every, every]
            if case.kind == "perf":  # which is where it would begin to gather
                wakes(100)
                assert buffer.drain(1 << 20)
                assert wakes(1) == (case.policy == "each")
        finally:
            source.close()


def test_the_producers_run_on_other_cpus_and_this_process_on_its_own_again() -> None:
    before = os.sched_getaffinity(0)
    with producing(2) as found:
        assert len(os.sched_getaffinity(0)) == 1
        assert [len(os.sched_getaffinity(pid)) for pid in found.pids] == [1, 1]
        if len(before) > 1:
            assert os.sched_getaffinity(found.pids[0]) != os.sched_getaffinity(0)
    assert os.sched_getaffinity(0) == before


@pytest.mark.timeout(300)
def test_the_command_measures_shows_and_draws(tmp_path: Path) -> None:
    data, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    done = subprocess.run(
        [*COMMAND, "--quick", "--json", data, "--plot", picture], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(data.read_text())
    chosen = plan(quick=True)
    assert len(found["cases"]) == len(chosen.cases())
    for case in found["cases"]:
        (only,) = case["rounds"]
        assert only["offered"] == only["delivered"] + only["lost"]
        assert case["median"] == case["least"] == case["most"] == only
    assert tables(done.stdout) == [
        row(case_of(found["cases"], sweep, point, kind, policy))
        for sweep in chosen
        for point in sweep.points
        for kind, policy in SERIES
    ]
    text = " ".join(done.stdout.split())
    for said in (found["conclusion"], found["method"], *found["machine"].values(), *MEANINGS.values()):
        assert " ".join(said.split()) in text
    width, height = png(picture.read_bytes())
    assert width > 1000
    assert height > 600


def tables(text: str) -> list[tuple[str, ...]]:
    """Of each row kind, wakeups, delivered, lost, memory and wakeups each second."""
    rows = [[cell.strip() for cell in line.split("│")] for line in text.splitlines() if line.startswith("│")]
    return [(cells[2], cells[3], cells[5], cells[6], cells[12], cells[13]) for cells in rows]


def row(case: dict[str, Any]) -> tuple[str, ...]:
    median = case["median"]
    rate = median["delivered_rate"]
    return (
        case["kind"],
        case["policy"],
        f"{rate / 1e3:.0f}" if rate >= 1e5 else f"{rate / 1e3:.3g}",
        f"{100 * median['lost_part']:.1f}",
        f"{median['resident']:.0f}",
        f"{median['wakeups']:.0f}",
    )


def case_of(
    cases: list[dict[str, Any]], sweep: Sweep, point: int, kind: Kind, policy: Policy
) -> dict[str, Any]:
    """By what the sweep says of it, not by how it makes its cases."""
    wanted = {**sweep.base._asdict(), sweep.varied: point, "kind": kind, "policy": policy}
    (found,) = [case for case in cases if wanted.items() <= case.items()]
    return found


def png(data: bytes) -> tuple[int, int]:
    """Width and height, if it is one, whole and undamaged."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        position += 12 + length
    assert chunks[0][0] == b"IHDR"
    assert chunks[-1] == (b"IEND", b"")
    assert zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    width, height = struct.unpack_from(">II", chunks[0][1])
    return width, height


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--plot", "picture.gif"], 1, "picture.gif is no picture: let its name end in .png or .svg"),
        (["--plot", "/nowhere/picture.png"], 1, "/nowhere/picture.png cannot be written"),
        (["--json", "/nowhere/figures.json"], 1, "/nowhere/figures.json cannot be written"),
        (["--rounds", "0"], 2, "--rounds"),
        (["--seconds", "0"], 2, "--seconds"),
    ],
)
def test_wrong_arguments_are_said_before_anything_is_measured(
    arguments: list[str], status: int, said: str
) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert done.stdout == ""
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("library", ["rich", "matplotlib", "numpy"])
def test_without_the_extra_the_message_says_how_to_install_it(library: str) -> None:
    hidden = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {library!r} else find(name, package)
from ebpfstream.cli import main
main()
"""
    command = [sys.executable, "-c", hidden, *COMMAND[3:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"ebpfstream: bench needs {library}: pip install 'ebpfstream[bench]'\n"


def test_on_a_terminal_it_shows_how_far_it_is() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        [*COMMAND, "--quick"], stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while not re.search(rb"[2-9]/42", seen):
                seen += os.read(ours, 1 << 16)
        finally:
            process.kill()
            os.close(ours)
    assert b"ring each, 64 bytes, flood, 4 MiB, 1 producer" in seen
