"""The names of the kernel's functions, and what an unknown one may have been meant to be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ebpfstream.kernel import kprobes
from ebpfstream.names import did_you_mean, near


@pytest.fixture
def _no_prefix_known() -> Iterator[None]:
    kprobes._syscall_prefix.cache_clear()
    yield
    kprobes._syscall_prefix.cache_clear()


def test_the_functions_of_this_kernel_s_system_calls() -> None:
    known = set(kprobes.functions())
    assert not {name for name in known if name.startswith("__pfx_")}
    names = ("execve", "openat", "getppid", "bpf")
    assert {kprobes.syscall_function(name) for name in names} <= known
    assert kprobes.fix_syscall_function("sys_execve") == kprobes.syscall_function("execve")
    assert kprobes.fix_syscall_function("do_exit") == "do_exit"


@pytest.mark.usefixtures("_no_prefix_known")
@pytest.mark.parametrize(
    ("known", "machine", "function"),
    [
        (["__ia32_sys_bpf", "__x64_sys_bpf", "__sys_bpf", "kern_sys_bpf"], "x86_64", "__x64_sys_execve"),
        (["sys_bpf", "__se_sys_bpf"], "riscv64", "sys_execve"),
        (["__arm64_sys_bpf"], "aarch64", "__arm64_sys_execve"),
        ([], "aarch64", "__arm64_sys_execve"),
        ([], "x86_64", "__x64_sys_execve"),
        ([], "ppc64le", "sys_execve"),
    ],
)
def test_the_functions_of_other_kernels_system_calls(
    known: list[str], machine: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kprobes, "functions", lambda: known)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert kprobes.syscall_function("execve") == function
    for name in (
        "sys_execve",
        "__x64_sys_execve",
        "__ia32_sys_execve",
        "__ia32_compat_sys_execve",
        "__riscv_sys_execve",
    ):
        assert kprobes.fix_syscall_function(name) == function


def test_near_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kprobes, "functions", lambda: ["vfs_read", "vfs_ready", "put_cred.part.0"])
    reason = kprobes.reason
    assert reason("vfs_reed", 0, 2, returns=False).endswith("; did you mean vfs_read or vfs_ready?")
    assert reason("put_cred", 0, 2, returns=False).endswith("; did you mean put_cred.part.0?")
    assert reason("zzz", 0, 2, returns=False).startswith("there is no such function in Linux ")


def test_near_names() -> None:
    assert near("vfs_reed", ["vfs_read", "write", "vfs_readv"]) == ["vfs_read", "vfs_readv"]
    assert near("vfs_reed", ["write"]) == []


def test_how_they_are_offered() -> None:
    assert did_you_mean([]) == ""
    assert did_you_mean(["a"]) == "; did you mean a?"
    assert did_you_mean(["b", "b", "a"]) == "; did you mean b or a?"
    assert did_you_mean("dcba") == "; did you mean d, c or b?"
