r"""The kernel's bytes as text, and back; as JSON, for shells, and safe for terminals.

Names and arguments are bytes to the kernel; mostly, but not always, they are UTF-8.  As text, each
byte that is not UTF-8 becomes `\xHH` (lower-case), and so that this can be undone, a backslash that
was followed by such a thing already becomes `\x5c`.  All other text is as it was.  The result can
be printed and encoded anywhere, which text with surrogate escapes (PEP 383) cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from json import encoder
from string import ascii_letters, digits
from typing import Final

SHELL_SAFE: Final = b"@%+=:,./-_" + (ascii_letters + digits).encode()
"""What shells take as it is."""

_BACKSLASH: Final = ord("\\")
_LOOKS_ESCAPED: Final = re.compile(rb"\\(?=x[0-9a-f]{2})")
_ESCAPED: Final = re.compile(rb"\\x([0-9a-f]{2})")
_SHELL_SAFE: Final = re.compile(f"[{re.escape(SHELL_SAFE.decode())}]+")
_SHELL_SAFE_LINE: Final = re.compile(f"[{re.escape(SHELL_SAFE.decode())} ]+")
_SHELL_NAMED: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\x1b": "\\e", "\\": "\\\\", "'": "\\'"}
_SHELL_ESCAPES: Final = re.compile(r"\\(?!x[0-9a-f]{2})|'|[^\\']", re.DOTALL)

_quote = encoder.encode_basestring


def decode(data: bytes) -> str:
    """Bytes → text, reversibly; see the module's description."""
    if _BACKSLASH in data:  # to look for two bytes takes several times as long
        data = _LOOKS_ESCAPED.sub(rb"\\x5c", data)
    return data.decode("utf-8", "backslashreplace")


def encode(text: str) -> bytes:
    """The bytes that `decode` made this text of."""
    return _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), text.encode())


def encodable(text: str) -> str:
    """Text with escapes for what cannot be encoded, such as the bytes of a path that are not UTF-8 (PEP 383)."""
    return text.encode(errors="backslashreplace").decode()


def hyphenated(name: str) -> str:
    """A class's or struct's name in lower case, its words apart: ExecEvent, and exec_event, → exec-event."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).replace("_", "-").lower()


def json_string(text: str) -> str:
    """Text as a JSON string, quotes included, in which only printable characters stand for themselves.

    JSON itself lets DEL, the C1 controls and direction overrides through; terminals act on them.
    """
    quoted = _quote(text)
    return quoted if quoted.isprintable() else _without_unprintables(quoted)


def _without_unprintables(text: str) -> str:
    return "".join(character if character.isprintable() else _json_escape(character) for character in text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[index : index + 4]}" for index in range(0, len(units), 4))


def command_line(arguments: Iterable[str]) -> str:
    """The arguments as one line that bash reads back as the same bytes, whatever they hold.

    Plain words stand as they are; those with blanks or signs in single quotes; those with anything
    that is not printable, or not UTF-8, as `$'…'` with escapes.
    """
    words = list(arguments)
    line = " ".join(words)
    if _SHELL_SAFE_LINE.fullmatch(line) and line.count(" ") == len(words) - 1 and "" not in words:
        return line  # the usual case, several times faster
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if _SHELL_SAFE.fullmatch(word):
        return word
    if word.isprintable() and "\\x" not in word:
        return "'" + word.replace("'", "'\"'\"'") + "'"
    # What `decode` escaped is an escape to bash as well.
    return "$'" + _SHELL_ESCAPES.sub(_shell_escape, word) + "'"


def _shell_escape(match: re.Match[str]) -> str:
    character = match[0]
    if character in _SHELL_NAMED:
        return _SHELL_NAMED[character]
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def printable(text: str) -> str:
    """Text for a terminal: what is not printable as escapes, and the rest as it is."""
    return text if text.isprintable() else _without_unprintables(text)
