"""Secrets in command lines, and in other text of events."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from struct import Struct, pack_into
from typing import Any, Final

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError
from ebpfstream.events import LENGTH_SUFFIX, Char, Layout, Tail, layout
from ebpfstream.records import Records, Run

_NAMES: Final = (
    r"(?:[\w.-]*[_.-])?"
    r"(?:passw(?:or)?d|pwd|pass|passphrase|secret|token|api[_-]?key|access[_-]?key|credentials?)"
)

SECRETS: Final = (
    # --password SECRET, --db-password=SECRET, -token SECRET
    rf"(?i)(?:^|\s)--?{_NAMES}(?:=|\s+)(\S+)",
    # NAME=value, as of env(1): PGPASSWORD=…, AWS_SECRET_ACCESS_KEY=…
    rf"(?i)(?:^|\s)\w*(?:{_NAMES})\w*=(\S+)",
    # curl -u user:SECRET, --user user:SECRET, --proxy-user user:SECRET
    r"(?:^|\s)(?:-u|--user|--proxy-user)(?:=|\s*)[^\s:]+:(\S+)",
    # scheme://user:SECRET@host
    r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/:@]*:([^\s@]+)@",
    # Authorization: Bearer SECRET
    r"(?i)authorization:\s*(?:\w+\s+)?(\S+)",
    # mysql -pSECRET
    r"^(?:\S*/)?(?:mysql|mariadb)\S*\s(?:.*\s)?-p(\S+)",
    # Keys that tell what they are: AWS, GitHub, Slack
    r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bgh[pousr]_[A-Za-z0-9]{36,}",
    r"\bxox[abpr]-[A-Za-z0-9-]{10,}",
)
"""Patterns of the usual forms of secrets: options, variables, URLs, headers, keys."""

_MARK: Final = b"***"
_LENGTH: Final = Struct("<I")  # of a tail, in the struct


class Redaction:
    """Replaces in all text of events what patterns find, by `***`.

    A pattern is a regular expression; what its groups match is replaced, or all that it matches if it has none.  It
    sees the bytes of one field at a time, the arguments of a command line with a space between them, and takes effect
    on the bytes themselves, so that nothing that is made of them shows a secret.  The number of arguments stays.

    What no pattern knows is not found: this keeps the usual secrets out of logs, and promises no more.  Raises
    ArgumentError for a pattern that is none.
    """

    def __init__(self, patterns: Iterable[str] = SECRETS) -> None:
        if isinstance(patterns, str):
            patterns = [patterns]
        self._patterns: list[re.Pattern[bytes]] = []
        for pattern in patterns:
            try:
                self._patterns.append(re.compile(pattern.encode()))
            except re.error as error:
                raise ArgumentError(f"{pattern!r} is no regular expression: {error}") from None

    def redact(self, batch: EventBatch[Any]) -> EventBatch[Any]:
        """The batch, or one with the secrets replaced; records without any stay as they are."""
        plan = layout(batch.event_type)
        chars = [
            member
            for member in plan.members
            if isinstance(member.kind, Char) and plan.types.get(member.name) is str
        ]
        tails = [name for name, kind in plan.kinds.items() if isinstance(kind, Tail)]
        changed: dict[int, bytes] = {}
        for number, sample in enumerate(batch.records.samples()):
            if len(sample) >= plan.size and (made := self._redacted(sample, plan, chars, tails)) is not None:
                changed[number] = made
        return batch.with_records(_rebuilt(batch.records, changed)) if changed else batch

    def _redacted(
        self, sample: bytes, plan: Layout, chars: Sequence[Any], tails: Sequence[str]
    ) -> bytes | None:
        """The sample without secrets; None if it has none, or does not fit its type."""
        head = bytearray(sample[: plan.size])
        found = False
        for member in chars:
            size = member.kind.size
            text = bytes(head[member.offset : member.offset + size]).partition(b"\0")[0]
            if (made := self._replaced(text)) != text:
                found = True
                head[member.offset : member.offset + size] = made[:size].ljust(size, b"\0")
        offsets = {member.name: member.offset for member in plan.members}
        rest = [bytes(head)]
        position = plan.size
        for name in tails:
            at = offsets[name + LENGTH_SUFFIX]
            (length,) = _LENGTH.unpack_from(sample, at)
            text = sample[position : position + length]
            position += length
            if position > len(sample):
                return None
            made = self._replaced(text)
            found |= made != text
            pack_into("<I", head, at, len(made))
            rest.append(made)
        if not found:
            return None
        rest[0] = bytes(head)
        return b"".join(rest) + sample[position:]

    def _replaced(self, text: bytes) -> bytes:
        """With `***` in the place of secrets; NULs between strings stay."""
        for pattern in self._patterns:
            shown = text.replace(b"\0", b" ")
            spans = [span for found in pattern.finditer(shown) for span in _spans(found)]
            for start, end in sorted(spans, reverse=True):
                hidden = b"\0".join(_MARK if part else b"" for part in text[start:end].split(b"\0"))
                text = text[:start] + hidden + text[end:]
        return text


def _spans(found: re.Match[bytes]) -> Iterator[tuple[int, int]]:
    groups = range(1, found.re.groups + 1) if found.re.groups else range(1)
    for group in groups:
        start, end = found.span(group)
        if start < end:
            yield start, end


def _rebuilt(records: Records, changed: dict[int, bytes]) -> Records:
    """The records with other samples in the places of some."""
    runs: list[Run] = []
    parts: list[bytes] = []
    end = 0
    for number, sample in enumerate(records.samples()):
        sample = changed.get(number, sample)
        size = len(sample)
        stride = (records.prefix + size + 7) // 8 * 8
        parts.append(bytes(records.prefix) + sample + bytes(stride - records.prefix - size))
        if runs and runs[-1][1:3] == (stride, size):
            runs[-1] = (*runs[-1][:3], runs[-1][3] + 1)
        else:
            runs.append((end, stride, size, 1))
        end += stride
    return records._replace(data=b"".join(parts), runs=runs, discarded=0)
