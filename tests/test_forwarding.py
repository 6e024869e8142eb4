"""From a stream that a test holds in its hands (tests/test_stream.py) to sinks that note what is done to them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ebpfstream.batch import EventBatch
from ebpfstream.dead_letters import DeadLetters
from ebpfstream.errors import (
    ArgumentError,
    QueueFullError,
    SinkClosedError,
    SinkError,
    SinkRejectedError,
    SinkUnavailableError,
)
from ebpfstream.forwarding import Forwarding, forward
from ebpfstream.lost import Lost
from ebpfstream.opening import alone, open_whole
from ebpfstream.outlet import Outlet
from ebpfstream.records import Records
from ebpfstream.sink import Sink
from ebpfstream.sinks.file import FileSink
from ebpfstream.statistics import ForwardStatistics, SinkStatistics
from ebpfstream.stream import EventStream
from ebpfstream.testing import ExampleEvent, make_batch
from ebpfstream.testing.cancelling import Outcome, Way, cancelled_at
from ebpfstream.testing.harness import at_each_await, held
from tests.test_file import disk
from tests.test_stream import Hand, Number, hand, numbers

pytestmark = pytest.mark.anyio
__all__ = ["disk", "hand"]

Answer = Callable[[EventBatch[Any]], Awaitable[Any]]


class Noting(Sink):
    """Writes what is done to it into the log that the source writes into as well.

    `answers` are what its sends do, one after the other, before they take the batch; those that follow take it at once.
    """

    def __init__(
        self, name: str, log: list[str] | None = None, *answers: Answer | Exception | None, **delivery: Any
    ) -> None:
        super().__init__(**delivery)
        self.name, self.log, self._answers = name, [] if log is None else log, list(answers)
        self.numbers: list[int | Lost] = []
        self.receipts: list[anyio.Event] | None = None

    async def open(self) -> None:
        await checkpoint()
        self.log.append(f"open {self.name}")

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        await checkpoint()
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, Exception):
            raise answer
        taken = await answer(batch) if answer is not None else None
        items = [item if isinstance(item, Lost) else item.number for item in batch]
        self.numbers += items
        self.log.append(f"{self.name} {items}")
        return taken if isinstance(taken, Awaitable) else None

    async def flush(self) -> None:
        await checkpoint()
        self.log.append(f"flush {self.name}")

    async def reopen(self) -> None:
        self.log.append(f"reopen {self.name}")

    async def aclose(self, deadline: float = 1) -> None:
        await checkpoint()
        self.log.append(f"close {self.name}")


async def stuck(batch: EventBatch[Any]) -> None:
    await anyio.sleep_forever()


def balanced(statistics: ForwardStatistics) -> ForwardStatistics:
    for sink in statistics.sinks:
        assert sink.accepted == sink.acknowledged + sink.dropped + sink.failed + sink.in_flight
        assert statistics.stream.delivered == statistics.filtered + sink.accepted
    return statistics


def ended(statistics: ForwardStatistics) -> tuple[SinkStatistics, ...]:
    assert all((sink.in_flight, sink.queued) == (0, 0) for sink in balanced(statistics).sinks)
    return statistics.sinks


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.001)


# --- the order of things


async def test_the_order_of_things_with_two_sinks(hand: Hand) -> None:
    hand.submit(1, 2)
    hand.submit(3, 4, 5)
    hand.submit(6)
    sinks = [Noting("a", hand.log), Noting("b", hand.log)]
    statistics = await forward(numbers(hand), *sinks, count=4)
    log = [entry for entry in hand.log if entry != "drain"]
    assert log[:3] == ["open a", "open b", "open"]
    for name in "ab":
        own = [entry for entry in log if entry.split()[-1] == name or entry.startswith(f"{name} ")]
        assert own == [f"open {name}", f"{name} [1, 2]", f"{name} [3, 4]", f"flush {name}", f"close {name}"]
    assert log[9:14] == ["stop", "wait", "finish", "counters", "close"]
    assert set(log[14:]) == {"close a", "close b"}
    assert statistics.stream.received == statistics.stream.submitted == 6
    assert (statistics.stream.delivered, statistics.stream.unread) == (4, 2)
    assert [(sink.name, sink.acknowledged, sink.batches) for sink in ended(statistics)] == [
        ("a", 4, 2),
        ("b", 4, 2),
    ]


async def test_it_ends_when_the_stream_is_detached(hand: Hand) -> None:
    events, sink = numbers(hand), Noting("a")
    hand.submit(1, 2)
    hand.on["drain"] = events.detach
    hand.on["wait"] = lambda: hand.submit(3)
    statistics = await forward(events, sink)
    assert sink.numbers == [1, 2, 3]
    assert (statistics.stream.delivered, statistics.stream.unread) == (3, 0)
    assert sink.log[-2:] == ["flush a", "close a"]


async def test_losses_alone_are_forwarded_and_do_not_end_it(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [(Lost(0, 7),), (), (Lost(1, 2),)]
    monkeypatch.setattr(hand, "losses", lambda records, time: lost.pop(0) if lost else ())
    events, sink = EventStream(hand, Number, latency=0, on_lost="yield"), Noting("a")
    hand.ready.append(Records(b"", 0, []))
    hand.submit(1)
    hand.on["wait"] = lambda: None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forward, events, sink)
        await until(lambda: 1 in sink.numbers)
        events.detach()
    assert sink.numbers == [Lost(0, 7), 1, Lost(1, 2)]


async def test_a_function_is_a_sink(hand: Hand) -> None:
    seen: list[int] = []

    async def take(batch: EventBatch[Any]) -> None:
        await checkpoint()
        seen.extend(event.number for event in batch)

    hand.submit(1, 2, 3)
    (sink,) = ended(await forward(numbers(hand), take, count=3))
    assert seen == [1, 2, 3]
    assert sink.name.endswith("take")


@pytest.mark.parametrize(
    ("message", "arguments", "options"),
    [
        ("count=0 is impossible", [Noting("a")], {"count": 0}),
        ("count=-1 is impossible", [Noting("a")], {"count": -1}),
        ("deadline=-1 is impossible", [Noting("a")], {"deadline": -1}),
        ("there is no sink to forward to", [], {}),
        ("a sink is given twice", [same := Noting("a"), same], {}),
    ],
)
async def test_what_cannot_be_asked_for(
    hand: Hand, message: str, arguments: list[Sink], options: dict[str, Any]
) -> None:
    with pytest.raises(ArgumentError, match=message):
        await forward(numbers(hand), *arguments, **options)
    assert hand.log == []


# --- between


async def test_where_leaves_out_and_count_is_of_the_others(hand: Hand) -> None:
    hand.submit(1, 2, 3, 4)
    hand.submit(5, 6, 7, 8)
    sink = Noting("a")
    statistics = await forward(numbers(hand), sink, where=lambda event: event.number % 2 == 0, count=3)
    assert sink.numbers == [2, 4, 6]
    assert statistics.filtered == 3
    assert ended(statistics)[0].accepted == 3


async def test_what_stands_between_can_be_changed_meanwhile(hand: Hand) -> None:
    lines: list[bytes] = []

    async def keep(batch: EventBatch[Any]) -> None:
        lines.append(batch.to_json_lines())
        if len(lines) == 1:
            with pytest.raises(ArgumentError, match="has no field 'nomber'"):
                forwarding.reshape(fields=["nomber"])
            forwarding.reshape(where=lambda event: event.number > 1, fields={"number": "n"})
            hand.submit(1, 2)
        else:
            forwarding.end()

    forwarding = Forwarding(numbers(hand), keep, where=lambda event: event.number < 2)
    hand.submit(1, 2)
    statistics = await forwarding.run()
    assert lines == [b'{"number":1}\n', b'{"n":2}\n']
    assert statistics.filtered == 2


async def test_an_error_of_where_ends_it(hand: Hand) -> None:
    hand.submit(1)
    hand.submit(0)
    sink = Noting("a")
    forwarding = Forwarding(numbers(hand), sink, where=lambda event: 1 / event.number)
    with pytest.raises(ZeroDivisionError):
        await forwarding.run()
    assert sink.numbers == [1]
    assert sink.log[-2:] == ["flush a", "close a"]
    assert ended(forwarding.statistics())[0].dropped == 1


async def test_fields_and_redaction_reach_the_sink(hand: Hand) -> None:
    lines = []

    async def take(batch: EventBatch[Any]) -> None:
        lines.append(batch.to_json_lines())

    hand.submit(1, 2)
    await forward(numbers(hand), take, count=2, fields={"number": "n"}, redact=True)
    assert lines == [b'{"n":1}\n{"n":2}\n']


# --- a sink that is slow


async def slow_and_fast(hand: Hand, slow: Noting, fast: Noting, then: anyio.Event) -> ForwardStatistics:
    """Six batches for both, while the slow one is busy with the first; each batch has 32 bytes."""
    events = numbers(hand)
    forwarding = Forwarding(events, slow, fast)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for first in range(0, 12, 2):
            hand.submit(first, first + 1)
            await until(lambda first=first: first + 1 in fast.numbers)  # type: ignore[misc]
        assert slow.numbers == []
        balanced(forwarding.statistics())
        then.set()
        events.detach()
    return forwarding.statistics()


async def test_newest_batches_are_dropped_and_told_where_they_are_missing(hand: Hand) -> None:
    go = anyio.Event()

    async def wait(batch: EventBatch[Any]) -> None:
        await go.wait()

    slow, fast = Noting("slow", None, wait, when_full="drop_newest", queue_size=70), Noting("fast")
    sinks = ended(await slow_and_fast(hand, slow, fast, go))
    assert fast.numbers == list(range(12))
    assert slow.numbers[:4] == [0, 1, 2, 3]
    (lost,) = slow.numbers[4:]
    assert isinstance(lost, Lost)
    assert (lost.cpu, lost.count) == (None, 8)
    assert lost.time is not None
    assert [(sink.acknowledged, sink.dropped) for sink in sinks] == [(4, 8), (12, 0)]
    assert sinks[0].queued_most == 64


async def test_oldest_batches_are_dropped_and_told_where_they_are_missing(hand: Hand) -> None:
    go = anyio.Event()

    async def wait(batch: EventBatch[Any]) -> None:
        await go.wait()

    slow, fast = Noting("slow", None, wait, when_full="drop_oldest", queue_size=100), Noting("fast")
    sinks = ended(await slow_and_fast(hand, slow, fast, go))
    assert fast.numbers == list(range(12))
    head, (lost, *rest) = slow.numbers[:2], slow.numbers[2:]
    assert isinstance(lost, Lost)
    assert (head, (lost.cpu, lost.count), rest) == ([0, 1], (None, 6), [8, 9, 10, 11])
    assert [(sink.acknowledged, sink.dropped) for sink in sinks] == [(6, 6), (12, 0)]


async def test_what_was_lost_before_is_told_with_what_is_dropped(hand: Hand) -> None:
    """Losses that belong to a batch that is dropped stay losses: one for each CPU."""

    def batch(*lost: Lost) -> EventBatch[Number]:
        return EventBatch(Number, Records(bytes(16), 8, [(0, 16, 8, 1)]), 0, lost)

    sink = Noting("a", when_full="drop_newest", queue_size=16)
    outlet = Outlet(sink, Number)
    assert outlet.offer(batch())
    assert outlet.offer(batch(Lost(0, 2, 10, 11), Lost(1, None)))
    assert outlet.offer(batch(Lost(0, 3, 20, 22), Lost(1, 5)))
    outlet.finish()
    await outlet.send_all()
    told = {one.cpu: one for one in sink.numbers if isinstance(one, Lost)}
    assert (told[0], told[1].count, told[None].count) == (Lost(0, 5, 10, 22), None, 2)


async def test_a_sink_that_blocks_sets_the_pace_and_loses_nothing(hand: Hand) -> None:
    go = anyio.Event()

    async def wait(batch: EventBatch[Any]) -> None:
        await go.wait()

    slow, fast, events = Noting("slow", None, wait, queue_size=40), Noting("fast"), numbers(hand)
    forwarding = Forwarding(events, slow, fast)
    for first in range(0, 12, 2):
        hand.submit(first, first + 1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: 3 in fast.numbers)
        for _ in range(20):
            await anyio.sleep(0.001)
        assert fast.numbers == [0, 1, 2, 3]  # one batch for the queue, and the next is waiting for room
        assert forwarding.statistics().stream.delivered == 4
        go.set()
        events.detach()
    assert slow.numbers == fast.numbers == list(range(12))
    assert [sink.dropped for sink in ended(forwarding.statistics())] == [0, 0]


async def test_a_sink_that_is_to_fail_when_its_queue_is_full(hand: Hand) -> None:
    slow = Noting("slow", None, stuck, when_full="fail", queue_size=40)
    fast = Noting("fast")
    for first in range(0, 6, 2):
        hand.submit(first, first + 1)
    forwarding = Forwarding(numbers(hand), slow, fast, deadline=0.2)
    with pytest.raises(
        QueueFullError, match=r"the queue of slow is full \(32 of 40 bytes\): make queue_size"
    ):
        await forwarding.run()
    sinks = ended(forwarding.statistics())
    assert fast.numbers in ([], [0, 1], [0, 1, 2, 3])
    assert [sink.acknowledged for sink in sinks] == [0, len(fast.numbers)]


async def test_a_batch_larger_than_the_queue_is_taken_when_it_is_empty(hand: Hand) -> None:
    sink = Noting("a", queue_size=1)
    hand.submit(*range(10))
    hand.submit(*range(10, 20))
    await forward(numbers(hand), sink, count=20)
    assert sink.numbers == list(range(20))


# --- a sink that fails


async def test_what_is_unavailable_is_offered_again_without_what_has_arrived(
    hand: Hand, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebpfstream.outlet._FIRST_DELAY", 0.001)
    offered = []

    async def take_one(batch: EventBatch[Any]) -> None:
        offered.append([event.number for event in batch])
        sink.numbers.append(next(iter(batch)).number)
        raise SinkUnavailableError("the disk is full", taken=1)

    sink = Noting("a", None, take_one, SinkUnavailableError("still full"), take_one)
    hand.submit(1, 2, 3)
    hand.submit(4)
    with caplog.at_level(logging.WARNING, "ebpfstream"):
        (ledger,) = ended(await forward(numbers(hand), sink, count=4))
    assert offered == [[1, 2, 3], [2, 3]]
    assert sink.numbers == [1, 2, 3, 4]
    assert (ledger.acknowledged, ledger.retries, ledger.last_error) == (4, 3, "the disk is full")
    assert [record.message for record in caplog.records] == [
        "a: the disk is full; trying again",
        "a: going on",
    ]


def letters(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(datetime.fromisoformat(letter.pop("time")).tzinfo for letter in found)
    return found


async def test_what_is_given_up_goes_to_the_dead_letters(hand: Hand, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    sink = Noting(
        "a",
        None,
        SinkUnavailableError("away", taken=1),
        SinkRejectedError("too large", taken=1),
        retry_for=0,
        dead_letters=str(path),
    )
    for first in (1, 11, 21):
        hand.submit(first, first + 1, first + 2)
    (ledger,) = ended(await forward(numbers(hand), sink, count=9))
    assert sink.numbers == [21, 22, 23]
    assert (ledger.acknowledged, ledger.failed) == (5, 4)
    assert letters(path) == [
        {"sink": "a", "reason": reason, "event": {"number": number}}
        for reason, number in (("away", 2), ("away", 3), ("too large", 12), ("too large", 13))
    ]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_without_dead_letters_it_is_said(hand: Hand, caplog: pytest.LogCaptureFixture) -> None:
    hand.submit(1, 2)
    with caplog.at_level(logging.ERROR, "ebpfstream"):
        await forward(numbers(hand), Noting("a", None, SinkRejectedError("too large")), count=2)
    assert [record.message for record in caplog.records] == ["a: 2 events are given up: too large"]


async def test_dead_letters_that_cannot_be_opened(hand: Hand, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # that nobody reads
    (tmp_path / "text").write_bytes(b"hello\n")
    before = held()
    for name, message in {
        ".": "is a folder: give a file's name in it",
        "fifo": "is a pipe, and only a regular file can be repaired",
        "/dev/full": "is a device",
        "missing/dead.jsonl": "No such file or directory: make its folder",
        "text": "does not end with a line of JSON: give another file",
    }.items():
        with anyio.fail_after(10), pytest.raises(SinkError, match=f"dead_letters='.*': .*{message}"):
            await forward(numbers(hand), Noting("a", dead_letters=str(tmp_path / name)))
    assert "open" not in hand.log
    assert held() == before
    assert (tmp_path / "text").read_bytes() == b"hello\n"


@pytest.mark.parametrize("events_first", [True, False])
async def test_dead_letters_in_a_file_of_events(hand: Hand, tmp_path: Path, events_first: bool) -> None:
    path = tmp_path / "events.jsonl"
    sinks: list[Sink] = [FileSink(path), Noting("a", dead_letters=str(path))]
    with pytest.raises(SinkError, match="another process or sink is writing to it: give each a file"):
        await forward(numbers(hand), *sinks[:: 1 if events_first else -1])
    with pytest.raises(SinkError, match="another process or sink is writing to it: give each a file"):
        await forward(numbers(hand), FileSink(path, dead_letters=str(path)))
    assert path.read_bytes() == b""


async def test_dead_letters_that_were_moved_away_go_on_in_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "dead"
    letters = DeadLetters(str(path), "a sink")
    await letters.open()
    await letters.add(make_batch([ExampleEvent(1, "a", "b")]), "first")
    path.rename(tmp_path / "old")
    await letters.add(make_batch([ExampleEvent(2, "a", "b")]), "second")
    letters.close()
    reasons = [json.loads((tmp_path / name).read_text())["reason"] for name in ("old", "dead")]
    assert reasons == ["first", "second"]


async def test_torn_dead_letters_are_repaired(hand: Hand, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    path.write_bytes(b'{"whole":1}\n{"torn":')
    hand.submit(1)
    await forward(numbers(hand), Noting("a", None, SinkRejectedError("no"), dead_letters=str(path)), count=1)
    first, second = (json.loads(line) for line in path.read_bytes().splitlines())
    assert (first, second["event"]) == ({"whole": 1}, {"number": 1})


_OTHER = """
import sys, time
from pathlib import Path
from ebpfstream.opening import alone, open_whole
fd = open_whole(Path(sys.argv[1]), 0o600, shared=True).fd
with alone(fd):
    print(flush=True)
    sys.stdin.readline()
"""


async def test_sinks_share_dead_letters(hand: Hand, tmp_path: Path) -> None:
    """With those of another process; each line is whole."""
    path = tmp_path / "dead.jsonl"
    many = 50

    def rejecting(name: str) -> Sink:
        errors = [SinkRejectedError(name * 9000) for _ in range(many)]
        return Noting(name, None, *errors, dead_letters=str(path))

    for number in range(many):
        hand.submit(number)
    other = subprocess.Popen(
        [sys.executable, "-c", _OTHER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout
        assert other.stdin
        assert other.stdout.readline() == b"\n"
        with pytest.raises(SinkError, match="another process or sink"):
            await FileSink(path).open()
        other.stdin.close()  # it goes
        ledgers = ended(await forward(numbers(hand), rejecting("a"), rejecting("b"), count=many))
    assert [ledger.failed for ledger in ledgers] == [many, many]
    found = letters(path)
    for name in "ab":
        own = [letter["event"]["number"] for letter in found if letter["reason"] == name * 9000]
        assert own == list(range(many))
    assert len(found) == 2 * many


async def test_dead_letters_wait_while_another_appends(
    hand: Hand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not for ever; what is there stays whole."""
    path = tmp_path / "dead.jsonl"
    ours, theirs = DeadLetters(str(path), "a"), open_whole(path, 0o600, shared=True).fd
    await ours.open()
    batch = make_batch([ExampleEvent(1, "a", "b")])
    async with anyio.create_task_group() as tasks:
        with alone(theirs):
            tasks.start_soon(ours.add, batch, "first")
            await anyio.sleep(0.05)
            assert path.read_bytes() == b""
    assert [letter["reason"] for letter in letters(path)] == ["first"]
    monkeypatch.setattr("ebpfstream.opening._PATIENCE", 0.01)
    with alone(theirs):
        await ours.add(batch, "second")
        with pytest.raises(SinkError, match="another process or sink is writing to it"):
            await DeadLetters(str(path), "b").open()
    await ours.add(batch, "third")
    assert [letter["reason"] for letter in letters(path)] == ["first", "third"]
    ours.close()
    os.close(theirs)


async def test_dead_letters_on_a_full_disk(hand: Hand, disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What does not get there whole is taken back, and said."""
    path = disk / "dead.jsonl"
    errors = [SinkRejectedError("x" * size) for size in (20_000, 20_000, 1)]
    for number in (1, 2, 3):
        hand.submit(number)
    with caplog.at_level(logging.ERROR, "ebpfstream"):
        sink = Noting("a", None, *errors, dead_letters=str(path))
        (ledger,) = ended(await forward(numbers(hand), sink, count=3))
    assert ledger.failed == 3
    assert [letter["event"]["number"] for letter in letters(path)] == [1, 3]
    said = f"a: dead letters: cannot append to {path}: No space left on device: make room on its disk"
    assert [record.message.split(",")[0] for record in caplog.records] == [said]


async def test_opening_dead_letters_cancelled_leaves_nothing_open(tmp_path: Path) -> None:
    async def cancel(step: int, way: Way) -> Outcome:
        letters = DeadLetters(str(tmp_path / "dead.jsonl"), "a")
        outcome = await cancelled_at(step, letters.open(), way)
        if outcome.completed:
            letters.close()
        assert held() == before
        return outcome

    before = held()
    await at_each_await(cancel)


async def test_records_that_do_not_fit_are_left_out(hand: Hand, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    sink = Noting("a", dead_letters=str(path))
    hand.submit(1)
    hand.submit(2, size=5)
    hand.submit(3)
    events = numbers(hand)
    forwarding = Forwarding(events, sink)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: 3 in sink.numbers)
        events.detach()
    assert sink.numbers == [1, 3]
    (ledger,) = ended(forwarding.statistics())
    assert (ledger.acknowledged, ledger.failed) == (2, 1)
    (letter,) = letters(path)
    assert letter["record"] == "0200000000"
    assert letter["reason"].startswith("a record of 5 bytes ends before Number.number")


async def test_losses_of_a_batch_that_was_given_up_are_told_with_the_next(hand: Hand) -> None:
    records = Records(bytes(16), 8, [(0, 16, 8, 1)])
    sink = Noting("a", None, SinkRejectedError("no"))
    outlet = Outlet(sink, Number)
    outlet.offer(EventBatch(Number, records, 0, (Lost(3, 2),)))
    outlet.offer(EventBatch(Number, records))
    outlet.finish()
    await outlet.send_all()
    assert sink.numbers == [Lost(3, 2), 0]


@pytest.mark.parametrize("error", [SinkError("broken"), SinkClosedError("gone"), TypeError("a bug")])
async def test_when_a_sink_fails_for_good_the_others_get_what_there_is(hand: Hand, error: Exception) -> None:
    hand.submit(1)
    hand.submit(2)
    hand.on["wait"] = lambda: hand.submit(3)
    good, bad = Noting("good"), Noting("bad", None, error)
    forwarding = Forwarding(numbers(hand), bad, good)
    with pytest.raises(type(error), match=str(error)):
        await forwarding.run()
    assert good.numbers == [1, 2, 3]
    assert good.log[-2:] == ["flush good", "close good"]
    assert bad.log == ["open bad", "close bad"]
    assert [sink.acknowledged for sink in ended(forwarding.statistics())] == [0, 3]


async def test_a_sink_that_does_not_open(hand: Hand) -> None:
    class Closed(Noting):
        async def open(self) -> None:
            raise SinkError("no such place")

    first, bad = Noting("first"), Closed("bad")
    with pytest.raises(SinkError, match="no such place"):
        await forward(numbers(hand), first, bad, Noting("third", hand.log))
    assert first.log == ["open first", "close first"]
    assert bad.log == []
    assert [entry for entry in hand.log if entry != "counters"] == []


async def test_whether_a_sink_is_away(
    hand: Hand, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it takes what it is sent, or can do what it could not do."""
    monkeypatch.setattr("ebpfstream.outlet._FIRST_DELAY", 0.001)
    monkeypatch.setattr("ebpfstream.outlet._LONGEST_DELAY", 0.001)

    class Failing(Noting):
        failing = ""

        async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
            self.fail("send")
            return await super().send(batch)

        async def flush(self) -> None:
            self.fail("flush")

        async def reopen(self) -> None:
            self.fail("reopen")

        def fail(self, what: str) -> None:
            if self.failing == what:
                raise SinkUnavailableError(f"no {what}")

    sink, events = Failing("a"), numbers(hand)
    sink.flush_every = 0.001
    forwarding = Forwarding(events, sink, Noting("b"))

    def away() -> bool:
        of_a, of_b = forwarding.statistics().sinks
        assert not of_b.away
        return of_a.away

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        for number, failing in enumerate(("send", "flush", "reopen")):
            assert not away()
            sink.failing = failing
            if failing == "reopen":
                forwarding.reopen()
            else:
                hand.submit(number)
            await until(away)
            assert forwarding.statistics().sinks[0].last_error == f"no {failing}"
            sink.failing = ""
            await until(lambda: not away())
        events.detach()
    said = [record.message for record in caplog.records]
    assert list(dict.fromkeys(said[::2])) == [
        f"a: no {what}; trying again" for what in ("send", "flush", "reopen")
    ]
    assert set(said[1::2]) == {"a: going on"}
    assert len(said) % 2 == 0


class Clock:
    """Goes as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in ("backlog", "outlet"):
            monkeypatch.setattr(f"ebpfstream.{module}.monotonic", lambda: self.now)


async def test_the_age_of_the_oldest_that_has_not_arrived(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, sink = Clock(monkeypatch), Ahead()
    events = numbers(hand)
    forwarding = Forwarding(events, sink)

    def lag() -> float:
        (ledger,) = forwarding.statistics().sinks
        return ledger.lag

    async def after(answers: int, *errors: Exception) -> float:
        left = len(sink.pending) - answers
        before = forwarding.statistics().sinks[0].in_flight
        for _ in range(answers):
            sink.answer(*errors)
        await until(lambda: forwarding.statistics().sinks[0].in_flight == before - answers)
        assert len(sink.pending) == left
        return lag()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        assert lag() == 0
        for number in (1, 2, 3, 4):
            hand.submit(number)
            await until(lambda number=number: len(sink.pending) == number)  # type: ignore[misc]
            clock.now += 10
        assert lag() == 40
        assert await after(1) == 30
        assert await after(1, SinkRejectedError("no")) == 20  # given up, it is not waited for
        clock.now += 0.5
        assert await after(1) == 10.5
        assert await after(1) == 0
        clock.now += 10
        assert lag() == 0
        hand.submit(5)
        await until(lambda: sink.pending)
        clock.now += 1
        assert lag() == 1
        sink.answer()
        events.detach()
    assert lag() == 0


async def test_the_age_of_what_waits_in_the_queue_and_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    go = anyio.Event()

    async def part(batch: EventBatch[Any]) -> None:
        await go.wait()
        raise SinkUnavailableError("no", taken=1)

    records = Records(bytes(32), 8, [(0, 16, 8, 2)])
    outlet = Outlet(Noting("a", None, part, stuck), Number)
    outlet.offer(EventBatch(Number, records)[:0].with_lost((Lost(0, 1),)))  # no event
    clock.now += 5
    assert outlet.statistics().lag == 0
    outlet.offer(EventBatch(Number, records))
    clock.now += 5
    assert outlet.statistics().lag == 5
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outlet.send_all)
        go.set()
        await until(lambda: outlet.statistics().retries)
        assert outlet.statistics().lag == 5
        tasks.cancel_scope.cancel()


# --- a sink that sends ahead


class Ahead(Noting):
    """Acknowledges when it is told to."""

    def __init__(self, **delivery: Any) -> None:
        super().__init__("ahead", **delivery)
        self.pending: list[tuple[anyio.Event, list[Exception]]] = []

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None]:
        await super().send(batch)
        event, errors = anyio.Event(), list[Exception]()
        self.pending.append((event, errors))

        async def arrived() -> None:
            await event.wait()
            if errors:
                raise errors[0]

        return arrived()

    def answer(self, *errors: Exception) -> None:
        event, with_errors = self.pending.pop(0)
        with_errors += errors
        event.set()


async def test_what_is_sent_ahead_counts_when_it_is_acknowledged(hand: Hand, tmp_path: Path) -> None:
    path = tmp_path / "dead.jsonl"
    sink, events = Ahead(dead_letters=str(path)), numbers(hand)
    forwarding = Forwarding(events, sink)
    for number in (1, 2, 3):
        hand.submit(number)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: len(sink.pending) == 3)
        (ledger,) = balanced(forwarding.statistics()).sinks
        assert (ledger.acknowledged, ledger.in_flight) == (0, 3)
        events.detach()
        sink.answer()
        await until(lambda: forwarding.statistics().sinks[0].acknowledged == 1)
        sink.answer(SinkRejectedError("no"))
        await until(lambda: forwarding.statistics().sinks[0].failed == 1)
        assert "flush ahead" not in sink.log
        sink.answer()
    assert sink.log[-2:] == ["flush ahead", "close ahead"]
    assert [letter["event"] for letter in letters(path)] == [{"number": 2}]
    assert ended(forwarding.statistics())[0].acknowledged == 2


@pytest.mark.parametrize("error", [SinkClosedError("gone"), TypeError("a bug")])
async def test_what_is_sent_ahead_may_end_it(hand: Hand, error: Exception) -> None:
    sink = Ahead()
    forwarding = Forwarding(numbers(hand), sink)
    hand.submit(1)
    hand.submit(2)
    async with anyio.create_task_group() as tasks:

        async def run() -> None:
            with pytest.raises(type(error), match=str(error)):
                await forwarding.run()

        tasks.start_soon(run)
        await until(lambda: len(sink.pending) == 2)
        sink.answer(error)
    (ledger,) = ended(forwarding.statistics())
    assert (ledger.acknowledged, ledger.dropped) == (0, 2)


async def test_what_arrives_while_the_sink_closes_is_acknowledged(hand: Hand) -> None:
    class Late(Ahead):
        async def aclose(self, deadline: float = 1) -> None:
            self.answer()
            await anyio.sleep(0.01)

    sink = Late()
    hand.submit(1)
    hand.submit(2)
    forwarding = Forwarding(numbers(hand), sink, deadline=0.1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: len(sink.pending) == 2)
        forwarding.end()
    (ledger,) = ended(forwarding.statistics())
    assert (ledger.acknowledged, ledger.dropped) == (1, 1)


# --- the end


def cancellations(backend: tuple[str, dict[str, Any]]) -> list[str]:
    return ["scope", "task"] if backend[0] == "asyncio" else ["scope"]


async def cancelled(how: str, forwarding: Forwarding[Any], when: Callable[[], object]) -> None:
    """Run it, and cancel it once something is so."""
    if how == "scope":
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forwarding.run)
            await until(when)
            tasks.cancel_scope.cancel()
    else:
        task = asyncio.ensure_future(forwarding.run())
        await until(when)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()


async def test_cancelled_it_delivers_what_has_happened(
    hand: Hand, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    expected: list[int | Lost] = []
    for number, how in enumerate(cancellations(anyio_backend)):
        hand.log.clear()
        sink = Noting("a")
        forwarding = Forwarding(numbers(hand), sink)
        hand.submit(number)
        hand.on["wait"] = lambda: hand.submit(7, 8)
        await cancelled(how, forwarding, lambda sink=sink: sink.numbers)  # type: ignore[misc]
        expected = [number, 7, 8]
        assert sink.numbers == expected
        assert sink.log[-2:] == ["flush a", "close a"]
        assert hand.log[-1] == "close"
        assert ended(forwarding.statistics())[0].acknowledged == 3


async def test_cancelled_it_ends_by_its_deadline(
    hand: Hand, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """Though a sink takes nothing; and what it did not get is counted."""
    for how in cancellations(anyio_backend):
        sink, fast = Noting("a", None, stuck, queue_size=40), Noting("fast")
        forwarding = Forwarding(numbers(hand), sink, fast, deadline=1)
        for first in range(0, 6, 2):
            hand.submit(first, first + 1)
        with anyio.fail_after(10):
            await cancelled(how, forwarding, lambda fast=fast: 3 in fast.numbers)  # type: ignore[misc]
        ledger, of_fast = ended(forwarding.statistics())
        assert (ledger.acknowledged, ledger.dropped) == (0, 4)
        assert of_fast.acknowledged == 4
        assert sink.log == ["open a", "close a"]
        hand.ready.clear()


async def test_ended_it_delivers_what_has_happened_and_returns(hand: Hand) -> None:
    sink = Noting("a")
    forwarding = Forwarding(numbers(hand), sink)
    hand.submit(1)
    hand.on["wait"] = lambda: hand.submit(2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        await until(lambda: sink.numbers)
        forwarding.end()
    assert sink.numbers == [1, 2]


async def test_a_second_end_may_be_sooner_but_not_later(hand: Hand) -> None:
    forwarding = Forwarding(numbers(hand), Noting("a", None, stuck), deadline=60)
    hand.submit(1)
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forwarding.run)
            await until(lambda: forwarding.statistics().sinks[0].accepted)
            forwarding.end()
            forwarding.end(0)
            forwarding.end(60)
    assert ended(forwarding.statistics())[0].dropped == 1


async def test_cancelled_while_it_opens(hand: Hand, anyio_backend: tuple[str, dict[str, Any]]) -> None:
    class Slow(Noting):
        async def open(self) -> None:
            await super().open()
            if self.name == "second":
                await anyio.sleep_forever()

    for how in cancellations(anyio_backend):
        hand.log.clear()
        first, second = Slow("first"), Slow("second")
        forwarding = Forwarding(numbers(hand), first, second, deadline=60)
        with anyio.fail_after(10):
            await cancelled(how, forwarding, lambda second=second: second.log)  # type: ignore[misc]
        assert first.log == ["open first", "close first"]
        assert second.log == ["open second"]
        assert "open" not in hand.log


async def test_a_sink_that_does_not_close_cannot_keep_it(hand: Hand) -> None:
    class Hanging(Noting):
        async def aclose(self, deadline: float = 1) -> None:
            await anyio.sleep_forever()

    hand.submit(1)
    with anyio.fail_after(10):
        await forward(numbers(hand), Hanging("a"), Noting("b", hand.log), count=1, deadline=0.1)
    assert hand.log[-1] == "close b"


# --- flush and reopen


async def test_an_idle_sink_is_flushed_when_it_is_time(hand: Hand) -> None:
    sink, events = Noting("a"), numbers(hand)
    sink.flush_every = 0.01
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forward, events, sink)
        for number in range(2):
            hand.submit(number)
            await until(lambda number=number: sink.log.count("flush a") == number + 1)  # type: ignore[misc]
        await anyio.sleep(0.05)  # without anything new there is nothing to flush
        events.detach()
    assert sink.log == ["open a", "a [0]", "flush a", "a [1]", "flush a", "flush a", "close a"]


async def test_a_flush_that_fails_is_tried_again(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfstream.outlet._FIRST_DELAY", 0.001)
    failures = 3

    class Failing(Noting):
        async def flush(self) -> None:
            nonlocal failures
            if failures:
                failures -= 1
                raise SinkUnavailableError("no")
            await super().flush()

    sink = Failing("a")
    hand.submit(1)
    (ledger,) = ended(await forward(numbers(hand), sink, count=1))
    assert sink.log[-2:] == ["flush a", "close a"]
    assert ledger.retries == 3


async def test_sinks_open_anew_at_once(hand: Hand) -> None:
    sink, events = Noting("a"), numbers(hand)
    forwarding = Forwarding(events, sink)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forwarding.run)
        hand.submit(1)
        await until(lambda: sink.numbers)
        forwarding.reopen()
        await until(lambda: "reopen a" in sink.log)
        hand.submit(2)
        await until(lambda: 2 in sink.numbers)
        events.detach()
    assert sink.log == ["open a", "a [1]", "reopen a", "a [2]", "flush a", "close a"]
