"""What a changed configuration changes while the service runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpfstream.service.config import Config, parse
from ebpfstream.service.reload import Difference, difference, merged

OLD = """
[service]
name = "x"
[[source]]
kind = "execve"
name = "execs"
[source.filters]
uid = 0
[[source.sink]]
name = "archive"
address = "file:/var/log/x"
rotate = "1MB"
[[source]]
kind = "syscalls"
calls = ["openat"]
fields = ["pid", "uid"]
[[source.sink]]
address = "blackhole:"
"""


def read(text: str) -> Config:
    return parse(text, Path("/etc/ebpfstream/execs.toml"))


def compared(*changes: tuple[str, str]) -> Difference:
    text = OLD
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return difference(read(OLD), read(text))


def test_nothing_has_changed() -> None:
    assert not compared()
    assert compared() == Difference()
    assert not compared(('[service]\nname = "x"', '# moved\n[service]\nname = "x"\ndeadline = "10000ms"'))


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ("uid = 0", "uid = 1\npid = 2", ["source.execs.filters.pid", "source.execs.filters.uid"]),
        ("uid = 0", "uid = 0\nexclude_self = false", ["source.execs.filters.exclude_self"]),
        ('name = "execs"', 'name = "execs"\nwhere = "pid"', ["source.execs.where"]),
        ('name = "execs"', 'name = "execs"\nredact = true\nredact_patterns = ["x"]',
            ["source.execs.redact", "source.execs.redact_patterns"]),
        ('["pid", "uid"]', '["uid", "pid"]', ["source.syscalls.fields"]),
        ('["pid", "uid"]', '["pid=x", "uid"]', ["source.syscalls.fields"]),
        ('fields = ["pid", "uid"]', "", ["source.syscalls.fields"]),
    ],
)  # fmt: skip
def test_what_a_reload_applies(old: str, new: str, keys: list[str]) -> None:
    found = compared((old, new))
    assert found
    assert (found.applicable, found.restart, found.log_level) == (keys, [], None)
    name = keys[0].split(".")[1]
    changed = [*found.filters, *found.shaping]
    assert changed == [name]
    assert bool(found.filters) is keys[0].startswith(f"source.{name}.filters.")
    made = {**found.filters, **found.shaping}[name]
    assert made == next(source for source in read(OLD.replace(old, new)).sources if source.name == name)


def test_a_reload_of_the_level() -> None:
    found = compared(('[service]\nname = "x"', '[service]\nname = "x"\nlog_level = "debug"'))
    assert found == Difference(log_level="debug", applicable=["service.log_level"])


@pytest.mark.parametrize(
    ("old", "new", "keys"),
    [
        ('name = "x"', 'name = "y"\nlisten = ""\ndeadline = 1', ["service.name", "service.deadline", "service.listen"]),
        ('name = "execs"', 'name = "execs"\nbuffer_size = "8MiB"\nfailed = true',
            ["source.execs.buffer_size", "source.execs.failed"]),
        ('["openat"]', '["openat", "openat2"]', ["source.syscalls.calls"]),
        ("file:/var/log/x", "file:/var/log/y", ["source.execs.sink.archive.address"]),
        ('"1MB"', '"2MB"', ["source.execs.sink.archive.rotate"]),
        ('rotate = "1MB"', "", ["source.execs.sink.archive.rotate"]),
        ('rotate = "1MB"', 'rotate = "1MB"\nkeep = 1', ["source.execs.sink.archive.keep"]),
        ('"archive"', '"other"', ["source.execs.sink.other (added)", "source.execs.sink.archive (removed)"]),
        ('name = "execs"', 'name = "all"', ["source.all (added)", "source.execs (removed)"]),
    ],
)  # fmt: skip
def test_what_needs_a_restart(old: str, new: str, keys: list[str]) -> None:
    assert compared((old, new)) == Difference(restart=keys)


def test_a_source_of_another_kind_is_another() -> None:
    """Its condition is one on events of another type."""
    found = compared(
        ('kind = "execve"\nname = "execs"', 'kind = "syscalls"\nname = "execs"\nwhere = "number == 0"'),
        ("uid = 0", "uid = 1"),
    )
    keys = ["source.execs.kind", "source.execs.where", "source.execs.filters.uid"]
    assert found == Difference(restart=keys)


def test_several_changes() -> None:
    found = compared(
        ("uid = 0", "uid = 1"),
        ('["pid", "uid"]', '["pid"]'),
        ('"1MB"', '"2MB"'),
        ('name = "x"', 'name = "x"\nlog_level = "error"\nlisten = ""'),
    )
    assert (found.log_level, list(found.filters), list(found.shaping)) == ("error", ["execs"], ["syscalls"])
    assert found.applicable == ["service.log_level", "source.execs.filters.uid", "source.syscalls.fields"]
    assert found.restart == ["service.listen", "source.execs.sink.archive.rotate"]


def test_what_runs_after_a_reload() -> None:
    """Compared with that, the next one is told of whole: what has not been applied is still to be."""
    text = OLD.replace("uid = 0", "uid = 1").replace('"1MB"', '"2MB"').replace('["pid", "uid"]', '["pid"]')
    text = text.replace('name = "x"', 'name = "y"\nlog_level = "error"')
    old, new = read(OLD), read(text)
    running = merged(old, new)
    assert difference(running, new) == Difference(
        restart=["service.name", "source.execs.sink.archive.rotate"]
    )
    assert difference(old, running).restart == []
    assert difference(running, old).applicable == difference(new, old).applicable
    assert running.sources[0].filters["uid"] == 1


def test_what_runs_after_sources_came_and_went() -> None:
    text = OLD.replace('kind = "execve"\nname = "execs"', 'kind = "syscalls"\nname = "execs"')
    text = text.replace("uid = 0", "uid = 1").replace('["pid", "uid"]', '["pid"]\nname = "calls"')
    old, new = read(OLD), read(text)
    assert merged(old, new) == old
    assert difference(merged(old, new), new) == difference(old, new)
