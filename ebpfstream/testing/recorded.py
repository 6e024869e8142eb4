"""Events and batches that were recorded, and a stream of them: for tests without a kernel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from anyio.lowlevel import checkpoint

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError
from ebpfstream.events import E_co, Event
from ebpfstream.lost import Lost
from ebpfstream.packing import pack, unpack
from ebpfstream.parsing import parser
from ebpfstream.statistics import Statistics

E = TypeVar("E", bound=Event)

_LENGTH: Final = 8  # bytes before each batch: how many it takes


def read_events(path: str | PathLike[str], type: type[E]) -> list[E | Lost]:
    """The events of a file of JSON lines, as `--to file:` and FileSink write them; its losses as Lost.

    Raises DecodeError, which names the field, for a line that is not of this type; OSError.
    """
    parse = parser(type)
    return [parse(line) for line in Path(path).read_bytes().splitlines()]


def save_batches(path: str | PathLike[str], batches: Iterable[EventBatch[Any]]) -> None:
    """Write batches into a file, whole: records as the kernel wrote them, losses, times of day.  Raises OSError."""
    with Path(path).open("wb") as file:
        for batch in batches:
            data = pack(batch)
            file.write(len(data).to_bytes(_LENGTH, "little") + data)


def load_batches(path: str | PathLike[str], type: type[E]) -> list[EventBatch[E]]:
    """The batches that `save_batches` wrote.

    Raises EventTypeError if they were of another type, or of another version of it: record them anew;
    ArgumentError for a file that is no such one; OSError.
    """
    return [unpack(data, type) for data in _parts(Path(path))]


def _parts(path: Path) -> Iterator[bytes]:
    data, place = path.read_bytes(), 0
    while place < len(data):
        begin = place + _LENGTH
        place = begin + int.from_bytes(data[place:begin], "little")
        if not begin < place <= len(data):
            raise ArgumentError(f"{path} is no file that save_batches has written, or not all of it")
        yield data[begin:place]


class Replay(Generic[E_co]):
    """A stream of batches that are there already, in place of one from the kernel.

    It can be iterated by event and by batch, and forwarded.  Losses that the batches hold come before their
    events, as in a stream with `on_lost="yield"`.
    """

    def __init__(self, *batches: EventBatch[E_co]) -> None:
        if not batches:
            raise ArgumentError("there is nothing to replay: give one batch or more")
        self._batches = list(batches)
        self._events: Iterator[E_co] = iter(())
        self._received = sum(map(len, batches))
        self._lost = sum(one.count or 0 for batch in batches for one in batch.lost)
        self._delivered = 0
        self.event_type = batches[0].event_type
        """The class of its events."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E_co:
        """The next event, or loss.  Raises DecodeError for a record that the type does not fit."""
        while True:
            for event in self._events:
                return event
            batch = await self.next_batch()
            if batch is None:
                raise StopAsyncIteration
            self._events = iter(batch)

    async def batches(self) -> AsyncIterator[EventBatch[E_co]]:
        """The same a batch at a time."""
        while (batch := await self.next_batch()) is not None:
            yield batch

    async def next_batch(self, most: int | None = None) -> EventBatch[E_co] | None:
        """What `batches()` yields, not more than `most` events; None at the end."""
        await checkpoint()
        if not self._batches:
            return None
        batch = self._batches.pop(0)
        part = batch[:most]
        if len(part) < len(batch):
            self._batches.insert(0, batch[len(part) :])
        self._delivered += len(part)
        return part

    def detach(self) -> None:
        """As of a stream from the kernel: nothing new happens, and what is there still comes."""

    def statistics(self) -> Statistics:
        """The ledger: what the batches hold, and what of that has been handed out."""
        return Statistics(
            tried=self._received + self._lost,
            submitted=self._received,
            lost=self._lost,
            lost_full=self._lost,
            received=self._received,
            delivered=self._delivered,
            unread=self._received - self._delivered,
        )
