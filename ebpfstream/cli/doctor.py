"""`ebpfstream doctor`."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from dataclasses import asdict
from typing import Final

import anyio
import click
import orjson

from ebpfstream import __version__
from ebpfstream.doctor import Finding, State, examine
from ebpfstream.sink import open_sink

_COLOURS: Final[dict[State, str]] = {"ok": "green", "missing": "red", "unknown": "yellow"}
_INDENT: Final = 26  # of what was found: behind the state, and the name


@click.command(short_help="Try whether this machine has what is needed.")
@click.option(
    "--to",
    "addresses",
    multiple=True,
    metavar="ADDRESS",
    help="Where a test event has to arrive, as for execve; may be given several times.  [default: in this command]",
)
@click.option("--json", "as_json", is_flag=True, help="All that was found, for machines.")
def doctor(addresses: tuple[str, ...], as_json: bool) -> None:
    """Try whether this machine has what is needed, and say what to do where it has not.

    \b
    Examples: the machine alone; whether events arrive at a Kafka
        ebpfstream doctor
        ebpfstream doctor --to kafka://127.0.0.1:9092/exec

    Everything is tried, not asked for: a map is made, a program compiled and attached, at last a program
    is executed that has to arrive.  Nothing of it stays.  Ends with status 1 if something is missing
    without which nothing works.
    """  # noqa: D301  # click wants the character
    findings = anyio.run(_examine, addresses, not as_json)
    well = all(finding.state != "missing" for finding in findings if finding.needed)
    if as_json:
        told = {"version": __version__, "ok": well, "findings": [asdict(finding) for finding in findings]}
        click.echo(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    sys.exit(0 if well else 1)


async def _examine(addresses: tuple[str, ...], show: bool) -> list[Finding]:
    findings = []
    async for finding in examine(*map(open_sink, addresses)):
        findings.append(finding)
        if show:
            _show(finding)
    return findings


def _show(finding: Finding) -> None:
    state = finding.state if finding.needed or finding.state != "missing" else "none"
    coloured = click.style(f"{state:<8}", fg=_COLOURS[finding.state] if state != "none" else "yellow")
    lines = _lines(finding.found) + _lines(finding.remedy, "→ ")
    if os.environ.get("NO_COLOR"):
        coloured = click.unstyle(coloured)
    click.echo(f"{coloured} {finding.name:<{_INDENT - 10}} {lines[0]}")
    for line in lines[1:]:
        click.echo(" " * _INDENT + line)


def _lines(text: str, mark: str = "") -> list[str]:
    """In lines that fit beside the name."""
    width = max(shutil.get_terminal_size().columns - _INDENT, 30)
    return textwrap.wrap(text, width, initial_indent=mark, subsequent_indent=" " * len(mark))
