"""`ebpfstream top`."""

from __future__ import annotations

from typing import Any, Final

import click

from ebpfstream.cli import shipping
from ebpfstream.cli.terminal import is_live
from ebpfstream.errors import ArgumentError
from ebpfstream.sink_url import SinkURL
from ebpfstream.tracers.execve import trace_execve

# Of the options of commands that forward, those that mean nothing beside a screen; and one that means something else.
_MEANINGLESS: Final[dict[str, Any]] = {"format": None, "count": None}
_TO: Final = click.Option(
    ["--to", "addresses"],
    multiple=True,
    metavar="ADDRESS",
    help="Where events go beside the screen, such as file:exec.jsonl?rotate=100MB&keep=10 or "
    "kafka://127.0.0.1:9092/exec; may be given several times.",
)


@click.command(short_help="Watch what is executed: rates, losses, the busiest.")
@shipping.every(1.0, "How often the picture changes.")
@shipping.options
@shipping.kernel_options
def top(every: float, **given: Any) -> None:
    """Watch what is executed: how much, by whom, how much of it was lost, and how full queues are.

    \b
    Examples: this machine; one user, while everything of his is sent on
        ebpfstream top
        ebpfstream top --uid 1000 --to 'file:execs.jsonl?rotate=100MB'

    \b
    Keys
        q  end, as Ctrl-C does; again: without waiting for sinks
        p  hold the picture
        t  order by what there was in all, or by the last interval

    What is lost is red.  Without --to events are shown and go nowhere else.
    """  # noqa: D301  # click wants the character
    if not is_live():
        raise ArgumentError(
            "top needs a terminal to show itself on: for lines that can be sent anywhere there are "
            "`ebpfstream execve` (each exec) and `ebpfstream count` (how many for each user)"
        )
    if [address for address in given["addresses"] if SinkURL.parse(address).scheme == "stdout"]:
        raise ArgumentError(
            "top has the standard output itself: send events elsewhere, such as --to file:PATH"
        )
    try:
        from ebpfstream.cli.dashboard import Top
    except ImportError as error:
        raise ArgumentError("top needs rich: pip install 'ebpfstream[live]'") from error
    stream = trace_execve(on_lost="yield", **shipping.of_the_kernel(given))
    shipping.forward(stream, screen=Top(every=every), **_MEANINGLESS, **given)


top.params = [
    _TO if parameter.name == "addresses" else parameter
    for parameter in top.params
    if parameter.name not in _MEANINGLESS
]
