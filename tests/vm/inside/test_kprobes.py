"""Kprobes for real: exactly the hits while attached, and why a function cannot be probed."""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest

from ebpfstream.errors import AttachError
from ebpfstream.kernel import compiler, kprobes, tracefs
from ebpfstream.kernel.bpf import Program
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.kprobes import syscall_function
from ebpfstream.kernel.links import Hook, Kprobe, Link, program_type
from tests.kernel.probed import Probed

pytestmark = pytest.mark.kernel

TEXT = """
#include <linux/ptrace.h>
BPF_HASH(hits, u32, u64);
BPF_HASH(others, u32, u64);
int count(struct pt_regs *ctx) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    hits.increment(pid);
    return 0;
}
int count_others(struct pt_regs *ctx) {
    u32 pid = bpf_get_current_pid_tgid() >> 32;
    others.increment(pid);
    return 0;
}
"""


@pytest.fixture(scope="module")
def module() -> Iterator[Module]:
    compiled = anyio.run(compiler.compile, TEXT)
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
def hits(module: Module) -> Callable[..., int]:
    def hits(pid: int, name: str = "hits") -> int:
        return int.from_bytes(module.maps[name].lookup(struct.pack("<I", pid)) or b"", "little")

    return hits


Load = Callable[..., Program]
Hits = Callable[..., int]


def refusal(program: Program, hook: Hook) -> str:
    with pytest.raises(AttachError) as caught:
        Link.attach(program, hook)
    start = f"{program.name} cannot be attached to the {hook}: "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


def traceable() -> set[str]:
    lines = (tracefs.folder() / "available_filter_functions").read_text().splitlines()
    return {line.split()[0] for line in lines}


def test_this_kernel_has_kprobes() -> None:
    assert kprobes.kprobes_available()


@pytest.mark.parametrize("returns", [False, True])
def test_a_kprobe_counts_until_its_link_is_closed(returns: bool, load: Load, hits: Hits) -> None:
    hook = Kprobe(syscall_function("getppid"), returns=returns)
    with Probed() as process:
        link = Link.attach(load(hook), hook)
        process.do("getppid", 7)
        assert hits(process.pid) == 7
        link.close()
        process.do("getppid", 100)
        assert hits(process.pid) == 7


def test_several_on_one_function(load: Load, hits: Hits) -> None:
    hook = Kprobe(syscall_function("getppid"))
    with Probed() as process:
        program = load(hook)
        first, second = Link.attach(program, hook), Link.attach(program, hook)
        other = Link.attach(load(hook, "count_others"), hook)
        process.do("getppid", 3)
        assert (hits(process.pid), hits(process.pid, "others")) == (2 * 3, 3)
        first.close()
        process.do("getppid", 4)
        assert (hits(process.pid), hits(process.pid, "others")) == (2 * 3 + 4, 3 + 4)
        second.close()
        other.close()


def test_offsets(load: Load, hits: Hits) -> None:
    """Every instruction at the beginning of a function, and only instructions."""
    refused = 0
    with Probed() as process:
        expected = 0
        for offset in range(1, 16):
            hook = Kprobe(syscall_function("getppid"), offset)
            program = load(hook)
            try:
                link = Link.attach(program, hook)
            except AttachError as error:
                assert f"+{offset:#x}: at offset {offset} no instruction begins" in str(error)  # noqa: PT017
                refused += 1
                continue
            process.do("getppid", 2)
            link.close()
            expected += 2
            assert hits(process.pid) == expected
    assert refused > 0
    assert expected > 0
    hook = Kprobe(syscall_function("getppid"), 4, returns=True)
    assert refusal(load(hook), hook) == "a function's return has no offset: leave it out"


def test_unknown_functions(load: Load) -> None:
    for wrong, near in (
        (syscall_function("exceve"), syscall_function("execve")),
        ("vfs_reed", "vfs_read"),
    ):
        hook = Kprobe(wrong)
        reason = refusal(load(hook), hook)
        assert reason.startswith(f"there is no such function in Linux {os.uname().release} (or the compiler ")
        assert f"; did you mean {near}" in reason


def test_what_the_compiler_made_of_a_function(load: Load) -> None:
    known = kprobes.functions()
    made = next(each for each in known if each.endswith(".isra.0") and each.partition(".")[0] not in known)
    hook = Kprobe(made.partition(".")[0])
    assert f"; did you mean {made}" in refusal(load(hook), hook)


def test_functions_that_handle_kprobes(load: Load) -> None:
    listed = Path("/sys/kernel/debug/kprobes/blacklist").read_text().splitlines()
    known = Counter(kprobes.functions())
    name = next(name for line in listed for name in line.split()[1:] if known[name] == 1)
    hook = Kprobe(name)
    assert refusal(load(hook), hook) == (
        "the kernel needs this function to handle kprobes (/sys/kernel/debug/kprobes/blacklist lists those)"
    )


def test_functions_that_are_not_traced(load: Load) -> None:
    """kernel/trace/ itself is compiled without."""
    hook = Kprobe("function_trace_call")
    assert refusal(load(hook), hook) == (
        "this function is compiled without tracing (`notrace`): choose one that calls it"
    )


def test_names_of_several_functions(load: Load) -> None:
    known, possible = Counter(kprobes.functions()), traceable() - kprobes._blacklisted()
    name = next(each for each, count in known.items() if count > 1 and each in possible)
    hook = Kprobe(name)
    assert refusal(load(hook), hook) == (
        f"the kernel has {known[name]} functions of this name and cannot tell which is meant"
    )
