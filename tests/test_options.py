"""Text as the values that options take."""

from __future__ import annotations

import os
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

from ebpfstream.errors import ArgumentError
from ebpfstream.options import Seconds, Size, check_choice, describe, parse

MANY = "9" * 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1", 1),
        ("12B", 12),
        ("1KB", 1000),
        ("1kb", 1000),
        ("1KiB", 1024),
        ("1K", 1024),
        ("64 KiB", 65_536),
        ("100MB", 100_000_000),
        ("100MiB", 104_857_600),
        ("5m", 5 << 20),
        ("2GB", 2 * 10**9),
        ("2g", 2 << 30),
        ("3TB", 3 * 10**12),
        ("3TiB", 3 << 40),
        ("1.5K", 1536),
        (".5K", 512),
        ("1.K", 1024),
        ("1.0", 1),
        ("1.001KB", 1001),  # as a float it would be one less
        ("1.1GiB", 1_181_116_006),
        ("9007199254740993", 9_007_199_254_740_993),  # so would this
        (MANY, int(MANY)),
    ],
)
def test_sizes(text: str, value: int) -> None:
    made = parse(text, Size)
    assert made == value
    assert type(made) is int


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0.0),
        ("10", 10.0),
        ("10s", 10.0),
        ("500ms", 0.5),
        ("1 ms", 0.001),
        ("0.1MS", 0.0001),
        ("0.1", 0.1),
        ("5m", 300.0),
        ("1.5h", 5400.0),
        ("2D", 172_800.0),
    ],
)
def test_seconds(text: str, value: float) -> None:
    made = parse(text, Seconds)
    assert made == value
    assert type(made) is float


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ".",
        "B",
        "ms",
        "-1",
        "+1",
        "1.5.2",
        "1,5",
        "1e3",
        "1_000",
        "0x10",
        "1/2",
        "٣",
        "\uff11",
        "inf",
        "nan",
        "1MBB",
        "1 M B",
        " 1",
        "1\0",
        "\u017f",  # its upper case is S
        "1\u017f",
        "9" * 5000,  # more digits than Python reads
    ],
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"is not a number of bytes such as 64KiB or 100MB$"):
        parse(text, Size)
    with pytest.raises(ArgumentError, match=r"is not a time such as 500ms, 10s, 5m, 1h or 1d$"):
        parse(text, Seconds)


@pytest.mark.parametrize("text", ["1.5", "0.5B", "1s", "1h", "1PB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ArgumentError, match=f"^'{text}' is not a number of bytes"):
        parse(text, Size)


@pytest.mark.parametrize("text", ["1KB", "1w", "1sec", MANY, MANY + "d"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ArgumentError, match=f"^'{text}' is not a time"):
        parse(text, Seconds)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("17", int, 17),
        ("-17", int, -17),
        ("+17", int, 17),
        ("017", int, 17),
        (MANY, int, int(MANY)),
        ("1.5", float, 1.5),
        ("-1", float, -1.0),
        ("1e3", float, 1000.0),
        ("1E-3", float, 0.001),
        ("", str, ""),
        ("none", str, "none"),
        ("a b", str, "a b"),
        ("a/b", Path, Path("a/b")),
        ("yes", bool, True),
        ("True", bool, True),
        ("ON", bool, True),
        ("1", bool, True),
        ("no", bool, False),
        ("false", bool, False),
        ("Off", bool, False),
        ("0", bool, False),
        ("None", type(None), None),
        ("1.50", Decimal, Decimal("1.50")),
        ("b", Literal["a", "b"], "b"),
        ("", Literal["", "b"], ""),
        ("0", Literal[0, 1], 0),
        ("1", Literal[0, 1], 1),
    ],
)
def test_plain_values(text: str, hint: Any, value: object) -> None:
    made = parse(text, hint)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("text", "hint", "would_do"),
    [
        *(
            (text, int, "a whole number")
            for text in ("", "x", "1.5", "1e3", "1_000", "0x10", "٣", " 1", "inf")
        ),
        ("9" * 5000, int, "a whole number"),
        *(
            (text, float, "a number")
            for text in ("", "x", "1.5.2", "1_0", "٣", "inf", "-inf", "nan", "1e999")
        ),
        *((text, bool, "yes or no") for text in ("", "y", "2", "none", "yes ")),
        ("", type(None), "none"),
        ("c", Literal["a", "b"], "a or b"),
        ("A", Literal["a", "b"], "a or b"),
        ("01", Literal[0, 1], "0 or 1"),
        ("x", Decimal, "Decimal"),
        ("abc", list[str], "list"),
        ("abc", os.PathLike[str], "PathLike"),
    ],
)
def test_what_is_no_such_value(text: str, hint: Any, would_do: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(text, hint)
    assert str(caught.value) == f"{text!r} is not {would_do}"


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("never", Literal["never", "batch"] | Seconds, "never"),
        ("5", Literal["never", "batch"] | Seconds, 5.0),
        ("none", Size | None, None),
        ("1K", Size | None, 1024),
        ("none", str | None, None),
        ("None", Optional[Path], None),  # noqa: UP045  # both ways to write it
        ("other", str | None, "other"),
        ("5", str | int, 5),
        ("x", str | int, "x"),
        ("5", Path | Seconds, 5.0),
        ("yes", int | bool, True),
        ("1", int | bool, 1),
        ("1", bool | int, True),
        ("x", str | os.PathLike[str], "x"),
        ("2m", (Literal["a"] | Seconds) | (None | Size), 120.0),
    ],
)
def test_unions(text: str, hint: Any, value: object) -> None:
    """Of several the first that fits; text, which everything fits, last."""
    made = parse(text, hint)
    assert made == value
    assert type(made) is type(value)


def test_what_fits_none_of_a_union() -> None:
    with pytest.raises(ArgumentError) as caught:
        parse("x", Literal["never", "batch"] | Seconds | None)
    assert str(caught.value) == (
        "'x' is not never or batch or a time such as 500ms, 10s, 5m, 1h or 1d or none"
    )


def test_annotations_of_others_say_nothing() -> None:
    assert parse("5", Annotated[int, "how many"]) == 5
    assert parse("1K", Annotated[Size, "how large"]) == 1024
    assert parse("none", Annotated[int | None, "how many"]) is None
    assert describe(Annotated[int | None, "how many"]) == "a whole number or none"
    assert describe(Annotated[Size, "how large"]) == describe(Size)


def test_choices() -> None:
    of: Any = Literal["zstd", "gzip", "none"]
    check_choice("compress", "gzip", of)
    for value in ("gz", "", None, ["gzip"], b"gzip"):
        with pytest.raises(ArgumentError) as raised:
            check_choice("compress", value, of)
        assert str(raised.value) == f'compress={value!r} is unknown: give "zstd", "gzip" or "none"'
    with pytest.raises(ArgumentError, match=r'^acks=1 is unknown: give "all" or "1"$'):
        check_choice("acks", 1, Literal["all", "1"])


def test_descriptions_say_each_thing_once() -> None:
    assert describe(str | Path | bool) == "yes or no or text"
