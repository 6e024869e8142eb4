"""`ebpfstream execve` and `syscalls`; `schema`, of what these, `count` and `trace` write."""

from __future__ import annotations

from typing import Any, Final

import click
import orjson

from ebpfstream.catalogue import EVENT_TYPES
from ebpfstream.cli import shipping
from ebpfstream.schema import json_schema
from ebpfstream.trace_lines import TraceEvent
from ebpfstream.tracers.count_execve import ExecCount
from ebpfstream.tracers.execve import trace_execve
from ebpfstream.tracers.syscalls import trace_syscalls

_EVENT_TYPES: Final[dict[str, type[Any]]] = {**EVENT_TYPES, "count": ExecCount, "trace": TraceEvent}


@click.command(short_help="Show every program that is executed, or send it elsewhere.")
@shipping.options
@shipping.kernel_options
@click.option("--failed", is_flag=True, help="Show execs that fail as well; see the README for the cost.")
def execve(failed: bool, **given: Any) -> None:
    """Show every program that this machine executes, or send it elsewhere.

    \b
    Examples: the next ten, into a file; all, into files of 100 MB and shown
        ebpfstream execve --count 10 --format json > execs.jsonl
        ebpfstream execve --to 'file:x.jsonl?rotate=100MB' --to stdout:

    Ends with Ctrl-C, SIGTERM, or when nobody reads its output any more; what has happened until then
    is written, and the last lines on standard error say how many events there were and how many
    were lost.  SIGHUP lets files be opened anew (logrotate).
    """  # noqa: D301  # click wants the character
    shipping.forward(trace_execve(failed=failed, on_lost="yield", **shipping.of_the_kernel(given)), **given)


@click.command()
@click.argument("calls", nargs=-1, metavar="[CALL]…")
@shipping.options
@shipping.kernel_options
@click.option("--ignore", multiple=True, metavar="CALL", help="All calls but this one; may be repeated.")
@click.option(
    "--result", is_flag=True, help="Tell of each call when it has returned: its result, its duration."
)
def syscalls(calls: tuple[str, ...], ignore: tuple[str, ...], result: bool, **given: Any) -> None:
    """Show system calls, those named or all, or send them elsewhere.

    \b
    Examples: which files are opened, with what result; what one process calls
        ebpfstream syscalls openat openat2 --result
        ebpfstream syscalls --pid 1 --ignore epoll_wait --duration 10s

    A call is a name (openat) or a number.  All of them on a whole machine are many: choose a process, or
    a few calls.  Every call of every process pays for it while this runs, some 50 ns; one that is shown
    about half a microsecond more, with --result twice that.  Ends as `execve` does.
    """  # noqa: D301  # click wants the character
    stream = trace_syscalls(
        *map(_number_or_name, calls),
        ignore=[_number_or_name(call) for call in ignore],
        result=result,
        on_lost="yield",
        **shipping.of_the_kernel(given),
    )
    shipping.forward(stream, **given)


def _number_or_name(call: str) -> str | int:
    return int(call) if call.isdecimal() else call


@click.command()
@click.argument("kind", type=click.Choice(list(_EVENT_TYPES)))
@click.option("--fields", metavar="NAME[=NEW],…", help="As for the command whose lines it describes.")
def schema(kind: str, fields: str | None) -> None:
    """Print the JSON Schema of the lines that a command writes.

    \b
    Example
        ebpfstream schema execve > execve.schema.json
    """  # noqa: D301  # click wants the character
    made = json_schema(_EVENT_TYPES[kind], shipping.chosen_fields(fields))
    click.echo(orjson.dumps(made, option=orjson.OPT_INDENT_2))
