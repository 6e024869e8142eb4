"""A kernel that lets nobody read its memory: what says so, and what goes on working."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebpfstream import BPF, PrivilegeError, trace_execve

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

COUNTING = """
BPF_ARRAY(calls, u64, 1);
RAW_TRACEPOINT_PROBE(sys_enter) {
    if (bpf_get_current_pid_tgid() >> 32 == TARGET && ctx->args[1] == 110)
        calls.increment(0);
    return 0;
}
"""


async def test_reading_kernel_memory_is_refused_and_the_error_says_by_what() -> None:
    assert "[confidentiality]" in Path("/sys/kernel/security/lockdown").read_text()
    with pytest.raises(PrivilegeError, match=r"this kernel is locked down \(confidentiality\)"):
        async with trace_execve():
            pass


async def test_what_reads_none_of_it_works() -> None:
    async with BPF(text=COUNTING, cflags=[f"-DTARGET={os.getpid()}"]) as bpf:
        for _ in range(12):
            os.getppid()
        assert bpf.maps["calls"][0] == 12
