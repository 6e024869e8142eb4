"""Each kind of hook: exactly the hits while it is attached, and clear words where it cannot be."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from ebpfstream.errors import ArgumentError, AttachError, UnsupportedError
from ebpfstream.kernel import compiler, kprobes, links, tracefs
from ebpfstream.kernel.bpf import Descriptor, Program, ProgramType, online_cpus
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import (
    Hook,
    Kprobe,
    Link,
    PerfEvent,
    RawTracepoint,
    Tracepoint,
    Uprobe,
    program_type,
)
from ebpfstream.kernel.symbols import resolve
from tests.kernel.probed import Probed

pytestmark = pytest.mark.kernel

TEXT = """
#include <linux/ptrace.h>
#include <uapi/linux/bpf_perf_event.h>
BPF_HASH(hits, u32, u64);
BPF_HASH(memory, u32, u64);
int count(void *ctx) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    hits.increment(pid);
    return 0;
}
int count_twice(void *ctx) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    hits.increment(pid, 2);
    return 0;
}
int count_parent(struct pt_regs *ctx) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    if (PT_REGS_RC(ctx) == PARENT)
        hits.increment(pid);
    return 0;
}
int count_faults(struct bpf_perf_event_data *ctx) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    u64 *start = memory.lookup(&pid);
    if (start && ctx->addr >= *start && ctx->addr < *start + 64 * PAGE)
        hits.increment(pid);
    return 0;
}
int read_too_far(void *ctx) { return *(u64 *)(ctx + 4000) != 0; }
"""

RELEASE = tuple(int(number) for number in os.uname().release.split(".")[:2])
GETPPID = Tracepoint("syscalls", "sys_enter_getppid")
PAGE_FAULTS = {"type": 1, "config": 2}  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_PAGE_FAULTS
CPU_CLOCK = {"type": 1, "config": 0}


@pytest.fixture(scope="module")
def module() -> Iterator[Module]:
    numbers = {"PAGE": os.sysconf("SC_PAGE_SIZE"), "PARENT": os.getpid()}
    compiled = anyio.run(compiler.compile, TEXT, [f"-D{name}={value}ull" for name, value in numbers.items()])
    yield compiled
    for each in compiled.maps.values():
        each.close()


@pytest.fixture(autouse=True)
def _descriptors_end_where_they_began(module: Module) -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def load(module: Module) -> Iterator[Callable[..., Program]]:
    loaded: list[Program] = []

    def load(hook: Hook, function: str = "count") -> Program:
        program = Program.load(
            function,
            program_type(hook),
            module.functions[function],
            module.numbered,
            license=module.license,
            kernel_version=module.kernel_version,
        )
        loaded.append(program)
        return program

    yield load
    for program in loaded:
        program.close()


@pytest.fixture
def hits(module: Module) -> Callable[[int], int]:
    def hits(pid: int) -> int:
        return int.from_bytes(module.maps["hits"].lookup(struct.pack("<I", pid)) or b"", "little")

    return hits


@pytest.fixture(scope="module")
def libc_getppid() -> tuple[str, int]:
    return resolve("c", "getppid")


Load = Callable[..., Program]
Hits = Callable[[int], int]


def refusal(kind: type[Exception], program: Program, hook: Hook) -> str:
    with pytest.raises(kind) as caught:
        Link.attach(program, hook)
    return str(caught.value)


@pytest.mark.parametrize(
    ("hook", "kind"),
    [
        (RawTracepoint("sys_enter"), ProgramType.RAW_TRACEPOINT),
        (GETPPID, ProgramType.TRACEPOINT),
        (Kprobe("do_exit"), ProgramType.KPROBE),
        (Uprobe("/bin/true", 0, returns=True), ProgramType.KPROBE),
        (PerfEvent(1, 0, sample_period=1), ProgramType.PERF_EVENT),
    ],
)
def test_as_what_a_program_is_loaded(hook: Hook, kind: ProgramType) -> None:
    assert program_type(hook) is kind


def test_a_tracepoint_counts_until_its_link_is_closed(load: Load, hits: Hits) -> None:
    with Probed() as process:
        link = Link.attach(load(GETPPID), GETPPID)
        assert (link.hook, link.program_name) == (GETPPID, "count")
        process.do("getppid", 7)
        assert hits(process.pid) == 7
        link.close()
        process.do("getppid", 100)
        assert hits(process.pid) == 7
        link.close()


def test_a_link_without_references_detaches(load: Load, hits: Hits) -> None:
    with Probed() as process:
        link = Link.attach(load(GETPPID), GETPPID)
        process.do("getppid", 3)
        del link
        process.do("getppid", 100)
        assert hits(process.pid) == 3


def test_links_joined_are_closed_together(load: Load, hits: Hits) -> None:
    hooks = (GETPPID, Tracepoint("syscalls", "sys_exit_getppid"))
    with Probed() as process:
        links = [Link.attach(load(hook), hook) for hook in hooks]
        link = Link.joined(links)
        assert (link.hook, link.program_name) == (GETPPID, "count")
        process.do("getppid", 3)
        assert hits(process.pid) == 2 * 3
        link.close()
        process.do("getppid", 100)
        assert hits(process.pid) == 2 * 3
        del links


def test_uprobes_count_calls_and_returns(load: Load, hits: Hits, libc_getppid: tuple[str, int]) -> None:
    """Of every process, also of one that is started later."""
    enter, leave = (Uprobe(*libc_getppid, returns=returns) for returns in (False, True))
    with Probed() as early:
        entered = Link.attach(load(enter), enter)
        with Probed() as late:
            early.do("getppid", 11)
            late.do("getppid", 5)
            assert (hits(early.pid), hits(late.pid)) == (11, 5)
            left = Link.attach(load(leave, "count_parent"), leave)  # by what getppid returns
            early.do("getppid", 2)
            assert hits(early.pid) == 11 + 2 * 2
            entered.close()
            early.do("getppid", 4)
            assert hits(early.pid) == 11 + 2 * 2 + 4
            left.close()
            early.do("getppid", 100)
            late.do("getppid", 100)
            assert (hits(early.pid), hits(late.pid)) == (19, 5)


@pytest.mark.parametrize("returns", [False, True])
def test_a_uprobe_on_one_process(
    returns: bool, load: Load, hits: Hits, libc_getppid: tuple[str, int]
) -> None:
    with Probed() as probed, Probed() as other:
        hook = Uprobe(*libc_getppid, returns=returns, pid=probed.pid)
        link = Link.attach(load(hook), hook)
        probed.do("getppid", 6)
        other.do("getppid", 9)
        assert (hits(probed.pid), hits(other.pid)) == (6, 0)
        link.close()
        probed.do("getppid", 100)
        assert hits(probed.pid) == 6


@pytest.mark.parametrize("returns", [False, True])
def test_uprobes_on_two_processes(
    returns: bool, load: Load, hits: Hits, libc_getppid: tuple[str, int]
) -> None:
    """Neither sees the other's calls; nor its returns, on kernels that tell those apart."""
    with Probed() as one, Probed() as two:
        ones, twos = (Uprobe(*libc_getppid, returns=returns, pid=each.pid) for each in (one, two))
        links = [Link.attach(load(ones), ones), Link.attach(load(twos, "count_twice"), twos)]
        one.do("getppid", 3)
        two.do("getppid", 5)
        together = returns and RELEASE < (6, 13)
        assert hits(one.pid) == 3 * (3 if together else 1)
        assert hits(two.pid) == 5 * (3 if together else 2)
        for link in links:
            link.close()


def test_a_process_s_own_library(load: Load, hits: Hits) -> None:
    """What `resolve` says for a pid can be attached to."""
    with Probed() as probed:
        hook = Uprobe(*resolve("c", "getppid", pid=probed.pid), pid=probed.pid)
        assert hook.path.startswith(f"/proc/{probed.pid}/root/")
        link = Link.attach(load(hook), hook)
        probed.do("getppid", 8)
        assert hits(probed.pid) == 8
        link.close()


def test_perf_events_on_every_cpu(module: Module, load: Load, hits: Hits) -> None:
    hook = PerfEvent(**PAGE_FAULTS, sample_period=1)
    with Probed() as process:
        module.maps["memory"].update(struct.pack("<I", process.pid), struct.pack("<Q", process.memory))
        before = len(os.listdir("/proc/self/fd"))
        link = Link.attach(load(hook, "count_faults"), hook)
        cpus = online_cpus()
        assert len(os.listdir("/proc/self/fd")) == before + 1 + len(cpus)  # the program's too
        for cpu in cpus[:4]:
            process.do("touch", 5, cpu=cpu)
        assert hits(process.pid) == 5 * len(cpus[:4])
        link.close()
        process.do("touch", 5)
        assert hits(process.pid) == 5 * len(cpus[:4])


def test_perf_events_of_one_cpu_or_thread(module: Module, load: Load, hits: Hits) -> None:
    first, last = online_cpus()[0], online_cpus()[-1]
    assert first != last, "this test needs two CPUs"
    with Probed() as process, Probed() as other:
        for each in (process, other):
            module.maps["memory"].update(struct.pack("<I", each.pid), struct.pack("<Q", each.memory))
        on_cpu = PerfEvent(**PAGE_FAULTS, sample_period=1, cpu=last)
        link = Link.attach(load(on_cpu, "count_faults"), on_cpu)
        process.do("touch", 3, cpu=first)
        process.do("touch", 4, cpu=last)
        assert hits(process.pid) == 4
        link.close()
        of_thread = PerfEvent(**PAGE_FAULTS, sample_period=1, pid=process.pid)
        before = len(os.listdir("/proc/self/fd"))
        link = Link.attach(load(of_thread, "count_faults"), of_thread)
        assert len(os.listdir("/proc/self/fd")) == before + 2  # one event on all CPUs, and the program
        process.do("touch", 5, cpu=first)
        process.do("touch", 6, cpu=last)
        other.do("touch", 7)
        assert (hits(process.pid), hits(other.pid)) == (4 + 5 + 6, 0)
        link.close()


def test_a_perf_event_s_period(module: Module, load: Load, hits: Hits) -> None:
    with Probed() as process:
        module.maps["memory"].update(struct.pack("<I", process.pid), struct.pack("<Q", 0))
        hook = PerfEvent(**PAGE_FAULTS, sample_period=10**12, pid=process.pid)
        link = Link.attach(load(hook), hook)
        process.do("touch", 50)
        assert hits(process.pid) == 0
        link.close()


def test_a_perf_event_by_frequency(load: Load, hits: Hits) -> None:
    hook = PerfEvent(**CPU_CLOCK, sample_freq=500, pid=os.getpid())
    seen = hits(os.getpid())
    link = Link.attach(load(hook), hook)
    while hits(os.getpid()) < seen + 3:  # so it does come, again and again
        pass
    link.close()


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (RawTracepoint("sys_enter"), "raw tracepoint sys_enter"),
        (GETPPID, "tracepoint syscalls:sys_enter_getppid"),
        (Kprobe("do_exit"), "kprobe do_exit"),
        (Kprobe("do_exit", 16), "kprobe do_exit+0x10"),
        (Kprobe("do_exit", returns=True), "kretprobe do_exit"),
        (Uprobe("/bin/a", 32), "uprobe /bin/a+0x20"),
        (Uprobe("/bin/a", 32, True, 7), "uretprobe /bin/a+0x20 in process 7"),
        (PerfEvent(1, 2, 1), "perf event 1:0x2"),
        (PerfEvent(1, 2, 1, pid=7, cpu=0), "perf event 1:0x2 of thread 7 on CPU 0"),
    ],
)
def test_how_a_link_is_shown(hook: Hook, text: str) -> None:
    link = Link("hello", hook, [])
    assert str(hook) == text
    assert repr(link) == f"<Link hello on {text}, closed>"


def test_how_an_open_link_is_shown(load: Load) -> None:
    link = Link.attach(load(GETPPID), GETPPID)
    assert repr(link) == "<Link count on tracepoint syscalls:sys_enter_getppid>"
    link.close()
    assert repr(link) == "<Link count on tracepoint syscalls:sys_enter_getppid, closed>"


@pytest.mark.parametrize(
    ("category", "name", "near"),
    [
        ("syscalls", "sys_enter_exceve", "; did you mean syscalls:sys_enter_execve, "),
        ("sched", "sys_enter_execve", "; did you mean syscalls:sys_enter_execve"),
        ("shed", "sched_switch", "; did you mean sched:sched_switch"),
        ("a_category_of_another_name", "sched_switch", "; did you mean sched:sched_switch?"),
        ("nonsense", "nothing_like_it_at_all", ""),
        ("sched", "", ""),
        ("syscalls", "enable/x", ""),
    ],
)
def test_an_unknown_tracepoint(category: str, name: str, near: str, load: Load) -> None:
    hook = Tracepoint(category, name)
    message = f"there is no tracepoint {category}:{name} in Linux {os.uname().release}{near}"
    error = refusal(AttachError, load(hook), hook)
    assert error == message if not near and name else error.startswith(message)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("sched_swich", "; did you mean sched_switch"),
        ("sched:sched_switch", "; did you mean sched_switch"),
        ("sys_enter_execve", "; it is a tracepoint (syscalls:sys_enter_execve), but as raw tracepoints all "),
        ("sys_exit_execve", "system calls together are sys_exit"),
        ("nonsense", "there is no such tracepoint (Linux "),
    ],
)
def test_an_unknown_raw_tracepoint(name: str, near: str, load: Load) -> None:
    hook = RawTracepoint(name)
    error = refusal(AttachError, load(hook), hook)
    assert error.startswith(f"count cannot be attached to the raw tracepoint {name!r}: there is no such")
    assert near in error


def test_without_tracefs_there_are_no_hints(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    def missing() -> Path:
        raise UnsupportedError("tracefs is not mounted")

    monkeypatch.setattr(tracefs, "folder", missing)
    monkeypatch.setattr(kprobes, "_PMU", Path("/nonexistent"))
    assert refusal(AttachError, load(RawTracepoint("a")), RawTracepoint("sched_swich")).endswith(")")
    assert refusal(UnsupportedError, load(GETPPID), Kprobe("sys_execve")).endswith("a uprobe instead")


@pytest.mark.parametrize(
    ("hook", "remedy"),
    [
        (
            Kprobe("__x64_sys_execve"),
            "Use the tracepoint syscalls:sys_enter_execve (attach_syscall('execve') does)",
        ),
        (
            Kprobe("sys_execve", returns=True),
            "Use the tracepoint syscalls:sys_exit_execve (attach_syscall('execve') does)",
        ),
        (Kprobe("__x64_sys_exceve"), "Use a tracepoint (such as syscalls:sys_enter_execve, "),
        (Kprobe("tcp_retransmit_skb"), "Use a tracepoint (such as tcp:tcp_retransmit_skb"),
        (Kprobe("zzz"), "Use a tracepoint, a raw tracepoint or a uprobe instead"),
    ],
)
def test_a_kprobe_without_kprobes(
    hook: Kprobe, remedy: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kprobes, "_PMU", Path("/nonexistent"))
    assert not kprobes.kprobes_available()
    error = refusal(UnsupportedError, load(hook), hook)
    assert error.startswith(
        f"count cannot be attached to {hook.function}: this kernel (Linux {os.uname().release}) has no "
        "kprobes, which need CONFIG_KPROBE_EVENTS and Linux 4.17. "
    )
    assert remedy in error


def test_uprobes_that_cannot_be(load: Load, libc_getppid: tuple[str, int], tmp_path: Path) -> None:
    path, offset = libc_getppid
    for hook, reason in (
        (Uprobe("/nonsense", 0), "there is no such file"),
        (Uprobe(str(tmp_path), 0), "this is no regular file, or it ends before that offset"),
        (Uprobe(path, 1 << 40), "this is no regular file, or it ends before that offset"),
        (Uprobe(path, offset, pid=1 << 22), "there is no such process"),
    ):
        error = refusal(AttachError, load(hook), hook)
        assert error == f"count cannot be attached to the {hook}: {reason}"


def test_a_kernel_without_uprobes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: Load, libc_getppid: tuple[str, int]
) -> None:
    monkeypatch.setattr(links, "_PMUS", tmp_path)
    hook = Uprobe(*libc_getppid)
    assert "has no uprobes, which need CONFIG_UPROBE_EVENTS" in refusal(UnsupportedError, load(hook), hook)


def test_perf_events_that_cannot_be(load: Load) -> None:
    uncounted = "this machine does not count such events"
    for hook, reason in (
        (PerfEvent(1, 99, 1), uncounted),
        (PerfEvent(7777, 0, 1), uncounted),
        (PerfEvent(1, 0, 1, pid=1 << 22), "there is no such thread"),
        (PerfEvent(1, 0, 1, cpu=1 << 20), "there is no such event or CPU"),
        (PerfEvent(1, 0, sample_freq=1 << 40), "sample_freq is above /proc/sys/kernel/perf_event_max_sample"),
    ):
        error = refusal(AttachError, load(hook), hook)
        assert error.startswith(f"count cannot be attached to the {hook}: ")
        assert reason in error
    for hook in (PerfEvent(1, 0), PerfEvent(1, 0, sample_period=1, sample_freq=2)):
        assert "either sample_period or sample_freq" in refusal(ArgumentError, load(hook), hook)
    for hook in (PerfEvent(1, -1, 1), PerfEvent(-1, 0, 1)):
        assert "a number is below 0 or too large" in refusal(ArgumentError, load(hook), hook)


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    """The last of several descriptors fails; the fixture looks for the others."""
    hook = PerfEvent(**CPU_CLOCK, sample_period=10**12)
    program = load(hook)
    monkeypatch.setattr(links, "online_cpus", lambda: [*online_cpus(), 1 << 20])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AttachError, match="there is no such event or CPU"):
        Link.attach(program, hook)
    assert len(os.listdir("/proc/self/fd")) == before


def test_programs_that_do_not_fit(load: Load, libc_getppid: tuple[str, int]) -> None:
    program = load(GETPPID)
    hooks = (Uprobe(*libc_getppid), PerfEvent(1, 0, 10**12))
    for hook in hooks:
        assert refusal(AttachError, program, hook) == (
            f"count cannot be attached to the {hook}: "
            f"only a program that was loaded as {program_type(hook).name} fits there"
        )
    assert "it was not loaded as RAW_TRACEPOINT" in refusal(AttachError, program, RawTracepoint("sys_enter"))
    link = Link.attach(program, GETPPID)
    assert "it is attached there already" in refusal(AttachError, program, GETPPID)
    link.close()
    far = load(GETPPID, "read_too_far")
    assert refusal(AttachError, far, GETPPID) == (
        "read_too_far cannot be attached to the tracepoint syscalls:sys_enter_getppid: "
        "it reads past the end of what this hook hands over"
    )


WITHOUT_RIGHTS = """
import os, sys
from ebpfstream.errors import EbpfStreamError
from ebpfstream.kernel.bpf import Program
from ebpfstream.kernel.links import Link, PerfEvent, Tracepoint, Uprobe
program = Program(int(sys.argv[1]), "count")
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
before = os.listdir("/proc/self/fd")
for hook in (
    Tracepoint("syscalls", "sys_enter_getppid"), Uprobe(sys.argv[2], int(sys.argv[3])), PerfEvent(1, 0, 10**12)
):
    try:
        Link.attach(program, hook)
    except EbpfStreamError as error:
        print(type(error).__name__)
assert os.listdir("/proc/self/fd") == before
"""


def test_without_rights(load: Load, libc_getppid: tuple[str, int]) -> None:
    """Raw tracepoints are left out: there, since Linux 5.19, having the program is right enough."""
    program = load(GETPPID)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS, str(program.fd), *map(str, libc_getppid)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[program.fd],
        check=True,
    )
    assert done.stdout.split() == ["PrivilegeError"] * 3


def test_closing_waits_for_system_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their tracepoints run may begin after the others' grace period: Linux ≥ 6.13."""
    waited: list[str] = []
    monkeypatch.setattr(links, "_wait_for_system_calls", lambda: waited.append("once"))
    for name, count in (("sys_enter", 1), ("sched_process_exec", 1), ("sys_exit", 2)):
        link = Link("hello", RawTracepoint(name), [Descriptor(os.open("/dev/null", os.O_RDONLY))])
        link.close()
        link.close()
        assert len(waited) == count
