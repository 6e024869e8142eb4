"""Events back from a Kafka topic, on any machine."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from math import inf
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, Unpack

from ebpfstream.catalogue import EVENT_TYPES, AnyEvent
from ebpfstream.completeness import Completeness
from ebpfstream.errors import ArgumentError, DecodeError
from ebpfstream.events import Event
from ebpfstream.lost import Lost
from ebpfstream.options import check_choice
from ebpfstream.origin import Origin
from ebpfstream.parsing import parser
from ebpfstream.sinks.kafka_client import Login, Security, bootstrap_servers
from ebpfstream.sinks.kafka_consumer import Member
from ebpfstream.sinks.kafka_records import schema_header
from ebpfstream.turns import Stream

E = TypeVar("E", bound=Event)
Y_co = TypeVar("Y_co", covariant=True)


class Options(Login, total=False):
    """What KafkaSource takes as well; see there."""

    start: Literal["earliest", "latest"]
    commit_every: float
    session_timeout: float
    doubles: Literal["drop", "yield"]


Batch = list[tuple[Origin | None, Y_co]]
"""Events, each with the machine, boot and stream that it comes from; None where a record does not tell."""


class KafkaSource(Stream, Generic[Y_co]):
    """The events that KafkaSink sent to a topic, with their types, for a member of a consumer group.

        async for event in KafkaSource("127.0.0.1:9092", "exec", group="watchers"):
            ...

    The members of a `group` share the topic's partitions, and each event goes to one of them.  A new group begins at
    the "earliest" event that there is, or at the "latest": with what comes after it was joined.

    **At least once.**  An event is done with when the next one is asked for, or the block (`async with`) is left
    without an error.  Where the group stands is noted in Kafka every `commit_every` seconds, when members come or go,
    and at the end; what was done since then comes again if this process is killed, and other members have its
    partitions after `session_timeout` seconds.  So they do of a process whose event loop is held up for as long, or
    that does not ask for an event in five minutes.

    Numbered events that come again are left out (`doubles="drop"`), as far as this object has seen them.
    `completeness()` says what has come of every stream, and what is missing; losses are counted there, and with
    `on_lost="yield"` they come among the events.

    `types` are those that the topic's events may have, by default those of all ready-made streams; a record without a
    schema, as of another program, is read as the only type that there is.  What does not fit raises DecodeError, and
    the next call goes on after it.

    Connects when it is entered or iterated.  A Kafka that is not there, or goes away, is waited for; a topic that is
    not there, and what this user may not do, raises SourceError.  `tls`, `sasl` and the like are as for KafkaSink.
    Leave it by `async with`, or call `aclose()`, after which the event in hand will come again: either notes where the
    group stands, and leaves it.  Needs the extra `kafka`, and asyncio.
    """

    @typing.overload
    def __init__(
        self: KafkaSource[AnyEvent],
        servers: str,
        topic: str,
        *,
        group: str,
        on_lost: Literal["count"] = ...,
        **options: Unpack[Options],
    ) -> None: ...
    @typing.overload
    def __init__(
        self: KafkaSource[AnyEvent | Lost],
        servers: str,
        topic: str,
        *,
        group: str,
        on_lost: Literal["yield"],
        **options: Unpack[Options],
    ) -> None: ...
    @typing.overload
    def __init__(
        self: KafkaSource[E],
        servers: str,
        topic: str,
        *,
        group: str,
        types: Sequence[type[E]],
        on_lost: Literal["count"] = ...,
        **options: Unpack[Options],
    ) -> None: ...
    @typing.overload
    def __init__(
        self: KafkaSource[E | Lost],
        servers: str,
        topic: str,
        *,
        group: str,
        types: Sequence[type[E]],
        on_lost: Literal["yield"],
        **options: Unpack[Options],
    ) -> None: ...
    def __init__(
        self,
        servers: str,
        topic: str,
        *,
        group: str,
        types: Sequence[type[Event]] | None = None,
        on_lost: Literal["count", "yield"] = "count",
        start: Literal["earliest", "latest"] = "earliest",
        commit_every: float = 1.0,
        session_timeout: float = 10.0,
        doubles: Literal["drop", "yield"] = "drop",
        **login: Unpack[Login],
    ) -> None:
        super().__init__("event")
        check_choice("start", start, Literal["earliest", "latest"])
        check_choice("doubles", doubles, Literal["drop", "yield"])
        check_choice("on_lost", on_lost, Literal["count", "yield"])
        if not group or not topic:
            raise ArgumentError("group and topic must have names")
        if types is None:
            types = tuple(EVENT_TYPES.values())
        if not types:
            raise ArgumentError("there is no type to read events as: give one or more")
        for name, seconds in (("commit_every", commit_every), ("session_timeout", session_timeout)):
            if not 0 < seconds < inf:
                raise ArgumentError(f"{name}={seconds} is impossible: give seconds, more than 0")
        security = Security(**login)
        security.check()
        self._topic = topic
        self._parsers = {schema_header(of).encode(): parser(of) for of in types}
        self._names = ", ".join(map(schema_header, types))
        first, *others = self._parsers.values()
        if not others:
            self._parsers[b""] = first
        self._parsers[b"lost"] = first
        self._drops_doubles = doubles == "drop"
        self._yields_lost = on_lost == "yield"
        self._completeness = Completeness()
        self._origins: dict[tuple[bytes, ...], Origin] = {}
        self._of_last: Origin | None = None
        self._member = Member(
            bootstrap_servers(servers),
            topic,
            group=group,
            start=start,
            commit_every=commit_every,
            session_timeout=session_timeout,
            security=security,
        )

    async def _open(self) -> None:
        with self._turn.waiting():  # aclose() ends it
            await self._member.joined()
        self._turn.check_open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._member.put_down()
        await super().__aexit__(kind, error, traceback)

    async def __anext__(self) -> Y_co:
        """The next event.

        Raises DecodeError (the next call goes on after it), SourceError, StreamClosedError, StreamBusyError.
        """
        while True:
            for record in self._member.next():
                event: Y_co | None = self._read(record)
                if event is not None:
                    return event
                break
            else:
                await self._more()

    def batches(self, most: int = 500) -> Batches[Y_co]:
        """The same several at a time: lists of up to `most` events that are there, each with where it comes from.

            async for batch in source.batches():
                for origin, event in batch: ...

        All of a list are done with when the next one is asked for: so they can be put into a database in one
        transaction.  Iterating raises what iterating by event does.  Raises ArgumentError.
        """
        if most < 1:
            raise ArgumentError(f"most={most} is impossible: give 1 or more")
        return Batches(self, most)

    async def _next_batch(self, most: int) -> Batch[Y_co]:
        while True:
            records = self._member.next(most)
            if batch := self._read_all(records):
                return batch
            if not records:
                await self._more()

    def _read_all(self, records: list[Any]) -> Batch[Y_co]:
        """Those before the first that does not fit, which comes again alone: then it raises DecodeError."""
        batch: Batch[Y_co] = []
        for place, record in enumerate(records):
            try:
                event: Y_co | None = self._read(record)
            except DecodeError:
                self._member.put_back(len(records) - place - (not batch))
                if not batch:
                    raise
                break
            if event is not None:
                batch.append((self._of_last, event))
        return batch

    async def _more(self) -> None:
        with self._turn.taken():
            with self._turn.waiting():  # aclose() ends it
                await self._member.more()
            self._turn.check_open()

    def _read(self, record: Any) -> Any:
        """The event; None for what is not to be seen."""
        headers = dict(record.headers)
        schema = headers.get("schema", b"")
        try:
            parse = self._parsers.get(schema)
            if parse is None:
                raise DecodeError(
                    f"the schema is {schema.decode(errors='replace') or 'not told'}, and {self._names} is what is read "
                    "here: give its type in types="
                )
            event = parse(record.value)
            return event if self._is_to_be_seen(event, headers) else None
        except DecodeError as error:
            place = f"partition {record.partition}, offset {record.offset} of {self._topic}"
            raise DecodeError(f"{place}: {error}") from None

    def _is_to_be_seen(self, event: Any, headers: dict[str, bytes]) -> bool:
        origin = self._of_last = self._origin(headers)
        if isinstance(event, Lost):
            is_new = origin is None or self._completeness.tell(origin, event)
            return self._yields_lost and (is_new or not self._drops_doubles)
        if origin is None or "sequence" not in headers:
            return True
        try:
            cpu, *program, number = map(int, headers["sequence"].split(b"/"))
        except ValueError:
            raise DecodeError(
                f"{headers['sequence']!r} is no sequence: CPU, program and number are expected"
            ) from None
        is_new = self._completeness.add(origin, cpu, program[0] if program else 0, number)
        return is_new or not self._drops_doubles

    def _origin(self, headers: dict[str, bytes]) -> Origin | None:
        try:
            told = headers["host"], headers["boot"], headers["stream"]
        except KeyError:
            return None
        origin = self._origins.get(told)
        if origin is None:
            origin = self._origins[told] = Origin(*(name.decode(errors="replace") for name in told))
        return origin

    @property
    def origin(self) -> Origin | None:
        """Where the event that came last comes from: with its CPU, program and sequence number, its name for good.

        None if none has come, and for a record that does not tell, as of another program.
        """
        return self._of_last

    def completeness(self) -> Completeness:
        """What has come so far of each stream, and what is missing."""
        return self._completeness

    async def _free(self) -> None:
        await self._member.leave()

    def __del__(self) -> None:
        member = getattr(self, "_member", None)  # there is none if a wrong argument was given
        if member is not None:
            member.abandon()


class Batches(Generic[Y_co]):
    """A source's events several at a time, as an asynchronous iterator."""

    def __init__(self, source: KafkaSource[Y_co], most: int) -> None:
        self._source = source
        self._most = most

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch[Y_co]:
        return await self._source._next_batch(self._most)  # noqa: SLF001
