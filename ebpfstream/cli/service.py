"""`ebpfstream run`, the service; and `config`, for its configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ebpfstream.cli.messages import say
from ebpfstream.errors import ArgumentError

_FILE = click.Path(path_type=Path)


@contextmanager
def _libraries() -> Iterator[None]:
    """Of the extra `service`.  Raises ArgumentError where they are not installed."""
    try:
        yield
    except ImportError as error:
        raise ArgumentError(
            f"this needs libraries that are not there ({error}): pip install 'ebpfstream[service]'"
        ) from error


@click.command(short_help="Run a configuration as a service.")
@click.argument("configuration", type=_FILE, metavar="CONFIG.toml")
def run(configuration: Path) -> None:
    """Run a configuration as a service, until SIGTERM or SIGINT.

    \b
    Example
        ebpfstream config init exec.toml
        ebpfstream run exec.toml

    Attaches everything, gives up its privileges, forwards.  A signal lets it deliver what has happened,
    within its deadline; a second one ends it at once.  SIGHUP opens files anew (logrotate) and applies
    what has changed in the configuration, as far as that can be.  Ends with status 3 if something
    was accepted and has neither arrived nor is in a spool, and with 78 if the configuration is none.
    """  # noqa: D301  # click wants the character
    with _libraries():
        from ebpfstream.service import running
        from ebpfstream.service.config import ConfigError
    try:
        status = running.run(configuration)
    except ConfigError as error:
        say(str(error))
        status = os.EX_CONFIG  # another try would not help: systemd can be told so
    sys.exit(status)


@click.group()
def config() -> None:
    """Make a configuration for `run`, or check one."""


@config.command()
@click.argument("configuration", type=_FILE, metavar="CONFIG.toml")
def check(configuration: Path) -> None:
    """Say what is wrong with a configuration, each problem with its line, or what it does.

    \b
    Example
        ebpfstream config check exec.toml

    Ends with status 1 if something is wrong.
    """  # noqa: D301  # click wants the character
    with _libraries():
        from ebpfstream.service.config import load
    for source in load(configuration).sources:
        click.echo(f"{source.name}: {source.kind} to {', '.join(sink.name for sink in source.sinks)}")


@config.command()
@click.argument("configuration", type=_FILE, metavar="[CONFIG.toml]", required=False)
def init(configuration: Path | None) -> None:
    """Make a configuration to begin with, commented; without a name, or with -, print it.

    \b
    Example
        ebpfstream config init exec.toml

    A file that is there already is left alone.
    """  # noqa: D301  # click wants the character
    with _libraries():
        from ebpfstream.service.config import EXAMPLE
    text = EXAMPLE.read_text()
    if configuration is None or str(configuration) == "-":
        click.echo(text, nl=False)
        return
    try:
        with configuration.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise ArgumentError(f"{configuration} is there already: give another name, or remove it") from None
    except OSError as error:
        raise ArgumentError(
            f"{configuration} cannot be made: {error.strerror}: give a name in a folder that is yours"
        ) from error
