"""How the command ends, with a stream and a sink that a test holds in its hands."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from ebpfstream.batch import EventBatch
from ebpfstream.cli import shipping
from ebpfstream.errors import ArgumentError, SinkClosedError, SinkError
from ebpfstream.forwarding import Forwarding
from ebpfstream.redaction import SECRETS, wanted
from ebpfstream.sink import Sink
from ebpfstream.sinks.stdout import StdoutSink
from ebpfstream.statistics import ForwardStatistics, SinkStatistics, Statistics
from tests.test_stream import Hand, hand, numbers

pytestmark = pytest.mark.anyio
__all__ = ["hand"]


class Stuck(StdoutSink):
    """Takes nothing, and calls `then` when it is first asked to."""

    def __init__(self, then: Callable[[], None] = lambda: None, error: Exception | None = None) -> None:
        super().__init__()
        self._then, self._error = then, error

    async def open(self) -> None:
        pass

    async def send(self, batch: Any) -> None:
        self._then()
        if self._error is not None:
            raise self._error
        await anyio.sleep_forever()

    async def wait_closed(self) -> None:
        await anyio.sleep_forever()


def forwarding(hand: Hand, *sinks: Sink, deadline: float = 60) -> Forwarding[Any]:
    return Forwarding(numbers(hand), *sinks, deadline=deadline)


async def test_a_reader_that_goes_is_noticed_though_nothing_happens(hand: Hand) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with anyio.fail_after(5):
        assert await shipping.ship(forwarding(hand, StdoutSink(fd=writer))) == signal.SIGPIPE
    os.close(writer)


async def test_a_reader_that_goes_is_noticed_by_writing(hand: Hand) -> None:
    hand.submit(1)
    with anyio.fail_after(5):
        assert await shipping.ship(forwarding(hand, Stuck(error=SinkClosedError("gone")))) == signal.SIGPIPE


async def test_another_error_is_raised_as_it_is(hand: Hand) -> None:
    hand.submit(1)
    with pytest.raises(SinkError, match="full"):
        await shipping.ship(forwarding(hand, Stuck(error=SinkError("full"))))


async def test_a_second_signal_ends_it_at_once(hand: Hand) -> None:
    hand.submit(1)
    hand.on["detach"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    sink = Stuck(lambda: os.kill(os.getpid(), signal.SIGINT))
    with anyio.fail_after(5):
        assert await shipping.ship(forwarding(hand, sink)) == signal.SIGTERM


async def test_the_same_signal_at_the_same_time_is_no_second_one(hand: Hand) -> None:
    """timeout(1) sends it to the process and to its group."""
    hand.submit(1)
    signals = [signal.SIGTERM] * 2
    taken: list[int] = []

    class Slow(Stuck):
        async def send(self, batch: Any) -> None:
            while signals:
                os.kill(os.getpid(), signals.pop())
                await anyio.sleep(0.05)
            taken.append(len(batch))

    with anyio.fail_after(5):
        assert await shipping.ship(forwarding(hand, Slow())) == signal.SIGTERM
    assert taken == [1]


async def test_one_signal_ends_it_by_the_deadline(hand: Hand) -> None:
    hand.submit(1)
    began = anyio.current_time()
    sink = Stuck(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with anyio.fail_after(5):
        assert await shipping.ship(forwarding(hand, sink, deadline=0.2)) == signal.SIGTERM
    assert anyio.current_time() >= began + 0.1
    assert "detach" in hand.log


async def test_hanging_up_opens_files_anew(hand: Hand) -> None:
    """Unless it was the terminal that hung up."""
    opened = 0

    class Reopening(Stuck):
        async def reopen(self) -> None:
            nonlocal opened
            opened += 1
            os.kill(os.getpid(), signal.SIGHUP if opened < 3 else signal.SIGTERM)

    async def hang_up() -> None:
        await anyio.sleep(0.05)  # until it heeds signals
        os.kill(os.getpid(), signal.SIGHUP)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hang_up)
            assert await shipping.ship(forwarding(hand, Reopening())) == signal.SIGTERM
    assert opened == 3


async def test_a_terminal_that_hangs_up_ends_it(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [True, False]
    monkeypatch.setattr(shipping, "has_terminal", lambda: answers.pop(0))

    async def hang_up() -> None:
        await anyio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGHUP)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hang_up)
            assert await shipping.ship(forwarding(hand, Stuck())) == signal.SIGHUP
    assert not answers


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        ("pid", {"pid": "pid"}),
        ("pid,comm=name, args", {"pid": "pid", "comm": "name", "args": "args"}),
    ],
)
def test_fields(given: str | None, meant: dict[str, str] | None) -> None:
    assert shipping.chosen_fields(given) == meant


def test_redaction() -> None:
    assert wanted(usual=False, patterns=()) is False
    assert wanted(usual=True, patterns=()) is True
    assert wanted(usual=False, patterns=("x",)) == ["x"]
    assert wanted(usual=True, patterns=("x",)) == [*SECRETS, "x"]


def test_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [sink.name for sink in shipping.sinks(("stdout:", "blackhole:"), None)] == ["stdout", "blackhole"]
    with pytest.raises(
        ArgumentError, match=r"--format is for the standard output alone; with --to write stdout:\?format="
    ):
        shipping.sinks(("blackhole:",), "json")


@pytest.mark.parametrize(
    ("stream", "sinks", "complete"),
    [
        ({}, [], True),
        ({"lost": 1}, [], False),
        ({"lost": None}, [], None),
        ({"undecodable": 1}, [], False),
        ({"unread": 3, "rejected": 5}, [{"accepted": 9, "acknowledged": 7, "spooled": 2}], True),
        ({}, [{"accepted": 9, "acknowledged": 9}, {"accepted": 9, "acknowledged": 8, "dropped": 1}], False),
        ({}, [{"accepted": 9, "acknowledged": 8, "failed": 1}], False),
        ({}, [{"accepted": 9, "acknowledged": 8, "in_flight": 1}], False),
        ({"lost": None}, [{"accepted": 9, "acknowledged": 8, "dropped": 1}], False),
    ],
)
def test_complete(stream: dict[str, Any], sinks: list[dict[str, Any]], complete: bool | None) -> None:
    ledgers = tuple(SinkStatistics("sink", **sink) for sink in sinks)
    assert ForwardStatistics(Statistics(**stream), ledgers, filtered=4).complete is complete


async def test_duration_counts_from_when_it_is_attached(hand: Hand) -> None:
    """What comes within that time is forwarded."""
    received: list[int] = []

    async def keep(batch: EventBatch[Any]) -> None:
        received.extend(event.number for event in batch)

    async def submit() -> None:
        await made.attached.wait()
        hand.submit(1)

    made = Forwarding(numbers(hand), keep)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(submit)
            assert await shipping.ship(made, 0.3) == 0
    assert received == [1]
    assert "detach" in hand.log
