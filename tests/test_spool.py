"""Spools on real disks: killed, cut short, flipped, full; nothing undamaged is lost or comes out of order."""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpfstream import segments
from ebpfstream.errors import ArgumentError, SinkError, SinkRejectedError, SinkUnavailableError
from ebpfstream.segments import HEADER, POSITIONS_SIZE, Position
from ebpfstream.spool import Entry, Spool
from tests.disks import small_disk

ROOT = Path(__file__).resolve().parents[1]
SIZE = 1 << 20
OPENED: list[Spool] = []


def make(folder: Path, size: int = SIZE, fsync: str | float = "never") -> Spool:
    spool = Spool(folder, size=size, fsync=fsync)  # type: ignore[arg-type]
    spool.open()
    OPENED.append(spool)
    return spool


@pytest.fixture(autouse=True)
def _released() -> Iterator[None]:
    yield
    release()


def release() -> None:
    """Also of tests that failed."""
    while OPENED:
        OPENED.pop()._release()


def kill(spool: Spool) -> None:
    """What SIGKILL leaves: everything that was written, and nothing of what `close` would do."""
    spool._release()


def entries(spool: Spool) -> list[Entry]:
    return list(iter(spool.read, None))


def payloads(spool: Spool) -> list[bytes]:
    return [entry.payload for entry in entries(spool)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment"))


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def du(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


# --- as it should be


def test_what_is_appended_is_read_in_order_and_goes_when_acknowledged(folder: Path) -> None:
    spool = make(folder)
    assert (spool.count, spool.recovered, spool.unread, spool.read()) == (0, 0, False, None)
    for number in range(5):
        assert spool.append(bytes([number]) * number, number) == 0
    assert (spool.count, spool.unread) == (10, True)
    found = entries(spool)
    assert [(entry.payload, entry.count) for entry in found] == [(bytes([n]) * n, n) for n in range(5)]
    assert found == sorted(found, key=lambda entry: entry.end)
    assert (spool.count, spool.unread, spool.read()) == (10, False, None)
    spool.acknowledge(found[2].end)
    spool.acknowledge(found[1].end)  # says nothing new
    assert spool.count == 7
    spool.close()
    spool = make(folder)
    assert (spool.recovered, spool.count) == (7, 7)
    found = entries(spool)
    assert [entry.count for entry in found] == [3, 4]
    spool.acknowledge(found[-1].end)
    assert spool.count == 0
    spool.append(b"next", 1)
    assert payloads(spool) == [b"next"]
    assert spool.damaged == 0
    spool.close()


def test_what_was_not_read_cannot_be_acknowledged(folder: Path) -> None:
    spool = make(folder)
    spool.append(b"a", 1)
    with pytest.raises(ArgumentError, match="nothing was read up to there"):
        spool.acknowledge(Position(1, 40, 1, 1))
    spool.close()


def test_an_empty_spool_takes_almost_nothing(folder: Path) -> None:
    spool = make(folder, size=64 << 20)
    for _ in range(10):
        for _ in range(100):
            spool.append(bytes(60_000), 1)
        spool.acknowledge(entries(spool)[-1].end)
        assert du(folder) <= (1 << 20) + POSITIONS_SIZE
    spool.append(b"a", 1)
    spool.acknowledge(entries(spool)[-1].end)
    spool.close()
    assert [path.name for path in folder.iterdir()] == ["position"]
    spool = make(folder)
    assert (spool.count, spool.unread, spool.nbytes) == (0, False, POSITIONS_SIZE)
    spool.append(b"b", 1)
    kill(spool)
    spool = make(folder)
    assert payloads(spool) == [b"b"]
    spool.close()


def test_acknowledged_segments_are_deleted(folder: Path) -> None:
    spool = make(folder)
    for _ in range(100):
        spool.append(bytes(10_000), 1)
    before = len(files(folder))
    assert before > 10
    found = entries(spool)
    spool.acknowledge(found[49].end)
    assert len(files(folder)) <= before // 2 + 1
    assert spool.nbytes == du(folder)
    spool.close()


def test_a_file_is_not_made_for_each_batch(folder: Path) -> None:
    spool = make(folder, size=64 << 20)
    for n in range(10):
        spool.append(bytes(1000), 1)
        spool.acknowledge(entries(spool)[-1].end)
        assert [path.stat().st_size for path in files(folder)] == [(n + 1) * 1032]
    spool.close()


def test_what_an_earlier_life_had_no_time_to_delete(folder: Path) -> None:
    spool = make(folder)
    for _ in range(21):
        spool.append(bytes(10_000), 1)
    there = [path.name for path in files(folder)]
    shutil.copytree(folder, folder.with_name("copy"))
    spool.acknowledge(entries(spool)[11].end)  # ends the second segment
    kill(spool)
    for name in there[:2]:
        shutil.copy(folder.with_name("copy") / name, folder / name)
    spool = make(folder)
    assert (spool.recovered, [path.name for path in files(folder)]) == (9, there[2:])
    assert (len(entries(spool)), spool.nbytes) == (9, du(folder))
    spool.close()


def test_permission_bits(folder: Path) -> None:
    before = os.umask(0)
    try:
        spool = make(folder)
        spool.append(b"a", 1)
    finally:
        os.umask(before)
    spool.close()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert len(list(folder.iterdir())) == 2


def test_arguments(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="size=100 is impossible"):
        Spool(folder, size=100)
    for fsync in ("always", 0, -1, float("nan")):
        with pytest.raises(ArgumentError, match=r"fsync=.* is impossible"):
            Spool(folder, size=SIZE, fsync=fsync)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SinkError, match="file cannot be opened: File exists; give a folder"):
        make(tmp_path / "file")


def test_foreign_files_are_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    spool = make(folder)
    spool.append(b"a", 1)
    spool.acknowledge(entries(spool)[-1].end)
    spool.close()
    assert (folder / "notes.txt").read_text() == "mine"


def test_it_can_be_opened_again(folder: Path) -> None:
    spool = make(folder)
    spool.append(b"a", 1)
    spool.close()
    spool.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        spool.append(b"b", 1)
    spool.open()
    assert payloads(spool) == [b"a"]
    spool.close()


# --- two at once


def test_another_process_is_refused(folder: Path) -> None:
    spool = make(folder)
    code = (
        "import sys; from pathlib import Path; from ebpfstream.spool import Spool\n"
        "Spool(Path(sys.argv[1]), size=1 << 20).open()"
    )
    other = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert re.search(r"SinkError: the spool .* is in use by another process: give each a folder", done.stderr)
    spool.append(b"a", 1)
    assert payloads(spool) == [b"a"]
    spool.close()
    assert subprocess.run(other, cwd=ROOT, check=False).returncode == 0


def test_one_thread_appends_while_another_reads(folder: Path) -> None:
    spool = make(folder, size=4 << 20)
    number, got = 20_000, list[bytes]()
    wanted = [str(n).encode() * (n % 97) for n in range(number)]

    def read() -> None:
        while len(got) < number:
            if (entry := spool.read()) is not None:
                got.append(entry.payload)
                spool.acknowledge(entry.end)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=read)
        thread.start()
        for payload in wanted:
            assert spool.append(payload, 1) == 0
        thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert got == wanted
    assert spool.count == spool.damaged == 0
    spool.close()


def test_calls_wait_for_one_another(folder: Path) -> None:
    spool = make(folder, fsync=5.0)
    spool.append(b"a", 1)
    entry = spool.read()
    assert entry is not None
    calls = [
        lambda: spool.append(b"b", 1),
        spool.read,
        lambda: spool.acknowledge(entry.end),
        spool.sync,
        spool.close,
    ]
    for call in calls:
        thread = threading.Thread(target=call)
        with spool._lock:
            thread.start()
            thread.join(0.1)
            assert thread.is_alive()
        thread.join(60)


# --- killed

APPENDING = """
import sys
from pathlib import Path
from ebpfstream.spool import Spool
spool = Spool(Path(sys.argv[1]), size=1 << 30)
spool.open()
number = spool.recovered
while True:
    spool.append(f"{number} ".encode() * (number % 5000), 1)
    number += 1
    print(number, flush=True)
"""


def test_sigkill_loses_nothing_that_was_appended(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = 0
    for life in range(5):
        with subprocess.Popen(
            [sys.executable, "-c", APPENDING, folder], stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                told = int(line)
                if told >= 700 * (life + 1):
                    child.send_signal(signal.SIGKILL)
                    break
            told = int(([str(told), *child.stdout.read().split()])[-1])
        assert child.returncode == -signal.SIGKILL
        spool = make(folder, size=1 << 30)
        assert spool.recovered in (told, told + 1)  # it may have died before it could tell
        assert payloads(spool) == [f"{n} ".encode() * (n % 5000) for n in range(spool.recovered)]
        assert spool.damaged == 0
        kill(spool)


def test_a_torn_entry_is_cut_off(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = make(folder)
    spool.append(b"whole", 3)
    size = files(folder)[0].stat().st_size
    spool.append(bytes(1000), 5)
    kill(spool)
    for length in (size + 1000, size + HEADER, size + HEADER - 1, size + 1):
        os.truncate(files(folder)[0], length)
        caplog.clear()
        spool = make(folder)
        assert (spool.recovered, spool.damaged) == (3, 0)
        assert files(folder)[0].stat().st_size == size
        message = (
            f"{files(folder)[0]}: the last {length - size} bytes, from {size} on, are a torn entry: cut off"
        )
        assert caplog.messages == [message]
        spool.append(bytes(1000), 5)
        kill(spool)
    spool = make(folder)
    assert payloads(spool) == [b"whole", bytes(1000)]
    spool.close()


# --- damaged


def filled(folder: Path, number: int = 10, length: int = 100) -> tuple[Spool, list[int]]:
    """A spool of one segment, and where its entries begin."""
    spool = make(folder)
    starts = []
    for n in range(number):
        starts.append(spool._end[1])
        spool.append(bytes([n]) * length, n)
    return spool, starts


def test_damage_of_a_payload_loses_one_entry(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool, starts = filled(folder)
    kill(spool)
    flip(files(folder)[0], starts[3] + HEADER + 50)
    spool = make(folder)
    assert (spool.recovered, spool.damaged, caplog.messages) == (45, 0, [])
    found = entries(spool)
    assert [entry.count for entry in found] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (spool.count, spool.damaged) == (42, 3)
    assert caplog.messages == [
        f"{files(folder)[0]}: 136 bytes from {starts[3]} on are damaged: 3 events are lost"
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    spool.acknowledge(found[-1].end)
    assert spool.count == 0
    spool.close()


@pytest.mark.parametrize("place", [0, 8, 16, 20, 24, 28, 31])
def test_damage_of_a_header_loses_one_entry(
    folder: Path, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    spool, starts = filled(folder)
    kill(spool)
    for n in (0, 4, 5):
        flip(files(folder)[0], starts[n] + place)
    spool = make(folder)
    assert [entry.count for entry in entries(spool)] == [1, 2, 3, 6, 7, 8, 9]
    assert (spool.count, spool.damaged) == (36, 9)
    assert caplog.messages == [
        f"{files(folder)[0]}: 136 bytes from 0 on are damaged: 0 events are lost",
        f"{files(folder)[0]}: 272 bytes from {starts[4]} on are damaged: 9 events are lost",
    ]
    spool.close()


def test_damage_at_the_end(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool, starts = filled(folder)
    kill(spool)
    flip(files(folder)[0], starts[8])
    with files(folder)[0].open("r+b") as file:
        file.seek(starts[9])
        file.write(bytes(136))  # as a power cut may leave it
    spool = make(folder)
    assert (spool.recovered, spool.damaged) == (28, 1)
    what = f"the last 272 bytes, from {starts[8]} on, are damaged: an unknown number of events is lost"
    assert caplog.messages == [f"{files(folder)[0]}: {what}"]
    spool.append(b"next", 1)
    assert [entry.count for entry in entries(spool)] == [0, 1, 2, 3, 4, 5, 6, 7, 1]
    spool.close()


def test_damage_to_the_end_of_two_segments(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = make(folder)
    for n in range(8):
        spool.append(bytes([n]) * 10_000, n)
    kill(spool)
    first, last = files(folder)
    os.truncate(first, 2 * 10_032 + 40)
    flip(last, 3)
    flip(last, 10_032 + 3)
    spool = make(folder)
    assert (spool.recovered, spool.damaged) == (1, 1)
    assert caplog.messages == [
        f"{last}: the last 20064 bytes, from 0 on, are damaged: an unknown number of events is lost",
        f"{first}: the last 40 bytes, from 20064 on, are a torn entry: cut off",
    ]
    assert files(folder) == [first]
    spool.append(b"next", 1)
    assert [entry.count for entry in entries(spool)] == [0, 1, 1]
    spool.close()


def test_damage_of_what_is_acknowledged_is_nobodys_loss(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool, starts = filled(folder)
    spool.acknowledge(entries(spool)[-1].end)
    kill(spool)
    for start in starts:
        flip(files(folder)[0], start)
    spool = make(folder)
    kill(spool)
    os.truncate(files(folder)[0], starts[5] + 3)
    spool = make(folder)
    assert (spool.recovered, spool.damaged, caplog.messages) == (0, 0, [])
    spool.append(b"next", 1)
    assert payloads(spool) == [b"next"]
    kill(spool)
    slots = (folder / "position").read_bytes()
    flip(folder / "position", 20 if slots[8:16] > slots[4104:4112] else 4116)  # the newer one
    spool = make(folder)
    assert payloads(spool) == [b"next"]  # no slot is ahead of it
    spool.close()


def test_damage_while_it_is_open(folder: Path) -> None:
    spool, starts = filled(folder)
    flip(files(folder)[0], starts[9])
    os.truncate(files(folder)[0], starts[9] + 50)
    spool.append(b"next", 1)
    assert [entry.count for entry in entries(spool)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert spool.damaged == 9
    spool.close()


def test_a_segment_that_is_gone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = make(folder, size=4 << 20)
    for n in range(100):
        spool.append(n.to_bytes(2, "little") * 15_000, 1)  # eight in a segment
    kill(spool)
    there = files(folder)
    for index in (0, 3, 4):
        there[index].unlink()
    spool = make(folder)
    assert (spool.recovered, spool.damaged) == (76, 24)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.messages == [
        f"{folder}: what was before {there[1].name} is missing: 8 events are lost",
        f"{folder}: what was before {there[5].name} is missing: 16 events are lost",
    ]
    there_still = [*range(8, 24), *range(40, 100)]
    assert payloads(spool) == [n.to_bytes(2, "little") * 15_000 for n in there_still]
    assert spool.count == 76
    kill(spool)
    spool = make(folder)  # and one deleted while it is open
    files(folder)[-2].unlink()
    assert len(entries(spool)) == 68
    assert (spool.count, spool.damaged) == (68, 24)  # the first gap was told before
    spool.close()


def test_a_segment_that_was_cut_short(folder: Path) -> None:
    spool = make(folder, size=2 << 20)
    for n in range(100):
        spool.append(n.to_bytes(2, "little") * 5_000, 1)
    entry = spool.read()
    assert entry is not None
    spool.acknowledge(entry.end)
    kill(spool)
    for index, left in ((0, 0), (2, 10_032), (4, 12_345), (6, 0)):
        os.truncate(files(folder)[index], left)
    spool = make(folder)
    assert (spool.recovered, spool.damaged) == (99, 0)
    found = entries(spool)
    per = 131_072 // 10_032
    gone = {*range(per), *range(2 * per + 1, 3 * per), *range(4 * per + 1, 5 * per), *range(6 * per, 7 * per)}
    assert [int.from_bytes(e.payload[:2], "little") for e in found] == [
        n for n in range(100) if n not in gone
    ]
    assert (spool.count, spool.damaged) == (100 - len(gone), len(gone) - 1)
    spool.acknowledge(found[-1].end)
    assert spool.count == 0
    spool.close()


def test_what_the_disk_cannot_read_is_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, starts = filled(folder)
    read = segments.SegmentReader._bytes

    class File:
        def __init__(self, reader: segments.SegmentReader) -> None:
            self.real, self.at = reader._file, 0

        def seek(self, offset: int) -> None:
            self.at = offset

        def read(self, length: int) -> bytes:
            if self.at == starts[5] + HEADER:
                raise OSError(errno.EIO, "Input/output error")
            self.real.seek(self.at)
            return self.real.read(length)

        def close(self) -> None:
            self.real.close()

    def _bytes(self: segments.SegmentReader, offset: int, length: int) -> bytes:
        if not isinstance(self._file, File):
            self._file = File(self)  # type: ignore[assignment]
        return read(self, offset, length)

    monkeypatch.setattr(segments.SegmentReader, "_bytes", _bytes)
    assert [entry.count for entry in entries(spool)] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert spool.damaged == 5
    spool.close()


def test_no_payload_passes_for_an_entry(folder: Path) -> None:
    """Not even one that is a copy of the file that it is in."""
    spool = make(folder)
    spool.append(b"evil" * 20, 1)
    copy = files(folder)[0].read_bytes()
    start = spool._end[1]
    spool.append(copy * 10, 2)
    spool.append(b"good", 3)
    kill(spool)
    flip(files(folder)[0], start)
    spool = make(folder)
    assert payloads(spool) == [b"evil" * 20, b"good"]
    assert spool.damaged == 2
    spool.close()


def test_a_torn_position_is_the_one_before(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool, _ = filled(folder)
    found = entries(spool)
    spool.acknowledge(found[4].end)
    spool.acknowledge(found[5].end)
    newest = spool._positions._sequence % 2 * 4096  # type: ignore[union-attr]
    kill(spool)
    flip(folder / "position", newest + 20)
    spool = make(folder)
    message = f"{folder}/position is damaged: what was delivered before may be delivered again"
    assert caplog.messages == [message]
    assert [entry.count for entry in entries(spool)] == [5, 6, 7, 8, 9]
    assert (spool.recovered, spool.damaged) == (35, 0)
    kill(spool)
    caplog.clear()
    spool = make(folder)
    assert (spool.recovered, caplog.messages) == (35, [])
    spool.close()


@pytest.mark.parametrize("how", ["zeros", "missing", "empty"])
def test_a_lost_position_gives_everything_again(
    folder: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    spool, _ = filled(folder)
    spool.acknowledge(entries(spool)[4].end)
    kill(spool)
    position = folder / "position"
    if how == "missing":
        position.unlink()
    else:
        position.write_bytes(bytes(8192 if how == "zeros" else 0))
    spool = make(folder)
    what = "damaged" if how == "zeros" else "missing"
    message = f"{folder}/position is {what}: what was delivered before may be delivered again"
    assert caplog.messages == [message]
    assert (spool.recovered, spool.damaged, len(entries(spool))) == (45, 0, 10)
    spool.close()


def test_a_position_ahead_of_what_is_there(folder: Path) -> None:
    spool, starts = filled(folder)
    spool.acknowledge(entries(spool)[8].end)
    kill(spool)
    os.truncate(files(folder)[0], starts[5])
    spool = make(folder)
    assert (spool.recovered, spool.count, spool.unread) == (0, 0, False)
    spool.append(b"next", 1)
    assert payloads(spool) == [b"next"]
    kill(spool)
    for path in files(folder):
        path.unlink()
    spool = make(folder)
    spool.append(b"later", 1)
    kill(spool)
    spool = make(folder)
    assert payloads(spool) == [b"later"]
    spool.close()


# --- full


def test_the_bound_is_kept_and_the_oldest_go(folder: Path) -> None:
    spool = make(folder)
    number, dropped, chance = 3000, 0, random.Random(1)
    wanted = [n.to_bytes(2, "little") * chance.randrange(1000) for n in range(number)]
    for payload in wanted:
        dropped += spool.append(payload, 1)
        assert du(folder) <= SIZE
        assert spool.nbytes <= SIZE
        assert spool.count + dropped == wanted.index(payload) + 1 or not payload
    assert spool.nbytes > SIZE * 7 // 8
    assert spool.count == number - dropped
    assert payloads(spool) == wanted[dropped:]
    kill(spool)
    spool = make(folder)
    assert (spool.recovered, spool.damaged) == (number - dropped, 0)
    assert payloads(spool) == wanted[dropped:]
    spool.close()


def test_what_is_being_delivered_is_not_dropped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = make(folder)
    first = bytes(20_000)
    for _ in range(10):
        spool.append(first, 1)
    held = [spool.read() for _ in range(5)]
    dropped = sum(spool.append(n.to_bytes(4, "little") * 5000, 1) for n in range(200))
    assert spool.count == 210 - dropped
    rest = entries(spool)
    assert len(rest) == 205 - dropped
    last = [int.from_bytes(entry.payload[:4], "little") for entry in rest if entry.payload != first]
    assert last == list(range(200 - len(last), 200))
    with pytest.raises(SinkUnavailableError, match=r"is full .* of what is being delivered: try again, or"):
        for _ in range(10):
            assert spool.append(first, 1) == 0
    before = spool.count
    assert spool.append(b"", 0) == 0  # fits nevertheless
    kill(spool)
    spool = make(folder)  # the hole is known
    assert (spool.recovered, spool.damaged, caplog.messages) == (before, 0, [])
    found = entries(spool)
    assert [entry.payload for entry in found[:5]] == [entry.payload for entry in held if entry]
    spool.acknowledge(found[-1].end)
    assert (spool.count, spool.append(first, 1), len(files(folder))) == (0, 0, 1)
    spool.close()


def test_what_can_never_fit(folder: Path) -> None:
    spool = make(folder)
    with pytest.raises(SinkRejectedError, match=r"can never fit into the spool .*: make it larger"):
        spool.append(bytes(SIZE), 1)
    for n in range(4):
        spool.append(b"%d" % n * 20_000, 1)
    largest = SIZE - POSITIONS_SIZE - HEADER
    assert spool.append(bytes(largest), 7) == 4
    assert spool.nbytes == du(folder) == SIZE
    assert payloads(spool) == [bytes(largest)]
    with pytest.raises(SinkRejectedError):
        spool.append(bytes(largest + 1), 1)
    assert spool.count == 7
    spool.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of sixteen pages."""
    with small_disk(tmp_path / "disk", "64k") as folder:
        yield folder


def test_a_full_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = make(disk / "spool")
    number = 0
    with pytest.raises(OSError, match="No space left on device") as raised:
        while number < 100:
            spool.append(bytes([number]) * 5000, 1)
            number += 1
    assert (raised.value.errno, number) == (errno.ENOSPC, 11)
    assert spool.count == number
    assert spool.append(b"small", 1) == 0
    with pytest.raises(OSError, match="No space left on device"):
        spool.append(bytes(5000), 1)
    found = entries(spool)
    assert [entry.payload for entry in found] == [*(bytes([n]) * 5000 for n in range(number)), b"small"]
    spool.acknowledge(found[3].end)  # works on a full disk
    kill(spool)
    assert caplog.messages == []
    spool = make(disk / "spool")
    assert (spool.recovered, spool.damaged, caplog.messages) == (number - 3, 0, [])
    spool.acknowledge(entries(spool)[-1].end)
    spool.close()
    spool = make(disk / "spool")
    for n in range(11):
        spool.append(bytes([n]) * 5000, 1)
    assert payloads(spool) == [bytes([n]) * 5000 for n in range(11)]
    spool.close()


def test_a_disk_too_full_to_begin(disk: Path) -> None:
    (disk / "other").write_bytes(bytes(60_000))
    with pytest.raises(SinkError, match="No space left on device; give a folder on a disk with room"):
        make(disk / "spool")
    (disk / "other").unlink()
    make(disk / "spool").close()


def test_what_was_dropped_for_an_append_that_failed_is_told_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make(folder)
    while spool.nbytes < SIZE - 10_000:
        spool.append(bytes(9000), 1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    count = spool.count
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="No space left"):
            spool.append(bytes(100_000), 1)
    dropped = spool.append(b"a", 1)
    assert dropped > 0
    assert spool.count == count - dropped + 1
    spool.close()


def test_a_write_that_is_short_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda file, parts, at: os.pwrite(file, b"".join(parts)[:40], at))
    spool = make(folder)
    spool.append(b"1234567890", 1)
    spool.append(b"1234567890" * 100, 1)
    assert payloads(spool) == [b"1234567890", b"1234567890" * 100]
    spool.close()


# --- to the disk


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def note(name: str) -> None:
        real = getattr(os, name)

        def call(file: int) -> None:
            path = os.readlink(f"/proc/self/fd/{file}")
            calls.append(path.rpartition(".")[2] if "." in Path(path).name else Path(path).name)
            real(file)

        monkeypatch.setattr(os, name, call)

    note("fdatasync")
    note("fsync")
    return calls


def test_never_syncs_never(folder: Path, synced: list[str]) -> None:
    spool = make(folder)
    for _ in range(100):
        spool.append(bytes(10_000), 1)
    spool.sync()
    spool.acknowledge(entries(spool)[-1].end)
    spool.close()
    assert synced == []


def test_batch_syncs_each_one(folder: Path, synced: list[str]) -> None:
    spool = make(folder, fsync="batch")
    for _ in range(5):
        spool.append(bytes(10_000), 1)
    assert synced == ["spool", *["segment"] * 5]
    del synced[:]
    spool.append(bytes(60_000), 1)
    assert synced == ["spool", "segment"]
    del synced[:]
    spool.sync()
    found = entries(spool)
    spool.acknowledge(found[0].end)
    assert synced == []
    spool.acknowledge(found[-1].end)
    assert synced == ["position"]  # before the first segment is deleted
    spool.close()


def test_seconds_sync_when_told(folder: Path, synced: list[str]) -> None:
    spool = make(folder, fsync=5.0)
    for _ in range(6):
        spool.append(bytes(10_000), 1)
    assert synced == []
    spool.sync()
    spool.sync()
    assert synced == ["spool", "segment"]
    del synced[:]
    spool.append(b"a", 1)
    spool.append(bytes(60_000), 1)
    assert synced == ["segment"]  # the one that is full
    spool.append(b"a", 1)
    spool.close()
    assert synced == ["segment", "spool", "segment"]


def test_a_sync_that_fails_takes_the_entry_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = make(folder, fsync="batch")
    spool.append(b"a", 1)

    def fail(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            spool.append(b"b", 1)
    assert spool.count == 1
    spool.append(b"c", 1)
    assert payloads(spool) == [b"a", b"c"]
    kill(spool)
    spool = make(folder)
    assert payloads(spool) == [b"a", b"c"]
    spool.close()


# --- anything, in any order


@dataclass
class Item:
    payload: bytes
    count: int
    path: Path
    start: int
    end: int
    written: bytes
    bad_header: bool = False
    bad_payload: bool = False

    @property
    def payload_end(self) -> int:
        return self.start + HEADER + len(self.payload)


@dataclass
class Model:
    """What must be in the spool, by a list of what went in."""

    folder: Path
    spool: Spool
    unacknowledged: list[Item] = field(default_factory=list)
    cursor: int = 0
    """How many of these this life has gone past."""
    held: list[tuple[int, Entry]] = field(default_factory=list)
    """Entries that this life has read and not acknowledged; and the cursor after each."""
    damaged: int = 0

    def append(self, payload: bytes, count: int) -> None:
        try:
            dropped = self.spool.append(payload, count)
        except SinkUnavailableError:
            # All of it is in segments of which something is being delivered, but for the last one.
            last = self.held[-1][0] if self.held else 0
            assert self.held
            free = {item.path for item in self.unacknowledged[last:]}
            assert len(free - {item.path for item in self.unacknowledged[:last]}) <= 1
            return
        self._drop(dropped)
        end = self.spool._end[1]
        path = files(self.folder)[-1]
        start = end - ((HEADER + len(payload) + 7) & ~7)
        written = path.read_bytes()[start : start + HEADER + len(payload)]
        self.unacknowledged.append(Item(payload, count, path, start, end, written))

    def _drop(self, dropped: int) -> None:
        """Whole segments, the oldest of which nothing is held."""
        there = set(files(self.folder))
        gone = [index for index, item in enumerate(self.unacknowledged) if item.path not in there]
        last = self.held[-1][0] if self.held else 0
        assert all(index >= last for index in gone)
        assert dropped == sum(self.unacknowledged[index].count for index in gone if index >= self.cursor)
        for index in reversed(gone):
            del self.unacknowledged[index]
            if index < self.cursor:
                self.cursor -= 1

    def read(self) -> None:
        entry = self.spool.read()
        while self.cursor < len(self.unacknowledged):
            item = self.unacknowledged[self.cursor]
            self.cursor += 1
            if item.bad_header or item.bad_payload:
                self.damaged += item.count
                continue
            assert entry is not None
            assert (entry.payload, entry.count) == (item.payload, item.count)
            self.held.append((self.cursor, entry))
            break
        else:
            assert entry is None
        assert self.spool.damaged == self.damaged

    def acknowledge(self, number: int) -> None:
        if not self.held:
            return
        index = number % len(self.held)
        cursor, entry = self.held[index]
        self.spool.acknowledge(entry.end)
        del self.held[: index + 1]
        if not self.held:
            cursor = self.cursor  # and what is damaged behind it
        del self.unacknowledged[:cursor]
        self.cursor -= cursor
        self.held = [(at - cursor, entry) for at, entry in self.held]

    def leave(self, *, kill_it: bool) -> None:
        if kill_it:
            kill(self.spool)
            # Damage behind the last acknowledged entry was passed, but that is not on disk.
        else:
            self.spool.close()
            if not self.held:
                del self.unacknowledged[: self.cursor]
        self.cursor, self.held = 0, []

    def reopen(self) -> None:
        self.damaged = self._cut_end()
        self.spool = make(self.folder, size=self.spool.size)
        assert self.spool.damaged == self.damaged
        assert self.spool.recovered == sum(item.count for item in self.unacknowledged)

    def damage(self, where: int, how: str, length: int) -> None:
        there = files(self.folder)
        if not there:
            return
        path = there[where % len(there)]
        size = path.stat().st_size
        if not size:
            return
        at = where // len(there) % size
        if how == "header" and self.unacknowledged:
            item = self.unacknowledged[where % len(self.unacknowledged)]
            path = item.path
            flip(path, item.start + length % HEADER)
        elif how == "flip":
            flip(path, at)
        else:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes(min(length, size - at)))
        data = path.read_bytes()
        for item in self.unacknowledged:
            if item.path == path:
                item.bad_header = not data.startswith(item.written[:HEADER], item.start)
                item.bad_payload = not data.startswith(item.written[HEADER:], item.start + HEADER)

    def cut(self, at: int) -> None:
        """The last segment loses its end."""
        there = files(self.folder)
        if there and (size := there[-1].stat().st_size):
            os.truncate(there[-1], size - at % min(size, 400))

    def _cut_end(self) -> int:
        """How many events must be told as lost at the end."""
        damaged = 0
        for path in reversed(files(self.folder)):
            last = [item for item in self.unacknowledged if item.path == path]
            size = path.stat().st_size
            whole = [item for item in last if not item.bad_header and item.payload_end <= size]
            end = whole[-1].end if whole else last[0].start if last else 0
            rest = [item for item in last if item.start >= end]
            for item in rest:
                self.unacknowledged.remove(item)
            if rest and size - end >= HEADER and rest[0].bad_header:
                damaged += 1
            if whole or (last and last[0].start) or (not last and size):
                break  # there are entries in it, perhaps acknowledged ones
        return damaged


STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 40_000) | st.integers(0, 300), st.integers(0, 5)),
    st.tuples(st.just("append"), st.integers(0, 3000), st.integers(1, 5)),
    st.tuples(st.just("read"), st.integers(1, 20), st.just(0)),
    st.tuples(st.just("acknowledge"), st.integers(0, 20), st.just(0)),
    st.tuples(st.sampled_from(["reopen", "kill"]), st.just(0), st.just(0)),
    st.tuples(st.sampled_from(["flip", "header", "zeros"]), st.integers(0, 1 << 20), st.integers(1, 300)),
    st.tuples(st.just("cut"), st.integers(0, 400), st.just(0)),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(STEPS, max_size=60), st.randoms(use_true_random=False))
def test_any_life(steps: list[tuple[str, int, int]], chance: random.Random) -> None:
    release()
    with TemporaryDirectory() as name:
        folder = Path(name) / "spool"
        model = Model(folder, make(folder, size=64 << 10))
        for step, one, two in steps:
            match step:
                case "append":
                    model.append(chance.randbytes(one), two)
                case "read":
                    for _ in range(one):
                        model.read()
                case "acknowledge":
                    model.acknowledge(one)
                case "reopen":
                    model.leave(kill_it=False)
                    model.reopen()
                case _:
                    model.leave(kill_it=True)
                    if step == "cut":
                        model.cut(one)
                    elif step != "kill":
                        model.damage(one, step, two)
                    model.reopen()
            assert model.spool.count == sum(
                item.count
                for index, item in enumerate(model.unacknowledged)
                if index >= model.cursor or not (item.bad_header or item.bad_payload)
            )
            assert model.spool.nbytes == sum(
                -(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir()
            )
            assert model.spool.nbytes <= 64 << 10
        while model.spool.unread:
            model.read()
        assert model.cursor == len(model.unacknowledged)
        model.acknowledge(-1)
        assert model.spool.count == 0
        model.spool.close()
        if not model.unacknowledged:
            assert files(folder) == []
        shutil.rmtree(folder)
