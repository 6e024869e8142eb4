"""What commands say of themselves: on standard error, in lines that a terminal need not break."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import Final

import click

_INDENT: Final = "    "


def say(text: str) -> None:
    """Write a message, which begins with the command's name; for a person, broken between words."""
    for line in f"ebpfstream: {text}".splitlines():
        if sys.stderr.isatty():
            width = max(os.get_terminal_size(sys.stderr.fileno()).columns, 40)
            line = textwrap.fill(
                line, width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False
            )
        click.echo(line, err=True)
