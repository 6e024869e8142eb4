"""`ebpfstream program`: a BPF program of anybody's, without a line of Python."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from ebpfstream.syscall_names import numbers
from tests.kernel.test_cli import COMMAND, running, true

pytestmark = pytest.mark.kernel

HELLO = Path(__file__).parents[2] / "examples/hello.c"
RING = """
struct call { u64 argument; u32 pid, of_init; };
BPF_RINGBUF_OUTPUT(calls, 1);
#ifdef SECOND
BPF_PERF_OUTPUT(others);
int other(void *ctx) { struct call call = {}; return others.perf_submit(ctx, &call, sizeof(call)); }
#endif
RAW_TRACEPOINT_PROBE(sys_enter)
{
    struct call call = { .argument = 7, .pid = bpf_get_current_pid_tgid() >> 32 };
    if (call.pid == PID && ctx->args[1] == GETPPID)
        calls.ringbuf_output(&call, sizeof(call), 0);
    return 0;
}
"""


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    path = tmp_path / "ring.c"
    path.write_text(RING.replace("GETPPID", str(numbers()["getppid"])))
    return path


def refused(*arguments: str | Path) -> str:
    done = subprocess.run([*COMMAND, "program", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("ebpfstream: ")
    return done.stderr


def test_the_example_as_its_comment_says() -> None:
    options = [str(HELLO), "--attach", "syscall:execve=hello", "--fields", "pid,uid,message"]
    with running(*options, what="program") as command:
        pids = [true(str(number)) for number in range(5)]
        command.send_signal(signal.SIGTERM)
        output, errors = command.communicate(timeout=30)
    events = [json.loads(line) for line in output.splitlines()]
    ours = [event for event in events if event["pid"] in pids]
    assert ours == [{"pid": pid, "uid": os.getuid(), "message": "Hello World"} for pid in pids]
    assert command.returncode == -signal.SIGTERM
    assert errors.decode() == f"ebpfstream: {len(events)} delivered; {len(events)} received, 0 lost\n"


def test_a_program_that_attaches_itself(ring: Path) -> None:
    """Its only output is taken; nobody knows what a ring buffer had no room for."""
    options = [str(ring), "--cflag", f"-DPID={os.getpid()}", "--count", "3", "--where", "argument == 7"]
    with running(*options, what="program") as command:
        for _ in range(5):
            os.getppid()
        output, errors = command.communicate(timeout=30)
    assert [json.loads(line) for line in output.splitlines()] == [
        {"argument": 7, "pid": os.getpid(), "of_init": 0}
    ] * 3
    assert command.returncode == 0
    assert errors.decode().startswith("ebpfstream: 3 delivered; 5 received, unknown lost")


def test_of_several_outputs_one_is_chosen(ring: Path) -> None:
    flags = ["--cflag", f"-DPID={os.getpid()}", "--cflag", "-DSECOND"]
    assert "several outputs: choose one of them by name (calls, others)" in refused(ring, *flags)
    assert "no output 'call'; did you mean calls?" in refused(ring, *flags, "--events", "call")
    with running(str(ring), *flags, "--events", "calls", "--count", "1", what="program") as command:
        os.getppid()
        output, _ = command.communicate(timeout=30)
    assert json.loads(output)["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("hello", "'hello' is no hook: say what to attach where, such as syscall:execve=hello"),
        ("syscall:execve", "say what to attach where"),
        ("syscal:execve=hello", "there is no kind of hook 'syscal'; did you mean syscall?"),
        ("syscall:execve=hullo", "hullo"),
        ("tracepoint:sys_enter_execve=hello", "'sys_enter_execve' is no tracepoint: give category:name"),
        ("tracepoint:syscalls:sys_enter_execv=hello", "did you mean syscalls:sys_enter_execve"),
        ("uprobe:c=hello", "'c' is no function of a file: give PATH:SYMBOL"),
    ],
)
def test_hooks_that_there_are_not(hook: str, said: str) -> None:
    assert said in refused(HELLO, "--attach", hook)


def test_a_program_without_output(tmp_path: Path) -> None:
    path = tmp_path / "none.c"
    path.write_text("int hello(void *ctx) { return 0; }")
    assert "has no output: declare one with BPF_PERF_OUTPUT or BPF_RINGBUF_OUTPUT" in refused(path)
    path.write_text("int hello(void *ctx) { return nothing; }")
    assert "use of undeclared identifier 'nothing'" in refused(path)
    done = subprocess.run([*COMMAND, "program", tmp_path / "absent.c"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "absent.c' does not exist" in done.stderr


def test_a_function_of_a_library() -> None:
    """By a uprobe, as the name of the library and of the function."""
    options = [str(HELLO), "--attach", "uprobe:c:getenv=hello", "--where", "message == 'Hello World'"]
    with running(*options, "--count", "1", what="program") as command:
        true("getenv")
        output, _ = command.communicate(timeout=30)
    assert json.loads(output)["message"] == "Hello World"
