"""The two kinds of kernel buffer behind one interface."""

from __future__ import annotations

from typing import Final, Literal, Protocol

from ebpfstream.errors import UnsupportedError
from ebpfstream.kernel import perfbuf, ringbuf
from ebpfstream.kernel.bpf import Map, online_cpus
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.options import check_choice
from ebpfstream.records import Records

Kind = Literal["auto", "ring", "perf"]

SIZE: Final = 4 << 20
"""Bytes that a buffer has unless told otherwise."""


class Buffer(Protocol):
    """A kernel buffer as a stream reads it."""

    late: int
    """Records that came after younger ones had been taken."""

    @property
    def map(self) -> Map:
        """The map to which programs submit."""

    @property
    def size(self) -> int:
        """Bytes that it holds in all, record headers included."""

    async def wait(self) -> None:
        """Return when there may be something to drain."""

    def pending(self) -> int:
        """Bytes in it now."""

    def fill(self) -> tuple[int, int]:
        """Bytes in the part of it that is fullest, and how many have room there."""

    def drain(self, limit: int) -> Records | None:
        """Take what is finished, oldest first, about `limit` bytes; None if nothing is."""

    @property
    def lost(self) -> int | None:
        """Records for which there was no room, as far as the kernel has said so yet; None if it never does."""

    def unplug(self) -> None:
        """Let programs submit no more to it, where that can be."""

    def finish(self) -> None:
        """Hand out what is in it now, all of that and nothing that comes after."""

    def close(self) -> None:
        """Unmap and give up everything."""


def check(kind: str, size: int) -> None:
    """Raise ArgumentError for a kind that there is not, or a size that it cannot have on this machine."""
    check_choice("buffer", kind, Kind)
    if kind == "perf":
        perfbuf.ring_bytes(size, len(online_cpus()))
    else:
        ringbuf.buffer_bytes(size)


def create(kind: Kind, size: int, max_delay: float) -> Buffer:
    """A new buffer; "auto" is the ring buffer where the kernel has it (Linux 5.8).

    Raises PrivilegeError, UnsupportedError, LoadError, ArgumentError.
    """
    if kind != "perf":
        try:
            return RingBuffer.create(size)
        except UnsupportedError:
            if kind == "ring":
                raise
    return PerfBuffer.create(size, max_delay=max_delay)
