"""The command, as a person and as a script run it."""

from __future__ import annotations

import json
import os
import platform
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ebpfstream import __version__
from tests.kernel import objects

pytestmark = pytest.mark.kernel

COMMAND = [sys.executable, "-m", "ebpfstream"]
HIDE = 'mount -t tmpfs none /usr/lib/python3/dist-packages && exec "$@"'
WITHOUT_BCC = ["unshare", "--mount", "sh", "-c", HIDE, "sh"]
# With another deadline, so that a test need not wait for the real one.
WITH_DEADLINE = (
    "import sys; from ebpfstream import cli; cli.shipping.DEADLINE = float(sys.argv.pop(1)); cli.main()"
)
LEDGER = re.compile(
    r"ebpfstream: (\d+) delivered; (\d+) tried = (\d+) submitted \+ (\d+) lost(.*)\n(?:ebpfstream: stdout: .*\n)?\Z"
)


@contextmanager
def running(
    *options: str,
    stdout: int | None = None,
    command: Sequence[str] = COMMAND,
    what: str = "execve",
    hooks: int = 1,
) -> Iterator[subprocess.Popen[bytes]]:
    """The command, once it is attached to so many hooks."""
    stdout = subprocess.PIPE if stdout is None else stdout
    with subprocess.Popen([*command, what, *options], stdout=stdout, stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: objects.attached(process.pid) >= hooks, process)
            time.sleep(0.1)  # until it knows that itself, and a signal finds it forwarding
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)


def true(*arguments: str) -> int:
    with subprocess.Popen(["/bin/true", *arguments]) as child:
        return child.pid


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """A pipe into which nothing more fits."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"full\n" * 1000)
    except BlockingIOError:
        pass
    os.set_blocking(writer, True)
    yield reader, writer
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_good_order(number: signal.Signals) -> None:
    """What happened before is written, the ledger is on stderr, and it died of that signal."""
    with running("--format", "json") as command:
        pids = [true("signal", str(index)) for index in range(50)]
        command.send_signal(number)
        output, errors = command.communicate(timeout=30)
    events = [json.loads(line) for line in output.splitlines()]
    ours = [event for event in events if event["args"][1:2] == ["signal"]]
    assert [(event["pid"], event["args"]) for event in ours] == [
        (pid, ["/bin/true", "signal", str(index)]) for index, pid in enumerate(pids)
    ]
    assert command.returncode == -number
    ledger = LEDGER.match(errors.decode())
    assert ledger is not None
    assert int(ledger[1]) == int(ledger[2]) == int(ledger[3]) == len(events)
    assert (ledger[4], ledger[5]) == ("0", "")


def test_count_ends_it() -> None:
    with running("--count", "3") as command:
        for index in range(5):
            true("count", str(index))
        output, errors = command.communicate(timeout=30)
    assert output.count(b"\n") == 3
    assert command.returncode == 0
    assert LEDGER.match(errors.decode())


def test_lines_come_when_they_happen() -> None:
    with running() as command:
        assert command.stdout is not None
        for index in range(3):
            pid = true("now", str(index))
            event: dict[str, Any] = {}
            while event.get("pid") != pid:
                event = json.loads(command.stdout.readline())
            assert event["message"] == f"/bin/true now {index}"


def test_head_ends_it() -> None:
    """That it needs no event to notice is for tests/test_cli.py: some program is always executed."""
    reader, writer = os.pipe()
    with running(stdout=writer) as command:
        os.close(writer)
        os.close(reader)
        true("head")
        _, errors = command.communicate(timeout=30)
    assert command.returncode == -signal.SIGPIPE
    assert b"Traceback" not in errors


def test_a_reader_that_does_not_read_cannot_keep_it(full_pipe: tuple[int, int]) -> None:
    """A signal ends it though what is left cannot be written."""
    with running(stdout=full_pipe[1]) as command:
        true("x" * 10_000)
        command.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=30)
    assert command.returncode == -signal.SIGTERM
    assert b"Traceback" not in errors


def test_one_signal_ends_it_by_its_deadline(full_pipe: tuple[int, int]) -> None:
    """Though what is left cannot be written; and the ledger says what has been left."""
    hasty = [sys.executable, "-c", WITH_DEADLINE, "0.3"]
    with running(stdout=full_pipe[1], command=hasty) as command:
        true("x" * 10_000)
        began = time.monotonic()
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=10)
    assert 0.2 <= time.monotonic() - began < 3  # four fifths of it are for delivering
    assert command.returncode == -signal.SIGTERM
    assert LEDGER.match(errors.decode())


def test_until_its_deadline_it_waits_for_a_slow_reader(full_pipe: tuple[int, int]) -> None:
    reader, writer = full_pipe
    with running(stdout=writer) as command:
        pids = [true("slow", "x" * 10_000) for _ in range(10)]
        command.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        os.set_blocking(reader, False)
        output = b""
        while command.poll() is None or readable(reader):
            if readable(reader):
                output += os.read(reader, 1 << 16)
        errors = command.stderr.read() if command.stderr else b""
    assert command.returncode == -signal.SIGTERM
    # The first one stands behind what the pipe was full of.
    lines = [json.loads(line[line.index(b"{") :]) for line in output.splitlines() if b"{" in line]
    assert [line["pid"] for line in lines if line["args"][1:2] == ["slow"]] == pids
    ledger = LEDGER.match(errors.decode())
    assert ledger is not None
    assert int(ledger[1]) == int(ledger[2]) == len(lines)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0.01)[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_process_one_of_a_container_tells_by_its_exit_code(number: signal.Signals) -> None:
    """It does not die of signals that it sends itself (pid_namespaces(7))."""
    command = ["unshare", "--pid", "--fork", "--kill-child", *COMMAND, "execve"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as outer:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")

        def inner() -> list[int]:
            return [int(pid) for pid in children.read_text().split()]

        wait_until(lambda: any(objects.held("link", pid) for pid in inner()), outer)
        (pid,) = inner()
        os.kill(pid, number)
        _, errors = outer.communicate(timeout=30)
    assert outer.returncode == 128 + number
    assert b"Traceback" not in errors


def test_the_ledger_counts_what_was_lost() -> None:
    """With a buffer of one page and a reader that takes nothing."""
    with running("--buffer-size", "4096", stdout=subprocess.DEVNULL) as command:
        command.send_signal(signal.SIGSTOP)
        for _ in range(3):
            true("x" * 3000)
        command.send_signal(signal.SIGCONT)
        command.send_signal(signal.SIGTERM)
        _, errors = command.communicate(timeout=30)
    ledger = LEDGER.match(errors.decode())
    assert ledger is not None
    delivered, tried, submitted, lost = map(int, ledger.groups()[:4])
    assert lost >= 2
    assert tried == submitted + lost
    assert delivered == submitted


def test_a_missing_compiler_is_a_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [*WITHOUT_BCC, *COMMAND, "execve"],
        capture_output=True,
        text=True,
        env=os.environ | {"EBPFSTREAM_CACHE": str(tmp_path)},
    )
    assert done.returncode == 1
    assert re.match(r"ebpfstream: BCC's Python binding is not installed", done.stderr)
    assert "Traceback" not in done.stderr


def test_on_a_terminal() -> None:
    leader, terminal = pty.openpty()
    with running(stdout=terminal) as command:
        true("\x1b[31mvermilion\x07")
        shown = b""
        while b"vermilion" not in shown:
            shown += os.read(leader, 1 << 16)
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=30)
    os.close(leader)
    os.close(terminal)
    lines = re.sub(r"\x1b\[\d+m", "", shown.decode()).splitlines()
    assert lines[0].split() == ["TIME", "PID", "PPID", "UID", "COMM", "MESSAGE"]
    line = next(line for line in lines if "vermilion" in line)
    assert line.endswith(r"true            /bin/true $'\e[31mvermilion\u0007'")
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} +\d+ +\d+ +\d+ true", line)
    assert re.search(rb"\x1b(?!\[\d+m)|\x07", shown) is None


@pytest.mark.parametrize("columns", [80, 200])
def test_messages_on_a_terminal_are_broken_between_words(columns: int) -> None:
    leader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    command = [*COMMAND, "execve", "--where", "nosuch"]
    assert subprocess.run(command, stderr=terminal).returncode == 1
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    os.close(terminal)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    said = subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr
    assert "".join(line.replace("    ", " ") for line in lines) == said.rstrip("\n")


def test_filters_and_failures() -> None:
    with running("--failed", "--ppid", str(os.getpid()), "--format", "text", hooks=3) as command:
        with pytest.raises(FileNotFoundError):
            subprocess.run(["/nonexistent/program", "word"])
        with subprocess.Popen(["sh", "-c", "/bin/true not-ours; exit 0"]) as shell:
            shell.wait()
        command.send_signal(signal.SIGINT)
        output, errors = command.communicate(timeout=30)
    assert b"(ENOENT) /nonexistent/program word\n" in output
    assert b"exit 0" in output
    assert b"/bin/true not-ours\n" not in output
    ledger = LEDGER.match(errors.decode())
    assert ledger is not None
    assert "rejected by filters" in ledger[5]


def test_errors_are_messages() -> None:
    done = subprocess.run([*COMMAND, "execve", "--buffer-size", "17"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "ebpfstream: buffer_size=17 is impossible: give 4096 to 2147483648 bytes\n"
    refused = subprocess.run(
        ["setpriv", "--bounding-set=-all", *COMMAND, "execve"], capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "ebpfstream: the kernel refuses BPF to this process (uid 0): run it as root"
    )
    assert subprocess.run([*COMMAND, "execve", "--format", "xml"], capture_output=True).returncode == 2


def test_where() -> None:
    """Python, in the names of fields; what it leaves out is in the ledger."""
    with running("--where", "args[1] == 'where' and ppid == " + str(os.getpid())) as command:
        pids = [true("where", str(index)) for index in range(5)]
        true("elsewhere")
        command.send_signal(signal.SIGTERM)
        output, errors = command.communicate(timeout=30)
    assert [json.loads(line)["pid"] for line in output.splitlines()] == pids
    ledger = LEDGER.match(errors.decode())
    assert ledger is not None
    left_out = re.search(r"(\d+) left out by where", ledger[5])
    assert left_out is not None
    assert int(ledger[1]) == 5 + int(left_out[1])


def test_the_ledger_of_nothing() -> None:
    """Whoever waited for events in vain wants to see that there were none."""
    with running("--ppid", str(os.getpid())) as command:
        command.send_signal(signal.SIGTERM)
        output, errors = command.communicate(timeout=30)
    assert output == b""
    assert re.match(rb"ebpfstream: 0 delivered; 0 tried = 0 submitted \+ 0 lost", errors)


def test_a_condition_that_is_none_is_a_message() -> None:
    done = subprocess.run([*COMMAND, "execve", "--where", "uidd == 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ebpfstream: 'uidd == 0': ExecEvent has no field 'uidd'; did you mean uid")


def test_duration_ends_it() -> None:
    """Counted from when it is attached, however long that takes."""
    with running("--duration", "2s") as command:
        pid = true("short")
        output, errors = command.communicate(timeout=30)
    assert pid in [json.loads(line)["pid"] for line in output.splitlines()]
    assert command.returncode == 0
    assert LEDGER.match(errors.decode())
    wrong = subprocess.run([*COMMAND, "execve", "--duration", "soon"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "'soon' is not a time such as 500ms, 10s, 5m, 1h or 1d" in wrong.stderr


@pytest.mark.parametrize(("number", "lost"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_the_exit_status_says_whether_anything_was_lost(number: signal.Signals, lost: bool) -> None:
    options = ["--require-complete", "--buffer-size", "4KiB"]
    with running(*options, stdout=subprocess.DEVNULL) as command:
        command.send_signal(signal.SIGSTOP)
        for _ in range(3 if lost else 1):
            true("x" * 3000 if lost else "x")
        command.send_signal(signal.SIGCONT)
        command.send_signal(number)
        _, errors = command.communicate(timeout=30)
    ledger = LEDGER.match(errors.decode())
    assert ledger is not None
    assert (int(ledger[4]) > 0) == lost
    assert command.returncode == (3 if lost else 0)


@pytest.mark.parametrize("result", [False, True])
def test_system_calls(result: bool) -> None:
    """Those that were named, of the process that was named, with what they returned if that was asked for."""
    options = ["getppid", "openat", "--pid", str(os.getpid()), *(["--result"] if result else [])]
    with running(*options, what="syscalls", hooks=3 if result else 1) as command:
        for _ in range(3):
            os.getppid()
        with pytest.raises(FileNotFoundError):
            os.open("/nonexistent/file", os.O_RDONLY)
        os.getpgid(0)
        command.send_signal(signal.SIGTERM)
        output, errors = command.communicate(timeout=30)
    calls = [json.loads(line) for line in output.splitlines()]
    assert {call["pid"] for call in calls} == {os.getpid()}
    assert [call["name"] for call in calls].count("getppid") == 3
    assert {call["name"] for call in calls} == {"getppid", "openat"}
    assert {call["result"] for call in calls if call["name"] == "getppid"} == {
        os.getppid() if result else None
    }
    assert ("ENOENT" in [call["error"] for call in calls]) == result
    assert LEDGER.match(errors.decode())


def test_execs_are_counted() -> None:
    """A line for each user in each interval, and all of them when it ends."""
    with running("--every", "1h", "--uid", "54323", "--require-complete", what="count") as command:
        for index in range(7):
            subprocess.run(
                ["setpriv", "--reuid=54323", "--clear-groups", "/bin/true", str(index)], check=True
            )
        command.send_signal(signal.SIGTERM)
        output, errors = command.communicate(timeout=30)
    (line,) = map(json.loads, output.splitlines())
    assert (line["uid"], line["count"], line["total"], line["message"]) == (54323, 7, 7, "7 execs, 7 in all")
    assert command.returncode == 0
    assert re.fullmatch(rb"ebpfstream: 1 delivered; 1 received, 0 lost, \d+ rejected by filters\n", errors)


def test_what_is_printed_is_shown(tmp_path: Path) -> None:
    (tmp_path / "hello.c").write_text(
        "int hello(void *ctx)\n{\n"
        '\tbpf_trace_printk("hello %d", (u32)(bpf_get_current_pid_tgid() >> 32));\n\treturn 0;\n}\n'
    )
    program = """
import anyio, sys
from ebpfstream import BPF
async def main():
    async with BPF(sys.argv[1]) as bpf:
        bpf.attach_syscall("execve", fn_name="hello")
        bpf.attach()
        print("ready", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
    with (
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "hello.c")], stdout=subprocess.PIPE
        ) as printing,
        subprocess.Popen([*COMMAND, "trace"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command,
    ):
        try:
            assert printing.stdout is not None
            assert printing.stdout.readline() == b"ready\n"
            wait_until(lambda: _has_open(command.pid, "trace_pipe"), command)
            pids = [true("printed", str(index)) for index in range(5)]
            lines: list[Any] = []
            assert command.stdout is not None
            while len([line for line in lines if line["message"] in {f"hello {pid}" for pid in pids}]) < 5:
                lines.append(json.loads(command.stdout.readline()))
            command.send_signal(signal.SIGTERM)
            command.communicate(timeout=30)
        finally:
            command.kill()
            printing.kill()
    ours = [line for line in lines if line["message"] in {f"hello {pid}" for pid in pids}]
    assert [(line["pid"], line["message"]) for line in ours] == [(pid, f"hello {pid}") for pid in pids]


def _has_open(pid: int, name: str) -> bool:
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if str(fd.readlink()).endswith(f"/{name}"):
                return True
    return False


def test_system_calls_that_there_are_not() -> None:
    done = subprocess.run([*COMMAND, "syscalls", "opeenat"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "did you mean openat" in done.stderr


def test_help_and_versions() -> None:
    shown = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    system = os.uname()
    ours, kernel, python, compiler = shown.stdout.splitlines()
    assert ours == f"ebpfstream {__version__}"
    assert kernel == f"Linux {system.release} on {system.machine}"
    assert python == f"Python {platform.python_version()}"
    assert re.fullmatch(r"BCC \d+\.\d+\.\d+\S* in /\S+/bcc", compiler)


@pytest.mark.parametrize(
    "what", [[], ["execve"], ["syscalls"], ["schema"], ["size"], ["bench"], ["bench", "buffers"]]
)
def test_help(what: list[str]) -> None:
    """In 80 columns; each command's has an example."""
    shown = subprocess.run([*COMMAND, *what, "--help"], capture_output=True, text=True, check=True).stdout
    if what not in ([], ["bench"]):
        assert re.search(rf"\n {{6}}ebpfstream {' '.join(what)} ", shown)
    assert "\\b" not in shown
    assert [line for line in shown.splitlines() if len(line) > 80] == []


def test_completion_in_bash() -> None:
    """As a shell does it that has been told by `eval "$(_EBPFSTREAM_COMPLETE=bash_source ebpfstream)"`."""
    asked = {"_EBPFSTREAM_COMPLETE": "bash_complete", "COMP_WORDS": "ebpfstream sy", "COMP_CWORD": "1"}
    command = Path(sys.executable).with_name("ebpfstream")
    shown = subprocess.run([command], env=os.environ | asked, capture_output=True, text=True, check=True)
    assert shown.stdout == "plain,syscalls\n"
