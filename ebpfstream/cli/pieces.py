"""What live views are made of: numbers with units, bars, rows of cells that fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from rich.text import Text

from ebpfstream.text import printable

_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_GAP: Final = "   "


class Column(NamedTuple):
    """One column of a table: its heading, its width in cells, whether it is aligned to the right."""

    heading: str
    width: int
    right: bool = True


def count(number: int, width: int) -> str:
    """A number that takes no more than so many cells (5 or more): 1,234,567 or 1.2M."""
    text = f"{number:,}"
    scaled: float = number
    for unit in "kMGTPE":
        if len(text) <= width:
            break
        scaled /= 1000
        text = f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:,.0f}{unit}"
    return text


def rate(number: float, width: int = 9) -> str:
    """How many in a second: 0, 0.5, 12, 1,234."""
    if not number:
        return "0"
    if number < 0.05:
        return "<0.1"
    return f"{number:.1f}" if number < 9.95 else count(round(number), width)


def size(number: int) -> str:
    """Bytes: 12 KiB, 1.5 MiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    scaled: float = number
    while scaled >= 1023.5 and len(units) > 1:
        scaled /= 1024
        units.pop(0)
    digits = 1 if scaled < 9.95 and scaled != round(scaled) else 0
    return f"{scaled:.{digits}f} {units[0]}"


def percent(part: float) -> str:
    """Of 1: 0%, 0.4%, 12%, 100%; what is more than nothing does not look like it."""
    if 0 < part < 0.0005:
        return "<.1%"
    return f"{100 * part:.1f}%" if 0 < part < 0.0095 else f"{100 * part:.0f}%"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:23; of days: 12 d 3 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 100 * 60:
        return f"{minutes // 1440} d {minutes // 60 % 24} h"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def age(seconds: float) -> str:
    """In not more than 7 cells: 0, <0.1 s, 1.5 s, 42 s, 0:01:23, 14 h, 12 d."""
    if not seconds:
        return "0"
    hours = int(seconds) // 3600
    if hours >= 10:
        return f"{hours} h" if hours < 100 else f"{hours // 24} d"
    if seconds >= 59.5:
        return clock(int(seconds))
    if seconds < 0.05:
        return "<0.1 s"
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"


def bar(part: float, width: int, *, ascii_only: bool = False) -> str:
    """So much of 1 as a bar, with blanks behind it; what is more than nothing is seen."""
    eighths = round(min(max(part, 0), 1) * width * 8)
    if part > 0:
        eighths = max(eighths, 1)
    if ascii_only:
        return ("#" * -(-eighths // 8)).ljust(width)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(width)[:width]


def share(part: float, width: int, *, ascii_only: bool = False, style: str = "cyan") -> Text:
    """So much of 1 as a number and a bar."""
    return Text(f"{percent(part):>4} ").append(bar(part, width - 5, ascii_only=ascii_only), style)


def cell(text: str, width: int, *, right: bool = False, style: str = "") -> Text:
    """Text of exactly that width, safe for any terminal; what is cut ends in an ellipsis."""
    made = Text(printable(text), style, no_wrap=True)
    made.truncate(width, overflow="ellipsis")  # aligning would cut without a sign
    made.align("right" if right else "left", width)
    return made


def row(columns: Sequence[Column], cells: Iterable[str | Text], style: str = "") -> Text:
    """Cells, one for each column, a blank between two."""
    made = [
        one if isinstance(one, Text) else cell(one, column.width, right=column.right)
        for column, one in zip(columns, cells, strict=True)
    ]
    joined = Text(" ").join(made)
    joined.stylize(style)
    return joined


def headings(columns: Sequence[Column]) -> Text:
    """The row of the columns' headings."""
    return row(
        columns, [cell(column.heading, column.width, right=column.right, style="bold") for column in columns]
    )


def width(columns: Iterable[Column]) -> int:
    """Of a row of them."""
    return sum(column.width + 1 for column in columns) - 1


def that_fit(columns: Sequence[Column], room: int) -> list[Column]:
    """The first ones, as many as there is room for; the first one narrower, if need be."""
    chosen: list[Column] = []
    for column in columns:
        if width([*chosen, column]) > room:
            break
        chosen.append(column)
    return chosen or [columns[0]._replace(width=max(room, 0))]


def line(parts: Iterable[Text | str], width: int) -> Text:
    """Parts side by side, as many of the first ones as fit; the first one in any case."""
    made = Text(no_wrap=True)
    for part in parts:
        text = Text(part) if isinstance(part, str) else part
        if made and made.cell_len + len(_GAP) + text.cell_len > width:
            break
        made.append(_GAP if made else "").append_text(text)
    made.truncate(width, overflow="ellipsis")
    return made
