"""One source of a configuration, on its way to its sinks."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from ebpfstream.filters import Filters
from ebpfstream.forwarding import Forwarding
from ebpfstream.kernel.privileges import Capability
from ebpfstream.program_file import ProgramFile
from ebpfstream.service.config import SourceConfig
from ebpfstream.stream import EventStream
from ebpfstream.tracers.execve import trace_execve
from ebpfstream.tracers.syscalls import trace_syscalls


class Part:
    """Attached in one event loop, forwarded in another one: between them the process gives up its privileges."""

    def __init__(self, source: SourceConfig, deadline: float) -> None:
        self._source = source
        self._deadline = deadline
        self._opened = AsyncExitStack()
        self._stream: EventStream[Any] | None = None
        self._forwarding: Forwarding[Any] | None = None

    async def attach(self) -> None:
        """From its return on, what happens is forwarded later, or counted as lost."""
        self._stream = stream = await self._made()
        await self._opened.enter_async_context(stream)
        source = self._source
        self._forwarding = Forwarding(
            stream,
            *(sink.make() for sink in source.sinks),
            where=source.condition(stream.event_type),
            fields=source.fields,
            redact=source.redaction(),
            deadline=self._deadline,
        )

    async def _made(self) -> EventStream[Any]:
        source = self._source
        match source.kind:
            case "execve":
                return trace_execve(on_lost="yield", **source.filters, **source.stream_options)
            case "syscalls":
                return trace_syscalls(
                    *source.calls, on_lost="yield", **source.filters, **source.stream_options
                )
            case "program":
                assert source.file is not None
                program = ProgramFile(
                    source.file,
                    source.attach,
                    output=source.output,
                    cflags=source.cflags,
                    **source.stream_options,
                )
                return await self._opened.enter_async_context(program)

    @property
    def needs(self) -> list[Capability]:
        """What it cannot do without, once it is attached."""
        assert self._stream is not None
        return [Capability.CAP_PERFMON] if self._stream.has_perf_buffer else []

    @property
    def forwarding(self) -> Forwarding[Any]:
        """Once it is attached."""
        assert self._forwarding is not None
        return self._forwarding

    def set_filters(self, source: SourceConfig) -> None:
        """Let the kernel leave out what these do.  Raises ArgumentError, and then nothing has changed."""
        assert self._stream is not None
        self._stream.set_filters(Filters(**source.filters))

    def reshape(self, source: SourceConfig) -> None:
        """Take over its condition, fields and redaction.  Raises ArgumentError, and then nothing has changed."""
        assert self._stream is not None
        self.forwarding.reshape(
            where=source.condition(self._stream.event_type), fields=source.fields, redact=source.redaction()
        )

    async def close(self) -> None:
        """Give everything back to the kernel, attached or not."""
        await self._opened.aclose()
