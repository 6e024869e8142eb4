"""BPF objects as the kernel knows them, by id: whether something is attached, or left behind."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ebpfstream.kernel import bpf

# enum bpf_cmd, include/uapi/linux/bpf.h
_GET_FD_BY_ID: Final = {"prog": 13, "map": 14, "link": 30}
_TASK_FD_QUERY: Final = 20


def held(kind: str, pid: int | str = "self") -> set[int]:
    """The ids of the objects (prog, map, link) to which a process has descriptors."""
    ids = set()
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = entry.read_text().splitlines()
        except FileNotFoundError:
            continue
        # A link's descriptor tells its program's id as well.
        if kind == "prog" and any(line.startswith("link_id:") for line in lines):
            continue
        ids |= {int(line.split()[1]) for line in lines if line.startswith(f"{kind}_id:")}
    return ids


def attached(pid: int) -> int:
    """To how many hooks programs of a process are attached, be it by links or by perf events."""
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        asked = ctypes.create_string_buffer(struct.pack("<IIIIQIIQQ", pid, int(entry.name), *[0] * 7))
        count += bpf.bpf(_TASK_FD_QUERY, asked) == 0
    return count


def existing(kind: str, ids: set[int]) -> set[int]:
    """Those that the kernel still has."""
    return {number for number in ids if _exists(kind, number)}


def left(kind: str, ids: set[int]) -> set[int]:
    """Those that the kernel still has after a while: it frees them after a grace period."""
    for _ in range(100):
        if not existing(kind, ids):
            return set()
        time.sleep(0.05)
    return existing(kind, ids)


def _exists(kind: str, number: int) -> bool:
    fd = bpf.bpf(_GET_FD_BY_ID[kind], struct.pack("<III", number, 0, 0))
    if fd < 0:
        assert ctypes.get_errno() == 2, os.strerror(ctypes.get_errno())
        return False
    os.close(fd)
    return True


def children(parent: int = 0) -> set[int]:
    """The children of a process (of this one) that have not been waited for."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == (parent or os.getpid()):
                found.add(int(stat.parent.name))
    return found
