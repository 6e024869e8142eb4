"""Successful program executions, from `bpf/execve.c`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final

from ebpfstream.errors import ArgumentError
from ebpfstream.events import U32, U64, Comm, Computed, Event, Flag, Tail, WallClock
from ebpfstream.kernel import ringbuf
from ebpfstream.loader import BPF_FOLDER, ReadyMade
from ebpfstream.stream import LATENCY, EventStream
from ebpfstream.text import command_line

BUFFER_SIZE: Final = 4 << 20
"""Bytes: some 20,000 ordinary execs, or 200 with the longest arguments."""


@dataclass
class ExecEvent(Event):
    """One successful execve(2) or execveat(2).

    Process, user and group numbers are those of the initial namespaces, whatever the process itself
    sees.
    """

    pid: U32
    """The process (the kernel's tgid)."""
    uid: U32
    """Its real user."""
    comm: Comm
    """Its new name: the first 15 bytes of the program's."""
    message: Annotated[str, Computed(command_line, ("args",))]
    """The command line, quoted so that bash reads back exactly `args`; printable, on one line."""
    ppid: U32
    """Its parent."""
    tid: U32
    """The thread that called exec; `pid` unless that was not the process's leader."""
    gid: U32
    """Its real group."""
    filename: Annotated[str, Tail()]
    """The path as the caller gave it (a script's own, not its interpreter's), up to 4,095 bytes."""
    args: Annotated[tuple[str, ...], Tail()]
    """The new program's arguments as the kernel laid them out, up to 16 KiB; for a script they
    begin with its interpreter.  The last one is cut short if `args_truncated`."""
    args_size: U32
    """Bytes of all arguments, each with its NUL, however many of them are here."""
    args_truncated: Flag
    """Whether there were more than 16 KiB of them."""
    cgroup_id: U64
    """The inode number of its cgroup in the cgroup v2 hierarchy."""
    cpu: U32
    """The CPU it happened on."""
    sequence: U64
    """Its number among the events of this stream on this CPU, from 0; a gap is a lost event."""
    time: Annotated[datetime, WallClock("monotonic")]
    """When, in UTC: `monotonic` plus the difference of the two clocks when the event was received."""
    monotonic: U64
    """When, in nanoseconds of CLOCK_MONOTONIC (bpf_ktime_get_ns)."""


def trace_execve(
    *, buffer: str = "auto", buffer_size: int = BUFFER_SIZE, latency: float = LATENCY
) -> EventStream[ExecEvent]:
    """Every successful execve and execveat on this machine, from any thread and in any container.

    `buffer` is the kind of kernel buffer: "ring", or "auto", which is the ring as well.
    `buffer_size` is its size in bytes; the kernel takes powers of two, so the next one below is
    used.  `latency` is how many seconds events may gather after the first one woke the stream: 0
    costs the most CPU.

    Nothing is attached until the stream is entered or first iterated; then these may be raised:
    PrivilegeError (root, or CAP_BPF and CAP_PERFMON), UnsupportedError (Linux ≥ 5.8 with BTF or
    with its headers), BccNotFoundError.  ArgumentError at once.

    The stream costs the machine some microseconds for each exec, and nothing otherwise.
    """
    if buffer not in ("ring", "auto"):
        raise ArgumentError(f'buffer={buffer!r} is unknown: give "ring" or "auto"')
    source = ReadyMade(
        BPF_FOLDER / "execve.c",
        ExecEvent,
        {"exec_succeeded": "sched_process_exec"},
        ringbuf.buffer_bytes(buffer_size),
    )
    return EventStream(source, ExecEvent, latency=latency)
