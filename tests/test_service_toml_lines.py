"""In which line a key of a TOML file stands."""

from __future__ import annotations

from typing import Any

import pytest

from ebpfstream.service.toml_lines import Lines, TomlError, dotted, loads

TEXT = """\
# a comment, and [[source]] in it
title = "x" # another

[service]
a.b = 1
a.c.d = 2
"quoted.key" = 3

[[source]]
text = '''
[[source]]
inner = 1
'''
list = [
  # [x]
  {deep = 1, more = [{x = 1}]},
  2,
]
inline = {x = {y = 1}}
  [source.filters]
  pid = 1
[[source.sink]]
address = 1
[[source.sink]]
address = 2
[source.sink.more]
x = 1
[[ source ]]  # the second
[[source . sink]]
address = 3
"""


def test_lines() -> None:
    lines = Lines(TEXT)
    expected: dict[tuple[Any, ...], int] = {
        (): 1,
        ("title",): 2,
        ("service",): 4,
        ("service", "a"): 5,
        ("service", "a", "b"): 5,
        ("service", "a", "c"): 6,
        ("service", "a", "c", "d"): 6,
        ("service", "quoted.key"): 7,
        ("source",): 9,
        ("source", 0): 9,
        ("source", 0, "text"): 10,
        ("source", 0, "list"): 14,
        ("source", 0, "list", 0, "deep"): 14,
        ("source", 0, "list", 0, "more", 0, "x"): 14,
        ("source", 0, "list", 1): 14,
        ("source", 0, "inline", "x", "y"): 19,
        ("source", 0, "filters"): 20,
        ("source", 0, "filters", "pid"): 21,
        ("source", 0, "sink"): 22,
        ("source", 0, "sink", 0): 22,
        ("source", 0, "sink", 0, "address"): 23,
        ("source", 0, "sink", 1): 24,
        ("source", 0, "sink", 1, "address"): 25,
        ("source", 0, "sink", 1, "more"): 26,
        ("source", 0, "sink", 1, "more", "x"): 27,
        ("source", 1): 28,
        ("source", 1, "sink", 0): 29,
        ("source", 1, "sink", 0, "address"): 30,
        # those that are not there
        ("source", 1, "filters", "pid"): 28,
        ("source", 2, "kind"): 9,
        ("nothing",): 1,
    }
    assert {key: lines.of(key) for key in expected} == expected
    crlf = Lines(TEXT.replace("\n", "\r\n"))
    assert {key: crlf.of(key) for key in expected} == expected


def test_every_key_has_a_line() -> None:
    def keys(value: Any, key: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        parts = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        return [key, *(found for name, part in parts for found in keys(part, (*key, name)))]

    found = keys(loads(TEXT), ())
    assert set(found) == set(Lines(TEXT)._lines)
    assert len(found) > 30


def test_a_statement_that_is_too_long_for_its_line_to_be_told() -> None:
    text = "[a]\nx = 1\ny = [\n" + 600 * "1,\n" + "]\nz = 1\n"
    lines = Lines(text)
    assert [lines.of(("a", name)) for name in "xyz"] == [2, 1, 1]
    with pytest.raises(TomlError, match="it begins in this line") as caught:
        loads(text.partition("]\nz")[0])
    assert caught.value.line == 3


def test_keys_as_they_are_written() -> None:
    assert dotted(("source", 0, "sink", 12, "a-b_c")) == "source[0].sink[12].a-b_c"
    assert dotted(("a b", "c\x1b.")) == r"'a b'.'c\x1b.'"
