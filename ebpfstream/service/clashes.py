"""What two places of a configuration cannot both have: names, files, folders, the standard output."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ebpfstream.errors import ArgumentError
from ebpfstream.service.problems import Problem
from ebpfstream.service.toml_lines import Key, Lines, dotted
from ebpfstream.sink_url import SinkURL


def clashes(data: Any, lines: Lines) -> Iterator[Problem]:
    """All of them in what a file holds, whatever else is wrong with it."""
    owners: dict[tuple[Any, ...], Key] = {}
    for key, thing, text in _claims(data):
        owner = owners.setdefault(thing, key)
        if owner != key:
            place = dotted(owner).removesuffix(".name")
            yield Problem(key, text.format(f"{place} (line {lines.of(owner)})"))


def _claims(data: Any) -> Iterator[tuple[Key, tuple[Any, ...], str]]:
    """Who has what, and what is said if somebody has it already."""
    for number, source in _tables(data, "source"):
        here: Key = ("source", number)
        name = source.get("name", source.get("kind"))
        if isinstance(name, str):
            yield (
                (*here, "name"),
                ("source", name),
                f"{_quoted(name)} is the name of {{}} as well: give each source a name of its own",
            )
        for place, sink in _tables(source, "sink"):
            yield from _claims_of_sink((*here, "sink", place), number, sink)


def _claims_of_sink(
    here: Key, source: int, sink: dict[str, Any]
) -> Iterator[tuple[Key, tuple[Any, ...], str]]:
    try:
        url = SinkURL.parse(sink["address"])
    except (KeyError, TypeError, AttributeError, ArgumentError):
        return  # that is said already
    name = sink.get("name", url.scheme)
    if isinstance(name, str):
        yield (
            (*here, "name"),
            ("sink", source, name),
            f"{_quoted(name)} is the name of {{}} as well: give each sink of a source a name of its own",
        )
    if url.scheme == "stdout":
        yield (
            (*here, "address"),
            ("stdout",),
            "{} is the standard output as well: let one sink alone write to it",
        )
    if url.scheme == "file":
        yield _path((*here, "address"), "file", url.path)
    for option, what in (("dead_letters", "file"), ("spool", "folder")):
        given = url.options.get(option, sink.get(option))
        if isinstance(given, str):
            yield _path((*here, "address" if option in url.options else option), what, given)


def _path(key: Key, what: str, path: str) -> tuple[Key, tuple[Any, ...], str]:
    real = os.path.realpath(path) if "\0" not in path else path
    return (
        key,
        (what, real),
        f"the {what} {_quoted(path)} is that of {{}} as well: give each sink one of its own",
    )


def _tables(data: Any, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    found = data.get(key)
    for number, table in enumerate(found if isinstance(found, list) else []):
        if isinstance(table, dict):
            yield number, table


def _quoted(text: str) -> str:
    return repr(text).replace("{", "{{").replace("}", "}}")
