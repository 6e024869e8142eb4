"""System calls, from `bpf/syscalls.c`."""

from __future__ import annotations

import errno
import struct
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, Unpack

from ebpfstream.errors import ArgumentError
from ebpfstream.events import (
    U8,
    U32,
    U64,
    Array,
    Comm,
    Computed,
    Embedded,
    Event,
    Integer,
    WallClock,
    layout,
)
from ebpfstream.filters import Filters
from ebpfstream.kernel.bpf import MapType
from ebpfstream.kernel.buffers import SIZE, Kind
from ebpfstream.kernel.links import Hook, RawTracepoint
from ebpfstream.lost import Lost
from ebpfstream.readymade import BPF_FOLDER, CALLS, MapSpec, Options, Overload, ReadyMade
from ebpfstream.stream import LATENCY, EventStream, OnLost
from ebpfstream.syscall_names import MOST_ARGUMENTS, argument_count, name_of, number_of, numbers

# Those that do not come back to where they were called.
_NO_RETURN: Final = {"exit", "exit_group", "rt_sigreturn", "sigreturn"}
_IN_FLIGHT: Final = 1 << 16  # calls that may wait for their return at a time

_OPTIONAL: Final = struct.Struct("<q?")  # a number, and whether there is one
_MAX_ERRNO: Final = 4095  # include/linux/err.h
# What a signal interrupts returns one of these at first (include/linux/errno.h); its caller sees EINTR, or nothing.
_RESTARTS: Final = {
    512: "ERESTARTSYS",
    513: "ERESTARTNOINTR",
    514: "ERESTARTNOHAND",
    516: "ERESTART_RESTARTBLOCK",
}


def _optional(data: bytes) -> int | None:
    value, given = _OPTIONAL.unpack(data)
    return value if given else None


def _error(result: int | None) -> str:
    if result is None or not -_MAX_ERRNO <= result < 0:
        return ""
    return errno.errorcode.get(-result) or _RESTARTS.get(-result) or str(-result)


def _message(number: int, arguments: tuple[int, ...], result: int | None) -> str:
    shown = ", ".join(map(hex, arguments[: argument_count(number)]))
    call = f"{name_of(number)}({shown})"
    if result is None:
        return call
    if error := _error(result):
        return f"{call} = {result} {error}"
    return f"{call} = {result if abs(result) < 1 << 32 else hex(result)}"  # the latter is an address, mostly


@dataclass
class SyscallEvent(Event):
    """One system call, when it began or, where results were asked for, when it had returned.

    Process, user and group numbers are those of the initial namespaces, whatever the process itself
    sees, and what they were when the call began.
    """

    __schema_version__ = 1

    pid: U32
    """The process (the kernel's tgid)."""
    uid: U32
    """Its real user."""
    comm: Comm
    """The name of the thread, up to 15 bytes."""
    message: Annotated[str, Computed(_message, ("number", "arguments", "result"))]
    """The call on one line, such as `close(0xffffffff) = -9 EBADF`: as many arguments as it takes (all six
    where the kernel does not tell), and the result if there is one."""
    name: Annotated[str, Computed(name_of, ("number",))]
    """The call's name on this architecture; `syscall_467` of one that has none in the installed tables."""
    number: U32
    """Its number."""
    arguments: Annotated[tuple[int, ...], Array(Integer(8), MOST_ARGUMENTS)]
    """The registers of all six arguments, from 0 to 2**64 - 1; those that the call does not take mean nothing."""
    result: Annotated[int | None, Embedded(_OPTIONAL.size, _optional)]
    """What it returned, an error as a negative number; None of a call that never returns, or if results
    were not asked for.  A call that a signal interrupted may show an error of the kernel's own, ERESTARTSYS
    and its like: then it is tried again, or its caller gets EINTR."""
    error: Annotated[str, Computed(_error, ("result",))]
    """The errno's name, such as ENOENT; empty if there is none."""
    duration: Annotated[int | None, Embedded(_OPTIONAL.size, _optional)]
    """Nanoseconds from its entry to its return; None where `result` is."""
    tid: U32
    """The thread that called."""
    gid: U32
    """The process's real group."""
    ppid: U32
    """Its parent."""
    cpu: U32
    """The CPU from which it was submitted: where it began, or with a result, where it returned."""
    program: U8
    """Which program saw it: 0 at its entry, 2 at its return, 3 when its thread ended within it."""
    weight: U32
    """1, and how many that sampling or a pause left out before it on this CPU and program."""
    sequence: U64
    """Its number among the events of this stream from this CPU and program, from 0; a gap is a lost event."""
    time: Annotated[datetime, WallClock("monotonic")]
    """When it began, in UTC: `monotonic` plus the difference of the two clocks when the event was received."""
    monotonic: U64
    """When it began, in nanoseconds of CLOCK_MONOTONIC (bpf_ktime_get_ns)."""


@typing.overload
def trace_syscalls(
    *calls: str | int,
    ignore: Iterable[str | int] = ...,
    result: bool = ...,
    on_lost: Literal["yield"],
    **options: Unpack[Options],
) -> EventStream[SyscallEvent | Lost]: ...
@typing.overload
def trace_syscalls(
    *calls: str | int,
    ignore: Iterable[str | int] = ...,
    result: bool = ...,
    on_lost: Literal["count", "raise"] = ...,
    **options: Unpack[Options],
) -> EventStream[SyscallEvent]: ...
def trace_syscalls(
    *calls: str | int,
    ignore: Iterable[str | int] = (),
    result: bool = False,
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
    """System calls of this machine, each as an event: those named, or all of them, without those to `ignore`.

    Calls are given by their names on this architecture ("openat"), or by their numbers (those from 0 to
    1023; larger ones are not seen).  A program at the entry of every call jumps to the one that
    submits, if the call is a chosen one; nothing else is looked at for the others.

    With `result` events have a result and a duration, and come when the call has returned; those that
    never do (exit, exit_group, rt_sigreturn) come at their entry, and one whose thread ends within it comes
    then.  Calls that had begun before the stream was opened, or that have not returned when it ends,
    are no events.  65,536 calls at a time can wait for their return; one beyond that is counted as lost.

    Calls of 32-bit programs are left out, as their numbers mean other calls; such a one whose number is
    that of a chosen call is counted as rejected.

    Filters, `buffer`, `buffer_size`, `max_delay`, `overload`, `on_lost` and `latency` are those of
    `trace_execve`.  Reading the stream takes system calls, too: with `exclude_self` those of this process
    are left out.

    Nothing is attached until the stream is entered or first iterated; then these may be raised:
    PrivilegeError (root, or CAP_BPF and CAP_PERFMON), UnsupportedError (Linux ≥ 5.8, or 5.7 with a perf
    buffer, with BTF or with its headers; x86-64 or arm64), BccNotFoundError.  At once, ArgumentError for
    an unknown name.

    Every system call of every process pays for it while the stream is open; `bpf/syscalls.c` says how much.
    """
    if isinstance(ignore, str):
        ignore = [ignore]
    ignored = {number_of(call, CALLS) for call in ignore}
    chosen = {number_of(call, CALLS) for call in calls} if calls else set(range(CALLS))
    if not chosen - ignored:
        raise ArgumentError("all calls that were named are to be ignored: nothing is left to trace")
    never = {number for name, number in numbers().items() if name in _NO_RETURN}
    hooks: dict[str, Hook | None] = {"entered": None}
    if result:
        # Exits first: a call is remembered only when its return will be seen.
        hooks["remembered"] = None
        hooks["returned"] = RawTracepoint("sys_exit")
        hooks["ended"] = RawTracepoint("sched_process_exit")
    hooks["dispatched"] = RawTracepoint("sys_enter")
    source = ReadyMade(
        BPF_FOLDER / "syscalls.c",
        SyscallEvent,
        hooks,
        maps={"PENDING": MapSpec(MapType.HASH, 8, layout(SyscallEvent).size, _IN_FLIGHT)},
        calls={
            number: "remembered" if result and number not in never else "entered"
            for number in sorted(chosen - ignored)
        },
        filters=Filters(
            pid=pid, ppid=ppid, uid=uid, gid=gid, comm=comm, cgroup=cgroup, exclude_self=exclude_self
        ),
        buffer=buffer,
        buffer_size=buffer_size,
        max_delay=max_delay,
        overload=overload,
    )
    return EventStream(source, SyscallEvent, latency=latency, on_lost=on_lost)
