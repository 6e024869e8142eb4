"""Text that others write: entries of trace_pipe, programs, names and arguments."""

from __future__ import annotations

import json
import re
import shlex
from typing import Final

from ebpfstream import text
from ebpfstream.kernel import c_text
from ebpfstream.kernel.tracepipe import TraceLine, parse
from ebpfstream.lost import Lost

_LINE: Final = b"            bash-1234    [003] d..21   123.456789: bpf_trace_printk: Hello World!\n"


def trace_pipe(data: bytes) -> None:
    """An entry."""
    found = parse(data)
    assert [type(one) for one in found] in ([], [Lost], [TraceLine], [Lost, TraceLine])
    for one in found:
        if isinstance(one, Lost):
            assert data.startswith(b"CPU:")
            assert one.count is None or 0 <= one.count < 10**20
        else:
            message = text.encode(one.message)
            assert not message.endswith(b"\n")
            assert data.rstrip(b"\n").endswith(message)
            assert b"bpf_trace_printk: " in data or re.search(rb"0x0*1: ", data)
            assert text.encode(one.task) in data


def trace_pipe_seeds() -> list[bytes]:
    """Entries as kernels write them."""
    return [
        _LINE,
        b"CPU:3 [LOST 25 EVENTS]\n" + _LINE,
        b"CPU:3 [LOST EVENTS]\n",
        b"            bash-1234    (   1200) [003] d..21   123.456789: bpf_trace_printk: Hello World!\n",
        b"            bash-1234  (-----) [003] .... 123.456789: 0x1: Hello World!\n\n",
        b"           <...>-4194304 [1023] d..2.1 1795571271.735693: bpf_trace_printk: x\n",
        b"            bash-1234    [003] d..21   123.456789: sys_getppid()\n",
    ]


def program(data: bytes) -> None:
    """A program's text."""
    source = data.decode("utf-8", "replace")
    code = c_text.blanked(source)
    assert len(code) == len(source)
    assert [at for at, one in enumerate(code) if one == "\n"] == [
        at for at, one in enumerate(source) if one == "\n"
    ]
    for found in c_text.submissions(source):
        assert re.fullmatch(r"\w+", found.output)
        assert 1 <= found.line <= source.count("\n") + 1
        assert found.expression in code
        assert found.type is None or found.type in code
        assert found.type is not None or found.length is None
    for category, name in c_text.probed_tracepoints(source):
        assert re.fullmatch(r"\w+ \w+", f"{category} {name}")
    parameter = c_text.first_parameter(source, "hello")
    assert parameter is None or parameter == " ".join(parameter.split())


def program_seeds() -> list[bytes]:
    """Programs that submit."""
    body = """
struct data_t { u64 pid; char comm[16]; };
BPF_PERF_OUTPUT(output); // "not text
BPF_RINGBUF_OUTPUT(ring, 1);
TRACEPOINT_PROBE(syscalls, sys_enter_execve) { return 0; }
int hello(struct pt_regs *ctx, const char *name) {
    struct data_t data = {}, *other = &data;
    u64 many[4]; unsigned long long number;
    /* output.perf_submit(ctx, &never, 1); */
    output.perf_submit(ctx, &data, sizeof(data));
    output.perf_submit_skb(ctx, 1, (void *)(&data), sizeof(data));
    ring.ringbuf_output(many, sizeof many, 0);
    ring.ringbuf_output(&number, f(1, (2, 3)), 0);
    ring.ringbuf_submit(other, 0);
    return 0;
}
"""
    return [body.encode(), *(f"int hello(void *ctx) {{ {line} }}".encode() for line in body.split("\n"))]


def names(data: bytes) -> None:
    """Bytes as text and back; as JSON; as words of a shell."""
    found = text.decode(data)
    assert text.encode(found) == data
    for shown in (text.json_string(found), text.printable(found)):
        assert shown.isprintable()
    assert json.loads(text.json_string(found)) == found
    words = data.replace(b"'", b"").split(b"\0")
    line = text.command_line(map(text.decode, words))
    assert line.isprintable()
    if "$" not in line:  # else with escapes that only bash knows
        assert [word.encode() for word in shlex.split(line)] == words


def name_seeds() -> list[bytes]:
    """Plain and odd ones."""
    return [
        b"ls\0-l\0a b",
        "gr\u00fc\u00dfe \u202e \U0001f600".encode(),
        b"\\x41\\x5c\xff\xfe\\",
        b"\x1b[31m\x7f\xc2\x80",
        b"\0\0",
    ]
