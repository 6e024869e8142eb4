"""What is lost, skipped or held up under pressure: in the ledger, and in the stream itself."""

from __future__ import annotations

import errno
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import (
    U32,
    U64,
    ArgumentError,
    Event,
    EventBatch,
    EventStream,
    Lost,
    LostError,
    Sampling,
    Statistics,
    StreamClosedError,
    UnsupportedError,
)
from ebpfstream.kernel import bpf as kernel
from ebpfstream.kernel.bpf import Descriptor
from ebpfstream.kernel.buffers import Kind
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.losses import Gaps
from ebpfstream.outputs import Output
from ebpfstream.readymade import ReadyMade
from ebpfstream.records import Records
from ebpfstream.stream import OnLost
from tests.kernel import flood
from tests.kernel.flood import FloodEvent, known
from tests.kernel.test_loader import counting
from tests.test_stream import Hand, Number

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


@pytest.fixture(params=["ring", "perf"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """What is said of one kind of buffer holds for the other."""
    found: Kind = request.param
    return found


def stream(
    folder: Path, target: int, kind: Kind, on_lost: OnLost = "count", **options: Any
) -> EventStream[Any]:
    source = flood.source(folder, "flood", target, options.pop("buffer_size", 1 << 16), kind, **options)
    return EventStream(source, FloodEvent, on_lost=on_lost)


def make(producer: flood.Producer, calls: int) -> None:
    producer.start(calls)
    producer.wait()


async def test_losses_are_in_the_stream_where_they_happened(kind: Kind, tmp_path: Path) -> None:
    """Numbers and losses together leave no hole, and all losses add up to the ledger's, those at the end included."""
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, "yield") as events:
            items: list[FloodEvent | Lost] = []
            for _ in range(5):
                await run_sync(make, producer, 3000)  # more than there is room for
                with anyio.move_on_after(0.2):
                    async for item in events:
                        items.append(item)
            await run_sync(make, producer, 3000)
            events.detach()
            items += [item async for item in events]
    statistics = events.statistics()
    lost = [item for item in items if isinstance(item, Lost)]
    seen = [item for item in items if isinstance(item, FloodEvent)]
    assert sum(known(one.count) for one in lost) == statistics.lost == 18_000 - len(seen) > 0
    assert statistics.delivered == len(seen)
    assert all((one.cpu, one.time is not None) == (0, True) for one in lost)
    # Every number is either an event's or within a loss, which stands before the events of its batch.
    gone = set(range(18_000)) - {event.sequence for event in seen}
    for one in lost:
        assert one.first_sequence is not None
        assert one.last_sequence is not None
        assert {one.first_sequence, one.last_sequence} <= gone
        within = {number for number in gone if one.first_sequence <= number <= one.last_sequence}
        assert len(within) == one.count
        gone -= within
    assert not gone
    assert isinstance(items[-1], Lost)


async def test_batches_carry_losses_into_json(kind: Kind, tmp_path: Path) -> None:
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, "yield") as events:
            await run_sync(make, producer, 5000)
            events.detach()
            batches = [batch async for batch in events.batches()]
    assert sum(map(len, batches)) == events.statistics().delivered
    assert sum(one.count or 0 for batch in batches for one in batch.lost) == events.statistics().lost
    (lost,) = batches[-1].lost
    assert (
        batches[-1]
        .to_json_lines()
        .startswith(b'{"lost":{"cpu":0,"count":%d,"first_sequence":' % known(lost.count))
    )
    assert next(iter(batches[-1])) == lost
    assert len(batches[-1][:0].lost) == 1
    assert batches[-1][len(batches[-1]) :].lost == (() if len(batches[-1]) else (lost,))


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass
class Numbered(Event):
    sequence: U64
    cpu: U32
    program: U32


def numbered(*events: tuple[int, int, int], size: int = 16) -> Records:
    """Records of a CPU, a program and a number each."""
    data = b"".join(struct.pack("<8xQII", number, cpu, program) for cpu, program, number in events)
    return Records(data, 8, [(0, 24, size, len(events))])


def test_gaps_are_each_programs_and_told_for_each_cpu() -> None:
    gaps = Gaps(Numbered)
    found = gaps.find(numbered((1, 0, 2), (0, 0, 1), (0, 1, 3), (1, 0, 4), (2, 1, 0)), NOW)
    assert found == (Lost(0, 4, time=NOW), Lost(1, 3, 0, 3, NOW))
    assert gaps.find(numbered((1, 0, 5), (0, 1, 4), (0, 0, 2), (2, 1, 1)), NOW) == ()
    assert gaps.find(numbered((1, 0, 90), size=8), NOW) == ()  # too short to have a number
    ends = {(3, 1): 3, (0, 0): 3, (0, 1): 7, (1, 0): 6, (2, 1): 2}
    assert gaps.rest(ends, NOW) == (Lost(0, 2, 5, 6, NOW), Lost(3, 3, 0, 2, NOW))
    assert gaps.rest(ends, NOW) == ()


class Losing(Hand):
    """Tells with each batch, and at the end, of the losses that come next."""

    def __init__(self, *told: tuple[Lost, ...]) -> None:
        super().__init__()
        self._told = deque(told)

    def losses(self, records: Records | None, time: datetime) -> tuple[Lost, ...]:
        assert time.tzinfo is UTC
        return self._told.popleft() if self._told else ()


async def test_whoever_cuts_a_batch_has_its_losses_once_and_first() -> None:
    first, second = Lost(0, 3), Lost(1, 2)
    hand = Losing((first, second), (first, second), (), (first, second))
    async with EventStream(hand, Number, latency=0, on_lost="yield") as stream:
        events: EventStream[Any] = stream

        async def batch(most: int | None = None) -> list[Any]:
            found = await events.next_batch(most)
            assert found is not None
            return list(found)

        hand.submit(0, 1, 2, 3)
        assert await batch(1) == [first, second, Number(0)]
        assert await batch(1) == [Number(1)]
        assert [await anext(events), *await batch()] == [Number(2), Number(3)]
        hand.submit(4, 5)
        assert [await anext(events), *await batch()] == [first, second, Number(4), Number(5)]
        hand.submit(6)
        assert await anext(events) == Number(6)
        events.detach()
        assert await anext(events) == first
        assert await batch() == [second]
        assert await events.next_batch() is None
    hand.give_back()


def test_in_json_losses_stand_before_the_events() -> None:
    data = b"".join(struct.pack("<8xQ", number) for number in (7, 8))
    batch = EventBatch(Number, Records(data, 8, [(0, 16, 8, 2)]), 0, (Lost(0, 3, 4, 6, NOW), Lost(2, None)))
    one = (
        b'{"lost":{"cpu":0,"count":3,"first_sequence":4,"last_sequence":6,"time":"2026-01-02T03:04:05Z"}}\n'
        b'{"lost":{"cpu":2,"count":null,"first_sequence":null,"last_sequence":null,"time":null}}\n'
        b'{"number":7}\n'
    )
    assert batch.to_json_lines() == one + b'{"number":8}\n'
    assert [batch[:1].to_json_lines(), batch[1:].to_json_lines()] == [one, b'{"number":8}\n']


async def test_losses_are_raised_and_the_stream_goes_on(kind: Kind, tmp_path: Path) -> None:
    seen: list[int] = []
    lost: list[Lost] = []
    messages: list[tuple[str, int]] = []
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, "raise") as events:
            await run_sync(make, producer, 20)
            seen += [(await anext(events)).sequence for _ in range(20)]
            await run_sync(make, producer, 3000)
            events.detach()
            while True:
                try:
                    seen.append((await anext(events)).sequence)
                except LostError as error:
                    lost += error.lost
                    messages.append((str(error), sum(known(one.count) for one in error.lost)))
                except StopAsyncIteration:
                    break
    assert all(text == f"{count} events were lost; the stream goes on after them" for text, count in messages)
    assert seen[:20] == list(range(20))
    assert len(seen) == len(set(seen)) == events.statistics().delivered
    assert sum(known(one.count) for one in lost) == events.statistics().lost == 3020 - len(seen) > 0


async def test_without_a_loss_nothing_is_said(kind: Kind, tmp_path: Path) -> None:
    with flood.producing() as producer:
        async with stream(tmp_path, producer.pid, kind, "yield", buffer_size=1 << 24) as events:
            await run_sync(make, producer, 5000)
            events.detach()
            found = [item async for item in events]
    assert [event.sequence for event in found if event.cpu == found[0].cpu] == list(
        range(sum(event.cpu == found[0].cpu for event in found))
    )
    assert not any(isinstance(item, Lost) for item in found)


async def test_losses_by_cause(tmp_path: Path) -> None:
    """A payload of 8,000 bytes never fits into a ring of 4,096."""
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, "ring", buffer_size=4096) as events:
            await run_sync(make, producer, 6400)
    statistics = events.statistics()
    assert statistics.lost_too_large == 100
    assert statistics.lost_full == known(statistics.lost) - 100 > 0
    assert (statistics.lost_no_buffer, statistics.lost_otherwise, statistics.lost_errno) == (0, 0, 0)
    assert known(statistics.submitted) + known(statistics.lost) == statistics.tried == 6400


@pytest.mark.parametrize("size", [4080, 4081])
async def test_a_ring_is_never_quite_full(size: int, tmp_path: Path) -> None:
    """Of 4,096 bytes, 8 stay free, and the record's header takes 8."""
    path = tmp_path / "flood.c"
    with flood.producing(cpu=0) as producer:
        path.write_text(
            f"#define TARGET {producer.pid}\n#define LENGTH(n) ({size} - sizeof(struct flood_event))\n"
            + Path(flood.__file__).with_name("flood.c").read_text()
        )
        source = ReadyMade(
            path, FloodEvent, {"flood": RawTracepoint("sys_enter")}, buffer="ring", buffer_size=4096
        )
        async with EventStream(source, FloodEvent) as events:
            await run_sync(make, producer, 3)
    statistics = events.statistics()
    found = statistics.submitted, statistics.lost_full, statistics.lost_too_large
    assert found == ((1, 2, 0) if size == 4080 else (0, 0, 3))


async def test_losses_of_a_perf_buffer_by_cause(tmp_path: Path) -> None:
    slot, clock = struct.pack("<I", 0), struct.pack("<IIQ", 1, 112, 0).ljust(112, b"\0")
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, "perf") as events:
            await run_sync(make, producer, 3000)
            full = events.statistics().lost
            buffer = events._buffer
            assert buffer is not None
            # An event that takes no samples.
            other = Descriptor(kernel.perf_event_open(clock, 0))
            buffer.map.update(slot, struct.pack("<I", other.fd))
            await run_sync(make, producer, 7)
            buffer.unplug()
            await run_sync(make, producer, 5)
            other.close()
    ledger = events.statistics()
    assert (ledger.lost_full, ledger.lost_too_large) == (full, 0)
    assert (ledger.lost_no_buffer, ledger.lost_otherwise, ledger.lost_errno) == (5, 7, errno.EINVAL)
    assert ledger.lost == known(full) + 12 > 12


async def test_a_pause_is_counted(kind: Kind, tmp_path: Path) -> None:
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, buffer_size=1 << 24) as events:
            await run_sync(make, producer, 10)
            events.pause()
            await run_sync(make, producer, 25)
            events.resume()
            await run_sync(make, producer, 10)
            events.pause()
            await run_sync(make, producer, 5)
            events.detach()
            found = [(event.sequence, event.weight) async for event in events]
    assert found == [(number, 26 if number == 10 else 1) for number in range(20)]
    statistics = events.statistics()
    assert (statistics.tried, statistics.skipped, statistics.submitted, statistics.lost) == (50, 30, 20, 0)
    assert statistics.complete is False
    assert str(statistics).startswith("20 delivered; 50 tried = 20 submitted + 0 lost + 30 skipped")


async def test_a_pause_before_the_beginning_and_after_the_end(kind: Kind, tmp_path: Path) -> None:
    with flood.producing(cpu=0) as producer:
        events = stream(tmp_path, producer.pid, kind)
        events.pause()
        async with events:
            await run_sync(make, producer, 5)
            events.resume()
            await run_sync(make, producer, 1)
            assert (await anext(events)).weight == 6
    for change in events.pause, events.resume:
        with pytest.raises(StreamClosedError):
            change()


def test_what_is_unknown_is_not_called_complete() -> None:
    assert Statistics(lost=None).complete is None
    assert Statistics(misses=None).complete is None
    assert Statistics(lost=None, skipped=1).complete is Statistics(lost=1, misses=None).complete is False


async def test_sampling_under_pressure(kind: Kind, tmp_path: Path) -> None:
    """Above the high mark one in four is kept, below the low mark all are; weights say for how many each stands."""
    sampling = Sampling(one_in=4, high=0.5, low=0.1)
    with flood.producing(cpu=0) as producer:
        options: dict[str, Any] = {"buffer_size": 1 << 19, "overload": sampling}
        async with stream(tmp_path, producer.pid, kind, **options) as events:
            room = events.statistics().buffer_size // (1 if kind == "ring" else 2)
            found = []

            async def take(times: int) -> None:
                for _ in range(times):
                    found.append(await anext(events))

            # What half of the buffer holds; then the stream looks, and leaves it nearly as full.
            await run_sync(make, producer, room // 400)
            await take(1)
            await run_sync(make, producer, 40)
            if kind == "ring":
                await run_sync(make, producer, room // 400)
            before = events.statistics()
            assert before.lost == 0
            # Emptied, all are kept again.
            with anyio.move_on_after(0.3):
                async for event in events:
                    found.append(event)
            await run_sync(make, producer, 50)
            events.detach()
            found += [event async for event in events]
    statistics = events.statistics()
    assert statistics.lost == 0
    assert statistics.buffered_most >= room // 4
    assert len(found) == statistics.submitted == known(statistics.tried) - known(statistics.skipped)
    assert [event.sequence for event in found] == list(range(len(found)))
    assert {event.weight for event in found} <= {1, 2, 3, 4}
    assert sum(event.weight for event in found) == statistics.tried
    assert [event.weight for event in found[-49:]] == [1] * 49
    if kind == "ring":
        assert known(statistics.skipped) > 0


async def test_the_marks_of_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, where the programs are told how full the buffer is: with each batch, and paused all the same."""
    filled = [0]
    monkeypatch.setattr(PerfBuffer, "fill", lambda _: (filled[0], 100))
    with flood.producing(cpu=0) as producer:
        sampling = Sampling(one_in=4, high=0.5, low=0.25)
        async with stream(tmp_path, producer.pid, "perf", overload=sampling) as events:
            await run_sync(make, producer, 1)
            for filled[0], kept in (49, 8), (50, 2), (26, 2), (25, 8), (49, 8), (100, 2), (0, 8), (100, 2):
                await events.next_batch()
                await run_sync(make, producer, 8)
                batch = await events.next_batch()
                assert batch is not None
                assert len(batch) == kept
                await run_sync(make, producer, 8)
            events.pause()
            await events.next_batch()
            before = events.statistics().submitted
            await run_sync(make, producer, 8)
            assert events.statistics().submitted == before
            events.resume()
            await run_sync(make, producer, 8)
            assert events.statistics().submitted == known(before) + 2


WRONG: dict[str, Callable[[Path], object]] = {
    "on_lost='foo' is unknown": lambda path: stream(path, 1, "ring", "foo"),  # type: ignore[arg-type]
    "overload='foo' is unknown": lambda path: stream(path, 1, "ring", overload="foo"),
    r"Sampling\(one_in=1, .*is impossible: one_in is 2 or more": lambda path: stream(
        path, 1, "ring", overload=Sampling(1)
    ),
    "and 0 <= low < high <= 1": lambda path: stream(path, 1, "ring", overload=Sampling(2, 0.5, 0.5)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_asked_for(message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        WRONG[message](tmp_path)


async def test_what_is_known_of_a_program_of_ones_own() -> None:
    """A perf buffer's losses, exactly; of a ring buffer's nobody tells; and it cannot be paused."""
    with flood.producing(cpu=0) as producer:
        async with counting(producer.pid) as bpf:
            with pytest.raises(
                ArgumentError, match="'ring' is a ring buffer, and of what it had no room for nobody"
            ):
                bpf.events("ring", on_lost="yield")
            async with bpf.events("perf", buffer_size=1 << 14, on_lost="yield") as events:
                await run_sync(make, producer, 2000)
                with pytest.raises(UnsupportedError, match="a program of yours cannot be paused"):
                    events.pause()
                bpf.detach()
                items = [item async for item in events]
            lost = [item for item in items if isinstance(item, Lost)]
            assert (
                sum(one.count or 0 for one in lost)
                == events.statistics().lost
                == 2000 - len(items) + len(lost)
                > 0
            )
            assert {one.cpu for one in lost} == {0}


def test_losses_of_a_perf_buffer_of_ones_own_are_told_once_for_each_cpu() -> None:
    """A CPU that went and came back has two rings."""
    buffer = PerfBuffer.__new__(PerfBuffer)
    rings: Any = [SimpleNamespace(cpu=cpu, lost=lost) for cpu, lost in ((0, 3), (1, 4), (0, 2), (2, 0))]
    buffer._rings = rings
    unused: Any = None
    output = Output(buffer, start=unused, submitters=unused, release=unused)
    assert output.losses(None, NOW) == (Lost(0, 5, time=NOW), Lost(1, 4, time=NOW))
    rings[2].lost += 6
    assert output.losses(None, NOW) == (Lost(0, 6, time=NOW),)
    assert output.losses(None, NOW) == ()
