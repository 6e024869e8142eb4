"""The configuration that there is to begin with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream.service.config import EXAMPLE, load, parse
from ebpfstream.service.toml_lines import loads
from ebpfstream.sink import Delivery
from ebpfstream.sink_url import _parameters
from ebpfstream.sinks.file import FileSink
from ebpfstream.sinks.kafka import KafkaSink


def uncommented(lines: list[str], number: int) -> list[str]:
    return [line[1:] if index == number else line for index, line in enumerate(lines)]


def can_be(line: str) -> bool:
    """Prose has a space behind its `#`."""
    return re.match(r"#\S", line) is not None and not line.startswith("##")


def blocks(lines: list[str]) -> list[tuple[int, int]]:
    """From where to where a table is commented out, with those below it."""
    found: list[tuple[int, int]] = []
    for start, line in enumerate(lines):
        if line == "#[[source]]" or (line == "#[[source.sink]]" and not (found and start < found[-1][1])):
            ends = (
                index
                for index in range(start + 1, len(lines))
                if lines[index].startswith("# ---")
                or lines[index] == "#[[source]]"
                or (line == lines[index] == "#[[source.sink]]")
            )
            found.append((start, next(ends, len(lines))))
    return found


@pytest.fixture
def example(tmp_path: Path) -> tuple[list[str], Path]:
    (tmp_path / "hello.c").touch()
    return EXAMPLE.read_text().splitlines(), tmp_path / "example.toml"


def test_the_example(example: tuple[list[str], Path]) -> None:
    lines, path = example
    assert load(EXAMPLE).sources[0].kind == "execve"
    tried = []
    inside = {index for start, end in blocks(lines) for index in range(start, end)}
    for number, line in enumerate(lines):
        if can_be(line) and number not in inside:
            parse("\n".join(uncommented(lines, number)), path)
            tried.append(line)
    assert len(blocks(lines)) == 4, "one more in example.toml is counted here"
    for start, end in blocks(lines):
        opened = [
            line[1:] if start <= index < end and re.match(r"#\S", line) else line
            for index, line in enumerate(lines)
        ]
        parse("\n".join(opened), path)
        for number in range(start, end):
            if can_be(opened[number]):
                parse("\n".join(uncommented(opened, number)), path)
                tried.append(opened[number])
    assert len(tried) > 50


def test_the_example_has_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    everything = [line.lstrip("#") if re.match(r"#\S", line) else line for line in lines]
    data = loads("\n".join(everything))

    def those(tables: list[Any]) -> set[str]:
        return set().union(*tables)

    made = load(EXAMPLE)
    assert set(data["service"]) == set(type(made.service).model_fields)
    source_keys = those(data["source"])
    assert source_keys | {"filter_config", "sinks"} == set(type(made.sources[0]).model_fields) | {
        "filters",
        "sink",
    }
    assert set(data["source"][0]["filters"]) == set(type(made.sources[0].filter_config).model_fields)
    file, kafka, _ = data["source"][0]["sink"]
    assert set(file) == {"name", "address"} | set(_parameters(FileSink, ["path", "mode"]))
    assert set(Delivery.__annotations__) <= set(file)
    assert set(kafka) - {"name", "address"} <= set(_parameters(KafkaSink, []))


def test_the_example_says_the_defaults(example: tuple[list[str], Path]) -> None:
    """Where what is commented out is called a default, uncommenting it changes nothing."""
    lines, path = example
    plain = parse("\n".join(lines), path).model_dump()
    examples = {
        "name", "user", "where", "fields", "redact_patterns", "pid", "ppid", "uid", "gid", "comm", "cgroup", "every",
        "compress", "retry_for", "dead_letters", "durable",
    }  # fmt: skip
    inside = {index for start, end in blocks(lines) for index in range(start, end)}
    compared = 0
    for number, line in enumerate(lines):
        if can_be(line) and number not in inside and line[1:].split()[0] not in examples:
            made = parse("\n".join(uncommented(lines, number)), path)
            dumped = made.model_dump()
            for sink in (one for source in dumped["sources"] for one in source["sinks"]):
                for key in {"fsync", "queue_size", "spool_size", "spool_fsync"} & set(sink):
                    del sink[key]
            assert dumped == plain, line
            sinks = [config.sources[0].sinks[0].make() for config in (made, parse("\n".join(lines), path))]
            for name in Delivery.__annotations__:
                assert getattr(sinks[0], name) == getattr(sinks[1], name), line
            compared += 1
    assert compared == 17


def test_the_example_s_sink_can_be_opened(tmp_path: Path) -> None:
    """/var/log is there; the file is made."""
    text = EXAMPLE.read_text().replace("/var/log", str(tmp_path))
    sink = parse(text, tmp_path / "x.toml").sources[0].sinks[0].make()

    async def use() -> None:
        async with sink:
            pass

    anyio.run(use)
    assert [path.name for path in tmp_path.iterdir()] == ["ebpfstream-execs.jsonl"]
