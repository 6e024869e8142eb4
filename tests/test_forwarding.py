"""From a stream that a test holds in its hands (tests/test_stream.py) to sinks that note what is done to them."""

from __future__ import annotations

from typing import Any

import pytest

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkError
from ebpfstream.forwarding import forward
from ebpfstream.sink import Sink
from tests.test_stream import Hand, hand, numbers

pytestmark = pytest.mark.anyio
__all__ = ["hand"]


class Noting(Sink):
    """Writes what is done to it into the log that the source writes into as well."""

    def __init__(self, name: str, log: list[str], *, fails: bool = False) -> None:
        self._name, self._log, self._fails = name, log, fails

    async def open(self) -> None:
        self._log.append(f"open {self._name}")

    async def send(self, batch: EventBatch[Any]) -> None:
        if self._fails:
            raise SinkError("no")
        self._log.append(f"{self._name} {[event.number for event in batch]}")

    async def flush(self) -> None:
        self._log.append(f"flush {self._name}")

    async def aclose(self) -> None:
        self._log.append(f"close {self._name}")


async def test_the_order_of_things_with_two_sinks(hand: Hand) -> None:
    hand.submit(1, 2)
    hand.submit(3, 4, 5)
    hand.submit(6)
    sinks = [Noting("a", hand.log), Noting("b", hand.log)]
    statistics = await forward(numbers(hand), *sinks, count=4)
    log = [entry for entry in hand.log if entry != "drain"]
    assert log == [
        "open a",
        "open b",
        "open",
        "a [1, 2]",
        "b [1, 2]",
        "a [3, 4]",
        "b [3, 4]",
        "flush a",
        "flush b",
        "stop",
        "wait",
        "finish",
        "counters",
        "close",
        "close b",
        "close a",
    ]
    assert statistics.received == statistics.submitted == 6


async def test_it_ends_when_the_stream_is_detached(hand: Hand) -> None:
    events = numbers(hand)
    hand.submit(1, 2)
    hand.on["drain"] = events.detach
    hand.on["wait"] = lambda: hand.submit(3)
    statistics = await forward(events, Noting("a", hand.log))
    assert [entry for entry in hand.log if entry.startswith("a ")] == ["a [1, 2]", "a [3]"]
    assert "flush a" in hand.log
    assert (statistics.delivered, statistics.unread) == (3, 0)


async def test_a_sink_that_fails_ends_it_and_all_is_closed(hand: Hand) -> None:
    hand.submit(1)
    with pytest.raises(SinkError):
        await forward(numbers(hand), Noting("a", hand.log), Noting("b", hand.log, fails=True))
    assert hand.log[-4:] == ["counters", "close", "close b", "close a"]


@pytest.mark.parametrize("count", [0, -1])
async def test_an_impossible_count(hand: Hand, count: int) -> None:
    with pytest.raises(ArgumentError, match=f"count={count} is impossible"):
        await forward(numbers(hand), Noting("a", hand.log), count=count)
    assert hand.log == []


async def test_what_count_cuts_off_was_not_delivered(hand: Hand) -> None:
    hand.submit(1, 2)
    hand.submit(3, 4, 5)
    statistics = await forward(numbers(hand), Noting("a", hand.log), count=4)
    assert [entry for entry in hand.log if entry.startswith("a ")] == ["a [1, 2]", "a [3, 4]"]
    assert (statistics.received, statistics.delivered, statistics.unread) == (5, 4, 1)
