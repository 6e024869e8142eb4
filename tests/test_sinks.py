"""Every sink stands what SinkCompliance asks of it; and SinkCompliance finds what is wrong with a sink."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import json
import os
import select
import socket
import termios
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Unpack

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ebpfstream.batch import EventBatch
from ebpfstream.errors import (
    ArgumentError,
    SinkClosedError,
    SinkError,
    SinkRejectedError,
    SinkUnavailableError,
)
from ebpfstream.events import U64, Array, Char, Computed, Event, Flag, Integer, Tail
from ebpfstream.forwarding import FunctionSink
from ebpfstream.lost import Lost
from ebpfstream.sink import CLOSING, Delivery, Sink, open_sink
from ebpfstream.sink_url import OptionError, option_text
from ebpfstream.sinks.blackhole import BlackholeSink
from ebpfstream.sinks.file import FileSink
from ebpfstream.sinks.stdout import StdoutSink
from ebpfstream.testing import ExampleEvent, SinkCompliance, make_batch
from ebpfstream.tracers.execve import ExecEvent
from tests.disks import small_disk

# --- batches


@dataclass
class Everything(Event):
    small: Annotated[int, Integer(1, signed=True)]
    big: U64
    flag: Flag
    name: Annotated[str, Char(8)]
    raw: Annotated[bytes, Char(3)]
    numbers: Annotated[tuple[int, ...], Array(Integer(2, signed=True), 3)]
    words: Annotated[tuple[str, ...], Tail()]
    text: Annotated[str, Tail()]
    data: Annotated[bytes, Tail()]
    doubled: Annotated[int, Computed(lambda big: 2 * big, ("big",))]


def test_a_batch_holds_the_events_that_it_is_made_of() -> None:
    events = [
        Everything(
            -1, 2**64 - 1, True, "12345678", b"\0a\0", (-1, 2, 3), ("", "é\\xff"), "t", b"\0\xff", 2**65 - 2
        ),
        Everything(1, 0, False, "", b"", (0, 0, 0), (), "", b"", 0),
    ]
    events[1].raw = bytes(3)
    lost = [Lost(1, 2), Lost(None, None)]
    batch = make_batch(events * 100, lost=lost)
    assert (len(batch), batch.lost) == (200, tuple(lost))
    assert list(batch) == [*lost, *events * 100]
    plain = make_batch([ExampleEvent(number, "comm", "same") for number in range(1000)])
    assert len(plain.records.runs) == 1
    assert [event.number for event in plain] == list(range(1000))
    assert (len(make_batch([])), make_batch([], type=Everything).event_type) == (0, Everything)


def test_a_batch_of_execs() -> None:
    event: Any = ExecEvent.__new__(ExecEvent)
    for field in dataclasses.fields(ExecEvent):
        setattr(event, field.name, 7)
    event.comm = event.parent_comm = event.tty = "name"
    event.filename, event.args, event.cwd = "/bin/true", ("true", "a b"), b"home\0root\0"
    (got,) = make_batch([event])
    assert (got.pid, got.comm, got.args, got.message) == (7, "name", ("true", "a b"), "true 'a b'")
    assert (got.filename, got.cwd) == ("/bin/true", "/root/home")
    event.cwd = "/root/home"
    with pytest.raises(ArgumentError, match=r"ExecEvent.cwd cannot be '/root/home': it is a Tail\(function"):
        make_batch([event])


@pytest.mark.parametrize(
    "wrong",
    [{"small": 128}, {"big": -1}, {"name": "123456789"}, {"numbers": (1, 2)}, {"numbers": (1, 2, 40000)}],
)
def test_what_a_record_cannot_hold(wrong: dict[str, Any]) -> None:
    event = Everything(1, 0, False, "", b"", (0, 0, 0), (), "", b"", 0)
    (name,) = wrong
    with pytest.raises(ArgumentError, match=f"Everything.{name} cannot be"):
        make_batch([dataclasses.replace(event, **wrong)])
    with pytest.raises(ArgumentError, match="a batch is of one type: ExampleEvent"):
        make_batch([event, ExampleEvent(1, "", "")])


# --- the library's


class TestBlackhole(SinkCompliance):
    """Of what it is given nothing is left but its count, which must be that of what a subclass has noted."""

    @pytest.fixture(autouse=True)
    def destination(self) -> None:
        self.made: list[Noting] = []
        self.noted: list[bytes] = []
        self.notes = True

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        self.made.append(Noting(self, **delivery))
        return self.made[-1]

    def arrived(self) -> list[Any]:
        objects = [json.loads(line) for line in b"".join(self.noted).splitlines()]
        assert sum(sink.events for sink in self.made) == sum("lost" not in one for one in objects)
        assert all(sink.bytes >= sink.events * 40 for sink in self.made)
        return objects

    def address(self) -> str:
        return "blackhole:"

    @contextmanager
    def draining(self) -> Iterator[None]:
        self.notes = False
        yield
        self.notes = True


class Noting(BlackholeSink):
    def __init__(self, notes: TestBlackhole, **delivery: Unpack[Delivery]) -> None:
        super().__init__(**delivery)
        self._notes = notes

    async def send(self, batch: EventBatch[Any]) -> None:
        lines = batch.to_json_lines()
        await super().send(batch)
        if self._notes.notes:
            self._notes.noted.append(lines)


class TestFunction(SinkCompliance):
    """A function that appends what it is given to a list, as lines."""

    @pytest.fixture(autouse=True)
    def destination(self) -> None:
        self.lines: list[bytes] = []
        self.error: SinkError | None = None
        self.forgets = False

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        async def append(batch: EventBatch[Any]) -> None:
            lines = batch.to_json_lines()
            await checkpoint()
            if self.error is not None:
                raise self.error
            if not self.forgets:
                self.lines.append(lines)
            await checkpoint()

        return FunctionSink(append, **delivery)

    def arrived(self) -> list[Any]:
        return [json.loads(line) for line in b"".join(self.lines).splitlines()]

    @contextmanager
    def _raising(self, error: SinkError) -> Iterator[None]:
        self.error = error
        yield
        self.error = None

    def away(self) -> AbstractContextManager[Any]:
        return self._raising(SinkUnavailableError("away"))

    def gone(self) -> AbstractContextManager[Any]:
        return self._raising(SinkClosedError("gone"))

    def rejecting(self) -> AbstractContextManager[Any]:
        return self._raising(SinkRejectedError("no"))

    @contextmanager
    def draining(self) -> Iterator[None]:
        self.forgets = True
        yield
        self.forgets = False


class Reader:
    """The other end of a pipe or a socket, read by a thread."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._got = bytearray()
        self._ended = False
        self.reading = threading.Lock()  # held, it does not read
        self.forgets = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            if select.select([self._fd], [], [], 0.005)[0]:
                with self.reading:
                    if not self._ended and (data := os.read(self._fd, 1 << 18)) and not self.forgets:
                        self._got += data

    def objects(self) -> list[Any]:
        while True:
            with self.reading:
                if fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)) == bytes(4):
                    return [json.loads(line) for line in bytes(self._got).splitlines(keepends=True)]
            time.sleep(0.001)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        self.forgets = True
        yield
        self.objects()
        self.forgets = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        self.close()
        yield

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class TestStdoutPipe(SinkCompliance):
    @pytest.fixture(autouse=True)
    def destination(self) -> Iterator[None]:
        reading, self.fd = self.ends()
        self.reader = Reader(reading)
        yield
        self.reader.close()
        os.close(self.fd)

    def ends(self) -> tuple[int, int]:
        return os.pipe()

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return StdoutSink(fd=self.fd, **delivery)

    def arrived(self) -> list[Any]:
        return self.reader.objects()

    def address(self) -> str:
        return "stdout:?format=json"

    def away(self) -> AbstractContextManager[Any]:
        return self.reader.reading

    def gone(self) -> AbstractContextManager[Any]:
        return self.reader.closed()

    def draining(self) -> AbstractContextManager[Any]:
        return self.reader.forgetting()


class TestStdoutSocket(TestStdoutPipe):
    test_nothing_blocks_the_loop = None  # type: ignore[assignment]  # MSG_DONTWAIT is taken for blocking

    def ends(self) -> tuple[int, int]:
        ours, theirs = socket.socketpair()
        return ours.detach(), theirs.detach()


class TestStdoutOfAnotherUser(TestStdoutPipe):
    """A pipe that cannot be opened once more."""

    waits = 0.02  # a hundred times: it writes little at once

    @pytest.fixture(autouse=True)
    def refused(self, destination: None, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*args: object) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "open", refuse)

    test_nothing_blocks_the_loop = None  # type: ignore[assignment]  # it cannot be told from blocking that the pipe was polled


class TestStdoutFile(SinkCompliance):
    """On a disk of its own, that can be full."""

    pytestmark = pytest.mark.kernel  # root mounts it

    @pytest.fixture(scope="class")
    @classmethod
    def mounted(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        with small_disk(tmp_path_factory.mktemp("disk"), "160m") as path:
            yield path

    @pytest.fixture(autouse=True)
    def destination(self, mounted: Path) -> Iterator[None]:
        self.disk = mounted
        self.path = mounted / "events"
        self.fd = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        yield
        os.close(self.fd)
        self.path.unlink()

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return StdoutSink(fd=self.fd, **delivery)

    def arrived(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_bytes().splitlines(keepends=True)]

    @contextmanager
    def away(self) -> Iterator[None]:
        """Full, but for a little."""
        filler = self.disk / "filler"
        with filler.open("wb") as file:
            free = os.statvfs(self.disk)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_bsize - 20_480)
        yield
        filler.unlink()


class TestFile(TestStdoutFile):
    @pytest.fixture(autouse=True)
    def destination(self, mounted: Path) -> Iterator[None]:
        self.disk = mounted
        self.path = mounted / "events"
        yield
        for path in mounted.iterdir():
            path.unlink()

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return FileSink(self.path, **delivery)

    def address(self) -> str:
        return f"file:{self.path}"


class TestFileSynced(TestFile):
    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return FileSink(self.path, fsync="batch", **delivery)

    def address(self) -> str:
        return f"file:{self.path}?fsync=batch"


class TestFileRotated(TestFile):
    """By size, all of it kept, compressed."""

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return FileSink(self.path, rotate=1 << 20, compress="gzip", **delivery)

    def arrived(self) -> list[Any]:
        paths = sorted([*self.disk.glob("events.*Z"), *self.disk.glob("events.*Z.gz")])
        parts = [
            gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for data in map(Path.read_bytes, paths)
        ]
        current = self.path.read_bytes() if self.path.exists() else b""
        return [json.loads(line) for line in b"".join([*parts, current]).splitlines(keepends=True)]


# --- options beside the address


def test_options_stand_in_the_address_or_beside_it() -> None:
    in_address = (
        "file:x.jsonl?rotate=100MB&keep=3&fsync=500ms&durable=yes&spool=/s&retry_for=0.00001&queue_size=7"
    )
    options = {"rotate": "100MB", "keep": 3, "fsync": "500ms", "durable": True, "spool": Path("/s")}
    beside = open_sink("file:x.jsonl?queue_size=7", **options, retry_for=0.00001)
    for sink in (open_sink(in_address), beside):
        assert isinstance(sink, FileSink)
        appender = sink._appender
        assert (appender._rotate_at, appender._keep, appender._fsync) == (100_000_000, 3, 0.5)
        assert (sink.durable, sink.spool, sink.retry_for, sink.queue_size) == (True, "/s", 0.00001, 7)
    assert isinstance(made := open_sink("file:a=b", rotate=None, durable=False), FileSink)
    assert (made._appender._rotate_at, made.durable) == (None, False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (None, "none"),
        (-7, "-7"),
        (1 << 80, str(1 << 80)),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e20, "100000000000000000000"),
        (float("inf"), "inf"),
        ("a b", "a b"),
        (Path("/a"), "/a"),
    ],
)
def test_values_as_text(value: object, text: str) -> None:
    assert option_text(value) == text


@pytest.mark.parametrize(
    ("options", "said", "option", "is_known"),
    [
        (
            {"rotate": 1},
            "the option 'rotate' is given in the address and beside it: leave one out",
            "rotate",
            True,
        ),
        ({"kep": 1}, "there is no option 'kep'; did you mean 'keep'?", "kep", False),
        ({"keep": 3, "kep": 1}, "there is no option 'kep'; did you mean 'keep'?", "kep", False),
        ({"keep": True}, "keep='yes' is not a whole number or none", "keep", True),
        (
            {"every": 1e400},
            "every='inf' is not a time such as 500ms, 10s, 5m, 1h or 1d or none",
            "every",
            True,
        ),
        (
            {"every": [1]},
            "every: [1] is no option's value: give text, a number, or true or false",
            "every",
            True,
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], said: str, option: str, is_known: bool) -> None:
    with pytest.raises(OptionError) as caught:
        open_sink("file:x?rotate=1MB", **options)
    assert str(caught.value) == f"'file:x?rotate=1MB': {said}"
    assert (caught.value.option, caught.value.is_known) == (option, is_known)
    assert said in (caught.value.problem, *(f"{option}{sign}{caught.value.problem}" for sign in ("=", ": ")))
    assert isinstance(caught.value, ArgumentError)


def test_options_that_no_address_can_have() -> None:
    with pytest.raises(
        OptionError, match=r"'file:x': there is no option 'mode'; there are: rotate \(a number of"
    ):
        open_sink("file:x", mode=0o600)


# --- what is right


class End:
    """Where the sinks below send to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.away = self.gone = self.forgets = False
        self.rejects = -1
        self.others: list[int] = []

    def put(self, lines: list[bytes]) -> None:
        if self.gone:
            raise BrokenPipeError
        if self.away:
            raise OSError(28, "No space left on device")
        if not self.rejects:
            raise ValueError
        self.rejects -= 1
        if not self.forgets:
            self.lines += lines


class Direct(Sink):
    """Acknowledges by returning.  Everything in it is what one of the broken ones does otherwise."""

    def __init__(self, end: End, **delivery: Unpack[Delivery]) -> None:
        super().__init__(**delivery)
        self.end = end
        self.fd = -1

    async def open(self) -> None:
        await checkpoint()
        self.fd = os.open("/dev/null", os.O_WRONLY)

    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        return batch.to_json_lines().splitlines(keepends=True)

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        lines = self.lines(batch)
        first = len(batch.lost) + 1  # losses arrive with the first event, or taken=0 could not be told
        await self.put(lines[:first], 0)
        for number, line in enumerate(lines[first:], 1):
            if not number % 20:
                await checkpoint()
            await self.put([line], number)
        return None

    async def put(self, lines: list[bytes], taken: int) -> None:
        try:
            self.end.put(lines)
        except BrokenPipeError as error:
            raise SinkClosedError("gone") from error
        except OSError as error:
            raise SinkUnavailableError("full", taken) from error
        except ValueError as error:
            raise SinkRejectedError("no", taken) from error

    async def flush(self) -> None:
        await checkpoint()

    async def aclose(self, deadline: float = CLOSING) -> None:
        os.close(self.fd)
        await checkpoint()


class Ahead(Direct):
    """Acknowledges later."""

    taken = 0

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None]:
        while self.taken > 3:
            await checkpoint()
        self.taken += 1
        return self.arrive(batch)

    async def arrive(self, batch: EventBatch[Any]) -> None:
        try:
            while len(batch) + len(batch.lost):
                if self.fd < 0:
                    raise SinkError("closed")
                try:
                    await super().send(batch)
                except SinkUnavailableError as error:
                    batch = batch[error.taken :]
                    await anyio.sleep(0.01)
                else:
                    return
        finally:
            self.taken -= 1

    async def aclose(self, deadline: float = CLOSING) -> None:
        os.close(self.fd)
        self.fd = -1


class TestDirect(SinkCompliance):
    sink: type[Direct] = Direct

    @pytest.fixture(autouse=True)
    def destination(self) -> None:
        self.end = End()

    def make(self, **delivery: Unpack[Delivery]) -> Sink:
        return self.sink(self.end, **delivery)

    async def arrived(self) -> list[Any]:
        await checkpoint()
        return [json.loads(line) for line in b"".join(self.end.lines).splitlines(keepends=True)]

    @contextmanager
    def away(self) -> Iterator[None]:
        self.end.away = True
        yield
        self.end.away = False

    @contextmanager
    def gone(self) -> Iterator[None]:
        self.end.gone = True
        yield

    @contextmanager
    def rejecting(self) -> Iterator[None]:
        self.end.rejects = 5
        yield
        self.end.rejects = -1

    @contextmanager
    def draining(self) -> Iterator[None]:
        self.end.forgets = True
        yield
        self.end.forgets = False


class TestAhead(TestDirect):
    backends = (("asyncio", {"use_uvloop": False}), "trio")
    sink = Ahead


def test_what_is_not_given_is_not_tested() -> None:
    given = {name for name in vars(SinkCompliance) if name.startswith("test_")}
    without = {name for name in given if getattr(TestBlackhole, name) is None}
    assert without == {
        "test_away",
        "test_away_in_the_middle",
        "test_opening_and_closing_while_away",
        "test_gone",
        "test_rejected",
    }
    assert {name for name in given if getattr(TestDirect, name) is None} == {"test_the_address"}
    assert len(given) > 20


# --- what is wrong

BROKEN: list[Any] = []


def found_by(test: str, message: str, *arguments: str) -> Callable[[type[Direct]], type[Direct]]:
    def note(sink: type[Direct]) -> type[Direct]:
        BROKEN.append(pytest.param(sink, f"test_{test}", arguments, message, id=sink.__name__))
        return sink

    return note


@found_by("all_arrives_once_and_in_order", "arrived, not")
class Drops(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        return super().lines(batch)[: 4999 if len(batch) == 5000 else None]


@found_by("all_arrives_once_and_in_order", "arrived, not")
class Doubles(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        lines = super().lines(batch)
        return lines + lines[-1:]


@found_by("all_arrives_once_and_in_order", "arrived, not")
class Reorders(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        return super().lines(batch)[::-1]


@found_by("all_arrives_once_and_in_order", "cannot be read")
class Cuts(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        return [line[:4096] for line in super().lines(batch)]


@found_by("losses_stand_before_their_events", "arrived, not")
class IgnoresLosses(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        return super().lines(batch)[len(batch.lost) :]


@found_by("losses_stand_before_their_events", "arrived, not")
class ThinksThatLossesHaveEvents(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        return await super().send(batch) if len(batch) else None


@found_by("losses_stand_before_their_events", "arrived, not")
class SaysLossesAfterwards(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        lines = super().lines(batch)
        return lines[len(batch.lost) :] + lines[: len(batch.lost)]


@found_by("batches_stay_as_they_are", "has changed a batch")
class Changes(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        await super().send(batch)
        batch.lost = ()
        return None


@found_by("a_record_that_does_not_fit", "arrived, not")
class DecodesTooLate(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        for number in range(len(batch)):
            await super().send(batch[number : number + 1])
        return None


@found_by("acknowledged_has_arrived", "arrived, not")
class KeepsUntilItIsFlushed(Direct):
    def __init__(self, end: End, **delivery: Unpack[Delivery]) -> None:
        super().__init__(end, **delivery)
        self.kept: list[bytes] = []

    async def put(self, lines: list[bytes], taken: int) -> None:
        self.kept += lines

    async def flush(self) -> None:
        kept, self.kept = self.kept, []
        await checkpoint()
        self.end.put(kept)


@found_by("others_cancelled", "arrived, not", "flush")
class ForgetsWhatItFlushed(KeepsUntilItIsFlushed):
    async def aclose(self, deadline: float = CLOSING) -> None:
        await self.flush()
        await super().aclose(deadline)


@found_by("others_cancelled", "arrived, not", "reopen")
class LosesWhenReopened(KeepsUntilItIsFlushed):
    async def reopen(self) -> None:
        kept, self.kept = self.kept, []
        await checkpoint()
        self.kept = kept


@found_by("acknowledged_has_arrived", "arrived, not")
class ArrivesAfterItsEnd(Direct):
    def lines(self, batch: EventBatch[Any]) -> list[bytes]:
        self.late = super().lines(batch)[-1:]
        return super().lines(batch)[:-1]

    async def aclose(self, deadline: float = CLOSING) -> None:
        late, end = self.late, self.end
        threading.Timer(0.2, lambda: end.put(late)).start()
        await super().aclose(deadline)


@found_by("another_sink_goes_on", "arrived, not")
class BeginsAnew(Direct):
    async def open(self) -> None:
        await super().open()
        self.end.lines.clear()


@found_by("reopened", "arrived, not")
class BeginsAnewWhenReopened(Direct):
    async def reopen(self) -> None:
        self.end.lines.clear()


@found_by("memory_is_bounded", "by the sink, or by its other end")
class Remembers(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        self.sent = [*getattr(self, "sent", []), batch]
        return await super().send(batch)


@found_by("memory_is_bounded", "by the sink, or by its other end")
class SendsAheadWithoutBound(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None]:
        async def arrive(taken: EventBatch[Any]) -> None:
            await super(SendsAheadWithoutBound, self).send(taken)

        return arrive(batch)


@found_by("nothing_blocks_the_loop", "the event loop is blocked: Blocking call to time.sleep")
class Sleeps(Direct):
    async def flush(self) -> None:
        time.sleep(0.001)


@found_by("nothing_blocks_the_loop", "the event loop is blocked: Blocking call to")
class Writes(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        with open("/dev/null", "wb") as file:
            file.write(b"".join(lines))
        await super().put(lines, taken)


@found_by("sending_cancelled", "cannot be read", "the same")
class Tears(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        await super().put([lines[0][:5]], taken)
        await checkpoint()
        self.end.put([lines[0][5:], *lines[1:]])


@found_by("sending_cancelled", "cannot be read", "another")
class CompletesOnlyItself(Tears):
    rest = b""

    async def put(self, lines: list[bytes], taken: int) -> None:
        before, self.rest = self.rest, lines[0][5:]
        await Direct.put(self, [before, lines[0][:5]], taken)
        await checkpoint()
        self.rest = b""
        self.end.put([lines[0][5:], *lines[1:]])


@found_by("sending_cancelled", "arrived, not", "the same")
class Repeats(Direct):
    last: EventBatch[Any] | None = None

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        if self.last is not None:
            await super().send(self.last)
        self.last = batch
        await super().send(batch)
        self.last = None
        return None


@found_by("sending_cancelled", "send has not ended", "the same")
class StaysLocked(Direct):
    locked = False

    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        while self.locked:
            await anyio.sleep(0.01)
        self.locked = True
        await super().send(batch)
        self.locked = False
        return None


@found_by("sending_cancelled", "send, cancelled, has not ended", "the same")
class IsNotToBeCancelled(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        for _ in range(2):
            try:
                return await super().send(batch)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(1)
        return None


@found_by("opening_cancelled", "left open: Counter")
class IsCancelledWhenOpen(Direct):
    async def open(self) -> None:
        await super().open()
        await checkpoint()


@found_by("closing_cancelled", "left open: Counter")
class IsCancelledBeforeItCloses(Direct):
    async def aclose(self, deadline: float = CLOSING) -> None:
        await checkpoint()
        await super().aclose(deadline)


@found_by("nothing_is_left", "left open: Counter")
class LeaksDescriptors(Direct):
    async def aclose(self, deadline: float = CLOSING) -> None:
        os.dup(self.fd)
        await super().aclose(deadline)


@found_by("nothing_is_left", "left open: Counter")
class LeaksThreads(Direct):
    async def open(self) -> None:
        await super().open()
        threading.Thread(target=time.sleep, args=(1,)).start()


@found_by("nothing_is_left", "closed, but not its own: Counter")
class ClosesWhatIsNotItsOwn(Direct):
    async def open(self) -> None:
        await super().open()
        self.end.others.append(-1 if self.end.others else os.dup(self.fd))

    async def aclose(self, deadline: float = CLOSING) -> None:
        await super().aclose(deadline)
        if len(self.end.others) == 3:
            os.close(self.end.others[0])


@found_by("delivery_options", "delivery options: ")
class ForgetsOptions(Direct):
    def __init__(self, end: End, **delivery: Unpack[Delivery]) -> None:
        super().__init__(end)


@found_by("delivery_options", "what cannot be meant is taken: retry_for")
class ChecksNothing(Direct):
    def __init__(self, end: End, **delivery: Unpack[Delivery]) -> None:
        if delivery.get("retry_for") == -1:
            delivery.pop("retry_for")
        super().__init__(end, **delivery)


@found_by("away", "no SinkUnavailableError: OSError")
class LetsOut(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        self.end.put(lines)


@found_by("away", "taken=201 of 200 events")
class CountsTooMuch(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        await super().put(lines, 201)


@found_by("away", "arrived, not")
class GivesUp(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        try:
            return await super().send(batch)
        except SinkUnavailableError:
            return None


@found_by("away_in_the_middle", "arrived, not")
class CountsNothing(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        await super().put(lines, 0)


@found_by("away_in_the_middle", "arrived, not")
class CountsOneMore(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        await super().put(lines, taken and taken + 1)


@found_by("away_in_the_middle", "arrived, not")
class SaysLossesTwice(Direct):
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        lines = self.lines(batch)
        for number, line in enumerate(lines):
            await checkpoint()
            await self.put([line], max(number - len(batch.lost), 0))
        return None


@found_by("opening_and_closing_while_away", "has not ended")
class WaitsForTheEnd(Direct):
    async def aclose(self, deadline: float = CLOSING) -> None:
        while self.end.away:
            await anyio.sleep(0.01)
        await super().aclose(deadline)


@found_by("opening_and_closing_while_away", "left open: Counter")
class StaysOpenWhenItFails(Direct):
    async def open(self) -> None:
        await super().open()
        if self.end.away:
            raise SinkError("away")


@found_by("gone", "gone")
class HopesForEver(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        try:
            await super().put(lines, taken)
        except SinkClosedError as error:
            raise SinkUnavailableError(str(error), taken) from error


@found_by("gone", "nothing is raised, however much is sent")
class NoticesNothing(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        try:
            await super().put(lines, taken)
        except SinkClosedError:
            pass


@found_by("rejected", "arrived, not|more arrived")
class RejectsAll(Direct):
    async def put(self, lines: list[bytes], taken: int) -> None:
        await super().put(lines, 0)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(("sink", "test", "arguments", "message"), BROKEN)
def test_broken(sink: type[Direct], test: str, arguments: tuple[str, ...], message: str) -> None:
    """A test of the suite fails, and says what is wrong."""
    suite = TestDirect()
    suite.end = End()
    suite.sink = sink
    suite.patience = 0.5
    held = set(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises((AssertionError, SinkError), match=message):
            anyio.run(getattr(suite, test), *arguments)
    finally:
        for fd in set(os.listdir("/proc/self/fd")) - held:
            with suppress(OSError):
                os.close(int(fd))
