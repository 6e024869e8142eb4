"""C text → compiled, loaded, attached, its maps by name."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from anyio.to_thread import run_sync

from ebpfstream.errors import ArgumentError
from ebpfstream.events import Event, c_struct
from ebpfstream.filters import SIZE as FILTERS_SIZE
from ebpfstream.filters import Filters
from ebpfstream.kernel import buffers, compiler
from ebpfstream.kernel.bpf import Map, MapType, Program, ProgramType
from ebpfstream.kernel.buffers import Buffer, Kind
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Hook, Link, RawTracepoint

BPF_FOLDER: Final = Path(__file__).parent / "bpf"

# The numbers by which bpf/*.h know their maps; far from those that BCC gives to its own.
_OUTPUT, _COUNTERS, _SCRATCH, _FILTERS = (0x5EB0000 + number for number in range(4))
_SCRATCH_SIZE: Final = 32768  # SCRATCH_SIZE in ebpfstream.h
_COUNTERS_LAYOUT: Final = struct.Struct("<QQQQ")  # struct counters in ebpfstream.h


class Counters(NamedTuple):
    """What the programs themselves counted, over all CPUs."""

    rejected: int = 0
    tried: int = 0
    submitted: int = 0
    lost: int = 0
    misses: int | None = 0


class ReadyMade:
    """A program that keeps to `bpf/ebpfstream.h`, as the source of a stream.

    `path` is its text; `hooks` say which of its functions is attached where, in the order of the
    programs' numbers.
    """

    def __init__(
        self,
        path: Path,
        event_type: type[Event],
        hooks: Mapping[str, Hook],
        *,
        cflags: Sequence[str] = (),
        filters: Filters | None = None,
        buffer: Kind = "auto",
        buffer_size: int = buffers.SIZE,
        max_delay: float = 0,
    ) -> None:
        buffers.check(buffer, buffer_size)
        if not max_delay >= 0:
            raise ArgumentError(f"max_delay={max_delay!r} is impossible: give seconds, 0 or more")
        self._path = path
        self._event_type = event_type
        self._hooks = hooks
        self._cflags = cflags
        self._filters = filters or Filters()
        self._buffer = (buffer, buffer_size, max_delay)
        self._owned = ExitStack()
        self._programs: list[Program] = []
        self._links: list[Link] = []
        self._counters: Map | None = None
        self._filters_map: Map | None = None

    async def open(self) -> Buffer:
        """Compile, load and attach; from its return on, every event is in the buffer or counted."""
        try:
            return await self._open()
        except BaseException:
            self.close()
            raise

    async def _open(self) -> Buffer:
        # The maps first: they tell at once whether this process may do any of it.
        buffer = buffers.create(*self._buffer)
        self._owned.callback(buffer.close)
        self._counters = self._per_cpu_map("counters", _COUNTERS_LAYOUT.size)
        self._filters_map = Map.create(
            "filters", MapType.HASH, key_size=4, value_size=FILTERS_SIZE, max_entries=1
        )
        self._owned.callback(self._filters_map.close)
        self.set_filters(self._filters)
        maps = {
            _OUTPUT: buffer.map,
            _COUNTERS: self._counters,
            _SCRATCH: self._per_cpu_map("scratch", _SCRATCH_SIZE),
            _FILTERS: self._filters_map,
        }
        numbers = {"OUTPUT": _OUTPUT, "COUNTERS": _COUNTERS, "SCRATCH": _SCRATCH, "FILTERS": _FILTERS}
        flags = [
            f"-I{BPF_FOLDER}",
            *(f"-D{name}={number}" for name, number in numbers.items()),
            *self._cflags,
        ]
        if buffer.map.type is MapType.PERF_EVENT_ARRAY:
            flags.append("-DPERF_BUFFER")
        module = await compiler.compile(c_struct(self._event_type) + self._path.read_text(), flags)
        # Verifying takes the kernel some 100 ms, in which other tasks want to run.
        await run_sync(self._attach, module, maps)
        return buffer

    def _attach(self, module: Module, maps: Mapping[int, Map]) -> None:
        for function, hook in self._hooks.items():
            program = Program.load(
                function,
                ProgramType.RAW_TRACEPOINT if isinstance(hook, RawTracepoint) else ProgramType.TRACEPOINT,
                module.functions[function],
                maps,
                license=module.license,
                kernel_version=module.kernel_version,
            )
            self._owned.callback(program.close)
            self._programs.append(program)
        for program in self._programs:
            link = Link.attach(program, self._hooks[program.name])
            self._owned.callback(link.close)
            self._links.append(link)

    def _per_cpu_map(self, name: str, value_size: int) -> Map:
        made = Map.create(
            name, MapType.PERCPU_ARRAY, key_size=4, value_size=value_size, max_entries=len(self._hooks)
        )
        self._owned.callback(made.close)
        return made

    def set_filters(self, filters: Filters) -> None:
        """Let the programs leave out what does not meet these, from now on.  Raises ArgumentError."""
        packed = filters.pack()
        if self._filters_map is not None:
            self._filters_map.update(bytes(4), packed)
        self._filters = filters

    def detach(self) -> None:
        """Let no further run of the programs begin; those that are running may still submit."""
        for link in self._links:
            link.close()

    def counters(self) -> Counters:
        """What the programs counted so far; exact once none of them runs any more."""
        if self._counters is None:
            return Counters()
        totals = [0] * 4
        for index in range(self._counters.max_entries):
            values = self._counters.lookup(struct.pack("<I", index)) or b""
            for on_cpu in _COUNTERS_LAYOUT.iter_unpack(values):
                totals = [total + count for total, count in zip(totals, on_cpu, strict=True)]
        misses = [program.recursion_misses() for program in self._programs]
        known = [count for count in misses if count is not None]
        rejected, tried, submitted, lost = totals
        return Counters(rejected, tried, submitted, lost, sum(known) if len(known) == len(misses) else None)

    def close(self) -> None:
        """Give everything back to the kernel, attached or not."""
        self._counters = self._filters_map = None
        self._programs.clear()
        self._links.clear()
        self._owned.close()
