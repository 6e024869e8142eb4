"""Perf rings on memory that a test writes: one CPU's, and those of several read as one buffer.

tests/kernel/test_perfbuf.py has the real kernel; but for the last test this needs no privileges.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import nullcontext
from unittest import mock

import pytest
from anyio.to_thread import run_sync
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfstream import BPF, CorruptBufferError
from ebpfstream.kernel import perfbuf
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.perfring import Part
from fuzz.buffers import samples
from fuzz.memory import PAGE, PerfMemory, perf_lost, perf_memory, perf_sample
from tests.kernel import flood
from tests.kernel.test_loader import GETPPID, make

RECORD_MAX = 1 << 16


@pytest.fixture
def ring() -> Iterator[PerfMemory]:
    made = PerfMemory(3, 4 * PAGE)
    yield made
    made.close()


def drained(ring: PerfMemory, limit: int = RECORD_MAX) -> Part:
    ring.look()
    part = Part(ring, ring.copy(limit))
    part.take()
    return part


def unpadded(found: list[bytes], sizes: list[int]) -> list[bytes]:
    """Nobody tells how long a sample was, but that is at most seven bytes less."""
    assert all(size <= len(sample) <= size + 7 for sample, size in zip(found, sizes, strict=True))
    return [sample[:size] for sample, size in zip(found, sizes, strict=True)]


SIZES = [*range(130), *range(131, 4096, 97), 4088, 4089, 4095, 4096, 8000]


def test_samples_of_every_size_wherever_they_wrap(ring: PerfMemory) -> None:
    """The ring goes round a dozen times; of nothing is more or less taken."""
    for number, size in enumerate(SIZES):
        sample = bytes([number % 256]) * size
        for _ in range(1 + number % 3):
            assert ring.put(perf_sample(number, sample))
        part = drained(ring)
        found = samples(part.records)
        assert unpadded(found, [size] * len(found)) == [sample] * (1 + number % 3)
        assert part.times() == [number] * len(found)
        assert ring.pending() == 0
    assert ring.tail > 12 * ring.size


def test_the_largest_sample() -> None:
    ring = PerfMemory(0, 1 << 17)
    for _ in range(5):
        assert ring.put(perf_sample(1, b"x" * 65508))
        assert [len(sample) for sample in samples(drained(ring).records)] == [65508]
    ring.close()


@pytest.mark.parametrize("limit", [RECORD_MAX, RECORD_MAX + 8, 100_000])
def test_a_limit_cuts_between_records(limit: int) -> None:
    """Whatever their lengths, and never so that nothing is taken."""
    ring = PerfMemory(0, 1 << 19)
    sizes = [65508, 8, 8, 60_000, 65508, 4, *[30_000] * 3, 4]
    wanted = [bytes([number]) * size for number, size in enumerate(sizes)]
    for sample in wanted:
        assert ring.put(perf_sample(0, sample))
    found = []
    while ring.pending():
        part = drained(ring, limit)
        assert 0 < part.end <= limit
        found += samples(part.records)
    assert unpadded(found, sizes) == wanted
    ring.close()


def test_counts_of_lost_ones_are_taken_once_and_with_their_place(ring: PerfMemory) -> None:
    for time in range(6):
        ring.put(perf_lost(10**time))
        ring.put(perf_sample(time, b"x"))
    ring.look()
    part = Part(ring, ring.copy(RECORD_MAX))
    part.keep_until(2)
    part.take()
    assert ring.lost_told == 111
    assert drained(ring).count == 3
    assert ring.lost_told == ring.lost == 111111


def test_kinds_of_records_that_a_later_kernel_may_have(ring: PerfMemory) -> None:
    """They say how long they are, and so can be passed."""
    for kind in (1, 5, 22, 63):
        ring.put(struct.pack("<IHHQ", kind, 0, 16, 0))
        ring.put(perf_sample(kind, b"x"))
    assert drained(ring).times() == [1, 5, 22, 63]


def header(kind: int, size: int) -> bytes:
    return struct.pack("<IHH", kind, 0, size)


BROKEN = {
    "size 0": (header(9, 0), "kind 9 says that it has 0 bytes"),
    "another of size 0": (header(5, 0), "kind 5 says that it has 0 bytes"),
    "no time and length": (header(9, 8), "kind 9 says that it has 8 bytes"),
    "no length": (header(9, 16) + bytes(8), "kind 9 says that it has 16 bytes"),
    "a size that is no multiple of 8": (
        header(9, 33) + bytes(8) + b"\x0d" + bytes(23),
        "says that it has 33 bytes",
    ),
    "the same of another kind": (header(5, 9) + bytes(8), "says that it has 9 bytes"),
    "no count of lost ones": (header(2, 16) + bytes(8), "kind 2 says that it has 16 bytes"),
    "kind 0": (header(0, 24) + bytes(16), "kind 0 says"),
    "no kernel's kind": (header(64, 24) + bytes(16), "kind 64 says"),
    "beyond the end": (header(9, 48) + bytes(32), "a record goes 8 bytes beyond its end"),
    "a sample of 70,000 bytes": (
        header(9, 4488) + struct.pack("<QI", 0, 70004) + bytes(4468),
        "has 4488 bytes",
    ),
}


@pytest.mark.parametrize("before", [0, 1, 40])
@pytest.mark.parametrize("broken", BROKEN)
def test_what_the_kernel_never_leaves(ring: PerfMemory, broken: str, before: int) -> None:
    """Nothing is taken, at no time, and what comes after is not taken for a record."""
    record, message = BROKEN[broken]
    for time in range(before):
        ring.put(perf_sample(time, b"whole"))
    assert ring.put(record)
    tail = ring.tail
    for _ in range(2):
        with pytest.raises(CorruptBufferError, match=message) as error:
            drained(ring)
        assert ring.tail == tail
    assert "CPU 3" in str(error.value)
    assert "Close this stream" in str(error.value)


def test_what_the_limit_cuts_off_is_found_later() -> None:
    ring = PerfMemory(0, 1 << 17)
    ring.put(perf_sample(0, b"x" * 65000))
    ring.put(perf_sample(1, b"x" * 600))
    ring.put(header(9, 0))
    assert drained(ring).count == 1
    with pytest.raises(CorruptBufferError):
        drained(ring)
    ring.close()


@pytest.mark.parametrize(("tail", "head"), [(8, 0), (0, 4 * PAGE + 8), (0, 1 << 40), (0, 12), (4, 36)])
def test_positions_that_cannot_be(ring: PerfMemory, tail: int, head: int) -> None:
    ring.set(perf_sample(0, b"x").ljust(ring.size, b"\0"), tail, head)
    with pytest.raises(
        CorruptBufferError, match=f"its positions are {head - tail} bytes apart, from {tail} on"
    ):
        drained(ring)
    assert ring.tail == tail


def test_nothing_is_taken_of_any_ring_when_one_is_broken() -> None:
    with perf_memory(3, PAGE) as (buffer, rings):
        for ring in rings:
            ring.put(perf_sample(ring.cpu, b"x"))
        rings[1].put(header(9, 0))
        for _ in range(2):
            with pytest.raises(CorruptBufferError, match="CPU 1"):
                buffer.drain(1 << 18)
        assert [ring.tail for ring in rings] == [0, 0, 0]


class Machine:
    """CPUs whose programs submit, and the clock that stamps what they do; each record says when and where."""

    def __init__(self, buffer: PerfBuffer, rings: list[PerfMemory]) -> None:
        self.buffer = buffer
        self.rings = rings
        self.now = 1000
        self.unfinished: dict[int, bytes] = {}
        self.wanted: list[list[bytes]] = [[] for _ in rings]
        self.lost = 0
        self.late = self.latest = 0
        self.found: list[list[bytes]] = [[] for _ in rings]

    def monotonic_ns(self) -> int:
        return self.now

    def stamp(self, cpu: int, size: int) -> None:
        """A program begins to submit: the time is taken first (perf_prepare_sample())."""
        self.finish(cpu)
        sample = struct.pack("<QHH", self.now, cpu, size) + bytes([size % 256]) * size
        self.unfinished[cpu] = perf_sample(self.now, sample)

    def finish(self, cpu: int) -> None:
        """And ends: its record is in the ring, or lost."""
        record = self.unfinished.pop(cpu, None)
        if record is None:
            return
        if self.rings[cpu].put(record):
            self.wanted[cpu].append(record[20:])
        else:
            self.lost += 1

    def drain(self, limit: int) -> int:
        """How many came."""
        records = self.buffer.drain(limit)
        if records is None:
            return 0
        found = samples(records)
        keys = [struct.unpack_from("<QHH", sample) for sample in found]
        times = [time for time, _, _ in keys]
        assert times == sorted(times), "a batch is not in the order of time"
        self.late += sum(time < self.latest for time in times)
        self.latest = max(self.latest, times[-1])
        for sample, (_, cpu, size) in zip(found, keys, strict=True):
            assert sample[12 : 12 + size] == bytes([size % 256]) * size, "a sample was torn"
            self.found[cpu].append(sample)
        return len(found)


Step = tuple[str, int, int]
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("stamp"), st.integers(0, 3), st.sampled_from([0, 1, 4, 8, 8, 8, 8, 9, 40, 300, 1500])
        ),
        st.tuples(st.just("finish"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("later"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("drain"), st.sampled_from([1, 1 << 18]), st.just(0)),
    ),
    max_size=120,
)


def run(cpus: int, steps: list[Step], max_delay: int, unfinished_at_most: int) -> Machine:
    """All steps on CPUs whose programs are that slow at most, then an end as a stream's."""
    with perf_memory(cpus, PAGE, max_delay * 1e-9) as (buffer, rings):
        machine = Machine(buffer, rings)
        begun: dict[int, int] = {}
        with mock.patch.object(perfbuf, "time", machine):
            for verb, number, size in steps:
                cpu = number % cpus
                if verb == "stamp":
                    machine.stamp(cpu, size)
                    begun[cpu] = machine.now
                elif verb == "finish":
                    machine.finish(cpu)
                elif verb == "later":
                    for slow in [
                        one for one in begun if machine.now + number > begun[one] + unfinished_at_most
                    ]:
                        machine.finish(slow)
                    machine.now += number
                else:
                    machine.drain(number)
            for cpu in range(cpus):
                machine.finish(cpu)
            buffer.finish()
            while machine.drain(1):
                pass
        assert machine.found == machine.wanted, "whole, once, and each CPU's in their order"
        assert [ring.tail for ring in rings] == [ring.head for ring in rings]
        assert buffer.late == machine.late
        return machine


@given(cpus=st.integers(1, 4), steps=STEPS, max_delay=st.sampled_from([0, 5, 100]))
@settings(max_examples=300, deadline=None)
def test_everything_comes_once_whatever_interleaves(cpus: int, steps: list[Step], max_delay: int) -> None:
    """What is out of order between batches is counted, to the record."""
    run(cpus, steps, max_delay, unfinished_at_most=1 << 40)


@given(cpus=st.integers(1, 4), steps=STEPS, max_delay=st.sampled_from([5, 30]))
@settings(max_examples=300, deadline=None)
def test_within_max_delay_the_order_is_that_of_time(cpus: int, steps: list[Step], max_delay: int) -> None:
    """As long as no program takes longer to submit."""
    assert run(cpus, steps, max_delay, unfinished_at_most=max_delay).late == 0


def test_late_ones_are_counted() -> None:
    """The same, seen once where it happens: the slow CPU's record comes after a younger one."""
    steps = [
        ("stamp", 0, 8),
        ("later", 10, 0),
        ("stamp", 1, 8),
        ("finish", 1, 0),
        ("drain", 1, 0),
        ("finish", 0, 0),
    ]
    assert run(2, steps, 0, 1 << 40).late == 1
    assert run(2, steps, 100, 1 << 40).late == 0


def test_a_program_that_interrupts_another_one() -> None:
    """The interrupted one took its time first and comes second: put right in a batch, counted between two."""
    with perf_memory(1, PAGE) as (buffer, rings):
        for batch, late in (([5, 9, 7], 0), ([12, 8], 1), ([20, 13, 30], 1)):
            for time in batch:
                rings[0].put(perf_sample(time, struct.pack("<Q", time)))
            records = buffer.drain(1 << 18)
            assert records is not None
            assert [struct.unpack_from("<Q", sample)[0] for sample in samples(records)] == sorted(batch)
            assert buffer.late == late


@given(
    lengths=st.lists(st.lists(st.integers(0, 60_000), max_size=6), min_size=2, max_size=3),
    gap=st.integers(1, 50),
    limit=st.sampled_from([1, 1 << 17]),
)
@settings(max_examples=40, deadline=None)
def test_order_where_rings_are_read_in_parts(lengths: list[list[int]], gap: int, limit: int) -> None:
    """What is left in one ring may be older than what was copied from another."""
    with perf_memory(len(lengths), 1 << 19) as (buffer, rings):
        wanted = []
        for cpu, sizes in enumerate(lengths):
            for number, size in enumerate(sizes):
                time = 1 + number * (gap if cpu else 7) * 3 + cpu
                sample = struct.pack("<QH", time, cpu) + bytes(size)
                assert rings[cpu].put(perf_sample(time, sample))
                wanted.append((time, cpu, size))
        found: list[tuple[int, int]] = []
        while records := buffer.drain(limit):
            found += [struct.unpack_from("<QH", sample) for sample in samples(records)]
        assert found == [(time, cpu) for time, cpu, _ in sorted(wanted)]
        assert buffer.late == 0


BIG = """
struct big_t { char bytes[80000]; };
BPF_ARRAY(store, struct big_t, 1);
BPF_PERF_OUTPUT(output);
int hello(struct bpf_raw_tracepoint_args *ctx) {
    if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
        return 0;
    int zero = 0;
    struct big_t *big = store.lookup(&zero);
    if (big)
        output.perf_submit(ctx, big, SIZE);
    return 0;
}
"""


@pytest.mark.kernel
@pytest.mark.anyio
@pytest.mark.parametrize("size", [65508, 65520, 70000])
async def test_samples_whose_size_does_not_fit_into_their_header(size: int) -> None:
    """They lie over what comes after them, so nothing there can be told any more; and the stream can be left."""
    fits = size == 65508
    with flood.producing(cpu=0) as producer:
        flags = [f"-DTARGET={producer.pid}", f"-DGETPPID={GETPPID}", f"-DSIZE={size}"]
        async with BPF(text=BIG, cflags=flags) as bpf:
            events = bpf.events("output", buffer_size=1 << 20)
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="hello")
            await run_sync(make, producer, 2)
            bpf.detach()
            message = "submits more than 65508 bytes at a time does that"
            with nullcontext() if fits else pytest.raises(CorruptBufferError, match=message):
                async with events:
                    batch = await anext(events.batches())
                    assert list(map(len, samples(batch.records))) == [size, size]
        assert events.statistics().received == (2 if fits else 0)
