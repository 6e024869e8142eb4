"""Logs on real pipes, sockets and terminals: what a line holds, what is left out and told, and that nothing waits."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import tty
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from ebpfstream.errors import ArgumentError
from ebpfstream.service import logs

ROOT = Path(__file__).resolve().parents[1]

log = logging.getLogger("ebpfstream")


@contextmanager
def logging_to(fd: int, level: str = "info", format: logs.Format = "json") -> Iterator[logs._Handler]:
    """Configured for the block, and nobody else listens; closed at its end."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], (root.level, log.level)
    root.handlers[:] = []
    try:
        with logs.configure(level, format, fd=fd):
            assert logs._handler is not None
            yield logs._handler
        assert root.handlers == []
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        log.setLevel(levels[1])


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for fd in ends:
        with suppress(OSError):
            os.close(fd)


def read(fd: int) -> bytes:
    """What is in a pipe or terminal."""
    data = b""
    while True:
        try:
            more = os.read(fd, 1 << 16)
        except BlockingIOError:
            return data
        if not more:
            return data
        data += more


def records(fd: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read(fd).splitlines()]


def fill(fd: int, room: int = 0) -> int:
    """Fill a pipe but for `room` bytes: with how many.  Its own flags stay as they are."""
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
    count = 0
    with suppress(BlockingIOError):
        while count < fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) - room:
            count += os.write(again, b"x" * 4096)
    os.close(again)
    return count


# --- what a line holds


def test_a_record_is_a_line(pipe: tuple[int, int]) -> None:
    before = datetime.now(UTC)
    with logging_to(pipe[1]):
        log.info("%d of %s", 3, "them", extra={"sink": "kafka", "path": Path("/a"), "more": {"n": [1, None]}})
        logging.getLogger("ebpfstream.service").error("failed")
        log.debug("not this")
    after = datetime.now(UTC)
    lines = read(pipe[0]).decode().splitlines()
    first, second = map(json.loads, lines)
    for record in (first, second):
        stamp = record.pop("timestamp")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp)
        assert before <= datetime.fromisoformat(stamp) <= after
    assert first == {
        "level": "info",
        "event": "3 of them",
        "logger": "ebpfstream",
        "sink": "kafka",
        "path": "/a",
        "more": {"n": [1, None]},
    }
    assert second == {"level": "error", "event": "failed", "logger": "ebpfstream.service"}


def test_structlog_makes_the_same_lines(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        made = structlog.get_logger("ebpfstream.service").bind(source="exec")
        made.warning("attached", programs=3)
        made.info("%d is it", "that")
        made.debug("not this")
    found = records(pipe[0])
    assert [record.pop("timestamp")[-1] for record in found] == ["Z", "Z"]
    same = {"logger": "ebpfstream.service", "source": "exec"}
    assert found == [
        {"level": "warning", "event": "attached", "programs": 3, **same},
        {"level": "info", "event": "%d is it", "positional_args": ["that"], **same},
    ]


@pytest.mark.parametrize("how", ["logging", "structlog"])
def test_an_exception(how: str, pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        try:
            raise ZeroDivisionError("\x1b[31m")
        except ZeroDivisionError:
            (log if how == "logging" else structlog.get_logger("ebpfstream")).exception("it failed")
    (record,) = records(pipe[0])
    assert (record["level"], record["event"]) == ("error", "it failed")
    first, *_, last = record["exception"].splitlines()
    assert (first, last) == ("Traceback (most recent call last):", "ZeroDivisionError: \x1b[31m")
    assert set(record) == {"timestamp", "level", "event", "logger", "exception"}


def test_extra_fields_take_no_ones_place(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        log.info("really", extra={"event": "no", "level": "no", "timestamp": "no", "logger": "no"})
    (record,) = records(pipe[0])
    assert record.pop("timestamp") != "no"
    assert record == {"level": "info", "event": "really", "logger": "ebpfstream"}


UNSAFE = "\x1b]0;title\x07\x9b31m\x7f\u202e\n\r\udcff"


def test_no_line_holds_what_a_terminal_acts_on(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        log.info("%s", UNSAFE, extra={UNSAFE: UNSAFE, "in": [{"k" + UNSAFE: UNSAFE}]})
    (line,) = read(pipe[0]).decode().splitlines()
    assert line.isprintable()
    record = json.loads(line)
    safe = UNSAFE.replace("\udcff", "\\udcff")
    assert record["event"] == safe
    assert record[safe] == safe
    assert record["in"] == [{"k" + safe: safe}]


def test_numbers_that_json_has_not(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        log.info("numbers", extra={"a": float("nan"), "b": float("-inf"), "c": 1.5, "d": True, "e": 1 << 70})
    data = read(pipe[0])
    assert b"NaN" not in data
    record = json.loads(data)
    assert [record[name] for name in "abcde"] == ["nan", "-inf", 1.5, True, 1 << 70]


class Bad:
    def __str__(self) -> str:
        raise ZeroDivisionError


def test_what_cannot_be_formatted_is_told(pipe: tuple[int, int]) -> None:
    endless: list[Any] = []
    endless.append(endless)
    with logging_to(pipe[1]):
        log.warning("%d pieces", "no")
        log.warning("bad", extra={"value": Bad()})
        log.warning("endless", extra={"value": endless})
        log.warning("%s", Bad())
        log.warning(Bad())
        log.warning("after")
    assert [record["event"] for record in records(pipe[0])] == [
        "cannot be formatted: %d pieces: TypeError",
        "cannot be formatted: bad: ZeroDivisionError",
        "cannot be formatted: endless: RecursionError",
        "cannot be formatted: %s: ZeroDivisionError",
        "cannot be formatted: Bad: ZeroDivisionError",
        "after",
    ]


def test_levels(pipe: tuple[int, int]) -> None:
    other, kafka = logging.getLogger("somebody.else"), logging.getLogger("aiokafka.test")

    def say(word: str) -> None:
        for logger in (log, logging.getLogger("ebpfstream.x"), other, kafka):  # of the last one nothing
            for level in ("debug", "info", "warning", "error"):
                getattr(logger, level)(f"{word} {logger.name} {level}")

    with logging_to(pipe[1], "warning"):
        say("1")
        logs.set_level("debug")
        say("2")
        logs.set_level("error")
        say("3")
        with pytest.raises(ArgumentError, match=r'level=.loud. is unknown: give "debug", "info"'):
            logs.set_level("loud")
        say("4")

    def said(word: str, ours: str, others: str) -> list[str]:
        names = [("ebpfstream", ours), ("ebpfstream.x", ours), ("somebody.else", others)]
        return [f"{word} {name} {level}" for name, levels in names for level in levels.split()]

    assert [record["event"] for record in records(pipe[0])] == [
        *said("1", "warning error", "warning error"),
        *said("2", "debug info warning error", "warning error"),
        *said("3", "error", "error"),
        *said("4", "error", "error"),
    ]


def test_python_warnings(pipe: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to(pipe[1]):
            warnings.warn("careful", stacklevel=1)
    (record,) = records(pipe[0])
    assert (record["level"], record["logger"]) == ("warning", "py.warnings")
    assert "UserWarning: careful" in record["event"]


def test_unknown_formats_change_nothing(pipe: tuple[int, int]) -> None:
    for wrong in ({"format": "xml"}, {"level": "loud"}):
        with pytest.raises(ArgumentError, match="is unknown: give"):
            logs.configure(fd=pipe[1], **wrong)  # type: ignore[arg-type]
        assert logs._handler is None


def test_configured_anew(pipe: tuple[int, int]) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with logging_to(writing):
        log.info("one")
        logs.configure("info", "json", fd=pipe[1])
        log.info("two")
    assert [record["event"] for record in records(reading)] == ["one"]
    assert [record["event"] for record in records(pipe[0])] == ["two"]
    os.close(reading)
    os.close(writing)


# --- for people


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    leader, follower = pty.openpty()
    tty.setraw(follower)
    os.set_blocking(leader, False)
    yield leader, follower
    os.close(leader)
    os.close(follower)


COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("no_colour", ["", "1"])
@pytest.mark.parametrize("format", ["auto", "text"])
def test_a_terminal_gets_text(
    format: logs.Format, no_colour: str, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_colour)
    with logging_to(terminal[1], format=format):
        log.warning("%s", f"bad{UNSAFE}", extra={"path": f"x{UNSAFE}", "n": 3})
        try:
            raise ZeroDivisionError(UNSAFE)
        except ZeroDivisionError:
            log.exception("it failed")
    text = read(terminal[0]).decode()
    assert bool(COLOUR.search(text)) is not bool(no_colour)
    plain = COLOUR.sub("", text)
    lines = plain.split("\n")
    assert all(line.isprintable() for line in lines)
    shown = r"\u001b]0;title\u0007\u009b31m\u007f\u202e\u000a\u000d\udcff"
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d \[warning *\] {re.escape('bad' + shown)} *n=3 path={re.escape('x' + shown)}",
        lines[0],
    )
    assert re.match(r"\d\d:\d\d:\d\d \[error *\] it failed *$", lines[1])
    assert lines[2] == "  Traceback (most recent call last):"
    assert lines[-3:] == [
        r"  ZeroDivisionError: \u001b]0;title\u0007\u009b31m\u007f\u202e",
        r"  \u000d\udcff",
        "",
    ]


def test_json_on_a_terminal_and_text_elsewhere(terminal: tuple[int, int], pipe: tuple[int, int]) -> None:
    with logging_to(terminal[1], format="json"):
        log.info("here")
    assert records(terminal[0])[0]["event"] == "here"
    with logging_to(pipe[1], format="text"):
        log.info("here")
    text = read(pipe[0]).decode()
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[info *\] here *\n", text)


def test_auto_is_json_elsewhere(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1], format="auto"):
        log.info("here")
    assert records(pipe[0])[0]["event"] == "here"


# --- too many of them


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["event"], record.get("suppressed", 0)) for record in found]


def test_what_comes_too_often_is_left_out_and_told(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]) as handler:
        handler._clock = clock = Clock()
        for number in range(27):
            log.warning("broken: %d", number)
        clock.now += 9.9
        log.warning("broken: %d", 27)
        assert told(records(pipe[0])) == [(f"broken: {number}", 0) for number in range(10)]
        clock.now += 0.1
        for number in range(28, 40):
            log.warning("broken: %d", number)
        clock.now += 1000
        log.warning("broken: %d", 40)
        log.warning("broken: %d", 41)
        assert told(records(pipe[0])) == [
            ("broken: 28", 18),
            *[(f"broken: {number}", 0) for number in range(29, 38)],
            ("broken: 40", 2),
            ("broken: 41", 0),
        ]
    assert records(pipe[0]) == []


def test_each_template_level_and_logger_by_itself(pipe: tuple[int, int]) -> None:
    ours = structlog.get_logger("ebpfstream")
    with logging_to(pipe[1]) as handler:
        handler._clock = Clock()
        for number in range(12):
            log.info("one %d", number)
            log.info("two %d", number)
            log.error("one %d", number)
            logging.getLogger("ebpfstream.x").info("one %d", number)
            ours.info("structured", number=number)
            ours.info("another", number=number)
        found = records(pipe[0])
        assert len(found) == 60
        assert {record["event"] for record in found if "structured" in record["event"]} == {"structured"}
    # The rest, at the end.
    rest = records(pipe[0])
    assert [
        (record["logger"], record["level"], record["event"], record["suppressed"]) for record in rest
    ] == [
        ("ebpfstream", "info", "left out: one %d", 2),
        ("ebpfstream", "info", "left out: two %d", 2),
        ("ebpfstream", "error", "left out: one %d", 2),
        ("ebpfstream.x", "info", "left out: one %d", 2),
        ("ebpfstream", "info", "left out: structured", 2),
        ("ebpfstream", "info", "left out: another", 2),
    ]


def test_structlog_tells_it_too(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]) as handler:
        handler._clock = clock = Clock()
        for _ in range(14):
            structlog.get_logger("ebpfstream").info("again", n=1)
        clock.now += 10
        structlog.get_logger("ebpfstream").info("again", n=1)
    *_, last = records(pipe[0])
    assert (last["event"], last["n"], last["suppressed"]) == ("again", 1, 4)


def test_any_number_of_templates(pipe: tuple[int, int]) -> None:
    """Texts that are made anew each time cost no memory for ever, and what was left out of them is told."""
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 20)
    with logging_to(pipe[1]) as handler:
        handler._clock = clock = Clock()
        found = []
        for number in range(3 * logs._MOST_PLACES):
            for _ in range(11):
                log.info(f"made {number}")
            found += records(pipe[0])
            assert len(handler._counts) <= logs._MOST_PLACES
            if number == 2 * logs._MOST_PLACES:
                clock.now += 10
    found += records(pipe[0])
    assert len(found) == 11 * 3 * logs._MOST_PLACES
    left_out = [record for record in found if "suppressed" in record]
    assert {record["event"] for record in left_out} == {
        f"left out: made {number}" for number in range(3 * logs._MOST_PLACES)
    }
    assert {record["suppressed"] for record in left_out} == {1}


# --- nobody reads


def unwritten(found: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["event"], record.get("unwritten", 0)) for record in found]


@pytest.mark.parametrize("reopened", [True, False])
def test_a_full_pipe_is_not_waited_for(
    reopened: bool, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reopened:
        refuse_to_reopen(monkeypatch, pipe[1])
    with logging_to(pipe[1]):
        log.info("before")
        monkeypatch.undo()
        fill(pipe[1])
        for number in range(5):
            log.info("%d", number)
        assert os.get_blocking(pipe[1])
        assert unwritten([json.loads(read(pipe[0]).partition(b"\n")[0])]) == [("before", 0)]
        log.info("after")
        log.info("and")
    assert unwritten(records(pipe[0])) == [("after", 5), ("and", 0)]


def test_a_terminal_that_is_stopped_is_not_waited_for(terminal: tuple[int, int]) -> None:
    """It gives room when it likes: each record is on it, or counted."""
    with logging_to(terminal[1]):
        again = os.open(f"/proc/self/fd/{terminal[1]}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with suppress(BlockingIOError):
            while True:
                os.write(again, b"\n" * 1024)
        os.close(again)
        for number in range(1000):
            log.info(f"number {number}")
        logged, data = 1000, b""
        while b"again" not in data:
            log.info(f"again {logged}")
            logged += 1
            data += read(terminal[0])
    data += read(terminal[0])
    found = [json.loads(line) for line in data.splitlines() if line]
    counted = sum(record.get("unwritten", 0) for record in found)
    assert counted > 0
    assert len([record for record in found if "number" in record["event"] or "again" in record["event"]]) == (
        logged - counted
    )
    assert os.get_blocking(terminal[1])


def refuse_to_reopen(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    """As the kernel does when it is another user's."""
    really = os.open

    def refusing(path: Any, *arguments: Any, **more: Any) -> int:
        if path == f"/proc/self/fd/{fd}":
            raise PermissionError(errno.EACCES, "refused")
        return really(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refusing)


def test_what_could_not_be_written_is_told_at_the_end(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]) as handler:
        handler._clock = Clock()
        fill(pipe[1])
        for number in range(13):
            log.error("broken: %d", number)
        read(pipe[0])
    found = records(pipe[0])
    # Those that were suppressed are told by a record of their own, which tells of the others as well.
    assert [(one["event"], one["suppressed"], one["unwritten"]) for one in found] == [
        ("left out: broken: %d", 3, 10)
    ]


def test_what_was_suppressed_is_told_though_the_next_record_cannot_be_written(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]) as handler:
        handler._clock = clock = Clock()
        for number in range(14):
            log.error("broken: %d", number)
        clock.now += 10
        read(pipe[0])
        fill(pipe[1])
        log.error("broken: %d", 14)
        read(pipe[0])
        log.error("broken: %d", 15)
    (record,) = records(pipe[0])
    assert (record["event"], record["suppressed"], record["unwritten"]) == ("broken: 15", 4, 1)


def test_the_end_tells_it_alone(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        fill(pipe[1])
        log.error("broken")
        read(pipe[0])
    (record,) = records(pipe[0])
    assert (record["level"], record["event"], record["unwritten"]) == (
        "warning",
        "some records could not be written",
        1,
    )


def test_the_end_waits_for_a_slow_reader(pipe: tuple[int, int]) -> None:
    found: list[bytes] = []
    with logging_to(pipe[1]):
        fill(pipe[1])
        log.error("broken")
        slow = threading.Timer(0.1, lambda: found.append(read(pipe[0])))
        slow.start()
    slow.join()
    assert [json.loads(line)["unwritten"] for line in records_after(found[0] + read(pipe[0]))] == [1]


def records_after(data: bytes) -> list[bytes]:
    """The lines behind what a pipe was filled with."""
    return data.lstrip(b"x").splitlines()


@pytest.mark.parametrize("reopened", [True, False])
def test_a_line_is_never_torn(reopened: bool, pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than the room in a pipe is begun, and its end comes before anything else."""
    if not reopened:
        refuse_to_reopen(monkeypatch, pipe[1])
    with logging_to(pipe[1]):
        monkeypatch.undo()
        filled = fill(pipe[1], room=8192)
        log.info("long", extra={"text": "é" * 10_000})
        log.info("short")
        data = read(pipe[0])
        assert len(data) > filled
        log.info("after")
        data += read(pipe[0])
    first, second = map(json.loads, records_after(data))
    assert (first["event"], first["text"]) == ("long", "é" * 10_000)
    assert (second["event"], second["unwritten"]) == ("after", 1)
    assert records(pipe[0]) == []


def test_the_end_of_a_line_is_written_at_the_end(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        fill(pipe[1], room=8192)
        log.info("long", extra={"text": "x" * 20_000})
        data = read(pipe[0])
    (line,) = records_after(data + read(pipe[0]))
    assert json.loads(line)["text"] == "x" * 20_000


def test_a_reader_that_has_gone(pipe: tuple[int, int]) -> None:
    with logging_to(pipe[1]):
        log.info("one")
        os.close(pipe[0])
        log.info("two")
        log.info("three")


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_full_socket_is_not_waited_for(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        with logging_to(ours.fileno()):
            filler = b"x" * 1024
            with suppress(BlockingIOError):
                while True:
                    ours.send(filler, socket.MSG_DONTWAIT)
            if kind is socket.SOCK_STREAM:  # to the last byte
                with suppress(BlockingIOError):
                    while True:
                        ours.send(b"x", socket.MSG_DONTWAIT)
            log.info("one")
            log.info("two")
            assert os.get_blocking(ours.fileno())
            theirs.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    assert set(theirs.recv(1 << 16)) == {ord("x")}
            log.info("three")
            assert unwritten([json.loads(theirs.recv(1 << 16))]) == [("three", 2)]
        theirs.close()
        with logging_to(ours.fileno()):
            log.info("nobody")


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as file:
        with logging_to(file.fileno()):
            log.info("one")
            path.write_text("")  # as a rotation by copying does
            log.info("two")
    assert json.loads(path.read_text())["event"] == "two"


def test_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full, logging_to(full.fileno()):
        log.info("one")


def test_no_standard_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    os.close(writing)
    descriptors = len(os.listdir("/proc/self/fd"))
    with logging_to(writing):
        log.info("one")
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("what", ["pipe", "socket", "file"])
def test_nothing_is_left_open(what: str, pipe: tuple[int, int], tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with (tmp_path / "log").open("w") as file, ours, theirs:
        fd = {"pipe": pipe[1], "socket": ours.fileno(), "file": file.fileno()}[what]
        descriptors = sorted(os.listdir("/proc/self/fd"))
        with logging_to(fd) as handler:
            log.info("one")
            logs.close()
            logs.close()
        assert sorted(os.listdir("/proc/self/fd")) == descriptors
        # What has been closed is closed again when Python ends (logging.shutdown), or used by a thread that is late.
        others = [os.dup(pipe[1]) for _ in range(8)]
        handler.close()
        handler.emit(logging.LogRecord("ebpfstream", logging.ERROR, "", 0, "late", (), None))
        for other in others:
            os.close(other)
        os.fstat(fd)
    assert read(pipe[0]).count(b"\n") == (what == "pipe")


def test_threads_write_whole_lines(pipe: tuple[int, int]) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 1 << 20)

    def write(name: str) -> None:
        for number in range(50):
            log.info(f"{name} {number}")

    with logging_to(pipe[1]):
        threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = [record["event"] for record in records(pipe[0])]
    for name in "abcd":
        assert [event for event in events if event[0] == name] == [f"{name} {number}" for number in range(50)]


SERVICE = """
import logging, os
from ebpfstream.service import logs
logs.configure("info", "json")
log = logging.getLogger("ebpfstream")
for number in range(20_000):
    log.error("of many")
    log.error(f"{number}")
logs.close()
os.write(1, b"done")
"""


def test_a_process_whose_standard_error_nobody_reads_ends() -> None:
    reading, writing = os.pipe()
    fill(writing)
    done = subprocess.run(
        [sys.executable, "-c", SERVICE], cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, b"done")
    assert os.get_blocking(writing)
    os.close(reading)
    os.close(writing)
