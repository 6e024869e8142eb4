from __future__ import annotations

import json
import re
import struct
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import jsonschema
import pytest

from ebpfstream import descriptions
from ebpfstream.batch import EventBatch
from ebpfstream.c_types import Record
from ebpfstream.catalogue import EVENT_TYPES
from ebpfstream.errors import ArgumentError
from ebpfstream.events import I8, U8, U64, Array, Char, Computed, Event, Flag, Integer, Tail, WallClock
from ebpfstream.lost import Lost
from ebpfstream.records import Records
from ebpfstream.schema import json_schema
from ebpfstream.tracers.execve import ExecEvent, trace_execve
from ebpfstream.tracers.syscalls import SyscallEvent, trace_syscalls

FORMATS = jsonschema.FormatChecker()


@FORMATS.checks("date-time")
def _is_date_time(value: object) -> bool:
    """RFC 3339: jsonschema itself needs another package for that."""
    return not isinstance(value, str) or bool(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", value)
    )


def validator(event_type: type[Any], fields: Any = None) -> jsonschema.Draft202012Validator:
    schema = json_schema(event_type, fields)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(json.loads(json.dumps(schema)), format_checker=FORMATS)


def lines_of(batch: EventBatch[Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in batch.to_json_lines().splitlines()]


LOST = (
    Lost(3, 7, 10, 16, datetime(2023, 11, 14, tzinfo=UTC) + timedelta(microseconds=5)),
    Lost(None, None),
)


@dataclass
class Everything(Event):
    """Each kind of field."""

    small: I8
    wide: U64
    flag: Flag
    ports: Annotated[tuple[int, ...], Array(Integer(2), 3)]
    raw: Annotated[bytes, Char(3)]
    when: Annotated[datetime, WallClock("wide")]
    pair: Annotated[tuple[int, str], Computed(lambda number: (number, str(number)), ("small",))]
    maybe: Annotated[str | None, Computed(lambda flag: "x" if flag else None, ("flag",))]
    ratio: Annotated[float, Computed(lambda number: float("nan") if number else 0.5, ("small",))]
    word: Annotated[str, Tail()]
    """What it is called."""
    words: Annotated[tuple[str, ...], Tail()]
    blob: Annotated[bytes, Tail()]
    length: Annotated[int, Tail(len)]


def everything(small: int, wide: int, flag: int, *tails: bytes) -> EventBatch[Everything]:
    head = struct.pack("<b7xQBx3H3s1x4I", small, wide, flag, 1, 2, 65535, b"a\0\xff", *map(len, tails))
    sample = head.ljust((len(head) + 7) // 8 * 8, b"\0") + b"".join(tails)
    return EventBatch(
        Everything, Records(bytes(8) + sample, 8, [(0, 8 + len(sample), len(sample), 1)]), 0, LOST
    )


BATCHES = [
    everything(-128, 0, 0, b"", b"", b"", b""),
    everything(127, 2**62, 255, b"w\xff", b"a\0\0b", b"\0\x7f", b"abc"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("fields", [None, ["word", "pair"], {"wide": "W", "when": "time", "maybe": "%s"}])
def test_lines_are_what_the_schema_says(batch: EventBatch[Any], fields: Any) -> None:
    check = validator(Everything, fields)
    lines = lines_of(batch if fields is None else batch.select(fields))
    assert len(lines) == 3
    for line in lines:
        check.validate(line)
        assert not check.is_valid(line | {"another": 1})
        for name in line:
            assert not check.is_valid({key: value for key, value in line.items() if key != name})
            assert not check.is_valid(line | {name: {}})


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("small", 128),
        ("small", -129),
        ("wide", -1),
        ("wide", 2**64),
        ("flag", 1),
        ("ports", [1, 2]),
        ("ports", [1, 2, 65536]),
        ("ports", [1, 2, 3, 4]),
        ("when", "yesterday"),
        ("pair", ["x", 1]),
        ("pair", [1]),
        ("pair", [1, "1", 1]),
        ("maybe", 5),
        ("words", [1]),
        ("length", "3"),
    ],
)
def test_what_a_line_cannot_be(field: str, wrong: object) -> None:
    line = lines_of(BATCHES[1])[-1]
    assert not validator(Everything).is_valid(line | {field: wrong})


@pytest.mark.parametrize("wrong", [{"cpu": -1}, {"count": "1"}, {"time": "x"}, {"other": 1}])
def test_what_a_loss_cannot_be(wrong: dict[str, object]) -> None:
    line = lines_of(BATCHES[0])[0]
    assert not validator(Everything).is_valid({"lost": line["lost"] | wrong})


def test_types_made_of_c() -> None:
    inner = ["in", [["a", "int"], ["f", "double"], ["name", "char", [4]]], "struct"]
    members = [
        ["small", "signed char"],
        ["truth", "_Bool"],
        ["big", "unsigned __int128"],
        ["bits", "unsigned int", 3],
        ["inner", inner],
        ["list", "unsigned short", [2]],
        ["bytes", "unsigned char", [3]],
        ["u", ["u", [["i", "int"], ["c", "char", [4]]], "union"]],
    ]
    size = 80
    found = descriptions.parse(["ev", members, "struct"], size)
    assert isinstance(found, Record)
    kind = found.event_type
    check = validator(kind)
    for fill in (b"\0", b"\xff", b"a"):
        batch = EventBatch(kind, Records(bytes(8) + fill * size, 8, [(0, 8 + size, size, 1)]))
        (line,) = lines_of(batch)
        check.validate(line)
        assert not check.is_valid(line | {"inner": {}})


def test_names_versions_and_descriptions() -> None:
    schema = json_schema(Everything)
    assert "$id" not in schema
    event, lost = schema["oneOf"]
    assert event["properties"]["word"]["description"] == "What it is called."
    assert list(event["properties"]) == [*Everything.__dataclass_fields__]
    assert lost["title"] == "Lost"
    assert json_schema(ExecEvent)["$id"] == "urn:ebpfstream:exec-event:1"
    assert json_schema(SyscallEvent)["$id"] == "urn:ebpfstream:syscall-event:1"
    assert "$id" not in json_schema(ExecEvent, ["pid"]), "it is another schema"

    @dataclass
    class More(ExecEvent):
        more: U8

    assert "$id" not in json_schema(More), "its base's version is not its own"
    with pytest.raises(ArgumentError, match="did you mean 'word'"):
        json_schema(Everything, ["wrd"])


def _types(event_type: type[Event]) -> dict[str, str]:
    properties = json_schema(event_type)["oneOf"][0]["properties"]
    found = {}
    for name, said in properties.items():
        parts = said.get("anyOf", [said])
        found[name] = "|".join(
            f"{part['type']}{':' + part['format'] if 'format' in part else ''}{part.get('maximum', '')}"
            for part in parts
        )
    return found


U8_, U32_, I32_, U64_ = (
    f"integer{2**8 - 1}",
    f"integer{2**32 - 1}",
    f"integer{2**31 - 1}",
    f"integer{2**64 - 1}",
)
# Of each version: whoever changes fields writes the next one, and leaves the old to read.
SNAPSHOTS: dict[str, dict[str, str]] = {
    "urn:ebpfstream:exec-event:1": {
        "pid": U32_,
        "uid": U32_,
        "comm": "string",
        "message": "string",
        "ppid": U32_,
        "tid": U32_,
        "gid": U32_,
        "filename": "string",
        "args": "array",
        "args_size": U32_,
        "args_truncated": "boolean",
        "args_unreadable": "boolean",
        "retval": I32_,
        "error": "string",
        "by_descriptor": "boolean",
        "cwd": "string",
        "cwd_truncated": "boolean",
        "parent_comm": "string",
        "start_time": "string:date-time",
        "start_monotonic": U64_,
        "session": U32_,
        "tty": "string",
        "pid_namespace": U32_,
        "namespace_pid": U32_,
        "cgroup_id": U64_,
        "container_id": "string|null",
        "cpu": U32_,
        "program": U8_,
        "weight": U32_,
        "sequence": U64_,
        "time": "string:date-time",
        "monotonic": U64_,
    },
    "urn:ebpfstream:syscall-event:1": {
        "pid": U32_,
        "uid": U32_,
        "comm": "string",
        "message": "string",
        "name": "string",
        "number": U32_,
        "arguments": "array",
        "result": "integer|null",
        "error": "string",
        "duration": "integer|null",
        "tid": U32_,
        "gid": U32_,
        "ppid": U32_,
        "cpu": U32_,
        "program": U8_,
        "weight": U32_,
        "sequence": U64_,
        "time": "string:date-time",
        "monotonic": U64_,
    },
}


@pytest.mark.parametrize("event_type", EVENT_TYPES.values())
def test_fields_change_with_the_version_alone(event_type: type[Event]) -> None:
    assert list(_types(event_type).items()) == list(SNAPSHOTS[json_schema(event_type)["$id"]].items())


@pytest.mark.kernel
@pytest.mark.anyio
async def test_real_events() -> None:
    check = validator(ExecEvent)
    async with trace_execve(failed=True, on_lost="yield") as events:
        subprocess.run(["/bin/true", "caf\u00e9 \x1b", "x"], check=True)
        with pytest.raises(OSError, match="No such file"):
            subprocess.run(["/nonexistent/program"])
        events.detach()
        seen = [line async for batch in events.batches() for line in lines_of(batch.with_lost(LOST))]
    for line in seen:
        check.validate(line)
    assert {line["retval"] for line in seen if "lost" not in line} >= {0, -2}


@pytest.mark.kernel
@pytest.mark.anyio
async def test_real_calls() -> None:
    check = validator(SyscallEvent)
    async with trace_syscalls("close", "exit_group", result=True) as events:
        subprocess.run(["/bin/true"], check=True)
        events.detach()
        seen = [line async for batch in events.batches() for line in lines_of(batch)]
    for line in seen:
        check.validate(line)
    assert {line["result"] for line in seen} >= {0, None}
