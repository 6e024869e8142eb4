"""Live views: what they say, to the letter; and how they treat the terminal, on every event loop."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import pty
import pwd
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

import ebpfstream.cli.terminal
from ebpfstream.batch import EventBatch
from ebpfstream.cli import pieces
from ebpfstream.cli.dashboard import Top
from ebpfstream.cli.live import Counts, Screen, Users
from ebpfstream.cli.tally import Row, Tally
from ebpfstream.cli.terminal import Terminal
from ebpfstream.cli.top import top
from ebpfstream.errors import ArgumentError
from ebpfstream.events import U32, Comm, Event
from ebpfstream.forwarding import Forwarding
from ebpfstream.records import Records
from ebpfstream.statistics import ForwardStatistics, SinkStatistics, Statistics
from ebpfstream.testing import make_batch
from ebpfstream.tracers.count_execve import ExecCount
from tests.test_stream import Hand, hand, numbers

pytestmark = pytest.mark.anyio
__all__ = ["hand"]

SGR = re.compile(r"\x1b\[[0-9;]*m")
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
COLOURS = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|9[0-7])(?:;\d+)*m")
RED = re.compile(r"\x1b\[(?:\d+;)*31m([^\x1b]*)")


@dataclass
class Exec(Event):
    uid: U32
    comm: Comm


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: type("Name", (), {"nodename": "host"}))
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)


def lines(screen: Screen, width: int, height: int) -> list[str]:
    picture = screen.picture(width, height)
    assert picture.startswith("\x1b[H")
    made = SGR.sub("", picture[3:]).split("\n\r")
    assert len(made) == height
    assert {cell_len(line) for line in made} == {width}
    return [line.rstrip() for line in made]


def text(screen: Screen, width: int, height: int) -> str:
    return "\n".join(lines(screen, width, height)).rstrip()


def known(*names: str) -> Users:
    users = Users()
    users._names = dict(enumerate(names))
    return users


def sent(screen: Screen, *events: Event) -> None:
    anyio.run(screen.send, make_batch(events))


def filled(*execs: tuple[str, int, int]) -> Top:
    screen = Top()
    screen.users = known("root", "daemon", "alice")
    sent(screen, *(Exec(uid, comm) for comm, uid, times in execs for _ in range(times)))
    return screen


# --- what is said


def test_numbers() -> None:
    assert [pieces.count(number, 7) for number in (0, 999_999, 1_000_000, 10**9, 10**13)] == [
        "0",
        "999,999",
        "1,000k",
        "1,000M",
        "10,000G",
    ]
    assert [pieces.rate(number) for number in (0, 0.01, 0.5, 9.94, 9.96, 12.6, 12345.6)] == [
        "0",
        "<0.1",
        "0.5",
        "9.9",
        "10",
        "13",
        "12,346",
    ]
    assert [pieces.size(number) for number in (0, 1023, 1024, 1536, 4 << 20, 10 << 30, 1 << 50)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "4 MiB",
        "10 GiB",
        "1024 TiB",
    ]
    assert [pieces.percent(part) for part in (0, 0.0001, 0.004, 0.12, 1)] == [
        "0%",
        "<.1%",
        "0.4%",
        "12%",
        "100%",
    ]
    assert [
        pieces.age(seconds) for seconds in (0, 0.04, 5, 42.4, 83, 35999.9, 14 * 3600, 7 * 86400 + 3601)
    ] == [
        "0",
        "<0.1 s",
        "5.0 s",
        "42 s",
        "0:01:23",
        "9:59:59",
        "14 h",
        "7 d",
    ]


@settings(deadline=None)
@given(st.integers(0, 2**64), st.integers(5, 12))
def test_a_number_never_takes_more_room_than_it_has(number: int, width: int) -> None:
    assert len(pieces.count(number, width)) <= width
    assert len(pieces.rate(float(number), width)) <= width


def test_bars() -> None:
    assert [pieces.bar(part, 4) for part in (0, 0.001, 0.5, 0.8, 1, 7)] == [
        "    ",
        "▏   ",
        "██  ",
        "███▎",
        "████",
        "████",
    ]
    assert [pieces.bar(part, 4, ascii_only=True) for part in (0, 0.001, 0.5, 1)] == [
        "    ",
        "#   ",
        "##  ",
        "####",
    ]


TOP_80 = """\
ebpfstream top   host   0:00:04                       q quit   p pause   t order
execs    20/s now   15/s mean   20/s most   60 in all   3 left out by --where
lost     7, 3.5/s now   5 buffer full   2 too large
buffer   [████            ] 1 MiB of 4 MiB   2.5 MiB most   own CPU 12%

COMMAND          EXECS/S      TOTAL SHARE         USER        EXECS/S      TOTAL
sh                    15         45  75% ████▌    root             18         50
make                 5.0         10  25% █▌       alice           2.5          5
cc                     0          5   0%          1000              0          5

SINK                           QUEUE     LAG   ARRIVED DROPPED  FAILED   SPOOLED
file:x.jsonl                     0 B       0 1,234,567       0       0         0
kafka://10.0.0.1:… ████      4.0 MiB    12 s        50       9       0 1,000,000
  unavailable 3 times, last: Kafka at 10.0.0.1:9092 cannot be reached: look whe…"""

TOP_200 = (
    "COMMAND                         EXECS/S      TOTAL SHARE                                      "
    "USER                          EXECS/S      TOTAL SHARE\n"
    "sh                                   15         45  75% ██████████████████████████▎           "
    "root                               18         50  88% ██████████████████████████████▋\n"
    "make                                5.0         10  25% ████████▊                             "
    "alice                             2.5          5  12% ████▍\n"
    "cc                                    0          5   0%                                       "
    "1000                                0          5   0%"
)


def told() -> Top:
    """Two intervals of two seconds."""
    screen = filled(("sh", 0, 15), ("cc", 1000, 5))
    screen._state = ""
    screen.note(ForwardStatistics(Statistics()), 2.0)
    sent(screen, *[Exec(0, "sh")] * 30, *[Exec(0, "make")] * 5, *[Exec(2, "make")] * 5)
    stream = Statistics(
        tried=67,
        submitted=60,
        lost=7,
        lost_full=5,
        lost_too_large=2,
        buffer_size=4 << 20,
        buffered=1 << 20,
        buffered_most=5 << 19,
    )
    sinks = (
        SinkStatistics("file:x.jsonl", acknowledged=1_234_567, queue_size=8 << 20),
        SinkStatistics(
            "kafka://10.0.0.1:9092/exec",
            acknowledged=50,
            dropped=9,
            spooled=1_000_000,
            retries=3,
            queue_size=8 << 20,
            queued=(4 << 20) + 1000,
            lag=12.0,
            away=True,
            last_error="Kafka at 10.0.0.1:9092 cannot be reached: look whether it runs",
        ),
    )
    screen.note(ForwardStatistics(stream, sinks, filtered=3), 2.0, cpu=0.24)
    return screen


def test_top_in_80_columns() -> None:
    assert text(told(), 80, 24) == TOP_80


def test_top_in_200_columns() -> None:
    shown = lines(told(), 200, 24)
    assert "\n".join(shown[5:9]) == TOP_200


LITTLE = """\
ebpfstream top   host   0:00:04   q quit   p pause   t order
execs    20/s now   15/s mean   20/s most   60 in all
lost     7, 3.5/s now   5 buffer full   2 too large
buffer   [████            ] 1 MiB of 4 MiB   2.5 MiB most

COMMAND          EXECS/S      TOTAL SHARE
sh                    15         45  75% ██████████████▎
2 others             5.0         15  25% ████▊"""


def test_where_there_is_little_room() -> None:
    """Sinks go first, then users, then rows; nothing wraps, and what does not fit is left out whole."""
    screen = told()
    assert text(screen, 60, 8) == LITTLE
    assert lines(screen, 80, 11)[8:] == [TOP_80.splitlines()[8], "", ""]
    assert lines(screen, 80, 12)[9:] == ["", *TOP_80.splitlines()[10:12]]
    assert lines(screen, 30, 5)[1:4] == [
        "execs    20/s now   15/s mean",
        "lost     7, 3.5/s now",
        "buffer   [████            ] 1…",
    ]


def test_red_is_for_what_is_lost() -> None:
    screen = told()
    reds = {part.strip() for part in RED.findall(screen.picture(80, 24))}
    assert reds == {
        "7",
        ", 3.5/s now",
        "5 buffer full",
        "2 too large",
        "9",
        "unavailable 3 times, last: Kafka at 10.0.0.1:9092 cannot be reached: look whe…",
    }
    screen = filled(("sh", 0, 15))
    screen.note(ForwardStatistics(Statistics(), (SinkStatistics("file:x"),)), 1.0)
    assert not RED.search(screen.picture(80, 24))
    assert COLOURS.search(screen.picture(80, 24))


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOURS.search((told()).picture(80, 24))


def test_what_cannot_be_known_is_not_0() -> None:
    screen = Top()
    screen.note(ForwardStatistics(Statistics(lost=None, misses=None)), 1.0)
    assert lines(screen, 80, 24)[2] == "lost     unknown"


def test_names_cannot_act_on_the_terminal() -> None:
    names = ("\x1b[2J", "[red]x", "a\nb", "\x9b1m", "\u202egnp", "日本語日本")
    screen = filled(*((name, 0, 9 - index) for index, name in enumerate(names)))
    screen.note(ForwardStatistics(Statistics()), 1.0)
    shown = [line.split("  ")[0] for line in lines(screen, 80, 24)[6:12]]
    assert shown == ["\\u001b[2J", "[red]x", "a\\u000ab", "\\u009b1m", "\\u202egnp", "日本語日本"]
    assert set(re.findall(r"[^ -~\n\r█▏▎▍▌▋▊▉…日本語]", SGR.sub("", screen.picture(80, 24)[3:]))) == set()


COUNTS_80 = """\
ebpfstream count   host   0:00:04   paused            q quit   p pause   t order
lost     2   1 buffer full   1 missed by the kernel

USER              LAST 2 s   EXECS/S         TOTAL        UID SHARE
root                    30        15            45          0  75% █████████▊
alice                   10       5.0            10          2  25% ███▎
1000                     0         0             5       1000   0%
3 users                 40        20            60"""


def test_counts() -> None:
    screen = Counts()
    screen.users = known("root", "daemon", "alice")
    now = time.monotonic_ns()
    sent(screen, ExecCount.of(0, 15, 15, now - 1), ExecCount.of(1000, 5, 5, now - 1))
    sent(screen, ExecCount.of(0, 30, 45, now), ExecCount.of(2, 10, 10, now))
    screen._state = "paused"
    screen.note(ForwardStatistics(Statistics(lost=1, lost_full=1, misses=1)), 4.0)
    assert text(screen, 80, 24) == COUNTS_80
    screen.by_total = True
    assert [line.split()[0] for line in lines(screen, 80, 24)[4:7]] == ["root", "alice", "1000"]
    # There is room for one and all; others are told together.
    assert lines(screen, 80, 7)[4:] == [
        "root                    30        15            45          0  75% █████████▊",
        "2 others                10       5.0            15             25% ███▎",
        "3 users                 40        20            60",
    ]


def test_an_interval_in_which_nothing_came() -> None:
    screen = Counts(every=0.1)
    sent(screen, ExecCount.of(0, 15, 15, time.monotonic_ns() - 10**9))
    screen.note(ForwardStatistics(Statistics()), 0.1)
    assert lines(screen, 80, 24)[4].split()[1:4] == ["0", "0", "15"]


@pytest.mark.parametrize("every", [0.0, -1.0, math.nan, math.inf, 0.01])
def test_intervals_that_cannot_be(every: float) -> None:
    with pytest.raises(ArgumentError, match=r"give seconds, 0\.1 or more"):
        Top(every=every)


COUNTS = st.integers(0, 2**63)
LEDGERS = st.builds(
    ForwardStatistics,
    st.builds(
        Statistics,
        lost=st.none() | COUNTS,
        lost_full=COUNTS,
        lost_too_large=COUNTS,
        lost_otherwise=COUNTS,
        lost_errno=st.integers(0, 140),
        skipped=COUNTS,
        misses=st.none() | COUNTS,
        buffered=COUNTS,
        buffered_most=COUNTS,
        buffer_size=COUNTS,
        undecodable=COUNTS,
    ),
    st.lists(
        st.builds(
            SinkStatistics,
            name=st.text(max_size=40),
            acknowledged=COUNTS,
            dropped=COUNTS,
            failed=COUNTS,
            spooled=COUNTS,
            retries=COUNTS,
            queued=COUNTS,
            queue_size=COUNTS,
            lag=st.floats(0, 1e9),
            away=st.booleans(),
            last_error=st.text(max_size=200),
        ),
        max_size=4,
    ).map(tuple),
    COUNTS,
)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=20), COUNTS, max_size=40),
    st.dictionaries(st.integers(0, 2**32 - 1), COUNTS, max_size=40),
    LEDGERS,
    st.integers(1, 250),
    st.integers(1, 60),
    st.booleans(),
    st.floats(0.1, 1e6),
)
def test_every_picture_has_its_size_and_nothing_that_acts_on_the_terminal(
    commands: dict[str, int],
    users: dict[int, int],
    ledgers: ForwardStatistics,
    width: int,
    height: int,
    by_total: bool,
    seconds: float,
) -> None:
    dashboard, counts = Top(), Counts()
    dashboard._commands.add(commands)
    dashboard._users.add(users)
    counts._tally.add(users)
    counts._tally.tick()
    for screen in (dashboard, counts):
        screen.by_total = by_total
        screen.note(ledgers, seconds, seconds / 3)
        assert all(line.isprintable() for line in lines(screen, width, height))


# --- tallies


def test_the_busiest_come_first_and_others_last() -> None:
    tally = Tally[str]()
    tally.add({"a": 1, "b": 5, "c": 3, "d": 3})
    tally.tick()
    tally.add({"a": 2})
    assert tally.rows(9) == [Row("b", 5, 5), Row("c", 3, 3), Row("d", 3, 3), Row("a", 1, 1)]  # not yet over
    tally.tick()
    assert tally.rows(9) == [Row("a", 2, 3), Row("b", 0, 5), Row("c", 0, 3), Row("d", 0, 3)]
    assert tally.rows(2, by_total=True) == [Row("b", 0, 5), Row(None, 2, 9)]
    assert tally.rest(tally.rows(2)) == "3 others"
    assert tally.rows(1) == [Row(None, 2, 14)]
    assert tally.rows(0) == tally.rows(-3) == []


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.integers(0, 50), st.integers(1, 9), max_size=30), max_size=12),
    st.integers(2, 20),
    st.integers(1, 60),
)
def test_a_tally_is_bounded_and_its_sums_are_exact(
    intervals: list[dict[int, int]], most: int, room: int
) -> None:
    tally = Tally[int](most)
    for counts in intervals:
        for key, count in counts.items():
            tally.add({key: count})
        tally.tick()
    rows = tally.rows(room)
    assert len(tally) <= most
    assert len(rows) <= room
    assert sum(row.total for row in rows) == sum(sum(counts.values()) for counts in intervals)
    assert sum(row.last for row in rows) == sum((intervals or [{}])[-1].values())


def test_rare_names_cannot_hide_a_busy_one() -> None:
    tally = Tally[str](100)
    tally.add({f"rare {number}": 1 for number in range(1000)})
    tally.add({"busy": 50})
    tally.add({f"rare {number}": 1 for number in range(1000)})
    tally.tick()
    assert tally.rows(2) == [Row("busy", 50, 50), Row(None, 2000, 2000)]
    assert tally.rest(tally.rows(2)) == "others"


# --- its life


class Numbers(Screen):
    """Shows what it was sent, and the picture's size."""

    title = "numbers"

    def __init__(self, every: float = 0.1) -> None:
        super().__init__(every=every)
        self.events = self.at_tick = 0
        self.filler = ""

    async def send(self, batch: EventBatch[Any]) -> None:
        self.events += len(list(batch))

    def tick(self, statistics: ForwardStatistics, seconds: float, cpu: float) -> None:
        self.at_tick = self.events

    def body(self, statistics: ForwardStatistics, width: int, height: int) -> list[Text]:
        shown = f"events {self.at_tick}, undecodable {statistics.stream.undecodable}, {width}x{height}"
        return [Text(f"{shown}, sinks {len(statistics.sinks)}, by_total {self.by_total}"), Text(self.filler)]


class Terminals:
    """A terminal, in the place of standard input and output; `shown` is what came to it."""

    def __init__(self) -> None:
        self.keyboard, self.fd = pty.openpty()
        self.resize(80, 24)
        self.before = self.mode
        self.shown = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    @property
    def mode(self) -> list[Any]:
        return termios.tcgetattr(self.fd)

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    async def read(self) -> None:
        await anyio.wait_readable(self.keyboard)
        self.shown += os.read(self.keyboard, 1 << 16).decode(errors="replace")

    async def until(self, pattern: str) -> None:
        """Read until the last picture has it."""
        with anyio.fail_after(20):
            while not re.search(pattern, self.shown.rpartition("\x1b[H")[2]):
                await self.read()

    def rest(self) -> str:
        os.set_blocking(self.keyboard, False)
        with suppress(OSError):
            while data := os.read(self.keyboard, 1 << 16):
                self.shown += data.decode(errors="replace")
        return self.shown

    def close(self) -> None:
        os.close(self.keyboard)
        os.close(self.fd)


RUNNING = r"0:\d\d:\d\d {20,}"  # and no word beside it


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminals]:
    made = Terminals()
    monkeypatch.setattr(ebpfstream.cli.terminal, "INPUT", made.fd)
    monkeypatch.setattr(ebpfstream.cli.terminal, "OUTPUT", made.fd)
    yield made
    made.close()


@asynccontextmanager
async def running(screen: Screen, hand: Hand, *sinks: Any) -> AsyncIterator[Forwarding[Any]]:
    """As shipping.ship does it."""
    forwarding = Forwarding(numbers(hand), screen, *sinks, deadline=60)
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(screen.run, forwarding)
            tasks.start_soon(forwarding.run)
            yield forwarding


def descriptors() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


async def test_q_ends_it_and_all_is_as_it_was(terminal: Terminals, hand: Hand) -> None:
    await anyio.to_thread.run_sync(lambda: None)  # the loop's own descriptors are there
    screen, before = Numbers(), descriptors()
    async with running(screen, hand):
        await terminal.until("events 0, undecodable 0, 80x23, sinks 0, by_total False")
        assert not terminal.mode[3] & (termios.ECHO | termios.ICANON)
        assert terminal.mode[3] & termios.ISIG
        assert not terminal.mode[0] & termios.IXON
        hand.submit(1, 2, 3)
        await terminal.until("events 3,")
        terminal.press("q")
    assert terminal.mode == terminal.before
    shown = terminal.rest()
    assert shown.startswith(ENTER)
    assert shown.endswith(LEAVE)
    assert shown.count(LEAVE) == 1
    assert "detach" in hand.log
    assert descriptors() == before


async def test_keys(terminal: Terminals, hand: Hand) -> None:
    screen = Numbers()
    async with running(screen, hand):
        await terminal.until(RUNNING)
        terminal.press("\x1b[B\x1bq")  # a sequence is no key: arrow down, Alt-q
        terminal.press("p")
        await terminal.until("paused")
        hand.submit(1)
        while screen.events < 1:
            await anyio.sleep(0.01)
        await anyio.sleep(0.3)
        terminal.press("t")
        await terminal.until("events 0,.* by_total True")
        terminal.press("p")
        await terminal.until(RUNNING + "(?s:.*)events 1,")
        terminal.press("tq")
    assert "by_total False" in terminal.rest()


async def test_q_twice_ends_it_at_once(terminal: Terminals, hand: Hand) -> None:
    stuck = anyio.Event()

    async def sink(batch: EventBatch[Any]) -> None:
        stuck.set()
        await anyio.sleep_forever()

    async with running(Numbers(), hand, sink):
        hand.submit(1)
        await stuck.wait()
        await terminal.until("sinks 1")
        terminal.press("q")
        await terminal.until("ending…")
        terminal.press("q")
    assert terminal.rest().endswith(LEAVE)


async def test_another_size_shows_at_once(terminal: Terminals, hand: Hand) -> None:
    screen = Numbers(every=1000)
    async with running(screen, hand):
        await terminal.until(RUNNING + "(?s:.*)80x23")
        terminal.resize(100, 10)
        os.kill(os.getpid(), signal.SIGWINCH)
        await terminal.until("100x9")
        terminal.press("q")


async def test_a_terminal_that_takes_nothing_stops_nobody(terminal: Terminals, hand: Hand) -> None:
    """Pictures wait; events do not, nor does the end, and then the terminal is told that all is over."""
    terminal.resize(300, 200)
    screen = Numbers()
    screen.filler = "\n".join("x" * 300 for _ in range(200))
    async with running(screen, hand) as forwarding:
        await forwarding.attached.wait()
        await anyio.sleep(0.5)
        hand.submit(1, 2, 3)
        while screen.events < 3:
            await anyio.sleep(0.01)
        forwarding.end()
    assert terminal.mode == terminal.before
    assert terminal.rest().endswith(LEAVE)


async def test_a_bug_in_a_view_leaves_nothing_behind(terminal: Terminals, hand: Hand) -> None:
    class Broken(Numbers):
        def body(self, statistics: ForwardStatistics, width: int, height: int) -> list[Text]:
            raise ZeroDivisionError

    await anyio.to_thread.run_sync(lambda: None)
    before = descriptors()
    with pytest.raises(ExceptionGroup) as raised:
        async with running(Broken(), hand):
            await anyio.sleep_forever()
    assert raised.group_contains(ZeroDivisionError)
    assert terminal.mode == terminal.before
    assert terminal.rest() == ENTER + LEAVE
    assert descriptors() == before
    assert logging.getLogger("ebpfstream").propagate


async def test_a_terminal_that_goes_ends_it(hand: Hand, terminal: Terminals) -> None:
    keyboard = os.dup(terminal.keyboard)
    async with running(Numbers(), hand):
        await terminal.until("events 0,")
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, terminal.keyboard)
        os.close(null)
        os.close(keyboard)
    assert "detach" in hand.log


async def test_what_is_logged_comes_when_the_terminal_is_as_it_was(
    terminal: Terminals, hand: Hand, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(Numbers(), hand):
        await terminal.until("events 0,")
        logging.getLogger("ebpfstream").warning("the server is away")
        assert caplog.messages == []
        terminal.press("q")
    assert caplog.messages == ["the server is away"]
    assert "away" not in terminal.rest()
    logging.getLogger("ebpfstream").warning("later")
    assert caplog.messages == ["the server is away", "later"]


async def test_what_does_not_fit_its_type_is_told(terminal: Terminals, hand: Hand) -> None:
    async with running(Numbers(), hand):
        hand.submit(1, 2)
        hand.submit(3, size=4)
        await terminal.until("events 2, undecodable 1")
        terminal.press("q")


async def test_top_refuses_a_batch_whole_that_does_not_fit_in_part(terminal: Terminals) -> None:
    good = make_batch([Exec(0, "sh")]).records
    batch = EventBatch(
        Exec, Records(good.data * 2, good.prefix, [*good.runs, (good.runs[0][0] + len(good.data), 32, 8, 1)])
    )
    screen = Top()
    with pytest.raises(Exception, match="Exec"):
        await screen.send(batch)
    screen.note(ForwardStatistics(Statistics()), 1.0)
    assert "0 in all" in lines(screen, 80, 24)[1]


async def test_run_ends_with_a_screen_that_is_closed_before_it_begins(
    terminal: Terminals, hand: Hand
) -> None:
    screen = Numbers()
    async with screen:
        pass
    with anyio.fail_after(5):
        await screen.run(Forwarding(numbers(hand), screen))
    assert terminal.mode == terminal.before
    assert terminal.rest() == ENTER + LEAVE


async def test_names_of_users_are_looked_up_beside() -> None:
    users = Users()
    nobody = next(entry for entry in pwd.getpwall() if entry.pw_name == "nobody").pw_uid
    assert [users.name(uid) for uid in (0, nobody, 4_000_000_000)] == ["0", str(nobody), "4000000000"]
    with anyio.fail_after(5):
        await users.look_up()
    assert [users.name(uid) for uid in (0, nobody, 4_000_000_000)] == ["root", "nobody", "4000000000"]


async def test_keys_of_no_terminal(terminal: Terminals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one to read from there are none, and what is shown is shown all the same."""
    with open(os.devnull) as null:
        monkeypatch.setattr(ebpfstream.cli.terminal, "INPUT", null.fileno())
        opened = ebpfstream.cli.terminal._opened
        monkeypatch.setattr(
            ebpfstream.cli.terminal, "_opened", lambda path: None if path == "/dev/tty" else opened(path)
        )
        with Terminal() as made, anyio.fail_after(5):
            made.enter()
            assert await made.show("picture")
            assert [key async for key in made.pressed()] == []
    assert terminal.mode == terminal.before
    assert terminal.rest() == f"{ENTER}picture{LEAVE}"


# --- the command


@pytest.mark.parametrize("name", ["dumb", ""])
def test_top_without_a_terminal_names_the_alternatives(
    name: str, terminal: Terminals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", name or "xterm")
    with open(os.devnull) as null:
        if not name:
            monkeypatch.setattr(ebpfstream.cli.terminal, "OUTPUT", null.fileno())
        error = CliRunner().invoke(top, []).exception
    assert isinstance(error, ArgumentError)
    assert "`ebpfstream execve` (each exec) and `ebpfstream count`" in str(error)


def test_top_has_the_standard_output_itself(terminal: Terminals) -> None:
    error = CliRunner().invoke(top, ["--to", "stdout:?format=text"]).exception
    assert isinstance(error, ArgumentError)
    assert str(error).startswith("top has the standard output itself")


def test_top_without_rich(terminal: Terminals) -> None:
    code = "import sys; sys.modules['rich'] = None; from ebpfstream.cli.top import top; top()"
    done = subprocess.run([sys.executable, "-c", code], stdout=terminal.fd, stderr=subprocess.PIPE, text=True)
    assert done.stderr.endswith("ArgumentError: top needs rich: pip install 'ebpfstream[live]'\n")
