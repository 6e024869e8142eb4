"""What trace_execve tells of a process that is being traced: its parent, not its tracer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel.test_execve import TRUE, execs_of

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
assert libc.ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0, ctypes.get_errno()  # PTRACE_SEIZE
print("seized", flush=True)
sys.stdin.read()
"""


async def test_the_parent_of_a_traced_process_is_not_its_tracer() -> None:
    """`task->parent` is the tracer then (struct task_struct, include/linux/sched.h)."""
    pids: list[int] = []

    def act() -> None:
        child = subprocess.Popen(
            ["sh", "-c", f"read go; exec {TRUE}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        pids.append(child.pid)
        tracer = subprocess.Popen(
            [sys.executable, "-c", TRACER, str(child.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert child.stdin is not None
        assert tracer.stdin is not None
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"seized\n"
        child.stdin.write(b"go\n")
        child.stdin.close()
        while Path(f"/proc/{child.pid}/comm").read_text() == "sh\n":
            pass  # it has to exec before its tracer lets go
        tracer.communicate()
        child.wait()

    execs = await execs_of(act, lambda event: event.pid == pids[0])
    assert [event.comm for event in execs] == ["sh", "true"]
    assert [event.ppid for event in execs] == [os.getpid()] * 2
