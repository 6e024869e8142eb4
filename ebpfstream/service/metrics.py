"""The ledgers, and this process, as Prometheus metrics.

The only importer of prometheus_client.  Unknown counts have no sample, since 0 would be a claim.  Texts of errors are
no labels: each would be a time series of its own.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ebpfstream import __version__
from ebpfstream.statistics import ForwardStatistics, SinkStatistics, Statistics
from ebpfstream.text import encodable

# Fields of the ledgers: the metric's name, without `ebpfstream_stream_` or `ebpfstream_sink_`, and what it means.
# Those that end with _total are counters.
_OF_STREAMS: Final = {
    "rejected": ("rejected_events_total", "Events that the filters left out, in the kernel."),
    "tried": ("tried_events_total", "Events that the program in the kernel saw, after its filters."),
    "skipped": ("skipped_events_total", "Events left out, because the stream was paused or sampled."),
    "submitted": ("submitted_events_total", "Events put into the kernel's buffer."),
    "misses": ("missed_runs_total", "Runs of the program that the kernel skipped."),
    "received": ("received_events_total", "Events taken out of the kernel's buffer."),
    "delivered": ("delivered_events_total", "Events handed on by the stream."),
    "undecodable": ("undecodable_events_total", "Events that did not fit their type."),
    "unread": ("unread_events", "Events taken out of the kernel's buffer and not handed on."),
    "bytes": (
        "received_bytes_total",
        "Bytes taken out of the kernel's buffer, headers and padding included.",
    ),
    "batches": ("batches_total", "How often something was taken out of the kernel's buffer."),
    "late": ("late_events_total", "Events handed on after younger ones of other CPUs."),
    "wakeups": ("wakeups_total", "How often the stream slept until the kernel woke it."),
    "buffer_size": ("buffer_size_bytes", "Bytes that the kernel's buffer holds."),
    "buffered": ("buffered_bytes", "Bytes in the kernel's buffer now."),
    "buffered_most": ("buffered_most_bytes", "The most bytes found in the kernel's buffer so far."),
    "lost_errno": ("lost_errno", "The errno of the last event lost with the cause otherwise; 0 if none was."),
}
_LOST: Final = "lost_events_total"
_CAUSES: Final = {
    "lost_full": "full",
    "lost_too_large": "too_large",
    "lost_no_buffer": "no_buffer",
    "lost_otherwise": "otherwise",
}
_FILTERED: Final = "filtered_events_total"
_OF_SINKS: Final = {
    "accepted": ("accepted_events_total", "Events that were to go to the sink."),
    "recovered": ("recovered_events_total", "Events of an earlier life, found in the spool."),
    "acknowledged": ("acknowledged_events_total", "Events that have arrived where the sink sends to."),
    "dropped": ("dropped_events_total", "Events for which there was no room, or no time left at the end."),
    "failed": ("failed_events_total", "Events that the sink will never take."),
    "spooled": ("spooled_events", "Events in the spool, and not on their way."),
    "in_flight": ("in_flight_events", "Events in the queue or on their way."),
    "batches": ("batches_total", "How many batches, or parts of them, have arrived."),
    "retries": ("retries_total", "How often the sink was unavailable, and asked again later."),
    "queue_size": ("queue_size_bytes", "Bytes for which the queue has room."),
    "queued": ("queued_bytes", "Bytes in the queue now."),
    "queued_most": ("queued_most_bytes", "The most bytes that were in the queue so far."),
    "lag": ("lag_seconds", "The age of the oldest event that has not arrived; 0 if all have."),
    "spool_size": ("spool_size_bytes", "Bytes that the spool may hold."),
    "spool_bytes": ("spool_bytes", "Bytes of the spool on disk now."),
    "away": ("away", "1 if the sink was unavailable when it was last asked, else 0."),
}

_HELP: Final = {
    **{f"ebpfstream_stream_{name}": meaning for name, meaning in _OF_STREAMS.values()},
    f"ebpfstream_stream_{_LOST}": "Events that could not be put into the kernel's buffer, by cause.",
    f"ebpfstream_stream_{_FILTERED}": "Events that the condition on what is forwarded left out.",
    **{f"ebpfstream_sink_{name}": meaning for name, meaning in _OF_SINKS.values()},
}

Labels = tuple[tuple[str, str], ...]


class _Sample(NamedTuple):
    name: str
    labels: Labels
    value: float


class LedgerCollector(Collector):
    """Makes metrics of the ledgers that `ledgers()` has, by the names of their sources.

    Not for several threads at once: ledgers are read where they are written, on the event loop's thread.
    """

    def __init__(self, ledgers: Callable[[], Mapping[str, ForwardStatistics]]) -> None:
        self._ledgers = ledgers

    def collect(self) -> Iterable[Metric]:
        """What the ledgers say now."""
        ledgers = self._ledgers().items()
        return _families(sample for source, ledger in ledgers for sample in _samples(source, ledger))


def _is_counter(name: str) -> bool:
    return name.endswith("_total")


def _samples(source: str, ledger: ForwardStatistics) -> Iterator[_Sample]:
    labels = (("source", encodable(source)),)
    yield from _figures("ebpfstream_stream", labels, ledger.stream, _OF_STREAMS)
    yield from _losses(labels, ledger.stream)
    yield _Sample(f"ebpfstream_stream_{_FILTERED}", labels, ledger.filtered)
    names: Counter[str] = Counter()
    for sink in ledger.sinks:
        name = encodable(sink.name)
        names[name] += 1
        if names[name] > 1:  # two samples of one name and the same labels would spoil the whole answer
            name = f"{name}#{names[name]}"
        yield from _figures("ebpfstream_sink", (*labels, ("sink", name)), sink, _OF_SINKS)


def _figures(
    prefix: str, labels: Labels, ledger: Statistics | SinkStatistics, fields: Mapping[str, tuple[str, str]]
) -> Iterator[_Sample]:
    for field, (name, _) in fields.items():
        value = getattr(ledger, field)
        if value is not None:
            yield _Sample(f"{prefix}_{name}", labels, value)


def _losses(labels: Labels, stream: Statistics) -> Iterator[_Sample]:
    """Their sum is what was lost, where that is known."""
    name = f"ebpfstream_stream_{_LOST}"
    known = {
        cause: count for field, cause in _CAUSES.items() if (count := getattr(stream, field)) is not None
    }
    if stream.lost is not None and len(known) < len(_CAUSES):
        known["unknown"] = stream.lost - sum(known.values())
    for cause, count in known.items():
        yield _Sample(name, (*labels, ("cause", cause)), count)


def _families(samples: Iterable[_Sample]) -> list[Metric]:
    """In the order of the fields."""
    found: dict[str, list[_Sample]] = {name: [] for name in _HELP}
    for sample in samples:
        found[sample.name].append(sample)
    families: list[Metric] = []
    for name, own in found.items():
        if not own:
            continue
        kind = CounterMetricFamily if _is_counter(name) else GaugeMetricFamily
        family = kind(name, _HELP[name], labels=[label for label, _ in own[0].labels])
        for sample in own:
            family.add_metric([value for _, value in sample.labels], sample.value)
        families.append(family)
    return families


class Lag(NamedTuple):
    """How long calls waited for a turn of the event loop, in seconds."""

    last: float = 0.0
    most: float = 0.0


def process_metrics(lag: Lag) -> list[Metric]:
    """Of the process itself: CPU, memory, descriptors, versions, and how its event loop keeps up.

    Reads /proc; any thread may.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    kernel = os.uname()
    return [
        *registry.collect(),
        InfoMetricFamily(
            "ebpfstream_build",
            "Which ebpfstream this is, and the Python that runs it.",
            {"version": __version__, "python": platform.python_version()},
        ),
        InfoMetricFamily(
            "ebpfstream_kernel",
            "The kernel that runs the programs.",
            {"release": kernel.release, "machine": kernel.machine},
        ),
        GaugeMetricFamily(
            "ebpfstream_loop_lag_seconds",
            "How long reading these figures waited for a turn of the event loop.",
            lag.last,
        ),
        GaugeMetricFamily(
            "ebpfstream_loop_lag_most_seconds",
            "The longest that a request to this endpoint waited for a turn of the event loop so far.",
            lag.most,
        ),
    ]


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def exposition(metrics: Iterable[Metric], accept: str) -> tuple[str, bytes]:
    """Their text, and before it its content type: OpenMetrics or Prometheus's own, as the Accept header says."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # a version that is none
        encode, content_type = choose_encoder("")
    return content_type, encode(_Collected(metrics))
