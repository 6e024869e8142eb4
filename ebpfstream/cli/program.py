"""`ebpfstream program`: anybody's BPF C as a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ebpfstream.cli import shipping
from ebpfstream.program_file import ProgramFile


@click.command(short_help="Show what a BPF program of your own submits.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE.c")
@click.option(
    "--attach",
    "hooks",
    multiple=True,
    metavar="HOOK=FUNCTION",
    help="What the function is attached to: syscall:NAME, tracepoint:CATEGORY:NAME, raw_tracepoint:NAME, "
    "kprobe:NAME, kretprobe:NAME, uprobe:PATH:SYMBOL or uretprobe:PATH:SYMBOL; may be given several times.",
)
@click.option("--events", "output", metavar="OUTPUT", help="The output that is shown, if there are several.")
@click.option(
    "--cflag", "cflags", multiple=True, metavar="FLAG", help="Given to the compiler, such as -DPID=1."
)
@shipping.options
def program(
    file: Path, hooks: tuple[str, ...], output: str | None, cflags: tuple[str, ...], **given: Any
) -> None:
    """Show what a BPF program of your own submits, or send it elsewhere.

    \b
    Example
        ebpfstream program hello.c --attach syscall:execve=hello --events output

    FILE.c is BCC's dialect of C, with an output (BPF_PERF_OUTPUT or BPF_RINGBUF_OUTPUT).  The fields of
    its events are those of the struct that it submits.  Functions whose names say where they belong
    (TRACEPOINT_PROBE and its like) attach themselves.  Ends as `execve` does.
    """  # noqa: D301  # click wants the character
    stream = ProgramFile(file, hooks, output=output, cflags=cflags)
    shipping.forward(stream, **given)
