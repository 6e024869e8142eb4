"""What this library needs of a machine, found out by doing it."""

from __future__ import annotations

import mmap
import os
import platform
import resource
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

import anyio
from anyio.to_thread import run_sync

from ebpfstream.batch import EventBatch
from ebpfstream.errors import EbpfStreamError, PrivilegeError
from ebpfstream.forwarding import Forwarding
from ebpfstream.kernel import bcc, compiler, headers, kprobes, privileges
from ebpfstream.kernel.bpf import Map, MapType, Program, kernel_release, online_cpus
from ebpfstream.kernel.links import Hook, Kprobe, Link, RawTracepoint, Tracepoint, program_type
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.sink import Sink
from ebpfstream.tracers.execve import ExecEvent, trace_execve

State = Literal["ok", "missing", "unknown"]

PATIENCE: Final = 10.0
"""Seconds in which a program's execution must have arrived at the sinks."""

_PROGRAM: Final = "int probe(void *ctx) { return 0; }"
_CAPABILITIES: Final = ("CAP_SYS_ADMIN", "CAP_PERFMON", "CAP_BPF")
_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
_PARANOID: Final = Path("/proc/sys/kernel/perf_event_paranoid")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the library can need."""

    name: str
    """What it is."""
    state: State
    """Whether it is there; "unknown" if this process cannot tell."""
    found: str
    """What was found."""
    remedy: str = ""
    """What to do where it is missing, in one line."""
    needed: bool = True
    """Whether nothing works without it."""


async def examine(*sinks: Sink) -> AsyncIterator[Finding]:
    """Try all that the library needs, one after the other; at the end, whether an exec arrives at the sinks.

    Without sinks it has to arrive in this process.  What was attached and made for it is gone afterwards.
    """
    for probe in (_kernel, _rights, _lockdown, _memory, _types, _binding, _cache):
        yield await run_sync(probe)
    finding, module = await _compiling()
    yield finding
    for kind in _HOOKS:
        yield await run_sync(_attaching, module, kind)
    for buffer in (_ring_buffer, _perf_buffer):
        yield await run_sync(buffer)
    yield await _arrival(sinks)


def _kernel() -> Finding:
    release = f"Linux {os.uname().release}, {platform.machine()}"
    if kernel_release() >= (5, 8):
        return Finding("kernel", "ok", release)
    return Finding("kernel", "missing", release, "use Linux 5.8 or newer (5.7 will do with perf buffers)")


def _rights() -> Finding:
    """By making a map: the capabilities say only what ought to be possible."""
    held = privileges.held()
    names = [name for name in _CAPABILITIES if name in held]
    who = f"user {os.geteuid()}, {', '.join(names) or 'without capabilities for it'}"
    try:
        Map.create("probe", MapType.ARRAY, key_size=4, value_size=4, max_entries=1).close()
    except EbpfStreamError as error:
        return _missing("rights", error, found=who)
    return Finding("rights", "ok", who)


def _lockdown() -> Finding:
    try:
        modes = _LOCKDOWN.read_text()
    except OSError:
        return Finding("lockdown", "unknown", f"{_LOCKDOWN} cannot be read", needed=False)
    mode = modes.partition("[")[2].partition("]")[0]
    if mode == "confidentiality":
        return Finding("lockdown", "missing", mode, "boot without lockdown=confidentiality")
    return Finding("lockdown", "ok", mode or "none")


def _memory() -> Finding:
    if kernel_release() >= (5, 11):
        return Finding("locked memory", "ok", "maps are not charged to RLIMIT_MEMLOCK", needed=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or os.geteuid() == 0:
        return Finding("locked memory", "ok", "RLIMIT_MEMLOCK can be raised", needed=False)
    return Finding(
        "locked memory", "missing", f"RLIMIT_MEMLOCK is {soft} bytes", "ulimit -l unlimited", needed=False
    )


def _types() -> Finding:
    """Where programs get the kernel's types from."""
    kernel = headers.Kernel()
    try:
        size = len(kernel.types())
    except EbpfStreamError as error:
        if kernel.has_headers():
            return Finding("kernel's types", "ok", f"the headers of {kernel.release}")
        return _missing("kernel's types", error, found=f"neither {kernel.btf} nor headers")
    more = "; its headers are installed as well" if kernel.has_headers() else ""
    return Finding("kernel's types", "ok", f"BTF, {size >> 10} KiB{more}")


def _binding() -> Finding:
    try:
        package = bcc.find()
    except EbpfStreamError as error:
        install = [line.strip() for line in str(error).splitlines()[1:] if ":" in line]
        return Finding("BCC", "missing", "its Python binding is not installed", "; ".join(install))
    return Finding("BCC", "ok", f"{bcc.version(package)} in {package}")


def _cache() -> Finding:
    folder = headers.cache_directory()
    if folder is not None:
        return Finding("cache", "ok", str(folder), needed=False)
    remedy = "set EBPFSTREAM_CACHE to a folder that only this user can write"
    return Finding("cache", "missing", "no folder can be trusted: each start compiles", remedy, needed=False)


async def _compiling() -> tuple[Finding, compiler.Module | None]:
    start = time.perf_counter()
    try:
        module = await compiler.compile(_PROGRAM)
    except EbpfStreamError as error:
        return _missing("compiling", error, found="a program of one line does not compile"), None
    return Finding("compiling", "ok", f"in {time.perf_counter() - start:.1f} s"), module


class _Hooked(NamedTuple):
    """A kind of hook that programs are attached to."""

    name: str
    hook: Callable[[], Hook]
    needed: bool
    remedy: str


_HOOKS: Final = (
    _Hooked("raw tracepoints", lambda: RawTracepoint("sched_process_exec"), True, "use Linux 4.17 or newer"),
    _Hooked(
        "tracepoints",
        lambda: Tracepoint("syscalls", "sys_exit_execve"),
        False,
        "mount -t tracefs tracefs /sys/kernel/tracing; without them there are no failed execs",
    ),
    _Hooked(
        "kprobes",
        lambda: Kprobe(kprobes.syscall_function("execve")),
        False,
        "programs of yours use tracepoints instead: attach_syscall() does by itself",
    ),
)


def _attaching(module: compiler.Module | None, kind: _Hooked) -> Finding:
    """By attaching a program that does nothing."""
    if module is None:
        return Finding(kind.name, "unknown", "not tried: nothing compiles", needed=kind.needed)
    hook = kind.hook()
    try:
        program = Program.load(
            "probe",
            program_type(hook),
            module.functions["probe"],
            {},
            license=module.license,
            kernel_version=module.kernel_version,
        )
        try:
            Link.attach(program, hook).close()
        finally:
            program.close()
    except EbpfStreamError as error:
        return _missing(kind.name, error, kind.remedy, needed=kind.needed)
    return Finding(kind.name, "ok", f"{hook}", needed=kind.needed)


def _ring_buffer() -> Finding:
    try:
        RingBuffer.create(mmap.PAGESIZE).close()
    except EbpfStreamError as error:
        return _missing("ring buffer", error, "the perf buffer is used instead", needed=False)
    return Finding("ring buffer", "ok", "made and mapped", needed=False)


def _perf_buffer() -> Finding:
    try:
        paranoid = f"perf_event_paranoid is {_PARANOID.read_text().strip()}"
    except OSError:
        paranoid = "perf_event_paranoid is not to be had"
    cpus = len(online_cpus())
    try:
        PerfBuffer.create(mmap.PAGESIZE * cpus).close()
    except EbpfStreamError as error:
        return _missing("perf buffer", error, found=paranoid, needed=False)
    return Finding("perf buffer", "ok", f"a ring for each of {cpus} CPUs; {paranoid}", needed=False)


async def _arrival(sinks: tuple[Sink, ...]) -> Finding:
    """By executing a program that can be recognised, and requiring it where events go."""
    name, marker = "an exec arrives", f"ebpfstream-doctor-{os.urandom(8).hex()}"
    where = ", ".join(sink.name for sink in sinks) or "this process"
    errors: list[Exception] = []
    took: float | None = None

    async def take(batch: EventBatch[ExecEvent]) -> None:
        """Enough of a sink."""

    async def run() -> None:
        try:
            await forwarding.run()
        except (EbpfStreamError, OSError) as error:
            errors.append(error)
            tasks.cancel_scope.cancel()

    forwarding = Forwarding(
        trace_execve(), *(sinks or (take,)), count=1, where=lambda event: marker in event.args
    )
    with anyio.move_on_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await forwarding.attached.wait()
            start = time.perf_counter()
            await anyio.run_process(["true", marker])
            while not all(sink.acknowledged for sink in forwarding.statistics().sinks):  # noqa: ASYNC110
                await anyio.sleep(0.0005)
            took = time.perf_counter() - start
    if errors:
        return _missing(name, errors[0], found=f"not at {where}")
    if took is None:
        remedy = (
            "see the lines above; if nothing is missing there, report it, with `ebpfstream doctor --json`"
        )
        return Finding(name, "missing", f"not at {where} within {PATIENCE:g} s", remedy)
    return Finding(name, "ok", f"at {where}, {took * 1000:.1f} ms after it was begun")


def _missing(
    name: str, error: Exception, remedy: str = "", *, found: str = "", needed: bool = True
) -> Finding:
    """What an error says: the remedy, if there is no other or rights are all that is lacking; else what was found."""
    message = " ".join(str(error).split())
    if not remedy or isinstance(error, PrivilegeError):
        return Finding(name, "missing", found or "the kernel refuses it", message, needed)
    # "… cannot be attached to …: the reason. What to do in a program"
    reason = message.partition(": ")[2].partition(". ")[0]
    return Finding(name, "missing", found or reason or message, remedy, needed)
