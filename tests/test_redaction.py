from __future__ import annotations

import json
import string
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpfstream import descriptions
from ebpfstream.batch import EventBatch
from ebpfstream.c_types import Record
from ebpfstream.errors import ArgumentError, DecodeError
from ebpfstream.events import U32, Char, Comm, Computed, Event, Tail
from ebpfstream.records import Records, Run
from ebpfstream.redaction import SECRETS, Redaction
from ebpfstream.shaping import Shaping
from ebpfstream.testing import make_batch
from ebpfstream.text import command_line

ROOT = Path(__file__).resolve().parents[1]
S = "S3cr3t"


def joined(names: bytes) -> str:
    return names.decode("utf-8", "replace").replace("\0", "/")


def unpacked(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data)


@dataclass
class Exec(Event):
    """As an exec event, with all kinds of text."""

    number: U32
    comm: Comm
    message: Annotated[str, Computed(command_line, ("args",))]
    filename: Annotated[str, Tail()]
    args: Annotated[tuple[str, ...], Tail()]
    cwd: Annotated[str, Tail(joined)]
    blob: Annotated[bytes, Tail()]
    numbers: Annotated[tuple[int, ...], Tail(unpacked)]


def execs(*command_lines: tuple[str, ...], **fields: Any) -> EventBatch[Exec]:
    values = {"comm": "comm", "filename": "/bin/x", "cwd": b"/", "blob": b"", "numbers": b""} | fields
    return make_batch(
        [Exec(number=number, message="", args=args, **values) for number, args in enumerate(command_lines)],
        type=Exec,
    )


def raw(kind: type[Any], *samples: bytes, prefix: int = 8) -> EventBatch[Any]:
    data, runs = b"", list[Run]()
    for sample in samples:
        stride = prefix + (len(sample) + 7) // 8 * 8
        runs.append((len(data), stride, len(sample), 1))
        data += (b"\xee" * prefix + sample).ljust(stride, b"\0")
    return EventBatch(kind, Records(data, prefix, runs))


def redacted(*args: str) -> tuple[str, ...]:
    made: EventBatch[Exec] = Redaction().redact(execs(args))
    return next(iter(made)).args


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("x", "--password", S), ("x", "--password", "***")),
        (("x", "--password", f"a {S}"), ("x", "--password", "***")),
        (("x", "--password", f" {S}", "y"), ("x", "--password", " ***", "y")),
        (("x", f"--password=a {S}", "y"), ("x", "--password=***", "y")),
        (("x", f"--password=it's {S}", "y"), ("x", "--password=***", "y")),
        (("x", "--password", f"-{S}"), ("x", "--password", "***")),
        (("x", "--password", "--token", S), ("x", "--password", "***", "***")),
        (("x", "--db-password", S, "-v"), ("x", "--db-password", "***", "-v")),
        (("x", "--client-secret-value", S), ("x", "--client-secret-value", "***")),
        (("x", f"--dbPassword={S}"), ("x", "--dbPassword=***")),
        (("x", f"-pass={S}"), ("x", "-pass=***")),
        (("java", f"-Djavax.keyStorePassword={S}", "Main"), ("java", "-Djavax.keyStorePassword=***", "Main")),
        (("env", f"PGPASSWORD=a {S}", "psql"), ("env", "PGPASSWORD=***", "psql")),
        (("docker", f"--env=DB_PASSWORD={S}"), ("docker", "--env=DB_PASSWORD=***")),
        (("docker", f"-eDB_PASSWD={S}"), ("docker", "-eDB_PASSWD=***")),
        (("sh", "-c", f"a;TOKEN={S} b"), ("sh", "-c", "a;TOKEN=*** b")),
        (("sh", "-c", f'x --password="a {S}" -e y'), ("sh", "-c", "x --password=*** -e y")),
        (("sh", "-c", f"x --password='a {S}' -e y"), ("sh", "-c", "x --password=*** -e y")),
        (("sh", "-c", f'x --password="a\\"{S} b" y'), ("sh", "-c", "x --password=*** y")),
        (("sh", "-c", f"curl -d 'password={S}' h"), ("sh", "-c", "curl -d 'password=***' h")),
        (("curl", "-d", f'{{"password": "{S}"}}'), ("curl", "-d", '{"password": ***}')),
        (("curl", f"https://h/?api_key={S}"), ("curl", "https://h/?api_key=***")),
        (("curl", "-H", f"X-Api-Key: {S}"), ("curl", "-H", "X-Api-Key: ***")),
        (("curl", "-H", f"Authorization: Bearer {S}", "h"), ("curl", "-H", "Authorization: Bearer ***", "h")),
        (("curl", "-H", f"Authorization: Own {S}", "h"), ("curl", "-H", "Authorization: ***", "h")),
        (("sh", "-c", f"curl -H 'authorization:{S}' h"), ("sh", "-c", "curl -H 'authorization:***' h")),
        (("curl", "-u", f"bob:{S}", "h"), ("curl", "-u", "bob:***", "h")),
        (("curl", "-u", f"bob:a {S}", "h"), ("curl", "-u", "bob:***", "h")),
        (("curl", f"-ubob:{S}"), ("curl", "-ubob:***")),
        (("curl", f"--proxy-user=bob:{S}"), ("curl", "--proxy-user=bob:***")),
        (("sh", "-c", f'curl -u "bob:a {S}" h'), ("sh", "-c", 'curl -u "bob:***" h')),
        (("sh", "-c", f"curl -u 'bob:a {S}' h"), ("sh", "-c", "curl -u 'bob:***' h")),
        (("git", "clone", f"https://bob:{S}@h/x"), ("git", "clone", "https://bob:***@h/x")),
        (("git", "clone", f"https://bob:a@{S}@h/x"), ("git", "clone", "https://bob:***@h/x")),
        (("git", "clone", f"https://bob:a/{S}@h/x"), ("git", "clone", "https://bob:***@h/x")),
        (("redis-cli", "-u", f"redis://:{S}@h"), ("redis-cli", "-u", "redis://:***@h")),
        (("mysql", "-px", f"-p{S}", "db"), ("mysql", "-p***", "-p***", "db")),
        (("/bin/sh", "/usr/bin/mysqlx", f"-p{S}"), ("/bin/sh", "/usr/bin/mysqlx", "-p***")),
        (("sh", "-c", f"mariadb -p{S} -e x"), ("sh", "-c", "mariadb -p*** -e x")),
        (("sshpass", "-p", S, "ssh"), ("sshpass", "-p", "***", "ssh")),
        (("openssl", "-passin", f"pass:{S}"), ("openssl", "-passin", "pass:***")),
        (("aws", "AKIAIOSFODNN7EXAMPLE"), ("aws", "***")),
        (("x", "ghp_" + "a" * 36), ("x", "***")),
        (("x", "xoxb-" + "1" * 12), ("x", "***")),
    ],
)
def test_usual_secrets(args: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert redacted(*args) == expected


@pytest.mark.parametrize(
    "args",
    [
        ("cat", "/etc/passwd"),
        ("passwd", "root"),
        ("docker", "run", "-v", "/etc/passwd:/etc/passwd:ro", "-u", "1000:1000"),
        ("curl", "http://h:80/a@b", "https://h/secret"),
        ("ls", "-pl", "token"),
        ("x", "--password=", "--password"),
        (),
        ("",),
    ],
)
def test_what_is_no_secret_stays(args: tuple[str, ...]) -> None:
    batch = execs(args, ("mkdir", "-pv", "x"))
    assert Redaction().redact(batch) is batch


PLACES: list[tuple[str, ...]] = [
    ("x", "--password", "{}"),
    ("x", "--api-key={}", "y"),
    ("env", "PGPASSWORD={}", "psql"),
    ("curl", "-u", "bob:{}", "http://h"),
    ("curl", "-H", "Authorization: Bearer {}"),
    ("mysql", "-p{}"),
]


@given(
    st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))).map(tuple), max_size=6)
)
def test_events_stay_as_many_in_their_order(lines: list[tuple[str, ...]]) -> None:
    batch = execs(*lines)
    made = Redaction().redact(batch)
    assert [event.number for event in made] == list(range(len(lines)))
    assert [len(event.args) for event in made] == [len(event.args) for event in batch]
    plain = [index for index, event in enumerate(made) if event.args == list(batch)[index].args]
    samples, before = list(made.records.samples()), list(batch.records.samples())
    assert [samples[index] for index in plain] == [before[index] for index in plain]


@pytest.mark.parametrize("place", PLACES)
@given(tail=st.text(string.ascii_letters + " -='\"\\&;:/@", max_size=12))
def test_no_part_of_a_secret_appears_in_any_form(place: tuple[str, ...], tail: str) -> None:
    secret = f"Zq{tail}Zq"
    batch = execs(tuple(part.format(secret) for part in place), ("ls", "-l"))
    made = Redaction().redact(batch)
    for form in (made.to_json_lines().decode(), str(list(made)), made.records.data.decode("latin-1")):
        assert "Zq" not in form
    assert list(made)[1] == list(batch)[1]


def test_all_text_is_looked_at_and_nothing_else() -> None:
    batch = execs(
        ("x",),
        comm=f"pwd={S}",
        filename=f"/x?token={S}",
        cwd=b"a\0pass=" + S.encode() + b"\0",
        blob=b"token=" + S.encode(),
        numbers=b"pwd=abcd",
    )
    (event,) = Redaction().redact(batch)
    assert (event.comm, event.filename, event.cwd) == ("pwd=***", "/x?token=***", "a/pass=***/")
    assert event.blob == b"token=" + S.encode()
    assert event.numbers == struct.unpack("<2I", b"pwd=abcd")


def test_only_records_with_secrets_change() -> None:
    lines = [("ls", "-l"), ("x", f"--token={S}"), ("ls",), ("ls",), ("x", "--token", S), ("ls", "-a", "-b")]
    batch = execs(*lines)[1:]
    made = Redaction().redact(batch)
    assert [event.number for event in made] == [1, 2, 3, 4, 5]
    assert [event.args for event in made] == [
        ("x", "--token=***"),
        *lines[2:4],
        ("x", "--token", "***"),
        lines[5],
    ]
    samples = list(made.records.samples())
    assert samples[1:3] == list(batch.records.samples())[1:3]
    assert S.encode() not in made.records.data
    assert made.lost == batch.lost
    assert made.wall_clock_offset == batch.wall_clock_offset


def test_what_stands_before_a_sample_stays() -> None:
    batch = raw(
        Args, *(struct.pack("<I", len(args)) + args for args in (b"x\0", b"token=S3cr3t\0")), prefix=20
    )
    made = Redaction().redact(batch).records
    assert [made.data[at : at + 20] for at, *_ in made.runs] == [b"\xee" * 20] * 2


@dataclass
class Args(Event):
    args: Annotated[tuple[str, ...], Tail()]


@dataclass
class Flat(Event):
    number: U32
    line: Annotated[str, Char(20)]
    other: U32


def test_fixed_events_and_their_columns() -> None:
    samples = [struct.pack("<I20sI", n, b"pwd=%d" % n if n % 3 else b"nothing", n) for n in range(200)]
    data = b"".join(bytes(8) + sample + bytes(4) for sample in samples)
    batch = EventBatch(Flat, Records(data, 8, [(0, 40, 28, 200)]))
    made = Redaction().redact(batch)
    assert made.records.runs == [(0, 40, 28, 200)]
    assert made.to_numpy()["number"].tolist() == list(range(200))
    for number, line, other in zip(
        *(made.to_numpy()[name] for name in ("number", "line", "other")), strict=True
    ):
        assert line.tobytes() == (b"pwd=***" if number % 3 else b"nothing").ljust(20, b"\0")
        assert other == number


def test_char_arrays_do_not_overflow() -> None:
    """What replaces a short secret is longer than that."""
    made = Redaction().redact(raw(Flat, struct.pack("<I20sI", 1, b"x token=a token=b  x", 7)))
    assert list(made) == [Flat(1, "x token=*** token=**", 7)]
    behind_the_end = Redaction().redact(raw(Flat, struct.pack("<I20sI", 1, b"pwd=abc\0pwd=S3cr3t", 7)))
    assert b"S3cr3t" not in behind_the_end.records.data


def test_text_that_ends_as_far_as_it_is_filled() -> None:
    found = descriptions.parse(["ev", [["pid", "unsigned int"], ["msg", "char", [64]]], "struct"], 68)
    assert isinstance(found, Record)
    kind = found.event_type
    made = Redaction().redact(raw(kind, struct.pack("<I", 1) + b"--password=S3cr3t"))
    assert json.loads(made.to_json_lines()) == {"pid": 1, "msg": "--password=***"}


@dataclass
class EndsInText(Event):
    number: U32
    blob: Annotated[bytes, Char(32)]
    line: Annotated[str, Char(12)]


def test_text_at_the_end_of_a_class_of_ones_own_must_be_whole() -> None:
    """What the codec decodes as a misfit is looked at as one: all its bytes go to the dead letters."""
    short = struct.pack("<I32s", 1, b"--password=S3cr3t") + b"abc"
    made = Redaction().redact(raw(EndsInText, short))
    ((sample, _),) = made.without_undecodable()[1]
    assert sample == short.replace(b"S3cr3t", b"******")
    whole = struct.pack("<I32s12s", 1, b"--password=S3cr3t", b"pwd=S3cr3t")
    assert list(Redaction().redact(raw(EndsInText, whole))) == [
        EndsInText(1, b"--password=S3cr3t".ljust(32, b"\0"), "pwd=***")
    ]


def test_arguments_that_were_cut() -> None:
    for given_, expected in (
        (b"x\0--password=abc", ("x", "--password=***")),
        (b"x\0--password\0abc", ("x", "--password", "***")),
        (b"x\0https://bob:abc", ("x", "https://bob:***")),
        (b"x\0sh -c 'password=\"a b", ("x", "sh -c 'password=***")),
        (b"x\0AKIAAB", ("x", "***")),
    ):
        (event,) = Redaction().redact(raw(Args, struct.pack("<I", len(given_)) + given_))
        assert event.args == expected


def test_records_that_do_not_fit_keep_their_length_and_error() -> None:
    """Their bytes go to the dead letters."""
    good = struct.pack("<I", 2) + b"x\0"
    bad = struct.pack("<I", 999) + b"x\0--password\0S3cr3t\0"
    batch = raw(Args, good, bad, b"P", good)
    made = Redaction().redact(batch)
    _, before = batch.without_undecodable()
    _, after = made.without_undecodable()
    assert after[0][0] == bad.replace(b"S3cr3t", b"******")
    assert [str(error) for _, error in after] == [str(error) for _, error in before]
    assert [isinstance(chunk, DecodeError) for chunk in made.decode()] == [False, True, True, False]
    ((spanning, _),) = Redaction([r"--\w+ \w+"]).redact(raw(Args, bad)).without_undecodable()[1]
    assert spanning == struct.pack("<I", 999) + b"x\0**********\0******\0"
    flat = raw(Flat, struct.pack("<I20sI", 1, b"pwd=abc", 7) + b"pwd=S3cr3t padding")
    assert b"S3cr3t" not in Redaction().redact(flat).records.data


def test_padding_behind_the_tails_stays() -> None:
    args = b"token=S3cr3t\0"
    batch = raw(Args, struct.pack("<I", len(args)) + args + b"\xdd\xdd\xdd")
    (sample,) = Redaction().redact(batch).records.samples()
    assert sample == struct.pack("<I", 10) + b"token=***\0" + b"\xdd\xdd\xdd"


def test_records_in_another_order_than_their_bytes() -> None:
    args = [b"a\0", b"token=S3cr3t\0", b"b\0"]
    batch = raw(Args, *(struct.pack("<I", len(one)) + one for one in args))
    records = batch.records._replace(runs=batch.records.runs[::-1])
    made = Redaction().redact(EventBatch(Args, records))
    assert [event.args for event in made] == [("b",), ("token=***",), ("a",)]


def test_patterns_of_ones_own() -> None:
    def own(pattern: str, *args: str) -> tuple[str, ...]:
        made: EventBatch[Exec] = Redaction([pattern]).redact(execs(args))
        return next(iter(made)).args

    assert own(r"id=(\d+)", "id=123-x", "y 123") == ("id=***-x", "y 123")
    assert own(r"id=\d+", "id=123-x") == ("***-x",)
    assert own(r"id=((\d+)-(\d+))", "id=1-2", "y") == ("id=***", "y")
    assert own(r"(?:a(\d)|b(\d))", "a1b2") == ("a***b***",)
    assert own(r"--login (\S+ \S+)", "--login", "bob", "pw", "x") == ("--login", "***", "***", "x")
    assert own(r"^x (\S+)", "x", "one two", "y") == ("x", "***", "y")
    assert own(r"in (\S+)", "sign in now please", "y") == ("sign in *** please", "y")
    assert own(r"id=(a(b)c)", "id=abc", "y") == ("id=***", "y")
    assert own(r"--login (.*) end", "--login", "a", "", "b", "end") == ("--login", "***", "", "***", "end")
    assert own(r"\d*", "abc") == ("abc",)
    assert own("é", "café") == ("caf***",)
    (named,) = Redaction([r"^(comm)$"]).redact(execs(("x",)))
    assert named.comm == "***"
    cut = raw(Args, struct.pack("<I", 4) + b"b2x ")
    assert list(Redaction([r"(?:a(\d)|b(\d))"]).redact(cut)) == [Args(("b***x ",))]
    (event,) = Redaction([*SECRETS, r"id=(\d+)"]).redact(execs(("id=12", "--token=x")))
    assert event.args == ("id=***", "--token=***")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["("], r"'\(' is no regular expression"),
        (["\udcff"], "is no regular"),
        ([3], "3 is no"),
        ([], "no pattern"),
    ],
)
def test_patterns_that_are_none(patterns: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Redaction(patterns)
    with pytest.raises(ArgumentError, match=message):
        Shaping(Args, redact=patterns)


def test_every_pattern_needs_one_of_its_words() -> None:
    """Words only tell where to look: with them a pattern finds what it finds without."""
    for words in SECRETS.values():
        assert words
        assert all(word == word.lower() for word in words)
    lines = [tuple(part.format(S + "padpadpadpadpad") for part in place) for place in PLACES]
    lines += [("AKIAIOSFODNN7EXAMPLE",), ("ghp_" + "a" * 36,), ("glpat-" + "a" * 20,), ("xoxb-" + "1" * 12,)]
    batch = execs(*lines, *(tuple(part.upper() for part in line) for line in lines))
    everywhere = Redaction(
        [pattern + "(?:)" for pattern, words in SECRETS.items() if not {"mysql", "sshpass"} & {*words}]
    )
    commands = [event.args for event in Redaction().redact(batch)]
    for args, without in zip(commands, everywhere.redact(batch), strict=True):
        assert args == without.args or args[0].lower() == "mysql"


UNITS = [
    "token",
    "token=",
    "--token ",
    "--token '",
    '"token": "',
    "-u ",
    '-u "',
    "://",
    "a://b:",
    "_",
    "-a.",
    "'",
    '"\\',
]
UNITS += ["authorization: ", "-p", "AKIA", "ghp_", "xoxb-", "@", "/", " ", "="]


TRY_ALL = """
import random, sys
from ebpfstream.redaction import SECRETS, _compiled, _spans

units = sys.argv[1:]
random.seed(1)
for unit in units + ["".join(random.choices(units, k=2)) for _ in range(40)]:
    text = (unit.encode() * (1 << 19))[: 1 << 19] + b" "
    for pattern in SECRETS:
        list(_spans(text, [_compiled(pattern)], listed=True))
"""


def test_no_text_takes_time_that_grows_with_its_square() -> None:
    """Where it does, this takes many minutes, and not seconds; of another process, as `re` lets no thread look."""
    subprocess.run([sys.executable, "-c", TRY_ALL, *UNITS], check=True, timeout=100, cwd=ROOT)
