"""What every map can be asked for; `maps` has those that answer."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from typing import Any

from ebpfstream.c_types import Bytes, CType
from ebpfstream.errors import MapError, MapIndexError, NotOpenError
from ebpfstream.kernel import mapops
from ebpfstream.kernel.bpf import Map, MapType, Program
from ebpfstream.kernel.mapvalues import Snapshot


class TypedMap:
    """A BPF map whose keys and values are Python's: numbers, str, tuples, and events for structs.

    What it can be asked for depends on its type; the rest raises MapError, which says what to use
    instead.  `key` and `value` are its types in C, which for structs have an `event_type`.  Where a
    struct is to be given, a tuple or a mapping of its members will do.

    **Hash maps** (LRU ones, too), **arrays** and **LPM tries** are used like a dict, but nothing is
    kept here: each call asks the kernel.  An index that an array does not have raises MapIndexError
    (an IndexError), another key that there is not KeyError.  A trie looks up as it does for programs:
    the longest prefix that fits.  An array has all its elements always.

    **Per-CPU maps** have a `PerCpu` at each key: a tuple of one value for each possible CPU, with
    their `total`.  Setting takes a PerCpu as well; any other value is set on every CPU.

    **Queues and stacks** have `push()`, `pop()`, `peek()` and `drain()`.

    **Program arrays** have the program's id at each index that is filled, which `set_program()` does.

    **Stack traces** have the addresses, innermost first, at each id that bpf_get_stackid() returned.
    """

    _kind = "a map of a type that is unknown here"
    _use = "leave it to programs"

    def __init__(self, made: Map, name: str, key: CType | None, value: CType | None) -> None:
        self.name = name
        self.type = made.type
        self.max_entries = made.max_entries
        self.key = key or Bytes(made.key_size)
        self.value = value or Bytes(made.value_size)
        self._made = made

    def __repr__(self) -> str:
        key = f"{self.key.declared()} → " if self.key.size else ""
        return f"<{self.type.name} {self.name!r}: {key}{self.value.declared()}>"

    def __getitem__(self, key: Any) -> Any:
        raise self._cannot("be looked up in")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise self._cannot("have values set by key")

    def __delitem__(self, key: Any) -> None:
        raise self._cannot("have keys removed")

    def __contains__(self, key: object) -> bool:
        raise self._cannot("be looked up in")

    def __len__(self) -> int:
        raise self._cannot("be counted")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.snapshot())

    def get(self, key: Any, default: Any = None) -> Any:
        """The value at `key`, or the default."""
        try:
            return self[key]
        except (KeyError, MapIndexError):
            return default

    def setdefault(self, key: Any, value: Any) -> Any:
        """The value at `key`, which is set to this one if there is none, in one step (BPF_NOEXIST)."""
        raise self._cannot("have values set by key")

    def update(self, values: Mapping[Any, Any]) -> None:
        """Set several: at once where the kernel can (Linux ≥ 5.6).  Those before one that fails stay set."""
        raise self._cannot("have values set by key")

    def keys(self) -> KeysView[Any]:
        """Of a snapshot."""
        return self.snapshot().keys()

    def values(self) -> ValuesView[Any]:
        """Of a snapshot."""
        return self.snapshot().values()

    def items(self) -> ItemsView[Any, Any]:
        """Of a snapshot."""
        return self.snapshot().items()

    def snapshot(self) -> Snapshot:
        """All that is in it, as a dict; its `complete` says whether that is sure.

        A hash map is copied bucket by bucket, each of them under its lock, and a key's bucket is the
        same always (Linux ≥ 5.6, __htab_map_lookup_and_delete_batch() in kernel/bpf/hashtab.c):
        complete.  An array is complete always, too.  A trie is gone through key by key until it had
        the same keys twice, so that none came or went meanwhile.  Before Linux 5.6 a hash map is gone
        through key by key as well; it is never called complete, since a key may be missed that is
        updated meanwhile and so comes to stand before those that have been read.

        Takes some 0.5 µs for a key and its value if they are numbers, 2 µs for each that is a struct.
        """
        return self._read(drain=False)

    def drain(self) -> Snapshot:
        """Take everything out of a hash map, a queue or a stack.

        Of a hash map each element is read and removed in one step (Linux ≥ 5.6), so what programs set
        as a whole comes out exactly once.  **Not so what they count up**: one that has looked up a
        counter when it is drained adds to what has been removed already, and the addition is lost; if
        it writes the sum back with `update()`, what was drained comes again.  Exact are draining when
        no program runs any more, and counting without taking anything out, by `Snapshot.since()`.

        Of a queue or a stack the keys say in which order the values came, from 0.  Each comes once,
        whatever programs do meanwhile.
        """
        return self._read(drain=True)

    def sums(self) -> Snapshot:
        """A snapshot of a per-CPU map whose values are numbers: each key with its total."""
        raise self._cannot("be added up")

    def _read(self, *, drain: bool = False, totals: bool = False) -> Snapshot:
        found = Snapshot()
        for _ in self.fill(found, drain=drain, totals=totals):
            pass
        return found

    def fill(self, found: Snapshot, *, drain: bool, totals: bool = False) -> Iterator[None]:
        """`snapshot()` or `drain()` in steps of some milliseconds at most; MapError comes before the first.

        `totals` adds up the numbers of a per-CPU map.
        """
        raise self._cannot("be read as a whole")

    def clear(self) -> None:
        """Remove everything; set each element of an array to 0.  What comes meanwhile may stay."""
        raise self._cannot("be cleared")

    def push(self, value: Any) -> None:
        """Put a value at the end of a queue, or on top of a stack."""
        raise self._cannot("be pushed to")

    def pop(self) -> Any:
        """Take the value out that a queue has had longest, or a stack shortest.

        Raises MapIndexError if there is none.
        """
        raise self._cannot("be popped from")

    def peek(self) -> Any:
        """What `pop()` would take out."""
        raise self._cannot("be peeked at")

    def set_program(self, index: int, program: Program) -> None:
        """Let a program array call a program.

        Raises MapIndexError, and MapError if the array's other programs or callers are of another type.
        The kernel empties the array when no process has it open any more.
        """
        raise self._cannot("hold programs")

    def _cannot(self, what: str, use: str = "") -> MapError:
        return MapError(f"{self.name!r} is {self._kind}, which cannot {what}: {use or self._use}")

    @property
    def _map(self) -> Map:
        if self._made.fd < 0:
            raise NotOpenError(f"the map {self.name!r} is closed, with the BPF object that it belongs to")
        return self._made

    @contextmanager
    def _reporting(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MapError(self._why(error.errno or 0, doing)) from error

    def _why(self, code: int, doing: str) -> str:
        if code == errno.E2BIG or (code == errno.ENOSPC and self.type is MapType.LPM_TRIE):
            return (
                f"the map {self.name!r} is full: remove some of its {self.max_entries} entries, or give it room for "
                "more in the program's text"
            )
        if code == errno.ENOMEM:
            return f"the kernel has no memory at hand for one more entry of the map {self.name!r}: try again"
        if code == errno.EPERM:
            # bpf_get_file_flag() in kernel/bpf/syscall.c: the map's own flags do not tell.
            access = fcntl.fcntl(self._map.fd, fcntl.F_GETFL) & os.O_ACCMODE
            if access != os.O_RDWR:
                can, flag = ("read", "RDONLY") if access == os.O_RDONLY else ("set", "WRONLY")
                return (
                    f"the map {self.name!r} can only be {can} from outside: it is declared with BPF_F_{flag}"
                )
            if mapops.info(self._map).frozen:
                return f"the map {self.name!r} is frozen: only programs can change it, if anybody"
        return f"{doing} the map {self.name!r}, {self._kind}: {os.strerror(code)}"
