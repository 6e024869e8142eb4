"""Cgroups of the v2 hierarchy: from the ids that BPF programs see to paths, and back.

An id is the 64-bit number of the cgroup's kernfs node: bpf_get_current_cgroup_id() gives it
(kernel/bpf/helpers.c), and on 64-bit machines it is the inode number of the cgroup's directory
(kernfs_ino(), include/linux/kernfs.h).  Both since Linux 5.5; before, inode numbers had 32 bits.

An id is never given twice while the kernel runs: its low half goes around, and the high half is
counted up each time it does (__kernfs_new_node(), fs/kernfs/dir.c).  Nor does a cgroup of v2 ever
change its name: only v1 has a `rename` (cgroup1_kf_syscall_ops, kernel/cgroup/cgroup-v1.c).  So a
path once found holds for good, and an id whose cgroup is gone names nothing ever again.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Final, NamedTuple

from ebpfstream.errors import ArgumentError
from ebpfstream.kernel.bpf import libc, os_error
from ebpfstream.kernel.mounts import unescaped

# struct file_handle (include/linux/fs.h), handle_bytes and handle_type, and the node's id, in the
# machine's byte order, as kernfs_encode_fh() writes it (fs/kernfs/mount.c).
_HANDLE: Final = struct.Struct("=IiQ")
_ID_BYTES: Final = 8
_FILEID_KERNFS: Final = 0xFE  # enum fid_type, include/linux/exportfs.h

# The handle may not be opened: no CAP_DAC_READ_SEARCH, or a seccomp filter (containers have one).
_REFUSED: Final = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP}
# There is no such cgroup: no node of this id or a removed one, or the id of a file in a cgroup.
_GONE: Final = {errno.ESTALE, errno.ENOENT, errno.ENOTDIR}

_ROOT: Final = 1
"""The id of the root: the first that a hierarchy gives (__kernfs_new_node(), fs/kernfs/dir.c)."""

_MOST_WALKED: Final = 16_384
"""Cgroups that a walk looks at: some 0.2 s."""


class _Mount(NamedTuple):
    path: str
    device: int


_mount: _Mount | None = None
_walked: dict[int, str] = {}


def path_of(cgroup_id: int) -> str | None:
    r"""The cgroup's path from the root of the mount: "/" for that itself, "/system.slice/cron.service".

    None if the cgroup is gone, lies outside of what is mounted, or its path in the file system has
    4,096 bytes or more; and if cgroup v2 is not mounted.  Bytes that are not UTF-8 are surrogate
    escapes, as in all of Python's paths.

    Takes some 20 µs with CAP_DAC_READ_SEARCH, or 60 if the kernel has not cached the directory.
    Without, the hierarchy is walked, some 10 µs for each cgroup and up to 16,384 of them (those
    nearest to the root), unless the last walk has seen it.  Raises OSError if the process or the
    machine is out of descriptors or memory.  Linux ≥ 5.5.
    """
    mount = _mounted()
    if mount is None or not 0 < cgroup_id < 1 << 64:
        return None
    try:
        return _by_handle(mount, cgroup_id)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return _by_walk(mount, cgroup_id)


def id_of(path: str | os.PathLike[str]) -> int:
    """The id of a cgroup, for filters.

    `path` is its directory, as in "/sys/fs/cgroup/system.slice", or its path from the root of the
    mount, as in "/system.slice".  Raises ArgumentError.  Linux ≥ 5.5.
    """
    name = os.fspath(path)
    mount = _mounted()
    if mount is None:
        raise ArgumentError(
            f"{name!r} is no cgroup: cgroup v2 is not mounted here; `mount -t cgroup2 none /sys/fs/cgroup` does it"
        )
    # Never relative to the working directory; and no name is not the root.
    for candidate in (f"{mount.path}/{name}" if name else "", name if name.startswith("/") else ""):
        status = _status(candidate)
        # All mounts of the hierarchy are one file system (cgroup_do_get_tree(), kernel/cgroup/cgroup.c).
        if candidate and status and status.st_dev == mount.device and S_ISDIR(status.st_mode):
            return status.st_ino
    raise ArgumentError(
        f"{name!r} is no cgroup of v2: give a directory in {mount.path}, or its path from there, "
        "as /proc/<pid>/cgroup shows it after `0::`"
    )


def level_of(cgroup_id: int) -> int:
    """How far below the root a cgroup is; the root is at level 0 (struct cgroup, include/linux/cgroup-defs.h).

    Raises ArgumentError where the root is not to be seen, as in a cgroup namespace of one's own.
    """
    mount = _mounted()
    if mount is not None and _inode(mount.path) != _ROOT:
        raise ArgumentError(
            f"filters by cgroup count from the root of the hierarchy, which {mount.path} does not show: run in the "
            "host's cgroup namespace (docker run --cgroupns=host), or mount all of the hierarchy"
        )
    return len([name for name in (path_of(cgroup_id) or "").split("/") if name])


def _by_handle(mount: _Mount, cgroup_id: int) -> str | None:
    handle = ctypes.create_string_buffer(_HANDLE.pack(_ID_BYTES, _FILEID_KERNFS, cgroup_id), _HANDLE.size)
    anchor = os.open(mount.path, os.O_RDONLY | os.O_DIRECTORY)  # O_PATH would be EBADF
    try:
        fd = libc().open_by_handle_at(anchor, handle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(anchor)
    if fd < 0:
        if ctypes.get_errno() in _GONE:
            return None
        raise os_error()
    try:
        return _path_of_descriptor(mount, cgroup_id, fd)
    finally:
        os.close(fd)


def _path_of_descriptor(mount: _Mount, cgroup_id: int, fd: int) -> str | None:
    try:
        link = str(Path(f"/proc/self/fd/{fd}").readlink())
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
    # d_path() appends this to what was removed meanwhile (fs/d_path.c); a cgroup may be called so, too.
    if link.endswith(" (deleted)") and _inode(link) != cgroup_id:
        return None
    if link == mount.path:
        return "/"
    # What lies outside of the mount's root has a path that does not begin with the mount's.
    return link.removeprefix(mount.path) if link.startswith(mount.path + "/") else None


def _by_walk(mount: _Mount, cgroup_id: int) -> str | None:
    global _walked
    path = _walked.get(cgroup_id)
    if path is not None and _inode(mount.path + path) == cgroup_id:
        return path
    _walked = _walk(mount)
    return _walked.get(cgroup_id)


def _walk(mount: _Mount) -> dict[int, str]:
    """The paths of all cgroups by their ids; of too many, those nearest to the root."""
    found = {Path(mount.path).stat().st_ino: "/"}
    waiting = deque([""])
    while waiting:
        parent = waiting.popleft()
        for name, number in _children(mount.path + parent):
            if len(found) >= _MOST_WALKED:
                return found
            path = f"{parent}/{name}"
            found[number] = path
            waiting.append(path)
    return found


def _children(path: str) -> Iterator[tuple[str, int]]:
    """Names and ids of a cgroup's children; none, or not all, if it is removed meanwhile or not for us."""
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                # d_ino is the whole id (kernfs_fop_readdir(), fs/kernfs/dir.c): no stat needed.
                yield entry.name, entry.inode()


def _inode(path: str) -> int | None:
    status = _status(path)
    return status.st_ino if status else None


def _status(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None


def _mounted() -> _Mount | None:
    """The mount of the hierarchy; of several the one that shows most of it.  Read again if it is no longer there."""
    global _mount
    if _mount is None or not _is_there(_mount):
        _mount = _widest(Path("/proc/self/mountinfo").read_bytes())
    return _mount


def _is_there(mount: _Mount) -> bool:
    """Whether the path leads to that mount: it may have been unmounted, or covered by another."""
    status = _status(mount.path)
    return status is not None and status.st_dev == mount.device


def _widest(mountinfo: bytes) -> _Mount | None:
    """The mount of cgroup v2 whose root is highest in the hierarchy (proc_pid_mountinfo(5))."""
    best: tuple[int, _Mount] | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(b" - ")
        if after.split(b" ", 1)[0] != b"cgroup2":
            continue
        _, _, device, root, path, *_ = before.split(b" ")
        major, _, minor = device.partition(b":")
        mount = _Mount(os.fsdecode(unescaped(path)), os.makedev(int(major), int(minor)))
        # "/" is the cgroup namespace's root, "/.." is above that (cgroup_show_path(), kernel/cgroup/cgroup.c).
        depth = sum(-1 if part == b".." else 1 for part in root.split(b"/") if part)
        if (best is None or depth < best[0]) and _is_there(mount):
            best = depth, mount
    return best[1] if best else None
