"""Where programs are attached, and what keeps them so."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from ebpfstream.errors import AttachError
from ebpfstream.kernel.bpf import (
    Descriptor,
    Program,
    address,
    bpf,
    online_cpus,
    perf_event_open,
    privilege_error,
)
from ebpfstream.kernel.tracefs import tracepoint_id

_RAW_TRACEPOINT_OPEN = 17  # enum bpf_cmd, include/uapi/linux/bpf.h
_PERF_TYPE_TRACEPOINT = 2
_PERF_EVENT_IOC_SET_BPF, _PERF_EVENT_IOC_ENABLE = 0x40042408, 0x2400


class RawTracepoint(NamedTuple):
    """A hook: the raw tracepoint of this name.  Linux ≥ 4.17."""

    name: str


class Tracepoint(NamedTuple):
    """A hook: the tracepoint `category:name`.  Linux ≥ 4.7."""

    category: str
    name: str


Hook = RawTracepoint | Tracepoint


class Link(Descriptor):
    """What keeps a program attached; closing it detaches."""

    __slots__ = ()

    @classmethod
    def attach(cls, program: Program, hook: Hook) -> Link:
        """Attach a program that was loaded for this kind of hook.  Raises AttachError, PrivilegeError."""
        if isinstance(hook, RawTracepoint):
            return cls.raw_tracepoint(program, hook.name)
        return cls.tracepoint(program, hook.category, hook.name)

    @classmethod
    def tracepoint(cls, program: Program, category: str, name: str) -> Link:
        """Attach to the tracepoint `category:name`.  Raises AttachError, PrivilegeError."""
        # The program runs on every CPU, whichever the event itself is on.
        attributes = struct.pack("<IIQQ", _PERF_TYPE_TRACEPOINT, 64, tracepoint_id(category, name), 1)
        fd = perf_event_open(attributes.ljust(64, b"\0"), online_cpus()[0])
        if fd < 0:
            code = ctypes.get_errno()
            if code in (errno.EPERM, errno.EACCES):
                raise privilege_error()
            raise AttachError(f"the tracepoint {category}:{name} cannot be opened: {os.strerror(code)}")
        link = cls(fd)
        try:
            fcntl.ioctl(fd, _PERF_EVENT_IOC_SET_BPF, program.fd)
            fcntl.ioctl(fd, _PERF_EVENT_IOC_ENABLE, 0)
        except OSError as error:
            raise AttachError(
                f"{program.name} cannot be attached to the tracepoint {category}:{name}: {error.strerror}"
            ) from error
        return link

    @classmethod
    def raw_tracepoint(cls, program: Program, name: str) -> Link:
        """Attach to the raw tracepoint `name`.  Raises AttachError.  Linux ≥ 4.17."""
        target = name.encode() + b"\0"
        fd = bpf(_RAW_TRACEPOINT_OPEN, struct.pack("<QII", address(target), program.fd, 0))
        if fd < 0:
            code = ctypes.get_errno()
            if code == errno.EPERM:
                raise privilege_error()
            reason = "there is no such tracepoint" if code == errno.ENOENT else os.strerror(code)
            raise AttachError(
                f"{program.name} cannot be attached to the raw tracepoint {name!r}: {reason} "
                f"(Linux {os.uname().release})"
            )
        return cls(fd)
