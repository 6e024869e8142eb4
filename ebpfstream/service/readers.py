"""Values of the configuration: what TOML gives, as what is meant; and what is said of those that mean nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Literal, NoReturn, get_args, get_origin

from ebpfstream import options
from ebpfstream.errors import ArgumentError
from ebpfstream.kernel.privileges import entry_of
from ebpfstream.names import did_you_mean, near
from ebpfstream.shaping import named_fields
from ebpfstream.sink_url import option_text

# They are labels of metrics, names of files, and parts of what a reload lists.
_NAME: Final = re.compile(r"\w[\w.@+-]*")


def shown(value: object) -> str:
    """As TOML has it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    return repr(value) if isinstance(value, str) else str(value)


def reads(hint: Any) -> Callable[[Any], Any]:
    """The reader of a Size, of Seconds, of a Literal: text, or a number."""
    choices = get_args(hint) if get_origin(hint) is Literal else ()

    def read(value: Any) -> Any:
        try:
            if not isinstance(value, str | int | float):
                raise ArgumentError
            return options.parse(option_text(value), hint)
        except ArgumentError:
            nearest = did_you_mean(near(value, choices)) if isinstance(value, str) else ""
            raise ArgumentError(f"{shown(value)} is not {options.describe(hint)}{nearest}") from None

    return read


def flag(value: Any) -> bool:
    """True or false, as TOML has them."""
    return value if isinstance(value, bool) else _refuse(value, "true or false")


def whole(value: Any) -> int:
    """A whole number."""
    return (
        value if isinstance(value, int) and not isinstance(value, bool) else _refuse(value, "a whole number")
    )


def text(value: Any) -> str:
    """Text."""
    return value if isinstance(value, str) else _refuse(value, "text")


def listed(value: Any) -> list[Any]:
    """A list."""
    return value if isinstance(value, list) else _refuse(value, f"a list: write [{_written(value)}]")


def table(heading: str) -> Callable[[Any], Any]:
    """The reader of a table."""

    def read(value: Any) -> Any:
        if isinstance(value, list):
            raise ArgumentError(f"there is one such table: write [{heading}]")
        return value if isinstance(value, dict) else _refuse(value, f"a table: write [{heading}]")

    return read


def tables(heading: str, needed: str) -> Callable[[Any], Any]:
    """The reader of one table or more."""

    def read(value: Any) -> Any:
        if isinstance(value, dict):
            raise ArgumentError(f"there may be several such tables: write [[{heading}]]")
        if value == []:
            raise ArgumentError(needed)
        return value if isinstance(value, list) else _refuse(value, f"a list of tables: write [[{heading}]]")

    return read


def _refuse(value: object, what: str) -> NoReturn:
    raise ArgumentError(f"{shown(value)} is not {what}")


def _written(value: object) -> str:
    return "…" if isinstance(value, dict) else shown(value).replace("'", '"')


def name(value: Any) -> str:
    """What the service, a source or a sink is called."""
    if not _NAME.fullmatch(text(value)):
        raise ArgumentError(
            f"{value!r} is no name: give letters, digits, hyphens, underscores and dots, such as execs"
        )
    return str(value)


def user(value: Any) -> str:
    """A user of this machine, by name or number."""
    wanted = str(value) if isinstance(value, int) and not isinstance(value, bool) else text(value)
    try:
        entry_of(wanted)
    except KeyError:
        raise ArgumentError(
            f"there is no user {wanted!r} on this machine: give a name or number as `getent passwd` shows it"
        ) from None
    return wanted


def fields(value: Any) -> dict[str, str]:
    """`["pid", "comm=name"]` or `{pid = "pid", comm = "name"}`."""
    if isinstance(value, dict):
        return {field: text(new) for field, new in value.items()}
    if not isinstance(value, list):
        _refuse(value, f"a list of fields: write [{_written(value)}]")
    return named_fields(map(text, value))
