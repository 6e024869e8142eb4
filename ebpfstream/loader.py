"""BPF: C text → compiled, loaded, attached; its outputs as streams, its maps by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final, Literal, Self, overload
from weakref import WeakSet

from anyio.to_thread import run_sync

from ebpfstream import descriptions
from ebpfstream.c_types import CType, Record
from ebpfstream.errors import (
    ArgumentError,
    CompileError,
    EventTypeError,
    NotOpenError,
    StreamBusyError,
)
from ebpfstream.events import E, Event
from ebpfstream.hooks import Hooks
from ebpfstream.kernel import buffers, compiler, maps
from ebpfstream.kernel.bpf import Map, MapType
from ebpfstream.kernel.buffers import Buffer
from ebpfstream.kernel.c_text import probed_tracepoints
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Hook, Link
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.ringbuf import RingBuffer
from ebpfstream.kernel.tracefs import tracepoint_id
from ebpfstream.kernel.typedmap import TypedMap
from ebpfstream.lost import Lost
from ebpfstream.names import did_you_mean, near
from ebpfstream.outputs import PROBE, Output, OutputTypes
from ebpfstream.programs import UserPrograms
from ebpfstream.snapshots import Snapshots
from ebpfstream.stream import LATENCY, EventStream, OnLost
from ebpfstream.trace_lines import TraceStream
from ebpfstream.turns import in_thread, to_the_end

_OUTPUTS: Final[dict[MapType, Literal["ring", "perf"]]] = {
    MapType.PERF_EVENT_ARRAY: "perf",
    MapType.RINGBUF: "ring",
}


class BPF(Hooks):
    """A BPF program of your own, in BCC's dialect of C; BCC's class of that name, asynchronous.

        async with BPF(text=HELLO) as bpf:
            bpf.attach_syscall("execve", fn_name="hello")
            async for event in bpf.events("output"):
                ...

    Entering the block compiles the text and makes its maps; leaving it detaches its programs, closes
    its streams (their statistics stay) and frees everything.  Methods raise NotOpenError outside of it.

    Programs whose names attach themselves in BCC (`kprobe__…`, `TRACEPOINT_PROBE` and so on) are
    attached when the block is entered if the text declares no output.  If it does, they are attached
    when the first stream (of events, trace lines or snapshots) is entered or iterated, so that nothing
    gets lost before there is a buffer; `attach()` does it before that.

    `src_file` is the text's file, beside which headers are looked for; `text` is the text itself, and
    headers are looked for in the working directory.  `cflags` are the compiler's.

    Linux ≥ 4.17.  Root, or CAP_BPF and CAP_PERFMON; before Linux 5.8, which does not have these two,
    CAP_SYS_ADMIN.
    """

    def __init__(
        self, src_file: str | os.PathLike[str] = "", *, text: str | bytes = "", cflags: Sequence[str] = ()
    ) -> None:
        if bool(src_file) is bool(text):
            raise ArgumentError("give BPF either text= or src_file=")
        if src_file:
            path = Path(src_file).absolute()
            try:
                text = path.read_text()
            except OSError as error:
                raise ArgumentError(f"{src_file} cannot be read: {error.strerror}") from error
            folder = path.parent
        else:
            folder = Path.cwd()
        self._text = text.decode() if isinstance(text, bytes) else text
        self._cflags = [f"-I{folder}", *cflags]
        self._types = OutputTypes(self._text)
        self._module: Module | None = None
        self._closed = False
        self._own_attached = False
        self._attaching = Lock()
        self._programs: UserPrograms | None = None
        self._typed: dict[str, TypedMap] = {}
        self._read: set[str] = set()  # outputs of which there is a stream
        self._streams: WeakSet[EventStream[Any] | Snapshots | TraceStream] = WeakSet()

    async def __aenter__(self) -> Self:
        if self._closed or self._module is not None:
            raise NotOpenError("this BPF was entered before: make a new one")
        # A map first: it tells at once whether this process may do any of it.
        Map.create("probe", MapType.ARRAY, key_size=4, value_size=4, max_entries=1).close()
        self._module = await self._compiled()
        self._programs = UserPrograms(self._module)
        if not any(made.type in _OUTPUTS for made in self._module.maps.values()):
            try:
                await in_thread(self.attach)
            except BaseException:
                await self.aclose()
                raise
        return self

    async def _compiled(self) -> Module:
        while probes := self._types.declarations:
            try:
                return await compiler.compile(self._text + probes, self._cflags)
            except CompileError as error:
                # A type may not be one outside of its function; else the text itself is wrong.
                if not self._types.without_failing(self._text, error.log):
                    break
        try:
            return await compiler.compile(self._text, self._cflags)
        except CompileError as error:
            refused = error
        # Of a tracepoint that there is not BCC says that a struct is incomplete.
        for category, name in probed_tracepoints(self._text):
            tracepoint_id(category, name)
        raise refused

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """What leaving the block does.  Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        await to_the_end(self._closing)

    async def _closing(self) -> None:
        async with AsyncExitStack() as stack:
            if self._module is not None and self._programs is not None:
                for made in self._module.maps.values():
                    stack.callback(made.close)
                stack.callback(self._programs.close)
            for stream in list(self._streams):
                stack.push_async_exit(stream)
            await run_sync(self._detach)

    def _detach(self) -> None:
        with self._attaching:  # what another thread is attaching, too
            if self._programs is not None:
                self._programs.detach()

    # --- what it declares

    def _opened(self) -> Module:
        if self._module is None or self._closed:
            raise NotOpenError("use BPF within its block: async with BPF(text=…) as bpf: …")
        return self._module

    @property
    def functions(self) -> list[str]:
        """The names of its programs."""
        return sorted(self._opened().functions)

    @property
    def outputs(self) -> dict[str, Literal["ring", "perf"]]:
        """The names of its outputs, each with its kind of buffer."""
        maps = self._opened().maps
        return {name: _OUTPUTS[made.type] for name, made in maps.items() if made.type in _OUTPUTS}

    @property
    def maps(self) -> Mapping[str, TypedMap]:
        """Its maps by name, those of outputs among them; their keys and values are Python's."""
        module = self._opened()
        for name in module.maps:
            if name not in self._typed and not name.startswith(PROBE):
                self._typed[name] = self._typed_map(name)
        return _Maps(self._typed)

    def _typed_map(self, name: str) -> TypedMap:
        made, described = self._opened().maps[name], self._opened().described[name]
        return maps.typed(
            made,
            name,
            _type(described.key, made.key_size, key=True),
            _type(described.value, made.value_size),
        )

    def event_type(self, output: str) -> type[Event]:
        """The dataclass of what is submitted to an output, derived from the text.  Raises EventTypeError."""
        self._output(output)
        return self._types.of(output, self._opened()).event_type

    def _output(self, name: str) -> Map:
        module = self._opened()
        outputs = self.outputs
        if name in module.maps and name not in outputs:
            raise ArgumentError(
                f"{name!r} is a map ({module.maps[name].type.name}), not an output: read bpf.maps[{name!r}], or "
                f"iterate bpf.snapshots({name!r})"
            )
        if name not in outputs:
            raise ArgumentError(
                f"the program declares no output {name!r}{did_you_mean(near(name, outputs))} "
                f"(it has {', '.join(outputs) or 'none'}: BPF_PERF_OUTPUT or BPF_RINGBUF_OUTPUT declares one)"
            )
        return module.maps[name]

    # --- streams

    @overload
    def events(
        self,
        output: str,
        event_type: type[E],
        *,
        latency: float = ...,
        buffer_size: int | None = ...,
        max_delay: float = ...,
        on_lost: Literal["count", "raise"] = ...,
    ) -> EventStream[E]: ...
    @overload
    def events(
        self,
        output: str,
        event_type: type[E],
        *,
        latency: float = ...,
        buffer_size: int | None = ...,
        max_delay: float = ...,
        on_lost: Literal["yield"],
    ) -> EventStream[E | Lost]: ...
    @overload
    def events(
        self,
        output: str,
        event_type: None = ...,
        *,
        latency: float = ...,
        buffer_size: int | None = ...,
        max_delay: float = ...,
        on_lost: OnLost = ...,
    ) -> EventStream[Any]: ...
    def events(
        self,
        output: str,
        event_type: type[Any] | None = None,
        *,
        latency: float = LATENCY,
        buffer_size: int | None = None,
        max_delay: float = 0,
        on_lost: OnLost = "count",
    ) -> EventStream[Any]:
        """What is submitted to an output, BPF_PERF_OUTPUT or BPF_RINGBUF_OUTPUT, as a stream of events.

        The type of the events is derived from the program's text, or is `event_type`, which is checked
        against that: offsets and sizes must agree, names need not.

        The buffer is opened by this call: whatever is submitted from then on is in the stream, or lost
        for want of room.  A perf buffer has `buffer_size` bytes in all (4 MiB unless told otherwise),
        and waits `max_delay` seconds for late records of other CPUs; a ring buffer's size is the text's.
        How many events a ring buffer had no room for only the program could tell, so the statistics
        say None, and `on_lost` (see EventStream) can be asked of a perf buffer alone.

        One stream at a time reads an output.  Closing it leaves the programs attached; `detach()`
        of the stream takes those off that submit to it.

        Raises ArgumentError for a name that there is not, EventTypeError for a type that is not the
        program's or cannot be derived, StreamBusyError if the output is being read.
        """
        made = self._output(output)
        if output in self._read:
            raise StreamBusyError(
                f"{output!r} is being read by another stream, and each record can be read once: close that one, "
                "or share its events"
            )
        if on_lost != "count" and made.type is MapType.RINGBUF:
            raise ArgumentError(
                f"{output!r} is a ring buffer, and of what it had no room for nobody tells: leave on_lost as it "
                "is, or use BPF_PERF_OUTPUT"
            )
        submitted: Record | None = None
        if event_type is None:
            event_type = self.event_type(output)
        else:
            with suppress(EventTypeError):  # what does not show cannot be checked
                submitted = self._types.of(output, self._opened())
        if submitted is not None:
            descriptions.check(event_type, submitted)
        source = Output(
            _buffer(made, output, buffer_size, max_delay),
            start=partial(in_thread, self.attach),
            submitters=partial(self._loaded().submitting_to, made),
            release=partial(self._read.discard, output),
        )
        try:
            stream: EventStream[Any] = EventStream(source, event_type, latency=latency, on_lost=on_lost)
        except ArgumentError:
            source.close()
            raise
        self._read.add(output)
        self._streams.add(stream)
        return stream

    def trace(self) -> TraceStream:
        """What programs print with bpf_trace_printk(), as a stream of TraceLine and Lost.

        The kernel has one pipe for all programs of the machine, and one reader of it at a time.  The first
        iteration raises StreamBusyError if there is another one, PrivilegeError and UnsupportedError if the pipe
        cannot be read, and what `attach` raises.
        """
        self._opened()
        lines = TraceStream(self.attach)
        self._streams.add(lines)
        return lines

    def snapshots(
        self, name: str, every: float = 2.0, *, drain: bool = False, per_cpu: bool = False
    ) -> Snapshots:
        """A map's contents every so many seconds, each time as a dict: a Snapshot.

        Of counters, `snapshot.since(earlier)` is what came between two, exactly.  `drain` takes what is
        read out of the map, which is exact for values that programs put there whole, and for queues; a
        program that is adding to a counter just then loses that addition.  Numbers that each CPU has one
        of are added up, unless `per_cpu` asks for all of them.

        Raises ArgumentError for a map that there is not, or `every` that is not more than 0; MapError for a map
        that cannot be read so.
        """
        snapshots = Snapshots(self.maps[name], every, drain=drain, per_cpu=per_cpu, on_start=self.attach)
        self._streams.add(snapshots)
        return snapshots

    # --- programs

    def attach(self) -> None:
        """Attach the programs that attach themselves by their names.  Again it does nothing.

        Raises AttachError, LoadError for a program that the kernel refuses, PrivilegeError; nothing stays attached
        then.
        """
        self._opened()
        with self._attaching:
            if self._own_attached:
                return
            links: list[Link] = []
            try:
                for function in self.functions:
                    hook = self._own_hook(function)
                    if hook is not None:
                        links.append(self._attach(function, hook))
            except BaseException:
                for link in links:
                    link.close()
                raise
            self._own_attached = True

    def detach(self) -> None:
        """Take all programs off their hooks: streams end with what was submitted before."""
        self._opened()
        self._own_attached = True  # or would be, at the next iteration
        self._detach()
        for stream in list(self._streams):
            if isinstance(stream, EventStream):
                stream.detach()

    def tail_calls(self, name: str, functions: Mapping[int, str]) -> None:
        """Let a program array call these functions: `{59: "hello_execve"}`.

        They are loaded as the kind of program that the callers are.  Called before the callers are
        attached, they are in place before the first call; called after, at once.

        Raises ArgumentError for an array, an index or a function that there is not, LoadError for a
        function that the kernel does not accept as that kind of program.
        """
        self._loaded().tail_calls(name, functions)

    def _attach(self, function: str, hook: Hook) -> Link:
        return self._loaded().attach(function, hook)

    def _attach_all(self, function: str, hooks: Iterable[Hook], which: str) -> Link:
        return self._loaded().attach_all(function, hooks, which)

    def _loaded(self) -> UserPrograms:
        self._opened()
        assert self._programs is not None
        return self._programs


class _Maps(dict[str, TypedMap]):
    """Says which maps there are when asked for another."""

    def __missing__(self, name: str) -> TypedMap:
        raise ArgumentError(
            f"the program declares no map {name!r}{did_you_mean(near(name, self))} (it has {', '.join(self) or 'none'})"
        )


def _type(description: Any, size: int, *, key: bool = False) -> CType | None:
    """None, which stands for bytes, where BCC does not describe it whole."""
    if description is None or not size:
        return None
    try:
        return descriptions.parse(description, size, key=key)
    except EventTypeError:
        return None


def _buffer(made: Map, name: str, size: int | None, max_delay: float) -> Buffer:
    if made.type is MapType.RINGBUF:
        if size is not None or max_delay:
            raise ArgumentError(
                f"{name!r} is a ring buffer of {made.max_entries} bytes, as its text says, and is in order: "
                "buffer_size and max_delay are for perf buffers"
            )
        return RingBuffer(made.duplicate())
    size = buffers.SIZE if size is None else size
    buffers.check("perf", size)
    return PerfBuffer(made.duplicate(), size, max_delay=max_delay)
