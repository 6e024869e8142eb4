"""What tests of sinks are made of: the two ends, what is sent, and whether it has arrived."""

from __future__ import annotations

import gc
import inspect
import json
import math
import os
import re
import threading
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, TypeVar, Unpack

import anyio

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkUnavailableError
from ebpfstream.lost import Lost
from ebpfstream.sink import CLOSING, Delivery, Sink
from ebpfstream.testing.batches import ExampleEvent, make_batch
from ebpfstream.testing.cancelling import Outcome, Way, ways_to_cancel

try:
    import pytest
except ImportError as error:
    raise ImportError("ebpfstream.testing needs pytest: pip install pytest") from error

T = TypeVar("T")
Other = AbstractContextManager[Any] | AbstractAsyncContextManager[Any]
"""What happens to a sink's other end while it is entered."""

MIB: Final = 1 << 20
_STEPS: Final = 100  # more awaits than any one call has
# What JSON, terminals and formats by lines treat specially, and a byte that is not UTF-8.
_AWKWARD: Final = "\"'\\ \r\n\t\x1b\x7f é \u202e %s \\xff"
# Kept by event loops for later.
_POOLED: Final = re.compile(r"AnyIO worker thread|Trio thread|asyncio_\d+|ThreadPoolExecutor")


class Part(NamedTuple):
    """Of a batch, as much as has arrived: some of its losses and events, in order."""

    batch: EventBatch[Any]


class Harness:
    """The sink, and its other end."""

    backends: ClassVar[Sequence[Any]] = ()
    """Event loops that the sink works on, as anyio's pytest plugin names them; empty: all."""
    patience: float = 10.0
    """Seconds after which what should end is taken to hang."""
    waits: float = 0.2
    """Seconds after which a send to an end that is away is cancelled, if it waits instead of raising."""
    memory: int = 16 * MIB
    """Bytes that the sink may hold of what it was sent."""
    _number = 0

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        """A new sink for this test's destination, each time for the same."""
        raise NotImplementedError("make: say how to make the sink")

    def arrived(self) -> list[Any] | Awaitable[list[Any]]:
        """All that has arrived so far, from the first on, losses included, as objects that JSON was made of."""
        raise NotImplementedError("arrived: say what there is at the other end")

    def address(self) -> str:
        """An address of such a sink; it is not opened."""
        raise NotImplementedError

    def away(self) -> Other:
        """While it is entered the other end is unavailable (full, locked, stopped); afterwards it is there again.

        An ordinary context manager is entered in the middle of a send, too.  Where the system has buffers between the
        two, make them small in a subclass: else nothing is ever cut in the middle.
        """
        raise NotImplementedError

    def gone(self) -> Other:
        """Once it is entered, the other end is gone for good."""
        raise NotImplementedError

    def rejecting(self) -> Other:
        """While it is entered the other end refuses some of what it is sent, for good."""
        raise NotImplementedError

    def draining(self) -> Other:
        """While it is entered the other end forgets what arrives: for one that is in this process, and remembers."""
        return nullcontext()

    # --- what tests do with them

    def _batch(self, count: int, size: int = 0, *, lost: int = 0) -> EventBatch[ExampleEvent]:
        """Events and losses like no others of this test."""
        first = self._number
        self._number += lost + count
        message = "x" * size or _AWKWARD
        losses = [Lost(number % 4, 1, number, number) for number in range(first, first + lost)]
        numbers = range(first + lost, self._number)
        return make_batch([ExampleEvent(number, "compliance", message) for number in numbers], lost=losses)

    async def _in_time(self, awaitable: Awaitable[T], what: str, within: float = 0) -> T:
        """Also for what holds off a cancellation, and then ends as if nothing had been."""
        deadline = anyio.current_time() + within + self.patience
        with anyio.CancelScope(deadline=deadline):
            done = await awaitable
            if anyio.current_time() < deadline:
                return done
        raise AssertionError(f"{what} has not ended after {within + self.patience} s")

    async def _opened(self) -> Sink:
        sink = self.make()
        await self._in_time(sink.open(), "open")
        return sink

    async def _sent(self, sink: Sink, batch: EventBatch[Any]) -> None:
        """Sent and acknowledged."""
        await self._in_time(acknowledged(sink, batch), "send")

    async def _flushed(self, sink: Sink) -> None:
        await self._in_time(sink.flush(), "flush")

    async def _closed(self, sink: Sink, deadline: float = CLOSING) -> None:
        """The deadline is the sink's to keep; here it has some time more."""
        await self._in_time(sink.aclose(deadline), f"aclose({deadline})", min(deadline, CLOSING))

    async def _delivered(self, sink: Sink, batches: Iterable[EventBatch[Any]]) -> None:
        """All sent, what has to be awaited awaited meanwhile, and flushed."""
        put, got = anyio.create_memory_object_stream[Awaitable[None]](math.inf)

        async def acknowledge() -> None:
            async with got:
                async for one in got:
                    await one

        try:
            with anyio.fail_after(6 * self.patience):
                async with anyio.create_task_group() as tasks, put:
                    tasks.start_soon(acknowledge)
                    for batch in batches:
                        waiting = await sink.send(batch)
                        if waiting is not None:
                            put.send_nowait(waiting)
        except TimeoutError as error:
            raise AssertionError("sending does not end") from error
        await self._flushed(sink)

    async def _used(self) -> EventBatch[Any]:
        """All that a sink may do, once: what stays afterwards may stay."""
        batch = self._batch(20, 1000, lost=1)
        sink = await self._opened()
        await self._delivered(sink, [batch])
        await self._closed(sink)
        return batch

    async def _offered(self, sending: Awaitable[None], batch: EventBatch[Any]) -> EventBatch[Any] | None:
        """What is to be offered again; None if it waits, was cancelled, and nobody knows."""
        try:
            with anyio.move_on_after(self.waits):
                await sending
                return make_batch([])
        except SinkUnavailableError as error:
            hold(0 <= error.taken <= len(batch), f"taken={error.taken} of {len(batch)} events")
            return batch[error.taken :]
        except Exception as error:
            raise AssertionError(f"what comes out is no SinkUnavailableError: {error!r}") from error
        return None

    async def _check(self, sent: Iterable[EventBatch[Any] | Part]) -> None:
        """All of it has arrived, in this order, and nothing else."""
        try:
            found = self.arrived()
            arrived = await found if inspect.isawaitable(found) else found
        except Exception as error:
            raise AssertionError(f"what has arrived cannot be read: {error!r}") from error
        position = 0
        for number, batch in enumerate(sent):
            if isinstance(batch, Part):
                for one in _objects(batch.batch):
                    position += arrived[position : position + 1] == [one]
            else:
                for one in _objects(batch):
                    here = arrived[position] if position < len(arrived) else "nothing more"
                    hold(
                        here == one,
                        f"batch {number} of those sent: {_short(here)} arrived, not {_short(one)}",
                    )
                    position += 1
        rest = len(arrived) - position
        hold(not rest, f"{rest} more arrived than sent, first {_short(arrived[position : position + 1])}")

    async def _settled(self, before: Counter[str], *, less: bool = False) -> None:
        """Nothing more is held than before, and nothing less unless it may be; threads may need a moment to end."""
        for _ in range(int(self.patience * 100)):
            now = held()
            if not now - before and (less or now == before):
                return
            await anyio.sleep(0.01)
        raise AssertionError(
            f"left open: {now - before}; closed, but not its own: {before - now}; "
            "if the other end is in this process, let it be one of its own"
        )


def _objects(batch: EventBatch[Any]) -> list[Any]:
    return [json.loads(line) for line in batch.to_json_lines().split(b"\n")[:-1]]


def _short(value: object) -> str:
    return text if len(text := str(value)) < 200 else f"{text[:200]}…"


def hold(condition: bool, otherwise: str) -> None:
    """Raise AssertionError otherwise: pytest rewrites the asserts of test modules alone."""
    if not condition:
        raise AssertionError(otherwise)


def needs(what: str) -> Callable[[T], T]:
    """Marks a test that is there only if this is given."""

    def mark(test: T) -> T:
        test.needs = what  # type: ignore[attr-defined]
        return test

    return mark


def backends_fixture(backends: Sequence[Any]) -> Any:
    """The event loops of a class's tests, in place of all."""

    @pytest.fixture(params=list(backends))
    def anyio_backend(self: object, request: pytest.FixtureRequest) -> Any:
        return request.param

    return anyio_backend


async def acknowledged(sink: Sink, batch: EventBatch[Any]) -> None:
    """Send a batch, and wait until it has arrived."""
    waiting = await sink.send(batch)
    if waiting is not None:
        await waiting


@asynccontextmanager
async def entered(other: Other) -> AsyncIterator[None]:
    """A context of either kind."""
    if isinstance(other, AbstractAsyncContextManager):
        async with other:
            yield
    else:
        with other:
            yield


async def at_each_await(
    scenario: Callable[[int, Way], Awaitable[Outcome]], ways: Sequence[Way] | None = None
) -> None:
    """Run it for each await that there is, until there are no more."""
    for way in ways_to_cancel() if ways is None else ways:
        for step in range(_STEPS):
            if not (await scenario(step, way)).reached:
                break


def held() -> Counter[str]:
    """Descriptors and threads of this process."""
    gc.collect()
    found: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found[re.sub(r"\d+", "", str(fd.readlink()))] += 1
        except FileNotFoundError:  # that by which the folder is read
            continue
    names = [thread.name for thread in threading.enumerate()]
    found.update(re.sub(r"\d+", "", name) for name in names if not _POOLED.match(name))
    return found


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def traced() -> Iterator[None]:
    """Memory is traced meanwhile."""
    already = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        yield
    finally:
        if not already:
            tracemalloc.stop()


def has_options(sink: Sink, queue_size: int, retry_for: float) -> None:
    """Whether they stand on the sink."""
    has = (sink.when_full, sink.queue_size, sink.retry_for, sink.dead_letters)
    wanted = ("drop_newest", queue_size, retry_for, "letters.jsonl")
    hold(has == wanted, f"delivery options: {wanted} were given, and {has} stand on the sink")


def refuses(call: Callable[[], object], what: str) -> None:
    """Whether ArgumentError is raised, and names what is wrong."""
    try:
        call()
    except ArgumentError as error:
        hold(what in str(error), f"the message does not name {what}: {error}")
    else:
        raise AssertionError(f"what cannot be meant is taken: {what}")
