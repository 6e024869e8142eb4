"""Real events, written as JSON lines and read back."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from anyio.to_thread import run_sync

from ebpfstream import ExecEvent, SyscallEvent, text, trace_execve, trace_syscalls
from ebpfstream.batch import EventBatch
from ebpfstream.parsing import parser

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

STRANGE: list[list[bytes]] = [
    [b"/bin/true"],
    [b"true", b""],
    [b"true", b"", b"", b"after nothing"],
    [b"true", b"two\nlines\r\n\ttab"],
    [b"true", "café \N{SNOWMAN} \N{PILE OF POO} \N{RIGHT-TO-LEFT OVERRIDE}\N{ZERO WIDTH JOINER}".encode()],
    [b"true", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"caf\xe9 \\xe9 \\x5c \\\\xff \\\xff"],
    [b"true", b"\"'`$(id)\\", b"\\", b"\\u0041", b"\x01\x1b[31m\x7f\xc2\x85"],
    [b"\xffname", b'{"lost":{"cpu":1}}'],
    [b"true", b"x" * 20_000],  # more than is kept
]


def read_back(batch: EventBatch[Any]) -> list[Any]:
    parse = parser(batch.event_type)
    return [parse(line) for line in batch.to_json_lines().splitlines()]


async def test_executions_come_back() -> None:
    pids: list[int] = []

    def act() -> None:
        for argv in STRANGE:
            pids.append(os.posix_spawn("/bin/true", argv, {}))
            os.waitpid(pids[-1], 0)
        with pytest.raises(FileNotFoundError):
            subprocess.run(["/nonexistent/\udcff\n"])

    seen: dict[int, ExecEvent] = {}
    failed = 0
    async with trace_execve(failed=True) as events:
        await run_sync(act)
        events.detach()
        async for batch in events.batches():
            expected = list(batch)
            found = read_back(batch)
            assert found == expected
            assert repr(found) == repr(expected)
            seen |= {event.pid: event for event in found}
            failed += sum(event.filename == "/nonexistent/\\xff\n" for event in found)
    assert failed == 1
    for pid, argv in list(zip(pids, STRANGE, strict=True))[:-1]:
        assert seen[pid].args == tuple(map(text.decode, argv))
    assert seen[pids[-1]].args_truncated


async def test_calls_come_back() -> None:
    seen: list[SyscallEvent] = []
    async with trace_syscalls("close", "exit_group", "mmap", result=True) as events:
        await run_sync(lambda: subprocess.run(["/bin/true"], check=True))
        events.detach()
        async for batch in events.batches():
            expected = list(batch)
            found = read_back(batch)
            assert found == expected
            assert repr(found) == repr(expected)
            seen += found
    assert {event.name for event in seen} == {"close", "exit_group", "mmap"}
    assert {event.result is None for event in seen} == {False, True}
    assert any(argument > 2**63 for event in seen for argument in event.arguments), (
        "-1 is a descriptor of mmap"
    )
