"""The programs that come with the library: compiled, their maps made, attached, counted."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypedDict

from ebpfstream.errors import ArgumentError, LoadError
from ebpfstream.events import Event, c_struct
from ebpfstream.filters import SIZE as FILTERS_SIZE
from ebpfstream.filters import Filters
from ebpfstream.kernel import buffers, compiler
from ebpfstream.kernel.bpf import Map, MapType, Program, ProgramType, map_numbers, possible_cpu_list
from ebpfstream.kernel.buffers import Buffer, Kind
from ebpfstream.kernel.compiled import Kept
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Hook, Link, program_type
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.losses import Gaps
from ebpfstream.lost import Lost
from ebpfstream.records import Records
from ebpfstream.turns import in_thread

BPF_FOLDER: Final = Path(__file__).parent / "bpf"
CALLS: Final = 1024
"""How many slots the program array has through which programs call others."""

# The first of the numbers by which the texts know their maps; far from those that BCC gives to its own.
_FIRST_NUMBER: Final = 0x5EB0000
_USUAL_MAPS: Final = ("OUTPUT", "COUNTERS", "SCRATCH", "FILTERS", "CONTROL", "CALLS")  # in bpf/*.h
_SCRATCH_SIZE: Final = 32768  # SCRATCH_SIZE in ebpfstream.h
_COUNTERS_LAYOUT: Final = struct.Struct("<9QIII4x")  # struct counters in ebpfstream.h
_SEQUENCE, _ERROR = 8, 9  # in there
_CONTROL_LAYOUT: Final = struct.Struct("<IIQQQ")  # struct control in ebpfstream.h


class Counters(NamedTuple):
    """What the programs themselves counted, over all CPUs; None where nobody counts.  Names are those of Statistics."""

    rejected: int | None = 0
    tried: int | None = 0
    skipped: int | None = 0
    submitted: int | None = 0
    lost: int | None = 0
    lost_full: int | None = 0
    lost_too_large: int | None = 0
    lost_no_buffer: int | None = 0
    lost_otherwise: int | None = 0
    lost_errno: int = 0
    misses: int | None = 0


class Sampling(NamedTuple):
    """One event in `one_in` is kept from when `high` of the buffer is filled until only `low` is; both 0 to 1."""

    one_in: int = 10
    high: float = 0.5
    low: float = 0.125

    def check(self) -> None:
        """Raise ArgumentError for what cannot be."""
        if not (2 <= self.one_in < 1 << 32 and 0 <= self.low < self.high <= 1):
            raise ArgumentError(f"{self} is impossible: one_in is 2 or more, and 0 <= low < high <= 1")


Overload = Literal["lose", "sample"] | Sampling
"""What becomes of events while the buffer is filling up."""


def _sampling_of(overload: Overload) -> Sampling | None:
    """The sampling that is meant.  Raises ArgumentError."""
    if overload == "lose":
        return None
    sampling = Sampling() if overload == "sample" else overload
    if not isinstance(sampling, Sampling):
        raise ArgumentError(f'overload={overload!r} is unknown: give "lose", "sample" or Sampling(…)')
    sampling.check()
    return sampling


class Options(TypedDict, total=False):
    """What all ready-made streams can be told."""

    pid: int | None
    ppid: int | None
    uid: int | None
    gid: int | None
    comm: str | None
    cgroup: str | None
    exclude_self: bool
    buffer: Kind
    buffer_size: int
    max_delay: float
    overload: Overload
    latency: float


def total_misses(programs: Sequence[Program]) -> int | None:
    """Runs of all of them that the kernel skipped; None if it does not tell of one."""
    misses = [program.recursion_misses() for program in programs]
    known = [count for count in misses if count is not None]
    return sum(known) if len(known) == len(misses) else None


class MapSpec(NamedTuple):
    """A map that a text has beside the usual ones."""

    type: MapType
    key_size: int
    value_size: int
    max_entries: int


class Programs:
    """The programs of one text that keeps to `bpf/ebpfstream.h`.

    `path` is the text; `hooks` say which of its functions is attached where, in the order of the
    programs' numbers, and None of one that programs at raw tracepoints call: `calls` says by which slots
    of CALLS.  They are attached in that order.  `maps` are maps of the text's own by the names it has for them;
    those that the programs use are made.
    """

    def __init__(
        self,
        path: Path,
        hooks: Mapping[str, Hook | None],
        *,
        cflags: Sequence[str] = (),
        filters: Filters | None = None,
        maps: Mapping[str, MapSpec] | None = None,
        calls: Mapping[int, str] | None = None,
    ) -> None:
        self._path = path
        self._hooks = hooks
        self._cflags = cflags
        self._filters = filters or Filters()
        self._specs = maps or {}
        self._calls = calls or {}
        self._owned = ExitStack()
        self._maps: dict[str, Map] = {}
        self._counters: Map | None = None
        self._paused = False
        self._programs: list[Program] = []
        self._links: list[Link] = []

    async def attach(self) -> None:
        """Compile, load and attach; from its return on, nothing is missed."""
        try:
            await self._attach("", {}, [])
        except BaseException:
            self.close()
            raise

    async def _attach(self, declarations: str, maps: Mapping[str, Map], cflags: Sequence[str]) -> None:
        self._maps.update(maps)
        self._counters = self._make(
            "COUNTERS", MapSpec(MapType.PERCPU_ARRAY, 4, _COUNTERS_LAYOUT.size, len(self._hooks))
        )
        self._make("FILTERS", MapSpec(MapType.HASH, 4, FILTERS_SIZE, 1))
        self.set_filters(self._filters)
        self._make("CONTROL", MapSpec(MapType.ARRAY, 4, _CONTROL_LAYOUT.size, 1))
        self._control()
        numbers = {name: _FIRST_NUMBER + index for index, name in enumerate([*_USUAL_MAPS, *self._specs])}
        flags = [
            f"-I{BPF_FOLDER}",
            *(f"-D{name}={number}" for name, number in numbers.items()),
            *cflags,
            *self._cflags,
        ]
        text = declarations + self._path.read_text()
        kept = await in_thread(Kept, text, flags)
        # Verifying takes the kernel some 100 ms, in which other tasks want to run.
        if not await in_thread(self._load_kept, kept, numbers):
            module = await compiler.compile(text, flags)
            await in_thread(self._load, module, numbers)
            await in_thread(kept.keep, module)
        await in_thread(self._link)  # last: what happens from now on is the caller's

    def _make(self, name: str, spec: MapSpec) -> Map:
        kind, key_size, value_size, max_entries = spec
        made = Map.create(
            name.lower(), kind, key_size=key_size, value_size=value_size, max_entries=max_entries
        )
        self._owned.callback(made.close)
        self._maps[name] = made
        return made

    def _load_kept(self, kept: Kept, numbers: Mapping[str, int]) -> bool:
        """Load what was compiled before; False if it is not there, or the kernel refuses it."""
        module = kept.find()
        if module is None:
            return False
        try:
            self._load(module, numbers)
        except LoadError:  # whatever is wrong with it, one compiled now may be right, or say why not
            for program in self._programs:
                program.close()
            self._programs.clear()
            return False
        return True

    def _load(self, module: Module, numbers: Mapping[str, int]) -> None:
        used = set().union(*(map_numbers(module.functions[function]) for function in self._hooks))
        specs = {
            "SCRATCH": MapSpec(MapType.PERCPU_ARRAY, 4, _SCRATCH_SIZE, len(self._hooks)),
            "CALLS": MapSpec(MapType.PROG_ARRAY, 4, 4, CALLS),
            **self._specs,
        }
        for name, spec in specs.items():
            if numbers[name] in used and name not in self._maps:
                self._make(name, spec)
        maps = {number: self._maps[name] for name, number in numbers.items() if name in self._maps}
        for function, hook in self._hooks.items():
            program = Program.load(
                function,
                program_type(hook) if hook is not None else ProgramType.RAW_TRACEPOINT,
                module.functions[function],
                maps,
                license=module.license,
                kernel_version=module.kernel_version,
            )
            self._owned.callback(program.close)
            self._programs.append(program)
        called = {program.name: struct.pack("<I", program.fd) for program in self._programs}
        for slot, function in self._calls.items():
            self._maps["CALLS"].update(struct.pack("<I", slot), called[function])

    def _link(self) -> None:
        for program in self._programs:
            hook = self._hooks[program.name]
            if hook is not None:
                link = Link.attach(program, hook)
                self._owned.callback(link.close)
                self._links.append(link)

    def map(self, name: str) -> Map | None:
        """The map that the text has by this name; None before `attach` and after `close`."""
        return self._maps.get(name)

    def set_filters(self, filters: Filters) -> None:
        """Let the programs leave out what does not meet these, from now on.  Raises ArgumentError."""
        packed = filters.pack()
        if "FILTERS" in self._maps:
            self._maps["FILTERS"].update(bytes(4), packed)
        self._filters = filters

    def pause(self, paused: bool) -> None:
        """Let the programs skip, and count, every event; or no longer."""
        self._paused = paused
        self._control()

    def _control(self, one_in: int = 1, high: int = 0, low: int = 0, fill: int = 0) -> None:
        if "CONTROL" in self._maps:
            value = _CONTROL_LAYOUT.pack(self._paused, one_in, high, low, fill)
            self._maps["CONTROL"].update(bytes(4), value)

    def detach(self) -> None:
        """Let no further run of the programs begin; those that are running may still submit."""
        for link in self._links:
            link.close()

    def counters(self) -> Counters:
        """What the programs counted so far; exact once none of them runs any more."""
        if self._counters is None:
            return Counters()
        totals = [0] * 8
        error = 0
        for _, values in self._each_counters():
            totals = [total + count for total, count in zip(totals, values, strict=False)]
            error = values[_ERROR] or error
        counts, lost = totals[:4], totals[4:]
        return Counters._make((*counts, sum(lost), *lost, error, total_misses(self._programs)))

    def numbers(self) -> dict[tuple[int, int], int]:
        """The number that the next event would have, for each CPU and program."""
        return {key: values[_SEQUENCE] for key, values in self._each_counters()}

    def _each_counters(self) -> Iterator[tuple[tuple[int, int], tuple[int, ...]]]:
        """The counters of each CPU and program."""
        if self._counters is not None:
            for program in range(self._counters.max_entries):
                values = self._counters.lookup(struct.pack("<I", program)) or b""
                for cpu, counters in zip(
                    possible_cpu_list(), _COUNTERS_LAYOUT.iter_unpack(values), strict=True
                ):
                    yield (cpu, program), counters

    def close(self) -> None:
        """Give everything back to the kernel, attached or not."""
        self._counters = None
        self._maps.clear()
        self._programs.clear()
        self._links.clear()
        self._owned.close()


class ReadyMade(Programs):
    """Programs that submit events of one type, as the source of a stream."""

    buffer: Buffer | None = None  # until it is opened

    def __init__(
        self,
        path: Path,
        event_type: type[Event],
        hooks: Mapping[str, Hook | None],
        *,
        cflags: Sequence[str] = (),
        filters: Filters | None = None,
        maps: Mapping[str, MapSpec] | None = None,
        calls: Mapping[int, str] | None = None,
        buffer: Kind = "auto",
        buffer_size: int = buffers.SIZE,
        max_delay: float = 0,
        overload: Overload = "lose",
    ) -> None:
        super().__init__(path, hooks, cflags=cflags, filters=filters, maps=maps, calls=calls)
        buffers.check(buffer, buffer_size)
        if not max_delay >= 0:
            raise ArgumentError(f"max_delay={max_delay!r} is impossible: give seconds, 0 or more")
        self._event_type = event_type
        self._wanted = (buffer, buffer_size, max_delay)
        self._sampling = _sampling_of(overload)
        self._opened: Buffer | None = None
        self._gaps: Gaps | None = None

    async def open(self) -> Buffer:
        """Compile, load and attach; from its return on, every event is in the buffer or counted."""
        try:
            # The maps first: they tell at once whether this process may do any of it.
            buffer = buffers.create(*self._wanted)
            self._owned.callback(buffer.close)
            self._opened = buffer
            flags = ["-DPERF_BUFFER"] if buffer.map.type is MapType.PERF_EVENT_ARRAY else []
            await self._attach(c_struct(self._event_type), {"OUTPUT": buffer.map}, flags)
        except BaseException:
            self.close()
            raise
        return buffer

    def _control(self, one_in: int = 1, high: int = 0, low: int = 0, fill: int = 0) -> None:
        if self._opened is not None and self._sampling is not None and "CONTROL" in self._maps:
            filled, room = self._opened.fill()
            one_in, high, low = self._sampling.one_in, *(round(part * room) for part in self._sampling[1:])
            fill = filled
        super()._control(one_in, high, low, fill)

    def losses(self, records: Records | None, time: datetime) -> tuple[Lost, ...]:
        """What is missing before and among these, or with None, at the end of all."""
        if self._gaps is None:
            self._gaps = Gaps(self._event_type)
        if records is not None:
            return self._gaps.find(records, time)
        return self._gaps.rest(self.numbers(), time)

    def drained(self) -> None:
        """Tell the programs of a perf buffer how full it is; those of a ring buffer see that for themselves."""
        if self._sampling is not None and isinstance(self._opened, PerfBuffer):
            self._control()

    def stop(self) -> None:
        """The same as `detach`: what the programs submit is for this stream alone."""
        self.detach()
