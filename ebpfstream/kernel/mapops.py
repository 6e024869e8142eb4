"""Commands of bpf(2) for maps beyond those of `bpf.Map`: many elements at once, taking out, going through, asking.

Layouts are those of `union bpf_attr` and `struct bpf_map_info` in include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final, NamedTuple

from ebpfstream.errors import UnsupportedError
from ebpfstream.kernel.bpf import ENOTSUPP, OBJ_GET_INFO_BY_FD, Map, MapType, address, bpf, os_error

NOEXIST: Final = 1
"""BPF_NOEXIST: update only if there is no such element."""

BATCH: Final = 512
"""Elements that are copied at once, at most: what is to be decoded between two turns of an event loop."""

_BATCH_BYTES: Final = 1 << 18
_GET_NEXT_KEY, _LOOKUP_AND_DELETE = 4, 21
_BATCH_LAYOUT: Final = struct.Struct("<QQQQIIQQ")
_COUNT_OFFSET: Final = 32
_FRUITLESS: Final = 100  # attempts in a row that find a bucket locked

# The kernel does not know the command for this type of map.
_NO_SUCH_COMMAND: Final = (ENOTSUPP, errno.EOPNOTSUPP)
# Locks that would not be had (htab_lock_bucket() in kernel/bpf/hashtab.c), or elements that went.
_NOT_NOW: Final = (errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.EDEADLK, errno.ETIMEDOUT)
# Errors before the kernel has set the count to 0, and the one after which it does not say it.
_UNCOUNTED: Final = (errno.EINVAL, errno.EPERM, errno.EBADF, errno.EFAULT)


class Batch(IntEnum):
    """The commands for many elements at once."""

    LOOKUP = 24
    TAKE = 25  # BPF_MAP_LOOKUP_AND_DELETE_BATCH
    UPDATE = 26


_missing: set[tuple[MapType, Batch]] = set()


def batches(made: Map, command: Batch) -> Iterator[tuple[bytes, bytes]]:
    """All elements, looked up or taken out, many at once: their keys, and their values.

    Raises UnsupportedError, before it has taken anything, where the kernel has no such command for
    this type of map; BlockingIOError where one bucket was found locked again and again; OSError.
    """
    size = made.key_size + made.value_length
    room = min(max(_BATCH_BYTES // size, 1), BATCH)
    # Where to go on: a hash map's bucket, a u32; otherwise a key.
    after = ctypes.create_string_buffer(max(made.key_size, 4))
    following = ctypes.create_string_buffer(len(after))
    begun = False
    fruitless = 0
    while True:
        keys = ctypes.create_string_buffer(room * made.key_size)
        values = ctypes.create_string_buffer(room * made.value_length)
        buffers = (ctypes.addressof(buffer) for buffer in (following, keys, values))
        code, count = _batch(made, command, (ctypes.addressof(after) if begun else 0, *buffers), room)
        # Whatever went wrong, these have been copied, and with TAKE they are in the map no more.
        if count:
            begun, fruitless = True, 0
            after, following = following, after
            yield (
                ctypes.string_at(keys, count * made.key_size),
                ctypes.string_at(values, count * made.value_length),
            )
        if code == errno.ENOENT:
            return
        if code == errno.ENOSPC:  # a bucket has more elements than there is room for
            room *= 2
        elif code in _NOT_NOW:
            fruitless += 1
            if fruitless > _FRUITLESS:
                raise BlockingIOError(code, os.strerror(code))
        elif code:
            raise OSError(code, os.strerror(code))


def update_all(made: Map, keys: Sequence[bytes], values: Sequence[bytes]) -> int:
    """Set elements, the first of which count: how many; OSError if that is none.

    Raises UnsupportedError where the kernel has no such command for this type of map.
    """
    all_keys, all_values = b"".join(keys), b"".join(values)
    code, count = _batch(made, Batch.UPDATE, (0, 0, address(all_keys), address(all_values)), len(keys))
    if code and not count:
        raise OSError(code, os.strerror(code))
    return count


def _batch(made: Map, command: Batch, where: tuple[int, ...], room: int) -> tuple[int, int]:
    """An error or 0, and how many elements were copied."""
    if (made.type, command) in _missing:
        raise _unsupported(made, command)
    packed = _BATCH_LAYOUT.pack(*where, room, made.fd, 0, 0)
    attributes = ctypes.create_string_buffer(packed, len(packed))
    code = ctypes.get_errno() if bpf(command, attributes) < 0 else 0
    (count,) = struct.unpack_from("<I", attributes, _COUNT_OFFSET)
    # For an element that cannot be set EINVAL stands as well; then not all of them were.
    if code in _NO_SUCH_COMMAND or (code == errno.EINVAL and count == room):
        _missing.add((made.type, command))
        raise _unsupported(made, command)
    if code in _UNCOUNTED and (command is not Batch.UPDATE or count == room):
        count = 0
    return code, count


def _unsupported(made: Map, command: Batch) -> UnsupportedError:
    verb = {Batch.LOOKUP: "looks up", Batch.TAKE: "takes out", Batch.UPDATE: "sets"}[command]
    return UnsupportedError(
        f"this kernel ({os.uname().release}) {verb} no several elements at once in a {made.type.name} map; "
        "for hash maps and arrays that came with Linux 5.6, for per-CPU arrays with 5.13"
    )


def take(made: Map, key: bytes) -> bytes | None:
    """The value at `key`, which is removed by that; None if there is none.  Linux ≥ 4.20 for queues, 5.14."""
    value = ctypes.create_string_buffer(made.value_length)
    attributes = struct.pack("<IIQQQ", made.fd, 0, address(key), ctypes.addressof(value), 0)
    if bpf(_LOOKUP_AND_DELETE, attributes) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise os_error()
    return value.raw


def next_key(made: Map, key: bytes | None) -> bytes | None:
    """The key that comes after this one, or the first one; None after the last.

    After one that is not there any more comes the first again.
    """
    following = ctypes.create_string_buffer(made.key_size)
    attributes = struct.pack(
        "<IIQQ", made.fd, 0, 0 if key is None else address(key), ctypes.addressof(following)
    )
    if bpf(_GET_NEXT_KEY, attributes) < 0:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise os_error()
    return following.raw


class Info(NamedTuple):
    """What the kernel knows of a map: its id, its BPF_F_… flags, its name (15 characters of it)."""

    id: int
    flags: int
    name: str
    frozen: bool


def info(made: Map) -> Info:
    """Ask the kernel.  Linux ≥ 4.15 tells names, ≥ 5.2 what is frozen."""
    found = ctypes.create_string_buffer(40)
    if bpf(OBJ_GET_INFO_BY_FD, struct.pack("<IIQ", made.fd, len(found), ctypes.addressof(found))) < 0:
        raise os_error()
    number, flags, name = struct.unpack_from("<4xI12xI16s", found)
    lines = Path(f"/proc/self/fdinfo/{made.fd}").read_text().splitlines()
    return Info(number, flags, name.partition(b"\0")[0].decode(), "frozen:\t1" in lines)
