"""Event types derived from programs, held against what the compiler made and the kernel handed over."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import pytest
from anyio.to_thread import run_sync

from ebpfstream import BPF, U64, Event, EventTypeError
from tests.kernel import flood
from tests.kernel.test_loader import GETPPID, make

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

EVERYTHING = """
struct point_t { u8 x; u16 y; };
struct corner_t { struct point_t at; u64 weight; u8 last; };
enum colour { RED = 1, BLUE = 7 };
typedef struct { s16 small; } named_t;
struct bits_t { u32 low:4; u8 byte; s16 sign:3; u64 wide:40; };
struct packed_t { u8 a; u64 b; u16 c; } __attribute__((packed));
struct data_t {
    u64 number;
    char letter;
    s8 tiny;
    short small;
    long large;
    bool yes;
    enum colour colour;
    struct point_t point;
    struct corner_t corners[2];
    named_t named;
    union { u32 word; u8 octets[4]; };
    union { u64 whole; u16 part; } either;
    u8 first:3;
    u8 second:5;
    struct bits_t bits;
    void *pointer;
    const char *text;
    char comm[TASK_COMM_LEN];
    u8 address[6];
    u32 numbers[3];
    unsigned __int128 huge;
    struct packed_t packed;
    size_t size;
    struct { int inner; } unnamed;
    u32 last;
};
BPF_RINGBUF_OUTPUT(ring, 16);
BPF_PERF_OUTPUT(perf);

static inline void fill(struct data_t *data) {
    __builtin_memset(data, 0xff, sizeof(*data)); /* what is padding is not zero */
    data->number = (1ULL << 63) + 1;
    data->letter = 'x';
    data->tiny = -3;
    data->small = -300;
    data->large = -5000000000;
    data->yes = true;
    data->colour = BLUE;
    data->point.x = 1;
    data->point.y = 65000;
    data->corners[0].at.x = 2;
    data->corners[0].at.y = 3;
    data->corners[0].weight = 1ULL << 40;
    data->corners[0].last = 4;
    data->corners[1].at.x = 5;
    data->corners[1].at.y = 6;
    data->corners[1].weight = 7;
    data->corners[1].last = 8;
    data->named.small = -9;
    data->word = 0x04030201;
    data->either.whole = 0x10002;
    data->first = 5;
    data->second = 17;
    data->bits.low = 9;
    data->bits.byte = 200;
    data->bits.sign = -3;
    data->bits.wide = 0xABCDEF0123;
    data->pointer = (void *)0xffff888012345678;
    data->text = 0;
    __builtin_memcpy(data->comm, "a name\\0 more", 13);
    __builtin_memcpy(data->address, "\\x01\\x02\\xfe\\xff\\x00\\x03", 6);
    data->numbers[0] = 10;
    data->numbers[1] = 20;
    data->numbers[2] = 30;
    data->huge = ((unsigned __int128)5 << 64) + 6;
    data->packed.a = 1;
    data->packed.b = 1ULL << 50;
    data->packed.c = 3;
    data->size = sizeof(*data);
    data->unnamed.inner = -1;
    data->last = 0xdeadbeef;
}

int hello(struct bpf_raw_tracepoint_args *ctx) {
    if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
        return 0;
    struct data_t data;
    fill(&data);
    ring.ringbuf_output(&data, sizeof(data), 0);
    perf.perf_submit(ctx, &data, sizeof(data));
    return 0;
}
"""

VALUES: dict[str, Any] = {
    "number": (1 << 63) + 1,
    "letter": ord("x"),
    "tiny": -3,
    "small": -300,
    "large": -5_000_000_000,
    "yes": True,
    "colour": 7,
    "point": {"x": 1, "y": 65000},
    "corners": [
        {"at": {"x": 2, "y": 3}, "weight": 1 << 40, "last": 4},
        {"at": {"x": 5, "y": 6}, "weight": 7, "last": 8},
    ],
    "named": {"small": -9},
    "word": 0x04030201,
    "octets": "\x01\x02\x03\x04",
    "either": {"whole": 0x10002, "part": 2},
    "first": 5,
    "second": 17,
    "bits": {"low": 9, "byte": 200, "sign": -3, "wide": 0xABCDEF0123},
    "pointer": 0xFFFF888012345678,
    "text": 0,
    "comm": "a name",
    "address": "\x01\x02\\xfe\\xff\x00\x03",
    "numbers": [10, 20, 30],
    "huge": (5 << 64) + 6,
    "packed": {"a": 1, "b": 1 << 50, "c": 3},
    "size": 0,
    "unnamed": {"inner": -1},
    "last": 0xDEADBEEF,
}


@pytest.mark.parametrize("output", ["ring", "perf"])
async def test_everything_that_a_struct_may_hold(output: str) -> None:
    with flood.producing() as producer:
        flags = [f"-DTARGET={producer.pid}", f"-DGETPPID={GETPPID}"]
        async with BPF(text=EVERYTHING, cflags=flags) as bpf, bpf.events(output) as events:
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="hello")
            await run_sync(make, producer, 3)
            bpf.detach()
            (batch,) = [batch async for batch in events.batches()]
    lines = batch.to_json_lines().splitlines()
    event, *others = batch
    expected = VALUES | {"size": event.size}
    assert [json.loads(line) for line in lines] == [expected] * 3
    assert others == [event, event]
    assert (event.address, event.octets) == (b"\x01\x02\xfe\xff\x00\x03", b"\x01\x02\x03\x04")
    assert (event.corners[1].at.y, event.numbers, event.packed.b) == (6, (10, 20, 30), 1 << 50)
    assert [field.name for field in fields(event)] == list(VALUES)


@dataclass
class Alone(Event):
    value: U64


ODD = """
struct one_t { u32 a; };
struct two_t { u64 b; };
struct matrix_t { int m[2][3]; };
BPF_PERF_OUTPUT(several);
BPF_PERF_OUTPUT(unclear);
BPF_PERF_OUTPUT(silent);
BPF_PERF_OUTPUT(number);
BPF_PERF_OUTPUT(characters);
BPF_RINGBUF_OUTPUT(matrix, 1);
int hello(void *ctx) {
    struct one_t one = {};
    struct two_t two = {};
    several.perf_submit(ctx, &one, sizeof(one));
    several.perf_submit(ctx, &two, sizeof(two));
    unclear.perf_submit(ctx, &one.a, sizeof(one.a));
    u64 alone = 7;
    number.perf_submit(ctx, &alone, sizeof(alone));
    char some[8] = "some";
    characters.perf_submit(ctx, some, sizeof(some));
    struct matrix_t six = {};
    matrix.ringbuf_output(&six, sizeof(six), 0);
    return 0;
}
"""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "several",
            r"it is given several: struct one_t in line 14 \(&one\), struct two_t in line 15 \(&two\)",
        ),
        ("unclear", r"line 16 \(&one.a\): the type of that does not show"),
        ("silent", "the text does not show what is submitted to it"),
        ("matrix", r"BCC does not describe struct matrix_t whole: .* 8 bytes of 24.*m\[2\]\[3\], as m\[6\]"),
    ],
)
async def test_what_cannot_be_derived_is_said(output: str, message: str) -> None:
    async with BPF(text=ODD) as bpf:
        with pytest.raises(EventTypeError, match=message):
            bpf.events(output)


async def test_numbers_and_characters_without_a_struct() -> None:
    with flood.producing() as producer:
        async with (
            BPF(text=ODD) as bpf,
            bpf.events("number") as numbers,
            bpf.events("characters") as characters,
        ):
            bpf.attach_tracepoint(tp="syscalls:sys_enter_getppid", fn_name="hello")
            await run_sync(make, producer, 1)
            bpf.detach()
            assert {vars(event)["value"] async for event in numbers} == {7}
            assert {vars(event)["value"] async for event in characters} == {"some"}


async def test_a_type_that_only_a_function_knows() -> None:
    """It cannot be derived; the program loads all the same, with the types of its other outputs."""
    text = """
    struct known_t { u32 a; };
    BPF_PERF_OUTPUT(output);
    BPF_PERF_OUTPUT(other);
    int hello(void *ctx) {
        struct local_t { u64 value; } data = { 7 };
        struct local_t *pointer = &data;
        output.perf_submit(ctx, pointer, sizeof(data));
        struct known_t known = {};
        other.perf_submit(ctx, &known, sizeof(known));
        return 0;
    }
    """
    async with BPF(text=text) as bpf:
        assert bpf.functions == ["hello"]
        with pytest.raises(
            EventTypeError, match=r"struct local_t \(line 8\) is no type outside of that function"
        ):
            bpf.event_type("output")
        assert bpf.event_type("other").__name__ == "known_t"
        bpf.events("output", Alone)
