"""What stands between a stream and its sinks: secrets, fields, and the schema of what comes out."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from ebpfstream import codec, redaction
from ebpfstream.errors import ArgumentError
from ebpfstream.lost import Lost
from ebpfstream.redaction import Redaction
from ebpfstream.schema import json_schema
from ebpfstream.shaping import Shaping
from ebpfstream.testing import ExampleEvent, make_batch

SECRET = "geheim"
BATCH = make_batch([ExampleEvent(number, "sh", f"run {number}") for number in range(10)], lost=(Lost(0, 3),))


@pytest.mark.parametrize(
    "line",
    [
        f"x --password {SECRET}",
        f"x --db-password={SECRET}",
        f"env PGPASSWORD={SECRET} psql",
        f"curl -u me:{SECRET} http://host",
        f"git clone https://me:{SECRET}@host/x",
        f"curl -H Authorization: Bearer {SECRET}",
        f"mysql -p{SECRET}",
    ],
)
def test_usual_secrets_are_replaced(line: str) -> None:
    redacted = Redaction().redact(make_batch([ExampleEvent(1, "x", line), ExampleEvent(2, "y", "plain")]))
    first, second = redacted
    assert first.message == line.replace(SECRET, "***")
    assert (first.number, second.message) == (1, "plain")
    assert SECRET.encode() not in redacted.records.data + redacted.to_json_lines()


def test_what_is_no_secret_stays() -> None:
    batch = make_batch([ExampleEvent(1, "cat", "cat /etc/passwd --verbose")])
    assert Redaction().redact(batch) is batch


def test_patterns_of_ones_own() -> None:
    (event,) = Redaction(["id=(\\d+)"]).redact(make_batch([ExampleEvent(1, "x", "id=123 x=4")]))
    assert event.message == "id=*** x=4"
    with pytest.raises(ArgumentError, match=r"'\(' is no regular expression"):
        Redaction(["("])


def test_where_then_fields() -> None:
    shaping: Shaping[ExampleEvent] = Shaping(
        ExampleEvent, where=lambda event: event.number % 3 == 0, fields={"number": "n"}
    )
    lines = [json.loads(line) for line in shaping.shape(BATCH).to_json_lines().splitlines()]
    assert lines[1:] == [{"n": 0}, {"n": 3}, {"n": 6}, {"n": 9}]
    assert lines[0]["lost"]["count"] == 3
    with pytest.raises(ArgumentError, match="ExampleEvent has no field 'numbr'; did you mean 'number'"):
        Shaping(ExampleEvent, fields=["numbr"])


@pytest.mark.parametrize("fields", [None, {"number": "n", "comm": "comm"}])
def test_lines_are_what_the_schema_says(fields: dict[str, str] | None) -> None:
    check = jsonschema.Draft202012Validator(json_schema(ExampleEvent, fields))
    shaping: Shaping[ExampleEvent] = Shaping(ExampleEvent, fields=fields)
    for line in shaping.shape(BATCH).to_json_lines().splitlines():
        value = json.loads(line)
        check.validate(value)
        assert not check.is_valid(value | {"another": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["number", "number"], "each with a name of its own"),
        ({"number": "n", "comm": "n"}, "each with a name of its own"),
        ([], "give one or more fields"),
        ({"number": "lost"}, "cannot be called 'lost'"),
        ({"number": "\udcff"}, "give printable text"),
        ({"number": 3}, "cannot be called 3"),
        ("nmber", "no field 'nmber'; did you mean 'number'"),
        ([3], "no field 3"),
    ],
)
def test_fields_that_cannot_be(fields: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Shaping(ExampleEvent, fields=fields)
    with pytest.raises(ArgumentError, match=message):
        BATCH.select(fields)


def test_nothing_to_do_costs_nothing() -> None:
    shaping: Shaping[ExampleEvent] = Shaping(ExampleEvent)
    assert shaping.shape(BATCH) is BATCH


def test_fields_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout takes longer to find out than many events to be written."""
    shaping: Shaping[ExampleEvent] = Shaping(ExampleEvent, fields=["comm"], redact=True)
    batch = make_batch([ExampleEvent(1, "x", "token=abc")])
    expected = shaping.shape(batch).to_json_lines()
    for module in (codec, redaction):
        monkeypatch.setattr(module, "layout", None)
    assert shaping.shape(batch).to_json_lines() == expected
