"""Kernel events as async iterators.

The names below are the public ones.  They are imported when first used: importing ebpfstream alone
costs nothing and needs no sink's library.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebpfstream.batch import EventBatch as EventBatch
    from ebpfstream.completeness import Completeness as Completeness
    from ebpfstream.errors import ArgumentError as ArgumentError
    from ebpfstream.errors import AttachError as AttachError
    from ebpfstream.errors import BccNotFoundError as BccNotFoundError
    from ebpfstream.errors import CompileError as CompileError
    from ebpfstream.errors import CorruptBufferError as CorruptBufferError
    from ebpfstream.errors import DecodeError as DecodeError
    from ebpfstream.errors import EbpfStreamError as EbpfStreamError
    from ebpfstream.errors import EventTypeError as EventTypeError
    from ebpfstream.errors import LoadError as LoadError
    from ebpfstream.errors import LostError as LostError
    from ebpfstream.errors import MapError as MapError
    from ebpfstream.errors import MapIndexError as MapIndexError
    from ebpfstream.errors import NotOpenError as NotOpenError
    from ebpfstream.errors import PrivilegeError as PrivilegeError
    from ebpfstream.errors import QueueFullError as QueueFullError
    from ebpfstream.errors import SinkClosedError as SinkClosedError
    from ebpfstream.errors import SinkError as SinkError
    from ebpfstream.errors import SinkRejectedError as SinkRejectedError
    from ebpfstream.errors import SinkUnavailableError as SinkUnavailableError
    from ebpfstream.errors import SourceError as SourceError
    from ebpfstream.errors import StreamBusyError as StreamBusyError
    from ebpfstream.errors import StreamClosedError as StreamClosedError
    from ebpfstream.errors import UnsupportedError as UnsupportedError
    from ebpfstream.events import I8 as I8
    from ebpfstream.events import I16 as I16
    from ebpfstream.events import I32 as I32
    from ebpfstream.events import I64 as I64
    from ebpfstream.events import U8 as U8
    from ebpfstream.events import U16 as U16
    from ebpfstream.events import U32 as U32
    from ebpfstream.events import U64 as U64
    from ebpfstream.events import Array as Array
    from ebpfstream.events import Char as Char
    from ebpfstream.events import Comm as Comm
    from ebpfstream.events import Event as Event
    from ebpfstream.events import Flag as Flag
    from ebpfstream.filters import Filters as Filters
    from ebpfstream.forwarding import Forwarding as Forwarding
    from ebpfstream.forwarding import forward as forward
    from ebpfstream.kernel.mapvalues import PerCpu as PerCpu
    from ebpfstream.kernel.mapvalues import Snapshot as Snapshot
    from ebpfstream.kernel.tracepipe import TraceLine as TraceLine
    from ebpfstream.loader import BPF as BPF
    from ebpfstream.lost import Lost as Lost
    from ebpfstream.origin import Origin as Origin
    from ebpfstream.readymade import Sampling as Sampling
    from ebpfstream.redaction import Redaction as Redaction
    from ebpfstream.schema import json_schema as json_schema
    from ebpfstream.sink import Sink as Sink
    from ebpfstream.sink import open_sink as open_sink
    from ebpfstream.sinks.blackhole import BlackholeSink as BlackholeSink
    from ebpfstream.sinks.file import FileSink as FileSink
    from ebpfstream.sinks.kafka import KafkaSink as KafkaSink
    from ebpfstream.sinks.stdout import StdoutSink as StdoutSink
    from ebpfstream.source import KafkaSource as KafkaSource
    from ebpfstream.statistics import ForwardStatistics as ForwardStatistics
    from ebpfstream.statistics import SinkStatistics as SinkStatistics
    from ebpfstream.statistics import Statistics as Statistics
    from ebpfstream.stream import EventStream as EventStream
    from ebpfstream.trace_lines import TraceEvent as TraceEvent
    from ebpfstream.tracers.count_execve import ExecCount as ExecCount
    from ebpfstream.tracers.count_execve import ExecCounts as ExecCounts
    from ebpfstream.tracers.count_execve import count_execve as count_execve
    from ebpfstream.tracers.execve import ExecEvent as ExecEvent
    from ebpfstream.tracers.execve import trace_execve as trace_execve
    from ebpfstream.tracers.syscalls import SyscallEvent as SyscallEvent
    from ebpfstream.tracers.syscalls import trace_syscalls as trace_syscalls

__version__ = "0.1.0"

_HOMES = {
    "batch": ("EventBatch",),
    "completeness": ("Completeness",),
    "errors": (
        "ArgumentError",
        "AttachError",
        "BccNotFoundError",
        "CompileError",
        "CorruptBufferError",
        "DecodeError",
        "EbpfStreamError",
        "EventTypeError",
        "LoadError",
        "LostError",
        "MapError",
        "MapIndexError",
        "NotOpenError",
        "PrivilegeError",
        "QueueFullError",
        "SinkClosedError",
        "SinkError",
        "SinkRejectedError",
        "SinkUnavailableError",
        "SourceError",
        "StreamBusyError",
        "StreamClosedError",
        "UnsupportedError",
    ),
    "events": (
        "Array",
        "Char",
        "Comm",
        "Event",
        "Flag",
        "I8",
        "I16",
        "I32",
        "I64",
        "U8",
        "U16",
        "U32",
        "U64",
    ),
    "filters": ("Filters",),
    "forwarding": ("Forwarding", "forward"),
    "kernel.mapvalues": ("PerCpu", "Snapshot"),
    "kernel.tracepipe": ("TraceLine",),
    "loader": ("BPF",),
    "lost": ("Lost",),
    "origin": ("Origin",),
    "readymade": ("Sampling",),
    "redaction": ("Redaction",),
    "schema": ("json_schema",),
    "sink": ("Sink", "open_sink"),
    "sinks.blackhole": ("BlackholeSink",),
    "sinks.file": ("FileSink",),
    "sinks.kafka": ("KafkaSink",),
    "sinks.stdout": ("StdoutSink",),
    "source": ("KafkaSource",),
    "statistics": ("ForwardStatistics", "SinkStatistics", "Statistics"),
    "stream": ("EventStream",),
    "trace_lines": ("TraceEvent",),
    "tracers.count_execve": ("ExecCount", "ExecCounts", "count_execve"),
    "tracers.execve": ("ExecEvent", "trace_execve"),
    "tracers.syscalls": ("SyscallEvent", "trace_syscalls"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
