"""Addresses of sinks: `scheme://host/path?option=value&…`, and the arguments they mean."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from math import isfinite
from typing import Any, Self, get_type_hints
from urllib.parse import parse_qsl, unquote, urlsplit

from ebpfstream import options
from ebpfstream.errors import ArgumentError
from ebpfstream.names import did_you_mean, near


class OptionError(ArgumentError):
    """An option that a sink does not take, or not with this value.

    `option` is its name, `problem` the message without address and name, `is_known` whether there is such an option.
    """

    def __init__(self, message: str, option: str, problem: str, *, is_known: bool) -> None:
        super().__init__(message)
        self.option, self.problem, self.is_known = option, problem, is_known


@dataclass(frozen=True)
class SinkURL:
    """An address taken apart; percent-encoded characters stand for themselves in all parts."""

    text: str
    """The whole of it, as it was given."""
    scheme: str
    host: str
    """What stands between `//` and the next slash: hosts, ports; empty without."""
    path: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ArgumentError for what is no address."""
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise ArgumentError(f"{text!r} is no address: {error}") from None
        if not parts.scheme:
            raise ArgumentError(
                f"{text!r} names no kind of sink: write it as SCHEME:…, for example file:{text}"
            )
        if parts.fragment:
            raise ArgumentError(f"{text!r}: write # as %23")
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        given = dict(pairs)
        if len(given) < len(pairs):
            raise ArgumentError(f"{text!r} gives an option twice")
        return cls(text, parts.scheme, unquote(parts.netloc), unquote(parts.path), given)

    def with_options(self, given: Mapping[str, object]) -> Self:
        """The same address with options beside its own, as text or as values (`option_text`).

        Raises OptionError for a value that is none, and for an option that the address has as well.
        """
        texts = {}
        for name, value in given.items():
            if name in self.options:
                raise self._wrong(
                    name, f"the option {name!r} is given in the address and beside it: leave one out"
                )
            try:
                texts[name] = option_text(value)
            except ArgumentError as error:
                raise self._wrong(name, str(error), f"{name}: ") from None
        return replace(self, options=texts | self.options)

    def _wrong(self, option: str, problem: str, prefix: str = "", *, is_known: bool = True) -> OptionError:
        return OptionError(f"{self.text!r}: {prefix}{problem}", option, problem, is_known=is_known)

    def arguments(self, function: Callable[..., Any], *, without: str = "") -> dict[str, Any]:
        """The options as keyword arguments for a function or a class, each of the type that its annotation says.

        `without` names parameters, separated by spaces, that are no options.  Raises OptionError for what it does
        not take, or not in this form, and says what it does.
        """
        hints = _parameters(function, without.split())
        for name in self.options:
            if name not in hints:
                raise self._wrong(
                    name, f"there is no option {name!r}{_what_there_is(name, hints)}", is_known=False
                )
        made = {}
        for name, text in self.options.items():
            try:
                made[name] = options.parse(text, hints[name])
            except ArgumentError as error:
                raise self._wrong(name, str(error), f"{name}=") from None
        return made


def option_text(value: object) -> str:
    """A value as the text that means it: True → yes, 0.5 → 0.5, None → none; text and paths as they are.

    Raises ArgumentError for what is no option's value: lists, tables, dates.
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and isfinite(value):
        return f"{Decimal(repr(value)):f}"  # units are not taken by 1e-05
    if value is None or isinstance(value, int | float):
        return str(value).lower()
    if isinstance(value, str | os.PathLike):
        return os.fsdecode(value)
    raise ArgumentError(f"{value!r} is no option's value: give text, a number, or true or false")


def _parameters(function: Callable[..., Any], without: list[str]) -> dict[str, Any]:
    """Names and types of what can be given by keyword, `**options: Unpack[…]` included."""
    initializer = getattr(function, "__init__") if isinstance(function, type) else function  # noqa: B009
    hints = get_type_hints(initializer, include_extras=True)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(initializer).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and name in hints:
            (options_type,) = hints[name].__args__
            found |= get_type_hints(options_type, include_extras=True)
        elif parameter.kind is parameter.KEYWORD_ONLY or (
            parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
        ):
            found[name] = hints.get(name, str)
    return {name: hint for name, hint in found.items() if name not in without}


def _what_there_is(name: str, hints: dict[str, Any]) -> str:
    if hint := did_you_mean(map(repr, near(name, hints))):
        return hint
    listed = ", ".join(f"{name} ({options.describe(hint)})" for name, hint in hints.items())
    return f"; there are: {listed}" if listed else "; it takes none"
