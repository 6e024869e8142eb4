from __future__ import annotations

import itertools
import json
import struct
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream import text, values
from ebpfstream.batch import EventBatch
from ebpfstream.errors import DecodeError, EbpfStreamError, EventTypeError
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
    Integer,
    Tail,
    WallClock,
    c_struct,
    layout,
)
from ebpfstream.records import Records, Run
from ebpfstream.tracers import execve

NOON = datetime(2023, 11, 14, 12, tzinfo=UTC)
OFFSET = int(NOON.timestamp()) * 10**9


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


def joined(first: str, second: bytes) -> str:
    return f"{first}+{second.decode()}"


@dataclass
class Spread(Event):
    """Of fixed length, with every kind of field."""

    wide: U64
    flag: Flag
    raw: Annotated[bytes, Char(3)]
    comm: Comm
    when: Annotated[datetime, WallClock("wide")]
    both: Annotated[str, Computed(joined, ("comm", "raw"))]
    pair: Annotated[tuple[int, str], Computed(lambda number, name: (number, name), ("wide", "comm"))]


@dataclass
class Tailed(Event):
    """Computed of two fields, one of them a tail."""

    number: U32
    word: Annotated[str, Tail()]
    both: Annotated[str, Computed(lambda word, number: f"{word}:{number}", ("word", "number"))]


SERIAL = itertools.count()


@dataclass
class Counted(Event):
    pid: U32
    serial: Annotated[int, Computed(SERIAL.__next__, ())]


@dataclass
class CountedWithTail(Counted):
    word: Annotated[str, Tail()]


def spread(number: int) -> bytes:
    return struct.pack("<QB3s16s4x", number * 1_001_000, number % 3, b"abc", f"n{number}".encode())


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


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_limits_and_letters_of_integers(size: int, signed: bool) -> None:
    kind = Integer(size, signed)
    form = struct.Struct(f"<{kind.letter}")
    assert form.size == size
    least, most = kind.limits[0], kind.limits[-1]
    assert [form.unpack(form.pack(value)) for value in (least, most)] == [(least,), (most,)]
    for beyond in (least - 1, most + 1):
        with pytest.raises(struct.error):
            form.pack(beyond)


def test_columns_need_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(
        EbpfStreamError, match=r"^to_numpy\(\) needs numpy: pip install 'ebpfstream\[numpy\]'$"
    ):
        batch_of(Hello, [hello(1, b"sh")]).to_numpy()


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


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 129, 257])
def test_every_kind_of_column_in_every_number(count: int) -> None:
    """At the edges of what is decoded, and formatted, in one go."""
    batch = batch_of(Spread, [spread(number) for number in range(count)], offset=OFFSET)
    times = [NOON + timedelta(microseconds=number * 1001) for number in range(count)]
    assert list(batch) == [
        Spread(n * 1_001_000, n % 3 != 0, b"abc", f"n{n}", times[n], f"n{n}+abc", (n * 1_001_000, f"n{n}"))
        for n in range(count)
    ]
    assert [json.loads(line) for line in batch.to_json_lines().splitlines()] == [
        {
            "wide": n * 1_001_000,
            "flag": n % 3 != 0,
            "raw": "abc",
            "comm": f"n{n}",
            "when": f"{times[n]:%Y-%m-%dT%H:%M:%S.%f}Z",
            "both": f"n{n}+abc",
            "pair": [n * 1_001_000, f"n{n}"],
        }
        for n in range(count)
    ]
    assert [len(chunk) for chunk in batch.decode() if isinstance(chunk, list)] == [
        min(128, count - first) for first in range(0, count, 128)
    ]


def test_chunks_of_events_with_tails() -> None:
    samples = [mixed(b"w" * (number % 9), b"", b"") for number in range(257)]
    chunks = list(batch_of(Mixed, samples).decode())
    assert [len(chunk) for chunk in chunks if isinstance(chunk, list)] == [128, 128, 1]


def test_computed_fields_get_their_arguments_in_order() -> None:
    batch = batch_of(Tailed, [struct.pack("<II", 7, 4) + b"word"])
    assert list(batch) == [Tailed(7, "word", "word:7")]
    assert json.loads(batch.to_json_lines()) == {"number": 7, "word": "word", "both": "word:7"}


@pytest.mark.parametrize("count", [1, 64, 65, 129])
@pytest.mark.parametrize("tail", [False, True])
def test_fields_computed_of_nothing(tail: bool, count: int) -> None:
    samples = [struct.pack("<II", n, 1) + b"w" if tail else struct.pack("<I", n) for n in range(count)]
    batch = batch_of(CountedWithTail if tail else Counted, samples)
    first = next(SERIAL) + 1
    assert [(event.pid, event.serial) for event in batch] == [(n, first + n) for n in range(count)]
    lines = [json.loads(line) for line in batch.to_json_lines().splitlines()]
    assert [(line["pid"], line["serial"]) for line in lines] == [(n, first + count + n) for n in range(count)]
    alone = batch.select({"serial": "x"}).to_json_lines()
    assert alone == b"".join(b'{"x":%d}\n' % (first + 2 * count + n) for n in range(count))


def test_times_of_events_with_tails_and_of_slices() -> None:
    batch = batch_of(Mixed, [mixed(b"", b"", b"", wide=1_999_999)] * 2, offset=OFFSET)
    for part in (batch, batch[1:]):
        assert {event.when for event in part} == {NOON + timedelta(microseconds=1999)}
        assert {json.loads(line)["when"] for line in part.to_json_lines().splitlines()} == {
            "2023-11-14T12:00:00.001999Z"
        }


def test_a_flag_is_whatever_is_not_zero() -> None:
    sample = bytearray(mixed(b"", b"", b""))
    for value in (0, 1, 2, 255):
        sample[16] = value
        batch = batch_of(Mixed, [bytes(sample)])
        assert next(iter(batch)).flag is bool(value)
        assert json.loads(batch.to_json_lines())["flag"] is bool(value)


def test_a_tail_ends_with_its_sample_and_not_with_the_padding() -> None:
    """The sample of 41 bytes is followed by 7 of padding."""
    exact = mixed(b"", b"", b"x")
    assert next(iter(batch_of(Mixed, [exact]))).blob == b"x"
    beyond = bytearray(exact)
    struct.pack_into("<I", beyond, 32, 2)
    batch = batch_of(Mixed, [bytes(beyond)])
    message = r"Mixed\.blob \(2 bytes at offset 40\) goes beyond its record of 41 bytes"
    with pytest.raises(DecodeError, match=message):
        list(batch)
    with pytest.raises(DecodeError, match=message):
        batch.to_json_lines()


def test_a_record_that_ends_before_its_tails() -> None:
    batch = batch_of(Mixed, [mixed(b"", b"", b"")[:32]])
    message = r"a record of 32 bytes ends before Mixed\.blob_length"
    with pytest.raises(DecodeError, match=message):
        list(batch)
    with pytest.raises(DecodeError, match=message):
        batch.to_json_lines()


def test_a_record_that_ends_within_its_last_field() -> None:
    """And one that ends right before a field names that, not the field before."""
    with pytest.raises(DecodeError, match=r"a record of 24 bytes ends before Hello\.message"):
        list(batch_of(Hello, [hello(1, b"sh")[:24]]))
    with pytest.raises(DecodeError, match=r"a record of 35 bytes ends before Hello\.message"):
        list(batch_of(Hello, [hello(1, b"sh")[:35]]))


@dataclass(frozen=True)
class Frozen(Event):
    pid: U32


@dataclass
class Afterwards(Event):
    pid: U32

    def __post_init__(self) -> None:
        self.pid += 1


@dataclass(init=False)
class OwnInit(Event):
    pid: U32

    def __init__(self, pid: int) -> None:
        self.pid = pid + 2


@dataclass
class Watched(Event):
    pid: U32

    def __setattr__(self, name: str, value: int) -> None:
        super().__setattr__(name, value + 3)


@pytest.mark.parametrize(("kind", "pid"), [(Frozen, 5), (Afterwards, 6), (OwnInit, 7), (Watched, 8)])
def test_a_class_with_code_of_its_own_is_called(kind: type[Any], pid: int) -> None:
    (event,) = batch_of(kind, [struct.pack("<I", 5)])
    assert type(event) is kind
    assert event.pid == pid
    if kind is Frozen:
        assert hash(event) == hash(Frozen(5))


def test_strings_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CACHED_STRINGS", 4)
    texts, json_texts, seconds = values.Texts(), values.JsonTexts(), values.UntilSeconds()
    for number in range(50):
        name = b"n%d" % number
        assert texts[name + b"\0rest\0"] == name.decode()
        assert json_texts[name + b"\0rest\0"] == b'"%b"' % name
        assert seconds[number] == b"1970-01-01T00:00:%02d" % number
        assert max(len(texts), len(json_texts), len(seconds)) <= 4


def test_flags_of_any_width_in_json() -> None:
    @dataclass
    class Flags(Event):
        wide: Annotated[bool, Integer(4)]
        signed: Annotated[bool, Integer(1, signed=True)]
        narrow: Flag

    for wide, signed, narrow in itertools.product((0, 1, 256, 2**32 - 1), (0, 1, -1, -128, 127), (0, 1, 255)):
        batch = batch_of(Flags, [struct.pack("<IbBxx", wide, signed, narrow)])
        (event,), shown = batch, json.loads(batch.to_json_lines())
        assert asdict(event) == shown == {"wide": wide != 0, "signed": signed != 0, "narrow": narrow != 0}


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (999, "1970-01-01T00:00:00.000000Z"),
        (1_000, "1970-01-01T00:00:00.000001Z"),
        (999_999_999, "1970-01-01T00:00:00.999999Z"),
        (1_000_000_000, "1970-01-01T00:00:01.000000Z"),
        (951_868_799_000_042_000, "2000-02-29T23:59:59.000042Z"),
    ],
)
def test_times_in_json(nanoseconds: int, shown: str) -> None:
    """Of types with tails, and without; before the epoch too, if the clock was wrong."""
    for later in (0, 5_000_000_000):
        when, offset = struct.pack("<Q", nanoseconds + later), -later
        (fixed,) = [json.loads(EventBatch(At, Records(when, 0, [(0, 8, 8, 1)]), offset).to_json_lines())]
        assert fixed["when"] == shown
        record = when + struct.pack("<II", 1, 0) + b"x"
        tails = EventBatch(AtWithWord, Records(record, 0, [(0, 17, 17, 1)]), offset)
        assert json.loads(tails.to_json_lines())["when"] == shown
    early = EventBatch(At, Records(struct.pack("<Q", nanoseconds), 0, [(0, 8, 8, 1)]), -1_000_000_000)
    assert json.loads(early.to_json_lines())["when"][:4] in ("1969", "1970", "2000")
    assert next(iter(early)).when == datetime.fromisoformat(json.loads(early.to_json_lines())["when"])


@dataclass
class At(Event):
    when: Annotated[datetime, WallClock("monotonic")]
    monotonic: U64


@dataclass
class AtWithWord(Event):
    when: Annotated[datetime, WallClock("monotonic")]
    monotonic: U64
    word: Annotated[str, Tail()]


def test_paths_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CACHED_STRINGS", 4)  # the bound that all such caches have
    paths = execve._Paths()
    for number in range(50):
        name = b"n%d" % number
        for _ in range(2):
            assert paths[b"in\0" + name + b"\0"] == f"/{name.decode()}/in"
        assert paths[b"x" * 256 + name + b"\0"] == f"/{'x' * 256}{name.decode()}"
        assert paths[name + b"\xff\0"] == f"/{name.decode()}\\xff"
        assert max(map(len, paths)) < 256
        assert len(paths) <= 4
    assert paths[b""] == paths[b"cut before its NUL"] == "/"


def test_withdrawn_records_are_counted_once() -> None:
    batch = batch_of(Hello, [hello(1, b"sh")] * 2)
    records = batch.records._replace(discarded=3)
    assert records.cut(0, 1).discarded == 0


def test_errors_stand_between_the_events_that_they_stood_between() -> None:
    overrun = bytearray(mixed(b"", b"", b""))
    struct.pack_into("<I", overrun, 24, 100)
    words = [b"a", b"", b"b", b"c", b"", b"d"]
    tails = batch_of(Mixed, [mixed(word, b"", b"") if word else bytes(overrun) for word in words])
    fixed = batch_of(Hello, [hello(1, word) if word else b"short..." for word in words])
    expected = [["a"], "error", ["b", "c"], "error", ["d"]]
    found = list(tails.decode())
    assert [[e.word for e in chunk] if isinstance(chunk, list) else "error" for chunk in found] == expected
    found = list(fixed.decode())
    assert [[e.comm for e in chunk] if isinstance(chunk, list) else "error" for chunk in found] == expected


@pytest.mark.parametrize("prefix", [8, 12, 20])
def test_columns_behind_any_prefix(prefix: int) -> None:
    batch = batch_of(Hello, [hello(number, b"sh") for number in range(3)], prefix)
    assert batch.to_numpy()["pid"].tolist() == [0, 1, 2]


def test_a_tail_that_ends_with_its_record_is_not_the_one_that_leaves_it() -> None:
    sample = bytearray(mixed(b"word", b"", b""))
    struct.pack_into("<I", sample, 28, 1)
    with pytest.raises(
        DecodeError, match=r"Mixed\.rest \(1 bytes at offset 44\) goes beyond its record of 44 bytes"
    ):
        list(batch_of(Mixed, [bytes(sample)]))
