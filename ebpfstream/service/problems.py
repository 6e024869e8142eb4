"""What is wrong with a configuration, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ebpfstream.catalogue import EVENT_TYPES
from ebpfstream.errors import ArgumentError
from ebpfstream.names import did_you_mean, near
from ebpfstream.service.readers import shown
from ebpfstream.service.toml_lines import Key
from ebpfstream.sink import open_sink
from ebpfstream.sink_url import OptionError

_NEEDED: Final = {
    "source": "there is none: add a table [[source]]",
    "kind": f"this key is needed: give {', '.join(EVENT_TYPES)} or program",
    "sink": "there is none: add a table [[source.sink]]",
    "address": "this key is needed: give an address such as stdout: or file:/var/log/execs.jsonl",
}

Heading = tuple[str, ...]
"""The names in a table's heading: ("source", "filters")."""


class Problem(NamedTuple):
    """Something that is wrong, and where."""

    key: Key
    text: str


class SeveralProblemsError(ValueError):
    """Problems within one table, by their keys there."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


class Known(NamedTuple):
    """The keys that there are."""

    keys: Mapping[Heading, Sequence[str]]
    kinds: Mapping[str, Sequence[str]]
    """Of a source's keys that not all have: the kinds of sources that do."""


def translated(errors: Iterable[Mapping[str, Any]], data: Any, known: Known) -> Iterator[Problem]:
    """Pydantic's errors (`ValidationError.errors()`) of what `data` was."""
    for error in errors:
        key: Key = error["loc"]
        match error["type"]:
            case "missing":
                yield Problem(key, _NEEDED[str(key[-1])] + _meant(key, data))
            case "extra_forbidden":
                yield Problem(key, _no_key(key, data, known))
            case "value_error":
                reason = error["ctx"]["error"]
                if isinstance(reason, SeveralProblemsError):
                    yield from (Problem((*key, *problem.key), problem.text) for problem in reason.problems)
                else:
                    yield Problem(key, str(reason))
            case "model_type":  # in a list of tables, something else
                yield Problem(key, f"{shown(error['input'])} is not a table")
            case _:
                yield Problem(key, error["msg"])


def _meant(key: Key, data: Any) -> str:
    """A sink may have keys of any name, so nothing else says that one is misspelled."""
    *table, name = key
    nearest = near("address", _at(data, table)) if name == "address" else []
    return f"; is it {nearest[0]!r}?" if nearest else ""


def _no_key(key: Key, data: Any, known: Known) -> str:
    *path, last = key
    name, heading = str(last), tuple(part for part in path if isinstance(part, str))
    if elsewhere := _elsewhere(name, heading, known):
        return f"there is no key {name!r} here: {elsewhere}"
    keys = known.keys[heading]
    if heading == ("source",):
        kind = _at(data, path).get("kind")
        if any(kind in kinds for kinds in known.kinds.values()):
            keys = [key for key in keys if kind in known.kinds.get(key, [kind])]
    if nearest := near(name, keys):
        return f"there is no key {name!r}{did_you_mean(map(repr, nearest))}"
    return f"there is no key {name!r}; there are {', '.join(keys)}"


def _elsewhere(name: str, heading: Heading, known: Known) -> str:
    """Where a key belongs that stands below this heading, if it is another table's."""
    for other in (heading[:-1], *known.keys):
        if other and name in known.keys[other] and other != heading:
            before = f", before {_shown(heading)}" if heading[:-1] == other else ""
            return f"it belongs below {_shown(other)}{before}"
    return ""


def _shown(heading: Heading) -> str:
    name = ".".join(heading)
    return f"[[{name}]]" if heading in (("source",), ("source", "sink")) else f"[{name}]"


def _at(data: Any, key: Iterable[str | int]) -> Any:
    for part in key:
        data = data[part]
    return data


def sink_problems(address: str, given: Mapping[str, Any], known: Known) -> list[Problem]:
    """Why there cannot be such a sink; what is wrong with an option beside the address, by its name."""
    found: list[Problem] = []
    options = dict(given)
    while True:
        try:
            open_sink(address, **options)
        except OptionError as error:
            if error.option not in options:
                return [*found, Problem(("address",), str(error))]
            text = error.problem
            if not error.is_known and (elsewhere := _elsewhere(error.option, ("source", "sink"), known)):
                text = f"there is no option {error.option!r}: {elsewhere}"
            found.append(Problem((error.option,), text))
            del options[error.option]  # what is wrong with the others shows without it
        except ArgumentError as error:
            named = re.match(r"(\w+)=", str(error))
            key = named[1] if named and named[1] in options else "address"
            # Beside other problems it may be one that they brought about.
            return found or [Problem((key,), str(error))]
        else:
            return found
