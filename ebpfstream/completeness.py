"""Whether all numbered events of a stream have come, wherever and in whatever order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.statistics import counted

_BITS: Final = 10  # 1024 numbers in a piece; longer ones take longer to change
_PIECE: Final = 1 << _BITS
_LOW: Final = _PIECE - 1
_ALL: Final = (1 << _PIECE) - 1  # one object for all pieces that are whole
_REMEMBERED: Final = 1000  # losses of a stream


class Numbers:
    """A set of whole numbers: one bit for each, however many are missing in between; less where none is."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: dict[int, int] = {}

    def add(self, number: int) -> bool:
        """Whether it is new."""
        pieces = self._pieces
        place, bit = number >> _BITS, 1 << (number & _LOW)
        bits = pieces.get(place, 0)
        if bits & bit:
            return False
        bits |= bit
        pieces[place] = _ALL if bits == _ALL else bits
        return True

    def update(self, other: Numbers) -> int:
        """Add all of another's; how many were here already."""
        doubles = 0
        for place, theirs in other._pieces.items():
            ours = self._pieces.get(place, 0)
            doubles += (ours & theirs).bit_count()
            bits = ours | theirs
            self._pieces[place] = _ALL if bits == _ALL else bits
        return doubles

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(bits.bit_count() for bits in self._pieces.values())

    @property
    def missing(self) -> int:
        """How many are not there, of those between the first and the last."""
        if not self._pieces:
            return 0
        first, last = min(self._pieces), max(self._pieces)
        start = (first << _BITS) + _lowest(self._pieces[first])
        end = (last << _BITS) + self._pieces[last].bit_length()
        return end - start - self.count

    def ranges(self) -> Iterator[range]:
        """They, in order."""
        start = end = 0
        for place in sorted(self._pieces):
            for first, behind in _runs(self._pieces[place]):
                if (place << _BITS) + first != end:
                    if start < end:
                        yield range(start, end)
                    start = (place << _BITS) + first
                end = (place << _BITS) + behind
        if start < end:
            yield range(start, end)

    def gaps(self) -> Iterator[range]:
        """What is missing between the first and the last."""
        end = None
        for one in self.ranges():
            if end is not None:
                yield range(end, one.start)
            end = one.stop

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Numbers) and self._pieces == other._pieces

    __hash__ = None  # type: ignore[assignment]  # it changes


def _lowest(bits: int) -> int:
    """The place of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """The first place of each run of bits that are set, and the one behind its last."""
    place = 0
    while bits:
        skipped = _lowest(bits)
        length = _lowest(~(bits >> skipped))
        yield place + skipped, place + skipped + length
        place += skipped + length
        bits >>= skipped + length


@dataclass
class Received:
    """What has come of one stream."""

    numbers: dict[tuple[int, int], Numbers] = field(default_factory=dict)
    """Sequence numbers by CPU and program."""
    doubles: int = 0
    """Events that came another time."""
    told: int = 0
    """Events of which the stream itself, or a queue, told that they were lost."""
    losses: dict[Lost, None] = field(default_factory=dict, repr=False)
    """The last thousand losses with a time, in which one that comes another time is recognized."""

    @property
    def events(self) -> int:
        """How many different ones have come."""
        return sum(numbers.count for numbers in self.numbers.values())

    @property
    def missing(self) -> int:
        """How many have not, of those between the first and the last of each CPU and program."""
        return sum(numbers.missing for numbers in self.numbers.values())

    @property
    def unexplained(self) -> int:
        """How many of these nobody told of: on their way, left out on purpose (`where`), or gone."""
        return max(self.missing - self.told, 0)

    def tell(self, lost: Lost) -> bool:
        """Note a loss; whether it is the first time that it comes."""
        if lost in self.losses:
            return False
        self._remember(lost)
        self.told += lost.count or 0
        return True

    def update(self, other: Received) -> None:
        """Take in what another worker has seen of it."""
        for place, numbers in other.numbers.items():
            self.doubles += self.numbers.setdefault(place, Numbers()).update(numbers)
        self.doubles += other.doubles
        self.told += other.told - sum(lost.count or 0 for lost in other.losses if lost in self.losses)
        for lost in other.losses:
            self._remember(lost)

    def _remember(self, lost: Lost) -> None:
        if lost.time is not None:  # others may look like one another
            self.losses[lost] = None
            if len(self.losses) > _REMEMBERED:
                del self.losses[next(iter(self.losses))]


class Completeness(Mapping[Origin, Received]):
    """What has come of each stream, by its origin.

    Workers of a consumer group see a part each; `update` puts together what they have seen.  It can be pickled.
    """

    def __init__(self) -> None:
        self._streams: dict[Origin, Received] = {}

    def __getitem__(self, origin: Origin) -> Received:
        return self._streams[origin]

    def __iter__(self) -> Iterator[Origin]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, origin: Origin, cpu: int, program: int, number: int) -> bool:
        """Note an event; whether it is the first time that it comes."""
        received = self._received(origin)
        numbers = received.numbers.get((cpu, program))
        if numbers is None:
            numbers = received.numbers[cpu, program] = Numbers()
        is_new = numbers.add(number)
        received.doubles += not is_new
        return is_new

    def tell(self, origin: Origin, lost: Lost) -> bool:
        """Note a loss; whether it is the first time that it comes."""
        return self._received(origin).tell(lost)

    def update(self, *others: Completeness) -> None:
        """Take in what others have seen."""
        for other in others:
            for origin, received in other.items():
                self._received(origin).update(received)

    def _received(self, origin: Origin) -> Received:
        received = self._streams.get(origin)
        if received is None:
            received = self._streams[origin] = Received()
        return received

    def __str__(self) -> str:
        return "\n".join(map(_line, self.items())) or "nothing that is numbered has come"


def _line(item: tuple[Origin, Received]) -> str:
    origin, received = item
    return f"{origin.host} {origin.stream}: {received.events} events" + counted(
        (received.doubles, "doubles"),
        (received.missing, "missing"),
        (received.told, "told as lost"),
        (received.unexplained, "unexplained"),
    )
