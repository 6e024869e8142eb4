"""Live views on a terminal: sinks that show what they are sent.  Needs the extra `live`."""

from __future__ import annotations

import logging
import math
import os
import pwd
import sys
import time
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from signal import SIGCONT, SIGTSTP, SIGWINCH
from typing import Any, Final

import anyio
import anyio.to_thread
from anyio import CancelScope
from rich.console import Console
from rich.screen import Screen as FullScreen
from rich.text import Text

from ebpfstream.batch import EventBatch
from ebpfstream.cli import pieces
from ebpfstream.cli.pieces import Column
from ebpfstream.cli.tally import Row, Tally
from ebpfstream.cli.terminal import Terminal
from ebpfstream.errors import ArgumentError
from ebpfstream.forwarding import Forwarding
from ebpfstream.sink import CLOSING, Sink
from ebpfstream.statistics import ForwardStatistics, Statistics
from ebpfstream.text import printable

SHORTEST: Final = 0.1
"""Seconds between two pictures, at the least."""
_CLOCK: Final = 1.0  # of what is counted less often, the losses and the time are shown as often as that
_HOME: Final = "\x1b[H"
_KEYS: Final = "q quit   p pause   t order"
_MOST_NAMES: Final = 4096
_log = logging.getLogger("ebpfstream")


class Screen(Sink):
    """A view that has the whole terminal while it is open, is sent a stream's batches, and tells the ledgers.

    A picture is made every `every` seconds, and at once for a key or another size.  It is written without ever
    blocking the event loop, which is why rich makes it and does not write it (`rich.live.Live` does both).  What is
    logged meanwhile is held back until the terminal is as it was.  A batch has arrived when it is in the figures.

    Keys: q ends the forwarding (again: at once), p holds the picture, t changes what rows are ordered by.
    """

    name = "screen"
    title = ""
    """The command, as it is shown."""

    def __init__(self, *, every: float = 1.0) -> None:
        if not SHORTEST <= every < math.inf:
            raise ArgumentError(f"every={every} is impossible: give seconds, {SHORTEST} or more")
        super().__init__()
        self.every = every
        self.users = Users()
        self.by_total = False
        """Whether rows are ordered by what there was in all, not by the last interval."""
        self.elapsed = 0.0
        """Seconds since the stream was attached, as of the last interval."""
        self._state = "attaching…"
        self._console = Console(
            file=StringIO(), force_terminal=True, force_jupyter=False, legacy_windows=False, highlight=False
        )
        self.ascii_only = not (sys.stdout.encoding or "utf-8").lower().startswith("utf")
        self._statistics = ForwardStatistics(Statistics())
        self._terminal: Terminal | None = None
        self._held: _Held | None = None
        self._opened, self._wake = anyio.Event(), anyio.Event()
        self._running: CancelScope | None = None

    # --- what a view says

    @abstractmethod
    def tick(self, statistics: ForwardStatistics, seconds: float, cpu: float) -> None:
        """An interval of so many seconds is over, in which this process took so many of CPU."""

    @abstractmethod
    def body(self, statistics: ForwardStatistics, width: int, height: int) -> list[Text]:
        """The lines below the title."""

    def picture(self, width: int, height: int) -> str:
        """The whole of it, as what a terminal of that size is to be told."""
        lines = [self._heading(width), *self.body(self._statistics, width, height - 1)]
        file = StringIO()
        self._console.file = file
        self._console.size = (width, height)
        self._console.print(FullScreen(*lines[:height], application_mode=True), end="")
        return _HOME + file.getvalue()

    def note(self, statistics: ForwardStatistics, seconds: float, cpu: float = 0.0) -> None:
        """Take the ledgers, without that of the screen itself, at the end of an interval."""
        self.elapsed += seconds
        self.tick(statistics, seconds, cpu)
        self._statistics = statistics

    def _heading(self, width: int) -> Text:
        parts: list[Text | str] = [
            Text(self.title, "bold"),
            Text(printable(os.uname().nodename), "dim"),
            pieces.clock(self.elapsed),
        ]
        if self._state:
            parts.append(Text(self._state, "bold yellow"))
        left = pieces.line(parts, width)
        if left.cell_len + len(_KEYS) + 3 <= width:
            left.append(" " * (width - left.cell_len - len(_KEYS))).append(_KEYS, "dim")
        return left

    # --- its life as a sink

    async def open(self) -> None:
        """Take the terminal.  Raises SinkError."""
        terminal = Terminal()
        try:
            terminal.enter()
        except BaseException:
            terminal.close()
            raise
        self._terminal = terminal
        self._held = _Held()
        self._opened.set()

    async def aclose(self, deadline: float = CLOSING) -> None:
        """Give the terminal back, at once."""
        terminal, held = self._terminal, self._held
        self._terminal = self._held = None
        if terminal is not None:
            terminal.leave()
            if self._running is not None:
                self._running.cancel()  # closes the terminal, which it may be waiting for
            else:
                terminal.close()
        if held is not None:
            held.let_go()

    async def run(self, forwarding: Forwarding[Any]) -> None:
        """Show pictures and heed keys from when the sink is opened until it is closed; beside the forwarding."""
        await self._opened.wait()
        terminal = self._terminal
        if terminal is None:
            return
        try:
            with CancelScope() as self._running:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._heed_keys, terminal, forwarding)
                    tasks.start_soon(self._heed_signals, terminal)
                    tasks.start_soon(self._name_users)
                    tasks.start_soon(self._wake_when, forwarding.attached)
                    await self._keep_showing(terminal, forwarding)
                    forwarding.end()  # the terminal is gone
        finally:
            self._running = None
            terminal.close()

    async def _keep_showing(self, terminal: Terminal, forwarding: Forwarding[Any]) -> None:
        last, cpu = math.nan, 0.0  # until it is attached
        while True:
            self._wake = anyio.Event()
            now = anyio.current_time()
            if math.isnan(last) and forwarding.attached.is_set():
                last, cpu = now, time.process_time()
                self._statistics = self._ledgers(forwarding)
                self._state = "" if self._state == "attaching…" else self._state
            elif now - last >= self.every and self._state != "paused":
                before, cpu = cpu, time.process_time()
                self.note(self._ledgers(forwarding), now - last, cpu - before)
                last = now
            terminal.enter()  # back in the foreground: of a job that runs, shells do not tell
            if not await terminal.show(self.picture(*terminal.size)):
                return
            begun = now if self._state == "paused" else last
            due = math.inf if math.isnan(begun) else begun + self.every
            with anyio.move_on_after(max(due - anyio.current_time(), 0)):
                await self._wake.wait()

    def _ledgers(self, forwarding: Forwarding[Any]) -> ForwardStatistics:
        """Those of the forwarding; what did not fit its type, and so could not be shown, is the stream's."""
        statistics = forwarding.statistics()
        pairs = list(zip(forwarding.sinks, statistics.sinks, strict=True))
        unfit = sum(ledger.failed for sink, ledger in pairs if sink is self)
        stream = replace(statistics.stream, undecodable=statistics.stream.undecodable + unfit)
        others = tuple(ledger for sink, ledger in pairs if sink is not self)
        return ForwardStatistics(stream, others, statistics.filtered)

    async def _heed_keys(self, terminal: Terminal, forwarding: Forwarding[Any]) -> None:
        async for key in terminal.pressed():
            match key:
                case "q":
                    forwarding.end(0 if self._state == "ending…" else None)
                    self._state = "ending…"
                case "p" if self._state in ("", "paused"):
                    self._state = "" if self._state else "paused"
                case "t":
                    self.by_total = not self.by_total
            self._wake.set()

    async def _heed_signals(self, terminal: Terminal) -> None:
        with anyio.open_signal_receiver(SIGWINCH, SIGTSTP, SIGCONT) as signals:
            async for number in signals:
                if number == SIGTSTP:
                    terminal.suspend()
                elif number == SIGCONT:  # stopped by another signal, after which a shell set its own mode
                    terminal.leave()
                self._wake.set()

    async def _name_users(self) -> None:
        while True:
            await self.users.look_up()
            self._wake.set()

    async def _wake_when(self, event: anyio.Event) -> None:
        await event.wait()
        self._wake.set()


class Users:
    """Users' names, looked up when they are asked for, in a thread: that may ask a server."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._wanted: set[int] = set()
        self._asked = anyio.Event()

    def name(self, uid: int) -> str:
        """The user's name; the number while it is not known, or has none."""
        if uid not in self._names:
            self._wanted.add(uid)
            self._asked.set()
        return self._names.get(uid, str(uid))

    async def look_up(self) -> None:
        """Wait until a name is wanted, and look up those that are."""
        await self._asked.wait()
        self._asked = anyio.Event()
        wanted, self._wanted = self._wanted, set()
        if len(self._names) > _MOST_NAMES:
            self._names.clear()
        self._names |= await anyio.to_thread.run_sync(_names_of, wanted, abandon_on_cancel=True)


def _names_of(uids: Iterable[int]) -> dict[int, str]:
    names = {}
    for uid in uids:
        names[uid] = str(uid)
        with suppress(KeyError, OverflowError):
            names[uid] = pwd.getpwuid(uid).pw_name
    return names


class _Held(logging.Handler):
    """Holds back what is logged: it would be written across the picture."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []
        self._propagate, _log.propagate = _log.propagate, False
        _log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._records) < 1000:  # the first ones tell the most
            self._records.append(record)

    def let_go(self) -> None:
        """Log what was held back."""
        _log.removeHandler(self)
        _log.propagate = self._propagate
        for record in self._records:
            _log.handle(record)


def lost(stream: Statistics, rate: float | None = None) -> Text:
    """How much was, in red if anything was."""
    number = (stream.lost or 0) + (stream.misses or 0)
    text = "unknown" if stream.lost is None else f"{number:,}"
    made = Text("lost     ") + Text(text, "bold red" if number else "")
    if rate:
        made.append(f", {pieces.rate(rate)}/s now", "bold red")
    return made


def causes(stream: Statistics) -> list[Text]:
    """What was lost by cause, in red, and what else did not come; nothing if all did."""
    found = (
        (stream.lost_full, "buffer full"),
        (stream.lost_too_large, "too large"),
        (stream.lost_no_buffer, "CPU without buffer"),
        (stream.lost_otherwise, os.strerror(stream.lost_errno) if stream.lost_errno else "otherwise"),
        (stream.misses, "missed by the kernel"),
        (stream.undecodable, "undecodable"),
    )
    made = [Text(f"{number:,} {cause}", "red") for number, cause in found if number]
    if stream.skipped:
        made.append(Text(f"{stream.skipped:,} skipped by sampling", "yellow"))
    return made


class Counts(Screen):
    """How many programs each user has executed, of batches of ExecCount that come every `every` seconds."""

    title = "ebpfstream count"

    def __init__(self, *, every: float = 2.0) -> None:
        super().__init__(every=min(every, _CLOCK))
        self._interval = every
        self._tally = Tally[int]()
        self._at = 0  # when the last counts were read, in nanoseconds of CLOCK_MONOTONIC

    async def send(self, batch: EventBatch[Any]) -> None:
        """Take the counts of an interval."""
        events = list(batch.with_lost(()))  # all, or none if one does not fit
        for event in events:
            self._tally.add({event.uid: event.count})
            self._at = event.monotonic
        self._tally.tick()
        self._wake.set()

    def tick(self, statistics: ForwardStatistics, seconds: float, cpu: float) -> None:
        """Where nobody has executed anything, nothing was sent."""
        if time.monotonic_ns() - self._at > 1.5e9 * self._interval:
            self._tally.tick()

    def body(self, statistics: ForwardStatistics, width: int, height: int) -> list[Text]:
        """What was lost, and a table of users with a row for all of them."""
        stream = statistics.stream
        lines = [pieces.line([lost(stream), *causes(stream)], width), Text("")]
        name = min(max(12, width // 5), 32)
        last = f"LAST {self._interval:g} s"
        columns = [
            Column("USER", name, right=False),
            Column(last, max(len(last), 9)),
            Column("EXECS/S", 9),
            Column("TOTAL", 13),
            Column("UID", 10),
        ]
        columns.append(Column("SHARE", min(max(width - pieces.width(columns) - 1, 9), 45), right=False))
        columns = pieces.that_fit(columns, width)
        lines.append(pieces.headings(columns))
        rows = self._tally.rows(height - len(lines) - 1, by_total=self.by_total)
        sums = self._tally.sums()
        for row in rows:
            uid = "" if row.key is None else str(row.key)
            name_or_rest = self._tally.rest(rows) if row.key is None else self.users.name(row.key)
            lines.append(pieces.row(columns, self._cells(columns, name_or_rest, uid, row, sums)))
        if rows:
            users = f"{len(self._tally)} user{'s' * (len(self._tally) != 1)}"
            lines.append(pieces.row(columns, self._cells(columns, users, "", sums, sums), style="bold"))
        return lines

    def _cells(
        self, columns: list[Column], name: str, uid: str, row: Row[int], sums: Row[int]
    ) -> list[str | Text]:
        part = (row.total / sums.total if self.by_total else row.last / (sums.last or 1)) if sums.total else 0
        cells: list[str | Text] = [
            name,
            pieces.count(row.last, 9),
            pieces.rate(row.last / self._interval),
            pieces.count(row.total, 13),
            uid,
            "" if row is sums else pieces.share(part, columns[-1].width, ascii_only=self.ascii_only),
        ]
        return cells[: len(columns)]
