"""Options given as text, by an address or a command line, as the values that parameters take."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from ebpfstream.errors import ArgumentError

_SIZES: Final = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", 1)},
}
_SECONDS: Final = {"": 1, "MS": 0.001, "S": 1, "M": 60, "H": 3600, "D": 86400}
_FLAGS: Final = {
    "yes": True,
    "true": True,
    "on": True,
    "1": True,
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}


class Unit:
    """Marks a number that may be given with a unit."""

    def __init__(self, units: dict[str, float], example: str) -> None:
        self.units, self.example = units, example


Size = Annotated[int, Unit(_SIZES, "a number of bytes such as 64KiB or 100MB")]
"""Bytes."""
Seconds = Annotated[float, Unit(_SECONDS, "a time such as 500ms, 10s, 5m, 1h or 1d")]
"""Seconds."""


def parse(text: str, hint: Any) -> Any:
    """The value that a text means, of that type: Size, Seconds, int, float, str, bool, Path, a Literal, a union.

    Raises ArgumentError, which says what would do.
    """
    for kind in _kinds(hint):
        try:
            return _value(text, kind)
        except ValueError:
            continue
    raise ArgumentError(f"{text!r} is not {describe(hint)}")


def describe(hint: Any) -> str:
    """What may be given for a parameter of that type."""
    return " or ".join(dict.fromkeys(_description(kind) for kind in _kinds(hint)))


def _kinds(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        # Text last: it takes everything.
        return sorted(
            (kind for part in get_args(hint) for kind in _kinds(part)), key=lambda kind: kind in (str, Path)
        )
    return [hint]


def _value(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if choice == text), None) or _refuse(text)
    if get_origin(kind) is Annotated:
        number, unit = get_args(kind)
        return number(_quantity(text, unit.units))
    if kind is bool:
        return _FLAGS[text.lower()] if text.lower() in _FLAGS else _refuse(text)
    if kind is NoneType:
        return None if text.lower() == "none" else _refuse(text)
    return kind(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _quantity(text: str, units: dict[str, float]) -> float:
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in units:
        raise ValueError(text)
    return float(found[1]) * units[found[2].upper()]


def _description(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].example)
    names = {bool: "yes or no", int: "a whole number", float: "a number", NoneType: "none"}
    return names.get(kind, "text")
