from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, make_dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebpfstream import descriptions, text
from ebpfstream.batch import EventBatch
from ebpfstream.c_types import Record
from ebpfstream.catalogue import EVENT_TYPES
from ebpfstream.errors import DecodeError, EventTypeError
from ebpfstream.events import (
    I8,
    I16,
    I32,
    I64,
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
    Tail,
    WallClock,
    layout,
)
from ebpfstream.lost import Lost
from ebpfstream.parsing import parser
from ebpfstream.records import Records
from ebpfstream.testing import ExampleEvent, make_batch
from ebpfstream.values import moment


@dataclass
class Hello(Event):
    pid: U32
    uid: U32
    comm: Comm
    message: Annotated[str, Char(12)]


@dataclass
class Inner(Event):
    low: U8
    raw: Annotated[bytes, Char(2)]


def inner(data: bytes) -> Inner:
    return Inner(data[0], data[1:3])


def signed(data: bytes) -> int | None:
    value = int.from_bytes(data, "little", signed=True)
    return value or None


def new_year(number: int) -> datetime | None:
    return datetime(2000 + number, 1, 1, tzinfo=UTC) if number else None


def new_year_or_never(number: int) -> datetime | str:
    return new_year(number) or "never"


@dataclass
class Everything(Event):
    """Each kind of field."""

    i8: I8
    i16: I16
    i32: I32
    i64: I64
    u8: U8
    u16: U16
    u32: U32
    u64: U64
    flag: Flag
    comm: Comm
    raw: Annotated[bytes, Char(5)]
    ports: Annotated[tuple[int, ...], Array(Integer(2), 3)]
    wide: Annotated[int | None, Embedded(16, signed)]
    inner: Annotated[Inner, Embedded(3, inner)]
    maybe: Annotated[Inner | None, Computed(lambda inner: inner if inner.low else None, ("inner",))]
    when: Annotated[datetime, WallClock("u64")]
    then: Annotated[datetime | None, Computed(new_year, ("u8",))]
    pair: Annotated[tuple[int, str], Computed(lambda number: (number, str(number)), ("i8",))]
    share: Annotated[float, Computed(lambda number: number / 3, ("i64",))]
    share_or_none: Annotated[float | None, Computed(lambda number: 1 / number if number else None, ("i8",))]
    shares: Annotated[tuple[float | None, ...], Computed(lambda number: (number / 3, None), ("u8",))]
    either: Annotated[datetime | str, Computed(new_year_or_never, ("u8",))]
    word: Annotated[str, Tail()]
    words: Annotated[tuple[str, ...], Tail()]
    blob: Annotated[bytes, Tail()]
    parts: Annotated[tuple[bytes, ...], Tail(lambda data: tuple(data.split(b"/")))]
    length: Annotated[int, Tail(len)]


@dataclass(frozen=True)
class Frozen(Event):
    number: U8
    double: Annotated[int, Computed(lambda number: number * 2, ("number",))]


@dataclass
class Prepared(Event):
    """With code of its own."""

    number: U8
    seen: Annotated[int, Computed(lambda number: number, ("number",))]

    def __post_init__(self) -> None:
        self.seen += 1


NO_NUL = st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"x"))
TIMES = st.integers(0, 2**64).map(moment)
NUMBERS = st.none() | st.integers(0, 2**64 - 1)
LOST = st.builds(Lost, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.none() | TIMES)


def stored(kind: Kind, of: Any) -> st.SearchStrategy[Any]:
    """Values of a field as `make_batch` takes them."""
    match kind:
        case Integer(size, is_signed) if of is not bool:
            bits = size * 8
            return (
                st.integers(-1 << bits - 1, (1 << bits - 1) - 1)
                if is_signed
                else st.integers(0, (1 << bits) - 1)
            )
        case Integer():
            return st.booleans()
        case Array(item, count):
            return st.lists(stored(item, int), min_size=count, max_size=count).map(tuple)
        case Embedded(size):
            return st.binary(min_size=size, max_size=size)
        case Char(size) if of is str:
            return NO_NUL.map(lambda data: text.decode(data[:size]))
        case Char(size):
            return st.binary(min_size=size, max_size=size)
        case Tail(None) if of is str:
            return st.binary(max_size=20).map(text.decode)
        case Tail(None) if of is not bytes:
            return st.lists(NO_NUL.map(text.decode), max_size=5).map(tuple)
        case Tail():
            return st.binary(max_size=20)
    return st.none()  # it is made of others


def batches(event_type: type[Any]) -> st.SearchStrategy[EventBatch[Any]]:
    plan = layout(event_type)
    values = {name: stored(kind, plan.types[name]) for name, kind in plan.kinds.items()}
    events = st.lists(st.builds(event_type, **values), max_size=3)
    return st.builds(
        lambda events, lost, offset: EventBatch(
            event_type, make_batch(events, type=event_type).records, offset, tuple(lost)
        ),
        events,
        st.lists(LOST, max_size=2),
        st.integers(0, 2**60),
    )


def read_back(batch: EventBatch[Any]) -> list[Any]:
    parse = parser(batch.event_type)
    return [parse(line) for line in batch.to_json_lines().splitlines()]


def assert_comes_back(batch: EventBatch[Any]) -> None:
    """Equal, of the same types, with the same fields in the same order."""
    events = list(batch)
    assert read_back(batch) == events
    assert repr(read_back(batch)) == repr(events)
    assert [list(vars(event)) for event in read_back(batch)[len(batch.lost) :]] == [
        list(vars(event)) for event in events[len(batch.lost) :]
    ]


@pytest.mark.parametrize("event_type", [ExampleEvent, Hello, *EVENT_TYPES.values(), Everything])
@given(st.data())
def test_events_come_back(event_type: type[Any], data: st.DataObject) -> None:
    assert_comes_back(data.draw(batches(event_type)))


@pytest.mark.parametrize("event_type", [Frozen, Prepared])
def test_classes_with_code_of_their_own_are_called(event_type: type[Any]) -> None:
    assert_comes_back(make_batch([event_type(number, 0) for number in (0, 255)]))


INNER = ["in_t", [["a", "unsigned char"], ["mac", "unsigned char", [2]], ["name", "char", [3]]], "struct"]
FROM_C: list[Any] = [
    ["signed", "signed char"],
    ["truth", "_Bool"],
    ["big", "unsigned __int128"],
    ["bits", "unsigned int", 3],
    ["more", "int", 5],
    ["inner", INNER],
    ["ports", "unsigned short", [2]],
    ["flags", "_Bool", [3]],
    ["wide", "__int128", [2]],
    ["raw", "unsigned char", [3]],
    ["three", INNER, [3]],
    ["u", ["u", [["i", "int"], ["c", "char", [4]], ["b", "unsigned char", [4]], ["in", INNER]], "union"]],
    ["", [["word", "unsigned int"], ["parts", "unsigned char", [4]]], "union"],
    ["double", "double"],
    ["class", "int"],
]


def from_c(*members: list[Any]) -> Record:
    size = 0
    while True:  # BCC tells it; here it is what the description says
        try:
            found = descriptions.parse(["ev", list(members), "struct"], size)
        except EventTypeError as error:
            size = int(str(error).split("takes ")[1].split()[0])
        else:
            assert isinstance(found, Record)
            return found


RECORD = from_c(*FROM_C)
EXAMPLE = ExampleEvent(2**64 - 1, "comm", "a message")


@given(st.lists(st.binary(min_size=RECORD.size, max_size=RECORD.size), max_size=3))
@example([bytes([fill]) * RECORD.size for fill in (0, 1, 0x61, 0x7F, 0x80, 0xFF)])
@example([struct.pack("<d", float("-inf")) * (RECORD.size // 8)])
def test_types_made_of_c_come_back(samples: list[bytes]) -> None:
    stride = 8 + (RECORD.size + 7) // 8 * 8
    data = b"".join((bytes(8) + sample).ljust(stride, b"\0") for sample in samples)
    batch = EventBatch(RECORD.event_type, Records(data, 8, [(0, stride, RECORD.size, len(samples))]))
    events, found = list(batch), read_back(batch)
    for event, again in zip(events, found, strict=True):
        values = dict(vars(event))
        if not math.isfinite(values["double"]):
            assert math.isnan(vars(again)["double"]), "JSON has no other number for it"
            values["double"] = vars(again)["double"]
        assert vars(again) == values
        assert repr(vars(again)) == repr(values)
        assert not math.isfinite(event.double) or hash(again) == hash(event)  # type: ignore[attr-defined]


def line_of(event: Event, **changes: object) -> bytes:
    (line,) = make_batch([event]).to_json_lines().splitlines()
    return json.dumps(json.loads(line) | changes).encode()


def test_a_loss_alone_is_a_loss() -> None:
    known = Lost(3, 7, 10, 16, datetime(2023, 11, 14, 1, 2, 3, 4, tzinfo=UTC))
    assert read_back(make_batch([], lost=[known, Lost(None, None)])) == [known, Lost(None, None)]


def test_an_event_may_have_a_field_of_that_name() -> None:
    @dataclass
    class Odd(Event):
        lost: U32

    events = [Odd(5), Lost(1, 2)]
    assert read_back(make_batch([Odd(5)], lost=[Lost(1, 2)])) == events[::-1]


def test_what_a_newer_writer_adds_is_passed_over() -> None:
    assert parser(ExampleEvent)(line_of(EXAMPLE, more={"a": [1]}, lost={"cpu": 1})) == EXAMPLE
    newer = {"lost": {"cpu": 1, "count": 2, "first_sequence": 3, "last_sequence": 4, "time": None, "more": 1}}
    assert parser(ExampleEvent)(json.dumps(newer).encode()) == Lost(1, 2, 3, 4)


def test_the_order_in_json_does_not_matter() -> None:
    turned = json.dumps(dict(reversed(json.loads(line_of(EXAMPLE)).items()))).encode()
    event = parser(ExampleEvent)(turned)
    assert event == EXAMPLE
    assert list(vars(event)) == ["number", "comm", "message"]


def test_numbers_that_another_program_wrote() -> None:
    """There is one kind of number in JSON, and some write 2.0 as 2."""

    @dataclass
    class Share(Event):
        number: U8
        share: Annotated[float, Computed(float, ("number",))]

    assert parser(Share)(b' {"number" : 2, "share" : 2}\n') == Share(2, 2.0)


@dataclass
class Versioned(Hello):
    __schema_version__ = 3


def test_a_field_that_is_missing() -> None:
    (line,) = (
        make_batch([Versioned(1, 2, "c", "m")])
        .select(["pid", "comm", "message"])
        .to_json_lines()
        .splitlines()
    )
    with pytest.raises(
        DecodeError, match=r"no Versioned\.uid: .* Versioned of schema version 3, read it with"
    ):
        parser(Versioned)(line)

    @dataclass
    class More(Versioned):
        more: U8

    with pytest.raises(DecodeError, match=r"no More\.more: it is not one of More, read"):
        parser(More)(line_of(Versioned(1, 2, "c", "m")))
    with pytest.raises(DecodeError, match=r"no Lost\.count"):
        parser(Versioned)(b'{"lost":{"cpu":1}}')


def everything() -> bytes:
    given: dict[str, Any] = dict.fromkeys(Everything.__dataclass_fields__, 1)
    given |= dict.fromkeys(("raw", "wide", "word", "words", "blob", "parts", "length"), b"")
    given |= {"flag": True, "comm": "", "ports": (1, 2, 3), "inner": b"abc"}
    return line_of(Everything(**given))


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("i8", 128, "an integer from -128 to 127"),
        ("i8", -129, "an integer from -128 to 127"),
        ("u16", -1, "an integer from 0 to 65535"),
        ("u64", 2**64, "an integer from 0 to 18446744073709551615"),
        ("u32", "1", "an integer from 0 to 4294967295"),
        ("u32", 1.0, "an integer from 0 to 4294967295"),
        ("u8", True, "an integer from 0 to 255"),
        ("u8", None, "an integer from 0 to 255"),
        ("flag", 1, "true or false"),
        ("comm", None, "a string"),
        ("raw", [1], "a string"),
        ("ports", [1, 2], "an array of 3, each an integer from 0 to 65535,"),
        ("ports", [1, 2, 65536], "an array of 3, each an integer from 0 to 65535,"),
        ("ports", [1, 2, True], "an array of 3, each an integer from 0 to 65535,"),
        ("ports", "123", "an array of 3, each an integer from 0 to 65535,"),
        ("wide", 0.5, "an integer or null"),
        ("wide", False, "an integer or null"),
        ("inner", [1], "an object"),
        ("inner", None, "an object"),
        ("maybe", {"low": 1}, "an object or null"),
        ("when", "yesterday", "a time such as 2026-07-01T12:00:00.000000Z"),
        ("when", "2026-07-01T12:00:00", "a time such as 2026-07-01T12:00:00.000000Z"),
        ("when", 5, "a time such as 2026-07-01T12:00:00.000000Z"),
        ("then", "", "a time such as 2026-07-01T12:00:00.000000Z or null"),
        ("pair", [1], "an array of 2 (an integer, a string)"),
        ("pair", [1, "1", 1], "an array of 2 (an integer, a string)"),
        ("pair", ["1", "1"], "an array of 2 (an integer, a string)"),
        ("share", "1", "a number, or null"),
        ("share", True, "a number, or null"),
        ("word", 1, "a string"),
        ("words", ["a", 1], "an array, each a string,"),
        ("words", {"a": 1}, "an array, each a string,"),
        ("length", "1", "an integer"),
    ],
)
def test_a_field_of_the_wrong_type(name: str, wrong: object, expected: str) -> None:
    line = json.dumps(json.loads(everything()) | {name: wrong}).encode()
    with pytest.raises(DecodeError) as error:
        parser(Everything)(line)
    assert f"Everything.{name} cannot be {wrong!r}: {expected} is expected; the line is not" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"low": 256, "raw": ""},
            r"^Everything\.inner\.low cannot be 256: an integer from 0 to 255 is expected; ",
        ),
        ({"low": 1}, r"^the line has no Everything\.inner\.raw: it is not one of Everything, "),
    ],
)
def test_a_part_that_is_wrong(part: object, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        parser(Everything)(json.dumps(json.loads(everything()) | {"inner": part}).encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "b'' is no JSON .*: give a whole line"),
        (
            b'{"number":1,"comm":"x","mess',
            r"""^b'{"number":1,"comm":"x","mess' is no JSON \(.*\): give a whole line""",
        ),
        (b"\xff", "is no JSON"),
        (b'{"number":1,"comm":"\\ud800","message":""}', "is no JSON"),
        (b'{"number":NaN,"comm":"","message":""}', "is no JSON"),
        (b"1\n2", "is no JSON"),
        (
            b"null",
            "^ExampleEvent cannot be None: an object is expected; the line is not one of ExampleEvent, ",
        ),
        (b"[1]", r"^ExampleEvent cannot be \[1\]: an object is expected"),
        (b'{"lost":1}', r"no ExampleEvent\.number"),
        (b'{"lost":{},"more":1}', r"no ExampleEvent\.number"),
        (b"[" * 1000 + b"]" * 1000, "^ExampleEvent cannot be "),
        (b'{"number":"%b"}' % (b"x" * 10**6), r"no ExampleEvent\.comm"),
        (
            b'{"number":"%b","comm":"","message":""}' % (b"x" * 10**6),
            r"ExampleEvent\.number cannot be 'xxx.{90}",
        ),
    ],
)
def test_a_line_that_is_none(line: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message) as error:
        parser(ExampleEvent)(line)
    assert len(str(error.value)) < 500


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.data())
def test_whatever_stands_in_a_line(data: st.DataObject) -> None:
    """An event or a DecodeError, and nothing else."""
    good = json.loads(everything())
    changes = data.draw(st.dictionaries(st.sampled_from([*good, "lost"]), JSON, min_size=1, max_size=3))
    line = json.dumps((good if data.draw(st.booleans()) else {}) | changes).encode()
    try:
        event = parser(Everything)(line)
    except DecodeError:
        return
    assert type(event) is Everything


@given(st.binary(max_size=30))
def test_whatever_a_line_is(line: bytes) -> None:
    with pytest.raises(DecodeError):
        parser(ExampleEvent)(line)


@pytest.mark.parametrize("of", [tuple, dict, dict[str, int], list[int], object, Any, set])
def test_a_type_of_which_json_does_not_tell_enough(of: Any) -> None:
    computed = Annotated[of, Computed(lambda number: number, ("number",))]
    untold = make_dataclass("Untold", [("number", U8), ("other", computed)], bases=(Event,))
    with pytest.raises(
        EventTypeError, match=r"Untold\.other cannot be read back from JSON.*: declare str, int"
    ):
        parser(untold)
