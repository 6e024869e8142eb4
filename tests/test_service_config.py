"""The service's configuration: what it says of mistakes, and what it hands on."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest

from ebpfstream.errors import ArgumentError
from ebpfstream.filters import Filters
from ebpfstream.kernel.bpf import online_cpus
from ebpfstream.redaction import SECRETS, wanted
from ebpfstream.service import logs
from ebpfstream.service.config import Config, ConfigError, ServiceConfig, load, parse
from ebpfstream.shaping import named_fields
from ebpfstream.sinks.file import FileSink
from ebpfstream.sinks.stdout import StdoutSink
from ebpfstream.tracers.execve import ExecEvent

PATH = Path("/etc/ebpfstream/execs.toml")
SINK = '[[source.sink]]\naddress = "blackhole:"\n'
EXECVE = '[[source]]\nkind = "execve"\n'
SYSCALLS = '[[source]]\nkind = "syscalls"\n'


def said(text: str, path: Path = PATH) -> list[str]:
    """What is wrong with a text: LINE: KEY: PROBLEM."""
    with pytest.raises(ConfigError) as caught:
        parse(text, path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    return [line.removeprefix(f"{path}:") for line in lines]


def read(text: str) -> Config:
    return parse(text, PATH)


# --- what is right


def test_the_least() -> None:
    made = read(EXECVE + SINK)
    service = made.service
    assert service.model_dump() == {
        "name": "execs",
        "deadline": 10.0,
        "drop_privileges": True,
        "user": None,
        "log_level": "info",
        "log_format": "auto",
        "listen": "127.0.0.1:9435",
        "lock_folder": Path("/run/ebpfstream"),
    }
    (source,) = made.sources
    assert (source.kind, source.name, source.where, source.fields) == ("execve", "execve", None, None)
    assert source.filters == {
        "pid": None,
        "ppid": None,
        "uid": None,
        "gid": None,
        "comm": None,
        "cgroup": None,
        "exclude_self": True,
    }
    assert Filters(**source.filters) == Filters(exclude_self=True)
    assert source.stream_options == {
        "buffer": "auto",
        "buffer_size": 4 << 20,
        "overload": "lose",
        "latency": 0.05,
        "failed": False,
    }
    assert source.condition(ExecEvent) is None
    assert source.redaction() is False
    (sink,) = source.sinks
    assert (sink.name, sink.address, sink.scheme, sink.options) == (
        "blackhole",
        "blackhole:",
        "blackhole",
        {},
    )


def test_everything(tmp_path: Path) -> None:
    (tmp_path / "hello.c").touch()
    made = parse(
        """
        service = {name = "all-of_it.1", deadline = 1.5, user = "root", log_level = "debug", log_format = "json"}
        [[source]]
        name = "shells"
        kind = "execve"
        where = '''
            (uid != 0
             and comm == "sh")'''
        fields = ["time", " comm = name "]
        redact = true
        redact_patterns = ["a(b)"]
        buffer = "perf"
        buffer_size = 8_388_608
        overload = "sample"
        latency = 1
        failed = true
        filters.uid = 0x10
        filters.comm = "sh"
        filters.exclude_self = false
        [[source.sink]]
        name = "archive"
        address = "file:/var/log/x?fsync=batch"
        rotate = 1000000.0
        keep = 3
        durable = true
        spool = "/var/spool/x"
        [[source.sink]]
        address = "stdout:"

        [[source]]
        kind = "syscalls"
        calls = ["openat", "1", 2]
        ignore = ["read"]
        result = true
        fields = {pid = "process"}
        redact_patterns = ["x"]
        [[source.sink]]
        address = "blackhole:"

        [[source]]
        kind = "program"
        file = "hello.c"
        attach = ["syscall:execve=hello"]
        output = "events"
        cflags = ["-DPID=1"]
        latency = "0"
        [[source.sink]]
        address = "blackhole:"
        """,
        tmp_path / "x.toml",
    )
    service = made.service
    assert (service.name, service.deadline, service.user) == ("all-of_it.1", 1.5, "root")
    assert (service.log_level, service.log_format) == ("debug", "json")
    shells, calls, program = made.sources

    assert shells.fields == {"time": "time", "comm": "name"}
    assert shells.redaction() == [*SECRETS, "a(b)"]
    holds = shells.condition(ExecEvent)
    assert holds is not None
    assert [holds(SimpleNamespace(uid=uid, comm="sh")) for uid in (0, 1)] == [False, True]
    assert shells.stream_options == {
        "buffer": "perf",
        "buffer_size": 8 << 20,
        "overload": "sample",
        "latency": 1.0,
        "failed": True,
    }
    assert {name: value for name, value in shells.filters.items() if value is not None} == {
        "uid": 16,
        "comm": "sh",
        "exclude_self": False,
    }
    archive, stdout = (sink.make() for sink in shells.sinks)
    assert isinstance(archive, FileSink)
    assert (archive.name, archive.durable, archive.spool) == ("archive", True, "/var/spool/x")
    assert (archive._appender._rotate_at, archive._appender._keep) == (1_000_000, 3)
    assert archive._appender._fsync == "batch"
    assert isinstance(stdout, StdoutSink)
    assert stdout.name == "stdout"
    assert shells.sinks[0].make() is not archive

    assert calls.name == "syscalls"
    assert calls.calls == ("openat", 1, 2)
    assert calls.fields == {"pid": "process"}
    assert calls.redaction() == ["x"]
    assert calls.stream_options == {
        "buffer": "auto",
        "buffer_size": 4 << 20,
        "overload": "lose",
        "latency": 0.05,
        "ignore": ("read",),
        "result": True,
    }

    assert program.file == tmp_path / "hello.c"
    assert (program.attach, program.output) == (("syscall:execve=hello",), "events")
    assert program.cflags == ("-DPID=1",)
    assert program.filters == {}
    assert program.stream_options == {"latency": 0.0}


def test_a_perf_buffer_of_a_program(tmp_path: Path) -> None:
    (tmp_path / "hello.c").touch()
    text = f'[[source]]\nkind = "program"\nfile = "{tmp_path}/hello.c"\nbuffer_size = "8MiB"\n' + SINK
    (program,) = read(text).sources
    assert program.file == tmp_path / "hello.c"
    assert program.stream_options == {"latency": 0.05, "buffer_size": 8 << 20}
    assert program.where is None


def test_what_is_read_cannot_be_changed() -> None:
    made = read(EXECVE + SINK)
    with pytest.raises(ValueError, match="frozen"):
        made.sources[0].where = "pid"


@pytest.mark.parametrize(
    ("service", "value"),
    [
        ('listen = ""', ""),
        ('listen = "[::1]:0"', "[::1]:0"),
        ('user = "0"', "0"),
        ("user = 0", "0"),
        ('log_level = "warning"', "warning"),
        ('lock_folder = "/tmp"', Path("/tmp")),
        ("deadline = 0", 0.0),
        ('deadline = "500ms"', 0.5),
        ("drop_privileges = false", False),
        ('name = "a"', "a"),
    ],
)
def test_the_service(service: str, value: object) -> None:
    made = read(f"[service]\n{service}\n{EXECVE}{SINK}")
    assert getattr(made.service, service.split()[0]) == value


def test_levels_and_formats_are_those_of_the_log() -> None:
    taken = ServiceConfig.model_fields
    assert set(typing.get_args(taken["log_level"].annotation)) == set(typing.get_args(logs.Level))
    assert set(typing.get_args(taken["log_format"].annotation)) == set(typing.get_args(logs.Format))


# --- what is wrong

NO_NAME = "give letters, digits, hyphens, underscores and dots, such as execs"
NO_SIZE = "is not a number of bytes such as 64KiB or 100MB"
NO_TIME = "is not a time such as 500ms, 10s, 5m, 1h or 1d"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("name = ''", f"name: '' is no name: {NO_NAME}"),
        ("name = 'a b'", f"name: 'a b' is no name: {NO_NAME}"),
        ("name = '../x'", f"name: '../x' is no name: {NO_NAME}"),
        ("name = 'x/y'", f"name: 'x/y' is no name: {NO_NAME}"),
        ("name = 1", "name: 1 is not text"),
        ("deadline = '4 cows'", f"deadline: '4 cows' {NO_TIME}"),
        ("deadline = -1", f"deadline: -1 {NO_TIME}"),
        ("deadline = inf", f"deadline: inf {NO_TIME}"),
        ("deadline = true", f"deadline: true {NO_TIME}"),
        ("deadline = 12:00:00", f"deadline: 12:00:00 {NO_TIME}"),
        ("user = 'no body'", ("user: there is no user 'no body' on this machine: give a name or number as `getent "
            "passwd` shows it")),
        ("user = 4294967295", ("user: there is no user '4294967295' on this machine: give a name or number as `getent "
            "passwd` shows it")),
        ("user = true", "user: true is not text"),
        ("drop_privileges = 'yes'", "drop_privileges: 'yes' is not true or false"),
        ("drop_privileges = 1", "drop_privileges: 1 is not true or false"),
        ("drop_privileges = false\nuser = 'root'",
            "user: nobody becomes it with drop_privileges = false: leave one of them out"),
        ("log_level = 'warn'",
            "log_level: 'warn' is not debug or info or warning or error; did you mean warning?"),
        ("log_level = 30", "log_level: 30 is not debug or info or warning or error"),
        ("log_format = 'xml'", "log_format: 'xml' is not auto or json or text"),
        ("listen = 9435", "listen: 9435 is not text"),
        ("lock_folder = 'run'",
            "lock_folder: 'run' is no path from the root: give one such as /run/ebpfstream"),
        ("prot = 1", ("prot: there is no key 'prot'; there are name, deadline, drop_privileges, user, log_level, "
            "log_format, listen, lock_folder")),
        ("source = 1", ("source: there is no key 'source'; there are name, deadline, drop_privileges, user, "
            "log_level, log_format, listen, lock_folder")),
        ("listn = ''", "listn: there is no key 'listn'; did you mean 'listen'?"),
        ("where = 'uid'", "where: there is no key 'where' here: it belongs below [[source]]"),
        ("comm = 'sh'", "comm: there is no key 'comm' here: it belongs below [source.filters]"),
        ("address = 'stdout:'", "address: there is no key 'address' here: it belongs below [[source.sink]]"),
    ],
)  # fmt: skip
def test_wrong_in_the_service(line: str, problem: str) -> None:
    at = 2 + line.count("\n")
    assert said(f"[service]\n{line}\n{EXECVE}{SINK}") == [f"{at}: service.{problem}"]


def test_where_nobody_can_listen() -> None:
    (problem,) = said(f"[service]\nlisten = '9435'\n{EXECVE}{SINK}")
    assert problem.startswith(
        "2: service.listen: listen='9435' is no address: write host:port, such as 127.0.0.1"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("name = 'a b'", f"name: 'a b' is no name: {NO_NAME}"),
        ("buffer_size = '4 cows'", f"buffer_size: '4 cows' {NO_SIZE}"),
        ("buffer_size = 1.5", f"buffer_size: 1.5 {NO_SIZE}"),
        ("buffer_size = []", f"buffer_size: a list {NO_SIZE}"),
        ("buffer_size = 1", "buffer_size: buffer_size=1 is impossible: give 4096 to 2147483648 bytes"),
        ("buffer = 'rng'", "buffer: 'rng' is not auto or ring or perf; did you mean ring?"),
        ("overload = {}", "overload: a table is not lose or sample"),
        ("latency = '-1'", f"latency: '-1' {NO_TIME}"),
        ("failed = 'true'", "failed: 'true' is not true or false"),
        ("where = 3", "where: 3 is not text"),
        ("where = 'pid ='", ("where: 'pid =' is no condition (invalid syntax): write a Python expression in the names "
            "of fields, such as uid == 0")),
        ("fields = 'pid'", 'fields: \'pid\' is not a list of fields: write ["pid"]'),
        ("fields = []", "fields: fields={} is impossible: give one or more fields, each with a name of its own"),
        ("fields = [1]", "fields: 1 is not text"),
        ("fields = {pid = 1}", "fields: 1 is not text"),
        ("fields = ['=x']", "fields: '=x' names no field: give pid, or comm=name for another name in JSON"),
        ("fields = ['pid', 'pid=x']", "fields: the field 'pid' is given twice: give it once"),
        ("fields = ['pid', 'pidd']", "fields: ExecEvent has no field 'pidd'; did you mean 'pid' or 'ppid'?"),
        ("redact = 'no'", "redact: 'no' is not true or false"),
        ("redact_patterns = 'x'", 'redact_patterns: \'x\' is not a list: write ["x"]'),
        ("redact_patterns = ['x', '(']", ("redact_patterns[1]: '(' is no regular expression: missing ), unterminated "
            "subpattern at position 0")),
        ("calls = ['openat']", 'calls: calls is for kind = "syscalls", not "execve"'),
        ("ignore = 1", 'ignore: ignore is for kind = "syscalls", not "execve"'),
        ("result = true", 'result: result is for kind = "syscalls", not "execve"'),
        ("file = 'x.c'", 'file: file is for kind = "program", not "execve"'),
        ("attach = []", 'attach: attach is for kind = "program", not "execve"'),
        ("output = 'x'", 'output: output is for kind = "program", not "execve"'),
        ("cflags = []", 'cflags: cflags is for kind = "program", not "execve"'),
        ("bufer = 'ring'", "bufer: there is no key 'bufer'; did you mean 'buffer'?"),
        ("'a b' = 1", ("'a b': there is no key 'a b'; there are kind, name, where, fields, redact, redact_patterns, "
            "buffer, buffer_size, overload, latency, failed, filters, sink")),
        ("log_level = 'info'", "log_level: there is no key 'log_level' here: it belongs below [service]"),
        ("pid = 1", "pid: there is no key 'pid' here: it belongs below [source.filters]"),
        ("sinks = 1", "sinks: there is no key 'sinks'; did you mean 'sink'?"),
        ("filter_config = {}", ("filter_config: there is no key 'filter_config'; there are kind, name, where, fields, "
            "redact, redact_patterns, buffer, buffer_size, overload, latency, failed, filters, sink")),
        ("filters = 1", "filters: 1 is not a table: write [source.filters]"),
        ("filters = [{}]", "filters: there is one such table: write [source.filters]"),
        ("filters.pid = '1'", "filters.pid: '1' is not a whole number"),
        ("filters.pid = true", "filters.pid: true is not a whole number"),
        ("filters.uid = -1", "filters.uid: uid=-1 is impossible: give a number from 0 to 4294967295"),
        ("filters.comm = '0123456789abcdef'",
            "filters.comm: comm='0123456789abcdef' is too long: the kernel keeps 15 bytes of a name"),
        ("filters.exclude_self = 'no'", "filters.exclude_self: 'no' is not true or false"),
        ("filters.comn = 'x'", "filters.comn: there is no key 'comn'; did you mean 'comm'?"),
        ("filters.where = 'x'", ("filters.where: there is no key 'where' here: it belongs below [[source]], before "
            "[source.filters]")),
        ("filters.name = 'x'", ("filters.name: there is no key 'name' here: it belongs below [[source]], before "
            "[source.filters]")),
    ],
)  # fmt: skip
def test_wrong_in_a_source(line: str, problem: str) -> None:
    assert said(f"{EXECVE}\n# it is here\n{line}\n{SINK}") == [f"5: source[0].{problem}"]


def test_a_condition_that_there_cannot_be() -> None:
    (problem,) = said(f"{SYSCALLS}where = 'comn == 1'\n{SINK}")
    assert problem.startswith(
        "3: source[0].where: 'comn == 1': SyscallEvent has no field 'comn'; did you mean comm? (it has pid, "
    )


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ("calls = ['opnat', 5000, true, 'read']", [
            "3: source[0].calls[0]: there is no system call 'opnat' on ",
            "3: source[0].calls[1]: there is no system call 5000: give a name, or a number from 0 to 1023",
            "3: source[0].calls[2]: true is no system call: give a name, or a number",
        ]),
        ("ignore = ['1024']", ["3: source[0].ignore[0]: there is no system call 1024: give a name, or a number "]),
        ("calls = ['read', 'write']\nignore = ['write', 'read', 'openat']", [
            "4: source[0].ignore: all calls that are named are to be ignored: nothing is left to trace"
        ]),
        ("failed = true", ['3: source[0].failed: failed is for kind = "execve", not "syscalls"']),
        ("filed = true", [
            "3: source[0].filed: there is no key 'filed'; did you mean 'fields'?",
        ]),
    ],
)  # fmt: skip
def test_wrong_in_a_source_of_calls(lines: str, problems: list[str]) -> None:
    found = said(SYSCALLS + lines + "\n" + SINK)
    assert len(found) == len(problems)
    assert all(one.startswith(problem) for one, problem in zip(found, problems, strict=True))


def test_wrong_in_a_program(tmp_path: Path) -> None:
    (tmp_path / "hello.c").touch()
    (tmp_path / "loop.c").symlink_to("loop.c")
    start = '[[source]]\nkind = "program"\n'
    here = tmp_path / "x.toml"
    remedy = "give a path from the root, or from the folder of the configuration"
    assert said(start + SINK, here) == [
        '1: source[0].file: kind = "program" needs the file of its text: give one such as "hello.c"'
    ]
    for file in ("helo.c", ".", "loop.c", "hello.c/x"):
        assert said(f"{start}file = {file!r}\n{SINK}", here) == [
            f"3: source[0].file: there is no file {str(tmp_path / file)!r}: {remedy}"
        ]
    assert said(f"{start}file = 1\n{SINK}", here) == ["3: source[0].file: 1 is not text"]
    cpus = len(online_cpus())
    assert said(f"{start}file = 'hello.c'\nfields = []\nbuffer_size = 1\n{SINK}", here) == [
        "4: source[0].fields: fields={} is impossible: give one or more fields, each with a name of its own",
        (
            f"5: source[0].buffer_size: buffer_size=1 is impossible: give {mmap.PAGESIZE * cpus} to {cpus << 30} bytes "
            f"for {cpus} CPUs"
        ),
    ]
    rest = 'buffer = "ring"\noverload = "lose"\nattach = ["sycall:execve=hello", "a"]\n[source.filters]\n'
    text = f"{start}file = 'hello.c'\n{rest}{SINK}"
    kinds = "syscall, tracepoint, raw_tracepoint, kprobe, kretprobe, uprobe, uretprobe"
    assert said(text, here) == [
        '4: source[0].buffer: buffer is for kind = "execve" or "syscalls", not "program"',
        '5: source[0].overload: overload is for kind = "execve" or "syscalls", not "program"',
        (
            "6: source[0].attach[0]: 'sycall:execve=hello': there is no kind of hook 'sycall'; did you mean syscall? "
            f"(there are {kinds})"
        ),
        "6: source[0].attach[1]: 'a' is no hook: say what to attach where, such as syscall:execve=hello",
        '7: source[0].filters: filters is for kind = "execve" or "syscalls", not "program"',
    ]


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        ("address = ''", [("5: source[0].sink[0].address: '' names no kind of sink: write it as SCHEME:…, for "
            "example file:")]),
        ("address = 1", ["5: source[0].sink[0].address: 1 is not text"]),
        ("name = 'x'", [("4: source[0].sink[0].address: this key is needed: give an address such as stdout: or "
            "file:/var/log/execs.jsonl")]),
        ("adress = 'stdout:'", [("4: source[0].sink[0].address: this key is needed: give an address such as stdout: or "
            "file:/var/log/execs.jsonl; is it 'adress'?")]),
        ("address = 'stdut:'",
            ["5: source[0].sink[0].address: 'stdut:': there is no sink 'stdut'; did you mean stdout:?"]),
        ("address = 'file:x'\nrotat = '1MB'\nkeep = 'many'\nwhen_full = 'spil'", [
            "6: source[0].sink[0].rotat: there is no option 'rotat'; did you mean 'rotate'?",
            "7: source[0].sink[0].keep: 'many' is not a whole number or none",
            "8: source[0].sink[0].when_full: 'spil' is not block or drop_newest or drop_oldest or spill or fail",
        ]),
        ("address = 'file:x'\nspol = '/x'\nwhen_full = 'spill'",  # that it needs a folder is no second mistake
            ["6: source[0].sink[0].spol: there is no option 'spol'; did you mean 'spool'?"]),
        ("address = 'file:x'\nwhen_full = 'spill'", [('6: source[0].sink[0].when_full: when_full="spill" needs a '
            "folder for what is kept: give spool= as well")]),
        ("address = 'file:x'\nkeep = 3",
            ["6: source[0].sink[0].keep: keep=3 is about rotated files: give rotate= or every= as well"]),
        ("address = 'file:x?keep=3'",
            ["5: source[0].sink[0].address: keep=3 is about rotated files: give rotate= or every= as well"]),
        ("address = 'file:x?rotate=1MB'\nrotate = '1MB'", [("6: source[0].sink[0].rotate: the option 'rotate' is given "
            "in the address and beside it: leave one out")]),
        ("address = 'file:x?rotate=cows'\nkeep = 'all'", [
            "6: source[0].sink[0].keep: 'all' is not a whole number or none",
            f"5: source[0].sink[0].address: 'file:x?rotate=cows': rotate='cows' {NO_SIZE} or none",
        ]),
        ("address = 'file:x'\nrotate = [1]",
            ["6: source[0].sink[0].rotate: [1] is no option's value: give text, a number, or true or false"]),
        ("address = 'blackhole:'\nwhere = 'uid == 0'", [("6: source[0].sink[0].where: there is no option 'where': it "
            "belongs below [[source]], before [[source.sink]]")]),
    ],
)  # fmt: skip
def test_wrong_in_a_sink(lines: str, problems: list[str]) -> None:
    found = said(f"{EXECVE}\n[[source.sink]]\n{lines}\n")
    assert found == sorted(problems)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1: source: there is none: add a table [[source]]"),
        ("source = []", "1: source: there is none: add a table [[source]]"),
        ("\nsource = 1", "2: source: 1 is not a list of tables: write [[source]]"),
        ("\nsource = [1]", "2: source[0]: 1 is not a table"),
        ("\n[source]\nkind = 'execve'", "2: source: there may be several such tables: write [[source]]"),
        (f"[[service]]\n{EXECVE}{SINK}", "1: service: there is one such table: write [service]"),
        (f"service = 1\n{EXECVE}{SINK}", "1: service: 1 is not a table: write [service]"),
        (f"sorce = 1\n{EXECVE}{SINK}", "1: sorce: there is no key 'sorce'; did you mean 'source'?"),
        (f"x.y = 1\n{EXECVE}{SINK}", "1: x: there is no key 'x'; there are service, source"),
        (f"deadline = 1\n{EXECVE}{SINK}", "1: deadline: there is no key 'deadline' here: it belongs below [service]"),
        (f"\n[[source]]\n{SINK}", "2: source[0].kind: this key is needed: give execve, syscalls or program"),
        (f"\n[[source]]\nkind = 'exeve'\n{SINK}",
            "3: source[0].kind: 'exeve' is not execve or syscalls or program; did you mean execve?"),
        ("\n" + EXECVE, "2: source[0].sink: there is none: add a table [[source.sink]]"),
        (f"{EXECVE}sink = []", "3: source[0].sink: there is none: add a table [[source.sink]]"),
        (f"{EXECVE}[source.sink]\naddress = 'stdout:'",
            "3: source[0].sink: there may be several such tables: write [[source.sink]]"),
    ],
)  # fmt: skip
def test_wrong_altogether(text: str, problem: str) -> None:
    assert said(text) == [problem]


@pytest.mark.parametrize(
    ("text", "line", "end"),
    [
        ("x", 1, " (column 2)"),
        ("[service]\n\na = b\n", 3, " (column 5)"),
        ("a = 1\na = 2", 2, " (column 6)"),
        ("a = 1\n\nb = [\n1,\n", 3, " (it begins in this line)"),
        ("a = 1\nb = '''x\n\n", 2, " (it begins in this line)"),
        ("\na = " + 10_000 * "[", 2, " (it begins in this line)"),
        ("\na = " + 10_000 * "1", 2, " (it begins in this line)"),
    ],
)
def test_no_toml(text: str, line: int, end: str) -> None:
    """What it says of the mistake is Python's."""
    (found,) = said(text)
    assert re.fullmatch(rf"{line}: this is no TOML: .+{re.escape(end)}", found)


def test_keys_of_a_source_of_no_kind() -> None:
    """Those of all kinds may be meant."""
    assert said(f"[[source]]\nkind = 'exeve'\nbufer = 1\ncall = []\nfile = 'x'\n{SINK}") == [
        "2: source[0].kind: 'exeve' is not execve or syscalls or program; did you mean execve?",
        "3: source[0].bufer: there is no key 'bufer'; did you mean 'buffer'?",
        "4: source[0].call: there is no key 'call'; did you mean 'calls'?",
        (
            f"5: source[0].file: there is no file '{PATH.parent}/x': give a path from the root, or from the folder of "
            "the configuration"
        ),
    ]


def test_all_problems_are_told_at_once() -> None:
    text = """
[service]
log_levl = "info"
[[source]]
kind = "execve"
buffer_size = "4 cows"
where = "pidd"
[source.filters]
pid = -1
[[source.sink]]
address = "stdout:"
formt = "json"
[[source]]
failed = true
[[source.sink]]
adress = "stdout:"
"""
    assert [problem.split(": ")[:2] for problem in said(text)] == [
        ["3", "service.log_levl"],
        ["6", "source[0].buffer_size"],
        ["7", "source[0].where"],
        ["9", "source[0].filters.pid"],
        ["12", "source[0].sink[0].formt"],
        ["13", "source[1].kind"],
        ["15", "source[1].sink[0].address"],
    ]


def test_a_file_s_name_that_is_none() -> None:
    text = EXECVE + SINK
    assert said(text, Path("/etc/my execs.toml")) == [f"1: service.name: 'my execs' is no name: {NO_NAME}"]
    assert parse("[service]\nname = 'x'\n" + text, Path("/etc/my execs.toml")).service.name == "x"


# --- what two cannot both have


def clashing(first: str, second: str, *, in_one_source: bool = False) -> list[str]:
    between = "" if in_one_source else '[[source]]\nkind = "syscalls"\n'
    return said(f"{EXECVE}[[source.sink]]\n{first}\n{between}[[source.sink]]\nname = 'second'\n{second}\n")


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        ("address = 'stdout:'", "address = 'stdout:?format=text'",
            ("9: source[1].sink[0].address: source[0].sink[0].address (line 4) is the standard output as well: let one "
            "sink alone write to it")),
        ("address = 'file:/tmp/x'", "address = 'file:/tmp/../tmp/x?fsync=batch'",
            ("9: source[1].sink[0].address: the file '/tmp/../tmp/x' is that of source[0].sink[0].address (line 4) as "
            "well: give each sink one of its own")),
        ("address = 'file:/tmp/x'", "address = 'blackhole:'\ndead_letters = '/tmp/x'",
            ("10: source[1].sink[0].dead_letters: the file '/tmp/x' is that of source[0].sink[0].address (line 4) as "
            "well: give each sink one of its own")),
        ("address = 'blackhole:?dead_letters=/tmp/%7Bx'", "dead_letters = '/tmp/{x'\naddress = 'blackhole:'",
            ("9: source[1].sink[0].dead_letters: the file '/tmp/{x' is that of source[0].sink[0].address (line 4) as "
            "well: give each sink one of its own")),
        ("address = 'blackhole:'\ndurable = true\nspool = '/tmp/x/'",
            "address = 'file:/tmp/x'\ndurable = true\nspool = '/tmp/x'",  # which is a file to one, a folder to another
            ("13: source[1].sink[0].spool: the folder '/tmp/x' is that of source[0].sink[0].spool (line 6) as well: "
            "give each sink one of its own")),
    ],
)  # fmt: skip
def test_what_two_sinks_cannot_both_have(first: str, second: str, problem: str) -> None:
    assert clashing(first, second) == [problem]
    assert len(clashing(first, second, in_one_source=True)) == 1


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (problem,) = clashing(f"address = 'file:{tmp_path}/there/x'", f"address = 'file:{tmp_path}/link/x'")
    assert "is that of source[0].sink[0].address (line 4) as well" in problem
    assert said(EXECVE + SINK + f"name = 'a'\ndead_letters = '{tmp_path}/link/y'\n" + SINK + SINK)


def test_names_that_two_have() -> None:
    assert said(EXECVE + SINK + SYSCALLS + "name = 'execve'\n" + SINK + EXECVE + SINK + SINK) == [
        "7: source[1].name: 'execve' is the name of source[0] (line 1) as well: give each source a name of its own",
        "10: source[2].name: 'execve' is the name of source[0] (line 1) as well: give each source a name of its own",
        (
            "14: source[2].sink[1].name: 'blackhole' is the name of source[2].sink[0] (line 12) as well: give each "
            "sink of a source a name of its own"
        ),
    ]
    assert read(EXECVE + SINK + SYSCALLS + SINK)


def test_clashes_are_told_beside_other_problems() -> None:
    text = (
        EXECVE
        + "buffer_size = 1\n"
        + SINK
        + "formt = 1\n"
        + SINK
        + "[[source]]\n[[source.sink]]\naddress = 1\n"
    )
    assert [problem.split(": ")[:2] for problem in said(text)] == [
        ["3", "source[0].buffer_size"],
        ["6", "source[0].sink[0].formt"],
        ["7", "source[0].sink[1].name"],
        ["9", "source[1].kind"],
        ["11", "source[1].sink[0].address"],
    ]


# --- files


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: there is no such file: `ebpfstream config init {path}` makes one"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: this is a folder: give a file in it"
    path.symlink_to(path)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: cannot be read: Too many levels of symbolic links; give this user the right to, or another file"
    )
    path.unlink()
    path.write_bytes(b"[service]\n# \xe4\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}:2: this is no UTF-8 (byte 0xe4): save the file as UTF-8"
    assert isinstance(caught.value, ArgumentError)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "über.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (EXECVE + SINK).replace("\n", "\r\n").encode())
    made = load(path)
    assert made.service.name == "über"
    assert made == load(path)


def test_without_pydantic() -> None:
    code = """
import sys
sys.modules["pydantic"] = None
import ebpfstream
ebpfstream.open_sink, ebpfstream.forward
import ebpfstream.service
try:
    import ebpfstream.service.config
except ImportError as error:
    print(error.name)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert (done.stdout, done.stderr) == ("pydantic\n", "")


# --- what the command line has in common with it


def test_named_fields() -> None:
    assert named_fields(["pid", " comm = name ", "uid="]) == {"pid": "pid", "comm": "name", "uid": "uid"}
    assert list(named_fields(["uid", "pid"])) == ["uid", "pid"]
    for wrong, problem in (
        (["pid", ""], "'' names no field"),
        (["pid", "pid"], "the field 'pid' is given twice"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            named_fields(wrong)


def test_wanted_redactions() -> None:
    assert [wanted(usual, patterns) for usual in (False, True) for patterns in ((), ("x",))] == [
        False,
        ["x"],
        True,
        [*SECRETS, "x"],
    ]
