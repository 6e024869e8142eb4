"""The command line."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

import anyio
import click

from ebpfstream import __version__
from ebpfstream.errors import EbpfStreamError, SinkClosedError
from ebpfstream.forwarding import forward
from ebpfstream.kernel.buffers import SIZE
from ebpfstream.sinks.stdout import Format, StdoutSink
from ebpfstream.stream import EventStream
from ebpfstream.tracers.execve import trace_execve

_DEADLINE: Final = 5.0
# Seconds to write what is left after a signal, if whoever reads is slow.


class _Commands(click.Group):
    """Shows our errors as messages: they say what to do, and a traceback does not."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except EbpfStreamError as error:
            click.echo(f"ebpfstream: {error}", err=True)
            sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="ebpfstream %(version)s")
def main() -> None:
    """Kernel events as streams."""


@main.command()
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events.")
@click.option(
    "--format",
    type=click.Choice(["json", "text"]),
    help="JSON lines, or a table.  [default: a table on a terminal, JSON lines elsewhere]",
)
@click.option(
    "--buffer-size",
    type=int,
    default=SIZE,
    show_default=True,
    metavar="BYTES",
    help="Size of the kernel's buffer in all; powers of two fit best.",
)
@click.option(
    "--buffer",
    type=click.Choice(["auto", "ring", "perf"]),
    default="auto",
    show_default=True,
    help="Kind of the kernel's buffer.",
)
@click.option("--failed", is_flag=True, help="Show execs that fail as well; see the README for the cost.")
@click.option("--pid", type=int, help="Only this process.")
@click.option("--ppid", type=int, help="Only children of this process.")
@click.option("--uid", type=int, help="Only this user.")
@click.option("--gid", type=int, help="Only this group.")
@click.option("--comm", help="Only processes of this name.")
@click.option("--cgroup", metavar="PATH", help="Only this cgroup v2 and those below it.")
@click.option("--include-self", is_flag=True, help="Show what this command itself executes, too.")
def execve(count: int | None, format: Format | None, include_self: bool, **options: Any) -> None:
    """Show every program that this machine executes.

    \b
    Example: the next ten, into a file
        ebpfstream execve --count 10 --format json > execs.jsonl

    Ends with Ctrl-C, SIGTERM, or when nobody reads its output any more; what has happened until then
    is written, and the last line on standard error says how many events there were and how many
    were lost.
    """  # noqa: D301  # click wants the character
    events = trace_execve(exclude_self=not include_self, **options)
    sink = StdoutSink(format or ("text" if os.isatty(1) else "json"))
    try:
        ended_by = anyio.run(_ship, events, sink, count)
    finally:
        if events.statistics().tried:
            click.echo(f"ebpfstream: {events.statistics()}", err=True)
    _end(ended_by)


async def _ship(stream: EventStream[Any], sink: StdoutSink, count: int | None) -> int:
    """Forward until the end; the number of the signal that brought it about, or 0."""
    ended_by = 0
    failure: EbpfStreamError | None = None

    async def end_on_signal() -> None:
        nonlocal ended_by
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                if ended_by:  # asked twice: at once, then
                    break
                ended_by = number
                stream.detach()
                tasks.start_soon(end_at_deadline)
        tasks.cancel_scope.cancel()

    async def end_at_deadline() -> None:
        await anyio.sleep(_DEADLINE)
        tasks.cancel_scope.cancel()

    async def end_without_reader() -> None:
        nonlocal ended_by
        await sink.wait_closed()
        ended_by = signal.SIGPIPE
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(end_on_signal)
        tasks.start_soon(end_without_reader)
        try:
            await forward(stream, sink, count=count)
        except SinkClosedError:
            ended_by = signal.SIGPIPE
        except EbpfStreamError as error:
            failure = error  # raised outside of the task group, which would wrap it
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return ended_by


def _end(ended_by: int) -> None:
    """Die of the signal that ended the stream: shells and systemd expect it of a program that was told to."""
    if ended_by:
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
        sys.exit(128 + ended_by)  # process 1 of a container does not die of these
