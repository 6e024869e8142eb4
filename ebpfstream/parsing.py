"""Events read back, on any machine, from the JSON lines that batches become.

As in `codec`, each type gets a function of its own, written as text and compiled once.
"""

from __future__ import annotations

import builtins
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Final, NamedTuple, Union, get_args, get_origin, get_type_hints

import orjson

from ebpfstream import text
from ebpfstream.errors import DecodeError, EventTypeError
from ebpfstream.events import Array, E, Event, Integer, Kind, layout, must_be_called, schema_version
from ebpfstream.lost import Lost

_shown: Final = Repr()
_shown.maxstring = _shown.maxother = 80


def parser(event_type: type[E]) -> Callable[[bytes], E | Lost]:
    """What makes events, and losses, of the lines that `EventBatch.to_json_lines` wrote, one line at a time.

    An event equals the one that iterating the batch gives, but for what JSON does not tell: infinite floats come
    back as NaN, and of a field that may be one thing or another (`bytes | str`) the first one counts that fits.
    What the type does not have is passed over, since within one schema version fields are only added.

    The function raises DecodeError, which names the field, for a line that is neither such an event nor a loss.
    This raises EventTypeError for a type with a field whose values cannot be made of JSON.
    """
    name = event_type.__name__
    version = schema_version(event_type)
    compiler = _Compiler(name if version is None else f"{name} of schema version {version}")
    event = compiler.event(name, event_type).make
    fields = {field: compiler.value(f"Lost.{field}", of) for field, of in get_type_hints(Lost).items()}
    loss = compiler.object("Lost", Lost, fields).make

    def parse(line: bytes) -> Any:
        try:
            data = orjson.loads(line)
        except ValueError as error:
            raise DecodeError(
                f"{_shown.repr(line)} is no JSON ({error}): give a whole line, as EventBatch.to_json_lines() has them"
            ) from None
        try:
            return event(data)
        except DecodeError:
            if type(data) is dict and len(data) == 1 and type(data.get("lost")) is dict:
                return loss(data["lost"])
            try:
                exact = json.loads(line)  # orjson makes floats of integers beyond 64 bits
            except (ValueError, RecursionError):
                exact = data
        return event(exact)

    return parse


class _Value(NamedTuple):
    """How a value is made of what JSON has for it."""

    expected: str
    make: Callable[[Any], Any]
    """Raises TypeError or ValueError; where a part can be named, DecodeError."""
    test: str = "False"
    """An expression: whether {0} is the value already.  Written out, it is several times faster than a call."""


class _Compiler:
    """Makes the functions for the lines of one type, which errors call `reader`."""

    def __init__(self, reader: str) -> None:
        self._reader = reader

    def event(self, path: str, event_type: type[Event]) -> _Value:
        """An event that stands at `path`.  Raises EventTypeError."""
        plan = layout(event_type)
        fields = {
            name: self._field(f"{path}.{name}", kind, plan.types[name]) for name, kind in plan.kinds.items()
        }
        return self.object(path, event_type, fields)

    def object(self, path: str, of: type[Any], fields: Mapping[str, _Value]) -> _Value:
        """An object of a class with these fields."""
        checks = [
            f"    if not ({value.test.format(f'v_{name}')}): v_{name} = make_{name}(v_{name})"
            for name, value in fields.items()
        ]
        if must_be_called(of):
            makes = [f"    return Made({', '.join(f'{name}=v_{name}' for name in fields)})"]
        else:
            sets = [f"    made.{name} = v_{name}" for name in fields]
            makes = ["    made = new(Made)", *sets, "    return made"]
        lines = [
            "def make(data):",
            "    if type(data) is not dict:",
            "        raise unfit(data)",
            "    try:",
            *(f"        v_{name} = data[{name!r}]" for name in fields),
            "    except KeyError as error:",
            "        raise missing(*error.args) from None",
            *checks,
            *makes,
        ]
        expected = "an object"
        names: dict[str, Any] = {
            "Made": of,
            "new": object.__new__,
            "unfit": lambda data: self._unfit(path, data, expected),
            "missing": lambda name: self._missing(f"{path}.{name}"),
        }
        names |= {f"make_{name}": self._at(f"{path}.{name}", value) for name, value in fields.items()}
        exec(compile("\n".join(lines), f"<parser of {path}>", "exec"), names)  # noqa: S102  # our own text
        return _Value(expected, names["make"])

    def value(self, path: str, of: Any) -> _Value:
        """What is declared so.  Raises EventTypeError."""
        parts = get_args(of)
        match get_origin(of), parts:
            case builtins.tuple, [item, builtins.Ellipsis]:
                return _array(self.value(path, item))
            case builtins.tuple, _:
                return _tuple([self.value(path, part) for part in parts])
        if get_origin(of) in (Union, UnionType):
            return _union([self.value(path, part) for part in parts])
        if get_origin(of) is Annotated:
            return self.value(path, parts[0])
        if inspect.isclass(of) and issubclass(of, Event):
            return self.event(path, of)
        if of not in _SIMPLE:
            raise EventTypeError(
                f"{path} cannot be read back from JSON, which does not tell what a {getattr(of, '__name__', of)} is "
                "made of: declare str, int, float, bool, bytes, datetime, an event class, or tuple[…] of such"
            )
        return _SIMPLE[of]

    def _field(self, path: str, kind: Kind, of: Any) -> _Value:
        if isinstance(kind, Integer) and of is not bool:
            return _integer(kind)
        if isinstance(kind, Array):
            return _array(_integer(kind.item), kind.count)
        return self.value(path, of)

    def _at(self, path: str, value: _Value) -> Callable[[Any], Any]:
        """What makes the value, with errors that tell where."""

        def make(data: Any) -> Any:
            try:
                return value.make(data)
            except (TypeError, ValueError):
                raise self._unfit(path, data, value.expected) from None

        return make

    def _unfit(self, path: str, data: Any, expected: str) -> DecodeError:
        return DecodeError(
            f"{path} cannot be {_shown.repr(data)}: {expected} is expected; the line is not one of {self._reader}, "
            "read it with the class that it was written from"
        )

    def _missing(self, path: str) -> DecodeError:
        return DecodeError(
            f"the line has no {path}: it is not one of {self._reader}, read it with the class that it was written "
            "from; or only some of the fields were written"
        )


def _same(expected: str, of: type[Any], test: str, limits: range | None = None) -> _Value:
    """What is in Python as it is in JSON."""

    def make(data: Any) -> Any:
        if type(data) is not of or (limits is not None and data not in limits):
            raise TypeError
        return data

    return _Value(expected, make, test)


def _integer(kind: Integer) -> _Value:
    least, most = kind.limits[0], kind.limits[-1]
    test = f"type({{0}}) is int and {least} <= {{0}} <= {most}"
    return _same(f"an integer from {least} to {most}", int, test, kind.limits)


def _float(data: Any) -> float:
    if data is None:
        return float("nan")  # so it is written
    if type(data) not in (int, float):
        raise TypeError
    return float(data)


def _bytes(data: Any) -> bytes:
    if type(data) is not str:
        raise TypeError
    return text.encode(data)


def _time(data: Any) -> datetime:
    made = datetime.fromisoformat(data)
    if made.tzinfo is None:
        raise ValueError
    return made


_SIMPLE: Final[Mapping[Any, _Value]] = {
    bool: _same("true or false", bool, "type({0}) is bool"),
    int: _same("an integer", int, "type({0}) is int"),
    str: _same("a string", str, "type({0}) is str"),
    NoneType: _same("null", NoneType, "{0} is None"),
    float: _Value("a number, or null", _float, "type({0}) is float"),
    bytes: _Value("a string", _bytes),
    datetime: _Value("a time such as 2026-07-01T12:00:00.000000Z", _time),
}


def _array(item: _Value, count: int | None = None) -> _Value:
    def make(data: Any) -> Any:
        if type(data) is not list or (count is not None and len(data) != count):
            raise TypeError
        return tuple([item.make(one) for one in data])

    number = "" if count is None else f" of {count}"
    return _Value(f"an array{number}, each {item.expected},", make)


def _tuple(items: Sequence[_Value]) -> _Value:
    def make(data: Any) -> Any:
        if type(data) is not list:
            raise TypeError
        return tuple([item.make(one) for item, one in zip(items, data, strict=True)])

    return _Value(f"an array of {len(items)} ({', '.join(item.expected for item in items)})", make)


def _union(parts: Sequence[_Value]) -> _Value:
    ordered = sorted(parts, key=lambda part: part.expected != "null")  # null would be NaN, too

    def make(data: Any) -> Any:
        for part in ordered:
            try:
                return part.make(data)
            except (TypeError, ValueError, DecodeError):
                continue
        raise TypeError

    tests = [part.test for part in parts]
    test = "False" if "False" in tests else " or ".join(f"({test})" for test in tests)
    return _Value(" or ".join(part.expected for part in parts), make, test)
