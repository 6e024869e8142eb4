"""Program executions, from `bpf/execve.c`."""

from __future__ import annotations

import errno
import typing
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal, Unpack

from ebpfstream import text
from ebpfstream.containers import of_cgroup
from ebpfstream.events import I32, U8, U32, U64, Char, Comm, Computed, Event, Flag, Tail, WallClock
from ebpfstream.filters import Filters
from ebpfstream.kernel.buffers import SIZE, Kind
from ebpfstream.kernel.links import Hook, RawTracepoint, Tracepoint
from ebpfstream.lost import Lost
from ebpfstream.readymade import BPF_FOLDER, Options, Overload, ReadyMade
from ebpfstream.stream import LATENCY, EventStream, OnLost
from ebpfstream.text import command_line
from ebpfstream.values import remember

_LONGEST_CACHED = 256  # bytes of a path: some 2 MB in all


def _errno_name(retval: int) -> str:
    return errno.errorcode.get(-retval, str(-retval)) if retval else ""


class _Paths(dict[bytes, str]):
    """Paths, by their names with a NUL after each, from the innermost: they come again and again."""

    def __missing__(self, names: bytes) -> str:
        made = text.decode(b"/" + b"/".join(reversed(names.split(b"\0")[:-1])))
        remember(self, names, made, _LONGEST_CACHED)
        return made


@dataclass
class ExecEvent(Event):
    """One execve(2) or execveat(2), successful unless the stream was asked for failures as well.

    Process, user and group numbers are those of the initial namespaces, whatever the process itself
    sees.
    """

    __schema_version__ = 1

    pid: U32
    """The process (the kernel's tgid)."""
    uid: U32
    """Its real user."""
    comm: Comm
    """Its name: the first 15 bytes of the new program's, or after a failure the one it had."""
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
    begin with its interpreter.  After a failure, those that the caller gave.  The last one is cut
    short if `args_truncated`."""
    args_size: U32
    """Bytes of all arguments, each with its NUL, however many of them are here; after a failure, of those read."""
    args_truncated: Flag
    """Whether there were more than 16 KiB of them."""
    args_unreadable: Flag
    """Whether they could not be read: not there, or not in memory.  Those before the first such one are here."""
    retval: I32
    """0, or what the call returned instead: a negative errno."""
    error: Annotated[str, Computed(_errno_name, ("retval",))]
    """The errno's name, such as ENOENT; empty for a success."""
    by_descriptor: Flag
    """Whether a descriptor, or a path from one, was given (execveat): `filename` then begins with
    /dev/fd/, or in a failure is what was given beside the descriptor."""
    cwd: Annotated[str, Tail(_Paths().__getitem__)]
    """The working directory, as the process itself sees it."""
    cwd_truncated: Flag
    """Whether `cwd` lacks its beginning: only 40 steps, or 4 KiB, from its end are followed."""
    parent_comm: Comm
    """The parent's name."""
    start_time: Annotated[datetime, WallClock("start_monotonic")]
    """When the process was made, in UTC."""
    start_monotonic: U64
    """The same in nanoseconds of CLOCK_MONOTONIC; with `pid` it names a process for good."""
    session: U32
    """Its session."""
    tty: Annotated[str, Char(16)]
    """Its controlling terminal as the kernel calls it (pts3 is /dev/pts/3); empty if it has none."""
    pid_namespace: U32
    """The inode number of its pid namespace (/proc/PID/ns/pid)."""
    namespace_pid: U32
    """Its number there."""
    cgroup_id: U64
    """The inode number of its cgroup in the cgroup v2 hierarchy."""
    container_id: Annotated[str | None, Computed(of_cgroup, ("cgroup_id",))]
    """The container that its cgroup belongs to, if its path tells one."""
    cpu: U32
    """The CPU it happened on."""
    program: U8
    """Which program saw it: 0 a success, 1 a failed execve, 2 a failed execveat."""
    weight: U32
    """1, and how many that sampling or a pause left out before it on this CPU and program."""
    sequence: U64
    """Its number among the events of this stream from this CPU and program, from 0; a gap is a lost event."""
    time: Annotated[datetime, WallClock("monotonic")]
    """When, in UTC: `monotonic` plus the difference of the two clocks when the event was received."""
    monotonic: U64
    """When, in nanoseconds of CLOCK_MONOTONIC (bpf_ktime_get_ns)."""


@typing.overload
def trace_execve(
    *, failed: bool = ..., on_lost: Literal["yield"], **options: Unpack[Options]
) -> EventStream[ExecEvent | Lost]: ...
@typing.overload
def trace_execve(
    *, failed: bool = ..., on_lost: Literal["count", "raise"] = ..., **options: Unpack[Options]
) -> EventStream[ExecEvent]: ...
def trace_execve(
    *,
    failed: bool = False,
    pid: int | None = None,
    ppid: int | None = None,
    uid: int | None = None,
    gid: int | None = None,
    comm: str | None = None,
    cgroup: str | None = None,
    exclude_self: bool = False,
    buffer: Kind = "auto",
    buffer_size: int = SIZE,
    max_delay: float = 0,
    overload: Overload = "lose",
    on_lost: OnLost = "count",
    latency: float = LATENCY,
) -> EventStream[Any]:
    """Every successful execve and execveat on this machine, from any thread and in any container.

    With `failed`, those that fail as well, each step of a search along PATH (Linux ≥ 5.15, tracefs;
    x86-64 and arm64; not calls of 32-bit programs).

    Filters work in the kernel: `pid`, `ppid`, `uid`, `gid` as in the events; `comm`, the whole name;
    `cgroup`, a cgroup v2 directory with its descendants; `exclude_self`, all but this process and
    those it starts.  `EventStream.set_filters` changes them while the stream runs.

    `buffer` is the kind of kernel buffer: "ring" (Linux ≥ 5.8), "perf", or "auto": the ring where
    there is one.  `buffer_size` is its size in bytes, in all; the kernel takes powers of two, in a
    perf buffer for each CPU, so what is used is that much or less.  In a perf buffer events are
    ordered by time across CPUs; `max_delay` is how many seconds they wait for older ones that are
    late.  `latency` is how many seconds events may gather after the first one woke the stream: 0
    costs the most CPU.

    `overload` is what becomes of events when the consumer is too slow.  "lose": the buffer fills, and
    then what happens is lost.  "sample": when half of it is full, one event in ten is kept, in the
    kernel, until an eighth is; each says in `weight` for how many it stands, and those left out are
    counted as `skipped`.  `Sampling(one_in, high, low)` is for other figures.  The program looks at a
    ring buffer's fill for each event; of a perf buffer it is told when the stream drains it.
    `on_lost` says whether losses are counted only, yielded in their place, or raised: see EventStream.

    Nothing is attached until the stream is entered or first iterated; then these may be raised:
    PrivilegeError (root, or CAP_BPF and CAP_PERFMON), UnsupportedError (Linux ≥ 5.8, or 5.7 with a
    perf buffer, with BTF or with its headers), BccNotFoundError.  ArgumentError at once.

    The stream costs the machine some microseconds for each exec, and nothing otherwise; with
    `failed`, something for every system call of every process (benchmarks/syscall_tax.py).
    """
    hooks: dict[str, Hook] = {"exec_succeeded": RawTracepoint("sched_process_exec")}
    if failed:
        hooks["execve_failed"] = Tracepoint("syscalls", "sys_exit_execve")
        hooks["execveat_failed"] = Tracepoint("syscalls", "sys_exit_execveat")
    source = ReadyMade(
        BPF_FOLDER / "execve.c",
        ExecEvent,
        hooks,
        cflags=["-DFAILED"] if failed else [],
        filters=Filters(
            pid=pid, ppid=ppid, uid=uid, gid=gid, comm=comm, cgroup=cgroup, exclude_self=exclude_self
        ),
        buffer=buffer,
        buffer_size=buffer_size,
        max_delay=max_delay,
        overload=overload,
    )
    return EventStream(source, ExecEvent, latency=latency, on_lost=on_lost)
