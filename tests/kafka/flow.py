"""Events on their way from a stream to a topic, while things happen to the topic, its brokers, and ourselves."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import anyio

from ebpfstream.events import U32, U64, Event
from ebpfstream.forwarding import Forwarding
from ebpfstream.stream import EventStream
from ebpfstream.testing import make_batch
from tests.test_spooling import balanced
from tests.test_stream import Hand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ebpfstream.sink import Sink
    from ebpfstream.statistics import SinkStatistics
    from tests.kafka.client import Record

RATE: Final = 1500  # events a second
PROCESSES: Final = 7
_TURN: Final = 0.02  # seconds
_SLACK: Final = 10.0  # seconds that a busy machine may need beyond a deadline
_PATIENCE: Final = 90.0  # seconds until everything has arrived


@dataclass
class Numbered(Event):
    """`number` counts all events, of whatever process."""

    pid: U32
    number: U64


class Flow:
    """Forwards events to a sink from when it is entered: as many as are asked for, or RATE of them until it is left.

    Their numbers begin with `first`, and they are of PROCESSES processes in turn.
    """

    def __init__(self, sink: Sink, *, first: int = 0, deadline: float = 5.0) -> None:
        self.first = self.next = first
        self._hand = Hand()
        self._deadline = deadline
        self._stream = EventStream(self._hand, Numbered, latency=0)
        self._forwarding = Forwarding(self._stream, sink, deadline=deadline)
        self._flowing: anyio.CancelScope | None = None
        self._ended = anyio.Event()
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as exits:
            exits.callback(self._hand.give_back)
            self._tasks = await exits.enter_async_context(anyio.create_task_group())
            self._tasks.start_soon(self._forward)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *exit: Any) -> None:
        """End the forwarding; everything is closed within the deadline."""
        self.stop()
        self._forwarding.end()
        with anyio.fail_after(self._deadline + _SLACK, shield=True):
            await self._ended.wait()
        await self._exits.__aexit__(*exit)
        balanced(self.statistics)
        assert (self.statistics.in_flight, self.statistics.queued) == (0, 0)

    async def _forward(self) -> None:
        try:
            await self._forwarding.run()
        finally:
            self._ended.set()

    @property
    def statistics(self) -> SinkStatistics:
        (statistics,) = self._forwarding.statistics().sinks
        return statistics

    def submit(self, count: int) -> None:
        """Let so many events happen."""
        numbers = range(self.next, self.next + count)
        self._hand.submit()  # which wakes the stream
        batch = make_batch([Numbered(100 + number % PROCESSES, number) for number in numbers], type=Numbered)
        self._hand.ready[-1] = batch.records
        self._hand.submitted += count
        self.next += count

    def start(self) -> None:
        """Let events happen all the time."""
        self._tasks.start_soon(self._submit)

    async def _submit(self) -> None:
        with anyio.CancelScope() as self._flowing:
            began, first = time.monotonic(), self.next
            while True:
                self.submit(int((time.monotonic() - began) * RATE) - (self.next - first))
                balanced(self.statistics)
                await anyio.sleep(_TURN)

    def stop(self) -> None:
        """No more events happen by themselves."""
        if self._flowing is not None:
            self._flowing.cancel()

    async def more(self, count: int) -> None:
        """Return when so many more events have arrived."""
        wanted = self.statistics.acknowledged + count
        await until(lambda: self.statistics.acknowledged >= wanted)

    async def arrived(self) -> None:
        """Let no more events happen; return when all that did have arrived, or are given up."""
        self.stop()
        await until(lambda: self.statistics.accepted == self.next - self.first)
        await until(lambda: self.statistics.in_flight == self.statistics.spooled == 0)


async def until(condition: Callable[[], object]) -> None:
    """Return when it is so."""
    with anyio.fail_after(_PATIENCE):
        while not condition():
            await anyio.sleep(_TURN)


def check(records: Iterable[Record], expected: Iterable[int]) -> int:
    """These events are there, and no others; each process's in one partition, and in order, as they came first.

    Returns how many came again.
    """
    numbers: dict[bytes | None, list[int]] = {}
    partitions: dict[bytes | None, int] = {}
    seen: set[int] = set()
    doubles = 0
    for record in records:
        event = json.loads(record.value or b"")
        number = event["number"]
        assert record.key == b"%s/%d" % (dict(record.headers)["host"], event["pid"])
        assert partitions.setdefault(record.key, record.partition) == record.partition
        if number in seen:
            doubles += 1
        else:
            seen.add(number)
            numbers.setdefault(record.key, []).append(number)
    wanted = set(expected)
    assert sorted(wanted - seen) == []
    assert sorted(seen - wanted) == []
    assert [key for key, listed in numbers.items() if listed != sorted(listed)] == []
    return doubles


def remains() -> list[asyncio.Task[Any]]:
    """Tasks of producers that would still connect, send or wait; none of what is here is one."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return [task for task in others if "kafka" in f"{task.get_name()} {task.get_coro()!r}"]
