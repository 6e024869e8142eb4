"""Sizes that are worked out, on the kernel: with them a consumer that stands still loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from ebpfstream import EventStream, ExecEvent, sizing, trace_execve
from ebpfstream.events import layout
from ebpfstream.kernel.bpf import online_cpus
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.readymade import ReadyMade
from tests.kernel import flood
from tests.kernel.flood import FloodEvent, known

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

PAYLOAD = 93  # so that records are padded
SAMPLE = layout(FloodEvent).size + PAYLOAD
RATE = 100_000.0
CPUS = online_cpus()
TRUE = "/bin/true"


@pytest.fixture(params=["ring", "perf"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """What is worked out for either kind of buffer holds."""
    found: Kind = request.param
    return found


def part(made: sizing.Plan, kind: Kind) -> sizing.Part:
    found = made.ring if kind == "ring" else made.perf
    assert found is not None
    return found


def even(folder: Path, producer: int, kind: Kind, size: int, payload: int) -> EventStream[FloodEvent]:
    """Of a process's getppid(2), in events of one size."""
    text = Path(flood.__file__).with_name("flood.c").read_text()
    path = folder / f"even-{producer}.c"
    path.write_text(f"#define TARGET {producer}\n#define LENGTH(n) {payload}\n{text}")
    hooks = {"flood": RawTracepoint("sys_enter")}
    return EventStream(ReadyMade(path, FloodEvent, hooks, buffer=kind, buffer_size=size), FloodEvent)


async def lost(folder: Path, kind: Kind, size: int, *events: int, payload: int = PAYLOAD) -> int:
    """Of so many events, from each CPU in turn, that come while the consumer and its event loop stand still."""
    with flood.producing(CPUS[0]) as producer:
        async with even(folder, producer.pid, kind, size, payload) as stream:
            producer.start(1)
            assert len((await anext(stream)).payload) == payload
            producer.wait()
            for cpu, count in zip(CPUS, events, strict=False):
                os.sched_setaffinity(producer.pid, {cpu})
                producer.start(count)
                producer.wait()
            stream.detach()
            received = 1 + len([event async for event in stream])
    statistics = stream.statistics()
    missing = known(statistics.lost_full)
    assert statistics.tried == 1 + sum(events) == received + missing == received + known(statistics.lost)
    return missing


async def test_a_stall_loses_nothing(kind: Kind, tmp_path: Path) -> None:
    """Through a buffer of the size for it; of half that size it loses some."""
    stall = 0.35
    made = sizing.plan(sizing.expected("struct", RATE, SAMPLE), cpus=len(CPUS), stall=stall)
    events = round(RATE * stall)
    size = part(made, kind).buffer_size
    assert await lost(tmp_path, kind, size, events) == 0
    assert await lost(tmp_path, kind, size // 2, events) > 0


@pytest.mark.parametrize("payload", [PAYLOAD, 88, 76])
async def test_a_buffer_holds_what_it_is_said_to_hold(kind: Kind, payload: int, tmp_path: Path) -> None:
    """To the event: what comes beyond the stall that it tolerates is lost.

    Of 88 bytes those of a ring buffer are 128, and of 76 those of a perf buffer, so that the last one would just fit.
    """
    load = sizing.expected("struct", RATE, layout(FloodEvent).size + payload)
    assert 128 in (load.record.ring, load.record.perf) or payload == PAYLOAD
    size = len(CPUS) << 16
    found = part(sizing.plan(load, cpus=len(CPUS), buffer_size=size), kind)
    events = sizing.coming(RATE, found.tolerates)
    assert events > 300
    assert await lost(tmp_path, kind, size, events, payload=payload) == 0
    assert await lost(tmp_path, kind, size, events + 3, payload=payload) == 3


@pytest.mark.skipif(len(CPUS) < 2, reason="one CPU has all of a perf buffer")
async def test_a_perf_buffer_for_events_that_are_spread(tmp_path: Path) -> None:
    """It is smaller, and loses what comes from one CPU alone."""
    made = sizing.plan(sizing.expected("struct", RATE, SAMPLE), cpus=len(CPUS), stall=0.35)
    assert made.perf is not None
    assert made.perf_spread is not None
    assert made.perf_spread.buffer_size < made.perf.buffer_size
    events = round(RATE * 0.35 / len(CPUS))
    assert await lost(tmp_path, "perf", made.perf_spread.buffer_size, *[events] * len(CPUS)) == 0
    assert await lost(tmp_path, "perf", made.perf_spread.buffer_size, events * len(CPUS)) > 0


EXECS = 300
EXEC_SIZE = layout(ExecEvent).size + 300


async def execs_lost(kind: Kind, size: int) -> tuple[int, float]:
    """Of `EXECS` executions on one CPU while the consumer stands still; and bytes of a record."""
    names = [name for name in os.getcwd().split("/") if name]
    rest = 300 - len(TRUE) - (len(TRUE) + 1) - sum(len(name) + 1 for name in names)
    argv = [TRUE, "x" * (rest - 1)]
    usual = os.sched_getaffinity(0)
    async with trace_execve(ppid=os.getpid(), buffer=kind, buffer_size=size) as events:
        os.sched_setaffinity(0, {CPUS[0]})
        try:
            for _ in range(EXECS):
                os.waitpid(os.posix_spawn(TRUE, argv, {}), 0)
        finally:
            os.sched_setaffinity(0, usual)
        events.detach()
        received = len([event async for event in events])
    statistics = events.statistics()
    assert statistics.tried == EXECS == received + known(statistics.lost)
    return known(statistics.lost), statistics.bytes / received


async def test_execs_of_a_stall(kind: Kind) -> None:
    """Whose size is that of what they are called with."""
    rate, stall = 600, 0.5
    load = sizing.expected("execve", rate, EXEC_SIZE)
    found = part(sizing.plan(load, cpus=len(CPUS), stall=stall), kind)
    assert round(rate * stall) == EXECS
    stride = load.record.ring if kind == "ring" else load.record.perf
    assert await execs_lost(kind, found.buffer_size) == (0, stride)
    missing, _ = await execs_lost(kind, found.buffer_size // 2)
    assert missing > 0


def measured(*arguments: str) -> tuple[dict[str, Any], str]:
    """What the command says after two seconds, in which programs are executed."""
    command = [sys.executable, "-m", "ebpfstream", "size", "--measure", "2s", "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as measuring:
        assert measuring.stderr is not None
        said = measuring.stderr.readline()
        while measuring.poll() is None:
            subprocess.run([TRUE, "x" * 100], check=True)
            time.sleep(0.02)
        shown, errors = measuring.communicate()
    assert measuring.returncode == 0, errors
    found: dict[str, Any] = orjson.loads(shown)
    return found, said


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Sizes are the kernel's, whichever loop waits."""
    found: str = request.param
    return found


async def test_measuring() -> None:
    """What is measured is told, and what is worked out of it."""
    told, said = measured("--stall", "1s", "--outage", "1h")
    assert said == "ebpfstream: counting execs for 2 s\n"
    load = told["load"]
    assert load["events"] >= 5
    assert load["lost"] == 0
    assert load["seconds"] >= 2
    assert load["rate"] == load["events"] / load["seconds"]
    # Not less than the mean: it is one of the windows that the time is made of.
    bytes_each = [load[name]["ring"] for name in ("busiest_record", "record")]
    assert load["busiest"] * bytes_each[0] > load["rate"] * bytes_each[1] * 0.9
    assert load["record"]["sample"] > layout(ExecEvent).size
    assert load["record"]["sample"] + 8 <= load["record"]["ring"] <= load["record"]["sample"] + 15
    assert load["json"] > load["record"]["sample"]
    assert load["spool"] > load["record"]["ring"]
    assert told["events"] == sizing.coming(load["busiest"], 1)
    assert told["ring"]["needed"] == sizing.needed(told["events"], load["busiest_record"]["ring"])
    assert told["cpus"] == len(CPUS)
    assert told["outage"]["events"] == pytest.approx(load["rate"] * 3600, abs=1)
