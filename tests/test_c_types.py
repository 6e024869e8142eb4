"""C types: from BCC's descriptions, to and from bytes, and as event classes.

tests/kernel/test_outputs.py holds the same against a compiler.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream import descriptions
from ebpfstream.batch import EventBatch
from ebpfstream.c_types import CType, Record
from ebpfstream.errors import ArgumentError, DecodeError, EventTypeError
from ebpfstream.events import I32, U8, U32, U64, Array, Char, Comm, Event, Integer
from ebpfstream.records import Records

INNER = ["in_t", [["a", "unsigned char"], ["__pad_1", "char", [1]], ["b", "unsigned short"]], "struct_packed"]
BITS = ["bits", [["low", "unsigned int", 4], ["byte", "unsigned char"], ["sign", "short", 3]], "struct"]
EVERYTHING = [
    "data_t",
    [
        ["seq", "unsigned long long"],
        ["pid", "int"],
        ["inner", INNER],
        ["flag", "_Bool"],
        ["__pad_4", "char", [7]],
        ["wide", "unsigned __int128"],
        ["comm", "char", [16]],
        ["mac", "unsigned char", [6]],
        ["ports", "unsigned short", [3]],
        ["three", INNER, [3]],
        ["bits", BITS],
        ["ratio", "float"],
        ["", [["word", "unsigned int"], ["parts", "unsigned char", [4]]], "union"],
        ["class", "int"],
    ],
    "struct_packed",
]


def parsed(description: Any, size: int) -> Record:
    made = descriptions.parse(description, size)
    assert isinstance(made, Record)
    return made


def batch(record: Record, *samples: bytes) -> EventBatch[Event]:
    length = record.size + 7 & ~7
    data = b"".join(bytes(8) + sample.ljust(length, b"\0") for sample in samples)
    return EventBatch(record.event_type, Records(data, 8, [(0, 8 + length, record.size, len(samples))]))


SAMPLE = (
    struct.pack("<Qi", 7, -5)
    + struct.pack("<BxH", 1, 2)
    + b"\1"
    + b"\xff" * 7
    + ((1 << 100) + 3).to_bytes(16, "little")
    + b"a name\0and more\0"
    + b"\xff\xfe\xbe\xef\0\1"
    + struct.pack("<3H", 1, 2, 65535)
    + b"".join(struct.pack("<BxH", n, n) for n in (3, 4, 5))
    + struct.pack("<BBBx", 0xF9, 200, 0b101)
    + struct.pack("<f", 0.5)
    + struct.pack("<I", 0x04030201)
    + struct.pack("<i", 42)
)


def test_everything_in_one_struct() -> None:
    record = parsed(EVERYTHING, len(SAMPLE))
    (event,) = batch(record, SAMPLE)
    assert event == record.unpack(SAMPLE)
    assert str(event) == (
        "data_t(seq=7, pid=-5, inner=in_t(a=1, b=2), flag=True, wide=1267650600228229401496703205379, "
        r"comm='a name', mac=b'\xff\xfe\xbe\xef\x00\x01', ports=(1, 2, 65535), "
        "three=(in_t(a=3, b=3), in_t(a=4, b=4), in_t(a=5, b=5)), bits=bits(low=9, byte=200, sign=-3), "
        r"ratio=0.5, word=67305985, parts=b'\x01\x02\x03\x04', class_=42)"
    )
    assert {event: 1}[record.unpack(SAMPLE)] == 1
    (line,) = batch(record, SAMPLE).to_json_lines().splitlines()
    assert json.loads(line) == {
        "seq": 7,
        "pid": -5,
        "inner": {"a": 1, "b": 2},
        "flag": True,
        "wide": (1 << 100) + 3,
        "comm": "a name",
        "mac": "\\xff\\xfe\\xbe\\xef\x00\x01",
        "ports": [1, 2, 65535],
        "three": [{"a": 3, "b": 3}, {"a": 4, "b": 4}, {"a": 5, "b": 5}],
        "bits": {"low": 9, "byte": 200, "sign": -3},
        "ratio": 0.5,
        "word": 67305985,
        "parts": "\x01\x02\x03\x04",
        "class_": 42,
    }


def test_an_array_at_the_end_may_be_submitted_as_far_as_it_is_filled() -> None:
    record = parsed(["data_t", [["length", "unsigned int"], ["text", "char", [12]]], "struct_packed"], 16)
    data = b"".join(bytes(8) + struct.pack("<I4s", length, b"abcd"[:length]) for length in (0, 3, 4))
    short = EventBatch(record.event_type, Records(data, 8, [(0, 16, 8, 3)]))
    assert [vars(event) for event in short] == [
        {"length": length, "text": "abcd"[:length]} for length in (0, 3, 4)
    ]
    assert [json.loads(line)["text"] for line in short.to_json_lines().splitlines()] == ["", "abc", "abcd"]
    with pytest.raises(DecodeError, match=r"a record of 2 bytes ends before data_t\.length"):
        list(EventBatch(record.event_type, Records(bytes(16), 8, [(0, 16, 2, 1)])))


def test_keys_differ_behind_their_nul() -> None:
    key = descriptions.parse(["key_t", [["name", "char", [8]]], "struct_packed"], 8, key=True)
    one, other = key.unpack(b"a\0b\0\0\0\0\0"), key.unpack(b"a\0c\0\0\0\0\0")
    assert one != other
    assert [key.pack(each) for each in (one, other)] == [b"a\0b\0\0\0\0\0", b"a\0c\0\0\0\0\0"]
    assert key.pack(("a",)) == b"a".ljust(8, b"\0")


def test_a_struct_may_call_its_members_as_it_likes() -> None:
    """What the generated functions call their own variables is no concern of the program's."""
    names = (
        "data records runs position stride size count start end part chunk event lines number unpack values "
    )
    names += "fields first offset new texts Event SIZE CHUNK LINES"
    members = [[name, "unsigned int"] for name in names.split()]
    record = parsed(["odd", members, "struct_packed"], 4 * len(members))
    sample = struct.pack(f"<{len(members)}I", *range(len(members)))
    events = list(batch(record, *[sample] * 300))
    assert len(events) == 300
    assert all(list(vars(event).values()) == list(range(len(members))) for event in events)
    lines = batch(record, *[sample] * 300).to_json_lines().splitlines()
    assert [json.loads(line) for line in lines] == [
        {name: index for index, name in enumerate(names.split())}
    ] * 300


def test_bit_fields_share_their_bytes() -> None:
    members = [
        ["a", "unsigned int", 3],
        ["b", "int", 5],
        ["c", "unsigned int", 24],
        ["d", "unsigned long long", 40],
    ]
    record = parsed(["bits", members, "struct"], 16)
    values = {"a": 5, "b": -16, "c": 0xABCDEF, "d": (1 << 40) - 2}
    assert vars(record.unpack(record.pack(values))) == values
    (event,) = batch(record, record.pack(values))
    assert vars(event) == values
    with pytest.raises(ArgumentError, match="8 does not fit into a, which has 3 bits"):
        record.pack(values | {"a": 8})


SCALARS = {
    "unsigned char": (0, 255),
    "short": (-32768, 32767),
    "unsigned int": (0, (1 << 32) - 1),
    "long": (-1 << 63, (1 << 63) - 1),
    "unsigned long long": (0, (1 << 64) - 1),
    "unsigned __int128": (0, (1 << 128) - 1),
}


@given(st.data())
def test_values_come_back(data: st.DataObject) -> None:
    """Of any natural struct of numbers, arrays and structs."""
    kinds = data.draw(
        st.lists(st.tuples(st.sampled_from(list(SCALARS)), st.integers(0, 3)), min_size=1, max_size=8)
    )
    members: list[Any] = []
    values: dict[str, Any] = {}
    for index, (kind, count) in enumerate(kinds):
        numbers = st.integers(*SCALARS[kind])
        if kind == "unsigned char" and count:
            values[f"m{index}"] = data.draw(st.binary(min_size=count, max_size=count))
        elif count:
            values[f"m{index}"] = tuple(data.draw(st.lists(numbers, min_size=count, max_size=count)))
        else:
            values[f"m{index}"] = data.draw(numbers)
        members.append([f"m{index}", kind, *([[count]] if count else [])])
    record = parsed(["any", members, "struct"], natural_size(kinds))
    packed = record.pack(values)
    assert vars(record.unpack(packed)) == values
    assert [vars(event) for event in batch(record, packed, packed)] == [values, values]
    assert record.pack(record.unpack(packed)) == packed
    assert record.pack(tuple(values.values())) == packed


def natural_size(kinds: list[tuple[str, int]]) -> int:
    sizes = {"unsigned char": 1, "short": 2, "unsigned int": 4, "unsigned __int128": 16}
    at, most = 0, 1
    for kind, count in kinds:
        size = sizes.get(kind, 8)
        at = -(-at // size) * size + size * max(count, 1)
        most = max(most, size)
    return -(-at // most) * most


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("int", 1 << 31, "2147483648 is no int: give -2147483648 to 2147483647"),
        ("unsigned char", -1, "-1 is no unsigned char: give 0 to 255"),
        ("int", "x", "'x' is no int: give an integer"),
        ("double", "x", "'x' is no double: give a number"),
        (INNER, (1,), r"\(1,\) is no struct in_t: give its members a, b"),
        (INNER, {"a": 1, "c": 2}, "is no struct in_t: give its members a, b"),
        (
            ["u", [["x", "int"], ["y", "int"]], "union"],
            (1, 2),
            "which of a union's members counts is not known",
        ),
    ],
)
def test_values_that_a_type_does_not_have(kind: Any, value: Any, message: str) -> None:
    sizes = {"int": 4, "unsigned char": 1, "double": 8}
    made = descriptions.parse(kind, sizes[kind] if isinstance(kind, str) else 4)
    with pytest.raises(ArgumentError, match=message):
        made.pack(value)


def test_text_that_is_too_long() -> None:
    made = parsed(["s", [["name", "char", [4]], ["raw", "unsigned char", [2]]], "struct_packed"], 6)
    assert made.pack(("abcd", b"xy")) == b"abcdxy"
    assert made.pack(("\\xff", b"xy")) == b"\xff\0\0\0xy"
    with pytest.raises(ArgumentError, match=r"'abcde' is no char \[4\]: it has 5 bytes"):
        made.pack(("abcde", b"xy"))
    with pytest.raises(ArgumentError, match=r"b'x' is no unsigned char \[2\]: give 2 bytes"):
        made.pack(("abcd", b"x"))


def test_what_bcc_does_not_describe_whole() -> None:
    with pytest.raises(EventTypeError, match=r"struct two whole: what it tells of takes 12 bytes of 28"):
        descriptions.parse(["two", [["m", "int", [2]], ["k", "int"]], "struct_packed"], 28)
    with pytest.raises(EventTypeError, match="describes a type as 'mystery', which is unknown here"):
        descriptions.parse("mystery", 4)


@dataclass
class Fits(Event):
    process: U32
    user: I32
    comm: Comm
    message: Annotated[bytes, Char(12)]


@dataclass
class Wrong(Event):
    pid: U64
    comm: Comm
    message: Annotated[str, Char(12)]


@dataclass
class Short(Event):
    pid: U32
    uid: U32
    comm: Comm


@dataclass
class Arrays(Event):
    seq: U64
    pid: I32
    inner: Annotated[bytes, Char(4)]
    flag: U8
    rest: Annotated[bytes, Char(7)]
    wide: Annotated[bytes, Char(16)]
    comm: Comm
    mac: Annotated[bytes, Char(6)]
    ports: Annotated[tuple[int, ...], Array(Integer(2), 3)]
    three: Annotated[bytes, Char(12)]
    bits: Annotated[bytes, Char(4)]
    ratio: Annotated[bytes, Char(4)]
    word: Annotated[bytes, Char(4)]
    number: I32


HELLO = parsed(
    [
        "data_t",
        [["pid", "int"], ["uid", "int"], ["command", "char", [16]], ["message", "char", [12]]],
        "struct_packed",
    ],
    36,
)


def test_a_class_that_fits() -> None:
    descriptions.check(Fits, HELLO)
    descriptions.check(Arrays, parsed(EVERYTHING, len(SAMPLE)))


@pytest.mark.parametrize(
    ("event_type", "message"),
    [
        (
            Wrong,
            (
                "Wrong is not what the program submits, struct data_t: at byte 0 Wrong has pid, an integer of 8 bytes, "
                "and it has int pid at 0, int uid at 4"
            ),
        ),
        (Short, r"Short has nothing for char message\[12\], at byte 24"),
    ],
)
def test_a_class_that_does_not_fit(event_type: type[Event], message: str) -> None:
    with pytest.raises(EventTypeError, match=message):
        descriptions.check(event_type, HELLO)


def test_a_number_without_a_struct() -> None:
    made: CType = descriptions.parse("unsigned long long", 8)
    assert (made.size, made.unpack(made.pack(1 << 63))) == (8, 1 << 63)
