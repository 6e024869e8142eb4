"""BPF: programs of anybody's, loaded, attached, read; and what is said when something is wrong."""

from __future__ import annotations

import errno
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import (
    BPF,
    U32,
    U64,
    ArgumentError,
    AttachError,
    CompileError,
    Event,
    LoadError,
    NotOpenError,
    StreamBusyError,
    UnsupportedError,
)
from ebpfstream.kernel import kprobes
from ebpfstream.kernel.links import Kprobe
from tests.kernel import flood, objects

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

# One event for each getppid(2) of the process TARGET.
COUNTING = """
BPF_RINGBUF_OUTPUT(ring, 64);
BPF_PERF_OUTPUT(perf);
BPF_ARRAY(calls, u64, 1);
struct data_t { u64 number; u32 pid; };
RAW_TRACEPOINT_PROBE(sys_enter) {
    if (ctx->args[1] != GETPPID || bpf_get_current_pid_tgid() >> 32 != TARGET)
        return 0;
    int zero = 0;
    u64 *count = calls.lookup(&zero);
    if (!count)
        return 0;
    struct data_t data = {};
    data.number = __sync_fetch_and_add(count, 1);
    data.pid = TARGET;
    ring.ringbuf_output(&data, sizeof(data), 0);
    perf.perf_submit(ctx, &data, sizeof(data));
    return 0;
}
"""
GETPPID = {"x86_64": 110, "aarch64": 173}[os.uname().machine]


def counting(target: int, text: str = COUNTING) -> BPF:
    return BPF(text=text, cflags=[f"-DTARGET={target}", f"-DGETPPID={GETPPID}"])


@dataclass
class Numbered(Event):
    number: U64
    pid: U32


async def test_both_outputs_of_a_program_that_attaches_itself() -> None:
    """It is attached with the first stream, when both have buffers: neither lacks an event."""
    with flood.producing() as producer:
        async with counting(producer.pid) as bpf:
            ring, perf = bpf.events("ring", Numbered), bpf.events("perf")
            await run_sync(make, producer, 100)  # before anything is attached
            async with ring:
                await run_sync(make, producer, 1000)
                bpf.detach()
                await run_sync(make, producer, 100)
                first = [(event.number, event.pid) async for event in ring]
                second = [(event.number, event.pid) async for event in perf]
                assert bpf.maps["calls"][0] == 1000
    assert first == second == [(number, producer.pid) for number in range(1000)]
    for stream in (ring, perf):
        statistics = stream.statistics()
        assert (statistics.received, statistics.delivered, statistics.misses) == (1000, 1000, 0)
    assert (ring.statistics().lost, ring.statistics().complete) == (None, None)
    assert (perf.statistics().lost, perf.statistics().complete) == (0, True)


def make(producer: flood.Producer, calls: int) -> None:
    producer.start(calls)
    producer.wait()


async def test_what_a_perf_buffer_loses_is_counted_exactly() -> None:
    with flood.producing() as producer:
        async with counting(producer.pid) as bpf:
            perf = bpf.events("perf", buffer_size=1 << 16)
            bpf.attach()
            await run_sync(make, producer, 50_000)
            await perf.aclose()
            await run_sync(make, producer, 10)
            assert bpf.maps["calls"][0] == 50_010  # it is attached still
    statistics = perf.statistics()
    assert statistics.lost is not None
    assert statistics.lost > 0
    assert statistics.received + statistics.lost == 50_000
    assert statistics.unread == statistics.received


async def test_an_output_is_read_again_after_its_stream_was_closed() -> None:
    with flood.producing() as producer:
        async with counting(producer.pid) as bpf:
            for name in ("ring", "perf"):
                seen: list[int] = []
                for _ in range(3):
                    async with bpf.events(name) as events:
                        with pytest.raises(
                            StreamBusyError, match=f"'{name}' is being read by another stream"
                        ):
                            bpf.events(name)
                        await run_sync(make, producer, 10)
                        async for event in events:
                            seen.append(event.number)
                            if len(seen) % 10 == 0:
                                break
                start = seen[0]
                assert seen == list(range(start, start + 30))


async def test_dropping_a_stream_frees_its_output() -> None:
    with flood.producing() as producer:
        async with counting(producer.pid) as bpf:
            bpf.attach()
            await run_sync(make, producer, 1)
            async for event in bpf.events("ring"):
                assert event.number == 0
                break
            gc.collect()
            bpf.events("perf")
            bpf.events("perf")
            bpf.events("ring")


async def test_leaving_frees_everything() -> None:
    with flood.producing() as producer:
        descriptors = len(os.listdir("/proc/self/fd"))
        kinds = ("prog", "map", "link")
        before = {kind: objects.held(kind) for kind in kinds}  # what other tests keep
        async with counting(producer.pid) as bpf:
            ring, perf = bpf.events("ring"), bpf.events("perf")
            async with ring:
                await run_sync(make, producer, 10)
            ids = {kind: objects.held(kind) - before[kind] for kind in kinds}
            assert all(ids.values())
        with pytest.raises(NotOpenError, match=r"use BPF within its block"):
            bpf.events("ring")
        assert perf.statistics().unread == 10
        del ring, perf, bpf
        assert not any(objects.left(kind, held) for kind, held in ids.items())
        assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_several_at_once() -> None:
    with flood.producing() as one, flood.producing() as other:
        async with counting(one.pid) as first, counting(other.pid) as second:
            streams = [first.events("ring"), second.events("ring")]
            for bpf, producer, calls in ((first, one, 30), (second, other, 70)):
                bpf.attach()
                await run_sync(make, producer, calls)
                bpf.detach()
            assert [len([event async for event in stream]) for stream in streams] == [30, 70]


ATTACHING = """
BPF_ARRAY(calls, u64, 3);
TRACEPOINT_PROBE(syscalls, sys_enter_getppid) {
    if (bpf_get_current_pid_tgid() >> 32 == TARGET && args->__syscall_nr == GETPPID)
        calls.increment(0);
    return 0;
}
int entered(struct bpf_raw_tracepoint_args *ctx) {
    if (bpf_get_current_pid_tgid() >> 32 == TARGET && ctx->args[1] == GETPPID)
        calls.increment(1);
    return 0;
}
int traced(void *ctx) {
    if (bpf_get_current_pid_tgid() >> 32 == TARGET)
        calls.increment(2);
    return 0;
}
"""


async def test_each_is_detached_on_its_own() -> None:
    with flood.producing() as producer:
        async with counting(producer.pid, ATTACHING) as bpf:  # no output: the first is attached
            assert bpf.functions == ["entered", "traced", "tracepoint__syscalls__sys_enter_getppid"]
            entered = bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="entered")
            traced = bpf.attach_tracepoint(tp="syscalls:sys_enter_getppid", fn_name="traced")
            both = bpf.attach_tracepoint(tp_re="syscalls:sys_exit_getp[pg]id$", fn_name="traced")
            counts = bpf.maps["calls"]
            for close in (None, entered, traced, both):
                if close:
                    close.close()
                await run_sync(make, producer, 10)
            assert [counts[index] for index in range(3)] == [40, 10, 20 + 30]


async def test_a_header_beside_the_program(tmp_path: Path) -> None:
    (tmp_path / "shared.h").write_text("struct data_t { u64 number; u32 pid; };\n")
    text = '#include "shared.h"\n' + COUNTING.replace("struct data_t { u64 number; u32 pid; };\n", "")
    (tmp_path / "program.c").write_text(text)
    with flood.producing() as producer:
        flags = [f"-DTARGET={producer.pid}", f"-DGETPPID={GETPPID}"]
        async with BPF(tmp_path / "program.c", cflags=flags) as bpf, bpf.events("ring") as events:
            await run_sync(make, producer, 3)
            bpf.detach()
            assert [event.number async for event in events] == [0, 1, 2]


async def test_a_method_of_a_map_in_an_included_file(tmp_path: Path) -> None:
    (tmp_path / "counts.h").write_text("static inline void count(void) { calls.increment(0); }\n")
    (tmp_path / "program.c").write_text(
        'BPF_ARRAY(calls, u64, 1);\n#include "counts.h"\nint traced(void *ctx) { count(); return 0; }\n'
    )
    async with BPF(src_file=tmp_path / "program.c") as bpf:
        with pytest.raises(
            LoadError, match=r"traced calls a method of a map .* in an included file or a macro"
        ) as error:
            bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="traced")
    assert "8d" not in str(error.value)


ERRORS: dict[str, tuple[Callable[[BPF], Any], type[Exception], str]] = {
    "output": (
        lambda bpf: bpf.events("rign"),
        ArgumentError,
        r"declares no output 'rign'; did you mean ring\? \(it has perf, ring: BPF_PERF_OUTPUT",
    ),
    "map as output": (
        lambda bpf: bpf.events("calls"),
        ArgumentError,
        r"'calls' is a map \(ARRAY\), not an output: read bpf.maps\['calls'\]",
    ),
    "map": (
        lambda bpf: bpf.maps["cals"],
        ArgumentError,
        r"declares no map 'cals'; did you mean calls\?",
    ),
    "function": (
        lambda bpf: bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="raw_tracepoint__sys_exit"),
        ArgumentError,
        "there is no function 'raw_tracepoint__sys_exit' in the program; did you mean raw_tracepoint__sys_enter",
    ),
    "nowhere": (
        lambda bpf: bpf.attach_raw_tracepoint(fn_name="raw_tracepoint__sys_enter"),
        ArgumentError,
        "say where to attach: tp=",
    ),
    "tracepoint": (
        lambda bpf: bpf.attach_tracepoint(tp="sys_enter_execve", fn_name="raw_tracepoint__sys_enter"),
        ArgumentError,
        "'sys_enter_execve' is no tracepoint: give category:name",
    ),
    "pattern": (
        lambda bpf: bpf.attach_tracepoint(tp_re="nonsense", fn_name="raw_tracepoint__sys_enter"),
        AttachError,
        "nothing that could be attached to matches 'nonsense'",
    ),
    "ring size": (
        lambda bpf: bpf.events("ring", buffer_size=4096),
        ArgumentError,
        "'ring' is a ring buffer of 262144 bytes, as its text says",
    ),
    "perf size": (
        lambda bpf: bpf.events("perf", buffer_size=1),
        ArgumentError,
        "buffer_size=1 is impossible",
    ),
    "latency": (lambda bpf: bpf.events("perf", latency=-1), ArgumentError, "latency=-1 is impossible"),
    "array": (
        lambda bpf: bpf.tail_calls("calls", {}),
        ArgumentError,
        r"declares no program array 'calls' \(it has none",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
async def test_what_is_wrong_is_said(name: str) -> None:
    act, kind, message = ERRORS[name]
    async with counting(1) as bpf:
        with pytest.raises(kind, match=message):
            act(bpf)
        bpf.events("perf")  # what failed holds nothing


TAILS = """
BPF_PROG_ARRAY(syscall, 300);
int hello(struct bpf_raw_tracepoint_args *ctx) {
    syscall.call(ctx, ctx->args[1]);
    return 0;
}
int hello_execve(void *ctx) { return 0; }
int registers(struct pt_regs *ctx) { return PT_REGS_RC(ctx) > 1; }
int wrong(void *ctx) { u64 value = bpf_get_func_ip(ctx); return value > 1; }
"""


async def test_tail_calls_that_cannot_be() -> None:
    async with BPF(text=TAILS) as bpf:
        with pytest.raises(ArgumentError, match=r"no function 'hello_exec' .*; did you mean hello_execve"):
            bpf.tail_calls("syscall", {59: "hello_exec"})
        with pytest.raises(
            ArgumentError, match=r"index 300 for 'hello_execve' is out of range: .* 300 entries, 0 to 299"
        ):
            bpf.tail_calls("syscall", {300: "hello_execve"})
        with pytest.raises(ArgumentError, match=r"no program array 'syscalls'; did you mean syscall"):
            bpf.tail_calls("syscalls", {59: "hello_execve"})
        bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="hello")
        with pytest.raises(LoadError, match=r"the kernel refused the program 'wrong'"):
            bpf.tail_calls("syscall", {60: "wrong"})
        bpf.tail_calls("syscall", {59: "hello_execve"})
        assert list(bpf.maps["syscall"].keys()) == [59]


async def test_attach_syscall_says_what_a_tracepoint_cannot() -> None:
    async with BPF(text=TAILS) as bpf:
        if kprobes.kprobes_available():
            assert bpf.attach_syscall("getppid", fn_name="registers").hook == Kprobe(
                bpf.get_syscall_fnname("getppid")
            )
            return
        with pytest.raises(
            UnsupportedError,
            match=r"registers takes 'struct pt_regs \*ctx', .* its tracepoint syscalls:sys_enter_getppid .* "
            r"TRACEPOINT_PROBE\(syscalls, sys_enter_getppid\)",
        ):
            bpf.attach_syscall("getppid", fn_name="registers")
        with pytest.raises(
            UnsupportedError, match=r"has no kprobes.* Use the tracepoint syscalls:sys_enter_execve"
        ):
            bpf.attach_kprobe(event=bpf.get_syscall_fnname("execve"), fn_name="registers")


async def test_a_program_that_attaches_itself_where_it_cannot() -> None:
    text = "int raw_tracepoint__sys_entr(struct bpf_raw_tracepoint_args *ctx) { return 0; }"
    with pytest.raises(AttachError, match=r"no such tracepoint"):
        async with BPF(text=text):
            pass
    with pytest.raises(UnsupportedError, match=r"kfunc programs are not supported"):
        async with BPF(text="int kfunc__vmlinux__f(void *ctx) { return 0; }"):
            pass


async def test_a_tracepoint_that_there_is_not() -> None:
    text = "TRACEPOINT_PROBE(syscals, sys_enter_getpid) { return args->__syscall_nr > 1; }"
    with pytest.raises(
        AttachError, match=r"no tracepoint syscals:sys_enter_getpid .*; did you mean syscalls:sys_enter_get"
    ) as caught:
        async with BPF(text=text):
            pass
    assert caught.value.__suppress_context__  # that alone is shown, and not what it was found out by


@pytest.mark.parametrize("elsewhere", [True, False])
def test_tracepoints_are_found_where_bcc_does_not_look(elsewhere: bool) -> None:
    """In a mount namespace in which tracefs is at another place, or nowhere."""
    mount = (
        "mount -t tmpfs none /run; mkdir /run/tracing; mount -t tracefs none /run/tracing"
        if elsewhere
        else ":"
    )
    code = (
        "import anyio\n"
        "from ebpfstream import BPF\n"
        "async def main():\n"
        "    text = 'TRACEPOINT_PROBE(syscalls, sys_enter_getpid) { return args->__syscall_nr > 1; }'\n"
        "    async with BPF(text=text) as bpf:\n"
        "        print(*bpf.functions)\n"
        "anyio.run(main)\n"
    )
    unmount = (
        "umount /sys/kernel/debug; while umount -t tracefs -a && grep -q ' tracefs ' /proc/mounts; do :; done"
    )
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{unmount}; {mount}; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            code,
        ],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "tracepoint__syscalls__sys_enter_getpid\n", done.stderr


async def test_text_or_file() -> None:
    for arguments in ({}, {"text": "x", "src_file": "y"}):
        with pytest.raises(ArgumentError, match=r"give BPF either text= or src_file="):
            BPF(**arguments)
    with pytest.raises(
        ArgumentError, match=re.escape(f"nowhere.c cannot be read: {os.strerror(errno.ENOENT)}")
    ):
        BPF("nowhere.c")


async def test_a_text_that_does_not_compile(capfd: pytest.CaptureFixture[str]) -> None:
    """The error is that of the text as it is, whatever was declared behind it; nothing is printed."""
    with pytest.raises(CompileError, match=r"main.c:3:\d+: error: .*'nonsense'") as error:
        async with BPF(
            text="BPF_PERF_OUTPUT(o);\nint f(void *ctx) { u64 d = 1; o.perf_submit(ctx, &d, 8);\nnonsense; }"
        ):
            pass
    assert "ebpfstream_type" not in error.value.log
    assert capfd.readouterr() == ("", "")


async def test_only_once() -> None:
    bpf = BPF(text="int f(void *ctx) { return 0; }")
    with pytest.raises(NotOpenError):
        bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="f")
    async with bpf:
        assert bpf.functions == ["f"]
        with pytest.raises(NotOpenError, match=r"make a new one"):
            await bpf.__aenter__()
    await bpf.aclose()


async def test_detach_ends_a_stream_that_waits() -> None:
    with flood.producing() as producer:
        async with counting(producer.pid) as bpf, anyio.create_task_group() as tasks:
            events = bpf.events("ring")
            seen: list[Any] = []

            async def receive() -> None:
                seen.extend([event async for event in events])
                seen.append("end")

            tasks.start_soon(receive)
            while events.statistics().wakeups == 0:
                await anyio.sleep(0.01)
            bpf.detach()
        assert seen == ["end"]
