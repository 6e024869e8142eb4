"""Batches as bytes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream.errors import EventTypeError
from ebpfstream.events import U32, U64, Char, Event, Tail
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from ebpfstream.packing import pack, unpack
from ebpfstream.testing import ExampleEvent, make_batch

EVENTS = st.lists(st.builds(ExampleEvent, st.integers(0, 2**64 - 1), st.just("sh"), st.text(max_size=20)))
TIME = datetime(2026, 11, 25, 1, 2, 3, 456789, UTC)


@given(EVENTS, st.integers(0, 5), st.integers(0, 5), st.integers(-(2**60), 2**60))
def test_the_batch_comes_back(events: list[ExampleEvent], start: int, end: int, offset: int) -> None:
    """Also a part of one, without the bytes of the rest."""
    lost = [Lost(1, 2, 3, 4, TIME), Lost(None, None)]
    batch = make_batch(events, lost=lost, type=ExampleEvent)[start : len(events) - end]
    batch.wall_clock_offset = offset
    batch.origin = Origin("host", "boot", "stream")
    packed = pack(batch)
    back = unpack(packed, ExampleEvent)
    assert list(back) == list(batch)
    assert back.to_json_lines() == batch.to_json_lines()
    assert (back.wall_clock_offset, back.lost, back.origin) == (offset, batch.lost, batch.origin)
    assert sum(stride * count for _, stride, _, count in back.records.runs) == back.nbytes


def test_a_selection_stays_one() -> None:
    batch = make_batch([ExampleEvent(1, "sh", "x")]).select({"comm": "name"})
    assert unpack(pack(batch), ExampleEvent).to_json_lines() == b'{"name":"sh"}\n'
    assert unpack(pack(batch), ExampleEvent).origin is None


def test_padding_stays() -> None:
    batch = make_batch([ExampleEvent(1, "sh", "x")])
    batch.records = batch.records._replace(padding=4)
    assert unpack(pack(batch), ExampleEvent).records.padding == 4


@dataclass
class Plain(Event):
    pid: U32
    comm: Annotated[str, Char(8)]


def version(name: str, **annotations: object) -> type[Event]:
    return dataclass(type(name, (Event,), {"__annotations__": annotations}))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (version("Other", pid=U32, comm=Annotated[str, Char(8)]), "of Plain, not of Other"),
        (version("Plain", pid=U64, comm=Annotated[str, Char(8)]), "of another version of Plain"),
        (version("Plain", uid=U32, comm=Annotated[str, Char(8)]), "of another version of Plain"),
        (version("Plain", pid=U32, comm=Annotated[str, Char(7)]), "of another version of Plain"),
        (
            version("Plain", pid=U32, rest=Annotated[str, Tail()], comm=Annotated[str, Char(8)]),
            "another version",
        ),
    ],
)
def test_another_type_is_refused(other: type[Event], message: str) -> None:
    packed = pack(make_batch([Plain(1, "sh")]))
    with pytest.raises(EventTypeError, match=message):
        unpack(packed, other)
    assert list(unpack(packed, version("Plain", pid=U32, comm=Annotated[str, Char(8)])))
