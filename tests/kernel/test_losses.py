"""What is lost, skipped or held up under pressure: in the ledger, and in the stream itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import ArgumentError, EventStream, Lost, LostError, Sampling, UnsupportedError
from ebpfstream.kernel.buffers import Kind
from ebpfstream.stream import OnLost
from tests.kernel import flood
from tests.kernel.flood import FloodEvent, known
from tests.kernel.test_loader import counting

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]


@pytest.fixture(params=["ring", "perf"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """What is said of one kind of buffer holds for the other."""
    found: Kind = request.param
    return found


def stream(
    folder: Path, target: int, kind: Kind, on_lost: OnLost = "count", **options: Any
) -> EventStream[Any]:
    source = flood.source(folder, "flood", target, options.pop("buffer_size", 1 << 16), kind, **options)
    return EventStream(source, FloodEvent, on_lost=on_lost)


def make(producer: flood.Producer, calls: int) -> None:
    producer.start(calls)
    producer.wait()


async def test_losses_are_in_the_stream_where_they_happened(kind: Kind, tmp_path: Path) -> None:
    """Numbers and losses together leave no hole, and all losses add up to the ledger's, those at the end included."""
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, "yield") as events:
            items: list[FloodEvent | Lost] = []
            for _ in range(5):
                await run_sync(make, producer, 3000)  # more than there is room for
                with anyio.move_on_after(0.2):
                    async for item in events:
                        items.append(item)
            await run_sync(make, producer, 3000)
            events.detach()
            items += [item async for item in events]
    statistics = events.statistics()
    lost = [item for item in items if isinstance(item, Lost)]
    seen = [item for item in items if isinstance(item, FloodEvent)]
    assert sum(known(one.count) for one in lost) == statistics.lost == 18_000 - len(seen) > 0
    assert statistics.delivered == len(seen)
    assert all((one.cpu, one.time is not None) == (0, True) for one in lost)
    # Every number is either an event's or within a loss, which stands before the events of its batch.
    gone = set(range(18_000)) - {event.sequence for event in seen}
    for one in lost:
        assert one.first_sequence is not None
        assert one.last_sequence is not None
        assert {one.first_sequence, one.last_sequence} <= gone
        within = {number for number in gone if one.first_sequence <= number <= one.last_sequence}
        assert len(within) == one.count
        gone -= within
    assert not gone
    assert isinstance(items[-1], Lost)


async def test_batches_carry_losses_into_json(kind: Kind, tmp_path: Path) -> None:
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, "yield") as events:
            await run_sync(make, producer, 5000)
            events.detach()
            batches = [batch async for batch in events.batches()]
    assert sum(map(len, batches)) == events.statistics().delivered
    assert sum(one.count or 0 for batch in batches for one in batch.lost) == events.statistics().lost
    (lost,) = batches[-1].lost
    assert (
        batches[-1]
        .to_json_lines()
        .startswith(b'{"lost":{"cpu":0,"count":%d,"first_sequence":' % known(lost.count))
    )
    assert next(iter(batches[-1])) == lost
    assert len(batches[-1][:0].lost) == 1
    assert batches[-1][len(batches[-1]) :].lost == (() if len(batches[-1]) else (lost,))


async def test_losses_are_raised_and_the_stream_goes_on(kind: Kind, tmp_path: Path) -> None:
    seen: list[int] = []
    lost: list[Lost] = []
    messages: list[tuple[str, int]] = []
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, "raise") as events:
            await run_sync(make, producer, 20)
            seen += [(await anext(events)).sequence for _ in range(20)]
            await run_sync(make, producer, 3000)
            events.detach()
            while True:
                try:
                    seen.append((await anext(events)).sequence)
                except LostError as error:
                    lost += error.lost
                    messages.append((str(error), sum(known(one.count) for one in error.lost)))
                except StopAsyncIteration:
                    break
    assert all(text == f"{count} events were lost; the stream goes on after them" for text, count in messages)
    assert seen[:20] == list(range(20))
    assert len(seen) == len(set(seen)) == events.statistics().delivered
    assert sum(known(one.count) for one in lost) == events.statistics().lost == 3020 - len(seen) > 0


async def test_without_a_loss_nothing_is_said(kind: Kind, tmp_path: Path) -> None:
    with flood.producing() as producer:
        async with stream(tmp_path, producer.pid, kind, "yield", buffer_size=1 << 24) as events:
            await run_sync(make, producer, 5000)
            events.detach()
            found = [item async for item in events]
    assert [event.sequence for event in found if event.cpu == found[0].cpu] == list(
        range(sum(event.cpu == found[0].cpu for event in found))
    )
    assert not any(isinstance(item, Lost) for item in found)


async def test_losses_by_cause(tmp_path: Path) -> None:
    """A payload of 8,000 bytes never fits into a ring of 4,096."""
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, "ring", buffer_size=4096) as events:
            await run_sync(make, producer, 6400)
    statistics = events.statistics()
    assert statistics.lost_too_large == 100
    assert statistics.lost_full == known(statistics.lost) - 100 > 0
    assert (statistics.lost_no_buffer, statistics.lost_otherwise, statistics.lost_errno) == (0, 0, 0)
    assert known(statistics.submitted) + known(statistics.lost) == statistics.tried == 6400


async def test_a_pause_is_counted(kind: Kind, tmp_path: Path) -> None:
    with flood.producing(cpu=0) as producer:
        async with stream(tmp_path, producer.pid, kind, buffer_size=1 << 24) as events:
            await run_sync(make, producer, 10)
            events.pause()
            await run_sync(make, producer, 25)
            events.resume()
            await run_sync(make, producer, 10)
            events.pause()
            await run_sync(make, producer, 5)
            events.detach()
            found = [(event.sequence, event.weight) async for event in events]
    assert found == [(number, 26 if number == 10 else 1) for number in range(20)]
    statistics = events.statistics()
    assert (statistics.tried, statistics.skipped, statistics.submitted, statistics.lost) == (50, 30, 20, 0)
    assert statistics.complete is False
    assert str(statistics).startswith("20 delivered; 50 tried = 20 submitted + 0 lost + 30 skipped")


async def test_sampling_under_pressure(kind: Kind, tmp_path: Path) -> None:
    """Above the high mark one in four is kept, below the low mark all are; weights say for how many each stands."""
    sampling = Sampling(one_in=4, high=0.5, low=0.1)
    with flood.producing(cpu=0) as producer:
        options: dict[str, Any] = {"buffer_size": 1 << 19, "overload": sampling}
        async with stream(tmp_path, producer.pid, kind, **options) as events:
            room = events.statistics().buffer_size // (1 if kind == "ring" else 2)
            found = []

            async def take(times: int) -> None:
                for _ in range(times):
                    found.append(await anext(events))

            # What half of the buffer holds; then the stream looks, and leaves it nearly as full.
            await run_sync(make, producer, room // 400)
            await take(1)
            await run_sync(make, producer, 40)
            if kind == "ring":
                await run_sync(make, producer, room // 400)
            before = events.statistics()
            assert before.lost == 0
            # Emptied, all are kept again.
            with anyio.move_on_after(0.3):
                async for event in events:
                    found.append(event)
            await run_sync(make, producer, 50)
            events.detach()
            found += [event async for event in events]
    statistics = events.statistics()
    assert statistics.lost == 0
    assert statistics.buffered_most >= room // 4
    assert len(found) == statistics.submitted == known(statistics.tried) - known(statistics.skipped)
    assert [event.sequence for event in found] == list(range(len(found)))
    assert {event.weight for event in found} <= {1, 2, 3, 4}
    assert sum(event.weight for event in found) == statistics.tried
    assert [event.weight for event in found[-49:]] == [1] * 49
    if kind == "ring":
        assert known(statistics.skipped) > 0


WRONG: dict[str, Callable[[Path], object]] = {
    "on_lost='foo' is unknown": lambda path: stream(path, 1, "ring", "foo"),  # type: ignore[arg-type]
    "overload='foo' is unknown": lambda path: stream(path, 1, "ring", overload="foo"),
    r"Sampling\(one_in=1, .*is impossible: one_in is 2 or more": lambda path: stream(
        path, 1, "ring", overload=Sampling(1)
    ),
    "and 0 <= low < high <= 1": lambda path: stream(path, 1, "ring", overload=Sampling(2, 0.5, 0.5)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_asked_for(message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        WRONG[message](tmp_path)


async def test_what_is_known_of_a_program_of_ones_own() -> None:
    """A perf buffer's losses, exactly; of a ring buffer's nobody tells; and it cannot be paused."""
    with flood.producing(cpu=0) as producer:
        async with counting(producer.pid) as bpf:
            with pytest.raises(
                ArgumentError, match="'ring' is a ring buffer, and of what it had no room for nobody"
            ):
                bpf.events("ring", on_lost="yield")
            async with bpf.events("perf", buffer_size=1 << 14, on_lost="yield") as events:
                await run_sync(make, producer, 2000)
                with pytest.raises(UnsupportedError, match="a program of yours cannot be paused"):
                    events.pause()
                bpf.detach()
                items = [item async for item in events]
            lost = [item for item in items if isinstance(item, Lost)]
            assert (
                sum(one.count or 0 for one in lost)
                == events.statistics().lost
                == 2000 - len(items) + len(lost)
                > 0
            )
            assert {one.cpu for one in lost} == {0}
