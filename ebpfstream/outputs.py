"""The outputs of a program of the user's: what type each is given, and how a stream of it is fed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
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
from ebpfstream.readymade import Counters

PROBE: Final = "ebpfstream_type_"


class OutputTypes:
    """Finds out what a program submits to its outputs.

    BCC describes the types of maps whole, and of what is submitted only the fields' names.  So behind the
    program's text, `declarations` declare a map of each type that the text shows to be submitted.
    """

    def __init__(self, text: str) -> None:
        self._submissions = submissions(text)
        self._known: dict[str, Record] = {}
        shown = {(one.type, one.length) for one in self._submissions if one.type}
        self._probes = {what: f"{PROBE}{number}" for number, what in enumerate(sorted(shown, key=str))}

    @property
    def declarations(self) -> str:
        """C text to stand behind the program's."""
        lines = [""]
        for (item, length), name in self._probes.items():
            if length is not None:
                lines.append(f"struct {name}_array {{ {item} value[{length}]; }};")
            value = item if length is None else f"struct {name}_array"
            lines.append(f'BPF_TABLE("hash", u32, {value}, {name}, 1);')
        return "\n".join(lines) + "\n" if self._probes else ""

    def shows(self, output: str) -> bool:
        """Whether the text shows the type of all that is submitted to an output."""
        return all(one.type for one in self._submissions if one.output == output)

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
        name = next(name for what, name in self._probes.items() if what in types)
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
        misses = [program.recursion_misses() for program in programs]
        known = [count for count in misses if count is not None]
        return Counters(
            rejected=None,
            tried=None,
            submitted=None,
            lost=self.buffer.lost,
            misses=sum(known) if len(known) == len(misses) else None,
        )

    def set_filters(self, filters: Filters) -> None:
        """There are none: the program is the user's."""
        raise UnsupportedError(
            "filters work in the ready-made programs only; this one is yours: filter in its text"
        )

    def close(self) -> None:
        """Give up the buffer; the map stays with its program."""
        self.buffer.close()
        self._release()
