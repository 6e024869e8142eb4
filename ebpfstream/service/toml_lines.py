"""In which line of a TOML file a key stands: tomllib does not tell."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final

from ebpfstream.errors import ArgumentError

Key = tuple[str | int, ...]
"""Names of tables and keys from the top, and numbers of what is in lists: ("source", 0, "buffer_size")."""

_LONGEST: Final = 500  # lines of one statement; each is parsed anew with the next line
_PLACE: Final = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def dotted(key: Key) -> str:
    """As people write it: `source[0].buffer_size`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_bare(part)}" for part in key)
    return "".join(parts).removeprefix(".")


def _bare(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name) else repr(name)


class TomlError(ArgumentError):
    """Text that is no TOML; `line` is where."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def loads(text: str) -> dict[str, Any]:
    """What `tomllib.loads` makes of it.  Raises TomlError."""
    try:
        return tomllib.loads(text + "\n")
    except (ValueError, RecursionError) as error:  # also for a number that is too long
        place = _PLACE.search(str(error))
        said = f"this is no TOML: {_PLACE.sub('', str(error))}"
        if place and place[1]:
            raise TomlError(f"{said} (column {place[2]})", int(place[1])) from None
        *_, (line, _) = _statements(text)  # the one that does not end
        raise TomlError(f"{said} (it begins in this line)", line) from None


class Lines:
    """The lines, from 1, of all keys and tables of a text that is TOML.

    A key stands where its statement begins, and a table in the line of its heading.
    """

    def __init__(self, text: str) -> None:
        self._lines: dict[Key, int] = {(): 1}
        self._counts: dict[Key, int] = {}
        """How many tables each array of tables has so far."""
        table: Key = ()
        for line, statement in _statements(text):
            try:
                made = tomllib.loads(statement)
            except ValueError:
                continue  # it was too long
            if statement.lstrip().startswith("["):
                table = self._heading(made, line)
            else:
                self._note(made, table, line)

    def of(self, key: Key) -> int:
        """Where it stands; of one that does not, the table in which it would."""
        while key not in self._lines:
            key = key[:-1]
        return self._lines[key]

    def _heading(self, made: Any, line: int) -> Key:
        """The table that `[a.b]` or `[[a.b]]` begins: alone, such a line is tables within one another."""
        key: Key = ()
        while made:
            ((name, made),) = made.items()
            key = (*key, name)
            if isinstance(made, list):
                (made,) = made
                self._counts[key] = self._counts.get(key, 0) + 1
            self._lines.setdefault(key, line)
            if key in self._counts:  # the last of its tables
                key = (*key, self._counts[key] - 1)
                self._lines.setdefault(key, line)
        return key

    def _note(self, value: Any, key: Key, line: int) -> None:
        self._lines.setdefault(key, line)
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            self._lines.setdefault((*key, name), line)
            if isinstance(part, dict | list):
                self._note(part, (*key, name), line)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each statement with its first line: as many lines as it takes for it to be TOML by itself; no part of one is.

    The last one may be none.
    """
    start, statement = 1, ""
    for number, line in enumerate(text.split("\n"), 1):
        if not statement:
            start = number
        statement += line + "\n"
        try:
            tomllib.loads(statement)
        except (ValueError, RecursionError):
            if number - start < _LONGEST:
                continue
            break
        yield start, statement
        statement = ""
    if statement:
        yield start, statement
