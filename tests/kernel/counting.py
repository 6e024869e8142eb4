"""Maps to test with, and programs that count a known number of calls in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from ebpfstream import descriptions
from ebpfstream.c_types import NUMBERS, CType, Record
from ebpfstream.kernel import bpf, maps
from ebpfstream.kernel.bpf import Map, MapType, Program, ProgramType, wait_for_running_programs
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Link, RawTracepoint
from ebpfstream.kernel.typedmap import TypedMap
from tests.kernel.flood import producing

TEXT: Final = Path(__file__).with_name("maps.c").read_text()


def typed(module: Module, name: str) -> TypedMap:
    made, described = module.maps[name], module.described[name]

    def parsed(description: Any, size: int) -> CType | None:
        return descriptions.parse(description, size) if description is not None and size else None

    return maps.typed(
        made, name, parsed(described.key, made.key_size), parsed(described.value, made.value_size)
    )


def simple(kind: MapType, value: str = "unsigned long long", entries: int = 10) -> TypedMap:
    """A map made here, of numbers."""
    values = descriptions.parse(value, NUMBERS[value][0])
    key_size = 0 if kind in (MapType.QUEUE, MapType.STACK) else 4
    made = Map.create("made", kind, key_size=key_size, value_size=values.size, max_entries=entries)
    return maps.typed(made, "made", descriptions.parse("unsigned int", 4) if key_size else None, values)


def event_type(struct: CType) -> Any:
    assert isinstance(struct, Record)
    return struct.event_type


def load(module: Module, name: str) -> Program:
    return Program.load(
        name, ProgramType.RAW_TRACEPOINT, module.functions[name], module.numbered, license="GPL"
    )


@contextmanager
def attached(module: Module, name: str) -> Iterator[Program]:
    """The program on sys_enter; when the block is left, none of it runs any more."""
    program = load(module, name)
    link = Link.attach(program, RawTracepoint("sys_enter"))
    try:
        yield program
    finally:
        link.close()
        wait_for_running_programs()
        program.close()


@contextmanager
def calling(targets: TypedMap, calls: int) -> Iterator[Callable[[], bool]]:
    """Processes that make so many calls of getppid(), on each CPU one; whether they still do."""
    with ExitStack() as stack:
        producers = [stack.enter_context(producing(cpu)) for cpu in bpf.online_cpus()]
        waiting = [threading.Thread(target=producer.wait) for producer in producers]
        for producer, thread in zip(producers, waiting, strict=True):
            targets[producer.pid] = 1
            producer.start(calls)
            thread.start()
        yield lambda: any(thread.is_alive() for thread in waiting)
        for thread in waiting:
            thread.join()
