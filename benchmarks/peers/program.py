"""The flags with which hello.c and syscalls.c, in BCC's dialect, are compiled for whoever reads them."""

from __future__ import annotations

import os
import platform
from typing import Final

GETPPID: Final = 110 if platform.machine() == "x86_64" else 173


def flags(kind: str, target: str, size: int) -> list[str]:
    """For a "ring" buffer of `size` bytes, which the text says, or a "perf" buffer; calls are those of `target`."""
    buffer = "-DPERF" if kind == "perf" else f"-DPAGES={size // os.sysconf('SC_PAGESIZE')}"
    return [f"-DTARGET={target}", f"-DGETPPID={GETPPID}", buffer]
