"""What comes out of maps: snapshots, one value for each CPU; and bytes ↔ these."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ebpfstream.c_types import CType, Float, Number
from ebpfstream.errors import ArgumentError
from ebpfstream.events import Integer
from ebpfstream.kernel.bpf import possible_cpus


class PerCpu(tuple[Any, ...]):
    """The values of a per-CPU map's element: of each possible CPU, in their order."""

    __slots__ = ()

    @property
    def total(self) -> Any:
        """All of them added up.  Raises ArgumentError unless they are numbers."""
        if not all(isinstance(value, int | float) for value in self):
            raise ArgumentError(f"{self[0]!r} is no number: add up the members that you want, of each CPU")
        return sum(self)


class Snapshot(dict[Any, Any]):
    """What was in a map, by key.

    `complete` is true if every key that was in the map from the beginning of the reading to its end is
    here, once.  Keys that came or went meanwhile may be here or not, and values are not all of one
    moment; each is what it was when its key was read.  Of a value that a program writes to meanwhile,
    each number that is aligned is one that was there, but two numbers may be of two moments.
    """

    def __init__(self, *args: Any, complete: bool = False) -> None:
        super().__init__(*args)
        self.complete = complete

    def since(self, before: Mapping[Any, Any]) -> Snapshot:
        """How much each number has grown since an earlier snapshot; those that have not are left out.

        This counts without a race: nothing is taken from the programs that count, so the differences
        add up to the last snapshot.  A number that is smaller than before was removed, and is counted
        from 0 again; what an LRU map has dropped is not counted.  Raises ArgumentError unless values
        are numbers.
        """
        grown = Snapshot(complete=self.complete)
        for key, value in self.items():
            difference = _difference(value, before.get(key))
            if difference if not isinstance(difference, PerCpu) else any(difference):
                grown[key] = difference
        return grown


def _difference(value: Any, before: Any) -> Any:
    if isinstance(value, PerCpu):
        return PerCpu(map(_difference, value, before or [None] * len(value)))
    if not isinstance(value, int | float):
        raise ArgumentError(f"{value!r} is no number: how much it grew only you can say")
    return value if before is None or value < before else value - before


class Codec(ABC):
    """Bytes ↔ a map's keys, or its values; `length` bytes each."""

    length: int

    @abstractmethod
    def pack(self, value: Any) -> bytes:
        """The bytes of one.  Raises ArgumentError."""

    @abstractmethod
    def unpack_all(self, data: bytes) -> Sequence[Any]:
        """All that lie there one after the other."""

    def unpack(self, data: bytes) -> Any:
        """The one that lies there."""
        return self.unpack_all(data)[0]


class Plain(Codec):
    """Those of a C type, each `length` bytes from the next."""

    def __init__(self, type: CType, length: int) -> None:
        self.type = type
        self.length = length
        self._format = ""
        if isinstance(type, Number) and type.size <= 8 and not type.truth:  # struct has none of 16 bytes
            self._format = f"<{Integer(type.size, type.signed).letter}{length - type.size}x"
        elif isinstance(type, Float):
            self._format = f"<{'f' if type.size == 4 else 'd'}{length - type.size}x"

    def pack(self, value: Any) -> bytes:
        """Of what the type's `pack` takes."""
        return self.type.pack(value).ljust(self.length, b"\0")

    def unpack_all(self, data: bytes) -> Sequence[Any]:
        """What the type's `unpack` gives; of plain numbers many at once."""
        if self._format:
            return [value for (value,) in struct.iter_unpack(self._format, data)]
        unpack, size = self.type.unpack, self.type.size
        return [unpack(data[at : at + size]) for at in range(0, len(data), self.length)]


class EachCpu(Codec):
    """A `PerCpu` of a C type; with `totals`, numbers come added up."""

    def __init__(self, type: CType, *, totals: bool = False) -> None:
        self._cpus = possible_cpus()
        self._one = Plain(type, type.size + 7 & ~7)
        self.length = self._one.length * self._cpus
        self._totals = totals and isinstance(type, Number | Float)

    def pack(self, value: Any) -> bytes:
        """Of a PerCpu, or of one value for every CPU."""
        if not isinstance(value, PerCpu):
            return self._one.pack(value) * self._cpus
        if len(value) != self._cpus:
            raise ArgumentError(
                f"{value!r} has {len(value)} values: give {self._cpus}, one for each possible CPU"
            )
        return b"".join(map(self._one.pack, value))

    def unpack_all(self, data: bytes) -> Sequence[Any]:
        """A PerCpu, or a total, for each key."""
        values, cpus = self._one.unpack_all(data), self._cpus
        make = sum if self._totals else PerCpu
        return [make(values[at : at + cpus]) for at in range(0, len(values), cpus)]
