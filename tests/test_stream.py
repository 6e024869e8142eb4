"""EventStream with a source that a test holds in its hands: the order of things, at every turn.

tests/kernel/test_stream.py has the real kernel.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

import anyio
import pytest

from ebpfstream import stream as stream_module
from ebpfstream.errors import DecodeError, StreamBusyError, StreamClosedError
from ebpfstream.events import U64, Event
from ebpfstream.filters import Filters
from ebpfstream.kernel.bpf import Map
from ebpfstream.kernel.buffers import Buffer
from ebpfstream.lost import Lost
from ebpfstream.readymade import Counters
from ebpfstream.records import Records
from ebpfstream.statistics import Statistics
from ebpfstream.stream import EventStream
from ebpfstream.turns import Turn

pytestmark = pytest.mark.anyio


@dataclass
class Number(Event):
    number: U64


class Hand:
    """Source and buffer in one; `log` is what the stream did with them."""

    buffer: Buffer | None = None
    late = 0
    lost = None
    size = 0
    room = 1 << 20

    def __init__(self) -> None:
        self.log: list[str] = []
        self.ready: deque[Records | None] = deque()  # None: a drain that finds the head unfinished
        self.submitted = 0
        self.on: dict[str, Callable[[], None]] = {}
        self._reader, self._writer = os.pipe()

    def submit(self, *numbers: int, size: int = 8, padding: int = 0) -> None:
        data = b"".join(bytes(8) + struct.pack("<Q", number)[:size].ljust(8, b"\0") for number in numbers)
        self.ready.append(Records(data + bytes(padding), 8, [(0, 16, size, len(numbers))]))
        self.submitted += len(numbers)
        os.write(self._writer, b"x")

    def _note(self, what: str) -> None:
        self.log.append(what)
        if act := self.on.pop(what, None):
            act()

    async def open(self) -> Hand:
        self._note("open")
        await anyio.lowlevel.checkpoint()
        return self

    @property
    def map(self) -> Map:
        raise NotImplementedError

    async def wait(self) -> None:
        await anyio.wait_readable(self._reader)
        os.read(self._reader, 1 << 16)

    def pending(self) -> int:
        return len(self.ready)

    def drain(self, limit: int) -> Records | None:
        self._note("drain")
        return self.ready.popleft() if self.ready else None

    def finish(self) -> None:
        self._note("finish")

    def set_filters(self, filters: Filters) -> None:
        self._note("set_filters")

    def pause(self, paused: bool) -> None:
        self._note("pause" if paused else "resume")

    def drained(self) -> None:
        pass

    def losses(self, records: Records | None, time: datetime) -> tuple[Lost, ...]:
        return ()

    def fill(self) -> tuple[int, int]:
        return 0, self.room

    def detach(self) -> None:
        self._note("detach")

    def stop(self) -> None:
        self._note("stop")

    def unplug(self) -> None:
        self._note("unplug")

    def counters(self) -> Counters:
        self._note("counters")
        return Counters(tried=self.submitted, submitted=self.submitted)

    def close(self) -> None:
        self._note("close")

    def give_back(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    made = Hand()
    monkeypatch.setattr(stream_module, "wait_for_running_programs", lambda: made._note("wait"))
    yield made
    made.give_back()


def numbers(hand: Hand) -> EventStream[Number]:
    return EventStream(hand, Number, latency=0)


async def test_a_large_batch_that_empties_the_buffer(hand: Hand) -> None:
    """After it the stream waits, as after any other, and ends when it is detached."""
    hand.submit(*range(20_000))
    events = numbers(hand)
    async with events:
        assert len(await anext(events.batches())) == 20_000
        with anyio.move_on_after(0.2):
            await anext(events.batches())
        drains = hand.log.count("drain")
        assert drains < 100
        events.detach()
        with anyio.fail_after(10):
            assert [len(batch) async for batch in events.batches()] == []


async def test_closing_stops_then_waits_then_drains_then_counts(hand: Hand) -> None:
    """A program that was running when it was detached submits while the stream waits for it."""
    hand.on["wait"] = lambda: hand.submit(2, 3)
    async with numbers(hand) as events:
        hand.submit(1)
    assert hand.log == ["open", "stop", "wait", "finish", "drain", "drain", "drain", "counters", "close"]
    statistics = events.statistics()
    assert (statistics.tried, statistics.submitted, statistics.received, statistics.unread) == (3, 3, 3, 3)


async def test_after_detach_what_running_programs_submit_still_comes(hand: Hand) -> None:
    hand.on["wait"] = lambda: hand.submit(2, 3)
    async with numbers(hand) as events:
        hand.submit(1)
        events.detach()
        assert [event.number async for event in events] == [1, 2, 3]
    assert events.statistics().delivered == 3


async def test_detached_while_it_opens(hand: Hand) -> None:
    events = numbers(hand)
    hand.on["open"] = events.detach  # before anything is attached
    async with events:
        assert hand.log == ["open", "detach", "detach"]


async def test_a_cancellation_that_arrives_with_the_batch_loses_nothing(hand: Hand) -> None:
    seen: list[int] = []
    async with numbers(hand) as events:
        hand.submit(1, 2)
        with anyio.CancelScope() as scope:
            hand.on["drain"] = scope.cancel
            seen.append((await anext(events)).number)
            await anyio.sleep_forever()
        seen.append((await anext(events)).number)
    assert seen == [1, 2]
    assert events.statistics().unread == 0


async def test_records_that_do_not_fit_are_counted_and_passed(hand: Hand) -> None:
    async with numbers(hand) as events:
        hand.submit(1)
        hand.submit(2, 3, size=4)
        hand.submit(4)
        hand.submit(5)
        assert (await anext(events)).number == 1
        for _ in range(2):
            with pytest.raises(DecodeError):
                await anext(events)
        assert (await anext(events)).number == 4
        running = events.statistics()
        assert (running.received, running.delivered, running.undecodable, running.unread) == (4, 2, 2, 0)
    final = events.statistics()
    assert (final.received, final.delivered, final.undecodable, final.unread) == (5, 2, 2, 1)
    assert str(final) == "2 delivered; 5 tried = 5 submitted + 0 lost, 2 undecodable, 1 unread"


async def test_bytes_batches_wakeups(hand: Hand) -> None:
    async with numbers(hand) as events:
        async with anyio.create_task_group() as tasks:

            async def later() -> None:
                await anyio.wait_all_tasks_blocked()
                hand.submit(1, 2)
                hand.submit(3)

            tasks.start_soon(later)
            assert [(await anext(events)).number for _ in range(3)] == [1, 2, 3]
    statistics = events.statistics()
    assert (statistics.bytes, statistics.batches, statistics.wakeups) == (48, 2, 1)


async def test_a_drain_that_stopped_at_its_limit_is_followed_without_gathering(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    async def pause(_: Turn, seconds: float) -> None:
        naps.append(seconds)
        await anyio.sleep(0)

    monkeypatch.setattr(Turn, "pause", pause)
    async with EventStream(hand, Number, latency=0.25) as events:
        hand.submit(1, padding=1 << 18)
        hand.submit(2)
        hand.submit(3)
        for _ in range(2):
            await anext(events)
        assert naps == [0.25]
        await anext(events)
        assert naps == [0.25, 0.25]
        # A record at the head that stays unfinished must not make the loop spin.
        hand.ready.append(None)
        hand.submit(4)
        await anext(events)
        assert naps[2:] == [0.25, stream_module._UNFINISHED_PAUSE]


async def test_no_more_gathers_than_has_room(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    """While events flow: at the rate of the last time, a quarter of the buffer."""
    naps: list[float] = []

    async def pause(_: Turn, seconds: float) -> None:
        naps.append(seconds)
        await anyio.sleep(0)

    monkeypatch.setattr(Turn, "pause", pause)
    hand.room = 4096
    async with EventStream(hand, Number, latency=10) as events:
        hand.submit(1)
        async with anyio.create_task_group() as tasks:  # soon enough: they flow

            async def submit() -> None:
                await anyio.wait_all_tasks_blocked()
                hand.submit(2)

            await anext(events)
            tasks.start_soon(submit)
            await anext(events)
        assert set(naps) == {10}
        for padding, seconds in ((1024 - 16, 10), (2048 - 16, 10), (4096 - 16, 5), (0, 1.25), (0, 10)):
            hand.submit(3, padding=padding)
            await anext(events)
            assert naps[-1] == seconds, padding


async def test_other_tasks_have_a_turn_between_full_batches(hand: Hand) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with numbers(hand) as events, anyio.create_task_group() as tasks:
        for number in range(20):
            hand.submit(number, padding=1 << 18)
        tasks.start_soon(other)
        await anext(events)
        before = turns
        for _ in range(19):
            await anext(events)
        assert turns >= before + 10  # trio shuffles who is first in a turn
        tasks.cancel_scope.cancel()


async def test_closing_cannot_be_cancelled_halfway(hand: Hand) -> None:
    with anyio.CancelScope() as scope:
        async with numbers(hand) as events:
            hand.submit(1)
            scope.cancel()
    assert hand.log[-2:] == ["counters", "close"]
    assert events.statistics().unread == 1


async def test_a_waiting_task_is_told_that_the_stream_was_closed(hand: Hand) -> None:
    """Though what comes while it is being closed would be an event for it."""
    hand.on["wait"] = lambda: hand.submit(1)
    async with numbers(hand) as events, anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(StreamClosedError):
                await anext(events)

        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(StreamBusyError):
            await anext(events)
        await events.aclose()
    assert events.statistics().unread == 1


@pytest.mark.parametrize("form", ["events", "batches"])
async def test_a_closed_stream_hands_out_nothing(hand: Hand, form: str) -> None:
    """Not even what it had in hand."""
    async with numbers(hand) as events:
        hand.submit(1, 2)
        assert (await anext(events)).number == 1
        hand.submit(3)
    before = events.statistics()
    with pytest.raises(StreamClosedError):
        await anext(events if form == "events" else events.batches())
    assert events.statistics() == before


async def test_dropping_the_last_reference_closes_the_source(hand: Hand) -> None:
    hand.submit(1, 2)
    async for _ in numbers(hand):
        break
    assert hand.log[-1] == "close"


async def test_closing_does_not_wait_for_events_to_gather(hand: Hand) -> None:
    events = EventStream(hand, Number, latency=3)
    async with events, anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(StreamClosedError):
                await anext(events)

        hand.submit(1)
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        began = anyio.current_time()
        await events.aclose()
        assert anyio.current_time() < began + 2
    assert events.statistics().unread == 1


async def test_detaching_hands_out_what_gathers(hand: Hand) -> None:
    events = EventStream(hand, Number, latency=60)
    async with events, anyio.create_task_group() as tasks:
        seen: list[int] = []

        async def read() -> None:
            seen.extend([event.number async for event in events])

        hand.submit(1)
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        events.detach()
        hand.submit(2)  # by a program that is still running
    assert seen == [1, 2]


async def test_while_events_flow_no_wakeup_is_waited_for(hand: Hand) -> None:
    """Asked again before `latency` is over, and something there each time it is over: a timer does."""
    async with EventStream(hand, Number, latency=0.05) as events:

        async def submit() -> None:
            await anyio.sleep(0.01)
            hand.submit(0)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(submit)
            await anext(events)
        assert events.statistics().wakeups == 1
        for number in range(1, 6):
            hand.submit(number)
            assert (await anext(events)).number == number
        assert events.statistics().wakeups == 1
        # Nothing has come in time: wait, and not for a timer.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(events.__anext__)
            await anyio.sleep(0.5)
            assert events.statistics().wakeups == 3  # the first for what had been drained without
            drains = hand.log.count("drain")
            await anyio.sleep(0.5)
            assert hand.log.count("drain") == drains
            hand.submit(6)


def test_the_ledger_in_words() -> None:
    ledger = Statistics(
        tried=9, submitted=7, lost=2, misses=4, received=7, delivered=3, undecodable=1, unread=3
    )
    assert str(ledger) == (
        "3 delivered; 9 tried = 7 submitted + 2 lost, 1 undecodable, 3 unread, 4 missed by the kernel"
    )
    assert str(Statistics(misses=None)) == "0 delivered; 0 tried = 0 submitted + 0 lost"
    assert not Statistics(lost=1).complete
    assert not Statistics(misses=1).complete
    assert Statistics(tried=1, unread=1).complete
