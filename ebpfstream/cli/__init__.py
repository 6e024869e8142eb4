"""The command line."""

from __future__ import annotations

import platform
import sys
from typing import Any

import click

from ebpfstream import __version__
from ebpfstream.bench.command import bench
from ebpfstream.cli.counts import count, trace
from ebpfstream.cli.doctor import doctor
from ebpfstream.cli.events import execve, schema, syscalls
from ebpfstream.cli.messages import say
from ebpfstream.cli.program import program
from ebpfstream.cli.service import config, run
from ebpfstream.cli.size import size
from ebpfstream.cli.top import top
from ebpfstream.errors import BccNotFoundError, EbpfStreamError
from ebpfstream.kernel import bcc


class _Commands(click.Group):
    """Shows our errors as messages: they say what to do, and a traceback does not."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except EbpfStreamError as error:
            say(str(error))
            sys.exit(1)


def _show_versions(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    try:
        folder = bcc.find()
        compiler = f"BCC {bcc.version(folder)} in {folder}"
    except BccNotFoundError:
        compiler = "BCC is not installed"
    click.echo(
        f"ebpfstream {__version__}\n"
        f"{platform.system()} {platform.release()} on {platform.machine()}\n"
        f"Python {platform.python_version()}\n{compiler}"
    )
    context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_versions,
    help="Show the versions of this, of the kernel, of Python and of BCC.",
)
def main() -> None:
    """Kernel events as streams.

    \b
    Completion of commands and options, for bash (zsh, fish alike):
        eval "$(_EBPFSTREAM_COMPLETE=bash_source ebpfstream)"
    """  # noqa: D301  # click wants the character


for _command in (execve, syscalls, count, trace, program, top, run, config, doctor, size, schema, bench):
    main.add_command(_command)
