from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream import text
from ebpfstream.batch import EventBatch
from ebpfstream.errors import DecodeError, EventTypeError
from ebpfstream.events import (
    I8,
    I16,
    I64,
    U8,
    U16,
    U32,
    U64,
    Char,
    Comm,
    Computed,
    Event,
    Flag,
    Tail,
    WallClock,
    c_struct,
    layout,
)
from ebpfstream.records import Records, Run


@dataclass
class Hello(Event):
    pid: U32
    uid: U32
    comm: Comm
    message: Annotated[str, Char(12)]


@dataclass
class Mixed(Event):
    small: I8
    wide: U64
    flag: Flag
    short: U16
    shout: Annotated[str, Computed(str.upper, ("word",))]
    raw: Annotated[bytes, Char(3)]
    word: Annotated[str, Tail()]
    rest: Annotated[tuple[str, ...], Tail()]
    when: Annotated[datetime, WallClock("wide")]
    blob: Annotated[bytes, Tail()]


def record(sample: bytes, prefix: int = 8) -> bytes:
    padded = sample + bytes(-len(sample) % 8)
    return b"\xee" * prefix + padded


def batch_of(kind: type[Any], samples: list[bytes], prefix: int = 8, offset: int = 0) -> EventBatch[Any]:
    data = b"".join(record(sample, prefix) for sample in samples)
    runs: list[Run] = []
    position = 0
    for sample in samples:
        stride = len(record(sample, prefix))
        if runs and runs[-1][1:3] == (stride, len(sample)):
            runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
        else:
            runs.append((position, stride, len(sample), 1))
        position += stride
    return EventBatch(kind, Records(data, prefix, runs), offset)


def hello(pid: int, comm: bytes, message: bytes = b"Hello") -> bytes:
    return struct.pack("<II16s12s", pid, 1000, comm, message)


def mixed(word: bytes, rest: bytes, blob: bytes, wide: int = 5) -> bytes:
    head = struct.pack("<b7xQBxH3sx3I", -1, wide, 1, 7, b"a\0b", len(word), len(rest), len(blob))
    assert len(head) == 40 - 4
    return head + bytes(4) + word + rest + blob


def test_the_c_struct() -> None:
    assert (
        c_struct(Hello)
        == "struct hello {\n\tu32 pid;\n\tu32 uid;\n\tchar comm[16];\n\tchar message[12];\n};\n"
    )
    assert c_struct(Mixed) == (
        "struct mixed {\n\ts8 small;\n\tu64 wide;\n\tu8 flag;\n\tu16 short;\n\tchar raw[3];\n"
        "\tu32 word_length;\n\tu32 rest_length;\n\tu32 blob_length;\n};\n"
    )


def test_the_layout_is_natural() -> None:
    plan = layout(Mixed)
    assert [(member.name, member.offset) for member in plan.members] == [
        ("small", 0),
        ("wide", 8),
        ("flag", 16),
        ("short", 18),
        ("raw", 20),
        ("word_length", 24),
        ("rest_length", 28),
        ("blob_length", 32),
    ]
    assert plan.size == 40


def test_fixed_events() -> None:
    batch = batch_of(Hello, [hello(1, b"sh\0garbage"), hello(2, b"x" * 16, b"caf\xc3\xa9\xff")])
    assert len(batch) == 2
    assert list(batch) == [
        Hello(1, 1000, "sh", "Hello"),
        Hello(2, 1000, "x" * 16, "café\\xff"),
    ]
    assert list(batch) == list(batch), "a batch can be iterated again"


def test_events_with_tails() -> None:
    offset = 1_700_000_000_000_000_000
    batch = batch_of(Mixed, [mixed(b"word", b"a\0\0b\0", b"\0\xff"), mixed(b"", b"", b"")], offset=offset)
    first, second = batch
    when = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert first == Mixed(-1, 5, True, 7, "WORD", b"a\0b", "word", ("a", "", "b"), when, b"\0\xff")
    assert second == Mixed(-1, 5, True, 7, "", b"a\0b", "", (), when, b"")


@pytest.mark.parametrize("prefix", [8, 12, 20])
def test_whatever_stands_before_a_sample(prefix: int) -> None:
    samples = [hello(n, b"sh") for n in range(1000)]
    assert [event.pid for event in batch_of(Hello, samples, prefix)] == list(range(1000))
    tails = [mixed(b"w" * n, b"", b"") for n in range(1000)]
    assert [len(event.word) for event in batch_of(Mixed, tails, prefix)] == list(range(1000))


def as_json(event: Any) -> Any:
    """What orjson makes of an event; bytes as the text that stands for them, times with microseconds."""
    fields = asdict(event)
    for name, value in fields.items():
        if isinstance(value, bytes):
            fields[name] = text.decode(value)
        if isinstance(value, datetime):
            fields[name] = value.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return orjson.loads(orjson.dumps(fields))


@given(
    st.lists(st.tuples(st.binary(max_size=16), st.binary(max_size=12), st.integers(0, 2**32 - 1)), max_size=5)
)
def test_json_lines_of_fixed_events(values: list[tuple[bytes, bytes, int]]) -> None:
    batch = batch_of(Hello, [hello(pid, comm, message) for comm, message, pid in values])
    lines = batch.to_json_lines().decode().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == [as_json(event) for event in batch]
    assert all(line.endswith("\n") and line[:-1].isprintable() for line in lines)


@given(st.lists(st.tuples(st.binary(), st.binary(), st.binary(), st.integers(0, 2**62)), max_size=5))
def test_json_lines_of_events_with_tails(values: list[tuple[bytes, bytes, bytes, int]]) -> None:
    batch = batch_of(Mixed, [mixed(*value) for value in values])
    lines = batch.to_json_lines().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [as_json(event) for event in batch]
    assert all(line.isprintable() for line in lines)


def test_a_slice_is_a_batch() -> None:
    samples = [hello(n, b"sh") for n in range(5)] + [hello(5, b"sh")]
    batch = batch_of(Hello, samples)
    assert [event.pid for event in batch[2:4]] == [2, 3]
    assert [event.pid for event in batch[:None]] == [0, 1, 2, 3, 4, 5]
    assert [event.pid for event in batch[-1:]] == [5]
    assert len(batch[6:]) == 0
    tails = batch_of(Mixed, [mixed(b"w" * n, b"", b"") for n in (0, 9, 9, 30)])
    assert [len(event.word) for event in tails[1:3]] == [9, 9]
    with pytest.raises(ValueError, match="without a step"):
        batch[::2]


def test_a_record_that_is_too_short_names_the_field() -> None:
    good, short = hello(1, b"sh"), hello(2, b"sh")[:20]
    batch = batch_of(Hello, [good, short, good])
    with pytest.raises(
        DecodeError, match=r"a record of 20 bytes ends before Hello\.comm \(Char\(size=16\) at offset 8\)"
    ):
        list(batch)
    chunks = list(batch.decode())
    assert [isinstance(chunk, DecodeError) for chunk in chunks] == [False, True, False]
    with pytest.raises(DecodeError):
        batch.to_json_lines()
    with pytest.raises(DecodeError, match=r"a record of 44 bytes is longer than Hello \(36 bytes"):
        list(batch_of(Hello, [good + bytes(8)]))


def test_a_tail_that_leaves_its_record_names_the_field() -> None:
    sample = bytearray(mixed(b"word", b"a\0", b"b"))
    struct.pack_into("<I", sample, 28, 1000)
    batch = batch_of(Mixed, [mixed(b"", b"", b""), bytes(sample), mixed(b"", b"", b"")])
    with pytest.raises(
        DecodeError, match=r"Mixed\.rest \(1000 bytes at offset 44\) goes beyond its record of 47 bytes"
    ):
        list(batch)
    assert [isinstance(chunk, DecodeError) for chunk in batch.decode()] == [False, True, False]


def test_classes_that_are_no_event_types() -> None:
    class Plain(Event):
        pid: U32

    @dataclass
    class Untyped(Event):
        pid: int

    @dataclass
    class Wrong(Event):
        pid: Annotated[str, Char(0)]

    @dataclass
    class Mismatch(Event):
        pid: Annotated[float, Char(4)]

    @dataclass
    class Empty(Event):
        pass

    @dataclass
    class Lost(Event):
        pid: U32
        name: Annotated[str, Computed(str, ("nobody",))]

    with pytest.raises(EventTypeError, match="write @dataclass"):
        layout(Plain)
    with pytest.raises(EventTypeError, match=r"Untyped\.pid has no C type: annotate it with U32"):
        layout(Untyped)
    with pytest.raises(EventTypeError, match=r"there is no Char\(size=0\)"):
        layout(Wrong)
    with pytest.raises(EventTypeError, match="is for str or bytes, not for"):
        layout(Mismatch)
    with pytest.raises(EventTypeError, match="no fields"):
        layout(Empty)
    with pytest.raises(EventTypeError, match="'nobody', which is no field"):
        layout(Lost)


def test_integers_of_every_width() -> None:
    @dataclass
    class Widths(Event):
        a: U8
        b: I16
        c: I64

    sample = struct.pack("<BxhxxxxQ", 255, -2, 2**64 - 3)
    assert list(batch_of(Widths, [sample])) == [Widths(255, -2, -3)]


def test_columns() -> None:
    samples = [hello(n, b"sh\0junk") for n in range(3)]
    batch = batch_of(Hello, samples)
    columns = batch.to_numpy()
    assert columns["pid"].tolist() == [0, 1, 2]
    assert columns["comm"][0].tobytes() == b"sh\0junk".ljust(16, b"\0")
    assert not columns.flags.owndata, "nothing is copied"
    assert batch[1:].to_numpy()["pid"].tolist() == [1, 2]
    parts = batch.records._replace(runs=[*batch[:1].records.runs, *batch[2:].records.runs])
    assert EventBatch(Hello, parts).to_numpy()["pid"].tolist() == [0, 2]
    assert batch[:0].to_numpy()["pid"].tolist() == []

    @dataclass
    class Flags(Event):
        on: Flag
        signed: I16

    flags = batch_of(Flags, [struct.pack("<Bxh", 1, -3)]).to_numpy()
    assert flags.tolist() == [(True, -3)]
    with pytest.raises(EventTypeError, match=r"Mixed\.word has no fixed length"):
        batch_of(Mixed, [mixed(b"", b"", b"")]).to_numpy()
    with pytest.raises(DecodeError):
        batch_of(Hello, [samples[0][:-4]]).to_numpy()
