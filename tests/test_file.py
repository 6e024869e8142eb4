"""FileSink on real files: rotated, torn, moved away, on disks that are full, by processes that are killed."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gzip
import json
import logging
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import zstandard

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, DecodeError, SinkError, SinkUnavailableError
from ebpfstream.events import U32, Event
from ebpfstream.lost import Lost
from ebpfstream.records import Records
from ebpfstream.sink import open_sink
from ebpfstream.sinks.file import FileSink
from ebpfstream.testing import SinkCompliance
from tests.disks import small_disk

pytestmark = pytest.mark.anyio


@dataclass
class Number(Event):
    n: U32


def batch(start: int, count: int = 1, lost: int = 0) -> EventBatch[Number]:
    """Events with consecutive numbers; each is a line of 10 bytes as long as its number has 4 digits."""
    data = b"".join(struct.pack("<8xI4x", number) for number in range(start, start + count))
    losses = tuple(Lost(cpu, 1) for cpu in range(lost))
    return EventBatch(Number, Records(data, 8, [(0, 16, 4, count)] if count else []), 0, losses)


def lines(*numbers: int) -> bytes:
    return b"".join(b'{"n":%d}\n' % number for number in numbers)


def numbers(data: bytes) -> list[int]:
    assert not data or data.endswith(b"\n")
    return [json.loads(line)["n"] for line in data.splitlines()]


LOSSES = batch(0, 0, lost=2).to_json_lines()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder / "exec.jsonl"


def rotated(path: Path) -> list[Path]:
    return sorted(other for other in path.parent.iterdir() if other.name.startswith(f"{path.name}."))


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    match path.suffix:
        case ".gz":
            return gzip.decompress(data)
        case ".zst":
            return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def everything(path: Path) -> bytes:
    return b"".join(map(unpacked, rotated(path))) + path.read_bytes()


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ebpfstream")]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Clock:
    """Says what time it is to the sink."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ebpfstream.sinks.file.time", lambda: self.now)
        self.set("2026-11-25T10:00:00")

    def set(self, moment: str) -> None:
        self.now = datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of eight pages."""
    with small_disk(tmp_path / "disk", "32k") as folder:
        yield folder


# Arguments and addresses.


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "path='' is impossible": {"path": ""},
        "path='log/' is impossible": {"path": "log/"},
        r"path='a\\x00b' is impossible": {"path": "a\0b"},
        "rotate=0 is impossible": {"rotate": 0},
        "every=0.5 is impossible": {"every": 0.5},
        "every=inf is impossible": {"every": float("inf")},
        "keep=0 is impossible": {"keep": 0, "rotate": 1},
        r"keep=3 is about rotated files: give rotate= or every=": {"keep": 3},
        r"compress='gzip' is about rotated files: give rotate= or every=": {"compress": "gzip"},
        "compress='bzip2' is unknown": {"compress": "bzip2", "every": 60},
        "fsync='always' is impossible": {"fsync": "always"},
        "fsync=0 is impossible": {"fsync": 0},
        "mode=0o1777 is impossible": {"mode": 0o1777},
    }
    for message, arguments in wrong.items():
        with pytest.raises(ArgumentError, match=message):
            FileSink(**({"path": "x"} | arguments))
    FileSink("x", rotate=1, compress="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ArgumentError, match=r"pip install 'ebpfstream\[zstd\]'"):
        FileSink("x", rotate=1, compress="zstd")
    FileSink("x", rotate=1, compress="gzip")


async def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sink = open_sink("file:exec.jsonl?rotate=20&keep=1&compress=gzip&fsync=5s&when_full=fail")
    assert isinstance(sink, FileSink)
    assert (sink.name, sink.flush_every, sink.when_full) == ("file:exec.jsonl", 5.0, "fail")
    async with sink:
        monkeypatch.chdir("/")  # it stays where it was opened
        for number in range(1000, 1006):
            await sink.send(batch(number))
    assert (tmp_path / "exec.jsonl").read_bytes() == lines(1005)
    assert [unpacked(other) for other in rotated(tmp_path / "exec.jsonl")] == [lines(1004)]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("file://exec.jsonl", "write file:exec.jsonl for a path from here, or file:///"),
        ("file://var/log/exec.jsonl", "write file:var/log/exec.jsonl for"),
        ("file:", "names no file: write for example file:exec.jsonl"),
        ("file:x?mode=0600", "there is no option 'mode'"),
        ("file:x?path=y", "there is no option 'path'"),
        ("file:x?rotat=5", "did you mean 'rotate'"),
        ("file:x?compress=lz4&rotate=5", "compress='lz4' is not gzip or zstd"),
        ("file:x?fsync=often", "fsync='often' is not never or batch or a time such as"),
    ],
)
def test_addresses_that_mean_nothing(address: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        open_sink(address)
    assert message in str(caught.value)


def test_an_absolute_address() -> None:
    assert open_sink("file:///var/log/exec%3F.jsonl").name == "file:/var/log/exec?.jsonl"


def test_fsync_says_how_often_to_flush() -> None:
    assert FileSink("x").flush_every is None
    assert FileSink("x", fsync="batch").flush_every is None
    assert FileSink("x", fsync=2).flush_every == 2


# The file.


async def test_what_is_sent_is_appended(path: Path) -> None:
    async with FileSink(path) as sink:
        await sink.send(batch(1, 2))
        await sink.send(batch(0, 0))
        await sink.send(batch(3, lost=2))
        await sink.flush()
    async with FileSink(path) as sink:
        await sink.send(batch(0, 0, lost=2))
    assert path.read_bytes() == lines(1, 2) + LOSSES + lines(3) + LOSSES


async def test_its_mode_is_exact_whatever_the_umask(path: Path) -> None:
    for umask, wanted in ((0, 0o600), (0o777, 0o600), (0o077, 0o644)):
        before = os.umask(umask)
        try:
            async with FileSink(path, mode=wanted, rotate=10) as sink:
                await sink.send(batch(1000, 2))
        finally:
            os.umask(before)
        assert {mode(other) for other in (path, *rotated(path))} == {wanted}
        for other in (path, *rotated(path)):
            other.unlink()


async def test_a_file_that_exists_keeps_its_mode_and_owner_and_so_do_rotated_ones(path: Path) -> None:
    path.write_bytes(lines(999))
    path.chmod(0o640)
    if not os.geteuid():
        os.chown(path, 65534, 65533)
    owner = path.stat().st_uid, path.stat().st_gid
    async with FileSink(path, rotate=10, compress="gzip") as sink:
        await sink.send(batch(1000, 2))
    assert len(rotated(path)) == 2
    for other in (path, *rotated(path)):
        assert (mode(other), other.stat().st_uid, other.stat().st_gid) == (0o640, *owner)


async def test_what_is_no_regular_file_is_refused(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    (path.parent / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(path.with_name("socket")))
        path.with_name("link").symlink_to("fifo")
        for name, message in {
            "fifo": "is a pipe, and only a regular file .* use stdout: and let the shell redirect it",
            "link": "is a pipe",
            "socket": "is a socket",
            "/dev/null": "is a device",
            "folder": "is a folder: give a file's name in it",
            "missing/x": "No such file or directory: make its folder",
            "fifo/x": "Not a directory: make its folder",
        }.items():
            with pytest.raises(SinkError, match=message):
                await FileSink(path.parent / name).open()
    path.symlink_to(path)
    with pytest.raises(SinkError, match="Too many levels of symbolic links"):
        await FileSink(path).open()


async def test_no_rights(path: Path) -> None:
    if os.geteuid():
        pytest.skip("giving up rights needs root")
    path.parent.parent.chmod(0o755)
    path.parent.parent.parent.chmod(0o755)
    top = path.parent.parent.parent.parent
    before = mode(top)
    top.chmod(0o755)
    path.write_bytes(b"")
    path.with_name("writable").write_bytes(b"")
    path.with_name("writable").chmod(0o666)
    os.seteuid(65534)
    try:
        for name in (path.name, "new"):
            with pytest.raises(SinkError, match="Permission denied: give this user the right to write there"):
                await FileSink(path.with_name(name)).open()
        with pytest.raises(SinkError, match="cannot be rotated: give this user the right to write in"):
            await FileSink(path.with_name("writable"), rotate=5).open()
        async with FileSink(path.with_name("writable")) as sink:
            await sink.send(batch(1))
    finally:
        os.seteuid(0)
        top.chmod(before)
    assert path.with_name("writable").read_bytes() == lines(1)


async def test_a_name_too_long_to_be_rotated(path: Path) -> None:
    longest = path.with_name("x" * (255 - len(".20261125T045244.123456Z.zst.part")))
    async with FileSink(longest, rotate=10, compress="zstd") as sink:
        await sink.send(batch(1000, 2))
    assert [len(other.name) for other in rotated(longest)] == [250]
    with pytest.raises(SinkError, match="give it a shorter name"):
        await FileSink(path.with_name(longest.name + "x"), rotate=10).open()


async def test_only_one_may_write(path: Path) -> None:
    for arguments in ({}, {"rotate": 10}):
        async with FileSink(path, **arguments) as sink:  # type: ignore[arg-type]
            for _ in range(2):
                with pytest.raises(SinkError, match="another process or sink is writing to it: give each"):
                    await FileSink(path).open()
                await sink.send(batch(1000, 2))
        async with FileSink(path):
            pass


async def test_one_that_was_rotated_just_before_it_was_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had the lock rotates between our open and our flock: what we locked is no longer the file."""
    path.write_bytes(lines(1))
    flock = fcntl.flock

    def rotated_before(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.rename(path.with_name("rotated"))
        path.write_bytes(lines(2))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", rotated_before)
    before = os.listdir("/proc/self/fd")
    async with FileSink(path) as sink:
        with pytest.raises(SinkError, match="another process or sink"):
            await FileSink(path).open()
        await sink.send(batch(3))
    assert path.read_bytes() == lines(2, 3)
    assert os.listdir("/proc/self/fd") == before


async def test_a_record_that_does_not_fit_is_raised_before_anything_is_written(path: Path) -> None:
    wrong = EventBatch(Number, Records(bytes(24), 8, [(0, 16, 4, 1), (12, 10, 2, 1)]))
    async with FileSink(path) as sink:
        with pytest.raises(DecodeError):
            await sink.send(wrong)
        await sink.send(batch(1))
    assert path.read_bytes() == lines(1)


# A torn end.


@pytest.mark.parametrize(
    ("before", "after", "removed"),
    [
        (b"", b"", 0),
        (b'{"n":1', b"", 6),
        (b'{"n":1}\n{"n"', b'{"n":1}\n', 4),
        (b'{"n":1}\n{"n":2}', b'{"n":1}\n{"n":2}\n', 0),
        (b'{"n":1}\n{"n":2}\0\0\0', b'{"n":1}\n{"n":2}\n', 0),
        (b'{"n":1}\n' + bytes(5), b'{"n":1}\n', 5),
        (b'{"n":1}\n{"n":' + bytes(200_000), b'{"n":1}\n', 200_005),
        (b'{"n":1}\n{"n":\0\0\0"x"}', b'{"n":1}\n', 12),
        (bytes(70_000), b"", 70_000),
        (b'{"n":1}\n\n \n', b'{"n":1}\n\n \n', 0),
        (b'{"n":1}\n{"text":"' + b"x" * 500_000, b'{"n":1}\n', 500_009),
        (b'{"text":"' + b"x" * 500_000 + b'"}\n{"n', b'{"text":"' + b"x" * 500_000 + b'"}\n', 3),
        (b'{"text":"' + b"x" * 500_000 + b'"}', b'{"text":"' + b"x" * 500_000 + b'"}\n', 0),
    ],
)
async def test_a_torn_end(
    path: Path, before: bytes, after: bytes, removed: int, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(before)
    async with FileSink(path) as sink:
        assert path.read_bytes() == after
        await sink.send(batch(7))
    assert path.read_bytes() == after + lines(7)
    warnings = [record.getMessage() for record in caplog.records if record.name == "ebpfstream"]
    assert warnings == (
        [f"{path} ended with an event that was not written whole: removed its {removed} bytes"]
        if removed
        else []
    )


@pytest.mark.parametrize(
    "content",
    [
        b"root:x:0:0:root:/root:/bin/sh\n",
        b"hello",
        b"[1]",
        b"17\n",
        b'{"n":1}\nhello',
        b'{"n":1}\n{"n":2\n',
        b'{"n":1}\n \n"x"\n',
        b'{"n":1}\n\0\0{"n"',
        b"int main(void) {\n{",
        b"a file in an archive\n" + bytes(10_240),
        b"\x7fELF\0\n\0\0",
        b"{" * 100_000 + b"\n",
    ],
)
async def test_a_file_of_something_else_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before = path.stat()
    fds = os.listdir("/proc/self/fd")
    with pytest.raises(SinkError, match="does not end with a line of JSON: give another file"):
        await FileSink(path).open()
    assert path.read_bytes() == content
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert os.listdir("/proc/self/fd") == fds


# Failing.


async def test_a_full_disk(disk: Path) -> None:
    path = disk / "exec.jsonl"
    before = batch(1000, 100)
    async with FileSink(path) as sink:
        await sink.send(before)
        (disk / "ballast").write_bytes(bytes(4096 * 6))
        whole = batch(1100, 1000)
        with pytest.raises(
            SinkUnavailableError, match="No space left on device: make room on its disk"
        ) as caught:
            await sink.send(whole)
        taken = caught.value.taken
        assert taken == 4096 * 2 // 11 - 100
        assert numbers(path.read_bytes()) == list(range(1000, 1100 + taken))
        for _ in range(3):
            with pytest.raises(SinkUnavailableError) as again:
                await sink.send(whole[taken:])
            assert again.value.taken == 0
        assert numbers(path.read_bytes()) == list(range(1000, 1100 + taken))
        (disk / "ballast").unlink()
        await sink.send(whole[taken:])
        await sink.send(batch(2100))
    assert numbers(path.read_bytes()) == list(range(1000, 2101))


async def test_losses_that_got_in_without_an_event_are_taken_back(disk: Path) -> None:
    path = disk / "exec.jsonl"
    room = 4096
    async with FileSink(path) as sink:
        await sink.send(batch(1000, 300))
        used = path.stat().st_size
        filler = b'{"x":"' + b"x" * (room - used - len(LOSSES) - 5 - 9) + b'"}\n'
        path.write_bytes(path.read_bytes() + filler)
        (disk / "ballast").write_bytes(bytes(4096 * 7))
        full = path.read_bytes()
        assert len(full) == room - len(LOSSES) - 5
        lossy = batch(1300, 5, lost=2)
        for _ in range(2):
            with pytest.raises(SinkUnavailableError) as caught:
                await sink.send(lossy)
            assert caught.value.taken == 0
            assert path.read_bytes() == full
        with pytest.raises(SinkUnavailableError) as caught:
            await sink.send(batch(0, 0, lost=3))
        assert caught.value.taken == 0
        assert path.read_bytes() == full
        (disk / "ballast").unlink()
        await sink.send(lossy)
    assert path.read_bytes() == full + LOSSES + lines(*range(1300, 1305))


async def test_losses_that_got_in_with_an_event_are_not_told_again(disk: Path) -> None:
    path = disk / "exec.jsonl"
    (disk / "ballast").write_bytes(bytes(4096 * 7))
    lossy = batch(1000, 1000, lost=2)
    async with FileSink(path) as sink:
        with pytest.raises(SinkUnavailableError) as caught:
            await sink.send(lossy)
        assert caught.value.taken == (4096 - len(LOSSES)) // 11
        (disk / "ballast").unlink()
        await sink.send(lossy[caught.value.taken :])
    assert path.read_bytes() == LOSSES + lines(*range(1000, 2000))


def set_append_only(path: Path, on: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x40086602, struct.pack("i", 0x20 if on else 0))  # FS_IOC_SETFLAGS, FS_APPEND_FL
    finally:
        os.close(fd)


async def test_what_could_not_be_taken_back_at_once_is_later(disk: Path) -> None:
    path = disk / "exec.jsonl"
    (disk / "ballast").write_bytes(bytes(4096 * 7))
    whole = batch(1000, 1000)
    async with FileSink(path) as sink:
        try:
            set_append_only(path, True)
        except OSError as error:
            pytest.skip(f"tmpfs has no append-only files before Linux 6.6: {error}")
        with pytest.raises(SinkUnavailableError, match="No space left") as caught:
            await sink.send(whole)
        assert path.stat().st_size == 4096, "an append-only file cannot be cut"
        taken = caught.value.taken
        assert taken == 4096 // 11
        (disk / "ballast").unlink()
        with pytest.raises(SinkUnavailableError, match="lsattr") as caught:
            await sink.send(whole[taken:])
        assert caught.value.taken == 0
        assert path.stat().st_size == 4096
        set_append_only(path, False)
        await sink.send(whole[taken:])
    assert path.read_bytes() == lines(*range(1000, 2000))


async def tear(sink: FileSink, path: Path) -> None:
    """Leave a line in the file that is not whole, and cannot be taken back until now."""
    path.with_name("ballast").write_bytes(bytes(4096 * 7))
    set_append_only(path, True)
    with pytest.raises(SinkUnavailableError):
        await sink.send(batch(1000, 1000))
    set_append_only(path, False)


async def test_what_could_not_be_taken_back_is_when_it_closes(disk: Path) -> None:
    path = disk / "exec.jsonl"
    async with FileSink(path) as sink:
        await tear(sink, path)
    assert path.read_bytes() == lines(*range(1000, 1000 + 4096 // 11))


LIMITED = """
import resource, sys
import anyio
from ebpfstream.errors import SinkUnavailableError
from ebpfstream.sinks.file import FileSink
from tests.test_file import batch

async def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    async with FileSink(sys.argv[1]) as sink:
        try:
            await sink.send(batch(1000, 200))
        except SinkUnavailableError as error:
            print(error.taken, error)

anyio.run(main)
"""
ROOT = Path(__file__).resolve().parents[1]


async def test_a_limit_of_the_length_of_files(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"90 cannot write to {path}: File too large: "
        "let files grow longer (ulimit -f), or rotate them before (rotate=)\n"
    )
    assert path.read_bytes() == lines(*range(1000, 1090))


KILLED = """
import os, sys
import anyio
from ebpfstream.sinks.file import FileSink
from tests.test_file import batch

async def main():
    number = int(sys.argv[2])
    async with FileSink(sys.argv[1], rotate=300_000, compress="gzip") as sink:
        while True:
            await sink.send(batch(number, 5000))
            number += 5000
            os.write(1, b"%d\\n" % number)

anyio.run(main)
"""


async def test_what_was_acknowledged_survives_kill(path: Path) -> None:
    following = 1000
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, path, str(following)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        acknowledged = [child.stdout.readline() for _ in range(20)][-1]
        child.send_signal(signal.SIGKILL)
        acknowledged = ([acknowledged, *child.stdout.read().splitlines()])[-1]
        child.stdout.close()
        child.wait()
        async with FileSink(path, rotate=300_000, compress="gzip"):
            pass
        assert {other.suffix for other in rotated(path)} == {".gz"}
        assert all(len(unpacked(other)) <= 300_000 for other in rotated(path))
        arrived = numbers(everything(path))
        assert arrived == list(range(1000, 1000 + len(arrived)))
        assert int(acknowledged) <= 1000 + len(arrived) <= int(acknowledged) + 5000
        following = 1000 + len(arrived)


# Rotating.


async def test_by_size_no_file_is_longer(path: Path) -> None:
    async with FileSink(path, rotate=100) as sink:
        await sink.send(batch(1000, 4))
        await sink.send(batch(1004, 40))
        await sink.send(batch(1044))
    # 11 bytes a line: nine to a file
    sizes = [len(other.read_bytes()) for other in (*rotated(path), path)]
    assert sizes == [99, 99, 99, 99, 99]
    assert everything(path) == lines(*range(1000, 1045))


async def test_a_size_that_is_met_exactly(path: Path) -> None:
    async with FileSink(path, rotate=22) as sink:
        for number in range(1000, 1005):
            await sink.send(batch(number))
    assert [other.read_bytes() for other in rotated(path)] == [lines(1000, 1001), lines(1002, 1003)]
    assert path.read_bytes() == lines(1004)


async def test_a_line_longer_than_a_file_has_one_of_its_own(path: Path) -> None:
    async with FileSink(path, rotate=10) as sink:
        await sink.send(batch(7))
        await sink.send(batch(1000, 3))
        await sink.send(batch(8))
    assert [other.read_bytes() for other in (*rotated(path), path)] == [
        lines(7),
        *(lines(number) for number in range(1000, 1003)),
        lines(8),
    ]


async def test_losses_stay_with_their_event(path: Path) -> None:
    async with FileSink(path, rotate=len(LOSSES) + 22) as sink:
        await sink.send(batch(1000, 8))
        await sink.send(batch(1008, 3, lost=2))
        await sink.send(batch(0, 0, lost=2))
    assert [other.read_bytes() for other in (*rotated(path), path)] == [
        lines(*range(1000, 1008)),
        LOSSES + lines(1008, 1009),
        lines(1010) + LOSSES,
    ]


async def test_what_failed_behind_a_rotation_is_not_written_twice(disk: Path) -> None:
    path = disk / "exec.jsonl"
    (disk / "ballast").write_bytes(bytes(4096 * 5))
    whole = batch(1000, 2000, lost=2)
    async with FileSink(path, rotate=4096) as sink:
        with pytest.raises(SinkUnavailableError, match="No space left") as caught:
            await sink.send(whole)
        assert len(rotated(path)) == 3
        assert path.read_bytes() == b""
        (disk / "ballast").unlink()
        await sink.send(whole[caught.value.taken : 1500])
    assert everything(path) == LOSSES + lines(*range(1000, 2500))
    assert max(other.stat().st_size for other in rotated(path)) <= 4096


async def test_by_time(path: Path, clock: Clock) -> None:
    async with FileSink(path, every=3600) as sink:
        clock.set("2026-11-25T10:59:59")
        await sink.send(batch(1))
        clock.set("2026-11-25T10:59:59.9")
        await sink.send(batch(2))
        clock.set("2026-11-25T11:00:00")
        await sink.send(batch(3))
        clock.set("2026-11-25T11:59:59")
        await sink.send(batch(4))
        clock.set("2026-11-26T11:30:00.5")
        await sink.send(batch(5))
        clock.set("2026-11-26T10:30:00")  # set back
        await sink.send(batch(6))
    assert {other.name: other.read_bytes() for other in rotated(path)} == {
        "exec.jsonl.20261125T110000.000000Z": lines(1, 2),
        "exec.jsonl.20261126T113000.500000Z": lines(3, 4),
    }
    assert path.read_bytes() == lines(5, 6)


@pytest.mark.parametrize(
    ("every", "begun", "same", "other"),
    [
        (86400, "2026-11-25T00:00:00", "2026-11-25T23:59:59", "2026-11-26T00:00:00"),
        (25200, "2026-11-25T21:00:00", "2026-11-25T23:59:59", "2026-11-26T00:00:00"),  # 7 h: 0, 7, 14, 21
        (25200, "2026-11-25T00:00:00", "2026-11-25T06:59:59", "2026-11-25T07:00:00"),
        (172800, "2026-11-25T00:00:00", "2026-11-26T23:59:59", "2026-11-27T00:00:00"),
    ],
)
async def test_where_periods_begin(
    path: Path, clock: Clock, every: float, begun: str, same: str, other: str
) -> None:
    async with FileSink(path, every=every) as sink:
        for number, moment in enumerate((begun, same, other)):
            clock.set(moment)
            await sink.send(batch(number))
    assert [one.read_bytes() for one in rotated(path)] == [lines(0, 1)]


@pytest.mark.parametrize("torn", [b"", b'{"n', b'{"n":2}'])
async def test_a_period_that_ended_before_it_was_opened(path: Path, clock: Clock, torn: bytes) -> None:
    for written, count in (("2026-11-25T09:59:59", 1), ("2026-11-25T10:00:00", 0)):
        path.write_bytes(lines(1) + torn)
        moment = datetime.fromisoformat(written).replace(tzinfo=UTC).timestamp()
        os.utime(path, (moment, moment))
        async with FileSink(path, every=3600) as sink:
            assert rotated(path) == []  # only when something is written
            await sink.send(batch(3))
        assert len(rotated(path)) == count
        for other in rotated(path):
            other.unlink()


async def test_an_empty_file_is_not_rotated(path: Path, clock: Clock) -> None:
    async with FileSink(path, every=3600, rotate=5) as sink:
        clock.set("2026-11-27T00:00:00")
        await sink.send(batch(1))
    assert rotated(path) == []


async def test_names_are_unique_and_in_order_though_the_clock_stands_or_goes_back(
    path: Path, clock: Clock
) -> None:
    async with FileSink(path, rotate=8) as sink:
        for number in range(3):
            await sink.send(batch(number))
        clock.set("2026-11-25T09:00:00")
        await sink.send(batch(3))
    assert {other.name[11:]: other.read_bytes() for other in rotated(path)} == {
        "20261125T100000.000000Z": lines(0),
        "20261125T100000.000001Z": lines(1),
        "20261125T100000.000002Z": lines(2),
    }


async def test_the_newest_are_kept_and_nothing_else_is_touched(path: Path, clock: Clock) -> None:
    others = [
        "exec.jsonl.1",
        "exec.jsonl.20201125T045244.123456Z.bak",
        "exec.jsonl.20201125T045244.123456",
        "exec.jsonl.20201399T045244.123456Z",
        "exec.jsonlx20201125T045244.123456Z",
        "xexec.jsonl.20201125T045244.123456Z",
        "execxjsonl.20201125T045244.123456Z",
        "exec.jsonl.99991231T235959.999999Z",
        "other.20201125T045244.123456Z",
    ]
    for name in others:
        path.with_name(name).write_bytes(b"x")
    old = ["exec.jsonl.20201125T045244.123456Z.gz", "exec.jsonl.20201125T045244.123457Z.zst"]
    for name in (*old, "exec.jsonl.20201125T045244.123458Z"):
        path.with_name(name).write_bytes(b"x")
    async with FileSink(path, rotate=8, keep=3) as sink:
        assert len(list(path.parent.iterdir())) == len(others) + 4
        await sink.send(batch(0))
        await sink.send(batch(1))
        assert not path.with_name(old[0]).exists()
        assert path.with_name(old[1]).exists()
        await sink.send(batch(2, 3))
    left = {other.name: other.read_bytes() for other in path.parent.iterdir()}
    assert {name: left.pop(name) for name in others} == dict.fromkeys(others, b"x")
    assert left.pop("exec.jsonl") == lines(4)
    assert [left[name] for name in sorted(left)] == [lines(1), lines(2), lines(3)]


async def test_what_cannot_be_deleted_is_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.with_name("exec.jsonl.20201125T045244.123456Z").mkdir()
    async with FileSink(path, rotate=8, keep=1) as sink:
        await sink.send(batch(0, 3))
    assert len(rotated(path)) == 2
    assert "20201125T045244.123456Z, which is beyond keep=1: Is a directory" in caplog.text


async def test_no_rotation_where_the_folder_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename
    async with FileSink(path, rotate=22) as sink:
        await sink.send(batch(1000))

        def refuse(self: Path, target: Path) -> Path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "rename", refuse)
        whole = batch(1001, 3)
        for part, taken in ((whole, 1), (whole[1:], 0)):
            with pytest.raises(SinkUnavailableError, match="can only be read") as caught:
                await sink.send(part)
            assert caught.value.taken == taken
            assert path.read_bytes() == lines(1000, 1001)
        monkeypatch.setattr(Path, "rename", rename)
        await sink.send(whole[1:])
    assert everything(path) == lines(1000, 1001, 1002, 1003)


async def test_no_rotation_where_there_is_no_new_file(path: Path) -> None:
    """No descriptor is left, so the file gets its name back."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with FileSink(path, rotate=11) as sink:
        await sink.send(batch(1000))
        original = path.stat().st_ino
        monkey = pytest.MonkeyPatch()
        monkey.setattr(Path, "iterdir", lambda self: iter([path]))  # a listing takes a descriptor as well
        used = max(map(int, os.listdir("/proc/self/fd")))
        held = [os.dup(0) for _ in range(used)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, limits[1]))
        held += fill()
        try:
            with pytest.raises(SinkUnavailableError, match="Too many open files: raise the limit") as caught:
                await sink.send(batch(1001))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            monkey.undo()
            for fd in held:
                os.close(fd)
        assert caught.value.taken == 0
        assert path.stat().st_ino == original
        assert rotated(path) == []
        await sink.send(batch(1001))
    assert [other.read_bytes() for other in (*rotated(path), path)] == [lines(1000), lines(1001)]


def fill() -> list[int]:
    held = []
    while True:
        try:
            held.append(os.dup(0))
        except OSError:
            return held


async def test_somebody_elses_file_in_the_place_of_the_rotated_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def and_then_another(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        done = rename(self, target)
        self.write_bytes(lines(5))
        return done

    async with FileSink(path, rotate=8) as sink:
        await sink.send(batch(1))
        monkeypatch.setattr(Path, "rename", and_then_another)
        with pytest.raises(SinkUnavailableError, match="File exists") as caught:
            await sink.send(batch(2))
        assert caught.value.taken == 0
        await sink.send(batch(2))
    assert everything(path) == lines(1, 5, 2)


async def test_a_link_stays_and_its_file_is_rotated(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "real.jsonl")
    async with FileSink(path, rotate=8) as sink:
        await sink.send(batch(1, 3))
        (tmp_path / "other.jsonl").touch()
        path.unlink()
        path.symlink_to("../other.jsonl")
        await sink.send(batch(4, 2))
    assert path.is_symlink()
    assert everything(tmp_path / "real.jsonl") == lines(1, 2, 3)
    assert everything(tmp_path / "other.jsonl") == lines(4, 5)
    assert len(rotated(tmp_path / "other.jsonl")) == 1


# Compressing.


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
async def test_rotated_files_are_compressed(path: Path, kind: Any) -> None:
    suffix = {"gzip": ".gz", "zstd": ".zst"}[kind]
    async with FileSink(path, rotate=1100, compress=kind) as sink:
        assert len(ours()) == 1
        for start in range(1000, 2000, 50):
            await sink.send(batch(start, 50))
    assert ours() == []
    assert [other.suffix for other in rotated(path)] == [suffix] * 9
    assert [unpacked(other) for other in rotated(path)] == [
        lines(*range(start, start + 100)) for start in range(1000, 1900, 100)
    ]
    assert path.read_bytes() == lines(*range(1900, 2000))
    assert {mode(other) for other in rotated(path)} == {0o600}
    assert all(other.stat().st_size < 700 for other in rotated(path))


async def test_what_an_earlier_life_left_is_compressed(path: Path) -> None:
    plain = path.with_name("exec.jsonl.20201125T045244.123456Z")
    both = path.with_name("exec.jsonl.20201125T045244.123457Z")
    for number, file in enumerate((plain, both)):
        file.write_bytes(lines(number))
        os.utime(file, (1, 2))
        file.with_name(file.name + ".gz.part").write_bytes(b"half")
    both.with_name(both.name + ".gz").write_bytes(gzip.compress(lines(1)))
    path.with_name("exec.jsonl.20191125T045244.123457Z.zst.part").write_bytes(b"half")
    async with FileSink(path, rotate=1100, compress="gzip"):
        pass
    assert [other.name for other in rotated(path)] == [f"{plain.name}.gz", f"{both.name}.gz"]
    assert [unpacked(other) for other in rotated(path)] == [lines(0), lines(1)]
    assert rotated(path)[0].stat().st_mtime == 2


async def test_what_is_half_compressed_is_removed_by_whoever_rotates(path: Path) -> None:
    path.with_name("exec.jsonl.20191125T045244.123457Z.zst.part").write_bytes(b"half")
    async with FileSink(path):
        assert len(rotated(path)) == 1
    async with FileSink(path, rotate=5):
        assert rotated(path) == []


async def test_a_link_in_the_place_of_a_rotated_file_is_not_followed(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    link, fifo = (path.with_name(f"exec.jsonl.20201125T045244.12345{digit}Z") for digit in (6, 7))
    link.symlink_to(tmp_path / "secret")
    os.mkfifo(fifo)
    async with FileSink(path, rotate=5, compress="gzip"):
        pass
    assert rotated(path) == [link, fifo]
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


async def test_a_disk_too_full_to_compress_on(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = disk / "exec.jsonl"
    plain = path.with_name("exec.jsonl.20201125T045244.123456Z")
    noise = os.urandom(8000)
    plain.write_bytes(noise)
    (disk / "ballast").write_bytes(bytes(4096 * 5))
    async with FileSink(path, rotate=11, compress="zstd"):
        pass
    assert plain.read_bytes() == noise
    assert rotated(path) == [plain]
    assert "cannot compress" in caplog.text
    assert "No space left on device" in caplog.text
    (disk / "ballast").unlink()
    async with FileSink(path, rotate=11, compress="zstd") as sink:
        await sink.send(batch(1000, 2))
    assert [unpacked(other) for other in rotated(path)] == [noise, lines(1000)]
    assert {other.suffix for other in rotated(path)} == {".zst"}


async def test_what_failed_is_tried_again_with_the_next_rotation(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = disk / "exec.jsonl"
    plain = path.with_name("exec.jsonl.20201125T045244.123456Z")
    plain.write_bytes(os.urandom(8000))
    (disk / "ballast").write_bytes(bytes(4096 * 5))
    async with FileSink(path, rotate=11, compress="gzip") as sink:
        while "cannot compress" not in caplog.text:
            await anyio.sleep(0.005)
        (disk / "ballast").unlink()
        await sink.send(batch(1000, 2))
    assert {other.suffix for other in rotated(path)} == {".gz"}
    assert len(rotated(path)) == 2


async def test_what_an_earlier_sink_is_still_compressing_is_left_to_it(path: Path) -> None:
    plain = path.with_name("exec.jsonl.20201125T045244.123456Z")
    plain.write_bytes(lines(1))
    part = path.with_name(f"{plain.name}.gz.part")
    with part.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        async with FileSink(path, rotate=5, compress="gzip"):
            pass
        assert rotated(path) == [plain, part]
    async with FileSink(path, rotate=5, compress="gzip"):
        pass
    assert [unpacked(other) for other in rotated(path)] == [lines(1)]


def slow_packing(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Each compression goes on until the event is set, or it is told to end."""
    from ebpfstream.sinks import rotation

    go, pack = threading.Event(), rotation._pack

    def wait(source: Any, target: Any, kind: Any, ended: threading.Event) -> None:
        while not (go.is_set() or ended.is_set()):
            time.sleep(0.001)
        pack(source, target, kind, ended)

    monkeypatch.setattr(rotation, "_pack", wait)
    return go


@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_does_not_wait_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    fds = os.listdir("/proc/self/fd")
    slow_packing(monkeypatch)
    sink = FileSink(path, rotate=11, compress="gzip")
    await sink.open()
    await sink.send(batch(1000, 3))
    with anyio.move_on_after(0.1 if cancelled else 60) as scope:
        await sink.aclose(60 if cancelled else 0.2)
    assert scope.cancelled_caught is cancelled
    while ours():
        await anyio.sleep(0.005)
    assert os.listdir("/proc/self/fd") == fds
    assert [other.read_bytes() for other in rotated(path)] == [lines(1000), lines(1001)]
    monkeypatch.undo()
    async with FileSink(path, rotate=11, compress="gzip"):
        pass
    assert [unpacked(other) for other in rotated(path)] == [lines(1000), lines(1001)]
    assert {other.suffix for other in rotated(path)} == {".gz"}


async def test_closing_waits_for_what_is_nearly_done(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = slow_packing(monkeypatch)
    sink = FileSink(path, rotate=11, compress="gzip")
    await sink.open()
    await sink.send(batch(1000, 3))
    timer = threading.Timer(0.2, go.set)
    timer.start()
    await sink.aclose(60)
    timer.join()
    assert {other.suffix for other in rotated(path)} == {".gz"}
    assert ours() == []


async def test_what_is_no_longer_kept_does_not_come_back_compressed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = slow_packing(monkeypatch)
    async with FileSink(path, rotate=11, compress="gzip", keep=1) as sink:
        await sink.send(batch(1000, 2))
        while not any(other.suffix == ".part" for other in rotated(path)):
            await anyio.sleep(0.005)
        await sink.send(batch(1002, 2))
        go.set()
    assert [unpacked(other) for other in rotated(path)] == [lines(1002)]


# Syncing.


class Syncs:
    """What is synced, and whether it may succeed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data: list[bytes] = []
        self.folders: list[str] = []
        self.failing = False
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fdatasync(self, fd: int) -> None:
        if self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.data.append(Path(f"/proc/self/fd/{fd}").read_bytes())

    def _fsync(self, fd: int) -> None:
        self.folders.append(os.readlink(f"/proc/self/fd/{fd}"))


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    return Syncs(monkeypatch)


async def test_never(path: Path, syncs: Syncs) -> None:
    async with FileSink(path, rotate=11) as sink:
        await sink.send(batch(1000, 3))
        await sink.flush()
        path.unlink()
        await sink.reopen()
    assert (syncs.data, syncs.folders) == ([], [])


async def test_each_batch(path: Path, syncs: Syncs) -> None:
    folder = str(path.parent)
    async with FileSink(path, rotate=22, fsync="batch") as sink:
        await sink.send(batch(1000))
        assert (syncs.data, syncs.folders) == ([lines(1000)], [folder])
        await sink.send(batch(1001))
        await sink.flush()
        assert (syncs.data, syncs.folders) == ([lines(1000), lines(1000, 1001)], [folder])
        await sink.send(batch(1002, 3))
        assert syncs.data[2:] == [lines(1002, 1003), lines(1004)]
        assert syncs.folders == [folder] * 3


async def test_every_so_often(path: Path, syncs: Syncs) -> None:
    async with FileSink(path, rotate=22, fsync=5) as sink:
        await sink.send(batch(1000))
        assert syncs.data == []
        await sink.flush()
        await sink.flush()
        assert syncs.data == [lines(1000)]
        await sink.send(batch(1001, 2))  # what is rotated is flushed before
        assert syncs.data[1:] == [lines(1000, 1001)]
        path.rename(path.with_name("moved"))
        await sink.reopen()
        assert syncs.data[2:] == [lines(1002)]
    assert syncs.folders == [str(path.parent)] * 2


async def test_a_batch_that_the_disk_did_not_write_is_written_again(path: Path, syncs: Syncs) -> None:
    """By ourselves: the kernel takes the pages for written after an error, and never tries them again."""
    async with FileSink(path, fsync="batch") as sink:
        await sink.send(batch(1000))
        syncs.failing = True
        for _ in range(2):
            with pytest.raises(SinkUnavailableError, match=r"Input/output error: look at the disk") as caught:
                await sink.send(batch(1001, 2, lost=2))
            assert caught.value.taken == 0
            assert path.read_bytes() == lines(1000)
        syncs.failing = False
        await sink.send(batch(1001, 2, lost=2))
        assert syncs.data[1:] == [lines(1000) + LOSSES + lines(1001, 1002)]


async def test_so_is_the_part_behind_a_rotation(path: Path, syncs: Syncs) -> None:
    async with FileSink(path, fsync="batch", rotate=33) as sink:
        await sink.send(batch(1000, 2))
        succeed, tries = syncs._fdatasync, 0

        def second_fails(fd: int) -> None:
            nonlocal tries
            tries += 1
            syncs.failing = tries == 2
            succeed(fd)

        monkey = pytest.MonkeyPatch()
        monkey.setattr(os, "fdatasync", second_fails)
        with pytest.raises(SinkUnavailableError) as caught:
            await sink.send(batch(1002, 7))  # 1 and 3 and 3
        monkey.undo()
        syncs.failing = False
        assert caught.value.taken == 1
        assert everything(path) == lines(1000, 1001, 1002)
        await sink.send(batch(1002, 7)[1:])
    assert everything(path) == lines(*range(1000, 1009))


async def test_what_is_whole_of_a_failed_write_is_synced(disk: Path, syncs: Syncs) -> None:
    path = disk / "exec.jsonl"
    (disk / "ballast").write_bytes(bytes(4096 * 7))
    async with FileSink(path, fsync="batch") as sink:
        with pytest.raises(SinkUnavailableError, match="No space left") as caught:
            await sink.send(batch(1000, 1000))
        assert caught.value.taken == 4096 // 11
        assert [len(data) for data in syncs.data] == [4096]


async def test_a_flush_that_fails(path: Path, syncs: Syncs) -> None:
    async with FileSink(path, fsync=5) as sink:
        await sink.send(batch(1000))
        syncs.failing = True
        with pytest.raises(SinkUnavailableError, match=r"cannot write to the disk .*: Input/output error"):
            await sink.flush()
        path.rename(path.with_name("moved"))
        with pytest.raises(SinkUnavailableError, match="Input/output error"):
            await sink.send(batch(1001))
        with pytest.raises(SinkUnavailableError, match="Input/output error"):
            await sink.reopen()
        syncs.failing = False
        await sink.send(batch(1001))
    assert path.with_name("moved").read_bytes() == lines(1000)
    assert path.read_bytes() == lines(1001)


async def test_the_real_thing_is_synced(path: Path) -> None:
    async with FileSink(path, fsync="batch", rotate=22) as sink:
        await sink.send(batch(1000, 5))
        await sink.flush()
    assert everything(path) == lines(*range(1000, 1005))


# Moved away.


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("recreated", [True, False])
async def test_logrotate(path: Path, told: bool, recreated: bool) -> None:
    fds = len(os.listdir("/proc/self/fd"))
    async with FileSink(path) as sink:
        await sink.send(batch(1))
        path.rename(path.with_name("exec.jsonl.1"))
        if recreated:
            path.touch()
            path.chmod(0o640)
        if told:
            await sink.reopen()
            assert path.exists()
        await sink.send(batch(2))
        await sink.reopen()
        await sink.send(batch(3))
        assert len(os.listdir("/proc/self/fd")) == fds + 1
    assert path.with_name("exec.jsonl.1").read_bytes() == lines(1)
    assert path.read_bytes() == lines(2, 3)
    assert mode(path) == (0o640 if recreated else 0o600)


async def test_copytruncate(path: Path, clock: Clock) -> None:
    async with FileSink(path, rotate=33, every=3600) as sink:
        await sink.send(batch(1000, 3))
        clock.set("2026-11-25T11:00:00")
        os.truncate(path, 0)
        await sink.send(batch(1003, 3))
    assert path.read_bytes() == lines(1003, 1004, 1005)
    assert rotated(path) == []


async def test_deleted(path: Path) -> None:
    async with FileSink(path, fsync="batch") as sink:
        await sink.send(batch(1))
        path.unlink()
        await sink.send(batch(2))
    assert path.read_bytes() == lines(2)


async def test_no_way_back_is_unavailable_until_there_is_one(path: Path) -> None:
    async with FileSink(path) as sink:
        await sink.send(batch(1))
        path.rename(path.with_name("moved"))
        os.mkfifo(path)
        for _ in range(2):
            with pytest.raises(SinkUnavailableError, match="is a pipe"):
                await sink.send(batch(2))
            with pytest.raises(SinkUnavailableError, match="is a pipe"):
                await sink.reopen()
        path.unlink()
        path.write_bytes(b"hello\n")
        with pytest.raises(SinkUnavailableError, match="does not end with a line of JSON"):
            await sink.send(batch(2))
        folder = path.parent.rename(path.parent.with_name("gone"))
        with pytest.raises(SinkUnavailableError, match="make its folder"):
            await sink.send(batch(2))
        path.parent.mkdir()
        other = FileSink(path)
        await other.open()
        with pytest.raises(SinkUnavailableError, match="another process or sink is writing to it"):
            await sink.send(batch(2))
        await other.aclose()
        await sink.send(batch(2))
    assert (folder / "moved").read_bytes() == lines(1)
    assert path.read_bytes() == lines(2)


async def test_what_was_torn_is_taken_back_before_it_is_left(disk: Path) -> None:
    path = disk / "exec.jsonl"
    async with FileSink(path) as sink:
        await tear(sink, path)
        path.rename(path.with_name("moved"))
        await sink.reopen()
    assert path.with_name("moved").read_bytes() == lines(*range(1000, 1000 + 4096 // 11))
    assert path.read_bytes() == b""


# The loop, cancelling, leaving.


class SlowWrites:
    """Each write waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self._write = os.write
        monkeypatch.setattr(os, "write", self._slow)

    def _slow(self, fd: int, data: Any) -> int:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            self.begun.set()
            assert self.go.wait(60)
        return self._write(fd, data[:1000])


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await anyio.sleep(0.001)


async def test_a_slow_disk_holds_up_nobody_and_a_write_that_began_is_finished(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowWrites(monkeypatch)
    async with FileSink(path) as sink:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sink.send, batch(1000, 500))
            await until(slow.begun)
            tasks.cancel_scope.cancel()
            slow.go.set()
        assert path.read_bytes() == lines(*range(1000, 1500))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await sink.send(batch(7))
        assert scope.cancelled_caught
        await sink.send(batch(1500))
    assert path.read_bytes() == lines(*range(1000, 1501))


def test_cancelled_by_asyncio_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowWrites(monkeypatch)

    async def main() -> None:
        async with FileSink(path) as sink:
            task = asyncio.ensure_future(sink.send(batch(1000, 500)))
            while not slow.begun.is_set():
                await asyncio.sleep(0.001)
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.001)
            slow.go.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert path.read_bytes() == lines(*range(1000, 1500))
            await sink.send(batch(1500))

    asyncio.run(main())
    assert path.read_bytes() == lines(*range(1000, 1501))


async def test_opening_that_is_cancelled_leaves_nothing_open(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, flock = threading.Event(), threading.Event(), fcntl.flock

    def slow(fd: int, operation: int) -> None:
        begun.set()
        assert go.wait(60)
        flock(fd, operation)

    fds = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "flock", slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(FileSink(path, rotate=5, compress="gzip").open)
        await until(begun)
        tasks.cancel_scope.cancel()
        go.set()
    assert os.listdir("/proc/self/fd") == fds
    assert ours() == []
    async with FileSink(path):
        pass


async def test_leaving_gives_back_everything(path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    make = partial(FileSink, path, rotate=100, every=60, keep=2, compress="zstd", fsync="batch")
    for start in range(1000, 1200, 20):
        async with make() as sink:
            await sink.send(batch(start, 20))
    assert os.listdir("/proc/self/fd") == before
    assert ours() == []
    assert len(rotated(path)) == 2
    path.write_bytes(b"hello\n")
    for _ in range(10):
        with pytest.raises(SinkError):
            await make().open()
    assert os.listdir("/proc/self/fd") == before
    assert ours() == []


# What every sink must stand.


class TestFile(SinkCompliance):
    @pytest.fixture(autouse=True)
    def destination(self, path: Path) -> None:
        self.path = path

    def make(self, **delivery: Any) -> FileSink:
        return FileSink(self.path, **delivery)

    def arrived(self) -> list[Any]:
        while True:
            whole = [other for other in rotated(self.path) if other.suffix != ".part"]
            try:
                contents = {other.name.removesuffix(".gz"): unpacked(other) for other in whole}
            except FileNotFoundError:  # compressed meanwhile
                continue
            contents[""] = self.path.read_bytes() if self.path.exists() else b""
            return [json.loads(line) for data in contents.values() for line in data.splitlines()]

    def address(self) -> str:
        return "file:exec.jsonl?rotate=100MB&keep=10"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Its folder is."""
        away = self.path.parent.with_name("away")
        self.path.parent.rename(away)
        try:
            yield
        finally:
            away.rename(self.path.parent)


class TestRotatedFile(TestFile):
    def make(self, **delivery: Any) -> FileSink:
        return FileSink(self.path, rotate=20_000, compress="gzip", fsync=0.5, **delivery)

    test_memory_is_bounded = None  # type: ignore[assignment]  # 72 MiB would be thousands of files


class TestFileOnAFullDisk(TestFile):
    @pytest.fixture(autouse=True)
    def destination(self, tmp_path: Path) -> Iterator[None]:
        with small_disk(tmp_path / "disk", "128m") as folder:
            self.path = folder / "exec.jsonl"
            yield

    def make(self, **delivery: Any) -> FileSink:
        return FileSink(self.path, fsync="batch", **delivery)

    @contextmanager
    def away(self) -> Iterator[None]:
        ballast = self.path.with_name("ballast")
        disk = os.statvfs(ballast.parent)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_bsize)
        try:
            yield
        finally:
            ballast.unlink()
