"""What of a changed configuration takes effect while the service runs (SIGHUP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ebpfstream.service.config import Config, SinkConfig, SourceConfig

_SHAPING: Final = ("where", "fields", "redact", "redact_patterns")


@dataclass
class Difference:
    """From an old configuration to a new one."""

    log_level: str | None = None
    """The new one, if it is another."""
    filters: dict[str, SourceConfig] = field(default_factory=dict)
    """The new sources, by name, whose filters are to be set."""
    shaping: dict[str, SourceConfig] = field(default_factory=dict)
    """Those with another condition, other fields or another redaction."""
    applicable: list[str] = field(default_factory=list)
    """The changed keys that the above stands for, such as source.execs.where."""
    restart: list[str] = field(default_factory=list)
    """The changed keys that need a restart, such as source.execs.buffer_size; sources and sinks added or removed."""

    def __bool__(self) -> bool:
        return bool(self.applicable or self.restart)


def difference(old: Config, new: Config) -> Difference:
    """What has changed.  Sources and sinks are the same if their names are."""
    found = Difference()
    changed = _changed(old.service.model_dump(), new.service.model_dump(), "service")
    if "service.log_level" in changed:
        found.log_level = new.service.log_level
        found.applicable.append("service.log_level")
    found.restart += [key for key in changed if key != "service.log_level"]
    before, after = ({source.name: source for source in config.sources} for config in (old, new))
    for name, source in before.items():
        if name in after:
            _compare(source, after[name], found)
    found.restart += _come_and_gone(before, after, "source")
    return found


def merged(old: Config, new: Config) -> Config:
    """What runs once the new configuration has been applied as far as it can be: to compare the next one with."""
    after = {source.name: source for source in new.sources}
    level = {"log_level": new.service.log_level}
    return old.model_copy(
        update={
            "service": old.service.model_copy(update=level),
            "sources": tuple(_merged(source, after.get(source.name)) for source in old.sources),
        }
    )


def _merged(old: SourceConfig, new: SourceConfig | None) -> SourceConfig:
    if new is None or new.kind != old.kind:
        return old
    return old.model_copy(update={key: getattr(new, key) for key in ("filter_config", *_SHAPING)})


def _compare(old: SourceConfig, new: SourceConfig, found: Difference) -> None:
    here = f"source.{new.name}"
    filters = _changed(old.filter_config.model_dump(), new.filter_config.model_dump(), f"{here}.filters")
    changed = _changed(_source(old), _source(new), here)
    shaping = [key for key in changed if key.removeprefix(f"{here}.") in _SHAPING]
    if old.kind == new.kind:
        if filters:
            found.filters[new.name] = new
        if shaping:
            found.shaping[new.name] = new
        found.applicable += [*filters, *shaping]
        changed = [key for key in changed if key not in shaping]
    else:
        changed += filters
    found.restart += changed
    before, after = ({sink.name: _sink(sink) for sink in source.sinks} for source in (old, new))
    for name, sink in before.items():
        if name in after:
            found.restart += _changed(sink, after[name], f"{here}.sink.{name}")
    found.restart += _come_and_gone(before, after, f"{here}.sink")


def _source(config: SourceConfig) -> dict[str, Any]:
    """Its own keys; fields with their order."""
    made = {
        key: getattr(config, key)
        for key in SourceConfig.model_fields
        if key not in ("filter_config", "sinks")
    }
    return made | {"fields": None if config.fields is None else list(config.fields.items())}


def _sink(config: SinkConfig) -> dict[str, Any]:
    return {"address": config.address, **config.options}


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], table: str) -> list[str]:
    keys = dict.fromkeys((*old, *new))
    return [f"{table}.{key}" for key in keys if (key in old, old.get(key)) != (key in new, new.get(key))]


def _come_and_gone(old: Mapping[str, Any], new: Mapping[str, Any], table: str) -> list[str]:
    added = [f"{table}.{name} (added)" for name in new if name not in old]
    return added + [f"{table}.{name} (removed)" for name in old if name not in new]
