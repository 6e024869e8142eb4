"""Where programs are attached, and what keeps them so."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from ebpfstream.errors import ArgumentError, AttachError, EbpfStreamError, UnsupportedError
from ebpfstream.kernel import kprobes
from ebpfstream.kernel.bpf import (
    ENOTSUPP,
    Descriptor,
    Program,
    ProgramType,
    address,
    bpf,
    kernel_release,
    online_cpus,
    perf_event_open,
    privilege_error,
)
from ebpfstream.kernel.tracefs import raw_tracepoint_hint, tracepoint_id

_RAW_TRACEPOINT_OPEN = 17  # enum bpf_cmd, include/uapi/linux/bpf.h

# include/uapi/linux/perf_event.h
_PERF_TYPE_TRACEPOINT = 2
_PERF_EVENT_IOC_SET_BPF, _PERF_EVENT_IOC_ENABLE = 0x40042408, 0x2400
# struct perf_event_attr up to config2: type, size, config, sample_period or sample_freq, sample_type,
# read_format, flags, wakeup_events, bp_type, config1, config2.
_ATTRIBUTES: Final = struct.Struct("<IIQQQQQIIQQ")
_DISABLED, _FREQUENCY = 1 << 0, 1 << 10

_PMUS: Final = Path("/sys/bus/event_source/devices")


class RawTracepoint(NamedTuple):
    """A hook: the raw tracepoint of this name.  Linux ≥ 4.17."""

    name: str

    def __str__(self) -> str:
        return f"raw tracepoint {self.name}"


class Tracepoint(NamedTuple):
    """A hook: the tracepoint `category:name`.  Linux ≥ 4.7."""

    category: str
    name: str

    def __str__(self) -> str:
        return f"tracepoint {self.category}:{self.name}"


class Kprobe(NamedTuple):
    """A hook: a function of the kernel, `offset` bytes into it, or its return.  Linux ≥ 4.17."""

    function: str
    offset: int = 0
    returns: bool = False

    def __str__(self) -> str:
        place = f"{self.function}+{self.offset:#x}" if self.offset else self.function
        return f"{'kretprobe' if self.returns else 'kprobe'} {place}"


class Uprobe(NamedTuple):
    """A hook: an instruction of an ELF file, or the return from the function that begins there.

    `offset` counts bytes of the file; `symbols.resolve` finds it.  With `pid` it is that process
    alone (all its threads), else every process, those to come included.  Linux ≥ 4.17.  Before 6.13
    (ignore_ret_handler() in kernel/events/uprobes.c) returns are not told apart: a uretprobe of one
    process runs for others as well whose calls of the same function somebody else probes.
    """

    path: str
    offset: int
    returns: bool = False
    pid: int = -1

    def __str__(self) -> str:
        place = f"{'uretprobe' if self.returns else 'uprobe'} {self.path}+{self.offset:#x}"
        return place if self.pid < 0 else f"{place} in process {self.pid}"


class PerfEvent(NamedTuple):
    """A hook: every `sample_period`th event of a counter, or so that it is `sample_freq` times a second.

    `type` and `config` are perf_event_open(2)'s.  `pid` is one thread, `cpu` one CPU; without both it
    is everything on the CPUs that are online when it is attached.  Linux ≥ 4.9.
    """

    type: int
    config: int
    sample_period: int = 0
    sample_freq: int = 0
    pid: int = -1
    cpu: int = -1

    def __str__(self) -> str:
        thread = f" of thread {self.pid}" if self.pid >= 0 else ""
        return f"perf event {self.type}:{self.config:#x}{thread}" + (
            f" on CPU {self.cpu}" if self.cpu >= 0 else ""
        )


Hook = RawTracepoint | Tracepoint | Kprobe | Uprobe | PerfEvent


_SYSTEM_CALLS: Final = (RawTracepoint("sys_enter"), RawTracepoint("sys_exit"))


def program_type(hook: Hook) -> ProgramType:
    """As what a program must be loaded to be attached there."""
    if isinstance(hook, RawTracepoint):
        return ProgramType.RAW_TRACEPOINT
    if isinstance(hook, Tracepoint):
        return ProgramType.TRACEPOINT
    return ProgramType.PERF_EVENT if isinstance(hook, PerfEvent) else ProgramType.KPROBE


class Link:
    """What keeps a program attached; closing it detaches, as does losing the last reference.

    `hook` is where, `program_name` what.
    """

    __slots__ = ("__weakref__", "_descriptors", "hook", "program_name")

    def __init__(self, program_name: str, hook: Hook, descriptors: list[Descriptor]) -> None:
        self.program_name = program_name
        self.hook = hook
        self._descriptors = descriptors

    @classmethod
    def attach(cls, program: Program, hook: Hook) -> Link:
        """Attach a program that was loaded as `program_type(hook)`.

        Raises AttachError, PrivilegeError, UnsupportedError for a hook that this kernel does not have,
        ArgumentError.  Whatever it raises, nothing stays attached.
        """
        descriptors: list[Descriptor] = []
        try:
            _attach(program, hook, descriptors)
        except BaseException as error:
            _close(descriptors)
            if isinstance(error, struct.error):
                raise ArgumentError(f"there is no {hook}: a number is below 0 or too large") from error
            raise
        return cls(program.name, hook, descriptors)

    @classmethod
    def joined(cls, links: Sequence[Link]) -> Link:
        """Several links as one, which has the first one's hook; they are closed by it alone."""
        first = links[0]
        descriptors = [descriptor for link in links for descriptor in link._descriptors]  # noqa: SLF001  # of this class
        return cls(first.program_name, first.hook, descriptors)

    def close(self) -> None:
        """Detach: no further run of the program begins here.  Closing again does nothing.

        Takes the kernel some 10 ms where system calls are traced.
        """
        if self._descriptors:
            _close(self._descriptors)
            if self.hook in _SYSTEM_CALLS:
                _wait_for_system_calls()

    def __repr__(self) -> str:
        return f"<Link {self.program_name} on {self.hook}{'' if self._descriptors else ', closed'}>"


def _wait_for_system_calls() -> None:
    """Let tasks that are about to run a program at the entry or exit of a system call do so.

    Since Linux 6.13 they may sleep before they do, so the grace period of RCU that ends all other programs
    (`bpf.wait_for_running_programs`) does not wait for them.  Giving up the only perf event of a tracepoint
    waits for both kinds (perf_trace_event_unreg(), kernel/trace/trace_event_perf.c).
    """
    if kernel_release() < (6, 13):
        return
    with suppress(EbpfStreamError):  # without tracefs the last few calls cannot be waited for
        attributes = _attributes(_PERF_TYPE_TRACEPOINT, tracepoint_id("task", "task_rename"), sample=1)
        fd = perf_event_open(attributes, online_cpus()[0])
        if fd >= 0:
            os.close(fd)


def _close(descriptors: list[Descriptor]) -> None:
    while descriptors:
        descriptors.pop().close()


def _attach(program: Program, hook: Hook, descriptors: list[Descriptor]) -> None:
    """Attach; what keeps the program attached is added to `descriptors`."""
    if isinstance(hook, RawTracepoint):
        descriptors.append(_raw_tracepoint(program, hook))
        return
    if isinstance(hook, PerfEvent):
        if (hook.sample_period > 0) is (hook.sample_freq > 0):
            raise ArgumentError("a perf event needs either sample_period or sample_freq, a number above 0")
        flags = _DISABLED | (_FREQUENCY if hook.sample_freq else 0)
        sample = hook.sample_freq or hook.sample_period
        for cpu in online_cpus() if hook.pid < 0 and hook.cpu < 0 else [hook.cpu]:
            attributes = _attributes(hook.type, hook.config, sample=sample, flags=flags)
            _perf_event(program, hook, attributes, hook.pid, cpu, descriptors)
        return
    # With neither, perf_event_open(2) wants a CPU, but the program then runs on every one.
    pid, cpu = -1, online_cpus()[0]
    target = b""
    if isinstance(hook, Tracepoint):
        number = tracepoint_id(hook.category, hook.name)
        attributes = _attributes(_PERF_TYPE_TRACEPOINT, number, sample=1)
    elif isinstance(hook, Kprobe):
        if not kprobes.kprobes_available():
            raise kprobes.without_kprobes(program.name, hook.function, returns=hook.returns)
        target = hook.function.encode() + b"\0"
        attributes = _attributes(*_pmu("kprobe", hook.returns), target=address(target), offset=hook.offset)
    else:
        target = os.fsencode(hook.path) + b"\0"
        attributes = _attributes(*_pmu("uprobe", hook.returns), target=address(target), offset=hook.offset)
        if hook.pid >= 0:
            pid, cpu = hook.pid, -1
    _perf_event(program, hook, attributes, pid, cpu, descriptors)


def _attributes(
    type: int,
    config: int,
    *,
    sample: int = 0,
    flags: int = 0,
    target: int = 0,
    offset: int = 0,
) -> bytes:
    return _ATTRIBUTES.pack(type, _ATTRIBUTES.size, config, sample, 0, 0, flags, 0, 0, target, offset)


def _pmu(name: str, returns: bool) -> tuple[int, int]:
    """A kind of probe as perf_event_open(2) knows it: type and config."""
    folder = _PMUS / name
    try:
        number = int((folder / "type").read_text())
        bit = int((folder / "format/retprobe").read_text().strip().removeprefix("config:"))
    except OSError as error:
        raise UnsupportedError(
            f"this kernel (Linux {os.uname().release}) has no {name}s, which need "
            f"CONFIG_{name.upper()}_EVENTS and Linux 4.17"
        ) from error
    return number, int(returns) << bit


def _perf_event(
    program: Program, hook: Hook, attributes: bytes, pid: int, cpu: int, descriptors: list[Descriptor]
) -> None:
    fd = perf_event_open(attributes, cpu, pid)
    if fd < 0:
        code = ctypes.get_errno()
        if code in (errno.EPERM, errno.EACCES):
            raise privilege_error(perf_event=True)
        raise AttachError(f"{program.name} cannot be attached to the {hook}: {_reason(hook, code)}")
    descriptors.append(Descriptor(fd))
    try:
        fcntl.ioctl(fd, _PERF_EVENT_IOC_SET_BPF, program.fd)
        fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise privilege_error(perf_event=True) from error
        # perf_event_set_bpf_prog() in kernel/events/core.c
        reason = {
            errno.EACCES: "it reads past the end of what this hook hands over",
            errno.EINVAL: f"only a program that was loaded as {program_type(hook).name} fits there",
            errno.EEXIST: "it is attached there already",
            errno.E2BIG: "64 programs are attached there already",
        }.get(error.errno or 0, error.strerror)
        raise AttachError(f"{program.name} cannot be attached to the {hook}: {reason}") from error


def _reason(hook: Hook, code: int) -> str:
    """What an errno of perf_event_open(2) means for this hook."""
    if isinstance(hook, Kprobe):
        return kprobes.reason(hook.function, hook.offset, code, returns=hook.returns)
    if isinstance(hook, Uprobe):
        # perf_uprobe_init() in kernel/trace/trace_event_perf.c, uprobe_register() in kernel/events/uprobes.c
        reasons = {
            errno.ENOENT: "there is no such file",
            errno.ESRCH: "there is no such process",
            errno.EINVAL: "this is no regular file, or it ends before that offset",
            errno.ENOEXEC: "no instruction begins at that offset",
            ENOTSUPP: "the kernel cannot put a probe on the instruction there",
        }
    elif isinstance(hook, PerfEvent):
        unknown = "this machine does not count such events (virtual machines often have no hardware counters)"
        reasons = {
            errno.ENOENT: unknown,
            errno.EOPNOTSUPP: unknown,
            errno.ESRCH: "there is no such thread",
            errno.ENODEV: "this CPU is not online",
            errno.EINVAL: "there is no such event or CPU, or sample_freq is above "
            "/proc/sys/kernel/perf_event_max_sample_rate",
        }
    else:
        reasons = {}
    return reasons.get(code, os.strerror(code))


def _raw_tracepoint(program: Program, hook: RawTracepoint) -> Descriptor:
    target = hook.name.encode() + b"\0"
    fd = bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", address(target), program.fd, 0))
    if fd >= 0:
        return Descriptor(fd)
    code = ctypes.get_errno()
    if code in (errno.EPERM, errno.EACCES):
        raise privilege_error()
    reason = {
        errno.ENOENT: "there is no such tracepoint",
        errno.EINVAL: "it was not loaded as RAW_TRACEPOINT, or reads past the last of its arguments",
    }.get(code, os.strerror(code))
    raise AttachError(
        f"{program.name} cannot be attached to the raw tracepoint {hook.name!r}: {reason} "
        f"(Linux {os.uname().release})" + (raw_tracepoint_hint(hook.name) if code == errno.ENOENT else "")
    )
