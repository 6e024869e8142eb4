"""Memory order between this process and the kernel, which share the buffers' positions.

A reader must see a record only after the position that covers it, its bytes only after the header
that says they are finished, and must give space back only after its copy is done.

x86-64 keeps loads in order, and stores after earlier loads, by itself (Intel SDM vol. 3, 9.2.2).
Elsewhere a fence stands between: after a plain load it makes an acquire of it, before a plain store
a release (C11 7.17.4), and libatomic, which comes with GCC's run time, has it as a function.
Loads and stores themselves are single items of a memoryview: one aligned access each.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Final

from ebpfstream.errors import UnsupportedError

_SEQ_CST: Final = 5


def barrier(machine: str = "") -> Callable[[], None]:
    """What to call between two accesses whose order must hold on `machine` (default: this one).

    Raises UnsupportedError where the machine needs libatomic and lacks it.
    """
    if (machine or platform.machine()) == "x86_64":
        return _ordered_already
    try:
        fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError) as error:
        raise UnsupportedError(
            f"reading kernel buffers on {machine or platform.machine()} needs libatomic.so.1 "
            "(Debian, Ubuntu: apt-get install libatomic1; Fedora: dnf install libatomic)"
        ) from error
    fence.argtypes = [ctypes.c_int]
    fence.restype = None
    return lambda: fence(_SEQ_CST)


def _ordered_already() -> None:
    pass
