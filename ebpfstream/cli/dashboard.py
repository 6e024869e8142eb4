"""The view of `ebpfstream top`.  Needs the extra `live`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from ebpfstream.batch import EventBatch
from ebpfstream.cli import pieces
from ebpfstream.cli.live import Screen, causes, lost
from ebpfstream.cli.pieces import Column
from ebpfstream.cli.tally import K, Tally
from ebpfstream.errors import DecodeError
from ebpfstream.statistics import ForwardStatistics, SinkStatistics, Statistics
from ebpfstream.text import printable

_SIDE_BY_SIDE = 72  # columns, from which commands and users have room beside each other
_BAR = 8
_NAME = 16  # of a sink, at the least
_COMM = 15  # the longest name of a process
_SHARE = 10, 40  # the width of a share, at least and at most


class Top(Screen):
    """Rates, losses, the busiest commands and users, and the sinks, of batches of ExecEvent."""

    title = "ebpfstream top"

    def __init__(self, *, every: float = 1.0) -> None:
        super().__init__(every=every)
        self._commands, self._users = Tally[str](), Tally[int]()
        self._seconds = every  # of the last interval
        self._most = self._cpu = self._losing = 0.0
        self._lost = 0

    async def send(self, batch: EventBatch[Any]) -> None:
        """Take the events."""
        pairs: Counter[tuple[str, int]] = Counter()
        for chunk in batch.decode():
            if isinstance(chunk, DecodeError):
                raise chunk
            pairs.update([(event.comm, event.uid) for event in chunk])
        for (comm, uid), number in pairs.items():
            self._commands.add({comm: number})
            self._users.add({uid: number})

    def tick(self, statistics: ForwardStatistics, seconds: float, cpu: float) -> None:
        """An interval is over."""
        self._commands.tick()
        self._users.tick()
        self._seconds = seconds
        self._most = max(self._most, self._commands.sums().last / seconds)
        before, self._lost = self._lost, (statistics.stream.lost or 0) + (statistics.stream.misses or 0)
        self._losing = (self._lost - before) / seconds
        self._cpu = cpu / seconds

    def body(self, statistics: ForwardStatistics, width: int, height: int) -> list[Text]:
        """Three lines of figures; tables of commands and users; sinks."""
        figures = [
            self._rates(statistics, width),
            pieces.line([lost(statistics.stream, self._losing), *causes(statistics.stream)], width),
            self._buffer(statistics.stream, width),
        ]
        # Three rows in each table come first.
        sinks = self._sinks(statistics.sinks, width)[: max(height - 9, 0)]
        sinks = sinks if len(sinks) > 1 else []
        room = height - len(figures) - len(sinks) - bool(sinks) - 1
        return [
            *figures,
            Text(""),
            *self._tables(width, room),
            *([Text("")] if sinks else []),
            *sinks,
        ]

    def _rates(self, statistics: ForwardStatistics, width: int) -> Text:
        sums = self._commands.sums()
        parts: list[Text | str] = [
            Text("execs    ") + Text(f"{pieces.rate(sums.last / self._seconds)}/s now", "bold"),
            f"{pieces.rate(sums.total / self.elapsed if self.elapsed else 0)}/s mean",
            f"{pieces.rate(self._most)}/s most",
            f"{sums.total:,} in all",
        ]
        if statistics.filtered:
            parts.append(f"{statistics.filtered:,} left out by --where")
        return pieces.line(parts, width)

    def _buffer(self, stream: Statistics, width: int) -> Text:
        part = stream.buffered / stream.buffer_size if stream.buffer_size else 0
        bar = (
            Text("[")
            .append(pieces.bar(part, 2 * _BAR, ascii_only=self.ascii_only), _colour(part))
            .append("]")
        )
        parts: list[Text | str] = [
            Text("buffer   ")
            .append_text(bar)
            .append(f" {pieces.size(stream.buffered)} of {pieces.size(stream.buffer_size)}"),
            f"{pieces.size(stream.buffered_most)} most",
            f"own CPU {pieces.percent(self._cpu)}",
        ]
        return pieces.line(parts, width)

    def _tables(self, width: int, room: int) -> list[Text]:
        if width < _SIDE_BY_SIDE:
            return self._table(_columns("COMMAND", width), self._commands, str, room)
        columns = _columns("COMMAND", width - 3 - max((width - 3) * 2 // 5, 30))
        left = pieces.width(columns)
        commands = self._table(columns, self._commands, str, room)
        users = self._table(_columns("USER", width - 3 - left), self._users, self.users.name, room)
        pairs = zip_longest(commands, users, fillvalue=Text(" " * left))
        return [command + Text("   ") + user for command, user in pairs]

    def _table(
        self, columns: list[Column], tally: Tally[K], name: Callable[[K], str], room: int
    ) -> list[Text]:
        lines = [pieces.headings(columns)]
        sums = tally.sums()
        rows = tally.rows(room - 1, by_total=self.by_total)
        for row in rows:
            part = row.total / (sums.total or 1) if self.by_total else row.last / (sums.last or 1)
            cells: list[str | Text] = [
                tally.rest(rows) if row.key is None else name(row.key),
                pieces.rate(row.last / self._seconds, 8),
                pieces.count(row.total, 10),
                pieces.share(part, columns[-1].width, ascii_only=self.ascii_only),
            ]
            lines.append(pieces.row(columns, cells[: len(columns)]))
        return lines

    def _sinks(self, sinks: tuple[SinkStatistics, ...], width: int) -> list[Text]:
        if not sinks:
            return []
        numbers = [
            Column("QUEUE", 8),
            Column("LAG", 7),
            Column("ARRIVED", 9),
            Column("DROPPED", 7),
            Column("FAILED", 7),
            Column("SPOOLED", 9),
        ]
        fitting = pieces.that_fit(numbers, width - _NAME - 1)
        rest = max(width - pieces.width(fitting) - 1, 1)
        bar = _BAR if rest > _NAME + _BAR else 0
        longest = max(cell_len(printable(sink.name)) for sink in sinks)
        columns = [Column("SINK", min(max(longest, _BAR), rest - bar - bool(bar)), right=False), *fitting]
        if bar:
            columns.insert(1, Column("", bar, right=False))
        lines = [pieces.headings(columns)]
        for sink in sinks:
            lines.append(pieces.row(columns, [sink.name, *self._numbers(sink, bar)[: len(columns) - 1]]))
            if sink.last_error:
                times = f"unavailable {sink.retries} times, last: " if sink.retries else ""
                bad = sink.away or sink.dropped or sink.failed
                lines.append(pieces.cell(f"  {times}{sink.last_error}", width, style="red" if bad else "dim"))
        return lines

    def _numbers(self, sink: SinkStatistics, bar: int) -> list[str | Text]:
        part = sink.queued / sink.queue_size if sink.queue_size else 0
        return [
            *([Text(pieces.bar(part, bar, ascii_only=self.ascii_only), _colour(part))] if bar else []),
            pieces.size(sink.queued),
            pieces.age(sink.lag),
            pieces.count(sink.acknowledged, 9),
            _bad(sink.dropped, 7),
            _bad(sink.failed, 7),
            pieces.count(sink.spooled, 9),
        ]


def _columns(what: str, width: int) -> list[Column]:
    """Those of a table of the busiest that has so much room."""
    numbers = [Column("EXECS/S", 8), Column("TOTAL", 10)]
    rest = width - pieces.width(numbers) - 1
    if rest < _COMM + 1 + _SHARE[0]:
        return pieces.that_fit([Column(what, max(rest, 8), right=False), *numbers], width)
    name = min(max(_COMM, rest // 3), 2 * _COMM)
    share = min(rest - name - 1, _SHARE[1])
    return [Column(what, name, right=False), *numbers, Column("SHARE", share, right=False)]


def _bad(number: int, width: int) -> Text:
    return pieces.cell(pieces.count(number, width), width, right=True, style="bold red" if number else "")


def _colour(part: float) -> str:
    """Of how full something is."""
    return "red" if part > 0.9 else "yellow" if part > 0.5 else "green"
