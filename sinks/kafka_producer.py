"""Records on their way to Kafka's partitions: in order, at least once, whatever becomes of brokers meanwhile."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Generator, Sequence
from contextlib import suppress
from typing import Any, Final

from ebpfstream.errors import SinkError, SinkRejectedError
from ebpfstream.sinks import kafka_client
from ebpfstream.sinks.kafka_records import Record
from ebpfstream.waiting import BackOff

# Seconds until a new producer takes the place of one that has failed: see BackOff.
_FIRST_DELAY: Final = 0.25
_LONGEST_DELAY: Final = 10.0
# aiokafka (0.14) does not wrap sequence numbers as brokers do: a producer ends before it comes to that.
_MOST_RECORDS: Final = 2**31 - 2**24
# aiokafka tries a batch again for ever, as long as its partition has a leader.  Seconds after which a new producer
# looks at things anew, as a multiple of the time that a request may take.
_STALLED: Final = 3
_SILENT: Final = 5.0  # seconds without an acknowledgement until that is said

_log = logging.getLogger("ebpfstream")


class Receipt(Awaitable[None]):
    """Awaits the arrival of some records, of one batch of events; raises SinkRejectedError if some never will."""

    def __init__(self, losses: int) -> None:
        self._losses = losses
        self._left = 0
        self._rejected: list[int] = []
        self._reason = ""
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(_looked_at)  # whoever awaits it may have been cancelled

    def __await__(self) -> Generator[Any, None, None]:
        return asyncio.shield(self._done).__await__()

    def expect(self) -> None:
        """One part more."""
        self._left += 1

    def reject(self, number: int, reason: str) -> None:
        """The record of that number, losses counted first, will never arrive."""
        self._reason = reason
        if number >= self._losses:
            self._rejected.append(number - self._losses)

    def arrived(self) -> None:
        """One part has."""
        self._left -= 1
        if not self._left and not self._done.done():
            if self._reason:
                self._done.set_exception(SinkRejectedError(self._reason, rejected=self._rejected))
            else:
                self._done.set_result(None)

    def lost(self) -> None:
        """It will not be known any more."""
        if not self._done.done():
            self._done.set_exception(SinkError("closed before this had arrived: give aclose() more time"))


class _Part:
    """Records of one batch of events for one partition."""

    def __init__(self, numbers: list[int], records: list[Record], receipt: Receipt) -> None:
        self.numbers = numbers
        self.records = records
        self.receipt = receipt
        self.size = sum(record.size for record in records)
        self.arrived = 0
        """How many of them have."""


class _Partition:
    """What waits for one partition, and what of it is on its way.

    A batch is made only when the one before it has arrived.  Two would be quicker by little, but the second could
    arrive though the first has failed, and before it: what it holds would be out of order.
    """

    def __init__(self, topic: str, number: int) -> None:
        self.topic = topic
        self.number = number
        self.parts: deque[_Part] = deque()
        self.on_the_way: tuple[asyncio.Future[Any], int] | None = None
        """Whether a batch has arrived, and how many records it has: the first ones."""
        self.something = asyncio.Event()
        self.worker: asyncio.Task[None] | None = None
        self._most: int | None = None
        """Records that a batch may have, after one was rejected; None: as many as fit."""

    def add(self, part: _Part) -> None:
        self.parts.append(part)
        self.something.set()

    def fill(self, builder: Any) -> int:
        """Append to a batch what has not arrived, as much as it takes; how many records."""
        count = 0
        append = builder.append
        for part in self.parts:
            for at in range(part.arrived, len(part.records)):
                key, value, timestamp, headers, _ = part.records[at]
                is_full = count == self._most
                if is_full or append(timestamp=timestamp, key=key, value=value, headers=headers) is None:
                    return count
                count += 1
        return count

    def acknowledge(self, count: int) -> int:
        """The first so many have arrived; how many bytes that were, of whole parts."""
        freed = self._remove(count)
        if self._most is not None:
            self._most = 2 * self._most if count == self._most else None
        return freed

    def narrow(self, count: int, reason: str) -> int:
        """A batch of so many was rejected: find out for which record, and give that up; what `acknowledge` returns."""
        self._most = max(count // 2, 1)
        if count > 1:
            return 0
        part = self.parts[0]
        part.receipt.reject(part.numbers[part.arrived], reason)
        return self._remove(1)

    def _remove(self, count: int) -> int:
        freed = 0
        while count:
            part = self.parts[0]
            now = min(count, len(part.records) - part.arrived)
            part.arrived += now
            count -= now
            if part.arrived == len(part.records):
                self.parts.popleft()
                freed += part.size
                part.receipt.arrived()
        return freed


class _StalledError(Exception):
    """A batch has not arrived for a long time."""


class _RenewalError(Exception):
    """A producer has done its part; the next one goes on at once."""


class Sending:
    """Sends records to topics, and again what has not arrived, in order within each partition.

    Every producer ends with its first failure: a broker would take nothing more of it, out of order as that would seem.
    The next one begins with what the one before was not sure of, so some records may arrive twice.

    Where a topic has come to have another number of partitions, the next producer spreads by that: a key's records may
    go on in another partition than before.
    """

    def __init__(self, servers: list[str], settings: dict[str, Any], request_timeout: float) -> None:
        self._servers = servers
        self._settings = settings
        self._stalled = request_timeout * _STALLED
        self._partitions: dict[tuple[str, int], _Partition] = {}
        self._counts: dict[str, int] = {}
        self._closing_within = 2.0  # seconds
        self._back_off = BackOff(_FIRST_DELAY, _LONGEST_DELAY)
        self._producer: kafka_client.Producer | None = None  # while it is connected
        self._broken: asyncio.Future[None] | None = None  # why it is not any more
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()  # set when something has happened that one may wait for
        self._was_connected = False
        self.held = 0
        """Bytes of records that have not arrived."""
        self.error: BaseException | None = None
        """Why nothing arrives now."""
        self.failed = False
        """Whether there never was a connection, and will not be until somebody changes something."""

    def start(self) -> None:
        """Begin to connect.  Raises RuntimeError, ValueError for settings that cannot be."""
        self._task = asyncio.create_task(self._run(self._new_producer()), name="ebpfstream kafka")

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._producer is not None

    async def changed(self, within: float) -> None:
        """Wait until something arrives, connects or fails."""
        self._changed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self._changed.wait()

    async def partitions(self, topic: str) -> int | None:
        """How many a topic has; None while there is no connection.

        Raises aiokafka's errors: there is no such topic, or it is not for us.
        """
        if self._producer is not None and topic not in self._counts:
            assert self._broken is not None
            asking = asyncio.ensure_future(kafka_client.partitions(self._producer, topic))
            asking.add_done_callback(_looked_at)
            try:
                either: list[asyncio.Future[Any]] = [asking, self._broken]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if asking.done():
                    self._counts[topic] = asking.result()
            except kafka_client.UNREACHABLE as error:
                self._break(error)
                return None
            finally:
                asking.cancel()
        return self._counts.get(topic) if self._producer is not None else None

    def put(self, topic: str, records: Sequence[Record], losses: int) -> Receipt:
        """Let records arrive at a topic whose partitions are known."""
        receipt = Receipt(losses)
        self._spread(topic, range(len(records)), records, receipt)
        return receipt

    def _spread(
        self, topic: str, numbers: Sequence[int], records: Sequence[Record], receipt: Receipt
    ) -> None:
        """Add records, with their numbers in the batch of events, to the partitions that they are for."""
        count = self._counts[topic]
        keys = [record.key for record in records]
        where: dict[bytes | None, int] = {None: random.randrange(count)}  # noqa: S311  # no secret depends on it
        where.update(kafka_client.partitions_of({key for key in keys if key is not None}, count).items())
        parts: dict[int, tuple[list[int], list[Record]]] = {}
        for number, record, key in zip(numbers, records, keys, strict=True):
            chosen = parts.setdefault(where[key], ([], []))
            chosen[0].append(number)
            chosen[1].append(record)
        for partition, chosen in parts.items():
            receipt.expect()
            self._add(topic, partition, _Part(*chosen, receipt))

    def _add(self, topic: str, number: int, part: _Part) -> None:
        found = self._partitions.get((topic, number))
        if found is None:
            found = self._partitions[topic, number] = _Partition(topic, number)
        found.add(part)
        self.held += part.size
        if self._producer is not None and found.worker is None:
            self._work(self._producer, found)

    async def close(self, deadline: float) -> None:
        """Stop sending, within so many seconds; what has not arrived does not any more."""
        self._closing_within = deadline
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        for partition in self._partitions.values():
            for part in partition.parts:
                part.receipt.lost()

    # --- one producer after the other

    def _new_producer(self) -> kafka_client.Producer:
        return kafka_client.Producer(self._servers, self._settings)

    async def _run(self, producer: kafka_client.Producer) -> None:
        while True:
            try:
                await self._connect(producer)
                assert self._broken is not None
                await self._broken
            except _RenewalError:
                pass
            except Exception as error:  # of aiokafka, which also lets out what Python and the system raise
                self._note(error)
                if self.failed:
                    return
            finally:
                await self._disconnect(producer)
            if self.error is not None:
                await self._back_off.pause()
            producer = self._new_producer()

    async def _connect(self, producer: kafka_client.Producer) -> None:
        async with asyncio.timeout(self._stalled):
            await producer.start()
        for topic in {topic for topic, _ in self._partitions}:
            count = await kafka_client.partitions(producer, topic)
            if self._counts[topic] != count:  # it was made anew, or larger
                self._counts[topic] = count
                self._spread_again(topic)
        self._broken = asyncio.get_running_loop().create_future()
        self._broken.add_done_callback(_looked_at)
        self._producer, self._was_connected = producer, True
        if not self.held:
            self._note_well()
        for partition in self._partitions.values():
            self._work(producer, partition)
        self._changed.set()

    def _spread_again(self, topic: str) -> None:
        """Choose partitions for all that has not arrived; what has the same key stays in order."""
        for where in [where for where in self._partitions if where[0] == topic]:
            for part in self._partitions.pop(where).parts:
                self.held -= part.size
                self._spread(topic, part.numbers[part.arrived :], part.records[part.arrived :], part.receipt)
                part.receipt.arrived()  # as another one

    async def _disconnect(self, producer: kafka_client.Producer) -> None:
        self._producer = None
        workers = [found.worker for found in self._partitions.values() if found.worker is not None]
        for worker in workers:
            worker.cancel()
        try:
            await producer.end(self._closing_within)
        finally:
            await asyncio.gather(*workers, return_exceptions=True)
            self._settle()

    def _settle(self) -> None:
        """What was on its way has arrived meanwhile, or is sent again."""
        for partition in self._partitions.values():
            partition.worker = None
            if partition.on_the_way is not None:
                arrival, count = partition.on_the_way
                partition.on_the_way = None
                if arrival.done() and not arrival.cancelled() and arrival.exception() is None:
                    self._acknowledge(partition, count)
        self._changed.set()

    def _break(self, error: BaseException) -> None:
        """Let the producer end."""
        assert self._broken is not None
        if not self._broken.done():
            self._broken.set_exception(error)

    def _note(self, error: BaseException) -> None:
        """Remember why nothing arrives, and say so the first time."""
        self.failed = not self._was_connected and kafka_client.is_final(error)
        if self.error is None and not self.failed:
            _log.warning("%s; trying again", self.explain(error, ""))
        self.error = error
        self._changed.set()

    def _note_well(self) -> None:
        self._back_off.reset()
        if self.error is not None:
            self.error = None
            _log.warning("Kafka at %s: going on", ",".join(self._servers))

    def explain(self, error: BaseException, topic: str) -> str:
        """What went wrong, and what to do about it."""
        if isinstance(error, _StalledError):
            return str(error)
        return kafka_client.explanation(error, self._servers, topic)

    # --- one batch after the other

    def _work(self, producer: kafka_client.Producer, partition: _Partition) -> None:
        partition.worker = asyncio.create_task(self._send(producer, partition))
        partition.worker.add_done_callback(self._worked)

    def _worked(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled() and (error := worker.exception()) is not None:
            self._break(error)

    async def _send(self, producer: kafka_client.Producer, partition: _Partition) -> None:
        """Send what there is for one partition, for as long as the producer lives."""
        sent = 0
        while sent < _MOST_RECORDS:
            if not partition.parts:
                partition.something.clear()
                await partition.something.wait()
            batch = producer.create_batch()
            count = partition.fill(batch)
            batch.close()
            arrival = await producer.send_batch(batch, partition.topic, partition=partition.number)
            arrival.add_done_callback(_looked_at)
            partition.on_the_way = arrival, count
            await self._arrive(partition, arrival, count)
            sent += count
        raise _RenewalError

    async def _arrive(self, partition: _Partition, arrival: asyncio.Future[Any], count: int) -> None:
        silent = min(_SILENT, self._stalled)
        for patience in (silent, self._stalled - silent):
            await asyncio.wait([arrival], timeout=patience)  # which does not cancel it
            if arrival.done():
                break
            stalled = _StalledError(
                f"Kafka at {','.join(self._servers)} does not acknowledge what is sent to {partition.topic!r}: look "
                "whether it runs, and whether the topic's partitions have leaders, and replicas enough in step"
            )
            self._note(stalled)
        else:
            raise stalled
        try:
            arrival.result()
        except kafka_client.REJECTED as error:
            partition.on_the_way = None
            self.held -= partition.narrow(count, self.explain(error, partition.topic))
            self._changed.set()
            raise _RenewalError from error
        partition.on_the_way = None
        self._acknowledge(partition, count)

    def _acknowledge(self, partition: _Partition, count: int) -> None:
        self.held -= partition.acknowledge(count)
        self._note_well()
        self._changed.set()


def _looked_at(done: asyncio.Future[Any]) -> None:
    """Asyncio complains of errors that nobody looked at."""
    if not done.cancelled():
        done.exception()
