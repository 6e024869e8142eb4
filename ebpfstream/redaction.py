"""Secrets in command lines, and in other text of events."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, get_args
from weakref import WeakKeyDictionary

from ebpfstream.batch import EventBatch
from ebpfstream.codec import shortest
from ebpfstream.errors import ArgumentError
from ebpfstream.events import LENGTH_SUFFIX, Char, Tail, layout
from ebpfstream.records import Records, Run, add_records

# Whoever may execute programs chooses what patterns see, and has no need to be kind: none may take time that grows
# with the square of a text's length.  So names are matched from their beginning alone, their lookahead does not come
# back, and values are passed over with their match, save those that may be options.
_KEY: Final = r"passw(?:or)?d|passphrase|pass(?![a-z])|pwd|secret|token|api[_-]?key|access[_-]?key|credential"
_NAME: Final = rf"(?<![\w./-])(?=[\w.-]*(?:{_KEY}))[\w.-]++"
_OPTION: Final = rf"(?<![\w./-])(?=-[\w.-]*(?:{_KEY}))[\w.-]++"
_QUOTED: Final = r""""(?:[^"\\]|\\.)*+(?:"|\Z)|'[^']*+(?:'|\Z)"""
_PLAIN: Final = (
    r"""(?:[^\s"']|["'](?![\s,}\])]|\Z))*+"""  # a quotation mark before these closes an outer quotation
)
_VALUE: Final = rf"(?:(?:{_QUOTED})(?:(?![,}}\])]){_PLAIN})?|{_PLAIN})"
_KEY_WORDS: Final = ("pass", "pwd", "secret", "token", "key", "credential")

SECRETS: Final[Mapping[str, Sequence[str]]] = {
    # --password SECRET
    rf"""(?si){_OPTION}["']?,?\s++(?:(?=(-\S*+))|({_VALUE}))""": _KEY_WORDS,
    # --password=SECRET, PGPASSWORD=SECRET, ?token=SECRET, "password": "SECRET", X-Api-Key: SECRET, pass:SECRET
    rf"""(?si){_NAME}(?:["']\s?)?(?:=|:(?!//)\s?)({_VALUE})""": _KEY_WORDS,
    # curl -u user:SECRET, --user user:SECRET, --proxy-user user:SECRET; docker -u 1000:1000 is none
    rf"""(?i)(?<!\S)(?:-u|--user|--proxy-user)(?:=|\s*+)(?!\d+:\d+(?!\S))"""
    rf"""(?:"[^":]*+:([^"]*+)|'[^':]*+:([^']*+)|[^\s:]*+:(?!//)({_PLAIN}))""": (
        "-u",
        "--user",
        "--proxy-user",
    ),
    # scheme://user:SECRET@host, cut off as well; scheme://host:80/@ has none
    r"://[^\s/:@?#]*+:(?!\d{1,5}(?:[/?#\s]|\Z))(?:([^\s/?#]*)@|([^\s@]{0,256}+)(?:@|\Z))": ("://",),
    # Authorization: Bearer SECRET
    rf"""(?i)authorization["']?\s?[:=]\s*+["']?"""
    rf"""(?:(?:apikey|basic|bearer|digest|negotiate|ntlm|token)\s++)?({_PLAIN})""": ("authorization",),
    # mysql -pSECRET
    rf"(?s)(?<!\S)-p(?!\s)({_VALUE})": ("mysql", "mariadb"),
    # sshpass -p SECRET
    rf"(?s)(?<!\S)-p\s*+({_VALUE})": ("sshpass",),
    # Keys that tell what they are: AWS, GitHub, GitLab, Slack
    r"\b(?:AKIA|ASIA)(?:[A-Z0-9]{16}\b|[A-Z0-9]*+\Z)": ("akia", "asia"),
    r"\b(?:gh[pousr]_|github_pat_|glpat-)[\w-]{16,}+": (
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
    ),
    r"\bxox[abeoprs]-[\w-]{10,}+": ("xox",),
}
"""Patterns of the usual forms of secrets: options, variables, URLs, headers, keys.

Each with words, in lower case, of which a record must hold one for the pattern to be tried.
"""

_MARK: Final = b"***"
_STOPS: Final = b" \t\n\r\v\f\"'"


class _Texts(NamedTuple):
    """Where the records of a type hold text."""

    size: int
    shortest: int
    chars: list[tuple[int, int]]  # offset, size
    # Offset of its length; whether it is text; whether it is several strings.
    tails: list[tuple[int, bool, bool]]


class Redaction:
    """Replaces in all text of events what patterns find, by `***`.

    A pattern is a regular expression; what its groups match is replaced, or all that it matches if it has none.  It
    sees the bytes of one field at a time, arguments with a space between them, and takes effect on the bytes
    themselves, so that nothing that is made of them shows a secret.  The number of arguments stays, and so do all
    other fields, such as `args_size`.

    A space within an argument looks like one between two.  So where a match began with an argument, or before it, and
    what was found ends at a blank or a quotation mark within, all the rest of the argument is replaced: `--password`
    finds "two words" whole.

    Text is what is declared as str, or as strings: not bytes, nor what lies in nested structs and unions.  Of a record
    that does not fit its type all bytes are looked at, and secrets become as many asterisks.

    What no pattern knows is not found: this keeps the usual secrets out of logs, and promises no more.  SECRETS take
    time that grows with the text alone; of your own patterns make sure of that, as who starts programs chooses what
    they see.  Raises ArgumentError for a pattern that is none.
    """

    def __init__(self, patterns: Iterable[str] = SECRETS) -> None:
        given = [patterns] if isinstance(patterns, str) else list(patterns)
        if not given:
            raise ArgumentError("there is no pattern to redact by: give one or more, or redact=True")
        self._always: list[re.Pattern[bytes]] = []
        self._by_words: dict[Sequence[str], list[re.Pattern[bytes]]] = {}
        for pattern in given:
            words = SECRETS.get(pattern) if isinstance(pattern, str) else None
            (self._always if words is None else self._by_words.setdefault(words, [])).append(
                _compiled(pattern)
            )
        self._texts: WeakKeyDictionary[type[Any], _Texts] = WeakKeyDictionary()

    def redact(self, batch: EventBatch[Any]) -> EventBatch[Any]:
        """The batch, or one with the secrets replaced; records without any stay as they are."""
        records = batch.records
        places = [
            (start, size)
            for position, stride, size, count in records.runs
            for start in range(position + records.prefix, position + records.prefix + stride * count, stride)
        ]
        changed: dict[int, bytes] = {}
        suspects = self._suspects(records.data, places)
        if suspects:
            texts = self._texts.get(batch.event_type) or self._texts.setdefault(
                batch.event_type, _texts(batch.event_type)
            )
            for number, patterns in suspects.items():
                start, size = places[number]
                sample = records.data[start : start + size]
                made = _redacted(sample, texts, records.padding, patterns)
                if made != sample:
                    changed[number] = made
        return batch.with_records(_rebuilt(records, changed)) if changed else batch

    def _suspects(self, data: bytes, places: list[tuple[int, int]]) -> dict[int, list[re.Pattern[bytes]]]:
        """The records to look at, by number, each with the patterns to try: most hold no word of any."""
        suspects = {number: list(self._always) for number in range(len(places))} if self._always else {}
        if self._by_words:
            lowered = data.lower()
            order = sorted(range(len(places)), key=places.__getitem__)
            starts = [places[number][0] for number in order]
            for words, patterns in self._by_words.items():
                indices = {index for word in words for index in _holding(lowered, word.encode(), starts)}
                for number in (order[index] for index in indices):
                    suspects.setdefault(number, []).extend(patterns)
        return suspects


def wanted(usual: bool, patterns: Sequence[str]) -> bool | list[str]:
    """What `forward` takes as `redact`: the usual secrets, what patterns find, both, or False."""
    return [*SECRETS, *patterns] if usual and patterns else list(patterns) or usual


def _compiled(pattern: object) -> re.Pattern[bytes]:
    try:
        if not isinstance(pattern, str):
            raise TypeError("give a str")
        return re.compile(pattern.encode())
    except (re.error, TypeError, UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise ArgumentError(f"{pattern!r} is no regular expression: {error}") from None


def _holding(data: bytes, word: bytes, starts: list[int]) -> Iterator[int]:
    """The records, by their place among `starts`, with the word in them or in the gap behind them."""
    at = data.find(word)
    while at >= 0:
        index = bisect_right(starts, at)
        if index:
            yield index - 1
        if index == len(starts):
            return
        at = data.find(word, starts[index])


def _texts(event_type: type[Any]) -> _Texts:
    plan = layout(event_type)
    offsets = {member.name: member.offset for member in plan.members}
    return _Texts(
        plan.size,
        shortest(event_type, plan),
        [
            (offset, kind.size)
            for name, kind, offset in plan.members
            if isinstance(kind, Char) and plan.types.get(name) is str
        ],
        [
            (
                offsets[name + LENGTH_SUFFIX],
                _is_text(plan.types[name]),
                plan.types[name] is not str or kind.function is not None,
            )
            for name, kind in plan.kinds.items()
            if isinstance(kind, Tail)
        ],
    )


def _is_text(type: Any) -> bool:
    return type is str or any(map(_is_text, get_args(type)))


def _redacted(sample: bytes, texts: _Texts, padding: int, patterns: Sequence[re.Pattern[bytes]]) -> bytes:
    lengths = [int.from_bytes(sample[at : at + 4], "little") for at, _, _ in texts.tails]
    least = texts.size + sum(lengths) if lengths else texts.shortest
    most = len(sample) if lengths else texts.size + padding
    if not least <= len(sample) <= most:
        return _masked(sample, patterns)
    head = bytearray(sample[: texts.size])
    for offset, size in texts.chars:
        whole = bytes(head[offset : offset + size])  # the last one may end early
        text = whole.partition(b"\0")[0]
        if (made := _replaced(text, patterns, listed=False)) != text:
            head[offset : offset + size] = made[: len(whole)].ljust(len(whole), b"\0")
    rest: list[bytes] = []
    position = texts.size
    for (at, is_text, listed), length in zip(texts.tails, lengths, strict=True):
        tail = sample[position : position + length]
        position += length
        if is_text:
            tail = _replaced(tail, patterns, listed=listed)
            head[at : at + 4] = len(tail).to_bytes(4, "little")
        rest.append(tail)
    return b"".join((head, *rest, sample[position:]))


def _replaced(text: bytes, patterns: Sequence[re.Pattern[bytes]], *, listed: bool) -> bytes:
    """With `***` in the place of secrets; NULs between strings stay."""
    parts: list[bytes] = []
    position = 0
    for start, end in _spans(text, patterns, listed=listed):
        parts.append(text[position:start])
        parts.append(b"\0".join(_MARK if part else b"" for part in text[start:end].split(b"\0")))
        position = end
    return b"".join((*parts, text[position:])) if parts else text


def _masked(sample: bytes, patterns: Sequence[re.Pattern[bytes]]) -> bytes:
    """A record that does not fit its type, of the same length."""
    made = bytearray(sample)
    for start, end in _spans(sample, patterns, listed=True):
        made[start:end] = bytes(byte and ord("*") for byte in sample[start:end])
    return bytes(made)


def _spans(text: bytes, patterns: Sequence[re.Pattern[bytes]], *, listed: bool) -> Iterator[tuple[int, int]]:
    """What is to be replaced, in order; what overlaps or touches is one."""
    shown = text.replace(b"\0", b" ")
    found: list[tuple[int, int]] = []
    for pattern in patterns:
        groups = range(1, pattern.groups + 1) if pattern.groups else range(1)
        for match in pattern.finditer(shown):
            for start, end in map(match.span, groups):
                if start >= 0:
                    found.append((start, _end(text, match.start(), end) if listed else end))
    first = last = 0
    for start, end in sorted(found):
        if start > last:
            if first < last:
                yield first, last
            first, last = start, end
        last = max(last, end)
    if first < last:
        yield first, last


def _end(text: bytes, start: int, end: int) -> int:
    """Where what was found ends, whose match began at `start`: see Redaction."""
    if end == len(text) or text[end] not in _STOPS or (start and b"\0" not in text[start - 1 : end]):
        return end
    found = text.find(b"\0", end)
    return len(text) if found < 0 else found


def _rebuilt(records: Records, changed: dict[int, bytes]) -> Records:
    """The records with other samples in the places of some, and nothing of the old ones."""
    prefix = records.prefix
    runs: list[Run] = []
    parts: list[bytes] = []
    end = number = 0
    for position, stride, size, count in records.runs:
        for at in range(position, position + stride * count, stride):
            here, made = (stride, size), records.data[at : at + stride]
            if number in changed:
                sample = changed[number]
                if len(sample) != size:
                    here = (prefix + len(sample) + 7) // 8 * 8, len(sample)
                made = (made[:prefix] + sample).ljust(here[0], b"\0")
            parts.append(made)
            end = add_records(runs, end, *here)
            number += 1
    return records._replace(data=b"".join(parts), runs=runs, discarded=0)
