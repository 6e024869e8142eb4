"""The programs of the book with kprobes: what tests/kernel/test_book.py sees with tracepoints elsewhere."""

from __future__ import annotations

import os

import pytest

from ebpfstream import BPF
from ebpfstream.kernel import kprobes
from examples import hello_buffer
from tests.kernel import test_book
from tests.kernel.test_book import COMM, execute

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

test_hello = test_book.test_hello
test_hello_map = test_book.test_hello_map
test_hello_buffer = test_book.test_hello_buffer
test_hello_ring_buffer_with_a_class = test_book.test_hello_ring_buffer_with_a_class
test_reserve_submit_discard = test_book.test_reserve_submit_discard
test_hello_tail = test_book.test_hello_tail


async def test_as_the_book_attaches_it() -> None:
    assert kprobes.kprobes_available()
    async with BPF(text=hello_buffer.PROGRAM) as bpf:
        events = bpf.events("output")
        bpf.attach_kprobe(event=bpf.get_syscall_fnname("execve"), fn_name="hello")
        pids = execute(10)
        bpf.detach()
        found = [(event.pid, event.uid, event.command) async for event in events if event.pid in pids]
    assert found == [(pid, os.getuid(), COMM) for pid in pids]


OWN = """
BPF_RINGBUF_OUTPUT(output, 8);
struct data_t { u32 pid; int returned; };
int kprobe__sys_getppid(struct pt_regs *ctx) {
    struct data_t data = { bpf_get_current_pid_tgid() >> 32, -1 };
    output.ringbuf_output(&data, sizeof(data), 0);
    return 0;
}
int kretprobe__sys_getppid(struct pt_regs *ctx) {
    struct data_t data = { bpf_get_current_pid_tgid() >> 32, PT_REGS_RC(ctx) };
    output.ringbuf_output(&data, sizeof(data), 0);
    return 0;
}
"""


async def test_programs_that_attach_themselves() -> None:
    async with BPF(text=OWN) as bpf, bpf.events("output") as events:
        for _ in range(7):
            os.getppid()
        bpf.detach()
        found = [event.returned async for event in events if event.pid == os.getpid()]
    assert found == [-1, os.getppid()] * 7
