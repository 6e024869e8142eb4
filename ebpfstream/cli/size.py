"""`ebpfstream size`."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from time import monotonic
from typing import Final

import anyio
import click
import orjson

from ebpfstream import __version__
from ebpfstream.cli.messages import say
from ebpfstream.cli.shipping import Quantity
from ebpfstream.errors import ArgumentError
from ebpfstream.kernel.bpf import online_cpus
from ebpfstream.options import Seconds, Size
from ebpfstream.sink import Sink
from ebpfstream.sizing import WINDOW, Kind, Load, Meter, Part, Plan, expected, plan
from ebpfstream.tracers.execve import trace_execve

_INDENT: Final = 14  # of what is said: behind what it is of
_MEASURING: Final = 16 << 20  # bytes of the buffer meanwhile
_UNITS: Final = ("B", "KiB", "MiB", "GiB")


@click.command(short_help="Work out how large buffers, queues and spools must be.")
@click.argument("kind", type=click.Choice(["execve", "syscalls", "struct"]), default="execve")
@click.option("--rate", type=float, metavar="N", help="Events a second while most come.")
@click.option(
    "--measure",
    "measuring",
    type=Quantity("time", Seconds),
    metavar="TIME",
    help="Measure this machine's execs for so long, as root, instead of --rate.",
)
@click.option(
    "--stall",
    type=Quantity("time", Seconds),
    metavar="TIME",
    help="How long the consumer may stand still without a loss: 500ms, 2s.",
)
@click.option(
    "--buffer-size",
    type=Quantity("size", Size),
    metavar="SIZE",
    help="Instead of --stall: how long a stall does this size tolerate?",
)
@click.option(
    "--outage",
    type=Quantity("time", Seconds),
    metavar="TIME",
    help="How long a sink may take nothing: 10m, 6h.",
)
@click.option(
    "--event-size",
    type=Quantity("size", Size),
    metavar="SIZE",
    help="What a program submits for one event; of a struct, its size in C.",
)
@click.option("--cpus", type=int, metavar="N", help="CPUs of the machine.  [default: those of this one]")
@click.option("--json", "as_json", is_flag=True, help="All figures, for machines: bytes, seconds.")
def size(
    kind: Kind,
    rate: float | None,
    measuring: float | None,
    stall: float | None,
    buffer_size: int | None,
    outage: float | None,
    event_size: int | None,
    cpus: int | None,
    as_json: bool,
) -> None:
    """Work out how large buffers, queues and spools must be so that nothing is lost.

    \b
    Examples: for a rate that is known; for this machine's; the other way round
        ebpfstream size --rate 20000 --stall 500ms
        ebpfstream size --measure 10s --stall 2s --outage 6h
        ebpfstream size syscalls --rate 100000 --buffer-size 8MiB

    Kernel buffers are for the busiest time, as if it lasted for all of the stall.  Those of perf buffers are
    for the case that all events come from one CPU, which has its own part alone.  An exec's size varies with
    its arguments: unless --event-size or --measure tells it, it is a mean that was measured elsewhere.
    """  # noqa: D301  # click wants the character
    count = len(online_cpus()) if cpus is None else cpus
    load = None if rate is None else expected(kind, rate, event_size)
    if measuring is not None:
        if load is not None or event_size is not None or kind != "execve":
            raise ArgumentError("--measure is for execs, and finds rate and size by itself: give it alone")
        if measuring < WINDOW:
            raise ArgumentError(f"--measure {measuring:g}s is too short: give a second or more")
        # What is wrong with the others is to be said before; of which load does not matter.
        plan(expected(kind, 1), cpus=count, stall=stall and WINDOW, buffer_size=buffer_size, outage=outage)
        say(f"counting execs for {measuring:g} s")
        load = anyio.run(_measure, measuring)
    if load is None:
        raise ArgumentError(
            "a size depends on how many events come: give --rate (events a second), or --measure 10s as root to "
            "count this machine's execs"
        )
    made = plan(load, cpus=count, stall=stall, buffer_size=buffer_size, outage=outage)
    if as_json:
        told = {"version": __version__, "kind": kind, "queue_size": Sink.queue_size} | asdict(made)
        click.echo(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    else:
        for name, text in _lines(made, kind, is_known=event_size is not None):
            _show(name, text)


async def _measure(seconds: float) -> Load:
    """Count this machine's execs for so long."""
    meter = Meter()
    # What this command itself executes is none of it.
    async with trace_execve(exclude_self=True, buffer_size=_MEASURING) as events:
        began = ended = monotonic()

        async def end() -> None:
            nonlocal ended
            await anyio.sleep(seconds)
            ended = monotonic()
            events.detach()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end)
            async for batch in events.batches():
                meter.add(batch)
    return meter.load(ended - began, events.statistics().lost or 0)


def _show(name: str, text: str) -> None:
    width = max(shutil.get_terminal_size().columns - _INDENT, 40)
    for line in textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False):
        click.echo(f"{name:<{_INDENT}}{line}")
        name = ""


def _lines(made: Plan, kind: Kind, *, is_known: bool) -> Iterator[tuple[str, str]]:
    """What is to be said, each with its name."""
    load = made.load
    if load.seconds is None:
        yield "rate", f"{load.rate:,.10g} events a second, as given"
    else:
        of_those = f", {load.lost:,} of them lost meanwhile" if load.lost else ""
        yield "rate", f"{load.rate:,.3g} events a second: {load.events:,} in {load.seconds:.1f} s{of_those}"
        yield (
            "busiest",
            f"{load.busiest:,.10g} events a second, within {WINDOW * 1000:.0f} ms: kernel buffers are for this",
        )
    yield "event", _event(load, kind, is_known=is_known)
    if made.stall is not None:
        yield (
            "stall",
            f"{_time(made.stall)}, and {_time(made.latency)} that events may gather: {made.events:,} events",
        )
    if made.ring is not None:
        yield "ring buffer", _part(made.ring, "")
    if made.perf is not None and made.perf_spread is not None:
        each = f"{_bytes(made.perf.per_cpu)} for each of {made.cpus} CPUs, as if all came from one"
        yield "perf buffer", _part(made.perf, each)
        yield (
            "",
            _part(made.perf_spread, f"{_bytes(made.perf_spread.per_cpu)} each, if they are spread evenly"),
        )
    elif made.perf_impossible:
        yield "perf buffer", f"impossible: {made.perf_impossible}"
    full = f"full after {_time(made.queue_tolerates)} in which the sink takes nothing"
    yield "queue", f"queue_size={_option(Sink.queue_size)}, unless told otherwise: {full}"
    if made.outage is not None:
        out = made.outage
        disk = f"spool_size={_option(out.spool_size)} keeps them on disk ({load.spool:,.0f} bytes an event)"
        memory = f"queue_size={_option(out.queue_size)} in memory"
        yield "outage", f"{_time(out.seconds)}: {out.events:,} events; {disk}, {memory}"
    if load.json is not None and made.json_per_day is not None:
        each = f"{load.json:,.0f} bytes an event, uncompressed"
        yield "JSON", f"{_decimal(made.json_per_day)} a day, in Kafka or a file: {each}"


def _event(load: Load, kind: Kind, *, is_known: bool) -> str:
    one = load.busiest_record
    takes = f": {one.ring:,.0f} in a ring buffer"
    takes += "" if one.perf is None else f", {one.perf:,.0f} in a perf buffer"
    if load.seconds is not None:
        origin = " in the mean, within that time"
    elif kind == "execve" and not is_known:
        origin = " of an exec (a mean, measured elsewhere: see --event-size)"
    else:
        origin = ", as given" if is_known else " of a system call"
    return f"{one.sample:,.0f} bytes{origin}{takes}"


def _part(part: Part, each: str) -> str:
    need = "" if part.needed is None else f"{part.needed:,} bytes are needed"
    rest = "; ".join(text for text in (each, need, f"tolerates {_time(part.tolerates)}") if text)
    kind = " --buffer perf" if each else ""
    return f"--buffer-size {_option(part.buffer_size)}{kind}: {rest}"


def _option(size: int) -> str:
    """Bytes as options take them, exactly."""
    return _bytes(size).replace(" ", "").replace(",", "")


def _bytes(size: int) -> str:
    unit = 0
    while size % 1024 == 0 and unit < len(_UNITS) - 1:
        size //= 1024
        unit += 1
    return f"{size:,} {_UNITS[unit]}"


def _decimal(size: float) -> str:
    """Bytes as disks and networks are sold: 1.3 TB."""
    unit = 0
    while size >= 999.5 and unit < 5:
        size /= 1000
        unit += 1
    return f"{size:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB', 'PB')[unit]}"


def _time(seconds: float) -> str:
    """Not above what it is: 1.25 ms, 726 ms, 12.3 s, 5.2 min."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            return f"{_cut(seconds / length)} {unit}"
    return f"{_cut(seconds * 1000)} ms"


def _cut(number: float) -> str:
    """To three figures, those after them left out."""
    places = 2 if number < 10 else 1 if number < 100 else 0
    cut = int(round(number * 10**places, 6)) / 10**places
    return f"{cut:,.{places}f}".rstrip("0").rstrip(".") if places else f"{cut:,.0f}"
