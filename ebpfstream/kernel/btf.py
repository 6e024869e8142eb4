"""The kernel's types as C, out of BTF: no bpftool, no compiler, no kernel headers.

BTF is read twice.  Here, in Python, as an index: which types a program can reach, and which of the
kernel's names it has taken for itself.  Then by libbpf, which writes those types as C.

Every layout cited is include/uapi/linux/btf.h's.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

from ebpfstream.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from typing import Any, Final

_MAGIC: Final = 0xEB9F
HEADER: Final = struct.Struct("=HBBIIIII")  # struct btf_header: magic … hdr_len, type_off/len, str_off/len

# BTF_KIND_*
INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = 1, 2, 3, 4, 5, 6, 7, 8
VOLATILE, CONST, RESTRICT, TYPE_TAG, ENUM64 = 9, 10, 11, 18, 19
_TAGGED = frozenset({STRUCT, UNION, ENUM, FWD, ENUM64})  # C has one name space for all of these
_RECORDS = frozenset({STRUCT, UNION})
_ENUMS = frozenset({ENUM, ENUM64})
_REFERENCES = frozenset({PTR, TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG})

# 32-bit words behind the three of struct btf_type, by kind: so many, and so many for each of vlen.
_FIXED = (0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0)
_EACH = (0, 0, 0, 0, 3, 3, 2, 0, 0, 0, 0, 0, 0, 2, 0, 3, 0, 0, 0, 3)

_SUFFIX: Final = "___kernel"

# Types that BCC's own headers, and what it generates, use without the program naming them.
_ALWAYS = "pt_regs user_pt_regs user_regs_struct bpf_raw_tracepoint_args bpf_stack_build_id __sk_buff xdp_md"

# BCC's headers use these before the program's own typedef of the same name is seen.  C11 6.7p3 lets
# a typedef be repeated as long as it means the same type, and for these there is but one meaning.
_KEPT_TYPEDEFS = (
    "u8 u16 u32 u64 s8 s16 s32 s64 __u8 __u16 __u32 __u64 __s8 __s16 __s32 __s64 "
    "__be16 __be32 __be64 __le16 __le32 __le64 __sum16 __wsum bool size_t uintptr_t"
)


class Btf:
    """An index over one kernel's BTF."""

    def __init__(self, data: bytes) -> None:
        if len(data) < HEADER.size:
            raise UnsupportedError(
                "the kernel's BTF is empty or cut off; compile with kernel headers instead"
            )
        magic, _, _, header, types, types_length, strings, strings_length = HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise UnsupportedError(
                "not BTF of this machine's byte order; compile with kernel headers instead"
            )
        self.data = data
        self._types = header + types
        self._words = memoryview(data)[self._types : self._types + types_length].cast("I")
        self._strings = data[header + strings : header + strings + strings_length]
        # Names by where they start.  The kernel's strings are unique and share no tails.
        names = self._strings.split(b"\0")
        self._offsets = dict(
            zip(names, accumulate((len(name) + 1 for name in names), initial=0), strict=False)
        )
        self._starts = self._index()

    def _index(self) -> list[int]:
        """Where each type's record starts, by type id; id 0 is void and has none."""
        words, starts, at = self._words, [0], 0
        end = len(words)
        try:
            while at < end:
                starts.append(at)
                info = words[at + 1]
                kind = info >> 24 & 31
                at += 3 + _FIXED[kind] + _EACH[kind] * (info & 0xFFFF)
        except IndexError:
            raise UnsupportedError(
                "the kernel's BTF holds kinds of types that this version of ebpfstream does not know; "
                "upgrade ebpfstream, or install the kernel's headers"
            ) from None
        return starts

    def _kind(self, type_id: int) -> int:
        return self._words[self._starts[type_id] + 1] >> 24 & 31

    def _rows(self, type_id: int) -> Iterator[tuple[int, int, int]]:
        """For each member or enumerator: where its row starts, its name, its type (or value)."""
        words, start = self._words, self._starts[type_id]
        step = _EACH[words[start + 1] >> 24 & 31]
        first = start + 3
        for at in range(first, first + step * (words[start + 1] & 0xFFFF), step):
            yield at, words[at], words[at + 1]

    def _target(self, type_id: int) -> tuple[int, int]:
        """Find the type behind pointers, arrays, qualifiers and typedefs, with its kind."""
        while type_id:
            kind = self._kind(type_id)
            if kind in _REFERENCES:
                type_id = self._words[self._starts[type_id] + 2]
            elif kind == ARRAY:
                type_id = self._words[self._starts[type_id] + 3]  # struct btf_array's type
            else:
                return type_id, kind
        return 0, 0

    def _offsets_of(self, names: Iterable[str]) -> set[int]:
        found = {self._offsets.get(name.encode(), 0) for name in names}
        found.discard(0)  # offset 0 is the empty name
        return found

    def reachable(self, identifiers: Collection[str]) -> list[int]:
        """Find the types that a program with these identifiers can use, besides what they hold by value.

        Those that it names; enums of which it names a value; and then, again and again, what the
        members that it names point to: `t->mm->exe_file` leads from task_struct to mm_struct to file.
        """
        wanted = self._offsets_of(identifiers)
        named = wanted | self._offsets_of(_ALWAYS.split())
        # BCC's headers name helpers and flags of the system call interface.
        values = wanted | {at for name, at in self._offsets.items() if name.startswith(b"BPF_")}
        words, found = self._words, set[int]()
        for type_id, start in enumerate(self._starts[1:], 1):
            kind = words[start + 1] >> 24 & 31
            name = words[start]
            if (
                (name in named and (kind in _TAGGED or kind == TYPEDEF))
                # The structs that BCC generates for tracepoints use any of them; they cost nothing.
                or (kind == TYPEDEF and self._is_integer(type_id))
                or (kind in _ENUMS and not values.isdisjoint(row[1] for row in self._rows(type_id)))
            ):
                found.add(type_id)
        todo, seen = list(found), set[int]()
        while todo:
            type_id, kind = self._target(todo.pop())
            if kind not in _RECORDS or type_id in seen:
                continue
            seen.add(type_id)
            for _, name, member in self._rows(type_id):
                if not name or name in wanted:
                    target, kind = self._target(member)
                    if kind in _RECORDS and target not in seen:
                        if name:  # an unnamed one is printed where it is
                            found.add(target)
                        todo.append(target)
        return sorted(found)

    def _is_integer(self, type_id: int) -> bool:
        while type_id and (kind := self._kind(type_id)) in _REFERENCES and kind != PTR:
            type_id = self._words[self._starts[type_id] + 2]
        return bool(type_id) and self._kind(type_id) == INT

    def renamed(self, tags: Collection[str], ordinary: Collection[str]) -> bytes:
        """Return BTF in which the kernel's types of these names are called otherwise.

        `tags` are names of structs, unions and enums; `ordinary` are names that a typedef or an
        enumerator would clash with.  Renamed here, every use of the type follows, and a member that
        happens to have the same name stays as it is.
        """
        tag_names = self._offsets_of(tags)
        enumerators = self._offsets_of(ordinary)
        typedefs = self._offsets_of(set(ordinary).difference(_KEPT_TYPEDEFS.split()))
        words, rows = self._words, list[int]()
        for type_id, start in enumerate(self._starts[1:], 1):
            kind = words[start + 1] >> 24 & 31
            if kind in _TAGGED:
                if words[start] in tag_names:
                    rows.append(start)
                if kind in _ENUMS and enumerators:
                    rows.extend(at for at, name, _ in self._rows(type_id) if name in enumerators)
            elif kind == TYPEDEF and words[start] in typedefs:
                rows.append(start)
        if not rows:
            return self.data
        # The strings move to the end, where they can grow; the section that was theirs is left unused.
        data, strings = bytearray(self.data), bytearray(self._strings)
        moved: dict[int, int] = {}
        for row in rows:
            name = words[row]
            if name not in moved:
                moved[name] = len(strings)
                strings += self._strings[name : self._strings.index(b"\0", name)] + _SUFFIX.encode() + b"\0"
            struct.pack_into("=I", data, self._types + 4 * row, moved[name])
        header: list[int] = list(HEADER.unpack_from(data))
        header[6:8] = len(data) - header[3], len(strings)
        HEADER.pack_into(data, 0, *header)
        return bytes(data + strings)


@cache
def _libbpf() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
        pointer, number = ctypes.c_void_p, ctypes.c_uint32
        _declare(library, "libbpf_version_string", ctypes.c_char_p)
        _declare(library, "btf__new", pointer, ctypes.c_char_p, number)
        _declare(library, "btf__free", None, pointer)
        _declare(library, "btf__type_cnt", number, pointer)
        _declare(library, "btf_dump__new", pointer, pointer, pointer, pointer, pointer)
        _declare(library, "btf_dump__dump_type", ctypes.c_int, pointer, number)
        _declare(library, "btf_dump__free", None, pointer)
    except (OSError, AttributeError) as error:
        raise UnsupportedError(
            f"the kernel's types cannot be read without libbpf.so.1 ({error}): install libbpf1 (Debian, "
            "Ubuntu) or libbpf (Fedora, Arch, Alpine), or the kernel's headers"
        ) from error
    return library


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    pointer = ctypes.c_void_p
    _declare(library, "open_memstream", pointer, pointer, pointer)
    _declare(library, "fclose", ctypes.c_int, pointer)
    _declare(library, "free", None, pointer)
    return library


def _declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> None:
    function = library[name]
    function.restype, function.argtypes = result, arguments
    setattr(library, name, function)  # library[name] is a new object each time, library.name is not


def libbpf_version() -> str:
    """Return the version of the libbpf that writes the types, as "v1.1"."""
    version: bytes = _libbpf().libbpf_version_string()
    return version.decode()


def dump(data: bytes, type_ids: Iterable[int] | None = None) -> str:
    """Write C declarations of the types, each after all that it holds by value; of every type if None.

    What is pointed to only is declared, without its members.
    """
    bpf, libc = _libbpf(), _libc()
    btf = bpf.btf__new(data, len(data))
    if not btf:
        raise _failed("read the kernel's BTF", ctypes.get_errno())
    text, length = ctypes.c_char_p(), ctypes.c_size_t()
    stream = printer = None
    try:
        stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(length))
        if not stream:
            raise _failed("allocate memory for the kernel's types", ctypes.get_errno())
        # libbpf prints through  void (void *, const char *, va_list).  With a FILE * that is libc's
        # vfprintf, so no line of the megabytes comes through Python, which cannot take a va_list.
        printer = bpf.btf_dump__new(btf, ctypes.cast(libc.vfprintf, ctypes.c_void_p), stream, None)
        if not printer:
            raise _failed("print the kernel's BTF", ctypes.get_errno())
        for type_id in range(1, bpf.btf__type_cnt(btf)) if type_ids is None else type_ids:
            if error := bpf.btf_dump__dump_type(printer, type_id):
                raise _failed(f"print type {type_id} of the kernel's BTF", -error)
        closing, stream = stream, None
        if libc.fclose(closing):
            raise _failed("print the kernel's types", ctypes.get_errno())
        return plain_padding(ctypes.string_at(text, length.value).decode())
    finally:
        if printer:
            bpf.btf_dump__free(printer)
        if stream:
            libc.fclose(stream)
        libc.free(text)
        bpf.btf__free(btf)


def _failed(what: str, number: int) -> UnsupportedError:
    return UnsupportedError(
        f"libbpf.so.1 ({libbpf_version()}) could not {what}: {os.strerror(number)}; "
        "install a libbpf as new as the kernel, or the kernel's headers"
    )


def plain_padding(text: str) -> str:
    """Make arrays of libbpf's padding, which it writes as runs of unnamed bit-fields, `long: 64;`.

    BCC's clang lays types out for the machine, then code is generated under BPF's data layout.  clang
    makes one LLVM integer of a run of bit-fields; one wider than 64 bits aligns to 8 bytes on x86-64
    but to 16 under BPF, and everything behind it moves: mm_struct, cgroup, sock and a hundred more are
    read at wrong offsets, without a word, while offsetof() and _Static_assert still give the right ones.
    """
    count = 0

    def array(run: re.Match[str]) -> str:
        nonlocal count
        count += 1
        return f"{run[1]}long __btf_pad{count}[{run[0].count(';')}];\n"

    return re.sub(r"(?m)^([ \t]*)long: 64;\n(?:[ \t]*long: 64;\n)*", array, text)
