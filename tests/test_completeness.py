"""Whether all numbered events have come: against plain sets."""

from __future__ import annotations

import pickle
import random
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream.completeness import Completeness, Numbers
from ebpfstream.errors import DecodeError
from ebpfstream.events import U32, U64, Event
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.source import KafkaSource

HERE = Origin("a", "boot", "1")
THERE = Origin("b", "boot", "1")
NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)


@dataclass
class Mine(Event):
    cpu: U32
    sequence: U64


# Among few, so that they come twice; over the borders of pieces; and far apart.
some_numbers = st.lists(st.integers(0, 30) | st.integers(1000, 1050) | st.integers(0, 2**64 - 1))


def check(numbers: Numbers, plain: set[int]) -> None:
    ranges = list(numbers.ranges())
    assert [n for one in ranges for n in one] == sorted(plain)
    assert all(one for one in ranges)
    assert all(left.stop < right.start for left, right in pairwise(ranges))
    assert list(numbers.gaps()) == [range(a.stop, b.start) for a, b in pairwise(ranges)]
    assert numbers.count == len(plain)
    assert numbers.missing == (max(plain) - min(plain) + 1 - len(plain) if plain else 0)


@given(some_numbers)
def test_numbers_are_a_set(given: list[int]) -> None:
    numbers, plain = Numbers(), set[int]()
    for number in given:
        assert numbers.add(number) == (number not in plain)
        plain.add(number)
        check(numbers, plain)


@given(some_numbers, some_numbers)
def test_numbers_are_put_together(ours: list[int], theirs: list[int]) -> None:
    numbers, others = Numbers(), Numbers()
    for number in ours:
        numbers.add(number)
    for number in theirs:
        others.add(number)
    assert numbers.update(others) == len(set(ours) & set(theirs))
    check(numbers, set(ours) | set(theirs))
    check(others, set(theirs))


def test_whole_pieces_are_put_together() -> None:
    """Ranges longer than a piece, which join, or do not by one."""
    numbers, others, plain = Numbers(), Numbers(), set[int]()
    for number in (*range(5, 4096), *range(4097, 9000), *range(20_000, 22_500)):
        (numbers if number % 2 else others).add(number)
        plain.add(number)
    assert numbers.update(others) == 0
    check(numbers, plain)
    assert [len(gap) for gap in numbers.gaps()] == [1, 11_000]
    assert numbers.add(4096)
    assert not numbers.add(4096)
    check(numbers, plain | {4096})


def test_numbers_are_small() -> None:
    """A bit each, whatever is missing; much less where nothing is."""

    def size(numbers: Numbers) -> int:
        pieces = numbers._pieces
        objects = {id(bits): sys.getsizeof(bits) for bits in pieces.values()}
        return sys.getsizeof(pieces) + sum(objects.values())

    thinned, whole = Numbers(), Numbers()
    chance = random.Random(1)
    for number in range(300_000):
        if chance.random() < 0.4:
            thinned.add(number)
        whole.add(number)
    assert size(thinned) < 3 * 300_000 / 8
    assert size(whole) < 300_000 / 8


def test_one_stream() -> None:
    seen = Completeness()
    for cpu, number in ((0, 3), (0, 4), (1, 0), (0, 7), (1, 1), (0, 4)):
        seen.add(HERE, cpu, 0, number)
    seen.add(HERE, 0, 1, 9)
    received = seen[HERE]
    assert (received.events, received.doubles, received.missing, received.unexplained) == (6, 1, 2, 2)
    assert seen.tell(HERE, Lost(0, 1, 5, 5, NOON))
    assert received.unexplained == 1
    assert seen.tell(HERE, Lost(None, 9, time=NOON))
    assert received.unexplained == 0
    assert str(seen) == "a 1: 6 events, 1 doubles, 2 missing, 10 told as lost"


def test_a_loss_counts_once() -> None:
    """If it has a time, by which it is known; the last thousand are."""
    seen = Completeness()
    losses = [Lost(0, 2, time=NOON + timedelta(seconds=n)) for n in range(1001)]
    assert all(seen.tell(HERE, lost) for lost in losses)
    assert not any(seen.tell(HERE, lost) for lost in losses[1:])
    assert seen[HERE].told == 2002
    assert seen.tell(HERE, losses[0])
    without_a_time = Lost(0, 2)
    assert seen.tell(THERE, without_a_time)
    assert seen.tell(THERE, without_a_time)
    assert seen[THERE].told == 4


def test_losses_are_put_together() -> None:
    left, right, whole = Completeness(), Completeness(), Completeness()
    losses = [Lost(0, 1 + n, time=NOON + timedelta(seconds=n)) for n in range(6)]
    for lost in losses:
        whole.tell(HERE, lost)
    for seen, part in ((left, losses[:4]), (right, losses[2:])):
        for lost in part:
            seen.tell(HERE, lost)
    left.update(right)
    assert left[HERE].told == 21
    assert left == whole


@pytest.mark.parametrize("seed", range(5))
def test_what_workers_have_seen_is_put_together(seed: int) -> None:
    """Each number goes to one of three workers, in any order; one went to two."""
    chance = random.Random(seed)
    workers = [Completeness() for _ in range(3)]
    numbers = [(origin, cpu, n) for origin in (HERE, THERE) for cpu in (0, 1) for n in range(200)]
    chance.shuffle(numbers)
    lost = numbers.pop()
    view = Completeness()
    for origin, cpu, number in numbers:
        chance.choice(workers).add(origin, cpu, 0, number)
        view.add(origin, cpu, 0, number)
    whole = Completeness()
    whole.update(*(pickle.loads(pickle.dumps(worker)) for worker in workers))
    assert whole == view
    origin, cpu, number = numbers[0]
    again = Completeness()
    again.add(origin, cpu, 0, number)
    whole.update(again)
    assert whole != view
    assert sum(received.events for received in whole.values()) == 799
    assert sum(received.doubles for received in whole.values()) == 1
    assert whole[lost[0]].missing == (lost[2] not in (0, 199))
    assert set(whole) == {HERE, THERE}


def test_where_an_event_comes_from() -> None:
    """Each event by its own record: those of a group's members can be put together by their names."""
    source = KafkaSource("127.0.0.1", "exec", group="one", types=[Mine], doubles="yield", on_lost="yield")

    def read(value: bytes, origin: Origin | None, **headers: bytes) -> object:
        named = origin._asdict() if origin else {}
        told = [*((name, text.encode()) for name, text in named.items()), *headers.items()]
        return source._read(SimpleNamespace(value=value, headers=told, partition=0, offset=0))

    first, second = b'{"cpu":0,"sequence":7}', b'{"cpu":1,"sequence":8}'
    loss = b'{"lost":{"cpu":0,"count":1,"first_sequence":5,"last_sequence":5,"time":"2026-07-01T12:00:00.000000Z"}}'
    assert source.origin is None
    assert read(first, HERE, sequence=b"0/7") == Mine(0, 7)
    assert source.origin == HERE
    assert read(second, THERE, sequence=b"1/8") == Mine(1, 8)
    assert source.origin == THERE
    assert read(loss, HERE, schema=b"lost", sequence=b"0/5-5") == Lost(0, 1, 5, 5, NOON)
    assert source.origin == HERE
    with pytest.raises(DecodeError):
        read(b"{", THERE, sequence=b"1/9")
    assert read(first, None) == Mine(0, 7)  # another program's: there is nothing to name it by
    assert source.origin is None
    assert {origin: received.events for origin, received in source.completeness().items()} == {
        HERE: 1,
        THERE: 1,
    }


def test_nothing_is_said_in_words() -> None:
    """Events of programs that do not number them."""
    assert str(Completeness()) == "nothing that is numbered has come"
