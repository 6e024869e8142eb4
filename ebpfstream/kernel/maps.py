"""The types of maps that are read and written here, each with Python's keys and values."""

from __future__ import annotations

import errno
import struct
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

from ebpfstream.c_types import CType, Float, Number
from ebpfstream.errors import ArgumentError, MapError, MapIndexError, UnsupportedError
from ebpfstream.kernel import mapops
from ebpfstream.kernel.bpf import PER_CPU, Map, MapType, Program
from ebpfstream.kernel.mapops import BATCH, Batch
from ebpfstream.kernel.mapvalues import Codec, EachCpu, Plain, Snapshot
from ebpfstream.kernel.typedmap import TypedMap

_STEP: Final = 256  # elements that are read one by one before other tasks get their turn
_PASSES: Final = 5  # through a trie, for two in a row to find the same keys
_STACK_BUILD_ID: Final = 1 << 5  # BPF_F_STACK_BUILD_ID, include/uapi/linux/bpf.h


def typed(made: Map, name: str, key: CType | None, value: CType | None) -> TypedMap:
    """The map, which the caller keeps open, with its types in C; bytes where these are not known."""
    return _CLASSES.get(made.type, _Other)(made, name, key, value)


class _Keyed(TypedMap):
    """What has values at keys."""

    _kind = "a map with keys"
    _use = "it is used like a dict"
    _drain_use = "take a snapshot() and clear() it"
    _writable = True

    def __init__(self, made: Map, name: str, key: CType | None, value: CType | None) -> None:
        super().__init__(made, name, key, value)
        self._keys = Plain(self.key, made.key_size)
        self._values = self._codec()

    def _codec(self, *, totals: bool = False) -> Codec:
        if self.type in PER_CPU:
            return EachCpu(self.value, totals=totals)
        return Plain(self.value, self._made.value_size)

    def _packed(self, key: Any) -> bytes:
        return self._keys.pack(key)

    def _look_up(self, key: Any) -> bytes | None:
        packed = self._packed(key)
        with self._reporting(f"look up {key!r} in"):
            return self._map.lookup(packed)

    def __getitem__(self, key: Any) -> Any:
        data = self._look_up(key)
        if data is None:
            raise KeyError(key)
        return self._values.unpack(data)

    def __contains__(self, key: object) -> bool:
        try:
            return self._look_up(key) is not None
        except MapIndexError:
            return False

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check_writable()
        packed, data = self._packed(key), self._values.pack(value)
        with self._reporting(f"set {key!r} in"):
            self._map.update(packed, data)

    def setdefault(self, key: Any, value: Any) -> Any:
        self._check_writable()
        packed, data = self._packed(key), self._values.pack(value)
        found: bytes | None = None
        while found is None:  # as long as it is removed after it has been found to be there
            with self._reporting(f"set {key!r} in"):
                try:
                    self._map.update(packed, data, mapops.NOEXIST)
                    found = data
                except FileExistsError:
                    found = self._map.lookup(packed)
        return self._values.unpack(found)

    def update(self, values: Mapping[Any, Any]) -> None:
        self._check_writable()
        keys = list(values)
        data = [self._values.pack(values[key]) for key in keys]
        self._update(keys, [self._packed(key) for key in keys], data)

    def _update(self, keys: Sequence[Any], packed: list[bytes], data: list[bytes]) -> None:
        done = 0
        while done < len(keys):
            part = slice(done, done + BATCH)
            with self._reporting(f"set {keys[done]!r} in"):
                try:
                    done += mapops.update_all(self._map, packed[part], data[part])
                except UnsupportedError:
                    self._map.update(packed[done], data[done])
                    done += 1

    def _check_writable(self) -> None:
        if not self._writable:
            raise self._cannot("have values set by key")

    def __delitem__(self, key: Any) -> None:
        packed = self._packed(key)
        with self._reporting(f"remove {key!r} from"):
            removed = self._map.delete(packed)
        if not removed:
            raise KeyError(key)

    def clear(self) -> None:
        with self._reporting("clear"):
            key = mapops.next_key(self._map, None)
            for _ in range(2 * self.max_entries):  # after one that others have removed comes the first again
                if key is None:
                    return
                following = mapops.next_key(self._map, key)
                self._map.delete(key)
                key = following

    def __len__(self) -> int:
        return len(self.snapshot())

    def sums(self) -> Snapshot:
        if self.type not in PER_CPU:
            raise self._cannot("be added up", "only per-CPU maps have several values at a key")
        if not isinstance(self.value, Number | Float):
            raise ArgumentError(
                f"{self.value.declared()} is no number: add up the members that you want from a snapshot()"
            )
        return self._read(totals=True)

    def fill(self, found: Snapshot, *, drain: bool, totals: bool = False) -> Iterator[None]:
        if drain and self._drain_use:
            raise self._cannot("be drained", self._drain_use)
        return self._filled(found, self._codec(totals=totals), Batch.TAKE if drain else Batch.LOOKUP)

    def _filled(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        raise NotImplementedError

    def _batches(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        with self._reporting("read"):
            try:
                for key_data, value_data in mapops.batches(self._map, command):
                    found.update(
                        zip(self._keys.unpack_all(key_data), values.unpack_all(value_data), strict=True)
                    )
                    yield
            except OSError as error:
                if isinstance(error, BlockingIOError) or (found and command is Batch.TAKE):
                    return  # what has been taken out must not get lost
                raise
        found.complete = True

    def _one_by_one(self, found: Snapshot, values: Codec) -> Generator[None, None, list[bytes] | None]:
        """Go through the keys: which there are, in their order, or None if any of them went meanwhile."""
        keys: list[bytes] = []
        key = None
        steps = 0
        # Each key that goes may let it begin again.
        while steps < 3 * len(found) + 1000:
            with self._reporting("read"):
                key = mapops.next_key(self._map, key)
                data = None if key is None else self._map.lookup(key)
            if key is None:
                return keys if len(keys) == steps else None
            if data is not None:
                found[self._keys.unpack(key)] = values.unpack(data)
                keys.append(key)
            steps += 1
            if steps % _STEP == 0:
                yield
        return None


class _Hash(_Keyed):
    _kind = "a hash map"
    _drain_use = ""

    def clear(self) -> None:
        try:
            with self._reporting("clear"):
                for _ in mapops.batches(self._map, Batch.TAKE):
                    pass
        except UnsupportedError:
            super().clear()

    def _filled(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        try:
            yield from self._batches(found, values, command)
        except UnsupportedError:
            if command is Batch.TAKE:
                raise
            yield from self._one_by_one(found, values)


class _Array(_Keyed):
    _kind = "an array"
    _drain_use = "it keeps its elements; count with snapshot().since(before)"

    def __init__(self, made: Map, name: str, key: CType | None, value: CType | None) -> None:
        super().__init__(made, name, key or Number("unsigned int"), value)

    def _packed(self, key: Any) -> bytes:
        if isinstance(key, int) and not 0 <= key < self.max_entries:
            raise MapIndexError(
                f"{key} is out of range: {self.name!r} has indexes 0 to {self.max_entries - 1}"
            )
        return super()._packed(key)

    def __delitem__(self, key: Any) -> None:
        raise self._cannot("have keys removed", "set it to 0")

    def __len__(self) -> int:
        return self.max_entries

    def clear(self) -> None:
        indexes = range(self.max_entries)
        self._update(
            indexes, list(map(self._packed, indexes)), [bytes(self._made.value_length)] * len(indexes)
        )

    def _filled(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        try:
            yield from self._batches(found, values, command)
        except UnsupportedError:
            yield from self._each_index(found, values)

    def _each_index(self, found: Snapshot, values: Codec) -> Iterator[None]:
        for index in range(self.max_entries):
            data = self._look_up(index)
            if data is not None:
                found[index] = values.unpack(data)
            if index % _STEP == _STEP - 1:
                yield
        found.complete = True


class _Programs(_Array):
    _kind = "a program array"
    _use = "set_program() fills it, and its keys are the indexes that are filled"
    _drain_use = _use
    _writable = False

    def __delitem__(self, key: Any) -> None:
        super(_Array, self).__delitem__(key)

    def __len__(self) -> int:
        return len(self.snapshot())

    def clear(self) -> None:
        with self._reporting("clear"):
            for index in range(self.max_entries):
                self._map.delete(self._packed(index))

    def set_program(self, index: int, program: Program) -> None:
        packed = self._packed(index)
        with self._reporting(f"set {index} to {program.name} in"):
            self._map.update(packed, struct.pack("<I", program.fd))

    def _filled(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        return self._each_index(found, values)

    def _why(self, code: int, doing: str) -> str:
        if code == errno.EINVAL:
            return f"{doing} the map {self.name!r}: its callers and all that it calls must be programs of one type"
        return super()._why(code, doing)


class _Trie(_Keyed):
    _kind = "an LPM trie"

    def _why(self, code: int, doing: str) -> str:
        if code == errno.EINVAL:
            return (
                f"{doing} the map {self.name!r}: its prefixes have 0 to {8 * (self._made.key_size - 4)} bits"
            )
        return super()._why(code, doing)

    def _filled(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        before = None
        for _ in range(_PASSES):
            found.clear()
            keys = yield from self._one_by_one(found, values)
            if keys is not None and keys == before:
                found.complete = True
                return
            before = keys


class _Addresses(Codec):
    """The addresses of a stack trace, which end with the first 0."""

    def __init__(self, length: int) -> None:
        self.length = length

    def pack(self, value: Any) -> bytes:
        raise NotImplementedError

    def unpack_all(self, data: bytes) -> list[tuple[int, ...]]:
        return [tuple(takewhile(bool, struct.unpack(f"<{self.length // 8}Q", data)))]


class _Stacks(_Keyed):
    _kind = "a map of stack traces"
    _use = "only bpf_get_stackid() puts traces into it"
    _writable = False

    def _codec(self, *, totals: bool = False) -> Codec:
        if mapops.info(self._map).flags & _STACK_BUILD_ID:
            return super()._codec()
        return _Addresses(self._made.value_size)

    def _filled(self, found: Snapshot, values: Codec, command: Batch) -> Iterator[None]:
        keys = yield from self._one_by_one(found, values)
        found.complete = keys is not None


class _Queue(TypedMap):
    _kind = "a queue"
    _use = "use push(), pop(), peek() and drain()"

    def __init__(self, made: Map, name: str, key: CType | None, value: CType | None) -> None:
        super().__init__(made, name, None, value)
        self._values = Plain(self.value, made.value_size)

    def __bool__(self) -> bool:
        with self._reporting("look into"):
            return self._map.lookup(b"") is not None

    def push(self, value: Any) -> None:
        data = self._values.pack(value)
        with self._reporting(f"push {value!r} to"):
            self._map.update(b"", data)

    def pop(self) -> Any:
        with self._reporting("pop from"):
            return self._found(mapops.take(self._map, b""))

    def peek(self) -> Any:
        with self._reporting("look into"):
            return self._found(self._map.lookup(b""))

    def _found(self, data: bytes | None) -> Any:
        if data is None:
            raise MapIndexError(f"the map {self.name!r}, {self._kind}, is empty")
        return self._values.unpack(data)

    def clear(self) -> None:
        self.drain()

    def fill(self, found: Snapshot, *, drain: bool, totals: bool = False) -> Iterator[None]:
        if not drain:
            raise self._cannot("be read and keep its values", "drain() it, or drain=True")
        return self._drained(found)

    def _drained(self, found: Snapshot) -> Iterator[None]:
        for number in range(self.max_entries):
            try:
                with self._reporting("pop from"):
                    data = mapops.take(self._map, b"")
            except MapError:
                if found:
                    return  # what has been taken out must not get lost
                raise
            if data is None:
                found.complete = True
                return
            found[number] = self._values.unpack(data)
            if number % _STEP == _STEP - 1:
                yield
        # All that a queue had in the beginning; not so a stack, to which values are pushed meanwhile.
        found.complete = self.type is MapType.QUEUE


class _Stack(_Queue):
    _kind = "a stack"


class _Other(TypedMap):
    """What is not read as a map."""

    def __init__(self, made: Map, name: str, key: CType | None, value: CType | None) -> None:
        super().__init__(made, name, key, value)
        self._kind, use = _OTHERS.get(made.type, (f"a map of the kernel's type {made.type.value}", self._use))
        self._use = use.format(name)


_OUTPUT: Final = "iterate bpf.events({!r})"
_OTHERS: Final = {
    MapType.PERF_EVENT_ARRAY: ("the output to a perf buffer", _OUTPUT),
    MapType.RINGBUF: ("a ring buffer", _OUTPUT),
    MapType.CGROUP_ARRAY: ("an array of cgroups", "programs compare with them"),
    MapType.ARRAY_OF_MAPS: ("an array of maps", "programs look up maps in it"),
    MapType.HASH_OF_MAPS: ("a hash map of maps", "programs look up maps in it"),
}
_CLASSES: Final[dict[MapType, type[TypedMap]]] = {
    MapType.HASH: _Hash,
    MapType.PERCPU_HASH: _Hash,
    MapType.LRU_HASH: _Hash,
    MapType.LRU_PERCPU_HASH: _Hash,
    MapType.ARRAY: _Array,
    MapType.PERCPU_ARRAY: _Array,
    MapType.LPM_TRIE: _Trie,
    MapType.PROG_ARRAY: _Programs,
    MapType.STACK_TRACE: _Stacks,
    MapType.QUEUE: _Queue,
    MapType.STACK: _Stack,
}
