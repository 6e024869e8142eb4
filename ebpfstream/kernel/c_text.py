"""What a program's C text says where the compiler does not tell: what is submitted, what a function takes.

Text is looked at with comments and literals blanked out; preprocessor directives are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from ebpfstream.kernel.shim import COMMENT_OR_LITERAL

_SUBMISSION: Final = re.compile(
    r"\b(\w+)\s*\.\s*(perf_submit|perf_submit_skb|ringbuf_output|ringbuf_submit)\s*\("
)
# Which argument holds the sample.
_SAMPLE: Final = {"perf_submit": 1, "perf_submit_skb": 2, "ringbuf_output": 0, "ringbuf_submit": 0}
_CAST: Final = re.compile(r"\(\s*(?:const\s+)?(?:void|char|u8|unsigned\s+char)\s*\*\s*\)")
_NAME: Final = re.compile(r"(&?)\s*([A-Za-z_]\w*)")
_TYPE: Final = r"(?:struct|union|enum)\s+\w+|[A-Za-z_]\w*(?:\s+(?:long|int|char|short)){0,3}"
_NO_TYPES: Final = frozenset({"return", "goto", "case", "else", "sizeof", "typeof", "do"})
_DIRECTIVE: Final = re.compile(r"^[ \t]*#(?:\\\n|.)*", re.MULTILINE)
# What stands before a declaration within a function; anything else makes `a * b` a product.
_BEGINNING: Final = re.compile(r"(?:[;{}:]|\bfor\s*\(|\b(?:const|volatile|static|register|__maybe_unused))$")


_TRACEPOINT_PROBE: Final = re.compile(r"\bTRACEPOINT_PROBE\s*\(\s*(\w+)\s*,\s*(\w+)\s*\)")


class Submission(NamedTuple):
    """A place in a program at which something is handed to an output."""

    output: str
    line: int
    expression: str
    type: str | None
    """The sample's type as the text declares it, such as `struct data_t`; None where it does not show."""
    length: str | None = None
    """Its length, if it is an array of that type."""


def blanked(text: str) -> str:
    """The text with comments and literals replaced by blanks, so that every other character is where it was."""
    return COMMENT_OR_LITERAL.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def submissions(text: str) -> list[Submission]:
    """Every submission to an output, in the order of the text."""
    code = blanked(text)
    found: list[Submission] = []
    for call in _SUBMISSION.finditer(code):
        arguments = list(_arguments(code, call.end()))
        if len(arguments) <= _SAMPLE[call[2]]:
            continue
        expression = arguments[_SAMPLE[call[2]]].strip()
        line = code.count("\n", 0, call.start()) + 1
        found.append(
            Submission(
                call[1],
                line,
                expression,
                *_type_of(expression, code[_body(code, call.start()) : call.start()]),
            )
        )
    return found


def _arguments(code: str, start: int) -> Iterator[str]:
    """The arguments of the call whose opening parenthesis ends at `start`."""
    depth = 0
    first = start
    for position in range(start, len(code)):
        character = code[position]
        if character in "([{":
            depth += 1
        elif character in ")]}":
            if not depth:
                yield code[first:position]
                return
            depth -= 1
        elif character == "," and not depth:
            yield code[first:position]
            first = position + 1


def _body(code: str, position: int) -> int:
    """Where the function around a position begins, its parameters included."""
    depth = start = 0
    for found in re.finditer(r"[{};]", code[:position]):
        if found[0] == "{":
            depth += 1
        elif found[0] == "}":
            depth = max(depth - 1, 0)
        if not depth:
            start = found.end()
    return start


def _type_of(expression: str, before: str) -> tuple[str | None, str | None]:
    """The type of what an expression points to, and its length if that is an array."""
    while outer := re.fullmatch(r"\((.*)\)", expression := _CAST.sub("", expression).strip(), re.DOTALL):
        expression = outer[1]
    name = _NAME.fullmatch(expression)
    if not name:
        return None, None
    declaration = re.compile(
        rf"\b({_TYPE})(\s*\*+\s*|\s+)(?:[^;{{}}()=]*?,\s*(\**)\s*)?{name[2]}\s*(?:\[([^\]]*)\])?\s*(?=[;=,)])"
    )
    before = _DIRECTIVE.sub("", before)
    parameters = before.find("{")
    found = [
        found
        for found in declaration.finditer(before)
        if found[1] not in _NO_TYPES
        and (found.start() < parameters or _BEGINNING.search(before[: found.start()].rstrip()[-20:]))
    ]
    if not found:
        return None, None
    declared, pointers, pointers_behind_comma, length = found[-1].groups()
    stars = (pointers if pointers_behind_comma is None else pointers_behind_comma).count("*")
    if stars != (0 if name[1] or length is not None else 1):
        return None, None  # a pointer's address, a pointer to pointers, a number that is an address
    return declared, length


def probed_tracepoints(text: str) -> list[tuple[str, str]]:
    """Category and name of each TRACEPOINT_PROBE."""
    return _TRACEPOINT_PROBE.findall(blanked(text))


def first_parameter(text: str, function: str) -> str | None:
    """The first parameter of a function as it is declared, such as `struct pt_regs *ctx`.

    None where the text does not define it in plain sight.
    """
    found = re.search(rf"\b{re.escape(function)}\s*\(([^(),]*)[^{{;]*\{{", blanked(text))
    return " ".join(found[1].split()) if found else None
