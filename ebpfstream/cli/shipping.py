"""What commands that forward a stream have in common: options, signals, the ledger, the exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import click

from ebpfstream.asking import Asked
from ebpfstream.cli.messages import say
from ebpfstream.conditions import condition
from ebpfstream.errors import ArgumentError, EbpfStreamError, SinkClosedError
from ebpfstream.forwarding import DEADLINE, BatchStream, Forwarding
from ebpfstream.kernel.buffers import SIZE
from ebpfstream.options import Seconds, Size, parse
from ebpfstream.readymade import Options
from ebpfstream.redaction import wanted
from ebpfstream.shaping import named_fields
from ebpfstream.sink import Sink, open_sink
from ebpfstream.sinks.stdout import Format, StdoutSink
from ebpfstream.statistics import INCOMPLETE, ForwardStatistics

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from ebpfstream.cli.live import Screen

    _ParamType = click.ParamType[Any]  # older Clicks have no subscript at run time
else:
    _ParamType = click.ParamType


class Quantity(_ParamType):
    """A number with a unit, such as 4MiB or 10s."""

    def __init__(self, name: str, hint: Any) -> None:
        self.name, self._hint = name, hint

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """The number of bytes, or of seconds."""
        if not isinstance(value, str):  # a default
            return value
        try:
            return parse(value, self._hint)
        except ArgumentError as error:
            self.fail(str(error), parameter, context)


def _with(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command


def every(default: float, help: str) -> Callable[[F], F]:
    """The option of commands that tell something again and again."""
    return click.option(
        "--every",
        type=Quantity("time", Seconds),
        default=default,
        metavar="TIME",
        help=f"{help}  [default: {default:g}s]",
    )


def options(command: F) -> F:
    """What to do with events: the parameters of `forward`."""
    return _with(
        command,
        click.option(
            "--to",
            "addresses",
            multiple=True,
            metavar="ADDRESS",
            help="Where events go, such as stdout:, file:exec.jsonl?rotate=100MB&keep=10 or "
            "kafka://127.0.0.1:9092/exec; may be given several times.  [default: the standard output]",
        ),
        click.option(
            "--format",
            type=click.Choice(["json", "text"]),
            help="JSON lines, or a table.  [default: a table on a terminal, JSON lines elsewhere]",
        ),
        click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after N events."),
        click.option(
            "--duration",
            type=Quantity("time", Seconds),
            metavar="TIME",
            help="End so long after everything is attached: 500ms, 10s, 5m, 1h.",
        ),
        click.option(
            "--where",
            metavar="CONDITION",
            help="Only events for which this is true: Python, in the names of their fields, such as "
            "'uid != 0 and \"-c\" in args'.  Filters of the kernel cost less.",
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
        click.option(
            "--require-complete",
            is_flag=True,
            help=f"End with status 0 if nothing was lost, else with {INCOMPLETE}; ended by a signal, too.",
        ),
    )


def filters(command: F) -> F:
    """What the kernel is to leave out."""
    return _with(
        command,
        click.option("--pid", type=int, help="Only this process."),
        click.option("--ppid", type=int, help="Only children of this process."),
        click.option("--uid", type=int, help="Only this user."),
        click.option("--gid", type=int, help="Only this group."),
        click.option("--comm", help="Only processes of this name."),
        click.option("--cgroup", metavar="PATH", help="Only this cgroup v2 and those below it."),
        click.option("--include-self", is_flag=True, help="Show what this command itself does, too."),
    )


def kernel_options(command: F) -> F:
    """What the kernel is to do: filters, and the buffer."""
    return _with(
        command,
        filters,
        click.option(
            "--buffer-size",
            type=Quantity("size", Size),
            default=SIZE,
            metavar="SIZE",
            help=f"Size of the kernel's buffer in all; powers of two fit best.  [default: {SIZE >> 20}MiB]",
        ),
        click.option(
            "--buffer",
            type=click.Choice(["auto", "ring", "perf"]),
            default="auto",
            show_default=True,
            help="Kind of the kernel's buffer.",
        ),
        click.option(
            "--overload",
            type=click.Choice(["lose", "sample"]),
            default="lose",
            show_default=True,
            help="What becomes of events while the buffer is more than half full.",
        ),
    )


def of_the_kernel(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a tracer takes; the others are left."""
    taken = {name: given.pop(name) for name in Options.__annotations__ if name in given}
    return taken | {"exclude_self": not given.pop("include_self")}


def forward(
    stream: BatchStream[Any] | AbstractAsyncContextManager[BatchStream[Any]],
    *,
    screen: Screen | None = None,
    addresses: tuple[str, ...],
    format: Format | None,
    count: int | None,
    duration: float | None,
    where: str | None,
    fields: str | None,
    redact: bool,
    patterns: tuple[str, ...],
    require_complete: bool,
) -> None:
    """Forward until the end, show the ledgers, and end as was asked for.

    A stream that belongs to something else comes as what opens that.  A `screen` is shown beside the sinks, and
    instead of the standard output.
    """
    made = sinks(addresses, format) if screen is None or addresses else []
    if screen is not None:  # first: the others may take their time to open
        made.insert(0, screen)

    async def run() -> tuple[int, bool | None]:
        # A stream itself is attached last, when its sinks are open.
        async with nullcontext(stream) if isinstance(stream, BatchStream) else stream as events:
            forwarding = Forwarding(
                events,
                *made,
                count=count,
                where=None if where is None else condition(events.event_type, where),
                fields=chosen_fields(fields),
                redact=wanted(redact, patterns),
                deadline=DEADLINE,
            )
            try:
                ended_by = await ship(forwarding, duration, screen)
            finally:
                if forwarding.attached.is_set():
                    _report(forwarding.statistics(), addresses, screen)
            return ended_by, forwarding.statistics().complete

    ended_by, complete = anyio.run(run)
    if require_complete:
        sys.exit(0 if complete else INCOMPLETE)
    _end(ended_by)


def sinks(addresses: tuple[str, ...], format: Format | None) -> list[Sink]:
    """Those of --to, or the standard output."""
    if not addresses:
        return [StdoutSink(format or ("text" if os.isatty(1) else "json"))]
    if format is not None:
        raise ArgumentError("--format is for the standard output alone; with --to write stdout:?format=text")
    return [open_sink(address) for address in addresses]


def chosen_fields(given: str | None) -> dict[str, str] | None:
    """`pid,comm=name` as a mapping."""
    return None if given is None else named_fields(given.split(","))


def _report(statistics: ForwardStatistics, addresses: tuple[str, ...], screen: Screen | None) -> None:
    """The ledgers on standard error; those of sinks if they were named, or did not get everything."""
    shown = [
        sink
        for sink in statistics.sinks[screen is not None :]
        if addresses or sink.acknowledged < sink.accepted
    ]
    for line in str(replace(statistics, sinks=tuple(shown))).splitlines():
        say(line)


class _Ending:
    """What may end a forwarding; `by` is the number of the signal that did, or 0."""

    def __init__(self, forwarding: Forwarding[Any]) -> None:
        self.by = 0
        self._forwarding = forwarding
        self._asked = Asked()
        self._had_terminal = has_terminal()

    async def heed_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP and not (self._had_terminal and not has_terminal()):
                    self._forwarding.reopen()
                else:
                    self._forwarding.end(0 if self._asked.to_end(number) else None)
                    self.by = number

    async def end_in_time(self, seconds: float) -> None:
        await self._forwarding.attached.wait()
        await anyio.sleep(seconds)
        self._forwarding.end()

    async def end_without_reader(self, sink: StdoutSink) -> None:
        await sink.wait_closed()
        self.by = signal.SIGPIPE
        self._forwarding.end(0)


async def ship(
    forwarding: Forwarding[Any], duration: float | None = None, screen: Screen | None = None
) -> int:
    """Forward until the end; the number of the signal that brought it about, or 0."""
    ending = _Ending(forwarding)
    failure: EbpfStreamError | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ending.heed_signals)
        if duration is not None:
            tasks.start_soon(ending.end_in_time, duration)
        if screen is not None:
            tasks.start_soon(screen.run, forwarding)
        for sink in forwarding.sinks:
            if isinstance(sink, StdoutSink):
                tasks.start_soon(ending.end_without_reader, sink)
        try:
            await forwarding.run()
        except SinkClosedError:
            ending.by = signal.SIGPIPE
        except EbpfStreamError as error:
            failure = error  # raised outside of the task group, which would wrap it
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return ending.by


def has_terminal() -> bool:
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
