"""How the command ends, with a stream and a sink that a test holds in its hands."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from ebpfstream import cli
from ebpfstream.errors import ArgumentError, SinkClosedError, SinkError
from ebpfstream.forwarding import Forwarding
from ebpfstream.redaction import SECRETS
from ebpfstream.sink import Sink
from ebpfstream.sinks.stdout import StdoutSink
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
        assert await cli._ship(forwarding(hand, StdoutSink(fd=writer))) == signal.SIGPIPE
    os.close(writer)


async def test_a_reader_that_goes_is_noticed_by_writing(hand: Hand) -> None:
    hand.submit(1)
    with anyio.fail_after(5):
        assert await cli._ship(forwarding(hand, Stuck(error=SinkClosedError("gone")))) == signal.SIGPIPE


async def test_another_error_is_raised_as_it_is(hand: Hand) -> None:
    hand.submit(1)
    with pytest.raises(SinkError, match="full"):
        await cli._ship(forwarding(hand, Stuck(error=SinkError("full"))))


async def test_a_second_signal_ends_it_at_once(hand: Hand) -> None:
    hand.submit(1)
    hand.on["detach"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    sink = Stuck(lambda: os.kill(os.getpid(), signal.SIGINT))
    with anyio.fail_after(5):
        assert await cli._ship(forwarding(hand, sink)) == signal.SIGTERM


async def test_one_signal_ends_it_by_the_deadline(hand: Hand) -> None:
    hand.submit(1)
    began = anyio.current_time()
    sink = Stuck(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with anyio.fail_after(5):
        assert await cli._ship(forwarding(hand, sink, deadline=0.2)) == signal.SIGTERM
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
            assert await cli._ship(forwarding(hand, Reopening())) == signal.SIGTERM
    assert opened == 3


async def test_a_terminal_that_hangs_up_ends_it(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [True, False]
    monkeypatch.setattr(cli, "_has_terminal", lambda: answers.pop(0))

    async def hang_up() -> None:
        await anyio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGHUP)

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hang_up)
            assert await cli._ship(forwarding(hand, Stuck())) == signal.SIGHUP
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
    assert cli._fields(given) == meant


def test_redaction() -> None:
    assert cli._redaction(usual=False, patterns=()) is False
    assert cli._redaction(usual=True, patterns=()) is True
    assert cli._redaction(usual=False, patterns=("x",)) == ["x"]
    assert cli._redaction(usual=True, patterns=("x",)) == [*SECRETS, "x"]


def test_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [sink.name for sink in cli._sinks(("stdout:", "blackhole:"), None)] == ["stdout", "blackhole"]
    with pytest.raises(
        ArgumentError, match=r"--format is for the standard output alone; with --to write stdout:\?format="
    ):
        cli._sinks(("blackhole:",), "json")
