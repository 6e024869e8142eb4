"""Anybody's BPF C file, attached as text says, as a stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ebpfstream.errors import ArgumentError
from ebpfstream.loader import BPF
from ebpfstream.names import did_you_mean, near
from ebpfstream.stream import LATENCY, EventStream

_Attach = Callable[[BPF, str, str], object]

# Of `KIND:WHERE=FUNCTION`: what BPF's method is given.
_KINDS: Final[dict[str, _Attach]] = {
    "syscall": lambda bpf, where, function: bpf.attach_syscall(where, function),
    "tracepoint": lambda bpf, where, function: bpf.attach_tracepoint(where, fn_name=function),
    "raw_tracepoint": lambda bpf, where, function: bpf.attach_raw_tracepoint(where, function),
    "kprobe": lambda bpf, where, function: bpf.attach_kprobe(where, fn_name=function),
    "kretprobe": lambda bpf, where, function: bpf.attach_kretprobe(where, function),
    "uprobe": lambda bpf, where, function: bpf.attach_uprobe(*_symbol(where), fn_name=function),
    "uretprobe": lambda bpf, where, function: bpf.attach_uretprobe(*_symbol(where), fn_name=function),
}


class ProgramFile:
    """A file of BCC's C, one of whose outputs is a stream when this is entered.

        async with ProgramFile(Path("hello.c"), ["syscall:execve=hello"]) as events:
            async for event in events: ...

    `hooks` say what is attached where: KIND:WHERE=FUNCTION, with `syscall:NAME`, `tracepoint:CATEGORY:NAME`,
    `raw_tracepoint:NAME`, `kprobe:NAME`, `kretprobe:NAME`, `uprobe:PATH:SYMBOL` or `uretprobe:PATH:SYMBOL`.
    `output` may be left out where there is one only; `buffer_size` and `latency` are those of `BPF.events`.

    Raises ArgumentError at once for hooks that are none; when it is entered, and when the stream is, what BPF and its
    methods raise.
    """

    def __init__(
        self,
        file: Path,
        hooks: Sequence[str] = (),
        *,
        output: str | None = None,
        cflags: Sequence[str] = (),
        buffer_size: int | None = None,
        latency: float = LATENCY,
    ) -> None:
        self._file = file
        self._hooks = [_parsed(hook) for hook in hooks]
        self._output = output
        self._cflags = cflags
        self._buffer_size = buffer_size
        self._latency = latency
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> EventStream[Any]:
        async with AsyncExitStack() as opened:
            bpf = await opened.enter_async_context(BPF(self._file, cflags=self._cflags))
            name = self._chosen(bpf)
            stream = bpf.events(
                name,
                buffer_size=self._buffer_size,
                latency=self._latency,
                on_lost="yield" if bpf.outputs[name] == "perf" else "count",
            )
            for attach, where, function in self._hooks:  # with a buffer there, nothing is lost in between
                attach(bpf, where, function)
            self._opened = opened.pop_all()
        return stream

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._opened.aclose()

    def _chosen(self, bpf: BPF) -> str:
        if self._output is not None:
            bpf.event_type(self._output)  # says what there is, if it is none
            return self._output
        if len(bpf.outputs) == 1:
            return next(iter(bpf.outputs))
        if bpf.outputs:
            raise ArgumentError(
                f"the program has several outputs: choose one of them by name ({', '.join(bpf.outputs)})"
            )
        raise ArgumentError(
            "the program has no output: declare one with BPF_PERF_OUTPUT or BPF_RINGBUF_OUTPUT"
        )


def _parsed(hook: str) -> tuple[_Attach, str, str]:
    place, equals, function = hook.rpartition("=")
    kind, colon, where = place.partition(":")
    if not (equals and colon and where and function):
        raise ArgumentError(f"{hook!r} is no hook: say what to attach where, such as syscall:execve=hello")
    if kind not in _KINDS:
        raise ArgumentError(
            f"{hook!r}: there is no kind of hook {kind!r}{did_you_mean(near(kind, _KINDS))} "
            f"(there are {', '.join(_KINDS)})"
        )
    return _KINDS[kind], where, function


def _symbol(where: str) -> tuple[str, str]:
    """`PATH:SYMBOL`, or the name of a library instead of the path."""
    path, colon, symbol = where.rpartition(":")
    if not (path and colon and symbol):
        raise ArgumentError(
            f"{where!r} is no function of a file: give PATH:SYMBOL, such as /bin/bash:readline"
        )
    return path, symbol
