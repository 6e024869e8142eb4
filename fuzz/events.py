"""Samples through decoders and encoders, held against one that reads a field at a time; descriptions of types."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import Annotated, Any, Final
from unittest import mock

from ebpfstream import codec, descriptions, text
from ebpfstream.batch import EventBatch
from ebpfstream.c_types import FLOATS, NUMBERS, CType, Record
from ebpfstream.catalogue import EVENT_TYPES
from ebpfstream.errors import ArgumentError, DecodeError, EventTypeError
from ebpfstream.events import (
    I8,
    I16,
    I32,
    I64,
    LENGTH_SUFFIX,
    U8,
    U16,
    U32,
    U64,
    Array,
    Char,
    Comm,
    Computed,
    Embedded,
    Event,
    Flag,
    Integer,
    Kind,
    Layout,
    Tail,
    WallClock,
    layout,
)
from ebpfstream.kernel import cgroups
from ebpfstream.records import Records, Run

_OFFSET: Final = 1_700_000_000_123_456_789  # of the wall clock
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _both(number: int, name: str) -> tuple[int, str]:
    return number, name


@dataclass
class Fixed(Event):
    """Every kind of field but tails."""

    small: I8
    short: U16
    signed: I32
    wide: U64
    deep: I64
    flag: Flag
    comm: Comm
    raw: Annotated[bytes, Char(3)]
    ports: Annotated[tuple[int, ...], Array(Integer(2), 3)]
    pair: Annotated[tuple[int, ...], Embedded(8, struct.Struct("<iI").unpack)]
    when: Annotated[datetime, WallClock("wide")]
    both: Annotated[tuple[int, str], Computed(_both, ("signed", "comm"))]
    last: U8


@dataclass
class Tailed(Event):
    """Every kind of tail."""

    number: I16
    name: Annotated[str, Tail()]
    words: Annotated[tuple[str, ...], Tail()]
    shout: Annotated[str, Computed(str.upper, ("name",))]
    flag: Flag
    blob: Annotated[bytes, Tail()]
    size: Annotated[int, Tail(len)]
    time: U64
    when: Annotated[datetime, WallClock("time")]


@dataclass(frozen=True)
class Frozen(Event):
    """One that is made by its own code."""

    number: U32
    name: Annotated[str, Char(5)]


_INNER: Final = [
    "in_t",
    [["a", "unsigned char"], ["__pad_1", "char", [1]], ["b", "unsigned short"]],
    "struct_packed",
]
_BITS: Final = [
    "bits",
    [["low", "unsigned int", 4], ["byte", "unsigned char"], ["sign", "short", 3]],
    "struct",
]
_DERIVED: Final = [
    "data_t",
    [
        ["seq", "unsigned long long"],
        ["inner", _INNER],
        ["flag", "_Bool"],
        ["__pad_4", "char", [3]],
        ["wide", "unsigned __int128"],
        ["comm", "char", [16]],
        ["mac", "unsigned char", [6]],
        ["ports", "unsigned short", [3]],
        ["three", _INNER, [3]],
        ["bits", _BITS],
        ["ratio", "float"],
        ["double", "double"],
        ["", [["word", "unsigned int"], ["parts", "unsigned char", [4]]], "union"],
        ["class", "int"],
    ],
    "struct_packed",
]


def _parsed(description: Any, *, key: bool = False) -> CType:
    """The type of a description, of the size that it says itself.  Raises EventTypeError."""
    try:
        descriptions.parse(description, -1, key=key)
    except EventTypeError as error:
        size = re.search(r"what it tells of takes (\d+) bytes of -1", str(error))
        if size is None:
            raise
        return descriptions.parse(description, int(size[1]), key=key)
    raise AssertionError("a size that is not its own")


def _derived(description: Any) -> type[Event]:
    found = _parsed(description)
    assert isinstance(found, Record)
    return found.event_type


_ENDS_WITH_TEXT: Final = [
    "line_t",
    [["pid", "int"], ["flag", "_Bool"], ["line", "char", [27]]],
    "struct_packed",
]
TYPES: Final[list[type[Event]]] = [
    *(Fixed, Tailed, Frozen, _derived(_DERIVED), _derived(_ENDS_WITH_TEXT)),
    *EVENT_TYPES.values(),
]


def _expected(plan: Layout, sample: bytes, padding: int) -> dict[str, Any] | None:
    """The fields of an event; None for a sample that the type does not fit."""
    tails = [name for name, kind in plan.kinds.items() if isinstance(kind, Tail)]
    if len(sample) < plan.size or (not tails and len(sample) > plan.size + padding):
        return None
    values: dict[str, Any] = {}
    for member in plan.members:
        data = sample[member.offset : member.offset + member.kind.size]
        assert len(data) == member.kind.size
        values[member.name] = _value(member.kind, plan.types.get(member.name, bytes), data)
    position = plan.size
    for name in tails:
        length = values[name + LENGTH_SUFFIX]
        data = sample[position : position + length]
        if len(data) != length:
            return None
        position += length
        values[name] = _value(plan.kinds[name], plan.types[name], data)
    return {name: _field(plan, name, values) for name in plan.kinds}


def _value(kind: Kind, type: Any, data: bytes) -> Any:
    match kind:
        case Integer():
            number = int.from_bytes(data, "little", signed=kind.signed)
            return number != 0 if type is bool else number
        case Array(item, _):
            return tuple(
                _value(item, int, data[at : at + item.size]) for at in range(0, len(data), item.size)
            )
        case Embedded():
            return kind.unpack(data)
        case Char() if type is str:
            return text.decode(data.split(b"\0")[0])
        case Tail(function) if function:
            return function(data)
        case Tail() if type is str:
            return text.decode(data)
        case Tail() if type is not bytes:
            return tuple(map(text.decode, data.removesuffix(b"\0").split(b"\0"))) if data else ()
    return data


def _field(plan: Layout, name: str, values: dict[str, Any]) -> Any:
    match plan.kinds[name]:
        case Computed(function, arguments):
            return function(*(values[argument] for argument in arguments))
        case WallClock(source):
            return _EPOCH + timedelta(microseconds=(values[source] + _OFFSET) // 1000)
    return values[name]


def _as_json(value: Any) -> Any:
    match value:
        case Event():
            return {name: _as_json(of) for name, of in vars(value).items()}
        case dict():
            return {name: _as_json(of) for name, of in value.items()}
        case tuple():
            return [_as_json(one) for one in value]
        case bytes():
            return text.decode(value)
        case datetime():
            return f"{value:%Y-%m-%dT%H:%M:%S.%f}Z"
        case float() if not isfinite(value):
            return None
    return value


def check(event_type: type[Event], records: Records, samples: list[bytes]) -> None:
    """Decode and encode; the samples are those of the records."""
    plan = layout(event_type)
    shortest = codec.shortest(event_type, plan)
    whole = [sample.ljust(plan.size, b"\0") if shortest <= len(sample) else sample for sample in samples]
    expected = [_expected(plan, sample, records.padding) for sample in whole]
    batch: EventBatch[Event] = EventBatch(event_type, records, _OFFSET)
    assert len(batch) == len(samples)
    found: list[dict[str, Any] | None] = []
    for chunk in batch.decode():
        if isinstance(chunk, DecodeError):
            found.append(None)
            continue
        assert 0 < len(chunk) <= 128
        assert {type(event) for event in chunk} == {event_type}
        found += [vars(event) for event in chunk]
    assert repr(found) == repr(expected)  # as NaN is not equal to itself
    try:
        lines = batch.to_json_lines().decode().splitlines(keepends=True)
    except DecodeError:
        assert None in expected
        return
    assert None not in expected
    assert all(line.endswith("\n") and line[:-1].isprintable() for line in lines)
    assert [json.loads(line) for line in lines] == [_as_json(event) for event in expected]


_CODEC: Final = struct.Struct("<BBH")


def codecs(data: bytes) -> None:
    """A type, a kind of buffer; then runs of records: how many, how long, and their bytes."""
    if len(data) < _CODEC.size:
        return
    number, kind, _ = _CODEC.unpack_from(data)
    prefix, padding = (8, 0) if kind % 2 else (20, 7)
    event_type = TYPES[number % len(TYPES)]
    runs: list[Run] = []
    content: list[bytes] = []
    samples: list[bytes] = []
    at = 0
    position = _CODEC.size
    while position < len(data):
        size = int.from_bytes(data[position : position + 2], "little") % 1024
        count = data[position + 2] % 4 + 1 if position + 2 < len(data) else 1
        position += 3
        if kind % 2:
            stride = size + 15 & ~7
        else:
            size = (size + 4 + 7 & ~7) - 4
            stride = 20 + size
        for _ in range(count):
            sample = data[position : position + size].ljust(size, b"\0")
            position += size
            samples.append(sample)
            content.append(b"\xee" * prefix + sample + b"\xdd" * (stride - prefix - size))
        runs.append((at, stride, size, count))
        at += stride * count
    # Which cgroups this machine has is no part of any input.
    with mock.patch.object(cgroups, "path_of", return_value=None):
        check(event_type, Records(b"".join(content), prefix, runs, padding=padding), samples)


def codec_seeds() -> list[bytes]:
    """Each type, whole and cut off."""
    seeds = []
    for number, event_type in enumerate(TYPES):
        plan = layout(event_type)
        sample = bytes(range(plan.size))
        tails = [name for name, kind in plan.kinds.items() if isinstance(kind, Tail)]
        if tails:
            lengths = struct.pack(f"<{len(tails)}I", *[3] * len(tails))
            offset = next(member.offset for member in plan.members if member.name == tails[0] + LENGTH_SUFFIX)
            sample = sample[:offset] + lengths + sample[offset + len(lengths) :] + b"a\0b" * len(tails)
        for kind in (0, 1):
            for cut in (0, 5):
                here = sample[: len(sample) - cut]
                run = struct.pack("<HB", len(here), 1) + here * 2
                seeds.append(_CODEC.pack(number, kind, 0) + run + run)
    return seeds


def generated() -> list[Callable[..., object]]:
    """The decoders and encoders."""
    return [function for event_type in TYPES for function in codec.codec(event_type)[:2]]


class _Tree:
    """A value like JSON's, of bytes."""

    _NUMBERS: Final = [*NUMBERS, *FLOATS]
    _KINDS: Final = ["struct", "struct_packed", "union", "enum"]
    _NAMES: Final = [
        "",
        "a",
        "b",
        "class",
        "__pad_1",
        "__class__",
        "__debug__",
        "_bytes_0",
        "a$b",
        "gr\u00fc\u00dfe",
    ]
    _WORDS: Final = [*_NUMBERS, *_KINDS, *_NAMES, "a\0b", "\ud800"]

    def __init__(self, data: bytes) -> None:
        self._bytes = iter(data)

    def _byte(self) -> int:
        return next(self._bytes, 0)

    def _one_of(self, words: list[str]) -> str:
        return words[self._byte() % len(words)]

    def value(self, depth: int = 0) -> Any:
        """Mostly what BCC could have written."""
        match self._byte() % 16 if depth < 6 else 0:
            case 0 | 1 | 2 | 3:
                return self._one_of(self._WORDS)
            case 4 | 5:
                return self._byte()
            case 6:
                return bytes(self._byte() for _ in range(self._byte() % 8)).decode("latin-1")
            case 7:
                return [None, True, False, 0.5, -1, 1 << 70, {}, {"a": 1}][self._byte() % 8]
            case 8:
                return [self.value(depth + 1) for _ in range(self._byte() % 5)]
            case 9 | 10 | 11:
                return [self._one_of(self._NUMBERS), self._byte()]
        members = [self._member(depth) for _ in range(self._byte() % 6)]
        return [self._one_of(self._NAMES), members, self._one_of(self._KINDS)]

    def _member(self, depth: int) -> Any:
        sort = self._byte()
        name = f"m{self._byte()}" if sort & 1 else self.value(depth + 1)
        extras: list[list[Any]] = [[], [self._byte() % 40], [[self._byte()]], [self.value(depth + 1)]]
        return [name, self.value(depth + 1), *extras[sort >> 1 & 3]]


def described(data: bytes) -> None:
    """A description, as JSON or made of bytes; of a type that it tells, samples."""
    if data[:1] in (b"[", b'"'):
        try:
            description = json.loads(data)
        except (ValueError, RecursionError):
            return
    else:
        description = _Tree(data).value()
    try:
        found = _parsed(description, key=len(data) % 2 == 1)
    except EventTypeError:
        return
    if 0 < found.size < 4096:
        _check_values(found, data)


def _check_values(type: CType, data: bytes) -> None:
    sample = (data * type.size).ljust(type.size, b"\0")[: type.size]
    value = type.unpack(sample)
    try:
        packed = type.pack(value)
    except ArgumentError:
        pass  # a union, say
    else:
        assert len(packed) == type.size
        assert repr(type.unpack(packed)) == repr(value)
    if isinstance(type, Record) and type.fields:
        stride = type.size + 15 & ~7
        record = bytes(8) + sample + bytes(stride - 8 - type.size)
        check(type.event_type, Records(record * 2, 8, [(0, stride, type.size, 2)]), [sample] * 2)


def description_seeds() -> list[bytes]:
    """What BCC writes, and near misses."""
    good: list[Any] = [_DERIVED, _INNER, _BITS, "int", "double", ["e", ["A", "B"], "enum"]]
    near: list[Any] = [["x", [["a"]], "struct"], ["x", [["a", "int", "b"]], "struct"], [], ["x", 1, "union"]]
    return [json.dumps(one).encode() for one in good + near] + [
        bytes(range(256)),
        bytes([12, 3] + [1, 1, 0, 0] * 9),
    ]
