"""What ebpfstream is to reach beside its peers, and whether it does."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from benchmarks.claims import claim
from benchmarks.peers.catalogue import FLOOR

BCC_RING: Final = "BCC callback, ring"
_BCC_PERF: Final = "BCC callback, perf"
_BPFTRACE_JSON: Final = "bpftrace -f json, perf"
TIMES: Final = 2
"""At how many times the rate that BCC's callback takes nothing is to be lost."""


class Target(NamedTuple):
    """A figure, or the ratio of it to a peer's in the same round, is to be at least, or at most, so much."""

    text: str
    ours: str
    figure: str
    peer: str
    """Without one it is the figure itself, in `unit`."""
    limit: float | None
    """None: it is told, and nothing asked."""
    at_least: bool = False
    peers_figure: str = ""
    """If that is another one."""
    unit: float = 1.0


def _rates(kind: str, bcc: str) -> list[Target]:
    """Events each second, of a producer that never stops."""

    def of(text: str, ours: str, peer: str, limit: float, peers_figure: str = "rate") -> Target:
        name = f"{ours.removeprefix('ebpfstream ')}: {text}"
        return Target(name, ours, "rate", peer, limit, at_least=True, peers_figure=peers_figure)

    loop, batches, numpy, lines = (
        f"ebpfstream {form}, {kind}" for form in ("async for", "batches", "numpy", "JSON")
    )
    return [
        of("events/s, of BCC's callback", loop, bcc, 2.5),
        of("of BCC's callback", batches, bcc, 4.0),
        of("of C that counts, with its default wakeups", numpy, f"libbpf C, counting, {kind}", 1.0),
        of("of what the producer can", numpy, numpy, 0.9, "offered"),
        of("of C + stdio", lines, f"libbpf C, JSON by stdio, {kind}", 1.0),
        of("of bpftrace -f json", lines, _BPFTRACE_JSON, 5.0),
        of("of BCC's callback + json", lines, f"BCC callback, JSON, {kind}", 8.0),
    ]


def _costs(kind: str, bcc: str) -> list[Target]:
    """CPU time and lateness at rates that everybody can follow; nothing while nothing happens."""
    loop, at_once = f"ebpfstream async for, {kind}", f"ebpfstream latency=0, {kind}"
    return [
        *(
            Target(f"CPU per event at {rate:,}/s, {kind}: of BCC's callback", loop, f"cpu_{rate}", bcc, 0.5)
            for rate in (1_000, 10_000, 100_000)
        ),
        Target(f"CPU while idle, {kind}: ms/s", loop, "idle_cpu", "", 0, unit=1e-3),
        Target(f"wakeups while idle, {kind}: 1/s", loop, "idle_switches", "", 0),
        Target(f"latency at 1,000/s, p50, {kind}: ms", loop, "p50", "", 1.5, unit=1e6),
        Target(f"latency at 1,000/s, p99, {kind}: ms", loop, "p99", "", 5, unit=1e6),
        Target(f"p50 with latency=0, {kind}: of BCC's blocking poll", at_once, "p50", bcc, 1.0),
    ]


def _added(kind: str, bcc: str) -> list[Target]:
    """What others pay: those who call, and those who execute; and what a tool takes to start."""
    loop, calls, execs = (
        f"ebpfstream async for, {kind}",
        f"calls: ebpfstream, {kind}",
        f"execs: ebpfstream, {kind}",
    )
    to_execs = (
        ("exec", f"added to an exec, {kind}"),
        ("start", f"time to attached, {kind}"),
        ("start_first", f"time to attached, first start, {kind}"),
        ("memory", f"memory of execsnoop, {kind}"),
    )
    return [
        Target(f"added to a call, {kind}: of BCC's", loop, "call", bcc, 1.0),
        Target(f"added to a call, {kind}: of bpftrace's", loop, "call", "bpftrace printf, perf", 1.0),
        Target(
            f"added to a call, trace_syscalls, {kind}: of BCC's", calls, "call", f"calls: BCC, {kind}", 1.0
        ),
        Target(
            f"added to a call, trace_syscalls, {kind}: of bpftrace's",
            calls,
            "call",
            "calls: bpftrace, perf",
            1.0,
        ),
        *(Target(f"{text}: of BCC's", execs, figure, "execs: BCC, perf", 1.0) for figure, text in to_execs),
        Target(f"added to an exec, {kind}: of bpftrace's", execs, "exec", "execs: bpftrace, perf", 1.0),
    ]


TARGETS: Final = [
    target
    for kind, bcc in (("ring", BCC_RING), ("perf", _BCC_PERF))
    for part in (_rates, _costs, _added)
    for target in part(kind, bcc)
]
_FLOOR: Final = [
    Target(
        "a turn of asyncio's loop for a timer alone: µs of CPU", FLOOR.name, "cpu_turn", "", None, unit=1e-6
    ),
    Target(
        "CPU at 1,000/s, asyncio's timer alone: of BCC's callback, ring",
        FLOOR.name,
        "cpu_1000",
        BCC_RING,
        None,
    ),
    Target(
        "CPU at 1,000/s, async for, ring: of asyncio's timer alone",
        "ebpfstream async for, ring",
        "cpu_1000",
        FLOOR.name,
        None,
    ),
]


def judge(results: dict[str, list[dict[str, float]]], losses: dict[str, float]) -> list[dict[str, Any]]:
    """Each target of which there are figures."""
    verdicts = []
    for target in (*TARGETS, *_FLOOR):
        rounds = results.get(target.ours, [])
        peers_figure = target.peers_figure or target.figure
        peers = results.get(target.peer, []) if target.peer else [{peers_figure: target.unit}] * len(rounds)
        found = [
            ours[target.figure] / theirs[peers_figure]
            for ours, theirs in zip(rounds, peers, strict=False)  # one may be left out
            if target.figure in ours
            and theirs.get(peers_figure, 0) > 0  # what is added to little drowns in noise
        ]
        if found:
            verdicts.append(claim(target.text, found, target.limit, at_least=target.at_least))
    for name, lost in losses.items():
        if name.startswith("ebpfstream") and BCC_RING in losses:
            text = f"lost where BCC's callback loses {losses[BCC_RING]:.0%}: {name}, %"
            verdicts.append(claim(text, [100 * lost], 0, at_least=False))
    return verdicts
