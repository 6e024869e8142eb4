"""The ready-made streams of events: by which names commands, configurations and readers know them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ebpfstream.tracers.execve import ExecEvent
from ebpfstream.tracers.syscalls import SyscallEvent

AnyEvent = ExecEvent | SyscallEvent
"""An event of any of them."""

EVENT_TYPES: Final[Mapping[str, type[Any]]] = {"execve": ExecEvent, "syscalls": SyscallEvent}
"""The class of each one's events."""
