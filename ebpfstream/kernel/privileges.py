"""Giving up privileges for good, once everything is attached.

A stream that runs needs its descriptors only.  Opening one needs a thread's capabilities, which are that thread's
own (capabilities(7)): so they are given up while there is one thread, and those that it starts have none either.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import struct
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from ebpfstream.errors import ArgumentError, PrivilegeError
from ebpfstream.kernel.bpf import libc

# include/uapi/linux/prctl.h
_PR_SET_KEEPCAPS, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 8, 24, 38

# include/uapi/linux/capability.h: struct __user_cap_header_struct, and two of __user_cap_data_struct
_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.Struct("=Ii")  # version, thread (0: the calling one)
_SETS: Final = struct.Struct("=6I")  # effective, permitted, inheritable: 32 bits of each, then 32 more
_NUMBERS: Final = 64

_PATIENCE: Final = 2.0  # seconds: threads that were told to end when their loop did may not have yet


class Capability(IntEnum):
    """Capabilities by number, include/uapi/linux/capability.h."""

    CAP_CHOWN = 0
    CAP_DAC_OVERRIDE = 1
    CAP_DAC_READ_SEARCH = 2
    CAP_FOWNER = 3
    CAP_FSETID = 4
    CAP_KILL = 5
    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_SETPCAP = 8
    CAP_LINUX_IMMUTABLE = 9
    CAP_NET_BIND_SERVICE = 10
    CAP_NET_BROADCAST = 11
    CAP_NET_ADMIN = 12
    CAP_NET_RAW = 13
    CAP_IPC_LOCK = 14
    CAP_IPC_OWNER = 15
    CAP_SYS_MODULE = 16
    CAP_SYS_RAWIO = 17
    CAP_SYS_CHROOT = 18
    CAP_SYS_PTRACE = 19
    CAP_SYS_PACCT = 20
    CAP_SYS_ADMIN = 21
    CAP_SYS_BOOT = 22
    CAP_SYS_NICE = 23
    CAP_SYS_RESOURCE = 24
    CAP_SYS_TIME = 25
    CAP_SYS_TTY_CONFIG = 26
    CAP_MKNOD = 27
    CAP_LEASE = 28
    CAP_AUDIT_WRITE = 29
    CAP_AUDIT_CONTROL = 30
    CAP_SETFCAP = 31
    CAP_MAC_OVERRIDE = 32
    CAP_MAC_ADMIN = 33
    CAP_SYSLOG = 34
    CAP_WAKE_ALARM = 35
    CAP_BLOCK_SUSPEND = 36
    CAP_AUDIT_READ = 37
    CAP_PERFMON = 38
    CAP_BPF = 39
    CAP_CHECKPOINT_RESTORE = 40


class _Sets(NamedTuple):
    """A thread's capabilities, a bit for each number."""

    effective: int
    permitted: int
    inheritable: int


class _User(NamedTuple):
    name: str
    uid: int
    gid: int
    groups: list[int]


def held() -> frozenset[str]:
    """The names of the calling thread's effective capabilities."""
    effective = _get().effective
    known = {one.value: one.name for one in Capability}
    return frozenset(
        known.get(number, f"CAP_{number}") for number in range(_NUMBERS) if effective >> number & 1
    )


def drop(
    *,
    user: str | None = None,
    keep: Collection[Capability] = (),
    works: Callable[[], object] | None = None,
) -> frozenset[Capability]:
    """Give up every capability but those to `keep`, for good, and become another user: what was kept.

    Programs that this process starts get none, and cannot get any (no_new_privs); those of one that stays root, and
    was started without CAP_SETPCAP, get what is kept.  `user` is a name or a number; the process becomes that user,
    with its groups.  Without `user`, one of root's may do with root's files what their owner may.

    `works` does what has to work afterwards, in this thread: if the kernel refuses it that without further
    capabilities, CAP_BPF is kept; CAP_SYS_ADMIN by a process that has not got that one.  Reading a map by its
    descriptor needs it before Linux 5.19, unless kernel.unprivileged_bpf_disabled is 0 (commit c8644cd0efe7).

    Raises ArgumentError for an unknown user; PrivilegeError if there are other threads, if this process may not become
    that user, or if `works` is refused whatever is kept.  Nothing has changed after ArgumentError, and none of what the
    process had may be relied on after PrivilegeError.
    """
    target = None if user is None else _find(user)
    _wait_until_alone()
    _prctl("forbid new privileges", _PR_SET_NO_NEW_PRIVS, 1)
    _empty_bounding_set()
    if target is not None:
        _become(target)
    permitted = _get().permitted
    kept = _mask(keep) & permitted
    if works is not None:
        kept = _tried(works, kept, permitted)
    _set(kept, kept)
    return frozenset(one for one in Capability if kept >> one & 1)


def _tried(works: Callable[[], object], kept: int, permitted: int) -> int:
    """`kept`, and what more of `permitted` it takes so that it works."""
    helpers = [1 << one for one in (Capability.CAP_BPF, Capability.CAP_SYS_ADMIN) if permitted >> one & 1][:1]
    try:
        for helper in (0, *helpers):
            _set(kept | helper, kept | sum(helpers))
            try:
                works()
            except PermissionError as error:
                refused = error
            else:
                _wait_until_alone()  # a thread that it has started would have them, too
                return kept | helper
        raise PrivilegeError(
            f"what is attached cannot go on without privileges: {refused}: start this process with CAP_BPF as well, "
            "use Linux 5.19 or newer, or do not drop privileges"
        ) from refused
    except BaseException:
        _set(kept, kept)
        raise


def _wait_until_alone() -> None:
    """Return when the calling thread is the only one.  Raises PrivilegeError."""
    ends_at = time.monotonic() + _PATIENCE
    while len(threads := list(Path("/proc/self/task").iterdir())) > 1:
        if time.monotonic() > ends_at:
            raise PrivilegeError(
                f"privileges can be dropped in a process with one thread only, and this one has {len(threads)} "
                f"({', '.join(_names(threads))}): end the others before (numpy starts some when it is imported, but "
                "not with OPENBLAS_NUM_THREADS=1)"
            )
        time.sleep(0.005)


def _names(threads: list[Path]) -> list[str]:
    names = []
    for thread in threads:
        with suppress(OSError):  # it has ended
            names.append((thread / "comm").read_text().rstrip())
    return names


def entry_of(user: str) -> pwd.struct_passwd:
    """What this machine knows of a user, by name or number.  Raises KeyError."""
    try:
        return pwd.getpwuid(int(user)) if user.isascii() and user.isdigit() else pwd.getpwnam(user)
    except (ValueError, OverflowError) as error:  # a NUL, a number that no user has
        raise KeyError(user) from error


def _find(user: str) -> _User:
    """Raises ArgumentError."""
    try:
        found = entry_of(user)
    except KeyError:
        raise ArgumentError(
            f"there is no user {user!r}: give a user's name or number as `getent passwd` shows it, or make one "
            "(useradd --system --no-create-home NAME)"
        ) from None
    groups = os.getgrouplist(found.pw_name, found.pw_gid)
    return _User(found.pw_name, found.pw_uid, found.pw_gid, groups)


def _become(user: _User) -> None:
    """Raises PrivilegeError.  Permitted capabilities stay; effective ones do not, if the user was root."""
    ids = [(one, one, one) for one in (user.uid, user.gid)]
    if [os.getresuid(), os.getresgid()] == ids and not _get().effective >> Capability.CAP_SETGID & 1:
        return  # started as that user, and may not change its groups
    with suppress(PrivilegeError):  # locked (SECBIT_KEEP_CAPS_LOCKED): then nothing can be kept
        _prctl("keep capabilities", _PR_SET_KEEPCAPS, 1)
    try:
        os.setgroups(user.groups)
        os.setresgid(*ids[1])
        os.setresuid(*ids[0])
    except OSError as error:
        raise PrivilegeError(
            f"this process (uid {os.getuid()}) cannot become the user {user.name!r}: {error.strerror}: start it as "
            "root, or with CAP_SETUID and CAP_SETGID, or as that user itself, and then without user="
        ) from error
    with suppress(PrivilegeError):
        _prctl("keep capabilities no longer", _PR_SET_KEEPCAPS, 0)
    if [os.getresuid(), os.getresgid()] != ids or set(os.getgroups()) != set(user.groups):
        raise PrivilegeError(
            f"the kernel did not make this process the user {user.name!r}: look who filters its system calls "
            "(seccomp), or start it as that user"
        )
    # The kernel has made the process undumpable by that (commit_creds(), kernel/cred.c), and so it stays: processes of
    # the same user cannot attach to it, nor take from its memory and descriptors what was opened with more rights.  Its
    # files in /proc belong to root then, but a process may always look into itself (__ptrace_may_access(),
    # kernel/ptrace.c): descriptors, descriptors' infos, namespaces and mounts are read as before.  Only what has to be
    # opened by its owner is not: environ, io.


def _empty_bounding_set() -> None:
    """So that nothing can be got back, by whatever is executed; needs CAP_SETPCAP, and without stays as it is."""
    for number in range(_NUMBERS):
        if libc().prctl(_PR_CAPBSET_DROP, *_longs(number)) < 0:
            # EINVAL: the kernel has fewer of them.
            return


def _get() -> _Sets:
    header = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0), _HEADER.size)
    data = ctypes.create_string_buffer(_SETS.size)
    if libc().capget(header, data) < 0:
        raise _failed("tell its capabilities")
    numbers = _SETS.unpack(data.raw)
    return _Sets(*(low | high << 32 for low, high in zip(numbers[:3], numbers[3:], strict=True)))


def _set(effective: int, permitted: int) -> None:
    """Have these, and leave none to others."""
    # Ambient ones go with the inheritable (cap_capset(), security/commoncap.c).
    wanted = _Sets(effective, permitted, 0)
    header = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0), _HEADER.size)
    data = _SETS.pack(*(one & 0xFFFFFFFF for one in wanted), *(one >> 32 for one in wanted))
    if libc().capset(header, data) < 0:
        raise _failed("change its capabilities")
    if _get() != wanted:
        raise PrivilegeError(
            "the kernel did not change this process's capabilities as asked: look who filters its system calls "
            "(seccomp)"
        )


def _mask(capabilities: Collection[Capability]) -> int:
    return sum(1 << one for one in set(capabilities))


def _prctl(doing: str, option: int, argument: int) -> None:
    """prctl(2).  Raises PrivilegeError."""
    if libc().prctl(option, *_longs(argument)) < 0:
        raise _failed(doing)


def _longs(argument: int) -> list[ctypes.c_ulong]:
    """The four arguments of prctl(2) in full width: it looks at those that it does not need, too."""
    return [ctypes.c_ulong(value) for value in (argument, 0, 0, 0)]


def _failed(doing: str) -> PrivilegeError:
    code = ctypes.get_errno()
    hint = ": look who filters its system calls (seccomp)" if code == errno.EPERM else ""
    return PrivilegeError(f"the kernel does not let this process {doing}: {os.strerror(code)}{hint}")
