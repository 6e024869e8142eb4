"""trace_pipe: what programs print with `bpf_trace_printk`, line by line.

All programs of the machine print into one pipe, and each line goes to one reader.  A read that asks
for one byte makes the kernel format one entry of its buffer and no more; what the next read returns
is the rest of that entry (tracing_read_pipe(), kernel/trace/trace.c).  So entries are known from one
another without looking for newlines: no line comes in parts, and neither a message nor a process's
name, whatever stands in it, passes for another line.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ebpfstream.errors import PrivilegeError, StreamBusyError, UnsupportedError
from ebpfstream.kernel import tracefs
from ebpfstream.kernel.bpf import Descriptor
from ebpfstream.lost import Lost
from ebpfstream.text import decode, printable

_READ_BYTES: Final = 1 << 16  # an entry is shorter than the kernel's buffer for it, 8 KiB or a page
ENTRIES_AT_ONCE: Final = 64

# print_trace_line(), kernel/trace/trace.c
_LOST: Final = re.compile(rb"CPU:(\d{1,9}) \[LOST (?:(\d{1,20}) )?EVENTS\]\n")
# trace_print_context(), kernel/trace/trace_output.c.  The name takes 16 bytes, whatever is in it.  Before
# Linux 5.9 an address that is none, 1, stands for the event's name (bpf_trace_printk(),
# kernel/trace/bpf_trace.c).
_LINE: Final = re.compile(
    rb"(.{16})-(\d{1,10}) +"
    rb"(?:\( *(?:\d{1,10}|-+)\) +)?"  # option record-tgid
    rb"\[(\d{1,9})\] "
    rb"(\S{4,8} |)"  # not with noirq-info
    rb" *(\d{1,20}(?:\.\d{1,9})?): "
    rb"(?:bpf_trace_printk|0x0*1): ",
    re.DOTALL,
)
# Options that write another form than that.
_OTHER_FORMS: Final = frozenset({"raw", "hex", "bin", "fields", "latency-format", "nocontext-info"})


@dataclass
class TraceLine:
    """One message of `bpf_trace_printk`."""

    task: str
    """The name that the kernel remembers for the thread when the line is read, without blanks at its
    beginning; `<...>` if it remembers none, `<idle>` for the idle task."""
    pid: int
    """The thread that was running (the kernel's pid, in the initial namespace)."""
    cpu: int
    """The CPU it was running on."""
    flags: str
    """Its state in four or more letters, of which /sys/kernel/tracing/trace has the legend; empty with the
    trace option noirq-info."""
    timestamp: float
    """The trace clock as printed: seconds, or ticks if the clock is one that counts."""
    message: str
    """What was printed, without newlines at its end; those inside are kept."""

    def __str__(self) -> str:
        return f"{self.task}-{self.pid} [{self.cpu:03}] {self.flags} {self.timestamp:.6f}: {self.message}"


def parse(entry: bytes) -> list[TraceLine | Lost]:
    """What one entry of trace_pipe says: a line, the loss of others before it, both, or nothing.

    Entries of other events that somebody has enabled (ftrace) are left out.  `Lost` counts what the
    CPU's buffer had no room for, those included.  Bytes that are no entry at all yield nothing.
    """
    found: list[TraceLine | Lost] = []
    position = 0
    if lost := _LOST.match(entry):
        cpu, count = lost.groups()
        found.append(Lost(int(cpu), None if count is None else int(count)))
        position = lost.end()
    if line := _LINE.match(entry, position):
        task, pid, cpu, flags, timestamp = line.groups()
        found.append(
            TraceLine(
                decode(task.lstrip(b" ")),
                int(pid),
                int(cpu),
                decode(flags.rstrip(b" ")),
                float(timestamp),
                decode(entry[line.end() :].rstrip(b"\n")),
            )
        )
    return found


class TracePipe(Descriptor):
    """The pipe, open; only one such thing at a time on a machine.

    Opening sees to it that the event behind `bpf_trace_printk` is enabled, as loading a program that
    calls it does, and that the kernel's buffer has its full size, which it gets when somebody enables
    an event by hand: it begins with two pages for each CPU.

    Raises StreamBusyError if another reader has it open, PrivilegeError, and UnsupportedError if
    nothing can come: tracing switched off, or written in another form.
    """

    __slots__ = ("_folder",)

    def __init__(self, path: Path | None = None) -> None:
        path = path or tracefs.folder() / "trace_pipe"
        self._folder = path.parent
        super().__init__(-1)
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError as error:
            raise PrivilegeError(
                f"{path} cannot be opened by this user ({error.strerror}): run as root, or remount tracefs for "
                "the user's group (mount -o remount,gid=…,mode=750); a kernel that is locked down "
                "(confidentiality) lets nobody in"
            ) from error
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise _busy(path, _readers(path)) from error
        try:
            self._check_for_other_readers(path)
            self._check_settings()
        except BaseException:
            self.close()
            raise
        # Not there before Linux 5.9; not for a user who may only read.
        with suppress(OSError):
            (self._folder / "events/bpf_trace/bpf_trace_printk/enable").write_text("1")

    def _check_for_other_readers(self, path: Path) -> None:
        """Kernels before 6.6, unless they got its fix, let several in and share the lines out among them."""
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            return
        if readers := _readers(path, but=self.fd):
            raise _busy(path, readers)

    def _check_settings(self) -> None:
        if self._setting("tracing_on").strip() == "0":
            raise UnsupportedError(
                f"tracing is switched off, so bpf_trace_printk prints nothing: echo 1 > {self._folder}/tracing_on"
            )
        if wrong := sorted(_OTHER_FORMS.intersection(self._setting("trace_options").split())):
            undone = " ".join(option[2:] if option.startswith("no") else f"no{option}" for option in wrong)
            raise UnsupportedError(
                f"lines of trace_pipe cannot be read with the trace options {', '.join(wrong)}: "
                f"for option in {undone}; do echo $option > {self._folder}/trace_options; done"
            )

    def _setting(self, name: str) -> str:
        with suppress(OSError):
            return (self._folder / name).read_text()
        return ""

    def read(self, most: int) -> list[bytes]:
        """As many entries as are there, up to `most`; never blocks."""
        entries: list[bytes] = []
        with suppress(BlockingIOError):
            while len(entries) < most and (first := os.read(self.fd, 1)):
                entries.append(first + os.read(self.fd, _READ_BYTES))
        return entries

    def waiting(self) -> int:
        """How many entries there are at this moment."""
        statistics = [path.read_text() for path in self._folder.glob("per_cpu/cpu*/stats")]
        return sum(int(count) for text in statistics for count in re.findall(r"^entries: (\d+)", text, re.M))

    def drain(self) -> None:
        """Take out as many entries as there are at this moment, however fast others come."""
        left = self.waiting()
        while left > 0 and (entries := self.read(min(left, ENTRIES_AT_ONCE))):
            left -= len(entries)


def _busy(path: Path, readers: list[str]) -> StreamBusyError:
    who = " and ".join(readers) or "a process that this one cannot see"
    return StreamBusyError(
        f"{path} is being read by {who}, and each line goes to one reader only: end that one first "
        "(one stream has the lines of all programs)"
    )


def _readers(path: Path, but: int = -1) -> list[str]:
    """Who has the pipe open, or that of one CPU, except for our own descriptor `but`."""
    wanted = set()
    for each in (path, *path.parent.glob("per_cpu/cpu*/trace_pipe")):
        with suppress(OSError):
            wanted.add(_identity(each))
    ours = Path("/proc/self").readlink().name
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours to look into
            descriptors = [
                descriptor
                for descriptor in (process / "fd").iterdir()
                if (process.name, descriptor.name) != (ours, str(but)) and _is_one_of(descriptor, wanted)
            ]
            if descriptors:
                name = printable(decode((process / "comm").read_bytes().rstrip(b"\n")))
                found.append("this process itself" if process.name == ours else f"{name} ({process.name})")
    return found


def _is_one_of(descriptor: Path, wanted: set[tuple[int, int]]) -> bool:
    with suppress(OSError):
        # The name first: looking into a file may take long, or hang, on a network.
        return descriptor.readlink().name == "trace_pipe" and _identity(descriptor) in wanted
    return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
