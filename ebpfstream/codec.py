"""Decoders and encoders, generated for each event type.

A loop over fields costs more than the fields, so each type gets two functions of its own, written
as text and compiled once: records → events, and records → JSON lines without events in between, for all
fields or those chosen.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Final, NamedTuple

from ebpfstream import text
from ebpfstream.errors import ArgumentError, DecodeError
from ebpfstream.events import (
    LENGTH_SUFFIX,
    Array,
    Char,
    Computed,
    Embedded,
    Integer,
    Layout,
    Tail,
    WallClock,
    layout,
    must_be_called,
)
from ebpfstream.names import did_you_mean, near
from ebpfstream.records import Records
from ebpfstream.unpacking import RecordStructs, struct_format
from ebpfstream.values import (
    JsonTexts,
    Texts,
    UntilSeconds,
    json_command_line,
    json_strings,
    json_text,
    json_value,
    moment,
    strings,
)

# Events of one list: few enough to die before the garbage collector looks for them (its first
# threshold is 700 in Python 3.11) and while they are in the cache.
_CHUNK: Final = 128
_LINES: Final = 64  # JSON lines that are formatted in one go


class Codec(NamedTuple):
    """The generated functions of one event type, and their text."""

    decode: Callable[[Records, int], Iterator[Any]]
    encode: Callable[[Records, int], bytes]
    source: str


def codec(event_type: type[Any]) -> Codec:
    """The codec of an event type.  Raises EventTypeError."""
    found: Codec | None = vars(event_type).get("__codec__")
    if found is None:
        # With the class, and not in a dictionary: a program's event types come and go with it.
        event_type.__codec__ = found = _generate(event_type)
    return found


def encoder(event_type: type[Any], fields: Mapping[str, str]) -> Callable[[Records, int], bytes]:
    """What makes JSON lines of these fields alone, as `selection` returned them."""
    made: dict[tuple[tuple[str, str], ...], Codec] = vars(event_type).get("__encoders__", {})
    key = tuple(fields.items())
    if key not in made:
        event_type.__encoders__ = made = made | {key: _generate(event_type, fields)}
    return made[key].encode


def selection(event_type: type[Any], fields: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """JSON's names by the fields' own, in this order.  Raises ArgumentError for what the type does not have."""
    if isinstance(fields, str):
        fields = [fields]
    chosen = dict(fields) if isinstance(fields, Mapping) else {name: name for name in fields}
    kinds = layout(event_type).kinds
    for name, shown in chosen.items():
        if name not in kinds:
            hint = did_you_mean(map(repr, near(str(name), kinds))) or f"; there are {', '.join(kinds)}"
            raise ArgumentError(f"{event_type.__name__} has no field {name!r}{hint}")
        if not (isinstance(shown, str) and shown.isprintable()) or (shown == "lost" != name):
            raise ArgumentError(
                f"a field in JSON cannot be called {shown!r}: give printable text, and not 'lost', which losses are"
            )
    if not chosen or len(set(chosen.values())) < len(fields):
        raise ArgumentError(
            f"fields={fields!r} is impossible: give one or more fields, each with a name of its own"
        )
    return chosen


def _generate(event_type: type[Any], fields: Mapping[str, str] | None = None) -> Codec:
    plan = layout(event_type)
    writer = _Writer(plan, fields, calls=must_be_called(event_type))
    source = "\n".join([*writer.decoder(), *writer.encoder(), ""])
    names: dict[str, Any] = {
        "Event": event_type,
        "SIZE": plan.size,
        "SHORTEST": shortest(event_type, plan),
        "lengthened": partial(_lengthened, plan.size),
        "CHUNK": _CHUNK,
        "LINES": _LINES,
        "new": object.__new__,
        "unpack_from": struct.Struct("<" + struct_format(plan)).unpack_from,
        "structs": RecordStructs(plan),
        "misfit": partial(misfit, event_type, plan),
        "overrun": partial(_overrun, event_type, plan),
        "decode_text": text.decode,
        "texts": Texts(),
        "json_texts": JsonTexts(),
        "json_text": json_text,
        "json_strings": json_strings,
        "json_command_line": json_command_line,
        "json_value": json_value,
        "strings": strings,
        "moment": moment,
        "until_seconds": UntilSeconds(),
        "true_false": (b"false", *[b"true"] * 255),  # by a byte
    }
    for name, kind in plan.kinds.items():
        if isinstance(kind, Computed | Tail):
            names[_function_of(name)] = kind.function
        elif isinstance(kind, Array | Embedded):
            names[_function_of(name)] = kind.unpack
    exec(compile(source, f"<codec of {event_type.__name__}>", "exec"), names)  # noqa: S102  # our own text
    return Codec(names["decode"], names["encode"], source)


def shortest(event_type: type[Any], plan: Layout) -> int:
    """The bytes that a record has at least: programs of others may submit a char array at the end as far as filled."""
    last = plan.members[-1]
    text_at_the_end = isinstance(last.kind, Char) and plan.types.get(last.name) is str
    return last.offset if event_type.__layout__ is not None and text_at_the_end else plan.size


def _lengthened(length: int, records: Records, position: int, stride: int, size: int, count: int) -> Records:
    """Records that end within their last array, with zeros up to its end."""
    prefix = records.prefix
    samples = (
        records.data[start + prefix : start + prefix + size].ljust(length, b"\0")
        for start in range(position, position + stride * count, stride)
    )
    data = b"".join(bytes(prefix) + sample for sample in samples)
    return Records(data, prefix, [(0, prefix + length, length, count)])


class _Writer:
    """Writes the functions of one event type."""

    def __init__(self, plan: Layout, fields: Mapping[str, str] | None, *, calls: bool) -> None:
        self._kinds = plan.kinds
        self._fields = {name: name for name in plan.kinds} if fields is None else fields  # of JSON
        self._types = plan.types
        self._calls = calls
        self._members = [member.name for member in plan.members]
        self._names = ", ".join(map(_local, self._members)) + ","
        self._tails = [name for name, kind in plan.kinds.items() if isinstance(kind, Tail)]

    def decoder(self) -> list[str]:
        """records, offset of the wall clock → lists of events."""
        return self._tailed_decoder() if self._tails else self._fixed_decoder()

    def _fixed_decoder(self) -> list[str]:
        return [
            "def decode(records, offset):",
            "    data = memoryview(records.data)",
            "    for position, stride, size, count in records.runs:",
            "        if SHORTEST <= size < SIZE:",
            "            yield from decode(lengthened(records, position, stride, size, count), offset)",
            "            continue",
            "        if not SIZE <= size <= SIZE + records.padding:",
            "            for _ in range(count):",
            "                yield misfit(size)",
            "            continue",
            "        iter_unpack = structs[records.prefix, stride, 1].iter_unpack",
            "        end = position + stride * count",
            "        for start in range(position, end, stride * CHUNK):",
            "            part = data[start : min(start + stride * CHUNK, end)]",
            "            chunk = []",
            f"            for {self._names} in iter_unpack(part):",
            *self._make_event("                "),
            "            yield chunk",
        ]

    def _tailed_decoder(self) -> list[str]:
        before_error = ["if chunk:", "    yield chunk", "    chunk = []"]
        return [
            "def decode(records, offset):",
            "    data = records.data",
            "    chunk = []",
            *self._each_record("yield", before_error, set(self._tails)),
            *(f"            {_local(name)} = {self._tail(name)}" for name in self._tails),
            *self._make_event("            "),
            "            if len(chunk) == CHUNK:",
            "                yield chunk",
            "                chunk = []",
            "    if chunk:",
            "        yield chunk",
        ]

    def encoder(self) -> list[str]:
        """records, offset of the wall clock → JSON lines."""
        line = ",".join(
            f"{text.json_string(shown).replace('%', '%%')}:{self._conversion(name)}"
            for name, shown in self._fields.items()
        )
        form = repr(f"{{{line}}}\n".encode())
        needed = {source for name in self._fields for source in self._sources(name)}
        return self._tailed_encoder(form, needed) if self._tails else self._fixed_encoder(form, needed)

    def _fixed_encoder(self, form: str, needed: set[str]) -> list[str]:
        columns = [column for name in self._fields for column in self._json_columns(name)]
        width, height = len(self._members), len(columns)
        return [
            "def encode(records, offset):",
            "    data = records.data",
            "    lines = []",
            "    for position, stride, size, count in records.runs:",
            "        if SHORTEST <= size < SIZE:",
            "            lines.append(encode(lengthened(records, position, stride, size, count), offset))",
            "            continue",
            "        if not SIZE <= size <= SIZE + records.padding:",
            "            raise misfit(size)",
            "        for first in range(0, count, LINES):",
            "            number = min(LINES, count - first)",
            "            unpack = structs[records.prefix, stride, number].unpack_from",
            "            values = unpack(data, position + first * stride)",
            *(
                f"            {_local(name)} = values[{index}::{width}]"
                for index, name in enumerate(self._members)
                if name in needed
            ),
            f"            fields = [None] * (number * {height})",
            *(f"            fields[{index}::{height}] = {column}" for index, column in enumerate(columns)),
            f"            lines.append({form} * number % tuple(fields))",
            "    return b''.join(lines)",
        ]

    def _tailed_encoder(self, form: str, needed: set[str]) -> list[str]:
        values = ", ".join(value for name in self._fields for value in self._converted(name))
        return [
            "def encode(records, offset):",
            "    data = records.data",
            "    lines = []",
            *self._each_record("raise", [], needed),
            f"            lines.append({form} % ({values},))",
            "    return b''.join(lines)",
        ]

    def _make_event(self, indent: str) -> list[str]:
        values = {name: self._value(name) for name in self._kinds}
        if self._calls:
            arguments = ", ".join(f"{name}={value}" for name, value in values.items())
            return [f"{indent}chunk.append(Event({arguments}))"]
        return [
            f"{indent}event = new(Event)",
            *(f"{indent}event.{name} = {value}" for name, value in values.items()),
            f"{indent}chunk.append(event)",
        ]

    def _sources(self, name: str) -> tuple[str, ...]:
        """The fields of the record that a field is made of."""
        match self._kinds[name]:
            case Computed(_, arguments):
                return arguments
            case WallClock(source):
                return (source,)
        return (name,)

    def _each_record(self, verb: str, before_error: list[str], needed: set[str]) -> list[str]:
        """Unpacks each record's struct and cuts out the tails that are needed; what follows is inside of the loop."""
        lengths = [_local(name + LENGTH_SUFFIX) for name in self._tails]
        before = [f"                {line}" for line in before_error]
        cuts = [
            f"            {_local(name)} = data[end : (end := end + {_local(name + LENGTH_SUFFIX)})]"
            if name in needed
            else f"            end += {_local(name + LENGTH_SUFFIX)}"
            for name in self._tails
        ]
        return [
            "    for position, stride, size, count in records.runs:",
            "        first = position + records.prefix",
            "        for start in range(first, first + stride * count, stride):",
            "            if size < SIZE:",
            *before,
            f"                {verb} misfit(size)",
            "                continue",
            f"            {self._names} = unpack_from(data, start)",
            # Before anything is cut: what a length that is wrong cuts out may be the whole batch.
            f"            if size < SIZE + {' + '.join(lengths)}:",
            *before,
            f"                {verb} overrun(size, {', '.join(lengths)})",
            "                continue",
            "            end = start + SIZE",
            *cuts,
        ]

    def _value(self, name: str) -> str:
        """The expression for an event's field; tails have been converted."""
        local = _local(name)
        match self._kinds.get(name):  # bytes that several fields are computed of are no field themselves
            case Integer() if self._types[name] is bool:
                return f"{local} != 0"
            case Char() if self._types[name] is str:
                return f"texts[{local}]"
            case Array() | Embedded():
                return f"{_function_of(name)}({local})"
            case Computed(_, arguments):
                return f"{_function_of(name)}({', '.join(map(self._value, arguments))})"
            case WallClock(source):
                return f"moment({_local(source)} + offset)"
        return local

    def _conversion(self, name: str) -> str:
        kind = self._kinds[name]
        if isinstance(kind, WallClock):
            return '"%b.%06dZ"'  # RFC 3339
        return "%d" if isinstance(kind, Integer) and self._types[name] is not bool else "%b"

    def _converted(self, name: str) -> list[str]:
        """The expressions that a field's conversion takes."""
        kind = self._kinds[name]
        if not isinstance(kind, WallClock):
            return [self._json(name)]
        time = f"{_local(kind.source)} + offset"
        return [f"until_seconds[({time}) // 1_000_000_000]", f"({time}) // 1000 % 1_000_000"]

    def _json(self, name: str) -> str:
        """The expression for a field's JSON; tails are bytes still."""
        local = _local(name)
        match self._kinds[name]:
            case Integer(size) if self._types[name] is bool:
                return f"true_false[{local}{' != 0' if size > 1 else ''}]"
            case Char() if self._types[name] is str:
                return f"json_texts[{local}]"
            case Tail(function) if function:
                return f"json_value({self._tail(name)})"
            case Tail() if self._is_strings(name):
                return f"json_strings({local})"
            case Array() | Embedded():
                return f"json_value({self._value(name)})"
            case Char() | Tail():
                return f"json_text({local})"
            case Computed(text.command_line, (source,)) if self._is_strings(source):
                return f"json_command_line({_local(source)})"
            case Computed(_, arguments):
                return f"json_value({_function_of(name)}({', '.join(map(self._unpacked, arguments))}))"
        return local

    def _is_strings(self, name: str) -> bool:
        """Whether a field is a tail of NUL-ended strings, as they are."""
        return self._kinds.get(name) == Tail() and self._types[name] not in (str, bytes)

    def _unpacked(self, name: str) -> str:
        return self._tail(name) if name in self._tails else self._value(name)

    def _tail(self, name: str) -> str:
        kind, local = self._kinds[name], _local(name)
        if isinstance(kind, Tail) and kind.function:
            return f"{_function_of(name)}({local})"
        if self._types[name] is bytes:
            return local
        return f"{'decode_text' if self._types[name] is str else 'strings'}({local})"

    def _json_columns(self, name: str) -> list[str]:
        """The same for as many records as are formatted together."""
        values, local = self._converted(name), _local(name)
        match self._kinds[name]:
            case Integer() if values == [local]:
                return values
            case Char() if values == [f"json_texts[{local}]"]:
                return [f"map(json_texts.__getitem__, {local})"]
            case WallClock(source):
                source = _local(source)
                return [f"[{value} for {source} in {source}]" for value in values]
            case Computed(_, arguments):
                locals_ = ", ".join(map(_local, arguments))
                items = f"{locals_}, in zip({locals_})" if arguments else "_ in range(number)"
                return [f"[{value} for {items}]" for value in values]
        return [f"[{value} for {local} in {local}]" for value in values]


def _local(member: str) -> str:
    """The variable that holds a member: no name that a struct may choose is one that the functions use."""
    return f"v_{member}"


def _function_of(field: str) -> str:
    return f"compute_{field}"


def misfit(event_type: type[Any], plan: Layout, size: int) -> DecodeError:
    """The error for a sample of `size` bytes that the type, of this layout, does not fit."""
    for member in plan.members:
        if member.offset + member.kind.size > size:
            return DecodeError(
                f"a record of {size} bytes ends before {event_type.__name__}.{member.name} "
                f"({member.kind} at offset {member.offset}): the class and the program's struct differ"
            )
    last = plan.members[-1]
    return DecodeError(
        f"a record of {size} bytes is {'longer' if size > plan.size else 'shorter'} than {event_type.__name__} "
        f"({plan.size} bytes, the last field "
        f"{last.name} at offset {last.offset}): the class and the program's struct differ"
    )


def _overrun(event_type: type[Any], plan: Layout, size: int, *lengths: int) -> DecodeError:
    tails = [name for name, kind in plan.kinds.items() if isinstance(kind, Tail)]
    ends = list(accumulate(lengths, initial=plan.size))
    wrong = next(index for index, end in enumerate(ends[1:]) if end > size)
    return DecodeError(
        f"{event_type.__name__}.{tails[wrong]} ({lengths[wrong]} bytes at offset {ends[wrong]}) "
        f"goes beyond its record of {size} bytes"
    )
