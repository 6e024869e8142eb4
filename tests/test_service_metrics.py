"""Prometheus metrics: exactly what the ledgers say, and nothing that they do not know."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

import ebpfstream
from ebpfstream.forwarding import Forwarding
from ebpfstream.service import metrics
from ebpfstream.service.metrics import Lag, LedgerCollector, exposition, process_metrics
from ebpfstream.statistics import ForwardStatistics, SinkStatistics, Statistics
from tests.test_forwarding import Noting, stuck, until
from tests.test_stream import Hand, hand, numbers

__all__ = ["hand"]

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

STREAM = Statistics(
    rejected=101, tried=102, skipped=103, submitted=104, lost=1026, lost_full=206, lost_too_large=207,
    lost_no_buffer=208, lost_otherwise=405, lost_errno=110, misses=111, received=112, delivered=113,
    undecodable=114, unread=115, bytes=1 << 52, batches=117, late=118, wakeups=119, buffer_size=120,
    buffered=121, buffered_most=122,
)  # fmt: skip
SINK = SinkStatistics(
    name="file:/var/log/exec.jsonl", accepted=131, recovered=132, acknowledged=133, dropped=134, failed=135,
    spooled=136, in_flight=137, batches=138, retries=139, queue_size=140, queued=141, queued_most=142,
    lag=14.25, spool_size=144, spool_bytes=145, away=True, last_error="the disk is full",
)  # fmt: skip
LEDGER = ForwardStatistics(STREAM, (SINK,), filtered=150)

EXPECTED = """\
# HELP ebpfstream_stream_rejected_events_total Events that the filters left out, in the kernel.
# TYPE ebpfstream_stream_rejected_events_total counter
ebpfstream_stream_rejected_events_total{source="exec"} 101.0
# HELP ebpfstream_stream_tried_events_total Events that the program in the kernel saw, after its filters.
# TYPE ebpfstream_stream_tried_events_total counter
ebpfstream_stream_tried_events_total{source="exec"} 102.0
"""
VALUES = {
    "stream_rejected_events_total": 101,
    "stream_tried_events_total": 102,
    "stream_skipped_events_total": 103,
    "stream_submitted_events_total": 104,
    "stream_missed_runs_total": 111,
    "stream_received_events_total": 112,
    "stream_delivered_events_total": 113,
    "stream_undecodable_events_total": 114,
    "stream_unread_events": 115,
    "stream_received_bytes_total": 1 << 52,
    "stream_batches_total": 117,
    "stream_late_events_total": 118,
    "stream_wakeups_total": 119,
    "stream_buffer_size_bytes": 120,
    "stream_buffered_bytes": 121,
    "stream_buffered_most_bytes": 122,
    "stream_lost_errno": 110,
    "stream_lost_events_total full": 206,
    "stream_lost_events_total too_large": 207,
    "stream_lost_events_total no_buffer": 208,
    "stream_lost_events_total otherwise": 405,
    "stream_filtered_events_total": 150,
    "sink_accepted_events_total": 131,
    "sink_recovered_events_total": 132,
    "sink_acknowledged_events_total": 133,
    "sink_dropped_events_total": 134,
    "sink_failed_events_total": 135,
    "sink_spooled_events": 136,
    "sink_in_flight_events": 137,
    "sink_batches_total": 138,
    "sink_retries_total": 139,
    "sink_queue_size_bytes": 140,
    "sink_queued_bytes": 141,
    "sink_queued_most_bytes": 142,
    "sink_lag_seconds": 14.25,
    "sink_spool_size_bytes": 144,
    "sink_spool_bytes": 145,
    "sink_away": 1,
}
NO_METRICS = {"name", "last_error"}
"""A label, and text of which each would be a time series."""


def text_of(collected: Iterable[Metric], accept: str = "") -> str:
    return exposition(collected, accept)[1].decode()


def samples(families: Iterable[Metric]) -> Samples:
    found = [
        ((sample.name, tuple(sorted(sample.labels.items()))), sample.value)
        for family in families
        for sample in family.samples
    ]
    assert len(dict(found)) == len(found), "two samples of the same name and labels"
    return dict(found)


def collected(ledgers: dict[str, ForwardStatistics] | LedgerCollector) -> Samples:
    """As Prometheus reads them."""
    collector = ledgers if isinstance(ledgers, LedgerCollector) else LedgerCollector(lambda: ledgers)
    return samples(parse_text(text_of(collector.collect())))


def short(found: Samples) -> dict[str, float]:
    return {
        " ".join([name.removeprefix("ebpfstream_"), *(v for label, v in labels if label == "cause")]): value
        for (name, labels), value in found.items()
    }


# --- each figure


def test_the_text() -> None:
    text = text_of(LedgerCollector(lambda: {"exec": LEDGER}).collect())
    assert text.startswith(EXPECTED)
    assert '\nebpfstream_stream_lost_events_total{cause="full",source="exec"} 206.0\n' in text
    assert '\nebpfstream_sink_lag_seconds{sink="file:/var/log/exec.jsonl",source="exec"} 14.25\n' in text


def test_every_figure_with_its_name() -> None:
    found = collected({"exec": LEDGER})
    assert short(found) == VALUES
    for (name, labels), _ in found.items():
        assert [label for label, _ in labels if label != "cause"] == (
            ["source"] if name.startswith("ebpfstream_stream_") else ["sink", "source"]
        )


@pytest.mark.parametrize("field", [field.name for field in fields(Statistics)])
def test_no_field_of_a_stream_is_forgotten(field: str) -> None:
    known = replace(STREAM, lost_full=None) if field == "lost" else STREAM
    changed = replace(known, **{field: 77_777})
    before, after = (short(collected({"exec": ForwardStatistics(stream)})) for stream in (known, changed))
    assert before.keys() == after.keys()
    (name,) = (name for name, value in after.items() if value != before[name])
    assert after[name] == (77_777 - 207 - 208 - 405 if field == "lost" else 77_777)


@pytest.mark.parametrize("field", [field.name for field in fields(SinkStatistics)])
def test_no_field_of_a_sink_is_forgotten(field: str) -> None:
    value: Any = False if field == "away" else str(77_777) if field in NO_METRICS else 77_777
    changed = replace(SINK, **{field: value})
    before, after = (
        short(collected({"exec": ForwardStatistics(STREAM, (sink,))})) for sink in (SINK, changed)
    )
    assert before.keys() == after.keys()
    different = [after[name] for name in after if after[name] != before[name]]
    assert different == ([] if field in NO_METRICS else [value])


def test_no_figure_of_a_forwarding_is_forgotten() -> None:
    assert [field.name for field in fields(ForwardStatistics)] == ["stream", "sinks", "filtered"]


def test_the_causes_add_up_to_what_was_lost() -> None:
    for stream in (STREAM, replace(STREAM, lost_no_buffer=None), replace(STREAM, lost=5, **NO_CAUSES)):
        found = short(collected({"exec": ForwardStatistics(stream)}))
        assert sum(value for name, value in found.items() if "_lost_events_total" in name) == stream.lost


NO_CAUSES: Any = dict.fromkeys(("lost_full", "lost_too_large", "lost_no_buffer", "lost_otherwise"))


def test_what_is_unknown_is_left_out() -> None:
    """As of a program of the user's own with a ring buffer, and of a sink without a spool."""
    unknown: Any = dict.fromkeys(("rejected", "tried", "skipped", "submitted", "lost", "misses"))
    stream = replace(STREAM, **NO_CAUSES, **unknown)
    sink = replace(SINK, spool_size=None, spool_bytes=None)
    found = short(collected({"exec": ForwardStatistics(stream, (sink,))}))
    missing = {name for name in VALUES if name not in found}
    assert missing == {
        *(f"stream_{name}_events_total" for name in ("rejected", "tried", "skipped", "submitted")),
        *(f"stream_lost_events_total {cause}" for cause in ("full", "too_large", "no_buffer", "otherwise")),
        "stream_missed_runs_total",
        "sink_spool_size_bytes",
        "sink_spool_bytes",
    }
    assert 0 in found.values()  # filtered: a count that is known to be 0 is there


def test_only_what_was_lost_as_a_whole_is_known() -> None:
    """A perf buffer tells how many, not why."""
    found = short(collected({"exec": ForwardStatistics(replace(STREAM, lost=5, **NO_CAUSES))}))
    assert {name: value for name, value in found.items() if "lost_events" in name} == {
        "stream_lost_events_total unknown": 5
    }


# --- names and labels


def test_names_are_as_prometheus_wants_them() -> None:
    families = list(LedgerCollector(lambda: {"exec": LEDGER}).collect())
    for family in families:
        assert family.documentation.endswith(".")
        name = family.name + ("_total" if family.type == "counter" else "")
        assert family.name.endswith("_total") is False
        assert name in {sample.name for sample in family.samples}
        assert not {"seconds", "bytes"} & set(family.name.split("_")) or family.name.endswith(
            ("_seconds", "_bytes")
        )
    assert len({family.name for family in families}) == len(families)


def test_openmetrics_says_the_same() -> None:
    families = list(LedgerCollector(lambda: {"exec": LEDGER}).collect()) + process_metrics(Lag(0.5, 2))
    content_type, text = exposition(families, "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    parsed = parse_openmetrics(text.decode())  # type: ignore[no-untyped-call]
    assert samples(parsed) == samples(parse_text(text_of(families)))


@pytest.mark.parametrize("accept", ["application/openmetrics-text;version=x", "text/plain;version=..", ";,;"])
def test_an_accept_header_that_makes_no_sense(accept: str) -> None:
    content_type, text = exposition([], accept)
    assert content_type.startswith("text/plain; version=0.0.4")
    assert text == b""


def test_sinks_of_one_name_are_told_apart() -> None:
    sinks = tuple(
        replace(SINK, name=name, accepted=number) for number, name in enumerate(["a", "b", "a", "a"])
    )
    found = collected(
        {"exec": ForwardStatistics(STREAM, sinks), "other": ForwardStatistics(STREAM, sinks[:1])}
    )
    accepted = {labels: value for (name, labels), value in found.items() if "accepted" in name}
    assert accepted == {
        (("sink", "a"), ("source", "exec")): 0,
        (("sink", "b"), ("source", "exec")): 1,
        (("sink", "a#2"), ("source", "exec")): 2,
        (("sink", "a#3"), ("source", "exec")): 3,
        (("sink", "a"), ("source", "other")): 0,
    }


def test_names_that_are_not_plain() -> None:
    name = 'a "b"\\c\nd é ' + os.fsdecode(b"\xff")
    found = collected({name: ForwardStatistics(STREAM, (replace(SINK, name=name),))})
    whole = 'a "b"\\c\nd é \\udcff'
    assert {labels for (metric, labels), _ in found.items() if metric == "ebpfstream_sink_away"} == {
        (("sink", whole), ("source", whole))
    }
    assert ("ebpfstream_stream_tried_events_total", (("source", "source0"),)) not in found


# --- the process


def test_the_process_itself() -> None:
    found = samples(parse_text(text_of(process_metrics(Lag(0.5, 2.0)))))
    version = (("python", platform.python_version()), ("version", ebpfstream.__version__))
    assert found["ebpfstream_build_info", version] == 1
    kernel = (("machine", os.uname().machine), ("release", os.uname().release))
    assert found["ebpfstream_kernel_info", kernel] == 1
    assert found["ebpfstream_loop_lag_seconds", ()] == 0.5
    assert found["ebpfstream_loop_lag_most_seconds", ()] == 2.0
    for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds", "start_time_seconds"):
        assert found[f"process_{name}", ()] > 0


# --- a real forwarding


@pytest.mark.anyio
async def test_a_forwarding_and_its_metrics_agree(hand: Hand, tmp_path: Path) -> None:
    sinks = Noting("a"), Noting("b", None, None, stuck, durable=True, spool=str(tmp_path / "spool"))
    forwarding = Forwarding(numbers(hand), *sinks, where=lambda event: event.number != 3, deadline=0.1)
    collector = LedgerCollector(lambda: {"exec": forwarding.statistics()})
    hand.submit(1, 2)
    hand.submit(3, 4, 5)
    hand.submit(6)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: forwarding.statistics().sinks[0].acknowledged == 5)
        await until(lambda: forwarding.statistics().sinks[1].acknowledged == 2)
        while_running = short(collected(collector))
        assert while_running["stream_delivered_events_total"] == 6
        assert while_running["stream_filtered_events_total"] == 1
        assert while_running["sink_lag_seconds"] > 0  # the last one's: b
        forwarding.end()
    final = forwarding.statistics()
    assert (final.sinks[1].acknowledged, final.sinks[1].spooled) == (2, 3)
    found = collected(collector)
    table: list[tuple[str, Any, dict[str, tuple[str, str]], tuple[tuple[str, str], ...]]] = [
        ("stream", final.stream, metrics._OF_STREAMS, (("source", "exec"),)),
        *(
            ("sink", ledger, metrics._OF_SINKS, (("sink", ledger.name), ("source", "exec")))
            for ledger in final.sinks
        ),
    ]
    for kind, ledger, names, labels in table:
        for field, (name, _) in names.items():
            value = getattr(ledger, field)
            if field != "lag":
                assert found.get((f"ebpfstream_{kind}_{name}", labels)) == value, name
    b = (("sink", "b"), ("source", "exec"))
    assert found["ebpfstream_sink_spool_size_bytes", b] == 1 << 30
    assert found["ebpfstream_sink_spool_bytes", b] > 0
    assert ("ebpfstream_sink_spool_bytes", (("sink", "a"), ("source", "exec"))) not in found
