from __future__ import annotations

import json
import os
import subprocess
from string import ascii_letters, digits

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ebpfstream import text, values

# Pieces that make trouble, beside arbitrary bytes.
_pieces = st.sampled_from(
    [
        b"\\",
        b"x",
        b"5c",
        b"ff",
        b"u0041",
        b"'",
        b'"',
        b"$",
        b" ",
        b"-",
        b"\n",
        b"\x01",
        b"\x1b",
        b"\x7f",
        b"\xff",
        b"\xc3\xa9",
        b"\xe2\x82",
        b"\xc2\x9b",
        b"\xe2\x80\xae",
        b"\xf0\x9f\x98\x80",
        b"\xf3\xa0\x80\x81",
    ]
)
_bytes = st.one_of(st.binary(max_size=30), st.lists(_pieces, max_size=12).map(b"".join))


@given(_bytes)
@example(rb"\xff")
@example(b"\\\xff")
@example(rb"\x5cxff")
@example(b"\\xf\xab")
def test_every_byte_survives(data: bytes) -> None:
    assert text.encode(text.decode(data)) == data


@given(_bytes)
def test_json_is_printable_and_can_be_mapped_back(data: bytes) -> None:
    quoted = text.json_string(text.decode(data))
    assert quoted.isprintable()
    assert text.encode(json.loads(quoted)) == data


def test_what_the_escapes_look_like() -> None:
    assert text.decode(b"caf\xc3\xa9 \\n") == "café \\n"
    assert text.decode(b"\xff\\xzz") == "\\xff\\xzz"
    assert text.decode(rb"printf \x41") == r"printf \x5cx41"
    assert text.json_string("é\x1b[31m\x7f\u202e\U000e0001") == r'"é\u001b[31m\u007f\u202e\udb40\udc01"'


def test_plain_words_are_not_quoted() -> None:
    assert text.command_line(["ls", "-l", "/tmp/a_b", "K=v"]) == "ls -l /tmp/a_b K=v"
    assert text.command_line(["", "a b", "it's"]) == "'' 'a b' 'it'\"'\"'s'"
    assert (
        text.command_line(["a\nb", "\\xff", "\\xff'\\", "\u202e"]) == r"$'a\nb' $'\xff' $'\xff\'\\' $'\u202e'"
    )


@pytest.mark.parametrize("size", [2000])
def test_bash_reads_the_same_bytes_back(size: int) -> None:
    found: list[bytes] = []

    @given(st.lists(_bytes.map(lambda data: data.replace(b"\0", b"")), max_size=20))
    def collect(words: list[bytes]) -> None:
        found.extend(words)

    collect()
    words = found[:size]
    line = text.command_line(map(text.decode, words))
    assert line.isprintable()
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"],
        stdout=subprocess.PIPE,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
        check=True,
    )
    assert shown.stdout.split(b"\0")[:-1] == words


def test_names_of_files_can_be_encoded() -> None:
    assert text.encodable(os.fsdecode(b"caf\xe9 \xc3\xa9")) == r"caf\udce9 é"


def test_terminals_get_no_controls() -> None:
    assert text.printable("a\x1b[2J\x9b\tb é") == r"a\u001b[2J\u009b\u0009b é"


@pytest.mark.parametrize("data", [rb"\x", rb"\xf", rb"\xfz", rb"\xz", rb"\xFF", rb"\\", rb"\u0041"])
def test_what_only_resembles_an_escape_stays_as_it_is(data: bytes) -> None:
    assert text.decode(data) == data.decode()
    assert text.encode(data.decode()) == data


@pytest.mark.parametrize("byte", range(128))
def test_every_ascii_byte_in_json(byte: int) -> None:
    data = b"a" + bytes([byte])
    named = {0x22: r"\"", 0x5C: r"\\", 8: r"\b", 9: r"\t", 10: r"\n", 12: r"\f", 13: r"\r"}
    shown = named.get(byte, chr(byte) if 0x20 <= byte < 0x7F else f"\\u{byte:04x}")
    assert values.json_text(data) == f'"a{shown}"'.encode()
    if byte:
        assert values.json_strings(data + b"\0" + data + b"\0") == f'["a{shown}","a{shown}"]'.encode()


def test_c1_controls_in_json() -> None:
    for code in range(0x80, 0xA0):
        assert values.json_text(chr(code).encode()) == f'"\\u{code:04x}"'.encode()


@pytest.mark.parametrize(
    ("data", "strings"),
    [
        (b"", []),
        (b"\0", [""]),
        (b"\0\0", ["", ""]),
        (b"a\0\0\0", ["a", "", ""]),
        (b"a\0b", ["a", "b"]),  # cut before its NUL
        (b"\xff\0\0", ["\\xff", ""]),
    ],
)
def test_empty_strings_are_strings(data: bytes, strings: list[str]) -> None:
    assert values.strings(data) == tuple(strings)
    assert json.loads(values.json_strings(data)) == strings


def test_command_lines_of_plain_words_with_blanks_and_nothing() -> None:
    assert text.command_line(["a", ""]) == "a ''"
    assert text.command_line(["", "a"]) == "'' a"
    assert text.command_line(["a b"]) == "'a b'"
    assert text.command_line(["a b", "c"]) == "'a b' c"
    assert text.command_line([]) == ""


WORDS = st.one_of(
    st.text(alphabet="ab-/=%+@:._0 '\"\\", max_size=4).map(str.encode),
    st.binary(max_size=3),
    st.sampled_from([rb"\x41", b"\xff", "é".encode(), b"\xed\xa0\x80", b"\n", b"\x7f", b"x" * 5000]),
)


@given(st.lists(WORDS, max_size=4).map(b"\0".join), st.booleans())
@example(b"", False)
@example(b"", True)
@example(b"\0", True)
@example(b"\0a", True)
@example(b"a\0", True)
@example(b"a\0\0b", False)
@example(b"a b\0c", True)
@example(b"git\0-C\0/srv/x\0--porcelain=v2", False)  # cut before its NUL
@example(b"a\n\0b", True)
@example(b"\xff\0a", True)
def test_strings_and_their_command_line_in_json(data: bytes, ended: bool) -> None:
    """Made of the bytes at once, they are as those made of the strings one by one."""
    data += b"\0" * ended
    words = values.strings(data)
    assert values.json_strings(data) == ("[" + ",".join(map(text.json_string, words)) + "]").encode()
    assert values.json_command_line(data) == text.json_string(text.command_line(words)).encode()
    assert values.json_text(data) == text.json_string(text.decode(data)).encode()


@pytest.mark.parametrize("byte", range(1, 256))
def test_every_byte_in_a_command_line(byte: int) -> None:
    data = b"a\0b" + bytes([byte]) + b"\0"
    line = text.command_line(values.strings(data))
    assert values.json_command_line(data) == text.json_string(line).encode()
    assert (line == f"a b{chr(byte)}") == (chr(byte) in ascii_letters + digits + "_@%+=:,./-")


def test_escapes_of_five_digits_for_bash() -> None:
    assert text.command_line(["\U0001d173"]) == r"$'\U0001d173'"
    assert text.command_line(["\uffff"]) == r"$'\uffff'"


@pytest.mark.parametrize("name", ["ProcessEnd", "process_end"])
def test_a_class_and_the_struct_that_it_is_of_have_one_name(name: str) -> None:
    assert text.hyphenated(name) == "process-end"
