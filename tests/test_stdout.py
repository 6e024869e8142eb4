"""StdoutSink on every kind of standard output there is."""

from __future__ import annotations

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
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import pytest

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkClosedError, SinkError
from ebpfstream.events import U32, Char, Comm, Event
from ebpfstream.records import Records
from ebpfstream.sinks.stdout import StdoutSink

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
    assert scope.cancelled_caught
    assert tries == 2  # what fitted, and what did not


async def test_sockets_that_are_closed() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        async with StdoutSink(fd=ours.fileno()) as sink:
            theirs.close()
            with pytest.raises(SinkClosedError):
                await sink.send(batch(1))
