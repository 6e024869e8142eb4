"""The outputs of a program of the user's: what type each is given, and how a stream of it is fed."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Final

from ebpfstream import descriptions
from ebpfstream.c_types import CType, Field, Record
from ebpfstream.errors import EventTypeError, UnsupportedError
from ebpfstream.filters import Filters
from ebpfstream.kernel.bpf import Program
from ebpfstream.kernel.buffers import Buffer
from ebpfstream.kernel.c_text import Submission, submissions
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Link
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.lost import Lost
from ebpfstream.readymade import Counters, total_misses
from ebpfstream.records import Records

PROBE: Final = "ebpfstream_type_"
_ERROR_LINE: Final = re.compile(r"main\.c:(\d+):\d+: error:")


class OutputTypes:
    """Finds out what a program submits to its outputs.

    BCC describes the types of maps whole, and of what is submitted only the fields' names.  So behind the
    program's text, `declarations` declare a map of each type that the text shows to be submitted.
    """

    def __init__(self, text: str) -> None:
        self._submissions = submissions(text)
        self._known: dict[str, Record] = {}
        shown = {(one.type, one.length) for one in self._submissions if one.type}
        self._probes: dict[tuple[str | None, str | None], str] = {
            what: f"{PROBE}{number}" for number, what in enumerate(sorted(shown, key=str))
        }

    @property
    def declarations(self) -> str:
        """C text to stand behind the program's."""
        return "".join(f"\n{self._declaration(*what, name)}" for what, name in self._probes.items())

    def _declaration(self, item: str | None, length: str | None, name: str) -> str:
        if length is None:
            return f'BPF_TABLE("hash", u32, {item}, {name}, 1);'
        array = f"struct {name}_array"
        return f'{array} {{ {item} value[{length}]; }}; BPF_TABLE("hash", u32, {array}, {name}, 1);'

    def without_failing(self, text: str, log: str) -> bool:
        """Declare no more what the compiler refused behind this text, by its log; whether that is some, not all."""
        first = text.count("\n") + 2
        failing = {int(line) - first for line in _ERROR_LINE.findall(log)}
        kept = {what: name for index, (what, name) in enumerate(self._probes.items()) if index not in failing}
        some = 0 < len(kept) < len(self._probes)
        self._probes = kept if some else {}
        return some

    def of(self, output: str, module: Module) -> Record:
        """The type of an output's events.  Raises EventTypeError, which says what could not be found out."""
        if output not in self._known:
            self._known[output] = self._derived(output, module)
        return self._known[output]

    def _derived(self, output: str, module: Module) -> Record:
        here = [one for one in self._submissions if one.output == output]
        if not here:
            raise _unknown(output, "the text does not show what is submitted to it")
        unclear = [one for one in here if not one.type]
        if unclear:
            raise _unknown(output, f"{_places(unclear)}: the type of that does not show")
        types = {(one.type, one.length) for one in here}
        if len(types) > 1:
            first_of_each = {(one.type, one.length): one for one in reversed(here)}.values()
            raise _unknown(
                output, f"it is given several: {_places(reversed(first_of_each), with_types=True)}"
            )
        name = self._probes.get(types.pop())
        if name not in module.maps:
            raise _unknown(
                output, f"{here[0].type} (line {here[0].line}) is no type outside of that function"
            )
        found = descriptions.parse(module.described[name].value, module.maps[name].value_size)
        record = found if isinstance(found, Record) else _alone(output, found)
        fields = [field for field in module.described[output].fields if field]
        if not set(fields) <= {field.name.rstrip("_") for field in record.fields} | {
            f.name for f in record.fields
        }:
            raise _unknown(
                output,
                f"{_places(here[:1])} looks like {here[0].type}, but BCC sees the fields {', '.join(fields)}",
            )
        return record


def _alone(output: str, type: CType) -> Record:
    """A number that is submitted without a struct around it."""
    return Record(output, [Field("value", type, 0)], type.size, type.alignment, union=False)


def _places(found: Iterable[Submission], *, with_types: bool = False) -> str:
    return ", ".join(
        (f"{one.type} in " if with_types else "") + f"line {one.line} ({one.expression})" for one in found
    )


def _unknown(output: str, why: str) -> EventTypeError:
    return EventTypeError(
        f"the event type of {output!r} cannot be derived: {why}. Give one: events({output!r}, YourEvent)"
    )


class Output:
    """An output of a loaded program, as the source of a stream."""

    def __init__(
        self,
        buffer: Buffer,
        *,
        start: Callable[[], Awaitable[None]],
        submitters: Callable[[], tuple[list[Program], list[Link]]],
        release: Callable[[], None],
    ) -> None:
        self.buffer = buffer
        self._start = start
        self._submitters = submitters
        self._release = release
        self._told: dict[int, int] = {}

    async def open(self) -> Buffer:
        """Attach the programs that attach themselves, now that there is a buffer."""
        await self._start()
        return self.buffer

    def detach(self) -> None:
        """Take the programs that submit to this output off their hooks."""
        _, links = self._submitters()
        for link in links:
            link.close()

    def stop(self) -> None:
        """Let nothing new come in, where that can be; programs stay attached, others may read what else they do."""
        self.buffer.unplug()

    def counters(self) -> Counters:
        """What the kernel tells: a perf buffer's losses, runs that were skipped.  The rest nobody counts."""
        programs, _ = self._submitters()
        return Counters(
            rejected=None,
            tried=None,
            skipped=None,
            submitted=None,
            lost=self.buffer.lost,
            lost_full=None,
            lost_too_large=None,
            lost_no_buffer=None,
            lost_otherwise=None,
            misses=total_misses(programs),
        )

    def pause(self, paused: bool) -> None:
        """Cannot be: the program is the user's."""
        raise UnsupportedError(
            "a program of yours cannot be paused, only detached: close the links that attaching it returned, and "
            "attach it again"
        )

    def drained(self) -> None:
        """Nobody is to be told."""

    def losses(self, records: Records | None, time: datetime) -> tuple[Lost, ...]:
        """What the kernel says it had no room for since it was last asked; of a ring buffer it says nothing."""
        lost = self.buffer.lost_by_cpu() if isinstance(self.buffer, PerfBuffer) else {}
        new = {cpu: count - self._told.get(cpu, 0) for cpu, count in lost.items()}
        self._told = lost
        return tuple(Lost(cpu, count, time=time) for cpu, count in new.items() if count > 0)

    def set_filters(self, filters: Filters) -> None:
        """There are none: the program is the user's."""
        raise UnsupportedError(
            "filters work in the ready-made programs only; this one is yours: filter in its text"
        )

    def close(self) -> None:
        """Give up the buffer; the map stays with its program."""
        self.buffer.close()
        self._release()
