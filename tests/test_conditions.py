"""Conditions on events, given as text."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

import pytest

from ebpfstream import ExecEvent
from ebpfstream.conditions import condition
from ebpfstream.errors import ArgumentError
from ebpfstream.events import U32, Comm, Computed, Event


@dataclass
class Small(Event):
    pid: U32
    comm: Comm
    any: U32
    double: Annotated[int, Computed(lambda pid: 2 * pid, ("pid",))]


def event(**fields: Any) -> Any:
    return SimpleNamespace(**{"pid": 7, "comm": "sh", "any": 3, "double": 14} | fields)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("pid == 7", True),
        ("pid != 7", False),
        ("  pid in (6, 7)\n", True),
        ('comm.startswith("s") and not pid > 7', True),
        ("double == 2 * pid", True),
        ("len(comm) == 2", True),
        ("any == 3", True),  # a field, though a function has that name
        ("all(letter in 'hs' for letter in comm)", True),
        ("[pid for pid in comm] == ['s', 'h']", True),
        ("pid", True),
        ("pid - 7", False),
        ("comm[0] == 's' if pid else None", True),
    ],
)
def test_holds(text: str, holds: bool) -> None:
    assert condition(Small, text)(event()) is holds


def test_of_real_events() -> None:
    """Every field of theirs can be named."""
    for name in ExecEvent.__dataclass_fields__:
        condition(ExecEvent, f"{name} == {name}")
    assert condition(ExecEvent, '"-c" in args and uid == 0')(SimpleNamespace(args=["sh", "-c"], uid=0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no condition"),
        ("pid ==", "is no condition"),
        ("pid = 7", "is no condition"),
        ("import os", "is no condition"),
        ("pid\0", "is no condition"),
        ("pidd == 7", r"Small has no field 'pidd'; did you mean pid\? \(it has pid, comm, any, double\)"),
        ("open('/etc/shadow')", "Small has no field 'open'"),
        ("__import__('os')", "Small has no field '__import__'"),
        ("comm.__class__", "__class__ is private"),
        ("(lambda: 1)()", "no functions of its own"),
        ("await pid", "leave out await and yield"),
        ("(yield pid)", "leave out await and yield"),
        ("_event", "Small has no field '_event'"),
    ],
)
def test_is_none(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        condition(Small, text)


def test_cannot_be_told() -> None:
    with pytest.raises(
        ArgumentError, match=r"'comm > pid' cannot be told of .*: TypeError: '>' not supported"
    ):
        condition(Small, "comm > pid")(event())
