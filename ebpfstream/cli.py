"""The command line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

import anyio
import click
import orjson

from ebpfstream import __version__
from ebpfstream.errors import ArgumentError, EbpfStreamError, SinkClosedError
from ebpfstream.forwarding import Forwarding
from ebpfstream.kernel.buffers import SIZE
from ebpfstream.redaction import SECRETS
from ebpfstream.schema import json_schema
from ebpfstream.sink import Sink, open_sink
from ebpfstream.sinks.stdout import Format, StdoutSink
from ebpfstream.statistics import ForwardStatistics
from ebpfstream.tracers.execve import ExecEvent, trace_execve
from ebpfstream.tracers.syscalls import SyscallEvent

_DEADLINE: Final = 5.0
# Seconds to write what is left after a signal, if whoever reads is slow.

F = TypeVar("F", bound=Callable[..., Any])


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


def _forwarding_options(command: F) -> F:
    """What every command that forwards a stream takes."""
    for option in reversed(
        (
            click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events."),
            click.option(
                "--to",
                "addresses",
                multiple=True,
                metavar="ADDRESS",
                help="Where events go, such as stdout:, file:exec.jsonl?rotate=100MB&keep=10 or blackhole:; "
                "may be given several times.  [default: the standard output]",
            ),
            click.option(
                "--format",
                type=click.Choice(["json", "text"]),
                help="JSON lines, or a table.  [default: a table on a terminal, JSON lines elsewhere]",
            ),
            click.option(
                "--fields",
                metavar="NAME[=NEW],…",
                help="The fields that JSON lines have, in this order; NEW is another name for one.",
            ),
            click.option("--redact", is_flag=True, help="Replace the usual forms of secrets by ***."),
            click.option(
                "--redact-pattern",
                "patterns",
                multiple=True,
                metavar="REGEX",
                help="Replace what its groups, or else all of it, match in command lines; may be repeated.",
            ),
        )
    ):
        command = option(command)
    return command


@main.command()
@_forwarding_options
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
def execve(
    count: int | None,
    addresses: tuple[str, ...],
    format: Format | None,
    fields: str | None,
    redact: bool,
    patterns: tuple[str, ...],
    include_self: bool,
    **options: Any,
) -> None:
    """Show every program that this machine executes, or send it elsewhere.

    \b
    Examples: the next ten, into a file; all, into files of 100 MB and shown
        ebpfstream execve --count 10 --format json > execs.jsonl
        ebpfstream execve --to 'file:x.jsonl?rotate=100MB' --to stdout:

    Ends with Ctrl-C, SIGTERM, or when nobody reads its output any more; what has happened until then
    is written, and the last lines on standard error say how many events there were and how many
    were lost.  SIGHUP lets files be opened anew (logrotate).
    """  # noqa: D301  # click wants the character
    forwarding = Forwarding(
        trace_execve(exclude_self=not include_self, on_lost="yield", **options),
        *_sinks(addresses, format),
        count=count,
        fields=_fields(fields),
        redact=_redaction(redact, patterns),
        deadline=_DEADLINE,
    )
    try:
        ended_by = anyio.run(_ship, forwarding)
    finally:
        _report(forwarding.statistics(), sinks=bool(addresses))
    _end(ended_by)


@main.command()
@click.argument("kind", type=click.Choice(["execve", "syscalls"]))
@click.option("--fields", metavar="NAME[=NEW],…", help="As for the command whose lines it describes.")
def schema(kind: str, fields: str | None) -> None:
    """Print the JSON Schema of the lines that a command writes.

    \b
    Example
        ebpfstream schema execve > execve.schema.json
    """  # noqa: D301  # click wants the character
    event_type = {"execve": ExecEvent, "syscalls": SyscallEvent}[kind]
    made = json_schema(event_type, _fields(fields))
    click.echo(orjson.dumps(made, option=orjson.OPT_INDENT_2))


def _sinks(addresses: tuple[str, ...], format: Format | None) -> list[Sink]:
    if not addresses:
        return [StdoutSink(format or ("text" if os.isatty(1) else "json"))]
    if format is not None:
        raise ArgumentError("--format is for the standard output alone; with --to write stdout:?format=text")
    return [open_sink(address) for address in addresses]


def _fields(given: str | None) -> dict[str, str] | None:
    """`pid,comm=name` as a mapping."""
    if given is None:
        return None
    pairs = [part.strip().partition("=") for part in given.split(",")]
    return {name: new or name for name, _, new in pairs}


def _redaction(usual: bool, patterns: tuple[str, ...]) -> bool | list[str]:
    return [*SECRETS, *patterns] if usual and patterns else list(patterns) or usual


def _report(statistics: ForwardStatistics, *, sinks: bool) -> None:
    """The ledgers on standard error; those of sinks if they were named, or did not get everything."""
    if not statistics.stream.tried:
        return
    lines = str(statistics).splitlines()
    incomplete = any(sink.acknowledged < sink.accepted for sink in statistics.sinks)
    for line in lines if sinks or incomplete else lines[:1]:
        click.echo(f"ebpfstream: {line}", err=True)


async def _ship(forwarding: Forwarding[Any]) -> int:
    """Forward until the end; the number of the signal that brought it about, or 0."""
    ended_by = 0
    failure: EbpfStreamError | None = None
    with_terminal = _has_terminal()

    async def heed_signals() -> None:
        nonlocal ended_by
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP and not (with_terminal and not _has_terminal()):
                    forwarding.reopen()
                elif ended_by:  # asked twice: at once, then
                    ended_by = number
                    forwarding.end(0)
                else:
                    ended_by = number
                    forwarding.end()

    async def end_without_reader(sink: StdoutSink) -> None:
        nonlocal ended_by
        await sink.wait_closed()
        ended_by = signal.SIGPIPE
        forwarding.end(0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(heed_signals)
        for sink in forwarding.sinks:
            if isinstance(sink, StdoutSink):
                tasks.start_soon(end_without_reader, sink)
        try:
            await forwarding.run()
        except SinkClosedError:
            ended_by = signal.SIGPIPE
        except EbpfStreamError as error:
            failure = error  # raised outside of the task group, which would wrap it
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return ended_by


def _has_terminal() -> bool:
    """Whether there is a controlling terminal: once it has hung up there is none (tty_open(), drivers/tty/tty_io.c)."""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
        return True
    return False


def _end(ended_by: int) -> None:
    """Die of the signal that ended the stream: shells and systemd expect it of a program that was told to."""
    if ended_by:
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
        sys.exit(128 + ended_by)  # process 1 of a container does not die of these
