"""C text → compiled, loaded, attached, its maps by name."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from ebpfstream.events import Event, c_struct
from ebpfstream.kernel import compiler
from ebpfstream.kernel.bpf import Link, Map, MapType, Program, ProgramType
from ebpfstream.kernel.ringbuf import RingBuffer

BPF_FOLDER: Final = Path(__file__).parent / "bpf"

# The numbers by which ebpfstream.h knows its maps; far from those that BCC gives to its own.
_OUTPUT, _COUNTERS, _SCRATCH = 0x5EB0000, 0x5EB0001, 0x5EB0002
_SCRATCH_SIZE: Final = 32768  # SCRATCH_SIZE in ebpfstream.h
_COUNTERS_LAYOUT: Final = struct.Struct("<QQQ")  # struct counters in ebpfstream.h


class Counters(NamedTuple):
    """What the programs themselves counted, over all CPUs."""

    tried: int = 0
    submitted: int = 0
    lost: int = 0
    misses: int | None = 0


class ReadyMade:
    """A program that keeps to `bpf/ebpfstream.h`, as the source of a stream.

    `path` is its text; `hooks` say which of its functions is attached to which raw tracepoint.
    """

    def __init__(
        self, path: Path, event_type: type[Event], hooks: Mapping[str, str], buffer_size: int
    ) -> None:
        self._path = path
        self._event_type = event_type
        self._hooks = hooks
        self._buffer_size = buffer_size
        self._owned = ExitStack()
        self._programs: list[Program] = []
        self._links: list[Link] = []
        self._counters: Map | None = None

    async def open(self) -> RingBuffer:
        """Compile, load and attach; from its return on, every event is in the buffer or counted."""
        try:
            return await self._open()
        except BaseException:
            self.close()
            raise

    async def _open(self) -> RingBuffer:
        # The maps first: they tell at once whether this process may do any of it.
        buffer = RingBuffer.create(self._buffer_size)
        self._owned.callback(buffer.close)
        self._counters = self._per_cpu_map("counters", _COUNTERS_LAYOUT.size)
        maps = {
            _OUTPUT: buffer.map,
            _COUNTERS: self._counters,
            _SCRATCH: self._per_cpu_map("scratch", _SCRATCH_SIZE),
        }
        module = await compiler.compile(
            c_struct(self._event_type) + self._path.read_text(),
            [f"-I{BPF_FOLDER}", f"-DOUTPUT={_OUTPUT}", f"-DCOUNTERS={_COUNTERS}", f"-DSCRATCH={_SCRATCH}"],
        )
        for function in self._hooks:
            program = Program.load(
                function,
                ProgramType.RAW_TRACEPOINT,
                module.functions[function],
                maps,
                license=module.license,
                kernel_version=module.kernel_version,
            )
            self._owned.callback(program.close)
            self._programs.append(program)
        for program in self._programs:
            link = Link.raw_tracepoint(program, self._hooks[program.name])
            self._owned.callback(link.close)
            self._links.append(link)
        return buffer

    def _per_cpu_map(self, name: str, value_size: int) -> Map:
        made = Map.create(
            name, MapType.PERCPU_ARRAY, key_size=4, value_size=value_size, max_entries=len(self._hooks)
        )
        self._owned.callback(made.close)
        return made

    def detach(self) -> None:
        """Let no further run of the programs begin; those that are running may still submit."""
        for link in self._links:
            link.close()

    def counters(self) -> Counters:
        """What the programs counted so far; exact once none of them runs any more."""
        if self._counters is None:
            return Counters()
        tried = submitted = lost = 0
        for index in range(self._counters.max_entries):
            values = self._counters.lookup(struct.pack("<I", index)) or b""
            for on_cpu in _COUNTERS_LAYOUT.iter_unpack(values):
                tried, submitted, lost = tried + on_cpu[0], submitted + on_cpu[1], lost + on_cpu[2]
        misses = [program.recursion_misses() for program in self._programs]
        known = [count for count in misses if count is not None]
        return Counters(tried, submitted, lost, sum(known) if len(known) == len(misses) else None)

    def close(self) -> None:
        """Give everything back to the kernel, attached or not."""
        self._owned.close()
