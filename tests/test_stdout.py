"""StdoutSink on every kind of standard output there is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import socket
import struct
import termios
import tty
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import pytest

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, DecodeError, SinkClosedError, SinkError, SinkUnavailableError
from ebpfstream.events import U32, Char, Comm, Event
from ebpfstream.lost import Lost
from ebpfstream.records import Records
from ebpfstream.sink import open_sink
from ebpfstream.sinks.stdout import Format, StdoutSink
from ebpfstream.testing import cancelled_at, ways_to_cancel

pytestmark = pytest.mark.anyio


@dataclass
class Line(Event):
    pid: U32
    comm: Comm
    message: Annotated[str, Char(20)]


def batch(count: int, message: bytes = b"hello") -> EventBatch[Line]:
    records = [bytes(8) + struct.pack("<I16s20s", number, b"sh", message) for number in range(count)]
    return EventBatch(Line, Records(b"".join(records), 8, [(0, 48, 40, count)]))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def refuse_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)


@pytest.fixture(params=["pipe", "socket", "file", "another user's pipe"])
def output(
    request: pytest.FixtureRequest, pipe: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    with ExitStack() as stack:
        if request.param == "socket":
            ends = socket.socketpair()
            for end in ends:
                stack.enter_context(end)
            yield ends[1].fileno()
        elif request.param == "file":
            yield stack.enter_context((tmp_path / "out").open("wb")).fileno()
        else:
            if request.param != "pipe":
                refuse_to_open(monkeypatch)
            yield pipe[1]


async def test_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b", buffering=0) as file:
        file.write(b"before\n")
        async with StdoutSink(fd=file.fileno()) as sink:
            await sink.send(batch(2))
            await sink.send(batch(1))
            await sink.flush()
        file.write(b"after\n")
    lines = (tmp_path / "out").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [json.loads(line)["pid"] for line in lines[1:-1]] == [0, 1, 0]


async def test_a_pipe_that_nobody_reads_does_not_hold_up_the_loop(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    async with StdoutSink(fd=writer) as sink:
        with anyio.move_on_after(0.2) as scope:
            await sink.send(batch(10_000))
        assert scope.cancelled_caught
        assert len(os.read(reader, 1 << 20)) >= 1 << 16
    assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK, "others share this pipe"


@pytest.mark.parametrize("kind", ["pipe", "socket"])
async def test_a_slow_reader_gets_everything(kind: str, pipe: tuple[int, int]) -> None:
    sockets = socket.socketpair()
    reader, writer = pipe if kind == "pipe" else (sockets[0].fileno(), sockets[1].fileno())
    got = bytearray()

    async def read() -> None:
        while got.count(b"\n") < 10_000:
            await anyio.wait_readable(reader)
            got.extend(os.read(reader, 50_000))

    with closing(sockets[0]), closing(sockets[1]):
        async with anyio.create_task_group() as tasks, StdoutSink(fd=writer) as sink:
            tasks.start_soon(read)
            await sink.send(batch(10_000))
    assert [json.loads(line)["pid"] for line in got.decode().splitlines()] == list(range(10_000))


async def test_a_closed_pipe(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    async with StdoutSink(fd=writer) as sink:
        with anyio.move_on_after(0.05) as scope:
            await sink.wait_closed()
        assert scope.cancelled_caught
        os.close(reader)
        await sink.wait_closed()
        with pytest.raises(SinkClosedError, match="whoever read the standard output has closed it"):
            await sink.send(batch(1))


async def test_a_pipe_of_another_user(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which cannot be opened once more; root can open any, so the refusal is made up."""
    reader, writer = pipe
    refuse_to_open(monkeypatch)
    async with StdoutSink(fd=writer) as sink:
        with anyio.move_on_after(0.2) as scope:
            await sink.send(batch(10_000))
        assert scope.cancelled_caught
        await sink.aclose(0)
    assert len(os.read(reader, 1 << 20)) >= 1 << 15


async def test_dev_null() -> None:
    with Path("/dev/null").open("w") as null:
        async with StdoutSink(fd=null.fileno()) as sink:
            await sink.send(batch(10_000))


async def test_a_full_disk(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        async with StdoutSink(fd=full.fileno()) as sink:
            with pytest.raises(
                SinkError, match="cannot write to the standard output: No space left on device"
            ):
                await sink.send(batch(1))


async def test_no_standard_output() -> None:
    with pytest.raises(SinkError, match="there is no standard output"):
        await StdoutSink(fd=987).open()
    with pytest.raises(ArgumentError, match="format='xml' is unknown"):
        StdoutSink("xml")  # type: ignore[arg-type]


@pytest.mark.parametrize("colour", [True, False])
async def test_a_terminal_gets_a_table_and_no_controls(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    leader, terminal = pty.openpty()
    tty.setraw(terminal, termios.TCSANOW)
    async with StdoutSink("text", fd=terminal) as sink:
        await sink.send(batch(2, b"\x1b[2J\x9b\x07 a\tb"))
        await sink.send(batch(1, b"plain"))
    shown = ""
    while "plain" not in shown or not shown.endswith("\n"):
        shown += os.read(leader, 1 << 16).decode()
    os.close(leader)
    os.close(terminal)
    assert ("\x1b[" in shown) == colour
    without_colour = re.sub(r"\x1b\[\d+m", "", shown)
    assert without_colour == (
        "    PID COMM            MESSAGE\n"
        "      0 sh              \\u001b[2J\\x9b\\u0007 a\\u0009b\n"
        "      1 sh              \\u001b[2J\\x9b\\u0007 a\\u0009b\n"
        "      0 sh              plain\n"
    )


async def test_leaving_gives_back_what_was_opened_and_nothing_else(output: int) -> None:
    before = os.listdir("/proc/self/fd")
    async with StdoutSink(fd=output) as sink:
        await sink.send(batch(1))
    assert os.listdir("/proc/self/fd") == before
    os.write(output, b"after")


@pytest.mark.parametrize("output", ["socket", "file"], indirect=True)
async def test_what_is_no_pipe_has_no_reader_to_lose(output: int) -> None:
    async with StdoutSink(fd=output) as sink:
        with anyio.move_on_after(0.02) as scope:
            await sink.wait_closed()
        assert scope.cancelled_caught


async def test_a_full_pipe_is_waited_for_without_trying(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    write = os.write

    def counted(fd: int, data: Any) -> int:
        nonlocal tries
        tries += 1
        return write(fd, data)

    async with StdoutSink(fd=pipe[1]) as sink:
        monkeypatch.setattr(os, "write", counted)
        with anyio.move_on_after(0.05) as scope:
            await sink.send(batch(10_000))
        monkeypatch.undo()
        await sink.aclose(0)
    assert scope.cancelled_caught
    assert tries == 2  # what fitted, and what did not


async def test_sockets_that_are_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        async with StdoutSink(fd=ours.fileno()) as sink:
            theirs.close()
            with pytest.raises(SinkClosedError):
                await sink.send(batch(1))


# --- lines that are cut short; SinkCompliance does the same with JSON and disks that are really full

BATCH = EventBatch(Line, batch(3).records, 0, (Lost(0, 2), Lost(None, 5)))


async def written(path: Path, format: Format, *batches: EventBatch[Any]) -> bytes:
    """What is written if nothing is in the way."""
    path.unlink(missing_ok=True)
    with path.open("ab") as file:
        async with StdoutSink(format, fd=file.fileno()) as sink:
            for each in batches:
                await sink.send(each)
    return path.read_bytes()


class Room:
    """Lets so many bytes be written, and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd: int, data: Any) -> int:
        if not self.bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self._write(fd, data[: self.bytes])
        self.bytes -= done
        return done


@pytest.mark.parametrize("then", ["offered again", "something else", "closed"])
@pytest.mark.parametrize("format", ["json", "text"])
async def test_a_disk_that_is_full_after_any_number_of_bytes(
    format: Format, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    other = batch(2, b"other")
    whole = await written(path, format, BATCH)
    wholly = await written(path, format, BATCH, other)
    heading = whole.index(b"\n") + 1 if format == "text" else 0
    ends = [index + 1 for index in range(heading, len(whole)) if whole[index] == ord("\n")]
    assert len(ends) == len(BATCH.lost) + len(BATCH)
    for size in range(len(whole)):
        path.unlink()
        with path.open("ab") as file, monkeypatch.context() as patch:
            room = Room(patch)
            room.bytes = size
            async with StdoutSink(format, fd=file.fileno()) as sink:
                with pytest.raises(SinkUnavailableError, match="No space left on device") as caught:
                    await sink.send(BATCH)
                taken = caught.value.taken
                assert taken == max(0, sum(end <= size for end in ends) - len(BATCH.lost))
                assert path.read_bytes() == whole[:size]
                if then == "offered again":
                    for more in (0, 1, 50):
                        room.bytes = more
                        with suppress(SinkUnavailableError):
                            await sink.send(BATCH[taken:])
                            taken = len(BATCH)
                        size = min(size + more, len(whole)) if taken < len(BATCH) else len(whole)
                        assert path.read_bytes() == whole[:size]
                        taken = max(taken, sum(end <= size for end in ends) - len(BATCH.lost))
                room.bytes = 1 << 20
                if taken < len(BATCH) and then == "offered again":
                    await sink.send(BATCH[taken:])
                if then != "closed":
                    await sink.send(other)
        got = path.read_bytes()
        if then == "offered again":
            assert got == wholly
        else:  # the line is completed, and nobody asked for those that follow
            kept = whole[: min(end for end in (heading, *ends) if end >= size)]
            assert got == kept + (wholly[len(whole) :] if then == "something else" else b"")


@pytest.mark.parametrize("format", ["json", "text"])
async def test_cancelled_at_each_await(format: Format, pipe: tuple[int, int], tmp_path: Path) -> None:
    """Only whole lines come, in order, each once, the heading too; also if closing must complete the last."""
    reader, writer = pipe
    many, last = batch(10_000), batch(1, b"last")
    lines = (await written(tmp_path / "out", format, many)).splitlines()
    (*_, end) = (await written(tmp_path / "out", format, last)).splitlines()
    for way in ways_to_cancel():
        for step in range(100):
            got = bytearray()

            async def read() -> None:
                while True:
                    await anyio.wait_readable(reader)
                    got.extend(os.read(reader, 30_000))  # noqa: B023

            sink = StdoutSink(format, fd=writer)
            await sink.open()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                outcome = await cancelled_at(step, sink.send(many), way)
                if step % 2:
                    await sink.send(last)
                await sink.aclose()
                tasks.cancel_scope.cancel()
            os.set_blocking(reader, False)
            with suppress(BlockingIOError):
                while data := os.read(reader, 1 << 20):
                    got += data
            arrived = got.decode().splitlines()
            if step % 2:
                assert arrived.pop() == end.decode()
            assert arrived == [line.decode() for line in lines[: len(arrived)]]
            assert got.endswith(b"\n") or not got
            if not outcome.reached:
                assert arrived[-1] == lines[-1].decode()
                break
        assert 2 < step < 99


async def test_closing_does_not_wait_for_a_line_longer_than_it_may(pipe: tuple[int, int]) -> None:
    async with StdoutSink(fd=pipe[1]) as sink:
        await cancelled_at(0, sink.send(batch(10_000)))
        with anyio.fail_after(30):
            await sink.aclose(0.01)


async def test_what_cannot_be_decoded_leaves_the_heading(tmp_path: Path) -> None:
    good = batch(1)
    with (tmp_path / "out").open("ab") as file:
        async with StdoutSink("text", fd=file.fileno()) as sink:
            with pytest.raises(DecodeError):
                await sink.send(EventBatch(Line, good.records._replace(runs=[(0, 11, 3, 1)])))
            await sink.send(good)
    assert (tmp_path / "out").read_bytes() == await written(tmp_path / "other", "text", good)


async def test_its_address() -> None:
    sink = open_sink("stdout:?format=text&when_full=drop_oldest")
    assert isinstance(sink, StdoutSink)
    assert (sink.name, sink._format, sink._fd, sink.when_full) == ("stdout", "text", 1, "drop_oldest")
    with pytest.raises(ArgumentError, match="there is no option 'fd'"):
        open_sink("stdout:?fd=2")
    with pytest.raises(ArgumentError, match=r"format='xml' is not json or text"):
        open_sink("stdout:?format=xml")
    for address in ("stdout:1", "stdout://host"):
        with pytest.raises(ArgumentError, match="takes no host and no path"):
            open_sink(address)
