"""Events on disk between a stream and its sinks: what there is no room for, and what must survive the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream.ages import Ages
from ebpfstream.errors import ArgumentError, SinkError, SinkRejectedError, SinkUnavailableError
from ebpfstream.events import U32, U64, Event
from ebpfstream.forwarding import Forwarding, forward
from ebpfstream.lost import Lost
from ebpfstream.sink import open_sink
from ebpfstream.sinks.blackhole import BlackholeSink
from ebpfstream.statistics import ForwardStatistics, SinkStatistics
from ebpfstream.stream import EventStream
from tests.test_file import disk
from tests.test_forwarding import Clock, Noting, stuck, until
from tests.test_stream import Hand, hand, numbers

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.anyio
__all__ = ["disk", "hand"]


@pytest.fixture
def spool(tmp_path: Path) -> str:
    return str(tmp_path / "spool")


class Receipt:
    """Need not be awaited, unlike a coroutine."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self.set = self._event.set

    def __await__(self) -> Generator[Any, Any, None]:
        return self._event.wait().__await__()


class Receiving(Noting):
    """Takes everything at once, and acknowledges it when it is told to."""

    def __init__(self, name: str, **delivery: Any) -> None:
        super().__init__(name, **delivery)
        self.taken: list[Receipt] = []

    async def send(self, batch: Any) -> Any:
        await super().send(batch)
        receipt = Receipt()
        self.taken.append(receipt)
        return receipt


def ended(statistics: ForwardStatistics) -> SinkStatistics:
    (sink,) = statistics.sinks
    balanced(sink)
    assert (sink.in_flight, sink.queued) == (0, 0)
    return sink


def balanced(sink: SinkStatistics) -> None:
    gone = sink.acknowledged + sink.dropped + sink.failed + sink.spooled + sink.in_flight
    assert sink.accepted + sink.recovered == gone, sink


def files(spool: str) -> int:
    """Bytes of events that are on disk."""
    return sum(path.stat().st_size for path in Path(spool).iterdir() if path.suffix)


@pytest.mark.parametrize("delivery", [{"durable": True}, {"when_full": "spill", "queue_size": 16}])
async def test_all_arrives_once_and_in_order(hand: Hand, spool: str, delivery: dict[str, Any]) -> None:
    for first in range(0, 300, 3):
        hand.submit(first, first + 1, first + 2)
    sink = Noting("a", spool=spool, **delivery)
    statistics = ended(await forward(numbers(hand), sink, count=300))
    assert sink.numbers == list(range(300))
    assert (statistics.accepted, statistics.acknowledged, statistics.recovered) == (300, 300, 0)
    assert (statistics.dropped, statistics.spooled) == (0, 0)


@pytest.mark.parametrize("delivery", [{"durable": True}, {"when_full": "spill", "queue_size": 64}])
async def test_what_has_not_arrived_does_in_the_next_life(
    hand: Hand, spool: str, delivery: dict[str, Any]
) -> None:
    sink = Noting("a", None, None, stuck, spool=spool, **delivery)  # the first batch arrives
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for first in range(0, 40, 2):
            hand.submit(first, first + 1)
        await until(lambda: forwarding.statistics().sinks[0].accepted == 40)
        balanced(forwarding.statistics().sinks[0])
        assert forwarding.statistics().sinks[0].queued <= 64
        forwarding.end()
    statistics = ended(forwarding.statistics())
    assert sink.numbers == [0, 1]
    assert (statistics.acknowledged, statistics.spooled, statistics.dropped) == (2, 38, 0)

    again = Hand()
    again.submit(40)
    sink = Noting("a", spool=spool, **delivery)
    statistics = ended(await forward(numbers(again), sink, count=1))
    again.give_back()
    assert sink.numbers == list(range(2, 41))
    assert (statistics.recovered, statistics.accepted, statistics.acknowledged) == (38, 1, 39)


async def test_memory_alone_that_has_not_arrived_is_kept_as_well(hand: Hand, spool: str) -> None:
    """A queue that never was full: what the sink took and did not acknowledge, what it was given, what waits."""
    sink = Receiving("a", when_full="spill", spool=spool)
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for number in range(5):
            hand.submit(number)
            await until(lambda: len(sink.taken) == number + 1)  # noqa: B023
        sink.taken[0].set()
        sink.taken[2].set()  # before it the second would have to be acknowledged
        await until(lambda: forwarding.statistics().sinks[0].acknowledged == 1)
        forwarding.end()
    assert ended(forwarding.statistics()).spooled == 4
    again = Hand()
    again.submit(5)
    other = Noting("a", when_full="spill", spool=spool)
    await forward(numbers(again), other, count=1)
    again.give_back()
    assert other.numbers == [1, 2, 3, 4, 5]


async def test_what_is_on_its_way_when_spilling_begins_arrives_once(hand: Hand, spool: str) -> None:
    sink = Receiving("a", when_full="spill", spool=spool, queue_size=16)
    gate = anyio.Event()

    async def first_waits(batch: Any) -> None:
        await gate.wait()

    sink._answers = [None, first_waits]
    forwarding = Forwarding(numbers(hand), sink, count=20)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for number in range(20):
            hand.submit(number)
        await until(lambda: forwarding.statistics().sinks[0].spooled >= 10)
        gate.set()
        await until(lambda: len(sink.taken) == 20)
        for arrived in sink.taken:
            arrived.set()
    assert sink.numbers == list(range(20))
    assert ended(forwarding.statistics()).acknowledged == 20


async def test_an_empty_spool_is_left_for_the_memory(hand: Hand, spool: str) -> None:
    gate = anyio.Event()

    async def wait(batch: Any) -> None:
        await gate.wait()

    sink = Noting("a", None, wait, when_full="spill", spool=spool, queue_size=1 << 20)
    sink.queue_size = 16
    forwarding = Forwarding(numbers(hand), sink, count=30)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for number in range(10):
            hand.submit(number)
        await until(lambda: forwarding.statistics().sinks[0].spooled > 5)
        gate.set()
        await until(lambda: forwarding.statistics().sinks[0].acknowledged == 10)
        assert forwarding.statistics().sinks[0].queued == 0
        sink.queue_size = 1 << 20
        await anyio.sleep(0.05)
        before = files(spool)
        for number in range(10, 30):
            hand.submit(number)
    assert files(spool) <= before
    assert sink.numbers == list(range(30))


async def test_when_the_spool_is_full_the_oldest_go_and_are_told(hand: Hand, spool: str) -> None:
    sink = Noting("a", None, stuck, durable=True, spool=spool, spool_size=64 << 10)
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for first in range(0, 40_000, 100):
            hand.submit(*range(first, first + 100))
        await until(lambda: forwarding.statistics().sinks[0].accepted == 40_000)
        forwarding.end()
    statistics = ended(forwarding.statistics())
    assert statistics.dropped > 30_000
    assert statistics.spooled == 40_000 - statistics.dropped
    assert files(spool) <= 64 << 10

    again = Hand()
    again.submit(40_000)
    other = Noting("a", durable=True, spool=spool)
    await forward(numbers(again), other, count=1)
    again.give_back()
    events = [number for number in other.numbers if isinstance(number, int)]
    assert events == sorted(set(events))
    assert len(events) == statistics.spooled + 1


async def test_what_the_spool_drops_is_told_in_its_place(hand: Hand, spool: str) -> None:
    gate = anyio.Event()

    async def wait(batch: Any) -> None:
        await gate.wait()

    sink = Noting("a", None, wait, durable=True, spool=spool, spool_size=64 << 10)
    forwarding = Forwarding(numbers(hand), sink, count=40_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for first in range(0, 40_000, 100):
            hand.submit(*range(first, first + 100))
        await until(lambda: forwarding.statistics().sinks[0].accepted == 40_000)
        gate.set()
    told = [one for one in sink.numbers if isinstance(one, Lost)]
    statistics = ended(forwarding.statistics())
    assert sum(one.count or 0 for one in told) == statistics.dropped > 0
    assert len(sink.numbers) - len(told) == statistics.acknowledged == 40_000 - statistics.dropped


async def test_a_batch_that_the_spool_never_has_room_for(
    hand: Hand, spool: str, caplog: pytest.LogCaptureFixture
) -> None:
    hand.submit(1)
    hand.submit(*range(5000))
    hand.submit(2)
    sink = Noting("a", durable=True, spool=spool, spool_size=64 << 10)
    statistics = ended(await forward(numbers(hand), sink, count=5002))
    assert (statistics.accepted, statistics.acknowledged, statistics.dropped) == (5002, 2, 5000)
    assert [one.count if isinstance(one, Lost) else -one for one in sink.numbers] in (
        [-1, 5000, -2],
        [5000, -1, -2],
    )
    assert "5000 events are given up" in caplog.text


async def test_a_full_disk_stops_the_reading_and_loses_nothing(
    hand: Hand, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Noting("a", None, stuck, durable=True, spool=str(disk / "spool"))
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for first in range(0, 20_000, 100):
            hand.submit(*range(first, first + 100))
        await until(lambda: any("cannot write to the spool" in line for line in caplog.messages))
        statistics = forwarding.statistics()
        assert 500 <= statistics.sinks[0].accepted < 2000
        assert statistics.stream.delivered - statistics.sinks[0].accepted == 100  # the one in hand
        forwarding.end()
    sink_statistics = ended(forwarding.statistics())
    accepted = sink_statistics.accepted - 100
    assert (sink_statistics.dropped, sink_statistics.spooled) == (100, accepted)
    again = Hand()
    other = Noting("a", durable=True, spool=str(disk / "spool"))
    again.submit(7)
    await forward(numbers(again), other, count=1)
    again.give_back()
    assert other.numbers == [*range(accepted), 7]


async def test_the_disk_has_it_as_often_as_was_said(
    hand: Hand, spool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when nothing more comes, and the sink is stuck."""
    synced: list[int] = []
    real = os.fdatasync

    def noting(fd: int) -> None:
        real(fd)
        synced.append(os.fstat(fd).st_size)

    monkeypatch.setattr(os, "fdatasync", noting)
    sink = Noting("a", None, stuck, durable=True, spool=spool, spool_fsync=0.02)
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        hand.submit(1, 2, 3)
        await until(lambda: synced and synced[-1] == files(spool) > 0)
        forwarding.end()


async def test_what_is_rejected_or_given_up_is_not_kept(hand: Hand, spool: str, tmp_path: Path) -> None:
    answers = (SinkRejectedError("no", rejected=[1]), SinkUnavailableError("away", taken=1))
    sink = Noting(
        "a", None, *answers, durable=True, spool=spool, retry_for=0, dead_letters=str(tmp_path / "dead")
    )
    hand.submit(0, 1, 2)
    hand.submit(3, 4)
    hand.submit(5)
    statistics = ended(await forward(numbers(hand), sink, count=6))
    assert (statistics.acknowledged, statistics.failed, statistics.spooled) == (4, 2, 0)
    letters = (tmp_path / "dead").read_text().splitlines()
    assert ['"number":1' in letters[0], '"number":4' in letters[1], len(letters)] == [True, True, 2]


@dataclass
class Other(Event):
    one: U32
    two: U64


async def test_a_spool_of_another_program_is_refused_and_kept(hand: Hand, spool: str) -> None:
    hand.submit(1, 2)
    forwarding = Forwarding(numbers(hand), Noting("a", None, stuck, durable=True, spool=spool), deadline=0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: forwarding.statistics().sinks[0].accepted == 2)
        forwarding.end()
    again = Hand()
    with pytest.raises(SinkError, match="is of another program: these are events of Number, not of Other"):
        await forward(EventStream(again, Other, latency=0), Noting("a", durable=True, spool=spool))
    again.give_back()
    third = Hand()
    third.submit(3)
    sink = Noting("a", durable=True, spool=spool)
    await forward(numbers(third), sink, count=1)
    third.give_back()
    assert sink.numbers == [1, 2, 3]


async def test_the_size_of_a_spool(hand: Hand, spool: str) -> None:
    sinks = Noting("a", None, stuck, durable=True, spool=spool, spool_size=1 << 20), Noting("b")
    forwarding = Forwarding(numbers(hand), *sinks, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for number in range(200):
            hand.submit(number)
        await until(lambda: forwarding.statistics().sinks[0].accepted == 200)
        of_a, of_b = forwarding.statistics().sinks
        assert of_a.spool_size == 1 << 20
        assert of_a.spool_bytes == sum(
            -(-path.stat().st_size // 4096) * 4096 for path in Path(spool).iterdir()
        )
        assert of_a.spool_bytes > 200 * 8
        assert (of_b.spool_size, of_b.spool_bytes) == (None, None)
        forwarding.end()


@pytest.mark.parametrize("delivery", [{"durable": True}, {"when_full": "spill", "queue_size": 32}])
async def test_the_age_of_what_is_on_disk(
    hand: Hand, spool: str, monkeypatch: pytest.MonkeyPatch, delivery: dict[str, Any]
) -> None:
    clock = Clock(monkeypatch)
    sink = Receiving("a", spool=spool, **delivery)
    gates = [anyio.Event() for _ in range(8)]

    def waiting_for(gate: anyio.Event) -> Callable[[Any], Awaitable[None]]:
        async def wait(batch: Any) -> None:
            await gate.wait()

        return wait

    sink._answers = [waiting_for(gate) for gate in gates]
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)

    def ledger() -> SinkStatistics:
        return forwarding.statistics().sinks[0]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for number in range(8):
            hand.submit(2 * number, 2 * number + 1)
            await until(lambda: ledger().accepted == 2 * number + 2)  # noqa: B023
            clock.now += 10
        assert ledger().lag == 80
        assert ledger().spooled >= 10
        for number in range(3):
            gates[number].set()
            await until(lambda: len(sink.taken) == number + 1)  # noqa: B023
            assert ledger().lag == 80 - 10 * number  # taken, and not acknowledged
            sink.taken[number].set()
            await until(lambda: ledger().lag == 70 - 10 * number)  # noqa: B023
        forwarding.end()
    assert (ledger().spooled, ledger().lag) == (10, 50)

    again = Hand()
    clock.now += 1000
    other = Noting("a", None, stuck, spool=spool, **delivery)
    forwarding = Forwarding(numbers(again), other, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: ledger().recovered == 10)
        clock.now += 1
        assert ledger().lag == 1  # since they were found
        forwarding.end()
    again.give_back()


def test_ages_are_kept_in_little_room() -> None:
    """Days of batches, ten a second; an age is never too low, and too high by less than one part in 256."""
    ages, came = Ages(), deque[float]()
    now = 0.0
    for _ in range(300_000):
        now += 0.1 if now < 10_000 else 7.0
        ages.add(3, now)
        came.append(now)
    assert ages.count == 900_000
    assert len(ages._marks) < 5000
    longest = now - came[0]
    while came:
        for part in (2, 1):
            assert ages.since is not None
            assert 0 <= came[0] - ages.since <= longest / 256
            assert ages.take(part) <= came[0]  # type: ignore[operator]
        came.popleft()
    assert (ages.count, ages.since, ages.take(0)) == (0, None, None)


async def test_two_sinks_cannot_share_a_spool(hand: Hand, spool: str) -> None:
    with pytest.raises(SinkError, match="spool"):
        await forward(
            numbers(hand), Noting("a", durable=True, spool=spool), Noting("b", durable=True, spool=spool)
        )


@pytest.mark.parametrize(
    ("delivery", "message"),
    [
        ({"durable": True}, "durable=True needs a folder"),
        ({"when_full": "spill"}, 'when_full="spill" needs a folder'),
        ({"spool": "x"}, "spool='x' is for when_full=\"spill\" or durable=True"),
    ],
)
def test_what_does_not_go_together(delivery: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        BlackholeSink(**delivery)


def test_addresses_have_it_too() -> None:
    sink = open_sink("blackhole:?durable=yes&spool=/var/spool/x&spool_size=64MiB&spool_fsync=500ms")
    assert (sink.durable, sink.spool, sink.spool_size, sink.spool_fsync) == (
        True,
        "/var/spool/x",
        64 << 20,
        0.5,
    )


_CHILD = """
import anyio, sys
from ebpfstream.forwarding import Forwarding
from tests.test_forwarding import Noting, stuck
from tests.test_stream import Hand, numbers

async def main():
    hand = Hand()
    forwarding = Forwarding(numbers(hand), Noting("a", None, None, None, stuck, durable=True, spool=sys.argv[1]))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for first in range(0, 10**9, 50):
            hand.submit(*range(first, first + 50))
            accepted = forwarding.statistics().sinks[0].accepted
            print(accepted, flush=True)
            await anyio.sleep(0)

anyio.run(main, backend=sys.argv[2])
"""


async def test_a_kill_loses_nothing_accepted(spool: str, anyio_backend_name: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, spool, anyio_backend_name], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    accepted = 0
    while accepted < 20_000:
        accepted = int(await anyio.to_thread.run_sync(partial(child.stdout.readline)))
    child.send_signal(signal.SIGKILL)
    lines = child.stdout.read().splitlines()
    accepted = int(lines[-1]) if lines and lines[-1].isdecimal() else accepted
    child.wait()
    child.stdout.close()

    hand = Hand()
    hand.submit(7)
    sink = Noting("a", durable=True, spool=spool)
    statistics = ended(await forward(numbers(hand), sink, count=1))
    hand.give_back()
    events = [number for number in sink.numbers[:-1] if isinstance(number, int)]
    assert sink.numbers[-1] == 7
    assert events == list(range(events[0], events[0] + len(events)))
    assert events[0] in (0, 50, 100)  # two batches had arrived; whether the disk knew that then is chance
    assert statistics.recovered == len(events)
    assert events[-1] + 1 >= accepted
