"""The messages that docs/troubleshooting.md explains are those that there are, and come when it says so."""

from __future__ import annotations

import ast
import errno
import logging
import os
import re
import socket
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiokafka import errors as kafka_errors
from click.testing import CliRunner

from ebpfstream import (
    BPF,
    BlackholeSink,
    EbpfStreamError,
    Event,
    EventBatch,
    ExecEvent,
    FileSink,
    KafkaSink,
    StdoutSink,
    forward,
    open_sink,
    trace_execve,
    trace_syscalls,
)
from ebpfstream.cli import main
from ebpfstream.conditions import condition
from ebpfstream.kernel import bcc, kprobes
from ebpfstream.kernel.headers import Kernel
from ebpfstream.opening import message
from ebpfstream.service import config
from ebpfstream.service.endpoint import Endpoint
from ebpfstream.service.instance import Instance
from ebpfstream.service.metrics import LedgerCollector
from ebpfstream.sinks import kafka_client
from ebpfstream.spool import Spool
from ebpfstream.testing import ExampleEvent, make_batch
from ebpfstream.turns import Turn

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
HEADINGS = re.findall(r"(?m)^### `(.*)`$", PAGE.read_text())

# --- every message is in the sources


@cache
def templates() -> list[str]:
    """Every text in the sources, with `…` where something is put in; no docstrings."""
    files = [*(ROOT / "ebpfstream").rglob("*.py"), *(ROOT / "sinks").glob("*.py")]
    return [
        text
        for file in dict.fromkeys(map(Path.resolve, files))
        for text in texts(ast.parse(file.read_text()))
    ]


def texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        for child in ast.iter_child_nodes(node):
            yield from texts(child)


def is_in_one_template(parts: list[str]) -> bool:
    """Whether one text of the sources has all of them, in order."""
    form = re.compile(".*?".join(re.escape(part.strip(" :,;")) for part in parts), re.DOTALL)
    return any(form.search(template) for template in templates())


def is_in_the_sources(heading: str) -> bool:
    """In one text; or in two, where one is put into the other, or behind it."""
    parts = heading.split("…")
    return is_in_one_template(parts) or any(
        is_in_one_template(parts[:cut]) and is_in_one_template(parts[cut:])
        for cut in range(1, len(parts))
        if len("".join(parts[cut:])) > 12
    )


def test_there_are_messages() -> None:
    assert len(HEADINGS) > 40
    assert len(set(HEADINGS)) == len(HEADINGS)
    assert len(re.findall(r"(?m)^### ", PAGE.read_text())) == len(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_message_is_in_the_sources(heading: str) -> None:
    assert is_in_the_sources(heading), "no message reads so: has it been reworded?"


def test_a_message_that_is_not_there_is_noticed() -> None:
    assert not is_in_the_sources("cannot open …: another process writes to it")
    assert not is_in_the_sources("BCC's Python binding was not installed")


# --- and comes when the page says so

Provoked = Callable[[Path], object]
PROVOKED: dict[str, Provoked] = {
    "BCC's Python binding is not installed": lambda _: bcc.find(["/nowhere"]),
    "nothing tells the kernel's types": lambda folder: Kernel(
        btf=folder / "vmlinux", modules=folder, kheaders=folder / "kheaders"
    ).types(),
    "buffer_size=… is impossible": lambda _: trace_execve(buffer_size=1),
    "… cannot be attached to …: this kernel": lambda _: kprobes.without_kprobes(
        "hello", "vfs_read", returns=False
    ),
    "there is no system call": lambda _: trace_syscalls("opne"),
    "use BPF within its block": lambda _: BPF(text="int hello(void *ctx) { return 0; }").events("output"),
    "there is no sink": lambda _: open_sink("fil:x.jsonl"),
    "… names no kind of sink": lambda _: open_sink("x.jsonl"),
    "there is no option": lambda _: open_sink("file:x.jsonl?rotat=1MB"),
    "cannot … …: …: make room on its disk": lambda folder: message(
        "write to", folder / "x.jsonl", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    ),
    "… needs a folder for what is kept": lambda _: BlackholeSink(durable=True),
    "Kafka needs asyncio": lambda _: run(KafkaSink("127.0.0.1:9092", "exec").open, "trio"),
    "there is no key": lambda folder: config.parse(
        "[service]\nlog_levle = 'info'\n[[source]]\nkind = 'execve'\n", folder / "execs.toml"
    ),
    "there is no user … on this machine": lambda folder: config.parse(
        "[service]\nuser = 'nobody-at-all'\n", folder / "execs.toml"
    ),
    "… has no field …": lambda _: condition(ExecEvent, "comn == 'true'"),
    "… is no condition (…)": lambda _: condition(ExecEvent, "comm =="),
    "--format is for the standard output alone": lambda _: command(
        "execve", "--to", "file:x.jsonl", "--format", "json"
    ),
    "top needs a terminal to show itself on": lambda _: command("top"),
}
NEEDS_KERNEL: dict[str, Provoked] = {
    "there is no tracepoint": lambda _: run(
        lambda: load(HELLO, lambda bpf: bpf.attach_tracepoint(tp="syscalls:sys_enter_exec", fn_name="hello"))
    ),
    "BCC refused the program": lambda _: run(lambda: load("int hello(void *ctx) { return undeclared; }")),
    "the program declares no output": lambda _: run(lambda: load(HELLO, lambda bpf: bpf.events("outputs"))),
    "there is no function … in the program": lambda _: run(
        lambda: load(HELLO, lambda bpf: bpf.attach_syscall("execve", fn_name="helo"))
    ),
    "… is being read by another stream": lambda _: run(
        lambda: load(HELLO, lambda bpf: [bpf.events("output") for _ in range(2)])
    ),
}


def provokes(heading: str, among: dict[str, Provoked] = PROVOKED) -> Callable[[Provoked], Provoked]:
    """What brings a message about, by how its heading begins; it raises it, or returns it."""

    def note(function: Provoked) -> Provoked:
        among[heading] = function
        return function

    return note


def run(steps: Callable[[], Awaitable[object]], backend: str = "asyncio") -> object:
    return anyio.run(steps, backend=backend)


@provokes("… has no C type")
def _(_: Path) -> object:
    @dataclass
    class Untyped(Event):
        pid: int

    return make_batch([Untyped(1)])


@provokes("another task is waiting for this stream's next")
def _(_: Path) -> object:
    turn = Turn("event")

    async def wait() -> None:
        with turn.taken(), turn.waiting():
            await anyio.sleep_forever()

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.lowlevel.checkpoint()
            try:
                await wait()
            finally:
                tasks.cancel_scope.cancel()

    try:
        return run(both)
    except ExceptionGroup as group:
        return group.exceptions[0]


@provokes("this stream is closed")
def _(_: Path) -> object:
    turn = Turn("event")
    turn.close()
    turn.check_open()
    return "it is open"


@provokes("a record of … bytes ends before")
def _(_: Path) -> object:
    records = make_batch([ExampleEvent(1, "comm", "message")]).records
    return list(EventBatch(ExampleEvent, records._replace(runs=[(0, 16, 3, 1)])))


@provokes("cannot open …: another process or sink is writing to it")
def _(folder: Path) -> object:
    async def twice() -> None:
        async with FileSink(folder / "x.jsonl"), FileSink(folder / "x.jsonl"):
            pass

    return run(twice)


@provokes("… does not end with a line of JSON")
def _(folder: Path) -> object:
    (folder / "notes.txt").write_text("Some notes.\n")
    return run(FileSink(folder / "notes.txt").open)


@provokes("… ended with an event that was not written whole")
def _(folder: Path) -> object:
    (folder / "x.jsonl").write_text('{"pid":1}\n{"pid":')
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign, assignment]
    logging.getLogger("ebpfstream").addHandler(handler)
    run(FileSink(folder / "x.jsonl").open)
    logging.getLogger("ebpfstream").removeHandler(handler)
    return said[0].getMessage()


@provokes("the spool … is in use by another process")
def _(folder: Path) -> object:
    spools = [Spool(folder, size=1 << 20), Spool(folder, size=1 << 20)]
    spools[0].open()
    try:
        spools[1].open()
        return "both are open"
    finally:
        spools[0].close()


@provokes("whoever read the standard output has closed it")
def _(_: Path) -> object:
    reader, writer = os.pipe()
    os.close(reader)

    async def write() -> None:
        async with StdoutSink(fd=writer) as sink:
            await sink.send(make_batch([ExampleEvent(1, "comm", "message")]))

    try:
        return run(write)
    finally:
        os.close(writer)


for _heading, _error in {
    "Kafka at … cannot be reached": ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    "Kafka at … closes the connection": ConnectionResetError(),
    "the certificate of … is not trusted": ssl.SSLCertVerificationError(1, "unable to get local issuer"),
    "Kafka at … refuses user or password": kafka_errors.AuthenticationFailedError("no such user"),
    "there is no topic … at …": kafka_errors.UnknownTopicOrPartitionError(),
    "Kafka does not let this user use the topic": kafka_errors.TopicAuthorizationFailedError(),
    "the topic … takes no record as large as this": kafka_errors.MessageSizeTooLargeError(),
}.items():

    @provokes(_heading)
    def _(_: Path, error: Exception = _error) -> object:
        if isinstance(error, ssl.SSLCertVerificationError):
            error.verify_message = "unable to get local issuer"
        return kafka_client.explanation(error, ["127.0.0.1:9092"], "exec")


@provokes("… runs already, as …")
def _(folder: Path) -> object:
    with Instance(folder / "execs.toml", folder), Instance(folder / "execs.toml", folder):
        return "both run"


@provokes("cannot make …, by which …")
def _(folder: Path) -> object:
    (folder / "no-folder").touch()
    with Instance(folder / "execs.toml", folder / "no-folder"):
        return "it runs"


@provokes("listen=…: …: end the process that has this port")
def _(_: Path) -> object:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Endpoint(f"127.0.0.1:{server.getsockname()[1]}", LedgerCollector(dict), list)


def command(*words: str) -> str:
    """What a command says, and nobody reads on a terminal."""
    return CliRunner().invoke(main, words).output


async def load(text: str, then: Callable[[BPF], object] = lambda _: None) -> object:
    async with BPF(text=text) as bpf:
        return then(bpf)


HELLO = "BPF_PERF_OUTPUT(output); struct data_t { u64 pid; }; int hello(void *ctx) { struct data_t data = {};"
HELLO += " output.perf_submit(ctx, &data, sizeof(data)); return 0; }"


@provokes("the kernel refused the program", NEEDS_KERNEL)
def _(_: Path) -> object:
    text = (
        "BPF_HASH(seen); int hello(void *ctx) { u64 key = 0; u64 *found = seen.lookup(&key); return *found; }"
    )
    return run(lambda: load(text, lambda bpf: bpf.attach_syscall("execve", fn_name="hello")))


@provokes("… events were lost; the stream goes on after them", NEEDS_KERNEL)
def _(_: Path) -> object:
    async def lose() -> object:
        async with trace_execve(buffer="ring", buffer_size=4096, on_lost="raise") as events:
            for _ in range(60):
                await anyio.run_process(["true"])
            events.detach()  # else the next event tells of it, whenever there is one
            async for _ in events:
                pass
        return "nothing was lost"

    return run(lose)


@provokes("the queue of … is full", NEEDS_KERNEL)
def _(_: Path) -> object:
    class Stuck(BlackholeSink):
        async def send(self, batch: EventBatch[Any]) -> None:
            await anyio.sleep_forever()

    async def fill() -> object:
        with subprocess.Popen(["sh", "-c", "sleep 0.5; while sleep 0.05; do /bin/true; done"]) as producer:
            try:
                stuck = Stuck(queue_size=1, when_full="fail")
                return await forward(trace_execve(comm="true"), stuck, deadline=0.1)
            finally:
                producer.kill()

    return run(fill)


def explained(told: str) -> list[str]:
    """The headings that a message has."""
    forms = {
        heading: re.compile(".*?".join(map(re.escape, heading.split("…"))), re.DOTALL) for heading in HEADINGS
    }
    return [heading for heading, form in forms.items() if form.search(told)]


def check(heading: str, provoke: Provoked, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            told = str(provoke(tmp_path))
        except EbpfStreamError as error:
            told = str(error)
    assert [found for found in explained(told) if found.startswith(heading)], told


@pytest.mark.parametrize("heading", PROVOKED)
def test_a_message_comes(heading: str, tmp_path: Path) -> None:
    check(heading, PROVOKED[heading], tmp_path)


@pytest.mark.kernel
@pytest.mark.parametrize("heading", NEEDS_KERNEL)
def test_a_message_comes_from_the_kernel(heading: str, tmp_path: Path) -> None:
    check(heading, NEEDS_KERNEL[heading], tmp_path)
