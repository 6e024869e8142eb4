"""How the command ends, with a stream and a sink that a test holds in its hands."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from ebpfstream import cli
from ebpfstream.errors import SinkClosedError, SinkError
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


async def test_a_reader_that_goes_is_noticed_though_nothing_happens(hand: Hand) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with anyio.fail_after(2):
        assert await cli._ship(numbers(hand), StdoutSink(fd=writer), None) == signal.SIGPIPE
    os.close(writer)


async def test_a_reader_that_goes_is_noticed_by_writing(hand: Hand) -> None:
    hand.submit(1)
    with anyio.fail_after(2):
        assert await cli._ship(numbers(hand), Stuck(error=SinkClosedError("gone")), None) == signal.SIGPIPE


async def test_another_error_is_raised_as_it_is(hand: Hand) -> None:
    hand.submit(1)
    with pytest.raises(SinkError, match="full"):
        await cli._ship(numbers(hand), Stuck(error=SinkError("full")), None)


async def test_a_second_signal_ends_it_at_once(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_DEADLINE", 60.0)
    hand.submit(1)
    hand.on["detach"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    sink = Stuck(lambda: os.kill(os.getpid(), signal.SIGINT))
    with anyio.fail_after(2):
        assert await cli._ship(numbers(hand), sink, None) == signal.SIGINT


async def test_one_signal_ends_it_by_the_deadline(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_DEADLINE", 0.1)
    hand.submit(1)
    began = anyio.current_time()
    sink = Stuck(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with anyio.fail_after(2):
        assert await cli._ship(numbers(hand), sink, None) == signal.SIGTERM
    assert anyio.current_time() >= began + 0.1
    assert "detach" in hand.log
