"""The types that a program declares, as BCC describes them; and whether an event class is such a type.

BCC's description of a type is JSON (BMapDeclVisitor, src/cc/frontends/clang/b_frontend_action.cc): a
scalar is its name; a struct is `[name, members, "struct" | "struct_packed" | "union"]`, a member
`[name, type]`, with `[n]` behind it if it is an array of n, or n if it is a bit-field of n bits; of an
unnamed struct or union, its type.
A "struct_packed" tells its padding in members of its own; a "struct" is laid out as C lays it out.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from ebpfstream.c_types import FLOATS, NUMBERS, Array, Bytes, Chars, CType, Field, Float, Number, Record
from ebpfstream.errors import EventTypeError
from ebpfstream.events import Event, Integer, Member, layout

_PADDING: Final = "__pad_"
_RECORDS: Final = ("struct", "struct_packed", "union")


def parse(description: Any, size: int, *, key: bool = False) -> CType:
    """The type that BCC describes so, `size` bytes long; of a map's keys if that is said.

    Raises EventTypeError where its description does not tell the whole type: the sizes differ then.
    """
    try:
        found = _parse(description, key)
    except RecursionError:
        raise EventTypeError("BCC describes a type that is nested too deeply: give an event class") from None
    if found.size != size:
        raise EventTypeError(
            f"BCC does not describe {found.declared()} whole: what it tells of takes {found.size} bytes of "
            f"{size}. Of arrays of arrays it tells but one dimension: write such a member, m[2][3], as m[6], or give "
            "an event class"
        )
    return found


def _parse(description: Any, key: bool = False) -> CType:
    match description:
        case str() if description in NUMBERS:
            return Number(description)
        case str() if description in FLOATS:
            return Float(description)
        case [_, list(), "enum"]:
            return Number("unsigned int")
        case [str(name), list(members), str(kind)] if kind in _RECORDS:
            return _parse_record(name, members, kind, key)
    raise _unknown(description)


def _unknown(description: Any) -> EventTypeError:
    return EventTypeError(
        f"BCC describes a type as {description!r}, which is unknown here: give an event class"
    )


def _parse_record(name: str, members: list[Any], kind: str, key: bool) -> Record:
    fields: list[Field] = []
    at = end = 0  # in bits, for the sake of bit-fields
    alignment = 1
    natural = True
    for member in members:
        member_name, of_type, found, width = _parse_member(member, key)
        unit = found.size * 8
        alignment = max(alignment, found.alignment)
        step = 8 if kind == "struct_packed" else found.alignment * 8
        at = 0 if kind == "union" else at
        if width is None:
            at = _up(at, step)
            natural &= at % (found.alignment * 8) == 0
        elif at // unit != (at + width - 1) // unit:  # a bit-field lies within one unit of its type
            at = _up(at, unit)
        if not member_name and isinstance(found, Record):  # its members are the outer one's
            fields += [field._replace(offset=at // 8 + field.offset) for field in found.fields]
        elif member_name and not (member_name.startswith(_PADDING) and of_type == "char"):
            bits = (at % 8, width) if width is not None else None
            fields.append(Field(_usable(member_name), found, at // 8, bits))
        at += unit if width is None else width
        end = max(end, at)
    names = [field.name for field in fields]
    if len(set(names)) < len(names) or not all(map(_is_name, [name or "unnamed", *names])):
        raise EventTypeError(
            f"the members of {kind} {name} cannot all be attributes in Python ({', '.join(map(repr, names))}): "
            "give an event class"
        )
    if kind == "struct_packed":
        # So are all called that have no bit-fields.  A packed one that looks natural is taken for natural;
        # where that makes a difference to what it is a member of, the sizes differ.
        natural &= end % (alignment * 8) == 0
        return Record(name or "unnamed", fields, _up(end, 8) // 8, alignment if natural else 1, union=False)
    return Record(name or "unnamed", fields, _up(end, alignment * 8) // 8, alignment, union=kind == "union")


def _parse_member(member: Any, key: bool) -> tuple[str, Any, CType, int | None]:
    """Its name, its type as it is described and as it is with its array's length, the bits of a bit-field."""
    match member:
        case [str(name), list(), str(kind)] if kind in _RECORDS:
            return name, member, _parse(member, key), None  # unnamed: the type stands in the member's place
        case [str(name), of_type]:
            return name, of_type, _parse(of_type, key), None
        case [str(name), of_type, list(counts)] if all(isinstance(n, int) and n >= 0 for n in counts):
            return name, of_type, _array(_parse(of_type, key), counts, key), None
        case [str(name), of_type, int(width)]:
            found = _parse(of_type, key)
            if isinstance(found, Number) and 0 < width <= found.size * 8:
                return name, of_type, found, width
    raise _unknown(member)


def _is_name(name: str) -> bool:
    return name.isascii() and name.isidentifier()


def _up(bits: int, step: int) -> int:
    return (bits + step - 1) // step * step


def _array(item: CType, counts: list[int], key: bool) -> CType:
    for count in reversed(counts):
        if isinstance(item, Number) and item.size == 1 and not item.truth:
            item = Chars(count, whole=key) if item.declared() == "char" else Bytes(count)
        else:
            item = Array(item, count)
    return item


def _usable(name: str) -> str:
    special = name.startswith("__") and name.endswith("__")  # __class__ and its like mean something to Python
    return f"{name}_" if keyword.iskeyword(name) or special else name


def check(event_type: type[Event], submitted: CType) -> None:
    """Raise EventTypeError, naming each difference, unless the class's layout is that of what is submitted.

    Names and signs are the class's own affair; offsets, sizes, and what is a number are not.  A class
    may see an array, a struct or a union as its bytes.
    """
    plan = layout(event_type)
    leaves = list(_leaves(submitted, "", 0))
    name = event_type.__name__
    differences: list[str] = []
    for member in plan.members:
        start, end = member.offset, member.offset + member.kind.size
        here = [leaf for leaf in leaves if leaf.start < end and leaf.end > start]
        if isinstance(member.kind, Integer):
            fits = not here or any(leaf.numeric and (leaf.start, leaf.end) == (start, end) for leaf in here)
        else:
            fits = all(start <= leaf.start and leaf.end <= end for leaf in here)
        if not fits:
            theirs = ", ".join(f"{leaf.declared} at {leaf.start}" for leaf in here)
            differences.append(f"at byte {start} {name} has {_shown(member)}, and it has {theirs}")
    differences += [
        f"{name} has nothing for {leaf.declared}, at byte {leaf.start}"
        for leaf in leaves
        if not any(m.offset < leaf.end and m.offset + m.kind.size > leaf.start for m in plan.members)
    ]
    if not differences and plan.size != submitted.size:
        differences.append(f"{name} has {plan.size} bytes, and it has {submitted.size}")
    if differences:
        raise EventTypeError(
            f"{name} is not what the program submits, {submitted.declared()}: " + "; ".join(differences)
        )


class _Leaf(NamedTuple):
    """What is no struct itself."""

    declared: str
    start: int
    end: int
    numeric: bool


def _leaves(type: CType, name: str, at: int) -> Iterator[_Leaf]:
    if isinstance(type, Record):
        for field in type.fields:
            inner = f"{name}.{field.name}".lstrip(".")
            start = at + field.offset
            if field.bits:
                yield _Leaf(
                    f"{field.type.declared(inner)}:{field.bits[1]}", start, start + field.length, False
                )
            else:
                yield from _leaves(field.type, inner, start)
    elif isinstance(type, Array):
        for index in range(type.count):
            yield from _leaves(type.item, f"{name}[{index}]", at + index * type.item.size)
    else:
        yield _Leaf(type.declared(name), at, at + type.size, isinstance(type, Number))


def _shown(member: Member) -> str:
    kind = member.kind
    sort = f"an integer of {kind.size} bytes" if isinstance(kind, Integer) else f"{kind.size} bytes"
    return f"{member.name}, {sort}"
