"""Entries of trace_pipe, in every form that kernels write them, and whatever else.

tests/kernel/test_tracepipe.py has the real pipe.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebpfstream import text
from ebpfstream.kernel.tracepipe import TraceLine, parse
from ebpfstream.lost import Lost

MODERN = b"            bash-1234    [003] d..21   123.456789: bpf_trace_printk: Hello World!\n"
HELLO = TraceLine("bash", 1234, 3, "d..21", 123.456789, "Hello World!")


@pytest.mark.parametrize(
    ("entry", "flags"),
    [
        (MODERN, "d..21"),
        (b"            bash-1234  [003] d..1   123.456789: 0x00000001: Hello World!", "d..1"),  # Linux 4.9
        (
            b"            bash-1234    (   1200) [003] d..21   123.456789: bpf_trace_printk: Hello World!\n",
            "d..21",
        ),
        (
            b"            bash-1234    (-------) [003] d..21   123.456789: bpf_trace_printk: Hello World!\n",
            "d..21",
        ),
        (b"            bash-1234  (-----) [003] .... 123.456789: 0x1: Hello World!\n\n", "...."),
        (b"            bash-1234    [003]   123.456789: bpf_trace_printk: Hello World!\n", ""),
        (b"            bash-1234    [003] d...2.1   123.456789: bpf_trace_printk: Hello World!\n", "d...2.1"),
    ],
)
def test_the_forms_that_kernels_write(entry: bytes, flags: str) -> None:
    assert parse(entry) == [TraceLine("bash", 1234, 3, flags, 123.456789, "Hello World!")]


def test_wide_columns() -> None:
    (line,) = parse(b"           <...>-4194304 [1023] d..21 1795571271.735693: bpf_trace_printk: x\n")
    assert line == TraceLine("<...>", 4194304, 1023, "d..21", 1795571271.735693, "x")
    (line,) = parse(b"          <idle>-0       [000] d.h21 281502292838011: bpf_trace_printk: x\n")
    assert line == TraceLine("<idle>", 0, 0, "d.h21", 281502292838011.0, "x")


@pytest.mark.parametrize(
    ("printed", "message"),
    [
        (b"", ""),
        (b"Hello\n", "Hello"),
        (b"one\n\ntwo\n\n", "one\n\ntwo"),
        (b" blanks \t", " blanks \t"),
        (b"caf\xc3\xa9 \xff", "café \\xff"),
        (b"bpf_trace_printk: x", "bpf_trace_printk: x"),
        (b"\n" + MODERN, "\n" + MODERN.decode().rstrip()),
        (b"CPU:1 [LOST 5 EVENTS]", "CPU:1 [LOST 5 EVENTS]"),
    ],
)
def test_messages(printed: bytes, message: str) -> None:
    """A message that looks like another line is none."""
    (line,) = parse(MODERN.replace(b"Hello World!", printed))
    assert isinstance(line, TraceLine)
    assert line.message == message


def test_lost() -> None:
    assert parse(b"CPU:3 [LOST 25 EVENTS]\n" + MODERN) == [Lost(3, 25), HELLO]
    assert parse(b"CPU:3 [LOST EVENTS]\n" + MODERN) == [Lost(3, None), HELLO]
    assert parse(b"CPU:12 [LOST 7 EVENTS]\n") == [Lost(12, 7)]


@pytest.mark.parametrize(
    "entry",
    [
        b"            bash-1234    [003] d..21   123.456789: sys_getppid()\n",
        b"            bash-1234    [003] .....   123.456789: tracing_mark_write: bpf_trace_printk: x\n",
        b"            bash-1234    [003] .....   123.456789: tracing_mark_write: x\n" + MODERN,
        b"            bash-1234    [003] d..21   123.456789: 0xffffffff81234567: x\n",
        b"            bash-1234    [003] d..21   123.456789: bpf_trace_printk\n",
        MODERN[1:],
        MODERN[:-20],
        b" " + MODERN,
        b"bpf_trace_printk: Hello\n",
        b"464 0 1073250949485 type: 550\n",
        b"[LINE TOO BIG]\n",
        b"",
    ],
)
def test_what_is_not_a_line_of_bpf_trace_printk(entry: bytes) -> None:
    assert parse(entry) == []
    assert parse(b"CPU:0 [LOST 1 EVENTS]\n" + entry) == [Lost(0, 1)]


def test_numbers_that_are_too_long() -> None:
    many = b"9" * 5000
    assert parse(MODERN.replace(b"1234 ", many + b" ")) == []
    assert parse(MODERN.replace(b"[003]", b"[%b]" % many)) == []
    assert parse(MODERN.replace(b" 123.", b" %b." % many)) == []
    assert parse(b"CPU:3 [LOST %b EVENTS]\n" % many) == []


names = st.binary(max_size=15).map(lambda name: name.replace(b"\0", b"").lstrip(b" "))
messages = st.binary(max_size=200).map(lambda message: message.replace(b"\0", b""))


@given(
    name=names | st.sampled_from([b"a-12 [003] d..1", b"<...>", b"(x) [1] 1.0: ", b"a\nb", b"-1", b"ba sh-"]),
    pid=st.integers(0, 1 << 22),
    tgid=st.sampled_from([b"", b"(-------) ", b"(-----) ", b"(     12) ", b"(4194304) "]),
    cpu=st.integers(0, 8191),
    flags=st.sampled_from([b"", b"....", b"d..1", b"d..21", b"BNZff", b"dNh.1.2"]),
    time=st.integers(0, 1 << 33),
    event=st.sampled_from([b"bpf_trace_printk", b"0x00000001"]),
    message=messages,
    lost=st.none() | st.integers(1, 1 << 63),
)
def test_what_the_kernel_writes_is_what_is_read(
    name: bytes,
    pid: int,
    tgid: bytes,
    cpu: int,
    flags: bytes,
    time: int,
    event: bytes,
    message: bytes,
    lost: int | None,
) -> None:
    entry = b"CPU:%d [LOST %d EVENTS]\n" % (cpu, lost) if lost else b""
    entry += b"%16b-%-7d %b[%03d] %b" % (name, pid, tgid, cpu, flags)
    entry += b" %5d.%06d: %b: %b\n" % (time // 1000, time % 1000, event, message)
    timestamp = float(f"{time // 1000}.{time % 1000:06}")
    expected: list[Any] = [Lost(cpu, lost)] if lost else []
    expected.append(
        TraceLine(text.decode(name), pid, cpu, flags.decode(), timestamp, text.decode(message.rstrip(b"\n")))
    )
    assert parse(entry) == expected


pieces = st.sampled_from(
    [
        MODERN,
        MODERN[:40],
        MODERN[40:],
        *(b"CPU:", b" [LOST ", b" EVENTS]\n", b"-", b"-1", b"[", b"]", b" ", b"                "),
        *(b"(", b")", b"1.5: ", b"d..21 ", b"0x0001: ", b"bpf_trace_printk: ", b"\n", b"\xff", b"\0"),
    ]
)


@given(st.binary() | st.lists(pieces | st.binary(max_size=3), max_size=30).map(b"".join))
@example(b"-" * (1 << 16))
@example(b"                -1" + b" " * (1 << 16))
@example(b"                -1 (" + b"-" * (1 << 16))
@example(b"                -1 [1] " + b"x" * (1 << 16))
@example(b"                -1 [1] " + b" " * (1 << 16))
def test_arbitrary_bytes(data: bytes) -> None:
    found = parse(data)
    assert [type(one) for one in found] in ([], [Lost], [TraceLine], [Lost, TraceLine])
