"""Who takes part, and how each is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from benchmarks.peers.build import FOLDER
from benchmarks.peers.program import GETPPID
from ebpfstream.kernel import headers

BUFFER_SIZE: Final = 16 << 20
FILE: Final = "{file}"
_FLOOD: Final = ["{kind}", "{target}", str(BUFFER_SIZE)]


@dataclass(frozen=True)
class Peer:
    """One way to consume."""

    name: str
    part: str
    kind: str
    command: tuple[str, ...]
    text: str = ""  # of BCC's, for which the kernel's headers are made
    events_of_perf: int = 0
    latency: tuple[str, ...] = ()  # the command that notes how late events are
    keeps: bool = False  # what it compiled: the first start of all is measured as well

    @property
    def writes(self) -> bool:
        """Whether it writes the events to a file."""
        return FILE in self.command or bool(self.events_of_perf)

    def environment(self) -> dict[str, str]:
        """What it wants there."""
        cpus = os.cpu_count() or 1
        pages = BUFFER_SIZE // cpus // os.sysconf("SC_PAGESIZE")
        found = {"BPFTRACE_PERF_RB_PAGES": str(pages)} if self.part == "bpftrace" else {}
        return {**found, "BCC_KERNEL_SOURCE": tree} if (tree := _tree(self.text)) else found


@cache
def _tree(text: str) -> str:
    """The kernel's headers, for BCC; "" where it finds them by itself."""
    return str(next(headers.trees((FOLDER / text).read_text())) or "") if text else ""


def hello(folder: Path) -> list[Peer]:
    """Those for the events of hello.c; `folder` has what is built."""
    cpus = os.cpu_count() or 1
    peers = []
    for kind in ("ring", "perf"):
        flood = tuple(part.replace("{kind}", kind) for part in _FLOOD)
        reader = (str(folder / "reader"), *flood)
        bcc = (sys.executable, str(FOLDER / "bcc_callbacks.py"), *flood)
        ours = (sys.executable, str(FOLDER / "ours.py"), *flood)
        usual = "hello.c"
        peers += [
            Peer(
                f"libbpf C, counting, {kind}",
                "libbpf",
                kind,
                (*reader, "count"),
                latency=(*reader, "latency"),
            ),
            Peer(f"libbpf C, JSON by stdio, {kind}", "libbpf", kind, (*reader, FILE)),
            Peer(f"BCC callback, {kind}", "bcc", kind, (*bcc, "fields"), usual, latency=(*bcc, "latency")),
            Peer(f"BCC callback, JSON, {kind}", "bcc", kind, (*bcc, FILE), usual),
            Peer(f"ebpfstream async for, {kind}", "", kind, (*ours, "fields"), latency=(*ours, "latency")),
            Peer(f"ebpfstream batches, {kind}", "", kind, (*ours, "batches")),
            Peer(f"ebpfstream numpy, {kind}", "", kind, (*ours, "numpy")),
            Peer(f"ebpfstream JSON, {kind}", "", kind, (*ours, FILE)),
            Peer(
                f"ebpfstream latency=0, {kind}",
                "",
                kind,
                (*ours, "fields", "0"),
                latency=(*ours, "latency", "0"),
            ),
        ]
        if kind == "perf":
            name = "BCC callback, a wakeup for 512, perf"
            peers.append(Peer(name, "bcc", kind, (*bcc, "fields", "512"), usual))
    for name, flags in (("bpftrace printf, perf", ()), ("bpftrace -f json, perf", ("-f", "json"))):
        command = ("bpftrace", *flags, str(FOLDER / "hello.bt"), "{target}")
        peers.append(Peer(name, "bpftrace", "perf", command, events_of_perf=cpus + 1))
    return peers + _calls()


def _calls() -> list[Peer]:
    """Those that tell of the same calls what trace_syscalls() tells."""
    cpus = os.cpu_count() or 1
    peers = []
    for kind in ("ring", "perf"):
        flood = tuple(part.replace("{kind}", kind) for part in _FLOOD)
        bcc, ours = (
            (sys.executable, str(FOLDER / name), *flood) for name in ("bcc_syscalls.py", "our_syscalls.py")
        )
        peers += [
            Peer(f"calls: BCC, {kind}", "bcc", kind, bcc, "syscalls.c"),
            Peer(f"calls: ebpfstream, {kind}", "", kind, ours),
        ]
    bpftrace = ("bpftrace", str(FOLDER / "syscalls.bt"), "{target}", str(GETPPID))
    return [*peers, Peer("calls: bpftrace, perf", "bpftrace", "perf", bpftrace, events_of_perf=cpus + 1)]


FLOOR: Final = Peer("asyncio alone, a timer of 2 ms", "", "", (sys.executable, str(FOLDER / "timer.py")))
"""Not a peer: what no program on an asyncio loop can be below that wakes as often."""


def execs() -> list[Peer]:
    """Those for what is executed."""
    cpus = os.cpu_count() or 1
    bcc = (sys.executable, str(FOLDER / "bcc_execsnoop.py"), FILE)
    ours = (sys.executable, str(FOLDER / "our_execsnoop.py"))
    bpftrace = ("bpftrace", str(FOLDER / "execsnoop.bt"))
    return [
        Peer("execs: BCC, perf", "bcc", "perf", bcc, "execsnoop.c"),
        Peer("execs: bpftrace, perf", "bpftrace", "perf", bpftrace, events_of_perf=cpus + 2),
        Peer("execs: ebpfstream, ring", "", "ring", (*ours, "ring", FILE), keeps=True),
        Peer("execs: ebpfstream, perf", "", "perf", (*ours, "perf", FILE), keeps=True),
    ]
