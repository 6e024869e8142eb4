"""Events as Kafka's records: key, value, headers, time."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from struct import unpack
from typing import Any, Final, NamedTuple

from ebpfstream import text
from ebpfstream.batch import EventBatch
from ebpfstream.columns import Integers
from ebpfstream.errors import ArgumentError
from ebpfstream.events import Integer, WallClock, layout, schema_version
from ebpfstream.lost import Lost

HOST: Final = "host"
"""In a key: the machine's name."""
DEFAULT_KEY: Final = "host,pid"
"""A process's events stay in order; of types without a pid, the host's."""

_OVERHEAD: Final = 24  # bytes of a record beside key, value and headers, at most
_MURMUR, _MURMUR_SEED = 0x5BD1E995, 0x9747B28C


class Record(NamedTuple):
    """One event, or one loss."""

    key: bytes | None
    value: bytes
    timestamp: int | None
    """When it happened, in milliseconds since the epoch; None for now."""
    headers: list[tuple[str, bytes]]
    size: int
    """Its bytes in a batch, or a few more."""


class Shape:
    """How events of a type become records.

    The headers are `schema` (the type's name, and its version: `exec-event/1`; or `lost`), and of events that come
    from a stream `host`, `boot`, `stream` (see Origin) and, if they are numbered, `sequence`: CPU, program, number
    (`0/0/17`), or for a loss CPU, first and last (`0/12-16`).  All together name an event for good.
    """

    def __init__(self, event_type: type[Any], key: str | None) -> None:
        plan = layout(event_type)
        stored = {member.name: member.kind for member in plan.members}
        self._schema = schema_header(event_type).encode()
        self._host = socket.gethostname().encode()  # of batches that come from no stream
        self._key = _key_fields(event_type, key)
        fields = [name for name in self._key if name != HOST]
        # Keys of whole numbers are had without making events.
        self._from_events = not all(
            isinstance(stored.get(name), Integer) and plan.types[name] is int for name in fields
        )
        numbers = [name for name in ("cpu", "program", "sequence") if name in stored]
        self._numbered = numbers if {"cpu", "sequence"} <= set(numbers) else []
        self._sequence = b"/".join([b"%d"] * len(self._numbered))
        clock = plan.kinds.get("time")
        self._clock = [clock.source] if isinstance(clock, WallClock) else []
        fields = [] if self._from_events else fields
        self._integers = Integers(event_type, [*self._numbered, *self._clock, *fields])

    def records(self, batch: EventBatch[Any]) -> list[Record]:
        """The losses, then the events.  Raises DecodeError."""
        lines = batch.to_json_lines().split(b"\n")
        named = batch.origin._asdict() if batch.origin else {}
        origin = [(name, value.encode()) for name, value in named.items()]
        host = origin[0][1] if origin else self._host
        made = [self._loss(lost, line, host, origin) for lost, line in zip(batch.lost, lines, strict=False)]
        lines = lines[len(made) : -1]  # after the last line comes nothing
        # In columns: one call for each record would cost as much as all of these.
        picked, numbered = self._integers.of(batch.records), len(self._numbered)
        keys = self._keys_of(batch, picked, host)
        sequences = [self._sequence % values[:numbered] for values in picked]
        head = [("schema", self._schema), *origin]
        headers = [[*head, ("sequence", one)] for one in sequences] if numbered else [head] * len(lines)
        timestamps: list[int | None] = [None] * len(lines)
        if self._clock:
            offset = batch.wall_clock_offset
            timestamps = [(values[numbered] + offset) // 1_000_000 for values in picked]
        overhead = _overhead([*head, ("sequence", b"")])
        sizes = [
            overhead + len(key or b"") + len(line) + len(sequence)
            for key, line, sequence in zip(keys, lines, sequences, strict=True)
        ]
        made += map(Record, keys, lines, timestamps, headers, sizes)
        return made

    def _keys_of(
        self, batch: EventBatch[Any], picked: list[tuple[int, ...]], host: bytes
    ) -> Sequence[bytes | None]:
        if not self._key:
            return [None] * len(picked)
        if self._from_events:
            return [self._key_of(event, host.decode()) for event in batch.with_lost(())]
        form = b"/".join([host.replace(b"%", b"%%") if name == HOST else b"%d" for name in self._key])
        start = len(self._numbered) + len(self._clock)
        return [form % values[start:] for values in picked]

    def _key_of(self, event: Any, host: str) -> bytes:
        return "/".join(host if name == HOST else str(getattr(event, name)) for name in self._key).encode()

    def _loss(self, lost: Lost, line: bytes, host: bytes, origin: list[tuple[str, bytes]]) -> Record:
        headers = [("schema", b"lost"), *origin]
        if lost.first_sequence is not None and lost.last_sequence is not None:
            numbers = (lost.cpu or 0, lost.first_sequence, lost.last_sequence)
            headers.append(("sequence", b"%d/%d-%d" % numbers))
        timestamp = int(lost.time.timestamp() * 1000) if lost.time else None
        key = host if HOST in self._key else None
        return Record(key, line, timestamp, headers, _overhead(headers) + len(key or b"") + len(line))


def _overhead(headers: list[tuple[str, bytes]]) -> int:
    """Bytes of a record beside its key and value, at most."""
    return _OVERHEAD + sum(len(name) + len(value) + 4 for name, value in headers)


def schema_header(event_type: type[Any]) -> str:
    """The name and version of an event type's JSON: `exec-event/1`."""
    version = schema_version(event_type)
    name = text.hyphenated(event_type.__name__)
    return name if version is None else f"{name}/{version}"


def murmur2(keys: Sequence[bytes]) -> Sequence[int]:
    """The hashes, as Kafka's own clients make them, of keys that are all of one length.

    All at once: each key has 64 bits of one large number, and what is done to that costs little more than what is
    done to a small one.
    """
    count, length = len(keys), len(keys[0])
    ones = int.from_bytes(b"\1\0\0\0\0\0\0\0" * count, "little")
    low = ones * 0xFFFFFFFF  # the halves that have the numbers; the others are for what multiplying carries
    joined = b"".join(keys)

    def part(start: int) -> int:
        """Up to four bytes of each key as a number."""
        taken = bytearray(8 * count)
        for index in range(start, min(start + 4, length)):
            taken[index - start :: 8] = joined[index::length]
        return int.from_bytes(taken, "little")

    def folded(numbers: int, shift: int) -> int:
        return numbers ^ (numbers >> shift & low)

    rest = length % 4
    hashes = ones * (_MURMUR_SEED ^ length)
    for start in range(0, length - rest, 4):
        mixed = folded(part(start) * _MURMUR & low, 24) * _MURMUR & low
        hashes = hashes * _MURMUR & low ^ mixed
    if rest:
        hashes = (hashes ^ part(length - rest)) * _MURMUR & low
    hashes = folded(folded(hashes, 13) * _MURMUR & low, 15)
    return unpack(f"<{count}Q", hashes.to_bytes(8 * count, "little"))


def check_key(key: str | None) -> None:
    """Raises ArgumentError for what can be no key of any type."""
    if key is not None and not all(re.fullmatch(r"\w+", name.strip()) for name in key.split(",")):
        raise ArgumentError(f"key={key!r} is impossible: give names of fields with commas between, or host")


def _key_fields(event_type: type[Any], key: str | None) -> list[str]:
    kinds = layout(event_type).kinds
    if key is None:
        return []
    if key == DEFAULT_KEY:
        return [HOST, "pid"] if "pid" in kinds else [HOST]
    names = [name.strip() for name in key.split(",")]
    for name in names:
        if name != HOST and name not in kinds:
            listed = ", ".join([HOST, *kinds])
            raise ArgumentError(
                f"key={key!r}: {event_type.__name__} has no field {name!r}; there are {listed}"
            )
    return names
