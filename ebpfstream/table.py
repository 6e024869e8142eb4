"""Events as a table for people: aligned, coloured on request, safe for any terminal."""

from __future__ import annotations

from dataclasses import fields
from datetime import datetime
from typing import Any, Final

from ebpfstream.batch import EventBatch
from ebpfstream.lost import Lost
from ebpfstream.text import printable

# Field, width, SGR colour; numbers are aligned to the right.  The rest of the line is the last one's.
_COLUMNS: Final = (
    ("time", 12, "2"),
    ("pid", 7, "36"),
    ("ppid", 7, "2"),
    ("uid", 6, "33"),
    ("comm", 15, "32"),
    ("message", 0, ""),
)


class Table:
    """Turns batches into lines; the first lines begin with a heading.

    Shows those of the usual columns that the event type has (time of day, pid, ppid, uid, comm,
    message, after a failure with its error), or all its fields if it has none of them.
    """

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour
        self._columns: list[tuple[str, int, str]] = []

    def lines(self, batch: EventBatch[Any]) -> bytes:
        """The batch as UTF-8 lines.  Raises DecodeError."""
        lines = []
        if not self._columns:
            names = [field.name for field in fields(batch.event_type)]
            self._columns = [column for column in _COLUMNS if column[0] in names]
            self._columns = self._columns or [(name, len(name), "") for name in names]
            lines.append(self._line([name.upper() for name, _, _ in self._columns], "1"))
        lines += [
            self._lost(event) if isinstance(event, Lost) else self._line(self._values(event))
            for event in batch
        ]
        return "".join(lines).encode()

    def _values(self, event: Any) -> list[Any]:
        values = [getattr(event, name) for name, _, _ in self._columns]
        if error := getattr(event, "error", ""):
            values[-1] = f"({error}) {values[-1]}"
        return values

    def _lost(self, lost: Lost) -> str:
        count = "an unknown number of" if lost.count is None else lost.count
        line = f"-- {count} events lost {'in the queue' if lost.cpu is None else f'on CPU {lost.cpu}'} --"
        return f"\x1b[31m{line}\x1b[0m\n" if self._colour else f"{line}\n"

    def _line(self, values: list[Any], heading: str = "") -> str:
        cells = []
        for (name, width, colour), value in zip(self._columns, values, strict=True):
            right = isinstance(value, int) or (bool(heading) and name in ("pid", "ppid", "uid"))
            cell = _cell(value).rjust(width) if right else _cell(value).ljust(width)
            colour = heading or colour
            cells.append(f"\x1b[{colour}m{cell}\x1b[0m" if self._colour and colour else cell)
        return " ".join(cells).rstrip() + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value.astimezone():%H:%M:%S.%f}"[:-3]
    return printable(value if isinstance(value, str) else str(value))
