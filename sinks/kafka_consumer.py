"""Records of a topic, for a member of a consumer group, whatever becomes of brokers meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from math import inf
from time import monotonic
from typing import Any, Final

from ebpfstream.errors import SinkError, SourceError
from ebpfstream.sinks import kafka_client
from ebpfstream.sinks.kafka_client import Security
from ebpfstream.turns import to_the_end
from ebpfstream.waiting import BackOff

_RETRY: Final = 2.0  # seconds until another attempt, less a random part: see BackOff
_ANSWER: Final = 5.0  # seconds for what a broker does at once, if it is there
_GOODBYE: Final = 3.0  # seconds to leave the group; it notices by itself, later
_IDLE: Final = 10.0  # seconds of waiting for records; then the client is asked again whether all is well
_LOOK: Final = 30  # seconds until new partitions, or a topic that has come back, are noticed
_AT_ONCE: Final = 500  # records that are taken from the client together
_HELD: Final = 16 << 20  # bytes, compressed, that a broker sends together

_log = logging.getLogger("ebpfstream")


class Member:
    """A member of a consumer group: records of the partitions that are its own, one or several at a time.

    Records are done with when the next ones are asked for; where the group stands is noted in Kafka some time later.
    When the partitions are shared out anew, what is at hand goes back, to come again, here or elsewhere: all but the
    records in hand, which are waited for, for a while.

    After errors that may pass, another consumer begins where the group stands.
    """

    def __init__(
        self,
        servers: list[str],
        topic: str,
        *,
        group: str,
        start: str,
        commit_every: float,
        session_timeout: float,
        security: Security,
    ) -> None:
        self._servers = servers
        self._topic = topic
        self._security = security
        self._commit_every = commit_every
        self._patience = session_timeout / 2
        self._starts_at_end = start == "latest"
        self._settings: dict[str, Any] = {
            "client_id": "ebpfstream",
            "group_id": group,
            "auto_offset_reset": start,
            "enable_auto_commit": False,
            "session_timeout_ms": int(session_timeout * 1000),
            "heartbeat_interval_ms": int(session_timeout * 1000 / 6),
            # Joining takes as long as the session.
            "request_timeout_ms": int((session_timeout + _ANSWER) * 1000),
            "metadata_max_age_ms": _LOOK * 1000,
            "fetch_max_bytes": _HELD,
        }
        self._back_off = BackOff(_RETRY, _RETRY)
        self._consumer: kafka_client.Consumer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._assigned = asyncio.Event()
        self._free = asyncio.Event()  # nothing is in hand
        self._free.set()
        self._at_hand: deque[Any] = deque()
        self._in_hand: list[Any] = []
        self._done: dict[int, int] = {}  # where each partition goes on, not noted in Kafka yet
        self._commit_at = inf
        self._committing: asyncio.Task[None] | None = None
        self._has_warned = False

    def next(self, most: int = 1) -> list[Any]:
        """The next records at hand; none if there is none, or something else is to be done first (`more`)."""
        self.put_down()
        if not self._at_hand or monotonic() >= self._commit_at:
            return []
        self._in_hand = [self._at_hand.popleft() for _ in range(min(most, len(self._at_hand)))]
        self._free.clear()
        return list(self._in_hand)

    def put_down(self) -> None:
        """What is in hand is done with."""
        if self._in_hand:
            for record in self._in_hand:
                self._done[record.partition] = record.offset + 1
            self._in_hand = []
            if self._commit_at == inf:
                self._commit_at = monotonic() + self._commit_every
            self._free.set()

    def put_back(self, count: int) -> None:
        """So many of those in hand, the last ones, come again next."""
        for _ in range(min(count, len(self._in_hand))):
            self._at_hand.appendleft(self._in_hand.pop())

    async def more(self) -> None:
        """Wait for records, for a while; where the group stands is noted meanwhile.  Raises SourceError."""
        consumer = await self.joined()
        if monotonic() >= self._commit_at:
            self._commit(consumer)
        # Also if there are some at hand: who does not ask for five minutes is put out of the group.
        most, wait = (1, 0.0) if self._at_hand else (_AT_ONCE, self._commit_every if self._done else _IDLE)
        if len(self._at_hand) < _AT_ONCE:
            try:
                await self._take(consumer, most, min(wait, _IDLE))
            except kafka_client.KafkaError as error:
                await self._failed(consumer, error)
        await asyncio.sleep(0)  # the client may not have waited

    async def joined(self) -> kafka_client.Consumer:
        """Be a member of the group, however long that takes.  Raises SourceError if it can never be."""
        if self._consumer is None:
            kafka_client.check_loop(SourceError)
            self._loop = asyncio.get_running_loop()
            try:
                settings = self._settings | await asyncio.to_thread(self._security.settings)
            except SinkError as error:
                raise SourceError(str(error)) from error
            while self._consumer is None:
                try:
                    self._consumer = await self._join(settings)
                except (kafka_client.KafkaError, *kafka_client.UNREACHABLE) as error:
                    await self._not_joined(error)
            self._has_warned = False
        return self._consumer

    async def _join(self, settings: dict[str, Any]) -> kafka_client.Consumer:
        consumer = kafka_client.Consumer(self._servers, settings)
        try:
            await consumer.start()
            await consumer.look_for(self._topic)
            self._assigned.clear()
            listener = kafka_client.listener(
                lambda: self._revoked(consumer), lambda partitions: self._given(consumer, partitions)
            )
            consumer.subscribe([self._topic], listener=listener)
            while not self._assigned.is_set():
                await self._take(consumer, _AT_ONCE, 0.1)
        except BaseException:
            self._at_hand.clear()
            await to_the_end(consumer.end, _GOODBYE)
            raise
        return consumer

    async def _not_joined(self, error: BaseException) -> None:
        if not kafka_client.is_passing(error):
            raise self._error(error) from error
        self._warn(f"{self._error(error)}; trying again")
        await self._back_off.pause()

    async def _take(self, consumer: kafka_client.Consumer, most: int, wait: float) -> None:
        found = await consumer.getmany(timeout_ms=int(wait * 1000), max_records=most)
        for records in found.values():
            self._at_hand.extend(records)

    async def _failed(self, consumer: kafka_client.Consumer, error: BaseException) -> None:
        """Go on with another consumer, if that may do.  Raises SourceError."""
        if not kafka_client.is_passing(error):
            raise self._error(error) from error
        self._warn(f"{self._error(error)}; beginning anew")
        self._consumer = None
        await to_the_end(self._end, consumer)
        await self._back_off.pause()

    async def _revoked(self, consumer: kafka_client.Consumer) -> None:
        """The partitions are shared out anew: each goes on from where this member has come."""
        self._at_hand.clear()
        try:
            async with asyncio.timeout(self._patience):
                await self._free.wait()
        except TimeoutError:
            pass  # it will be seen twice
        await self._committed(consumer, self._patience)
        self._forget()

    async def _given(self, consumer: kafka_client.Consumer, partitions: set[Any]) -> None:
        """These partitions are this member's own now.

        Where a group stands that begins at the end must be noted before anything has come: else another member would
        begin at a later end.
        """
        if self._starts_at_end:
            consumer.pause(*partitions)  # until then, the position is where the group stands
            try:
                async with asyncio.timeout(_ANSWER):
                    for partition in partitions:
                        self._done[partition.partition] = await consumer.position(partition)
                await self._committed(consumer, _ANSWER)
            except (TimeoutError, kafka_client.KafkaError) as error:
                self._warn(f"where the group begins cannot be noted in Kafka: {self._error(error)}")
            finally:
                consumer.resume(*partitions)
        self._assigned.set()

    def _commit(self, consumer: kafka_client.Consumer) -> asyncio.Task[None]:
        """Begin to note where the group stands, unless that is being done."""
        self._commit_at = inf
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._note(consumer))
        return self._committing

    async def _note(self, consumer: kafka_client.Consumer) -> None:
        done = dict(self._done)
        try:
            await consumer.commit(kafka_client.offsets(self._topic, done))
        except kafka_client.KafkaError as error:
            self._warn(f"where the group stands cannot be noted in Kafka, so events may come again: {error}")
        else:
            self._has_warned = False
        self._done = {where: offset for where, offset in self._done.items() if done.get(where) != offset}
        if self._done:
            self._commit_at = min(self._commit_at, monotonic() + self._commit_every)

    async def _committed(self, consumer: kafka_client.Consumer, within: float) -> None:
        """Wait until all that is done with has been noted, but not longer than so many seconds."""
        until = monotonic() + within
        if self._committing is not None:
            await asyncio.wait([self._committing], timeout=within)
        if self._done:
            await asyncio.wait([self._commit(consumer)], timeout=max(until - monotonic(), 0))
        if self._done:
            self._warn("where the group stands was not noted in Kafka in time, so events may come again")

    def _forget(self) -> None:
        """What is at hand, in hand or done with is others' now."""
        self._at_hand.clear()
        self._in_hand = []
        self._free.set()
        self._done.clear()
        self._commit_at = inf

    async def leave(self) -> None:
        """Note where the group stands, and leave it; what is in hand will come again."""
        consumer, self._consumer = self._consumer, None
        self._at_hand.clear()
        self._in_hand = []
        self._free.set()
        if consumer is not None:
            await self._committed(consumer, _GOODBYE)
            await self._end(consumer)

    async def _end(self, consumer: kafka_client.Consumer) -> None:
        self._forget()
        if self._committing is not None:
            self._committing.cancel()
        await consumer.end(_GOODBYE)

    def abandon(self) -> None:
        """The same when nobody is there any more to wait for it."""
        if self._consumer is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._leave_alone)

    def _leave_alone(self) -> None:
        self._leaving = asyncio.ensure_future(self.leave())

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning("%s", text)

    def _error(self, error: BaseException) -> SourceError:
        return SourceError(kafka_client.explanation(error, self._servers, self._topic))
