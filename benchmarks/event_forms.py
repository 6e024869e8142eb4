"""Which pure-Python form is fastest: records to events, async iteration, records to JSON lines.

Decides what `ebpfstream/codec.py` generates and how `ebpfstream/stream.py` iterates:

* how an event is made, and whether all of a batch at once, in chunks or one by one;
* whether char arrays are worth a cache of strings, and in what order arguments are decoded and split;
* whether a stream has `__anext__` or is an asynchronous generator, and what whole batches save;
* whether JSON lines are formatted here or by a library.

Run `python benchmarks/event_forms.py`, with `--rounds N` for other than 11; it prints Markdown.  It wants
orjson, trio and uvloop, and compares msgspec if that is installed.

Each variant is compiled from a source of its own, as a codec is, so that none shares specialised bytecode
with another, and is held to what its records were made of before it is timed.  The variants of a table take
turns, shuffled in each round, lest full garbage collections always hit the same ones.  Caches are emptied
before each turn: distinct strings never hit.  Whoever consumes events reads four fields of each.  Unlike
what is formatted here, lines of orjson and msgspec may have characters in them that a terminal acts on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import re
import statistics
import struct
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from json import encoder
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = [name for name in ("orjson", "trio", "uvloop", "msgspec") if util.find_spec(name)]

# --- Records ---
FLAT_FORMAT: Final = "8xQIIII16s20s4x"  # a ring buffer's header, and a struct
FLAT: Final = struct.Struct("<" + FLAT_FORMAT)
EXEC: Final = struct.Struct("<I4xQQQ9I16sB")  # a filename follows, and arguments with a NUL after each
INTEGERS: Final = "sequence, monotonic, cgroup, pid, tid, ppid, uid, gid, cpu, args_size"
KINDS: Final = {
    "FLAT": dict.fromkeys(("ts", "pid", "tid", "uid", "gid"), "int") | {"comm": "char", "message": "char"},
    "EXEC": dict.fromkeys([*INTEGERS.split(", "), "truncated"], "int"),
}
KINDS["EXEC"].update(comm="char", filename="tail", args="tails")
STRINGS: Final[dict[str, Callable[[], bytes]]] = {
    "few strings": lambda: random.choice((b"Hello World", b"open", b"close", b"a longer text..")),
    "distinct strings": lambda: b"%012x" % random.getrandbits(48),
    "unusual strings": lambda: random.choice((b'a"b', b"a\\b", b"na\xc3\xafve", b"\xff", b"\x7f\x1b[2J")),
}
Times = dict[str, dict[str, list[float]]]
"""Of each variant and column, in each round: ns per event."""
Batch = tuple[Any, list[Any]]  # records, or whatever a variant takes, and what should come of them


def text(data: bytes) -> str:
    """Bytes up to the first NUL as text."""
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def flat_batch(word: Callable[[], bytes]) -> Batch:
    """256 KiB of fixed-size records."""
    batch, events = bytearray(), []
    for number in range(3640):
        pid = random.randrange(60_000)
        row = 10**12 + number, pid, pid, 1000, 1000, b"worker-%d" % (pid % 10), word()
        batch += FLAT.pack(*row)
        events.append(dict(zip(KINDS["FLAT"], (*row[:5], text(row[5]), text(row[6])), strict=True)))
    return bytes(batch), events


def exec_batch(word: Callable[[], bytes]) -> Batch:
    """Some 256 KiB of variable-length records."""
    batch, events = bytearray(), []
    for number in range(1600):
        pid, filename, args = random.randrange(60_000), b"/usr/bin/" + word(), [word() for _ in range(5)]
        tail = b"\0".join(args) + b"\0"
        length = EXEC.size - 8 + len(filename) + len(tail)
        integers = number, 10**12, 4242, pid, pid, 1, 1000, 1000, 0, len(tail)
        batch += EXEC.pack(length, *integers, len(filename), len(tail), b"worker-%d" % (pid % 10), 0)
        batch += filename + tail + bytes(-length % 8)
        strings = f"worker-{pid % 10}", text(filename), tuple(map(text, args))
        events.append(dict(zip(KINDS["EXEC"], (*integers, 0, *strings), strict=True)))
    return bytes(batch), events


# --- What variants use ---
PRINTABLE: Final = bytes(byte for byte in range(0x20, 0x7F) if byte not in b'"\\')
PRINTABLE_OR_NUL: Final = PRINTABLE + b"\0"
BLOCKS: Final = [struct.Struct("<" + FLAT_FORMAT * number) for number in range(65)]


class Cache(dict[bytes, Any]):
    """Char arrays, converted once."""

    def __init__(self, convert: Callable[[bytes], Any]) -> None:
        super().__init__()
        self._convert = convert

    def __missing__(self, data: bytes) -> Any:
        made = self[data] = self._convert(data.partition(b"\0")[0])
        return made


def quote(string: str) -> str:
    """A string as JSON in which every character is printable."""
    quoted: str = encoder.encode_basestring(string)
    if quoted.isprintable():
        return quoted
    return "".join(c if c.isprintable() else encoder.encode_basestring_ascii(c)[1:-1] for c in quoted)


def json_text(data: bytes) -> bytes:
    """Bytes as JSON; quoted with care only if something in them is special."""
    return quote(text(data)).encode() if data.translate(None, PRINTABLE) else b'"%b"' % data


def json_strings(data: bytes) -> bytes:
    """The same for strings with a NUL between them."""
    if data.translate(None, PRINTABLE_OR_NUL):
        return ("[" + ",".join(quote(text(part)) for part in data.split(b"\0")) + "]").encode()
    return b'["%b"]' % data.replace(b"\0", b'","')


# What a source says for a field, by its kind.
VALUE: Final = {"int": "{0}", "char": "texts[{0}]", "tail": "{0}", "tails": "{0}"}
STORE: Final = {kind: "e.{0} = " + value for kind, value in VALUE.items()}
ITEM: Final = {kind: '"{0}": ' + value for kind, value in VALUE.items()}
JSON: Final = {**VALUE, "char": "json_texts[{0}]", "tail": "json_text({0})", "tails": "json_strings({0})"}
LINE: Final = {kind: '"{0}":%d' if kind == "int" else '"{0}":%b' for kind in VALUE}
F_LINE: Final = {"int": '"{0}":{{{0}}}', "char": '"{0}":{{quoted[{0}]}}', "tail": '"{0}":{{quote({0})}}'}
F_LINE["tails"] = '"{0}":[{{",".join(map(quote, {0}))}}]'


def said(records: str, how: dict[str, str], separator: str = ", ") -> str:
    """All fields, each said as its kind is."""
    return separator.join(how[kind].format(name) for name, kind in KINDS[records].items())


def compiled(source: str) -> dict[str, Any]:
    """The names of a variant: what its source defines, its own caches, and what this module has."""
    quoted = Cache(lambda data: quote(text(data)))
    names = {**globals(), "texts": Cache(text), "json_texts": Cache(json_text), "quoted": quoted}
    prelude = f"import asyncio, collections, dataclasses, {', '.join(PACKAGES)}\nnew = object.__new__\n"
    exec(compile(prelude + source, "<variant>", "exec", dont_inherit=True), names)
    return names


def same(got: Any, expected: list[Any]) -> bool:
    """Whether JSON lines, strings, events or chunks of events say what they should."""
    if isinstance(got, bytes | bytearray):
        return list(map(json.loads, got.splitlines())) == list(map(json.loads, map(json.dumps, expected)))
    events = got if isinstance(got, list) else [event for chunk in got for event in chunk]
    values = [e if isinstance(e, str) else {name: getattr(e, name) for name in expected[0]} for e in events]
    return values == expected


def timed(names: dict[str, Any], batches: list[Batch], *, collected: bool) -> float:
    """Nanoseconds per event, with the garbage collector on or off."""
    for cache in ("texts", "json_texts", "quoted"):
        names[cache].clear()
    run = names.get("run", names["decode"])
    (gc.enable if collected else gc.disable)()
    begin = time.perf_counter_ns()
    for batch, _ in batches:
        run(batch)
    taken = time.perf_counter_ns() - begin
    gc.enable()
    return taken / sum(len(expected) for _, expected in batches)


def measure(title: str, rounds: int, sources: dict[str, str], columns: dict[str, list[Batch]]) -> Times:
    """Checks and times all sources with all columns; prints a table, sorted by its first column."""
    usable = (row for row in sources if "msgspec" in PACKAGES or "msgspec" not in row)
    times: dict[str, list[list[float]]] = {row: [] for row in usable}
    turns = []
    for row, (column, batches) in itertools.product(times, columns.items()):
        names = compiled(sources[row].replace("$WAY", WAYS.get(column.partition(",")[0], "")))
        assert all(same(names["decode"](batch), expected) for batch, expected in batches), (row, column)
        times[row].append([])
        turns.append((times[row][-1], names, batches, not column.endswith("gc off")))
    for number in range(rounds + 1):
        for found, names, batches, collected in random.sample(turns, len(turns)):
            taken = timed(names, batches, collected=collected)
            if number:  # the first round specialises bytecode
                found.append(taken)
    print(f"\n| {title} | {' | '.join(columns)} | ratio |\n|---{'|--:' * (len(columns) + 1)}|")
    medians = {row: statistics.median(cells[0]) for row, cells in times.items()}
    for row in sorted(times, key=medians.__getitem__):
        quartiles = [statistics.quantiles(cell, n=4) for cell in times[row]]
        cells = " | ".join(f"{middle:,.0f} ±{(high - low) / 2:,.0f}" for low, middle, high in quartiles)
        print(f"| {row} | {cells} | {medians[row] / min(medians.values()):.2f} |", flush=True)
    return {row: dict(zip(columns, cells, strict=True)) for row, cells in times.items()}


# --- Records to events ---
ROW: Final = ", ".join(KINDS["FLAT"])
CALL: Final = f"Event({said('FLAT', VALUE)})"
PLAIN: Final = "dataclasses.make_dataclass('Event', KINDS['FLAT'])"
SLOTS: Final = "dataclasses.make_dataclass('Event', KINDS['FLAT'], slots=True)"
STRUCT: Final = "msgspec.defstruct('Event', KINDS['FLAT'], gc=False)"
STORES: Final = f"e = new(Event); {said('FLAT', STORE, '; ')}"
DICT: Final = f"e = new(Event); e.__dict__ = {{{said('FLAT', ITEM)}}}"
CHUNKS: Final = "while chunk := made(itertools.islice(rows, {})): yield chunk"
WAYS: Final = {f"chunks of {size}": CHUNKS.format(size) for size in (128, 64, 256)}
WAYS.update({"whole batch": "yield made(rows)", "one by one": "yield one_by_one(rows)"})
WAYS.update(asyncio="asyncio.run(walk())", uvloop="uvloop.run(walk())", trio="trio.run(walk)")


def flat_source(event: str, make: str) -> str:
    """The source that makes events of fixed-size records."""
    made = f"made = []\n    for {ROW} in rows: {make}; made.append(e)\n    return made"
    if make is CALL:  # an expression needs no loop of its own
        made, make = f"return [{CALL} for {ROW} in rows]", f"e = {CALL}"
    return f"""
Event = {event}
def made(rows):
    {made}
def one_by_one(rows):
    for {ROW} in rows: {make}; yield e
def decode(raw):
    rows = FLAT.iter_unpack(raw)
    $WAY
def run(raw):
    for chunk in decode(raw):
        for e in chunk: e.pid; e.uid; e.comm; e.message
"""


HEADS: Final = {
    "FLAT": f"for {ROW} in FLAT.iter_unpack(raw):",
    "EXEC": f"""position, size = 0, len(raw)
    while position < size:
        length, {INTEGERS}, filename_size, tail_size, comm, truncated = EXEC.unpack_from(raw, position)
        middle = position + EXEC.size + filename_size
        filename, args = raw[position + EXEC.size : middle], raw[middle : middle + tail_size - 1]
        position += (length + 15) & ~7""",
}


def loop(records: str, make: str, result: str = "made", empty: str = "[]", event: str = "None") -> str:
    """The source that makes something of each record; `event` is what makes the class."""
    return f"""
Event = {event.replace("FLAT", records)}
def decode(raw):
    made = {empty}
    {HEADS[records]}
        {make}
    return {result}
"""


FORMS: Final = {
    "plain dataclass, called": flat_source(PLAIN, CALL),
    "plain dataclass, object.__new__ + stores": flat_source(PLAIN, STORES),
    "plain dataclass, object.__new__ + __dict__": flat_source(PLAIN, DICT),
    "slots dataclass, called": flat_source(SLOTS, CALL),
    "slots dataclass, object.__new__ + stores": flat_source(SLOTS, STORES),
    "frozen slots dataclass, called": flat_source(SLOTS.replace("slots", "frozen=True, slots"), CALL),
    "NamedTuple, called": flat_source("collections.namedtuple('Event', KINDS['FLAT'])", CALL),
    "msgspec.Struct(gc=False), called": flat_source(STRUCT, CALL),
}
TO_TEXT: Final = 'decode("utf-8", "backslashreplace")'
LISTED: Final = f'filename = filename.{TO_TEXT}; args = args.{TO_TEXT}.split("\\0"); '
SPLIT: Final = f'filename = filename.{TO_TEXT}; args = tuple([a.{TO_TEXT} for a in args.split(b"\\0")]); '
READ: Final = "def run(raw):\n    for e in decode(raw): e.pid; e.comm; e.filename; e.args"
EXEC_CALL: Final = f"e = Event({said('EXEC', VALUE)}); made.append(e)"
EXEC_STORES: Final = f"e = new(Event); {said('EXEC', STORE, '; ')}; made.append(e)"
EXEC_FORMS: Final = {
    f"{kind} dataclass, {making}; arguments {tail}": loop("EXEC", convert + make, event=event) + READ
    for kind, event in (("plain", PLAIN), ("slots", SLOTS))
    for making, make in (("called", EXEC_CALL), ("object.__new__ + stores", EXEC_STORES))
    for tail, convert in (("decoded, split", LISTED + "args = tuple(args); "), ("split, decoded", SPLIT))
}
CONVERSIONS: Final = {
    "map(cache.__getitem__, column)": "def decode(raw): return list(map(texts.__getitem__, raw))",
    "cache[data] each": "def decode(raw): return [texts[data] for data in raw]",
    "partition, decode": f'def decode(raw): return [data.partition(b"\\0")[0].{TO_TEXT} for data in raw]',
}

# --- Asynchronous iteration ---
WALK: Final = """
async def fetch(batches): return next(batches, [])
class Stream:
    def __init__(self, batches): self._batches, self._chunk = batches, iter(())
    def __aiter__(self): return self
    async def __anext__(self):
        for e in self._chunk: return e
        self._chunk = iter(await fetch(self._batches))
        for e in self._chunk: return e
        raise StopAsyncIteration
async def generated(batches):
    while batch := await fetch(batches):
        for e in batch: yield e
def run(raw):
    async def walk():
        batches = iter(raw)
        {walk}pass
    $WAY
def decode(raw):
    got = []
    async def walk():
        batches = iter(raw)
        {walk}got.append(e)
    $WAY
    return got
"""
BY_BATCH: Final = "while batch := await fetch(batches):\n            for e in batch: "
WALKS: Final = {
    "async def __anext__ with for ... return": WALK.format(walk="async for e in Stream(batches): "),
    "async generator": WALK.format(walk="async for e in generated(batches): "),
    "batches, inner for": WALK.format(walk=BY_BATCH),
}

# --- JSON lines ---
LINES: Final = {records: f"{{{said(records, LINE, ',')}}}\n".encode() for records in KINDS}
COLUMN_WISE: Final = """def decode(raw):
    lines = []
    for start in range(0, len(raw), 64 * FLAT.size):
        number = min(64, (len(raw) - start) // FLAT.size)
        values = list(BLOCKS[number].unpack_from(raw, start))
        values[5::7] = map(json_texts.__getitem__, values[5::7])
        values[6::7] = map(json_texts.__getitem__, values[6::7])
        lines.append(LINES["FLAT"] * number % tuple(values))
    return b"".join(lines)"""


def line_sources(records: str, to_text: str = "") -> dict[str, str]:
    """Sources that make a JSON line of each record."""
    call = f"Event({said(records, VALUE)})"
    form = f"made.append({LINES[records]!r} % ({said(records, JSON)}))"
    append = to_text + "made.append({})"
    dump = to_text + "made += orjson.dumps({}, option=orjson.OPT_APPEND_NEWLINE)"
    f_string = f"f'{{{{{said(records, F_LINE, ',')}}}}}\\n'"
    asdict = append.format(f"json.dumps(dataclasses.asdict({call})) + '\\n'")
    joined, encoded = '"".join(made).encode()', "msgspec.json.Encoder().encode_lines(made)"
    return {
        "bytes, form % each": loop(records, form, 'b"".join(made)'),
        "f-string each": loop(records, append.format(f_string), joined),
        "orjson, dict each": loop(records, dump.format(f"{{{said(records, ITEM)}}}"), empty="bytearray()"),
        "orjson, plain dataclass each": loop(records, dump.format(call), empty="bytearray()", event=PLAIN),
        "orjson, slots dataclass each": loop(records, dump.format(call), empty="bytearray()", event=SLOTS),
        "msgspec, encode_lines(Structs)": loop(records, append.format(call), encoded, event=STRUCT),
        "json.dumps(asdict(dataclass)) each": loop(records, asdict, joined, event=PLAIN),
    }


def main() -> None:
    """Prints where and how it measures, and the tables."""
    parser = argparse.ArgumentParser(description="Which form of events, iteration and JSON lines is fastest.")
    parser.add_argument("--rounds", type=int, default=11, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was found, for machines")
    options = parser.parse_args()
    rounds = max(2, options.rounds)  # of one there are no quartiles
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    model = re.search(r"(?<=model name\t: ).*|$", Path("/proc/cpuinfo").read_text())
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    print(f"{model and model[0]}, pinned to one core; {platform.platform()}.")
    print(f"Python {platform.python_version()}; {versions}; gc {gc.get_threshold()}.")
    print(f"ns per event: median of {rounds} shuffled rounds ± half the interquartile range.")
    random.seed(1)
    flat = {kind: [flat_batch(word) for _ in range(3)] for kind, word in STRINGS.items()}
    long = {kind: [exec_batch(word) for _ in range(3)] for kind, word in STRINGS.items() if "few" not in kind}
    columns = {kind: [[row[6] for row in FLAT.iter_unpack(raw)] for raw, _ in flat[kind]] for kind in flat}
    chars = {kind: [(column, list(map(text, column))) for column in columns[kind]] for kind in columns}
    loops = {name: [([["e"] * 128] * 1000, ["e"] * 128_000)] for name in ("asyncio", "uvloop", "trio")}
    ways = [*(way for way in WAYS if way not in loops), "chunks of 128, gc off", "whole batch, gc off"]
    lines = {"bytes, (form * 64) % all, strings column-wise": COLUMN_WISE}
    gc.freeze()  # the collector need not look at what is expected
    events = measure("fixed-size record to event", rounds, FORMS, dict.fromkeys(ways, flat["few strings"]))
    texts = measure("char array to str", rounds, CONVERSIONS, chars)
    gcs = dict.fromkeys(("gc on", "gc off"), long["distinct strings"])
    measure("variable-length record to event", rounds, EXEC_FORMS, gcs)
    walks = measure("async for, events ready in batches of 128", rounds, WALKS, loops)
    forms = measure("fixed-size record to JSON line", rounds, lines | line_sources("FLAT"), flat)
    measure("variable-length record to JSON line", rounds, line_sources("EXEC", LISTED), long)
    if options.json:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from benchmarks.claims import ratio, save  # what is imported is not to be in what is measured

        made, column, whole = "plain dataclass, object.__new__ + stores", "chunks of 128", "whole batch"
        stores, plain = events[made][column], "time per event, of plain dataclasses made by stores"
        cached, decoded = (texts[form]["distinct strings"] for form in list(CONVERSIONS)[1:])
        method, generated = (walks[form]["asyncio"] for form in list(WALKS)[:2])
        claims = [
            ratio(f"{form}: {plain}", events[form][column], stores)
            for form in ("plain dataclass, called", "slots dataclass, object.__new__ + stores")
        ]
        claims += [
            ratio(
                "a whole batch decoded at once: time per event, of chunks of 128", events[made][whole], stores
            ),
            ratio("char arrays through a cache that never hits: time, of decoding each", cached, decoded),
            ratio("an async generator: time per event, of `__anext__`", generated, method),
            ratio(
                "JSON lines by orjson of dicts: time per event, of formatting columns",
                forms["orjson, dict each"]["few strings"],
                forms[next(iter(lines))]["few strings"],
            ),
        ]
        save(options.json, claims)


if __name__ == "__main__":
    main()
