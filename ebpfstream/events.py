"""Event types: one dataclass is the definition of the C struct, the decoder and the JSON form.

    @dataclass
    class Hello(Event):
        pid: U32
        uid: U32
        comm: Comm
        message: Annotated[str, Char(12)]

To type checkers the fields are int and str; at run time each carries its C type.  `c_struct` writes
the struct for the program's text, `codec` generates the code that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cached_property
from struct import Struct
from typing import Annotated, Any, ClassVar, Final, NamedTuple, TypeVar, get_args, get_type_hints

from ebpfstream.errors import EventTypeError
from ebpfstream.lost import Lost
from ebpfstream.text import hyphenated


@dataclass(frozen=True)
class Integer:
    """A C integer of `size` bytes (1, 2, 4 or 8), little-endian like every machine we run on."""

    size: int
    signed: bool = False

    @property
    def limits(self) -> range:
        """The values that it holds."""
        bits = 8 * self.size
        return range(-1 << bits - 1, 1 << bits - 1) if self.signed else range(1 << bits)

    @property
    def letter(self) -> str:
        """Struct's letter for it."""
        letter = "BHIQ"[self.size.bit_length() - 1]
        return letter.lower() if self.signed else letter


@dataclass(frozen=True)
class Char:
    """A C array `char[size]`: as str what stands before the first NUL, as bytes all of it."""

    size: int


@dataclass(frozen=True)
class Embedded:
    """`size` bytes within the struct, of which `unpack` makes the value."""

    size: int
    unpack: Callable[[bytes], Any]


@dataclass(frozen=True)
class Array:
    """A C array of `count` integers, as a tuple."""

    item: Integer
    count: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.item.size * self.count

    def unpack(self, data: bytes) -> tuple[int, ...]:
        """The integers."""
        return self._struct.unpack(data)

    @cached_property
    def _struct(self) -> Struct:
        return Struct(f"<{self.count}{self.item.letter}")


@dataclass(frozen=True)
class Tail:
    """Bytes that follow the struct, as many as this record has: bytes, str, or a tuple of NUL-ended strings.

    The struct holds their number in a generated member, `<field>_length`.  Tails follow one another
    in the order of their fields.  `function` makes something else of the bytes.
    """

    function: Callable[[bytes], Any] | None = None


@dataclass(frozen=True)
class Computed:
    """Not in the record: what `function` makes of the values of the fields named."""

    function: Callable[..., Any]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class WallClock:
    """Not in the record: the UTC time (to the microsecond) of a field that is CLOCK_MONOTONIC's nanoseconds.

    It is that field and the two clocks' difference, read when the batch was received.
    """

    source: str


U8 = Annotated[int, Integer(1)]
U16 = Annotated[int, Integer(2)]
U32 = Annotated[int, Integer(4)]
U64 = Annotated[int, Integer(8)]
I8 = Annotated[int, Integer(1, signed=True)]
I16 = Annotated[int, Integer(2, signed=True)]
I32 = Annotated[int, Integer(4, signed=True)]
I64 = Annotated[int, Integer(8, signed=True)]
Flag = Annotated[bool, Integer(1)]
Comm = Annotated[str, Char(16)]  # TASK_COMM_LEN, include/linux/sched.h

Stored = Integer | Char | Array | Embedded
"""What lies in the struct itself."""

Kind = Stored | Tail | Computed | WallClock


class Event:
    """Base class of event types: subclass it with @dataclass and annotated fields.

    Its text is the kernel's bytes as `text.decode` shows them.
    """

    __layout__: ClassVar[Layout | None] = None
    """Set where the layout is not that of the fields' annotations: in types that are made of C."""
    __annotated_layout__: ClassVar[Layout | None] = None
    """That of the annotations, once it has been asked for."""
    __schema_version__: ClassVar[int | None] = None
    """Grows when a field of its JSON lines goes, or means something else; None where nobody promises that."""


E = TypeVar("E", bound=Event)
E_co = TypeVar("E_co", bound=Event | Lost, covariant=True)
"""What a stream yields: events, and with `on_lost="yield"` what it knows of those that were lost."""

LENGTH_SUFFIX: Final = "_length"


class Member(NamedTuple):
    """One member of the C struct."""

    name: str
    kind: Stored
    offset: int


class Layout(NamedTuple):
    """How an event type lies in a record: the struct's members, its size, then the tails."""

    kinds: dict[str, Kind]
    types: dict[str, Any]
    members: list[Member]
    size: int


def layout(event_type: type[Event]) -> Layout:
    """The C layout of an event type, with natural alignment as every C compiler here has it.

    Raises EventTypeError for a class that is no dataclass or has a field without a C type.
    """
    own = vars(event_type)  # not its base's: a subclass may have more fields
    made: Layout | None = own.get("__layout__") or own.get("__annotated_layout__")
    if made is None:
        event_type.__annotated_layout__ = made = _annotated_layout(event_type)
    return made


def _annotated_layout(event_type: type[Event]) -> Layout:
    name = event_type.__name__
    if "__dataclass_fields__" not in vars(event_type):
        raise EventTypeError(f"{name} is not a dataclass: write @dataclass above the class")
    hints = get_type_hints(event_type, include_extras=True)
    kinds: dict[str, Kind] = {}
    types: dict[str, Any] = {}
    for field in fields(event_type):  # type: ignore[arg-type]  # checked above
        types[field.name], *extras = get_args(hints[field.name]) or (hints[field.name],)
        found = [extra for extra in extras if isinstance(extra, Kind)]
        if len(found) != 1:
            raise EventTypeError(
                f"{name}.{field.name} has no C type: annotate it with U32, Comm, Annotated[str, Char(12)], …"
            )
        kinds[field.name] = found[0]
    _check(name, kinds, types)
    members: list[Member] = []
    offset, alignment = 0, 1
    for member, kind in _members(kinds):
        step = _alignment(kind)
        offset = (offset + step - 1) // step * step
        members.append(Member(member, kind, offset))
        offset += kind.size
        alignment = max(alignment, step)
    if not members:
        raise EventTypeError(f"{name} has no fields that lie in a record")
    size = (offset + alignment - 1) // alignment * alignment
    return Layout(kinds, types, members, size)


def _alignment(kind: Stored) -> int:
    if isinstance(kind, Array):
        return kind.item.size
    return kind.size if isinstance(kind, Integer) else 1


def _members(kinds: dict[str, Kind]) -> Iterator[tuple[str, Stored]]:
    for name, kind in kinds.items():
        if isinstance(kind, Stored):
            yield name, kind
    for name, kind in kinds.items():
        if isinstance(kind, Tail):
            yield name + LENGTH_SUFFIX, Integer(4)


def _check(name: str, kinds: dict[str, Kind], types: dict[str, Any]) -> None:
    allowed: dict[type, tuple[Any, ...]] = {
        Integer: (int, bool),
        Char: (str, bytes),
        Array: (tuple[int, ...],),
        Tail: (str, bytes, tuple[str, ...]),
        WallClock: (datetime,),
    }
    for field, kind in kinds.items():
        if isinstance(kind, Tail) and field + LENGTH_SUFFIX in kinds:
            raise EventTypeError(
                f"{name}.{field + LENGTH_SUFFIX} has the name of the member that holds the length of {field}: rename it"
            )
        made_otherwise = isinstance(kind, Tail) and kind.function is not None
        if not made_otherwise and type(kind) in allowed and types[field] not in allowed[type(kind)]:
            names = " or ".join(getattr(t, "__name__", str(t)) for t in allowed[type(kind)])
            raise EventTypeError(f"{name}.{field}: {kind} is for {names}, not for {types[field]}")
        integer = kind.item if isinstance(kind, Array) else kind
        if (isinstance(kind, Stored) and kind.size not in range(1, 1 << 16)) or (
            isinstance(integer, Integer) and integer.size not in (1, 2, 4, 8)
        ):
            raise EventTypeError(f"{name}.{field}: there is no {kind}")
        sources = kind.arguments if isinstance(kind, Computed) else ()
        sources += (kind.source,) if isinstance(kind, WallClock) else ()
        for source in sources:
            if isinstance(kinds.get(source), Computed | WallClock | None):
                raise EventTypeError(f"{name}.{field} is made of {source!r}, which is no field of the record")


def schema_version(event_type: type[Event]) -> int | None:
    """The type's own: a subclass may have other fields than its base."""
    version: int | None = vars(event_type).get("__schema_version__")
    return version


def must_be_called(of: type[Any]) -> bool:
    """Whether making an object needs its class's own code: setting the fields one by one is faster."""
    methods = ["__new__", "__setattr__"]  # frozen classes have a __setattr__
    if not of.__dataclass_params__.init:
        methods.append("__init__")
    own = any(getattr(of, name) is not getattr(object, name) for name in methods)
    return own or hasattr(of, "__post_init__")


def c_struct(event_type: type[Event]) -> str:
    """The event type as a C struct, named after the class: ExecEvent is `struct exec_event`."""
    name = hyphenated(event_type.__name__).replace("-", "_")
    lines = [f"struct {name} {{"]
    for member in layout(event_type).members:
        kind = member.kind
        if isinstance(kind, Integer):
            lines.append(f"\t{_c_integer(kind)} {member.name};")
        elif isinstance(kind, Array):
            lines.append(f"\t{_c_integer(kind.item)} {member.name}[{kind.count}];")
        else:
            lines.append(f"\tchar {member.name}[{kind.size}];")
    return "\n".join([*lines, "};\n"])


def _c_integer(kind: Integer) -> str:
    return f"{'s' if kind.signed else 'u'}{kind.size * 8}"
