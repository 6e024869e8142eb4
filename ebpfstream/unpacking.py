"""Event types as formats of the struct module."""

from __future__ import annotations

import struct

from ebpfstream.events import Integer, Layout


def struct_format(plan: Layout) -> str:
    """The struct as a format, which after "<" aligns nothing by itself."""
    parts = []
    position = 0
    for member in plan.members:
        parts.append(f"{member.offset - position}x")
        if isinstance(member.kind, Integer):
            parts.append(member.kind.letter)
        else:
            parts.append(f"{member.kind.size}s")
        position = member.offset + member.kind.size
    return "".join(parts) + f"{plan.size - position}x"


class RecordStructs(dict[tuple[int, int, int], struct.Struct]):
    """Structs of whole records in a row, by prefix, stride and number."""

    def __init__(self, plan: Layout) -> None:
        super().__init__()
        self._plan = plan

    def __missing__(self, key: tuple[int, int, int]) -> struct.Struct:
        prefix, stride, number = key
        form = f"{prefix}x{struct_format(self._plan)}{stride - prefix - self._plan.size}x"
        self[key] = made = struct.Struct("<" + form * number)
        return made
