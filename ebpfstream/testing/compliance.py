"""What every sink must stand."""

from __future__ import annotations

import tracemalloc
from contextlib import AbstractAsyncContextManager, ExitStack, suppress
from importlib.util import find_spec
from typing import Any, Literal

import anyio
import pytest

from ebpfstream.batch import EventBatch
from ebpfstream.errors import DecodeError, SinkClosedError, SinkError, SinkRejectedError
from ebpfstream.sink import CLOSING, open_sink
from ebpfstream.testing.batches import ExampleEvent
from ebpfstream.testing.cancelling import Outcome, Steps, Way, cancelled_at
from ebpfstream.testing.harness import (
    MIB,
    Harness,
    Part,
    acknowledged,
    at_each_await,
    backends_fixture,
    entered,
    has_options,
    held,
    hold,
    needs,
    refuses,
    resident,
    traced,
)


class SinkCompliance(Harness):
    """What `ebpfstream.sink.Sink` promises, as tests: subclass it in a test module, and say how to reach the sink.

    `make` and `arrived` must be given.  What else may be given brings tests with it that are not there without.
    Every test wants a destination of its own: make it in a fixture.  Descriptors of this process are counted, so let a
    server that accepts connections be a process of its own.
    """

    pytestmark = pytest.mark.anyio

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name, test in vars(SinkCompliance).items():
            need = getattr(test, "needs", "")
            if need and name not in vars(cls) and getattr(cls, name) in (None, test):
                if need == "blockbuster":
                    given = find_spec(need) is not None
                else:
                    given = getattr(cls, need) is not getattr(Harness, need)
                setattr(cls, name, test if given else None)
        if cls.backends:
            cls.anyio_backend = backends_fixture(cls.backends)  # type: ignore[attr-defined]

    # --- what is sent, and whether it arrives

    async def test_all_arrives_once_and_in_order(self) -> None:
        """Single events, thousands, long ones; acknowledged one by one, or while more are sent."""
        sent = [
            self._batch(count, size) for count, size in ((1, 0), (1, 50_000), (5000, 0), (300, 2000), (1, 1))
        ]
        sink = await self._opened()
        for batch in sent[:2]:
            await self._sent(sink, batch)
        await self._delivered(sink, sent[2:])
        await self._closed(sink)
        await self._check(sent)

    async def test_losses_stand_before_their_events(self) -> None:
        """Losses alone, before events, again and again: records of their own."""
        sent = [
            self._batch(count, lost=lost) for count, lost in ((2, 0), (0, 1), (3, 2), (0, 3), (0, 1), (1, 1))
        ]
        sink = await self._opened()
        await self._delivered(sink, sent)
        await self._closed(sink)
        await self._check(sent)

    async def test_batches_stay_as_they_are(self) -> None:
        """Nobody changes a batch: it can be sent again, and parts of it."""
        batch = self._batch(300, 1000, lost=2)
        copy = (bytes(bytearray(batch.records.data)), list(batch.records.runs), batch.lost, batch.event_type)
        sent = [batch, batch, batch[:1], batch[299:]]
        sink = await self._opened()
        await self._delivered(sink, sent)
        await self._closed(sink)
        now = (batch.records.data, batch.records.runs, batch.lost, batch.event_type)
        hold(now == copy, "the sink has changed a batch that it was sent")
        await self._check(sent)

    async def test_a_record_that_does_not_fit(self) -> None:
        """When DecodeError is raised nothing of the batch has arrived; without that record the rest does."""
        sent = [self._batch(1), self._batch(3), self._batch(1)]
        records = sent[1].records
        unfit = EventBatch(ExampleEvent, records._replace(runs=[*records.runs, (0, 16, 3, 1)]))
        sink = await self._opened()
        await self._sent(sink, sent[0])
        try:
            await self._sent(sink, unfit)
        except DecodeError:
            await self._sent(sink, sent[1])
            await self._sent(sink, sent[2])
            await self._flushed(sink)
            await self._check(sent)
        await self._closed(sink)

    async def test_acknowledged_has_arrived(self) -> None:
        """Without a flush, however much time there is for closing; and nothing arrives after that."""
        sent: list[Any] = []
        for deadline in (CLOSING, 0.0, 60.0):
            sink = await self._opened()
            batches = [self._batch(3), self._batch(100, 1000, lost=1)]
            await self._sent(sink, batches[0])
            waiting = await self._in_time(sink.send(batches[1]), "send")
            await self._closed(sink, deadline)
            sent += [batches[0], Part(batches[1]) if waiting else batches[1]]
            await self._check(sent)
            if waiting is not None:
                with suppress(SinkError), anyio.move_on_after(self.waits):
                    await waiting
        await self._check(sent)

    async def test_another_sink_goes_on(self) -> None:
        """One for the same destination, behind what is there."""
        sent = [self._batch(count, 100, lost=count % 2) for count in (1, 1000, 2, 3)]
        for batch in sent:
            sink = await self._opened()
            await self._sent(sink, batch)
            await self._closed(sink)
        await self._check(sent)

    async def test_reopened(self) -> None:
        """In the middle, and before anything else."""
        sent = [self._batch(2), self._batch(2)]
        sink = await self._opened()
        for batch in sent:
            await self._in_time(sink.reopen(), "reopen")
            await self._sent(sink, batch)
        await self._closed(sink)
        await self._check(sent)

    async def test_memory_is_bounded(self) -> None:
        """However much is sent, the sink holds little of it."""
        async with entered(self.draining()):
            with traced():
                sink = await self._opened()
                await self._delivered(sink, (self._batch(128, 8192) for _ in range(8)))
                before, at_first = tracemalloc.get_traced_memory()[0], resident()
                tracemalloc.reset_peak()
                await self._delivered(sink, (self._batch(128, 8192) for _ in range(72)))
                kept = tracemalloc.get_traced_memory()[1] - before
                grown = resident() - at_first
            await self._closed(sink)
        hold(
            kept < self.memory and grown < self.memory + 32 * MIB,
            f"sent 72 MiB, {kept >> 20} MiB of it were held ({grown >> 20} MiB by the process): by the sink, or "
            "by its other end, if that is in this process (see draining)",
        )

    @needs("blockbuster")
    async def test_nothing_blocks_the_loop(self) -> None:
        """What the system may make wait is done in a thread; found on asyncio only."""
        from blockbuster import BlockingError, blockbuster_ctx

        sent = [self._batch(2, lost=1), self._batch(300, 2000)]
        sink = self.make()
        with blockbuster_ctx():
            try:
                await sink.open()
                for batch in sent:
                    await acknowledged(sink, batch)
                await sink.flush()
                await sink.reopen()
                await sink.aclose()
            except BlockingError as error:
                raise AssertionError(f"the event loop is blocked: {error}") from error
        await self._check(sent)

    # --- cancelled at each await

    @pytest.mark.parametrize("goes_on", ["the same", "another"])
    async def test_sending_cancelled(self, goes_on: Literal["the same", "another"]) -> None:
        """Of the batch whole events have arrived, in order, each once; what is sent next arrives whole."""
        sent: list[Any] = []

        async def cancel(step: int, way: Way) -> Outcome:
            sink = await self._opened()
            before, batch, after = self._batch(2), self._batch(80, 4000, lost=2), self._batch(2)
            await self._sent(sink, before)
            outcome = await self._in_time(
                cancelled_at(step, acknowledged(sink, batch), way), "send, cancelled,"
            )
            if goes_on == "another":
                await self._closed(sink)
                sink = await self._opened()
            await self._sent(sink, after)
            await self._closed(sink)
            sent.extend((before, batch if outcome.completed else Part(batch), after))
            return outcome

        await at_each_await(cancel)
        await self._check(sent)

    @pytest.mark.parametrize("method", ["flush", "reopen"])
    async def test_others_cancelled(self, method: Literal["flush", "reopen"]) -> None:
        """Nothing is lost by it, and the sink goes on."""
        sent: list[Any] = []

        async def cancel(step: int, way: Way) -> Outcome:
            sink = await self._opened()
            before, after = self._batch(20, 1000), self._batch(2, lost=1)
            await self._sent(sink, before)
            outcome = await self._in_time(cancelled_at(step, getattr(sink, method)(), way), method)
            await self._sent(sink, after)
            await self._flushed(sink)
            await self._closed(sink)
            sent.extend((before, after))
            return outcome

        await at_each_await(cancel)
        await self._check(sent)

    async def test_opening_cancelled(self) -> None:
        """Leaves nothing open."""
        await self._used()

        async def cancel(step: int, way: Way) -> Outcome:
            before, sink = held(), self.make()
            outcome = await self._in_time(cancelled_at(step, sink.open(), way), "open, cancelled,")
            if outcome.completed:
                await self._closed(sink)
            await self._settled(before)
            return outcome

        await at_each_await(cancel)

    async def test_closing_cancelled(self) -> None:
        """Leaves nothing open either; what was acknowledged has arrived."""
        sent: list[Any] = [await self._used()]

        async def cancel(step: int, way: Way) -> Outcome:
            before, batch = held(), self._batch(20, 1000)
            sink = await self._opened()
            await self._sent(sink, batch)
            outcome = await self._in_time(cancelled_at(step, sink.aclose(), way), "aclose, cancelled,")
            await self._settled(before)
            sent.append(batch)
            return outcome

        await at_each_await(cancel)
        await self._check(sent)

    async def test_nothing_is_left(self) -> None:
        """No descriptor and no thread, after a sink that was used and one that was not."""
        await self._used()
        before = held()
        for _ in range(3):
            await self._used()
            await self._closed(await self._opened())
        await self._settled(before)

    # --- how it is told what to do

    def test_delivery_options(self) -> None:
        """Every sink takes them, by keyword."""
        sink = self.make(
            when_full="drop_newest", queue_size=12345, retry_for=6.5, dead_letters="letters.jsonl"
        )
        has_options(sink, 12345, 6.5)
        sink = self.make()
        hold(isinstance(sink.name, str) and bool(sink.name), "a sink has a name")
        hold(sink.flush_every is None or sink.flush_every > 0, "flush_every is None, or seconds")
        given = (sink.when_full, sink.queue_size > 0, sink.dead_letters)
        hold(given == ("block", True, None), f"the defaults are the contract's, not {given}")
        refuses(lambda: self.make(when_full="sometimes"), "when_full")  # type: ignore[arg-type]
        refuses(lambda: self.make(queue_size=0), "queue_size")
        refuses(lambda: self.make(retry_for=-1), "retry_for")

    @needs("address")
    def test_the_address(self) -> None:
        """Means a sink of this class; takes the options that every sink takes, and tells of those that it does not."""
        address = self.address()
        start = address + ("&" if "?" in address else "?")
        hold(
            isinstance(self.make(), type(open_sink(address))), f"{address} is no {type(self.make()).__name__}"
        )
        options = "when_full=drop_newest&queue_size=64KiB&retry_for=5m&dead_letters=letters.jsonl"
        has_options(open_sink(start + options), 65536, 300.0)
        refuses(lambda: open_sink(start + "no_such_option=1"), "no_such_option")

    # --- when the other end does not want

    @needs("away")
    async def test_away(self) -> None:
        """What is offered again arrives once, however often it was offered, and nothing comes out but sinks' errors."""
        sent = [self._batch(2), self._batch(200, 4000, lost=2), self._batch(2)]
        sink = await self._opened()
        await self._sent(sink, sent[0])
        rest: Any = sent[1]
        async with entered(self.away()):
            for _ in range(3):
                rest = rest and await self._offered(acknowledged(sink, rest), rest)
        if rest:
            await self._sent(sink, rest)
        await self._sent(sink, sent[2])
        await self._closed(sink)
        await self._check([sent[0], Part(sent[1]) if rest is None else sent[1], sent[2]])

    @needs("away")
    async def test_away_in_the_middle(self) -> None:
        """At each await of send: `taken` says how many events have arrived."""
        sent: list[Any] = []

        async def leave(step: int, _: Way) -> Outcome:
            other = self.away()
            if isinstance(other, AbstractAsyncContextManager):
                return Outcome(reached=False, completed=False)
            sink = await self._opened()
            before, batch, after = self._batch(2), self._batch(200, 4000, lost=2), self._batch(2)
            await self._sent(sink, before)
            with ExitStack() as stack:
                steps = Steps(
                    acknowledged(sink, batch), step, lambda: stack.enter_context(other), again=False
                )
                rest = await self._offered(steps, batch)
            if rest:
                await self._sent(sink, rest)
            await self._sent(sink, after)
            await self._closed(sink)
            sent.extend((before, Part(batch) if rest is None else batch, after))
            return steps.outcome

        await at_each_await(leave, ("scope",))
        await self._check(sent)

    @needs("away")
    async def test_opening_and_closing_while_away(self) -> None:
        """In time, whatever is torn by it, and with nothing left."""
        await self._used()
        before = held()
        for batch in (None, self._batch(200, 4000, lost=1)):
            sink = await self._opened()
            await self._sent(sink, self._batch(1))
            async with entered(self.away()):
                if batch is not None:
                    await self._offered(acknowledged(sink, batch), batch)
                await self._closed(sink, 0.2)
                sink = self.make()
                try:
                    await self._in_time(sink.open(), "open")
                except SinkError:
                    continue
                await self._closed(sink, 0.2)
        await self._settled(before)

    @needs("gone")
    async def test_gone(self) -> None:
        """SinkClosedError, and nothing else; closing ends in time, with nothing left."""
        await self._used()
        before = held()
        sink = await self._opened()
        await self._sent(sink, self._batch(1))
        async with entered(self.gone()):
            try:
                for _ in range(1000):
                    await self._sent(sink, self._batch(10, 1000))
                hold(False, "nothing is raised, however much is sent")
            except SinkClosedError:
                await self._closed(sink, 0.2)
        await self._settled(before, less=True)

    @needs("rejecting")
    async def test_rejected(self) -> None:
        """SinkRejectedError; of the batch the events that it says have arrived; the next one arrives."""
        sent = [self._batch(2), self._batch(20, lost=1), self._batch(2)]
        sink = await self._opened()
        await self._sent(sink, sent[0])
        async with entered(self.rejecting()):
            try:
                await self._sent(sink, sent[1])
                taken = 20
            except SinkRejectedError as error:
                taken = error.taken
        hold(
            0 <= taken < 20,
            f"{taken} of 20 events are said to have arrived of a batch that was to be rejected",
        )
        await self._sent(sink, sent[2])
        await self._closed(sink)
        await self._check([sent[0], sent[1][:taken] if taken else Part(sent[1][:0]), sent[2]])
