"""Values as text, and as JSON: what the generated decoders and encoders call."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from ebpfstream import text
from ebpfstream.events import Event
from ebpfstream.lost import Lost

_CACHED_STRINGS, _CACHED_LENGTH = 4096, 64

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Bytes that stand for themselves in a JSON string and on a terminal.
_PLAIN: Final = bytes(byte for byte in range(0x20, 0x7F) if byte not in b'"\\')
_PLAIN_OR_NUL: Final = _PLAIN + b"\0"


class Texts(dict[bytes, str]):
    """Text of char arrays that come again and again, by their bytes up to their whole length."""

    def __missing__(self, data: bytes) -> str:
        made = text.decode(data.partition(b"\0")[0])
        _remember(self, data, made)
        return made


class JsonTexts(dict[bytes, bytes]):
    """The same as JSON."""

    def __missing__(self, data: bytes) -> bytes:
        made = json_text(data.partition(b"\0")[0])
        _remember(self, data, made)
        return made


def _remember(cache: dict[bytes, Any], data: bytes, made: object) -> None:
    """Names are short, and few; what is long is seldom the same again."""
    if len(data) <= _CACHED_LENGTH:
        if len(cache) >= _CACHED_STRINGS:
            cache.clear()
        cache[data] = made


def json_text(data: bytes) -> bytes:
    """Text as JSON."""
    if data.translate(None, _PLAIN):
        return text.json_string(text.decode(data)).encode()
    return b'"%b"' % data


def strings(data: bytes) -> tuple[str, ...]:
    """Strings with a NUL after each; the last may have been cut before its own."""
    return tuple(text.decode(data.removesuffix(b"\0")).split("\0")) if data else ()


def json_strings(data: bytes) -> bytes:
    """The same as JSON."""
    if not data:
        return b"[]"
    if data.translate(None, _PLAIN_OR_NUL):
        return ("[" + ",".join(map(text.json_string, strings(data))) + "]").encode()
    return b'["%b"]' % data.removesuffix(b"\0").replace(b"\0", b'","')


def json_value(value: Any) -> bytes:
    """A field's value as JSON."""
    match value:
        case str():
            return text.json_string(value).encode()
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


class _Seconds(dict[int, bytes]):
    """The text of a time up to its seconds."""

    def __missing__(self, second: int) -> bytes:
        if len(self) >= _CACHED_STRINGS:
            self.clear()
        self[second] = made = f"{_EPOCH + timedelta(seconds=second):%Y-%m-%dT%H:%M:%S}".encode()
        return made


_seconds = _Seconds()


def rfc3339(nanoseconds: int) -> bytes:
    """The same as JSON."""
    second, rest = divmod(nanoseconds, 1_000_000_000)
    return b'"%b.%06dZ"' % (_seconds[second], rest // 1000)


def encode_lost(lost: Iterable[Lost]) -> bytes:
    """Losses as JSON lines, of a form that no event has."""
    option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z
    return b"".join(orjson.dumps({"lost": one}, option=option) for one in lost)
