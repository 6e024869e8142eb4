"""Typed maps: every type from BCC's text, set from outside and by a program, whole under churn."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream.errors import ArgumentError, MapError, MapIndexError, NotOpenError, UnsupportedError
from ebpfstream.kernel import bpf, compiler, mapops, maps
from ebpfstream.kernel.bpf import Map, MapType, Program, ProgramType, possible_cpus
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.mapops import Batch
from ebpfstream.kernel.mapvalues import PerCpu, Snapshot
from ebpfstream.kernel.typedmap import TypedMap
from tests.kernel.counting import TEXT, attached, calling, event_type, load, simple, typed
from tests.kernel.flood import producing

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def compiled() -> Module:
    return anyio.run(compiler.compile, TEXT)


@pytest.fixture
def bpf_maps(compiled: Module) -> dict[str, TypedMap]:
    """All maps of the text, empty."""
    found = {name: typed(compiled, name) for name in compiled.maps}
    for one in found.values():
        if one.name not in ("read_only", "write_only", "cgroups", "output", "devices"):
            one.clear()
    return found


def test_what_a_program_writes(compiled: Module, bpf_maps: dict[str, TypedMap]) -> None:
    """100 calls, in maps of every type."""
    found = bpf_maps
    found["trie"].update(
        {(8, bytes([10, 0, 0, 0])): 0, (24, bytes([10, 1, 33, 0])): 0, (24, bytes([10, 2, 33, 0])): 0}
    )
    with attached(compiled, "each"), closing(load(compiled, "called")) as called, producing() as producer:
        found["programs"].set_program(5, called)
        found["targets"][producer.pid] = 1
        producer.start(100)
        producer.wait()
        programs = found["programs"].snapshot()
        fdinfo = Path(f"/proc/self/fdinfo/{called.fd}").read_text().split()
        comm = Path(f"/proc/{producer.pid}/comm").read_text().strip()
    for name in ("hash", "lru"):
        assert found[name].snapshot() == {17: 100}, name
    for name in ("percpu_hash", "lru_percpu"):
        assert found[name].sums() == {17: 100}, name
        assert found[name][17].total == 100
        assert len(found[name][17]) == possible_cpus()
    assert {k: v for k, v in found["array"].items() if k != 6} == {0: 0, 1: 0, 2: 0, 3: 100, 4: 0, 5: 100}
    assert found["percpu_array"].sums().since({}) == {5: 100}
    assert found["histogram"].snapshot().since({}) == {10: 100}
    assert list(found["queue"].drain().items()) == [(n, n) for n in range(100)]
    assert [(value.count, value.comm) for value in found["stack"].drain().values()] == [
        (n, comm) for n in reversed(range(100))
    ]
    key = event_type(found["structs"].key)(number=7, wide=1 << 40, name="getppid")
    assert found["structs"].snapshot() == {key: event_type(found["structs"].value)(99, comm)}
    assert sorted((key.prefixlen, key.data, value) for key, value in found["trie"].items()) == [
        (8, bytes([10, 0, 0, 0]), 99),
        (24, bytes([10, 1, 33, 0]), 1),
        (24, bytes([10, 2, 33, 0]), 0),
    ]
    assert programs == {5: int(fdinfo[fdinfo.index("prog_id:") + 1])}
    trace = found["stacks"][found["array"][6]]
    assert trace
    assert all(address >> 47 == (1 << 17) - 1 for address in trace)  # the kernel's half
    assert found["stacks"].snapshot() == {found["array"][6]: trace}


@pytest.mark.parametrize("kind", [MapType.HASH, MapType.LRU_HASH])
def test_a_hash_map_is_like_a_dict(kind: MapType) -> None:
    found = simple(kind)
    assert (len(found), found.snapshot(), list(found), found.get(1), found.get(1, 2)) == (0, {}, [], None, 2)
    found[1] = 5
    found[1] = 6
    assert (found[1], 1 in found, 2 in found, len(found)) == (6, True, False, 1)
    with pytest.raises(KeyError, match=r"^2$"):
        found[2]
    with pytest.raises(KeyError, match=r"^2$"):
        del found[2]
    assert (found.setdefault(1, 9), found.setdefault(2, 9)) == (6, 9)
    found.update({3: 1 << 63, 4: 0})
    assert sorted(found.items()) == [(1, 6), (2, 9), (3, 1 << 63), (4, 0)]
    assert sorted(found.keys()) == sorted(found) == [1, 2, 3, 4]
    assert sorted(found.values()) == [0, 6, 9, 1 << 63]
    del found[3]
    assert sorted(found) == [1, 2, 4]
    assert found.drain() == {1: 6, 2: 9, 4: 0}
    assert found.snapshot() == {}
    found[1] = 5
    found.clear()
    assert len(found) == 0


def test_keys_and_values_that_are_structs(bpf_maps: dict[str, TypedMap]) -> None:
    found = bpf_maps["structs"]
    key = event_type(found.key)(1, 2, "three")
    value = event_type(found.value)(4, "five")
    found[1, 2, "three"] = {"count": 4, "comm": "five"}
    assert found[key] == found[1, 2, "three"] == value
    assert found.snapshot()[key] == value
    found.update({key: value, (2, 2, "three"): value})
    assert found.drain() == {key: value, event_type(found.key)(2, 2, "three"): value}
    for wrong in ((1, 2), (1, 2, "much too long"), 7):
        with pytest.raises(ArgumentError):
            found[wrong]
    with pytest.raises(ArgumentError):
        found[key] = 7


def test_types_that_are_not_known_are_bytes() -> None:
    made = Map.create("made", MapType.HASH, key_size=4, value_size=3, max_entries=4)
    found = maps.typed(made, "made", None, None)
    found[b"four"] = b"abc"
    assert found.items() == {b"four": b"abc"}.items()
    array = maps.typed(
        Map.create("made", MapType.ARRAY, key_size=4, value_size=3, max_entries=2), "made", None, None
    )
    array[1] = b"abc"
    assert array.snapshot() == {0: bytes(3), 1: b"abc"}


@pytest.mark.parametrize("value", ["unsigned long long", "int"])
def test_an_array(value: str) -> None:
    found = simple(MapType.ARRAY, value)
    assert len(found) == 10
    found[9] = 7
    found.update({0: 1, 3: 4})
    assert found.snapshot() == {**dict.fromkeys(range(10), 0), 0: 1, 3: 4, 9: 7}
    assert (9 in found, 10 in found, -1 in found, found.get(10, "none")) == (True, False, False, "none")
    for index in (10, -1, 1 << 40):
        with pytest.raises(MapIndexError, match=rf"{index} is out of range: 'made' has indexes 0 to 9"):
            found[index]
        with pytest.raises(IndexError):
            found[index] = 1
    assert (found.setdefault(3, 8), found[3]) == (4, 4)
    found.clear()
    assert set(found.values()) == {0}
    with pytest.raises(MapError, match=r"'made' is an array, which cannot have keys removed: set it to 0"):
        del found[1]
    with pytest.raises(MapError, match=r"cannot be drained: it keeps its elements; count with snapshot\(\)"):
        found.drain()


@pytest.mark.parametrize("kind", [MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH])
@pytest.mark.parametrize("value", ["int", "unsigned long long"])
def test_one_value_for_each_cpu(kind: MapType, value: str) -> None:
    found = simple(kind, value)
    cpus = possible_cpus()
    found[3] = 5
    assert found[3] == PerCpu([5] * cpus)
    assert found[3].total == 5 * cpus
    found[4] = PerCpu(range(cpus))
    assert found[4] == tuple(range(cpus))
    found.update({5: 1, 6: PerCpu([2] * cpus)})
    expected = {3: 5 * cpus, 4: sum(range(cpus)), 5: cpus, 6: 2 * cpus}
    assert found.sums().since({}) == expected
    assert found.sums().complete
    assert {key: value.total for key, value in found.items() if value.total} == expected
    assert found.snapshot().since({})[6] == PerCpu([2] * cpus)
    with pytest.raises(ArgumentError, match=rf"\(1,\) has 1 values: give {cpus}, one for each possible CPU"):
        found[3] = PerCpu([1])
    if kind is MapType.PERCPU_HASH:
        assert {key: value.total for key, value in found.drain().items()} == expected
        assert len(found) == 0


def test_a_struct_for_each_cpu(bpf_maps: dict[str, TypedMap]) -> None:
    found = bpf_maps["percpu_structs"]
    found[1] = (5, "text")  # no PerCpu, so it is one struct
    assert [(value.count, value.comm) for value in found[1]] == [(5, "text")] * possible_cpus()
    with pytest.raises(ArgumentError, match="is no number: add up the members that you want"):
        assert found[1].total
    with pytest.raises(ArgumentError, match="struct value_t is no number"):
        found.sums()


def test_a_trie_finds_the_longest_prefix(bpf_maps: dict[str, TypedMap]) -> None:
    found = bpf_maps["trie"]
    found[8, bytes([10, 0, 0, 0])] = 1
    found[16, bytes([10, 1, 0, 0])] = 2
    assert found[32, bytes([10, 1, 2, 3])] == 2
    assert found[32, bytes([10, 2, 2, 3])] == 1
    assert (32, bytes([11, 2, 2, 3])) not in found
    with pytest.raises(KeyError):
        del found[32, bytes([10, 1, 2, 3])]
    assert len(found) == 2
    with pytest.raises(MapError, match=r"'trie': its prefixes have 0 to 32 bits"):
        found[33, bytes(4)] = 1
    with pytest.raises(MapError, match=r"set \(33, .*\) in the map 'trie': its prefixes have 0 to 32 bits"):
        found.update({(24, bytes(4)): 1, (33, bytes(4)): 1, (25, bytes(4)): 1})
    assert (len(found), found[32, bytes(4)]) == (3, 1)
    del found[24, bytes(4)]
    with pytest.raises(MapError, match=r"cannot be drained: take a snapshot\(\) and clear\(\) it"):
        found.drain()
    found.clear()
    assert found.snapshot() == {}


def test_queues_and_stacks() -> None:
    for kind, order in ((MapType.QUEUE, [0, 1, 2]), (MapType.STACK, [2, 1, 0])):
        found = simple(kind)
        assert not found
        for empty in (found.pop, found.peek):
            with pytest.raises(MapIndexError, match=r"'made', a (queue|stack), is empty"):
                empty()
        for value in range(3):
            found.push(value)
        assert found
        assert found.peek() == found.peek() == order[0]
        assert [found.pop() for _ in range(3)] == order
        for value in range(10):
            found.push(value)
        with pytest.raises(MapError, match=r"the map 'made' is full: remove some of its 10 entries"):
            found.push(10)
        drained = found.drain()
        assert drained.complete is (kind is MapType.QUEUE)  # another may have been pushed onto the stack
        assert list(drained.values()) == (
            list(range(10)) if kind is MapType.QUEUE else list(reversed(range(10)))
        )
        found.push(1)
        assert found.drain().complete
        found.push(1)
        found.clear()
        assert not found
        with pytest.raises(MapError, match=r"cannot be read and keep its values: drain\(\) it"):
            found.snapshot()
        with pytest.raises(
            MapError, match=r"cannot be counted: use push\(\), pop\(\), peek\(\) and drain\(\)"
        ):
            len(found)


def test_a_program_array(compiled: Module, bpf_maps: dict[str, TypedMap]) -> None:
    found = bpf_maps["programs"]
    with closing(load(compiled, "called")) as program:
        found.set_program(299, program)
        assert found.keys() == {299}
        assert found[299] == found.snapshot()[299] > 0
        with pytest.raises(KeyError):
            found[298]
        with pytest.raises(MapIndexError, match=r"300 is out of range: 'programs' has indexes 0 to 299"):
            found.set_program(300, program)
        with pytest.raises(MapError, match=r"which cannot have values set by key: set_program\(\) fills it"):
            found[1] = 2
        with pytest.raises(MapError, match=r"set_program\(\) fills it"):
            found.update({1: 2})
        del found[299]
        with pytest.raises(KeyError):
            del found[299]
        found.set_program(7, program)
        found.clear()
        assert found.snapshot() == {}
    # Its callers have been raw tracepoints; this is none.
    code = compiled.functions["called"]
    other = Program.load("called", ProgramType.KPROBE, code, compiled.numbered, license="GPL")
    with closing(other), closing(load(compiled, "each")):
        with pytest.raises(
            MapError, match=r"'programs': its callers and all that it calls must be .* of one type"
        ):
            found.set_program(1, other)


def test_stack_traces_are_only_read(bpf_maps: dict[str, TypedMap]) -> None:
    found = bpf_maps["stacks"]
    with pytest.raises(KeyError):
        found[-14]  # what bpf_get_stackid() returns where there is no stack
    with pytest.raises(MapError, match=r"only bpf_get_stackid\(\) puts traces into it"):
        found[1] = (1, 2)


def test_a_stack_trace_that_goes(
    compiled: Module, bpf_maps: dict[str, TypedMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bpf_maps["stacks"]
    with attached(compiled, "each"), producing() as producer:
        bpf_maps["targets"][producer.pid] = 1
        producer.start(1)
        producer.wait()
    assert len(found) == 1
    assert found.snapshot().complete
    real = mapops.next_key

    def going(made: Map, key: bytes | None) -> bytes | None:
        following = real(made, key)
        if following is not None:
            made.delete(following)
        return following

    monkeypatch.setattr(mapops, "next_key", going)
    snapshot = found.snapshot()
    assert (snapshot, snapshot.complete) == ({}, False)
    assert found.snapshot().complete


def test_what_is_not_read_as_a_map(bpf_maps: dict[str, TypedMap]) -> None:
    asked: list[Callable[[TypedMap], object]] = [
        lambda found: found[1],
        lambda found: 1 in found,
        lambda found: found.get(1),
        lambda found: found.update({1: 2}),
        lambda found: found.setdefault(1, 2),
        lambda found: list(found),
        lambda found: found.keys(),
        TypedMap.snapshot,
        TypedMap.drain,
        TypedMap.sums,
        TypedMap.clear,
        TypedMap.pop,
        TypedMap.peek,
        len,
    ]
    for name, said in (
        (
            "output",
            r"'output' is the output to a perf buffer, which cannot .*: iterate bpf.events\('output'\)",
        ),
        ("cgroups", r"'cgroups' is an array of cgroups, which cannot .*"),
        ("devices", r"'devices' is a map of the kernel's type 14, which cannot .*: leave it to programs"),
    ):
        for ask in asked:
            with pytest.raises(MapError, match=said):
                ask(bpf_maps[name])
    with pytest.raises(
        MapError, match=r"'hash' is a hash map, which cannot be pushed to: it is used like a dict"
    ):
        bpf_maps["hash"].push(1)
    with pytest.raises(MapError, match=r"only per-CPU maps have several values at a key"):
        bpf_maps["hash"].sums()


def test_full_maps() -> None:
    found = simple(MapType.HASH)
    with pytest.raises(MapError, match=r"the map 'made' is full: remove some of its 10 entries"):
        found.update({number: number for number in range(2000)})
    assert found.snapshot() == {number: number for number in range(10)}
    with pytest.raises(MapError, match="is full"):
        found[10] = 1
    found[9] = 1  # is there
    lru = simple(MapType.LRU_HASH, entries=100)
    lru.update({number: number for number in range(2000)})
    assert 0 < len(lru) <= 100


def test_maps_that_one_may_not_write_or_read(bpf_maps: dict[str, TypedMap]) -> None:
    assert bpf_maps["read_only"].snapshot() == {}
    changes: list[Callable[[TypedMap], object]] = [
        lambda found: found.update({1: 1}),
        lambda found: found.__setitem__(1, 1),
        lambda found: found.clear(),
    ]
    for change in changes:
        with pytest.raises(
            MapError, match=r"'read_only' can only be read .*: it is declared with BPF_F_RDONLY"
        ):
            change(bpf_maps["read_only"])
    bpf_maps["write_only"][1] = 1
    reads: list[Callable[[TypedMap], object]] = [lambda found: found[1], lambda found: found.snapshot()]
    for read in reads:
        with pytest.raises(
            MapError, match=r"'write_only' can only be set .*: it is declared with BPF_F_WRONLY"
        ):
            read(bpf_maps["write_only"])
    frozen = simple(MapType.ARRAY)
    assert bpf.bpf(22, struct.pack("<I", frozen._map.fd)) == 0  # BPF_MAP_FREEZE
    with pytest.raises(MapError, match="'made' is frozen"):
        frozen[1] = 1
    assert frozen[1] == 0


def test_a_closed_map() -> None:
    found = simple(MapType.HASH)
    found._map.close()
    for use in (lambda: found[1], found.snapshot, found.clear):
        with pytest.raises(NotOpenError, match="'made' is closed, with the BPF object that it belongs to"):
            use()


def test_what_the_kernel_knows_of_a_map() -> None:
    found = simple(MapType.HASH)
    info = mapops.info(found._map)
    fdinfo = Path(f"/proc/self/fdinfo/{found._map.fd}").read_text().split()
    assert info == (int(fdinfo[fdinfo.index("map_id:") + 1]), 1, "made", False)  # BPF_F_NO_PREALLOC
    assert repr(found) == "<HASH 'made': unsigned int → unsigned long long>"


def test_how_much_has_grown() -> None:
    before = Snapshot({1: 5, 2: 5, 3: 5, 4: 5})
    now = Snapshot({1: 7, 2: 5, 3: 2, 5: 1, 6: 0}, complete=True)
    assert now.since(before) == {1: 2, 3: 2, 5: 1}
    assert now.since(before).complete
    assert not before.since({}).complete
    each = Snapshot({1: PerCpu([1, 5]), 2: PerCpu([1, 1]), 3: PerCpu([0, 3])})
    assert each.since({1: PerCpu([1, 3]), 2: PerCpu([1, 1])}) == {1: (0, 2), 3: (0, 3)}
    with pytest.raises(ArgumentError, match="'text' is no number"):
        Snapshot({1: "text"}).since({})


def fill_big(found: TypedMap) -> dict[int, int]:
    stays = {number: number for number in range(100_000)}
    found.update(stays)
    return stays


def test_what_stays_is_in_every_snapshot_once(compiled: Module, bpf_maps: dict[str, TypedMap]) -> None:
    """100,000 keys that are replaced all the time, among 50,000 that come and go."""
    found = bpf_maps["big"]
    stays = fill_big(found)
    seen: set[int] = set()
    with attached(compiled, "churning"), calling(bpf_maps["targets"], 200_000) as going_on:
        snapshots = 0
        while going_on():
            keys = b"".join(keys for keys, _ in mapops.batches(found._map, Batch.LOOKUP))
            times = Counter(struct.unpack(f"<{len(keys) // 4}I", keys))
            assert set(times.values()) == {1}
            assert times.keys() >= stays.keys()
            snapshot = found.snapshot()
            assert snapshot.complete
            assert snapshot.keys() >= stays.keys()
            assert all(value in (key, 1) for key, value in snapshot.items())
            seen |= {key for key in snapshot if key >= 100_000}
            snapshots += 1
    assert snapshots > 0
    assert seen


def test_without_batches_no_snapshot_of_a_hash_map_is_called_complete(
    compiled: Module, bpf_maps: dict[str, TypedMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before Linux 5.6; and reading ends while keys come and go."""
    monkeypatch.setattr(mapops, "_missing", {(MapType.HASH, command) for command in Batch})
    found = bpf_maps["big"]
    found.update({number: number for number in range(2000)})
    quiet = found.snapshot()
    assert quiet == {number: number for number in range(2000)}
    assert not quiet.complete
    with attached(compiled, "churning"), calling(bpf_maps["targets"], 30_000) as going_on:
        while going_on():
            snapshot = found.snapshot()
            assert not snapshot.complete
            assert all(key < 150_000 and value in (key, 1) for key, value in snapshot.items())
    with pytest.raises(
        UnsupportedError, match=r"takes out no several elements at once in a HASH map.* Linux 5\.6"
    ):
        found.drain()
    found.clear()
    assert len(found) == 0


def test_without_batches_an_array_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapops, "_missing", {(MapType.ARRAY, command) for command in Batch})
    found = simple(MapType.ARRAY, entries=600)
    found.update({number: number for number in range(600)})
    assert found.snapshot() == {number: number for number in range(600)}
    assert found.snapshot().complete
    found.clear()
    assert set(found.values()) == {0}


def test_what_the_kernel_cannot_do_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []
    call = bpf.bpf

    def old(command: int, attributes: Any) -> int:
        if command in list(Batch):
            tries.append(command)
            ctypes.set_errno(errno.EINVAL)  # what a kernel says of a command that it does not know
            return -1
        return call(command, attributes)

    monkeypatch.setattr(mapops, "_missing", set())
    monkeypatch.setattr(mapops, "bpf", old)
    found = simple(MapType.HASH)
    found.update({1: 2, 3: 4})
    found.update({5: 6})
    assert found.snapshot() == found.snapshot() == {1: 2, 3: 4, 5: 6}
    assert tries == [Batch.UPDATE, Batch.LOOKUP]
    monkeypatch.setattr(mapops, "bpf", call)
    monkeypatch.setattr(mapops, "_missing", set())
    queue = simple(MapType.QUEUE)
    with pytest.raises(UnsupportedError):  # this kernel's own answer
        list(mapops.batches(queue._map, Batch.LOOKUP))
    assert mapops._missing == {(MapType.QUEUE, Batch.LOOKUP)}


def test_buckets_with_more_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapops, "BATCH", 1)
    found = simple(MapType.HASH, entries=5000)
    expected = {number: number for number in range(5000)}
    found.update(expected)
    assert found.snapshot() == expected
    assert found.drain() == expected
    assert len(found) == 0


def lock(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], str]) -> None:
    """At the first, second, third call for a batch the kernel finds a lock taken: "before", "after" it, or not."""
    call = bpf.bpf
    number = 0

    def locked(command: int, attributes: Any) -> int:
        nonlocal number
        if command not in (Batch.LOOKUP, Batch.TAKE):
            return call(command, attributes)
        number += 1
        if when(number) == "before":
            struct.pack_into("<I", attributes, mapops._COUNT_OFFSET, 0)
        elif (result := call(command, attributes)) < 0 or not when(number):
            return result
        ctypes.set_errno(errno.EBUSY)
        return -1

    monkeypatch.setattr(mapops, "bpf", locked)


def test_locked_buckets_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = simple(MapType.HASH, entries=5000)
    expected = {number: number for number in range(5000)}
    found.update(expected)
    lock(monkeypatch, lambda number: ("before", "after", "")[number % 3])
    assert found.snapshot() == expected
    assert found.snapshot().complete
    assert found.drain() == expected


def test_what_stays_locked_is_left_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = simple(MapType.HASH, entries=5000)
    expected = {number: number for number in range(5000)}
    found.update(expected)
    lock(monkeypatch, lambda number: "before" if number > 2 else "")
    drained = found.drain()
    assert 0 < len(drained) < 5000
    assert not drained.complete
    with pytest.raises(MapError, match="clear the map 'made', a hash map: Device or resource busy"):
        found.clear()
    monkeypatch.undo()
    assert {**drained, **found.snapshot()} == expected
    assert len(drained) + len(found) == 5000


def test_a_trie_that_changes_is_read_again(
    bpf_maps: dict[str, TypedMap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete is what was found twice; and it ends though keys come and go all the time."""
    found = bpf_maps["trie"]
    found.update({(32, bytes([10, 0, 0, number])): number for number in range(20)})
    assert found.snapshot().complete
    real = mapops.next_key
    passes = 0
    change: Callable[[], object] = lambda: None  # noqa: E731

    def changing(made: Map, key: bytes | None) -> bytes | None:
        nonlocal passes
        if key is None:
            passes += 1
            change()
        return real(made, key)

    def come() -> None:
        found[32, bytes([11, 0, 0, passes])] = 1

    def go() -> None:
        if passes == 2:
            del found[32, bytes([10, 0, 0, 7])]

    monkeypatch.setattr(mapops, "next_key", changing)
    assert (len(found), passes) == (20, 2)
    passes, change = 0, go
    snapshot = found.snapshot()
    assert (len(snapshot), snapshot.complete, passes) == (19, True, 3)
    passes, change = 0, come
    snapshot = found.snapshot()
    assert (len(snapshot), snapshot.complete, passes) == (24, False, 5)

    # As if each key went at once, so that the first one came again.
    monkeypatch.setattr(mapops, "next_key", lambda made, key: real(made, None))
    assert not found.snapshot().complete


def test_what_is_set_as_a_whole_is_drained_once(compiled: Module, bpf_maps: dict[str, TypedMap]) -> None:
    """Each call makes an element of its own, on every CPU, while all is drained over and over."""
    found, calls = bpf_maps["unique"], 200_000
    counted: Counter[int] = Counter()
    drains = 0
    with attached(compiled, "once_each") as program, calling(bpf_maps["targets"], calls) as going_on:
        while going_on():
            drained = found.drain()
            assert drained.complete
            assert all(key == value for key, value in drained.items())
            counted.update(drained.keys())
            drains += 1
        misses = program.recursion_misses()
    counted.update(found.drain().keys())
    assert set(counted.values()) == {1}
    (failed,) = bpf_maps["failed"].sums().values()
    assert misses == 0
    assert len(counted) + failed == calls * len(bpf.online_cpus())
    assert drains > 0


def test_what_is_pushed_is_popped_once(compiled: Module, bpf_maps: dict[str, TypedMap]) -> None:
    found, calls = bpf_maps["busy_queue"], 100_000
    popped: list[int] = []
    with attached(compiled, "pushing"), calling(bpf_maps["targets"], calls) as going_on:
        while going_on():
            popped += found.drain().values()
    popped += found.drain().values()
    (failed,) = bpf_maps["failed"].sums().values()
    assert len(popped) + failed == calls * len(bpf.online_cpus())
    for cpu in bpf.online_cpus():
        numbers = [number for number in popped if number & 255 == cpu]
        assert numbers == sorted(set(numbers))


def test_counting_without_taking_anything_out(compiled: Module, bpf_maps: dict[str, TypedMap]) -> None:
    """What came since the snapshot before adds up to the number of calls."""
    found, calls = bpf_maps, 100_000
    names = ("hash", "percpu_hash")
    before = {name: Snapshot() for name in names}
    counted = dict.fromkeys(names, 0)
    rounds = 0

    def count() -> None:
        for name in names:
            now = found[name].sums() if name == "percpu_hash" else found[name].snapshot()
            assert now.complete
            counted[name] += sum(now.since(before[name]).values())
            before[name] = now

    with attached(compiled, "counting"), calling(found["targets"], calls) as going_on:
        while going_on():
            count()
            rounds += 1
    count()
    assert counted == dict.fromkeys(names, calls * len(bpf.online_cpus()))
    assert rounds > 0
