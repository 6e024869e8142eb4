"""What can go wrong.  Every message says what to do about it.

All errors derive from `EbpfStreamError`; those that a caller brought about by a wrong argument are
`ValueError`s as well, those that the kernel refused for lack of rights are `PermissionError`s.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebpfstream.lost import Lost


class EbpfStreamError(Exception):
    """Base of every error that this library raises on purpose."""


class ArgumentError(EbpfStreamError, ValueError):
    """An argument that cannot be meant: an unknown buffer kind, an impossible size and the like."""


class PrivilegeError(EbpfStreamError, PermissionError):
    """The kernel refuses BPF to this process: not root, capabilities missing, lockdown."""


class UnsupportedError(EbpfStreamError):
    """What is asked for is not in this kernel; the message names the version or option that has it."""


class BccNotFoundError(EbpfStreamError):
    """The distribution's BCC binding is not installed, or cannot be loaded."""


class CompileError(EbpfStreamError):
    """BCC refused the program's text.

    `log` is what the compiler said, whole; the message holds its first errors.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class LoadError(EbpfStreamError):
    """The kernel refused a map or a program.

    `log` is what the verifier said, whole; the message holds its last lines.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class AttachError(EbpfStreamError):
    """A program could not be attached to its hook."""


class EventTypeError(EbpfStreamError, TypeError):
    """An event class that has no layout in C, or not that of what is to be read; raised when it is first used so."""


class MapError(EbpfStreamError):
    """The kernel refused something with a map, or it is a map that does not do that."""


class MapIndexError(MapError, IndexError):
    """An index that the map does not have, or a queue or stack that is empty."""


class DecodeError(EbpfStreamError):
    """A record that its event type does not fit; names the field, its offset and its type."""


class CorruptBufferError(EbpfStreamError):
    """A buffer's memory holds what the kernel never leaves there: no record of it can be told from another any more."""


class NotOpenError(EbpfStreamError):
    """A BPF object was used outside of its `async with` block."""


class StreamClosedError(EbpfStreamError):
    """The stream was closed before this call."""


class LostError(EbpfStreamError):
    """Events were lost, and the stream was asked to raise that; the next call goes on after them.

    `lost` says how many, where and when: a tuple of Lost.
    """

    def __init__(self, message: str, lost: tuple[Lost, ...] = ()) -> None:
        super().__init__(message)
        self.lost = lost


class StreamBusyError(EbpfStreamError):
    """What can be read by one alone is being read by somebody else."""


class SinkError(EbpfStreamError):
    """A sink cannot go on, or not begin; what it was given may be offered to another one."""


class SinkUnavailableError(SinkError):
    """A sink cannot take this now: its disk is full, its server away.  Offered again later, it may.

    `taken` is how many of the batch's events, its first ones, have arrived; what is offered again is the rest.
    """

    def __init__(self, message: str, taken: int = 0) -> None:
        super().__init__(message)
        self.taken = taken


class SinkRejectedError(SinkError):
    """A sink will never take this batch, however often it is offered; the next one it may.

    `taken` is how many of the batch's events, its first ones, have arrived nevertheless.  Or `rejected` are the
    numbers, from 0, of those that it will never take; all others have arrived.
    """

    def __init__(self, message: str, taken: int = 0, rejected: Collection[int] | None = None) -> None:
        super().__init__(message)
        self.taken = taken
        self.rejected = rejected


class SinkClosedError(SinkError):
    """The sink's other end is gone (a closed pipe), so no send can ever succeed again."""


class SourceError(EbpfStreamError):
    """Events cannot be read back from where a sink sent them."""


class QueueFullError(SinkError):
    """A sink's queue is full, and the sink was to fail then (`when_full="fail"`)."""
