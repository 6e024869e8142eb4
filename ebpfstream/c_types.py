"""C types: bytes ↔ Python values, and the event types made of structs."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import make_dataclass
from functools import partial
from operator import index
from types import GenericAlias
from typing import Any, Final, NamedTuple

from ebpfstream import text
from ebpfstream.errors import ArgumentError
from ebpfstream.events import Char, Computed, Embedded, Event, Integer, Kind, Layout, Member

# As clang calls them; enums and pointers come as integers.
NUMBERS: Final = {
    "char": (1, True),
    "signed char": (1, True),
    "unsigned char": (1, False),
    "_Bool": (1, False),
    "bool": (1, False),
    "short": (2, True),
    "unsigned short": (2, False),
    "int": (4, True),
    "unsigned int": (4, False),
    "long": (8, True),
    "unsigned long": (8, False),
    "long long": (8, True),
    "unsigned long long": (8, False),
    "__int128": (16, True),
    "unsigned __int128": (16, False),
}
FLOATS: Final = {"float": (4, "<f"), "double": (8, "<d")}


class CType(ABC):
    """A type in C: `size` and `alignment` in bytes."""

    size: int
    alignment: int

    @abstractmethod
    def unpack(self, data: bytes) -> Any:
        """The value that `size` bytes are."""

    @abstractmethod
    def pack(self, value: Any) -> bytes:
        """The bytes of a value.  Raises ArgumentError for one that the type does not have."""

    @abstractmethod
    def _declared(self, name: str) -> str: ...

    def declared(self, name: str = "") -> str:
        """As it would stand in C, for messages."""
        return self._declared(name).strip()

    def _cannot(self, value: object, why: str) -> ArgumentError:
        return ArgumentError(f"{value!r} is no {self.declared()}: {why}")


class Number(CType):
    """An integer, an enum, a pointer or a truth value."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.size, self.signed = NUMBERS[name]
        self.alignment = self.size
        self.truth = name in ("_Bool", "bool")

    def unpack(self, data: bytes) -> int:
        """An int, or a bool."""
        value = int.from_bytes(data, "little", signed=self.signed)
        return bool(value) if self.truth else value

    def pack(self, value: Any) -> bytes:
        """Of an int that fits."""
        try:
            return index(value).to_bytes(self.size, "little", signed=self.signed)
        except TypeError:
            raise self._cannot(value, "give an integer") from None
        except OverflowError:
            limits = Integer(self.size, self.signed).limits
            raise self._cannot(value, f"give {limits[0]} to {limits[-1]}") from None

    def _declared(self, name: str) -> str:
        return f"{self._name} {name}"


class Float(CType):
    """A float or a double."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.size, self._format = FLOATS[name]
        self.alignment = self.size

    def unpack(self, data: bytes) -> float:
        """A float."""
        value: float = struct.unpack(self._format, data)[0]
        return value

    def pack(self, value: Any) -> bytes:
        """Of a number."""
        try:
            return struct.pack(self._format, value)
        except (struct.error, OverflowError):
            raise self._cannot(value, "give a number that it can hold") from None

    def _declared(self, name: str) -> str:
        return f"{self._name} {name}"


class Chars(CType):
    """`char[size]`: text up to the first NUL; or of a map's key, `whole`, as what is behind it tells keys apart."""

    alignment = 1

    def __init__(self, size: int, *, whole: bool = False) -> None:
        self.size = size
        self._whole = whole

    def unpack(self, data: bytes) -> str:
        """A str."""
        return text.decode(data.rstrip(b"\0") if self._whole else data.partition(b"\0")[0])

    def pack(self, value: Any) -> bytes:
        """Of str or bytes that fit."""
        if not isinstance(value, str | bytes):
            raise self._cannot(value, "give str or bytes")
        data = text.encode(value) if isinstance(value, str) else value
        if len(data) > self.size:
            raise self._cannot(value, f"it has {len(data)} bytes")
        return data.ljust(self.size, b"\0")

    def _declared(self, name: str) -> str:
        return f"char {name}[{self.size}]"


class Bytes(CType):
    """`unsigned char[size]`: the bytes themselves."""

    alignment = 1

    def __init__(self, size: int) -> None:
        self.size = size

    def unpack(self, data: bytes) -> bytes:
        """All of them."""
        return bytes(data)

    def pack(self, value: Any) -> bytes:
        """Of as many bytes."""
        if not isinstance(value, bytes | bytearray) or len(value) != self.size:
            raise self._cannot(value, f"give {self.size} bytes")
        return bytes(value)

    def _declared(self, name: str) -> str:
        return f"unsigned char {name}[{self.size}]"


class Array(CType):
    """An array of anything else."""

    def __init__(self, item: CType, count: int) -> None:
        self.item = item
        self.count = count
        self.size = item.size * count
        self.alignment = item.alignment

    def unpack(self, data: bytes) -> tuple[Any, ...]:
        """A tuple."""
        size = self.item.size
        return tuple(self.item.unpack(data[at : at + size]) for at in range(0, self.size, size or 1))

    def pack(self, value: Any) -> bytes:
        """Of a sequence of as many."""
        if isinstance(value, str | bytes) or not isinstance(value, Sequence) or len(value) != self.count:
            raise self._cannot(value, f"give {self.count} values")
        return b"".join(map(self.item.pack, value))

    def _declared(self, name: str) -> str:
        return self.item.declared(f"{name}[{self.count}]")


class Field(NamedTuple):
    """A member of a struct or union; of a bit-field `bits` tells the first bit and how many there are."""

    name: str
    type: CType
    offset: int
    bits: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """How many bytes it touches."""
        return (sum(self.bits) + 7) // 8 if self.bits else self.type.size


class Record(CType):
    """A struct or a union; its values are events of `event_type`, made for it.

    The members of unnamed structs and unions within it are its own, as in C.
    """

    def __init__(self, name: str, fields: Sequence[Field], size: int, alignment: int, *, union: bool) -> None:
        self.name = name
        self.fields = fields
        self.size = size
        self.alignment = alignment
        self.union = union
        self.event_type = _event_type(self)

    def unpack(self, data: bytes) -> Event:
        """An event of `event_type`."""
        value: Event = object.__new__(self.event_type)
        for field in self.fields:
            setattr(value, field.name, _value_of(field, data))
        return value

    def pack(self, value: Any) -> bytes:
        """Of an event, a mapping by name, a sequence of the members' values in their order, or the bytes."""
        if isinstance(value, bytes) and len(value) == self.size:
            return value
        data = bytearray(self.size)
        for field, member in zip(self.fields, self._members_of(value), strict=True):
            if field.bits:
                _put_bits(data, field, member)
            else:
                data[field.offset : field.offset + field.type.size] = field.type.pack(member)
        return bytes(data)

    def _members_of(self, value: Any) -> list[Any]:
        names = [field.name for field in self.fields]
        if any(len(fields) > 1 and not fields[0].bits for _, _, fields in _overlapping(self.fields)):
            raise self._cannot(value, "which of a union's members counts is not known: give the bytes")
        if isinstance(value, Event):
            value = {name: getattr(value, name, None) for name in names}
        if isinstance(value, Mapping):
            if set(value) == set(names):
                return [value[name] for name in names]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == len(names):
            return list(value)
        raise self._cannot(value, f"give its members {', '.join(names)}")

    def _declared(self, name: str) -> str:
        return f"{'union' if self.union else 'struct'} {self.name} {name}"


def _value_of(field: Field, data: bytes) -> Any:
    if field.bits is None:
        return field.type.unpack(data[field.offset : field.offset + field.type.size])
    assert isinstance(field.type, Number)
    return _bits(*field.bits, field.type, data[field.offset : field.offset + field.length])


def _bits(first: int, width: int, type: Number, data: bytes) -> int:
    value = int.from_bytes(data, "little") >> first & (1 << width) - 1
    if type.signed and value >> width - 1:
        value -= 1 << width
    return bool(value) if type.truth else value


def _put_bits(data: bytearray, field: Field, value: Any) -> None:
    assert field.bits is not None
    first, width = field.bits
    if not isinstance(value, int) or value.bit_length() > width:
        raise ArgumentError(f"{value!r} does not fit into {field.name}, which has {width} bits")
    part = slice(field.offset, field.offset + field.length)
    bits = int.from_bytes(data[part], "little") | (value & (1 << width) - 1) << first
    data[part] = bits.to_bytes(part.stop - part.start, "little")


def _event_type(record: Record) -> type[Event]:
    """A dataclass with the record's members as fields, whose layout is the record's."""
    kinds: dict[str, Kind] = {field.name: Integer(1) for field in record.fields}  # in their order
    members: list[Member] = []
    for start, end, fields in _overlapping(record.fields):
        first, *others = fields
        if not others and not first.bits:
            kinds[first.name] = kind = _kind(first.type)
            members.append(Member(first.name, kind, start))
            continue
        hidden = f"_bytes_{start}"
        while hidden in kinds:
            hidden += "_"
        members.append(Member(hidden, Char(end - start), start))
        for field in fields:
            function = partial(_value_of, field._replace(offset=field.offset - start))
            kinds[field.name] = Computed(function, (hidden,))
    types = {field.name: _python_type(field.type) for field in record.fields}
    made: type[Event] = make_dataclass(
        record.name,
        list(types.items()),
        bases=(Event,),
        unsafe_hash=True,
        namespace={"__doc__": record.declared()},
    )
    made.__module__ = __name__
    made.__layout__ = Layout(kinds, types, members, record.size)
    return made


def _overlapping(fields: Sequence[Field]) -> Iterator[tuple[int, int, list[Field]]]:
    """Fields that share bytes together, with where these begin and end."""
    start = end = -1
    group: list[Field] = []
    for field in sorted(fields, key=lambda field: field.offset):
        if field.offset >= end and group:
            yield start, end, group
            group = []
        start = start if group else field.offset
        end = max(end, field.offset + field.length)
        group.append(field)
    if group:
        yield start, end, group


def _kind(type: CType) -> Integer | Char | Embedded:
    if isinstance(type, Number) and type.size <= 8:
        return Integer(type.size, type.signed)
    if isinstance(type, Chars | Bytes):
        return Char(type.size)
    return Embedded(type.size, type.unpack)


def _python_type(type: CType) -> Any:
    match type:
        case Number():
            return bool if type.truth else int
        case Float():
            return float
        case Chars():
            return str
        case Bytes():
            return bytes
        case Record():
            return type.event_type
    assert isinstance(type, Array)
    return GenericAlias(tuple, (_python_type(type.item), ...))
