"""Values as text, and as JSON: what the generated decoders and encoders call."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from ebpfstream import text
from ebpfstream.events import Event
from ebpfstream.lost import Lost
from ebpfstream.text import json_string

_CACHED_STRINGS, _CACHED_LENGTH = 4096, 64

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Bytes that stand for themselves in a JSON string and on a terminal.
_PLAIN: Final = bytes(byte for byte in range(0x20, 0x7F) if byte not in b'"\\')


def _only(allowed: bytes, nul: bytes = b"\0") -> bytes:
    """For bytes.translate: what is allowed as it is, NUL as that, all else as NUL, which is quickly looked for."""
    kept = bytes(byte if byte in allowed else 0 for byte in range(1, 256))
    return nul + kept


_TEXT: Final = _only(_PLAIN)
_STRINGS: Final = _only(_PLAIN, b"\n")
_WORDS: Final = _only(text.SHELL_SAFE, b" ")


class Texts(dict[bytes, str]):
    """Text of char arrays that come again and again, by their bytes up to their whole length."""

    def __missing__(self, data: bytes) -> str:
        made = text.decode(data.partition(b"\0")[0])
        remember(self, data, made)
        return made


class JsonTexts(dict[bytes, bytes]):
    """The same as JSON."""

    def __missing__(self, data: bytes) -> bytes:
        made = json_text(data.partition(b"\0")[0])
        remember(self, data, made)
        return made


def remember(cache: dict[bytes, Any], data: bytes, made: object, longest: int = _CACHED_LENGTH) -> None:
    """Names are short, and few; what is longer than so many bytes is seldom the same again."""
    if len(data) <= longest:
        if len(cache) >= _CACHED_STRINGS:
            cache.clear()
        cache[data] = made


def json_text(data: bytes) -> bytes:
    """Text as JSON."""
    if 0 in data.translate(_TEXT):
        return json_string(text.decode(data)).encode()
    return b'"%b"' % data


def strings(data: bytes) -> tuple[str, ...]:
    """Strings with a NUL after each; the last may have been cut before its own."""
    return tuple(text.decode(data.removesuffix(b"\0")).split("\0")) if data else ()


def json_strings(data: bytes) -> bytes:
    """The same as JSON."""
    if not data:
        return b"[]"
    plain = data.translate(_STRINGS)
    if 0 in plain:
        return ("[" + ",".join(map(json_string, strings(data))) + "]").encode()
    return b'["%b"]' % plain.removesuffix(b"\n").replace(b"\n", b'","')


def json_command_line(data: bytes) -> bytes:
    """`text.command_line` of the same as JSON."""
    line = data.translate(_WORDS)
    # bytes' `in` and `startswith` take several times as long.
    if 0 in line or line.find(b"  ") >= 0 or line[:1] == b" ":  # an empty word would have to be quoted
        return json_string(text.command_line(strings(data))).encode()
    return b'"%b"' % line.removesuffix(b" ")


def json_value(value: Any) -> bytes:
    """A field's value as JSON."""
    match value:
        case str():
            return json_string(value).encode()
        case None:
            return b"null"  # orjson would take a KiB or more of memory for it
        case bytes():
            return json_text(value)
        case int() if not isinstance(value, bool):
            return b"%d" % value  # of any size
        case Event():
            members = (b'"%b":%b' % (name.encode(), json_value(of)) for name, of in vars(value).items())
            return b"{%b}" % b",".join(members)
        case tuple():
            return b"[%b]" % b",".join(map(json_value, value))
    return orjson.dumps(value)


def moment(nanoseconds: int) -> datetime:
    """The time so long after the epoch, to the microsecond."""
    return _EPOCH + timedelta(microseconds=nanoseconds // 1000)


class UntilSeconds(dict[int, bytes]):
    """Times as RFC 3339 up to their seconds, by these since the epoch; what follows is cheaper to make anew."""

    def __missing__(self, second: int) -> bytes:
        if len(self) >= _CACHED_STRINGS:
            self.clear()
        self[second] = made = f"{_EPOCH + timedelta(seconds=second):%Y-%m-%dT%H:%M:%S}".encode()
        return made


def encode_lost(lost: Iterable[Lost]) -> bytes:
    """Losses as JSON lines, of a form that no event has."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z
    return b"".join(orjson.dumps({"lost": one}, option=option) for one in lost)
