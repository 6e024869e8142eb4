"""Kprobes: whether the kernel has them, which of its functions they can be on, and why not on this one."""

from __future__ import annotations

import errno
import os
import platform
from functools import cache
from pathlib import Path
from typing import Final

from ebpfstream.errors import EbpfStreamError, UnsupportedError
from ebpfstream.kernel import tracefs
from ebpfstream.names import did_you_mean, near

# How the kernel prefixes the functions of system calls: arch/*/include/asm/syscall_wrapper.h.
_PREFIXES: Final = (
    "sys_",
    "__x64_sys_",
    "__x32_compat_sys_",
    "__ia32_sys_",
    "__ia32_compat_sys_",
    "__arm64_sys_",
    "__riscv_sys_",
    "__s390x_sys_",
    "__s390_sys_",
    "__se_sys_",
)
_USUAL_PREFIX: Final = {
    "x86_64": "__x64_sys_",
    "aarch64": "__arm64_sys_",
    "riscv64": "__riscv_sys_",
    "s390x": "__s390x_sys_",
}
_PMU: Final = Path("/sys/bus/event_source/devices/kprobe")
_BLACKLIST: Final = Path("/sys/kernel/debug/kprobes/blacklist")


def kprobes_available() -> bool:
    """Whether this kernel has kprobes for perf_event_open(2): CONFIG_KPROBE_EVENTS, Linux ≥ 4.17."""
    return _PMU.exists()


def syscall_function(name: str) -> str:
    """The kernel's function of a system call: `execve` is `__x64_sys_execve` on x86-64."""
    return _syscall_prefix() + name


def fix_syscall_function(name: str) -> str:
    """A system call's function by the name it has here; any other function's name as it is.

    So `sys_execve` and `__arm64_sys_execve` are `__x64_sys_execve` on x86-64.
    """
    called = _system_call(name)
    return syscall_function(called) if called else name


@cache
def _syscall_prefix() -> str:
    known = set(functions())
    for prefix in _PREFIXES:
        if f"{prefix}bpf" in known:
            return prefix
    return _USUAL_PREFIX.get(platform.machine(), "sys_")


def _system_call(function: str) -> str:
    """The system call that a function is, by its prefix; empty for other functions."""
    return next(
        (function.removeprefix(prefix) for prefix in _PREFIXES if function.startswith(prefix)),
        "",
    )


def functions() -> list[str]:
    """The kernel's functions, those of loaded modules included; some cannot be probed."""
    try:
        lines = Path("/proc/kallsyms").read_text().splitlines()
    except OSError:
        return []
    symbols = (line.split()[1:3] for line in lines)
    # __pfx_ is the padding before a function.
    return [name for kind, name in symbols if kind in "tTwW" and not name.startswith("__pfx_")]


def without_kprobes(program: str, function: str, *, returns: bool) -> UnsupportedError:
    """The error for a kprobe on a kernel that has none: it names the tracepoint to use."""
    message = (
        f"{program} cannot be attached to {function}: this kernel (Linux {os.uname().release}) has no kprobes, "
        "which need CONFIG_KPROBE_EVENTS and Linux 4.17"
    )
    called = _system_call(function)
    try:
        known = tracefs.tracepoints()
    except (OSError, EbpfStreamError):
        known = []
    tracepoint = f"syscalls:sys_{'exit' if returns else 'enter'}_{called}"
    if called and tracepoint in known:
        return UnsupportedError(
            f"{message}. Use the tracepoint {tracepoint} (attach_syscall({called!r}) does)"
        )
    if called:
        similar = near(tracepoint, known)
    else:
        by_name = {each.partition(":")[2]: each for each in known if not each.startswith("syscalls:")}
        similar = [by_name[name] for name in near(function, by_name)]
    such_as = f" (such as {', '.join(similar)})" if similar else ""
    return UnsupportedError(f"{message}. Use a tracepoint{such_as}, a raw tracepoint or a uprobe instead")


def reason(function: str, offset: int, code: int, *, returns: bool) -> str:
    """Why the kernel refused a kprobe with this errno, and which functions are near."""
    known = functions()
    count = known.count(function)
    if known and not count:
        # GCC names what it made of a function after it: f.isra.0, f.constprop.0, f.part.0.
        made_of_it = [each for each in known if each.startswith(f"{function}.")]
        return (
            f"there is no such function in Linux {os.uname().release} (or the compiler has put it into its "
            "callers, or it is in a module that is not loaded)"
            + did_you_mean(made_of_it + near(function, known))
        )
    if returns and offset:
        return "a function's return has no offset: leave it out"
    if code == errno.EILSEQ:
        return f"at offset {offset} no instruction begins"
    if code == errno.EADDRNOTAVAIL:
        return f"the kernel has {count} functions of this name and cannot tell which is meant"
    if function in _blacklisted():
        return f"the kernel needs this function to handle kprobes ({_BLACKLIST} lists those)"
    if code == errno.EINVAL and not _traceable(function):
        return "this function is compiled without tracing (`notrace`): choose one that calls it"
    return os.strerror(code)


def _blacklisted() -> set[str]:
    try:
        return {line.split()[1] for line in _BLACKLIST.read_text().splitlines()}
    except (OSError, IndexError):  # debugfs is not mounted, or not for us
        return set()


def _traceable(function: str) -> bool:
    try:
        lines = (tracefs.folder() / "available_filter_functions").read_text().splitlines()
    except (OSError, EbpfStreamError):
        return True  # as far as we know
    return any(line.split()[0] == function for line in lines)
