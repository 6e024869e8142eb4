"""Recorded events and batches, and the stream of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpfstream import ArgumentError, DecodeError, EventTypeError, FileSink, Lost, TraceEvent, forward
from ebpfstream.testing import (
    ExampleEvent,
    Replay,
    load_batches,
    make_batch,
    read_events,
    save_batches,
)

EVENTS = [ExampleEvent(number, "true", f"event {number}") for number in range(5)]
LOST = Lost(0, 2, 5, 6)
BATCHES = [make_batch(EVENTS[:3]), make_batch(EVENTS[3:], lost=[LOST])]


def test_events_are_read_from_what_a_sink_wrote(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(batch.to_json_lines() for batch in BATCHES))
    assert read_events(path, ExampleEvent) == [*EVENTS[:3], LOST, *EVENTS[3:]]
    path.write_text('{"number":1,"comm":"true"}')
    with pytest.raises(DecodeError, match=r"the line has no ExampleEvent\.message"):
        read_events(path, ExampleEvent)


def test_batches_are_kept_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "batches"
    save_batches(path, BATCHES)
    again = load_batches(path, ExampleEvent)
    assert [list(batch) for batch in again] == [list(batch) for batch in BATCHES]
    assert [batch.lost for batch in again] == [(), (LOST,)]
    assert [batch.to_json_lines() for batch in again] == [batch.to_json_lines() for batch in BATCHES]
    with pytest.raises(EventTypeError, match="ExampleEvent, not of TraceEvent"):
        load_batches(path, TraceEvent)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b"{}\n"])
def test_a_file_that_is_not_whole(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "batches"
    save_batches(path, BATCHES)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArgumentError, match="is no file that save_batches has written, or not all of it"):
        load_batches(path, ExampleEvent)


@pytest.mark.anyio
async def test_replayed_by_event() -> None:
    async with Replay(*BATCHES) as events:
        assert [one async for one in events] == [*EVENTS[:3], LOST, *EVENTS[3:]]
    ledger = events.statistics()
    assert (ledger.tried, ledger.lost, ledger.received, ledger.delivered, ledger.unread) == (7, 2, 5, 5, 0)


@pytest.mark.anyio
async def test_replayed_by_batch() -> None:
    events = Replay(*BATCHES)
    assert events.event_type is ExampleEvent
    first = await events.next_batch(2)
    assert first is not None
    assert list(first) == EVENTS[:2]
    assert events.statistics().unread == 3
    assert [list(batch) async for batch in events.batches()] == [EVENTS[2:3], [LOST, *EVENTS[3:]]]
    assert await events.next_batch() is None


@pytest.mark.anyio
async def test_forwarded(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    ledgers = await forward(Replay(*BATCHES), FileSink(path), where=lambda event: event.number != 1)
    assert (ledgers.filtered, ledgers.sinks[0].acknowledged) == (1, 4)
    assert read_events(path, ExampleEvent) == [EVENTS[0], EVENTS[2], LOST, *EVENTS[3:]]


def test_nothing_to_replay() -> None:
    with pytest.raises(ArgumentError, match="give one batch or more"):
        Replay()
