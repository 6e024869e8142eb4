"""Options given as text, by an address or a command line, as the values that parameters take; and choices checked."""

from __future__ import annotations

import re
from fractions import Fraction
from math import inf
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from ebpfstream.errors import ArgumentError

_SIZES: Final[dict[str, int | Fraction]] = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", 1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", 1)},
}
_SECONDS: Final[dict[str, int | Fraction]] = {
    "": 1,
    "MS": Fraction(1, 1000),
    "S": 1,
    "M": 60,
    "H": 3600,
    "D": 86400,
}
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

    def __init__(self, units: dict[str, int | Fraction], example: str) -> None:
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
        except (ValueError, TypeError, ArithmeticError):
            continue
    raise ArgumentError(f"{text!r} is not {describe(hint)}")


def check_choice(name: str, value: object, hint: Any) -> None:
    """Raise ArgumentError for a parameter that is none of the values of its Literal."""
    choices = get_args(hint)
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name}={value!r} is unknown: give {', '.join(others)} or {last}")


def describe(hint: Any) -> str:
    """What may be given for a parameter of that type."""
    return " or ".join(dict.fromkeys(_description(kind) for kind in _kinds(hint)))


def _kinds(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        # Text last: it takes everything.
        return sorted(
            (kind for part in get_args(hint) for kind in _kinds(part)), key=lambda kind: kind in (str, Path)
        )
    if get_origin(hint) is Annotated and _unit(hint) is None:
        return _kinds(hint.__origin__)
    return [hint]


def _unit(hint: Any) -> Unit | None:
    return next((extra for extra in hint.__metadata__ if isinstance(extra, Unit)), None)


def _value(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        found = [choice for choice in get_args(kind) if str(choice) == text]
        return found[0] if found else _refuse(text)
    if get_origin(kind) is Annotated:
        return _quantity(text, kind)
    if get_origin(kind) is not None:  # a list[str] would be made of the text's characters
        _refuse(text)
    if kind is bool:
        return _FLAGS[text.lower()] if text.lower() in _FLAGS else _refuse(text)
    if kind is NoneType:
        return None if text.lower() == "none" else _refuse(text)
    if kind in (int, float):
        return _number(text, kind)
    return kind(text)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _number(text: str, kind: type[int | float]) -> int | float:
    """Written as people write numbers: Python takes more, such as 1_000, nan, and the digits of all scripts."""
    number = kind(text)
    if not re.fullmatch(r"[-+.0-9eE]+", text) or number in (inf, -inf):
        _refuse(text)
    return number


def _quantity(text: str, kind: Any) -> int | float:
    """A number with a unit, exactly; of what cannot be divided, the whole ones."""
    found, unit = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text), _unit(kind)
    if found is None or unit is None or found[2].upper() not in unit.units:
        raise ValueError(text)
    number, times = Fraction(found[1]), unit.units[found[2].upper()]
    if kind.__origin__ is int and times == 1 and number.denominator > 1:
        _refuse(text)
    made: int | float = kind.__origin__(number * times)
    return made


def _description(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated and (unit := _unit(kind)):
        return unit.example
    names: dict[Any, str] = {
        bool: "yes or no",
        int: "a whole number",
        float: "a number",
        NoneType: "none",
        str: "text",
        Path: "text",
    }
    return names.get(kind) or str(getattr(kind, "__name__", kind))
