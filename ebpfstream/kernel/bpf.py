"""The bpf(2) system call: maps and programs, and what it takes to reach the kernel.

Layouts are those of `union bpf_attr` and `struct bpf_prog_info` in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import re
import resource
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from enum import IntEnum
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, cast

from ebpfstream.errors import LoadError, PrivilegeError, UnsupportedError

# From each architecture's table of system calls.
_SYSCALLS: Final = {
    "x86_64": {"bpf": 321, "membarrier": 324, "perf_event_open": 298},
    "aarch64": {"bpf": 280, "membarrier": 283, "perf_event_open": 241},
    "riscv64": {"bpf": 280, "membarrier": 283, "perf_event_open": 241},
    "ppc64le": {"bpf": 361, "membarrier": 365, "perf_event_open": 319},
}

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _PROG_LOAD = 0, 1, 2, 3, 5
OBJ_GET_INFO_BY_FD: Final = 15

ENOTSUPP: Final = 524
"""An errno of the kernel's own, which has no name outside of it (include/linux/errno.h)."""

_INSTRUCTION: Final = struct.Struct("<BBhi")  # struct bpf_insn: code, dst_reg:4 src_reg:4, off, imm
_LD_IMM64: Final = 0x18  # BPF_LD | BPF_DW | BPF_IMM, the one instruction that fills two slots
_PSEUDO_MAP_FD: Final = 1

_LOG_SIZE, _LOG_SIZE_MAX = 1 << 20, 1 << 26
_LOG_LINES_SHOWN = 12

_MEMBARRIER_CMD_GLOBAL = 1
_PERF_FLAG_FD_CLOEXEC = 8

_BPF_F_NO_PREALLOC = 1

_PROG_INFO_SIZE: Final = 216  # struct bpf_prog_info up to recursion_misses, and where in it that is
_RECURSION_MISSES: Final = 208


class MapType(IntEnum):
    """`enum bpf_map_type`."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERF_EVENT_ARRAY = 4
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    STACK_TRACE = 7
    CGROUP_ARRAY = 8
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    QUEUE = 22
    STACK = 23
    RINGBUF = 27

    @classmethod
    def _missing_(cls, value: object) -> MapType:
        """Programs of others may have maps of any type; such a one is known by its number."""
        member = int.__new__(cls, cast("int", value))
        member._name_, member._value_ = f"TYPE_{value}", int(member)
        return member


PER_CPU: Final = (MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH)


class ProgramType(IntEnum):
    """`enum bpf_prog_type`."""

    KPROBE = 2
    TRACEPOINT = 5
    PERF_EVENT = 7
    RAW_TRACEPOINT = 17


class Descriptor:
    """Owns a file descriptor; closed by `close()` or with the last reference, whichever is first."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Give up the descriptor.  Closing again does nothing."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self.fd}>" if self.fd >= 0 else f"<{type(self).__name__} closed>"


class Map(Descriptor):
    """A BPF map in the kernel."""

    __slots__ = ("key_size", "max_entries", "type", "value_size")

    def __init__(self, fd: int, type: MapType, key_size: int, value_size: int, max_entries: int) -> None:
        super().__init__(fd)
        self.type = type
        self.key_size = key_size
        self.value_size = value_size
        self.max_entries = max_entries

    @classmethod
    def create(
        cls, name: str, type: MapType, *, key_size: int = 0, value_size: int = 0, max_entries: int
    ) -> Map:
        """Create a map in the kernel.  A hash map's values change in one piece, for whoever reads them.

        Raises PrivilegeError, UnsupportedError (a map type that this kernel does not know), LoadError.
        """
        attributes = struct.pack(
            "<IIIIIII16s",
            type,
            key_size,
            value_size,
            max_entries,
            # Preallocated elements are used again at once, under the eyes of programs that still read them.
            _BPF_F_NO_PREALLOC if type is MapType.HASH else 0,
            0,
            0,
            name.encode()[:15],
        )
        fd = bpf(_MAP_CREATE, attributes)
        if fd < 0:
            code = ctypes.get_errno()
            if code == errno.EPERM:
                raise privilege_error()
            if code == errno.EINVAL and type is MapType.RINGBUF:
                raise UnsupportedError(
                    f"this kernel ({os.uname().release}) has no BPF ring buffer, which came with Linux 5.8"
                )
            raise LoadError(
                f"the kernel refused the {type.name} map {name!r} of {max_entries} entries, "
                f"{value_size} bytes each: {os.strerror(code)}"
            )
        return cls(fd, type, key_size, value_size, max_entries)

    @property
    def value_length(self) -> int:
        """How many bytes a value takes on its way from or to the kernel."""
        return (self.value_size + 7 & ~7) * possible_cpus() if self.type in PER_CPU else self.value_size

    def lookup(self, key: bytes) -> bytes | None:
        """The value at `key`, or None; of a per-CPU map each possible CPU's in turn, 8-byte aligned."""
        value = ctypes.create_string_buffer(self.value_length)
        if bpf(_MAP_LOOKUP, struct.pack("<IIQQQ", self.fd, 0, address(key), ctypes.addressof(value), 0)) < 0:
            if ctypes.get_errno() == errno.ENOENT:
                return None
            raise os_error()
        return value.raw

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Set the value at `key`; with BPF_NOEXIST (1) or BPF_EXIST (2) only if there is none, or one."""
        if bpf(_MAP_UPDATE, struct.pack("<IIQQQ", self.fd, 0, address(key), address(value), flags)) < 0:
            raise os_error()

    def delete(self, key: bytes) -> bool:
        """Remove the element at `key`; False if it was not there."""
        if bpf(_MAP_DELETE, struct.pack("<IIQQQ", self.fd, 0, address(key), 0, 0)) < 0:
            if ctypes.get_errno() != errno.ENOENT:
                raise os_error()
            return False
        return True

    def duplicate(self) -> Map:
        """The same map with a descriptor of its own."""
        fd = fcntl.fcntl(self.fd, fcntl.F_DUPFD_CLOEXEC, 0)
        return Map(fd, self.type, self.key_size, self.value_size, self.max_entries)


class Program(Descriptor):
    """A BPF program in the kernel, verified."""

    __slots__ = ("name",)

    def __init__(self, fd: int, name: str) -> None:
        super().__init__(fd)
        self.name = name

    @classmethod
    def load(
        cls,
        name: str,
        type: ProgramType,
        instructions: bytes,
        maps: Mapping[int, Map],
        *,
        license: str,
        kernel_version: int = 0,
    ) -> Program:
        """Load a program into the kernel.

        `maps` says which map each number stands for that the instructions have in a map's place.
        Raises PrivilegeError, or LoadError with what the verifier said.
        """
        code = _with_maps(instructions, maps)
        attempt = partial(_load, name, type, code, license.encode() + b"\0", kernel_version)
        # Without a log first: writing one makes verification several times slower.
        if (fd := attempt(None)) >= 0:
            return cls(fd, name)
        if ctypes.get_errno() == errno.EPERM:
            raise privilege_error()
        fd, reason, log = _with_whole_log(attempt)
        if fd >= 0:  # what failed was of the moment (EAGAIN, ENOMEM)
            return cls(fd, name)
        if "unknown func bpf_probe_read" in log and _locked_down():
            raise privilege_error()  # the helper is taken away (bpf_tracing_func_proto(), kernel/trace/bpf_trace.c)
        raise LoadError(_verifier_message(name, reason, log), log)

    def recursion_misses(self) -> int | None:
        """Runs that the kernel skipped because the program was already running on that CPU.

        None where the kernel does not tell (before Linux 5.12).
        """
        info = ctypes.create_string_buffer(_PROG_INFO_SIZE)
        request = struct.pack("<IIQ", self.fd, len(info), ctypes.addressof(info))
        if bpf(OBJ_GET_INFO_BY_FD, request) < 0 or kernel_release() < (5, 12):
            return None
        return int(struct.unpack_from("<Q", info.raw, _RECURSION_MISSES)[0])


def _load(
    name: str,
    type: ProgramType,
    code: bytes,
    license: bytes,
    kernel_version: int,
    log: ctypes.Array[ctypes.c_char] | None,
) -> int:
    """Offer the program to the kernel: its descriptor, or -1 and errno.  With a log, the verifier writes to it."""
    program = (type, len(code) // _INSTRUCTION.size, address(code), address(license))
    logged = (0, 0, 0) if log is None else (1, len(log), ctypes.addressof(log))
    attributes = struct.pack(
        "<IIQQIIQII16sII", *program, *logged, kernel_version, 0, name.encode()[:15], 0, 0
    )
    return bpf(_PROG_LOAD, attributes)


def _with_whole_log(attempt: Callable[[ctypes.Array[ctypes.c_char]], int]) -> tuple[int, int, str]:
    """Load with logs that grow until all fits: the descriptor or -1, errno, and what the verifier said."""
    size = _LOG_SIZE
    while True:
        log = ctypes.create_string_buffer(size)
        fd = attempt(log)
        reason = 0 if fd >= 0 else ctypes.get_errno()
        if reason != errno.ENOSPC or size >= _LOG_SIZE_MAX:
            return fd, reason, log.value.decode(errors="replace").strip()
        size *= 4


def perf_event_open(attributes: bytes, cpu: int, pid: int = -1) -> int:
    """A perf event of all processes, or of one thread, on one CPU: its descriptor, or -1 and errno."""
    return _syscall("perf_event_open", attributes, pid, cpu, -1, _PERF_FLAG_FD_CLOEXEC)


def wait_for_running_programs() -> None:
    """Return when every BPF program that was running at the call has ended.

    Programs run inside RCU read-side sections, and MEMBARRIER_CMD_GLOBAL is synchronize_rcu()
    (kernel/sched/membarrier.c).  It is refused on kernels with nohz_full CPUs; there, replacing an
    entry of a map of maps waits for the same thing (maybe_wait_bpf_programs(), kernel/bpf/syscall.c).
    Takes some 10 ms.  Raises OSError where neither can be done.
    """
    if _syscall("membarrier", _MEMBARRIER_CMD_GLOBAL, 0, 0) == 0:
        return
    with closing(Map.create("wait_inner", MapType.ARRAY, key_size=4, value_size=4, max_entries=1)) as inner:
        attributes = struct.pack("<IIIIIII16s", MapType.ARRAY_OF_MAPS, 4, 4, 1, 0, inner.fd, 0, b"wait_outer")
        if (fd := bpf(_MAP_CREATE, attributes)) < 0:
            raise os_error()
        with closing(Map(fd, MapType.ARRAY_OF_MAPS, 4, 4, 1)) as outer:
            outer.update(bytes(4), struct.pack("<I", inner.fd))


def possible_cpus() -> int:
    """How many CPUs this machine may ever have online: the length of a per-CPU value."""
    return len(possible_cpu_list())


@cache
def possible_cpu_list() -> tuple[int, ...]:
    """Those CPUs, in the order of a per-CPU value."""
    return tuple(_cpu_list(Path("/sys/devices/system/cpu/possible").read_text()))


def online_cpus() -> list[int]:
    """The CPUs that run now."""
    return _cpu_list(Path("/sys/devices/system/cpu/online").read_text())


def _cpu_list(text: str) -> list[int]:
    """The CPUs of a list as the kernel writes it: "0-3,8" is 0, 1, 2, 3, 8."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def instructions_of(code: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Each instruction: where it is, its opcode, both registers in one byte, offset, immediate."""
    position = 0
    while position < len(code):
        opcode, registers, offset, immediate = _INSTRUCTION.unpack_from(code, position)
        yield position, opcode, registers, offset, immediate
        position += _INSTRUCTION.size * (2 if opcode == _LD_IMM64 else 1)


def map_numbers(code: bytes) -> set[int]:
    """The numbers that stand in a map's place in the instructions."""
    return {
        immediate
        for _, opcode, registers, _, immediate in instructions_of(code)
        if opcode == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD
    }


def _with_maps(instructions: bytes, maps: Mapping[int, Map]) -> bytes:
    """The instructions with each map's number replaced by its descriptor in this process."""
    code = bytearray(instructions)
    for position, opcode, registers, offset, immediate in instructions_of(instructions):
        if opcode == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD:
            _INSTRUCTION.pack_into(code, position, opcode, registers, offset, maps[immediate].fd)
    return bytes(code)


def _verifier_message(name: str, reason: int, log: str) -> str:
    lines = log.splitlines()
    shown = lines[-_LOG_LINES_SHOWN:]
    message = f"the kernel refused the program {name!r}: {os.strerror(reason)}"
    if not shown:
        return message
    if omitted := len(lines) - len(shown):
        shown.insert(0, f"({omitted} lines before these are in the error's `log`)")
    return message + "; the verifier's last lines:\n  " + "\n  ".join(shown)


def privilege_error(*, perf_event: bool = False) -> PrivilegeError:
    """The error for EPERM, with what the process lacks; `perf_event` if it was to open one of these."""
    message = (
        f"the kernel refuses BPF to this process (uid {os.geteuid()}): run it as root, "
        "or give it the capabilities CAP_BPF and CAP_PERFMON"
    )
    if perf_event:  # Debian's kernels know a level 3; uprobes: perf_uprobe_event_init(), kernel/events/core.c
        message += (
            ", and CAP_SYS_ADMIN where kernel.perf_event_paranoid is above 2, and for uprobes (Linux 6.16)"
        )
    if _locked_down():
        message = (
            "this kernel is locked down (confidentiality), which forbids BPF programs to read its memory, and all to "
            "read tracefs: boot it without lockdown=confidentiality (lockdown=integrity allows both)"
        )
    return PrivilegeError(message)


def _locked_down() -> bool:
    try:
        return "[confidentiality]" in Path("/sys/kernel/security/lockdown").read_text()
    except OSError:
        return False


def bpf(command: int, attributes: bytes | ctypes.Array[ctypes.c_char]) -> int:
    """Make the system call: what it returns, or -1 and errno.  Attributes to be written to come as a buffer."""
    buffer = attributes
    if isinstance(buffer, bytes):
        buffer = ctypes.create_string_buffer(buffer, max(len(buffer), 120))
    for _ in range(2):
        result = _syscall("bpf", command, buffer, len(buffer))
        if result >= 0 or ctypes.get_errno() != errno.EPERM or not _raise_memlock():
            break
    return result


def _raise_memlock() -> bool:
    """Before Linux 5.11 maps are charged to RLIMIT_MEMLOCK, and EPERM may mean that alone."""
    if kernel_release() >= (5, 11):
        return False
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    if resource.getrlimit(resource.RLIMIT_MEMLOCK) == unlimited:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (OSError, ValueError):
        ctypes.set_errno(errno.EPERM)
        return False
    return True


@cache
def kernel_release() -> tuple[int, int]:
    """The running kernel's version: the first two numbers of `uname -r`."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return int(found[1]), int(found[2])


@cache
def libc() -> ctypes.CDLL:
    """The C library of this process."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def _syscall(name: str, *arguments: Any) -> int:
    machine = platform.machine()
    if machine not in _SYSCALLS:
        raise UnsupportedError(f"{machine} is not supported; supported are {', '.join(_SYSCALLS)}")
    return int(libc().syscall(_SYSCALLS[machine][name], *arguments))


def os_error() -> OSError:
    """The error of the system call before."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def address(data: bytes) -> int:
    """Where CPython keeps these bytes; they must be referenced until the call has returned.  0 for none."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0 if data else 0
