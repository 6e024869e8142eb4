"""`ebpfstream count`, and `trace`: what is counted, and what is printed, in the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ebpfstream.cli import shipping
from ebpfstream.cli.terminal import is_live
from ebpfstream.trace_lines import TraceStream
from ebpfstream.tracers.count_execve import count_execve

if TYPE_CHECKING:
    from ebpfstream.cli.live import Counts


@click.command(short_help="Count the programs that each user executes.")
@shipping.every(2.0, "How often the counts are told.")
@shipping.options
@shipping.filters
def count(every: float, **given: Any) -> None:
    """Count the programs that each user executes, and tell the counts every two seconds.

    \b
    Examples: a live table; a line for each user who has executed something, every minute
        ebpfstream count
        ebpfstream count --every 1m --format json

    On a terminal this is a live table (q ends it), unless --format or --to is given.  Execs are counted in
    the kernel, for each CPU by itself: none is missed or counted twice, however many there are.  Ends as
    `execve` does.
    """  # noqa: D301  # click wants the character
    screen = _live(every) if given["format"] is None and not given["addresses"] and is_live() else None
    shipping.forward(count_execve(every=every, **shipping.of_the_kernel(given)), screen=screen, **given)


def _live(every: float) -> Counts | None:
    try:
        from ebpfstream.cli.live import Counts
    except ImportError:  # the extra `live`; lines do as well
        return None
    return Counts(every=every)


@click.command(short_help="Show what programs print with bpf_trace_printk.")
@shipping.options
def trace(**given: Any) -> None:
    """Show what BPF programs of this machine print (bpf_trace_printk), or send it elsewhere.

    \b
    Example: what is printed about one process, for a minute
        ebpfstream trace --where 'pid == 4711' --duration 1m

    Reads trace_pipe, which has one reader at a time, from now on.  Ends as `execve` does.
    """  # noqa: D301  # click wants the character
    shipping.forward(TraceStream(), **given)
