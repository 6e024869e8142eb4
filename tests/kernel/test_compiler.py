"""BCC in its child process: found anywhere, quiet, and clear about what is wrong."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import socket
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from ebpfstream.errors import AttachError, BccNotFoundError, CompileError, LoadError, UnsupportedError
from ebpfstream.kernel import bcc, bpf, child, compiler
from ebpfstream.kernel.bpf import Map, MapType, Program, ProgramType, wait_for_running_programs
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import Link, RawTracepoint

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

HELLO = """
BPF_HASH(counts, u32, u64);
BPF_ARRAY(slots, u64, 7);
int hello(void *ctx) { u32 uid = bpf_get_current_uid_gid(); counts.increment(uid); slots.increment(0); return 0; }
int other(void *ctx) { return 0; }
"""


def loaded(module: Module, name: str) -> Program:
    return Program.load(
        name, ProgramType.RAW_TRACEPOINT, module.functions[name], module.numbered, license=module.license
    )


async def test_what_a_module_holds() -> None:
    module = await compiler.compile(HELLO)
    assert set(module.functions) == {"hello", "other"}
    assert {name: (m.type, m.key_size, m.value_size, m.max_entries) for name, m in module.maps.items()} == {
        "counts": (MapType.HASH, 4, 8, 10240),
        "slots": (MapType.ARRAY, 4, 8, 7),
    }
    program = loaded(module, "hello")
    assert module.maps["slots"].lookup(bytes(4)) == bytes(8)
    link = Link.attach(program, RawTracepoint("sys_enter"))
    os.getppid()
    link.close()
    counted = module.maps["slots"].lookup(bytes(4))
    assert counted is not None
    assert int.from_bytes(counted, "little") > 0
    assert module.maps["counts"].lookup((12345).to_bytes(4, "little")) is None


async def test_flags_reach_the_compiler() -> None:
    module = await compiler.compile("int hello(void *ctx) { return ANSWER; }", ["-DANSWER=0"])
    assert set(module.functions) == {"hello"}


async def test_the_process_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """No output, no other directory, no LLVM."""
    here = Path.cwd()
    await compiler.compile(HELLO)
    with pytest.raises(CompileError):
        await compiler.compile("int hello(void *ctx) { return")
    assert capfd.readouterr() == ("", "")
    assert Path.cwd() == here
    assert "libbcc" not in Path("/proc/self/maps").read_text()
    assert "BCC_KERNEL_SOURCE" not in os.environ


async def test_several_at_once() -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(compiler.compile, f"int f{number}(void *ctx) {{ return {number}; }}")


async def test_errors_of_the_text() -> None:
    text = "int hello(void *ctx) { return nothing + nobody + none + nowhere; }"
    with pytest.raises(CompileError) as caught:
        await compiler.compile(text)
    message = str(caught.value)
    assert message.startswith("BCC refused the program:\n  main.c:1:")
    assert "error: use of undeclared identifier 'nothing'" in message
    assert "nowhere'" not in message
    assert "\n  (1 more errors are in the error's `log`)\n" in message
    assert message.endswith("define it in the program, or install the kernel's headers)")
    assert caught.value.log.count("error: use of undeclared identifier") == 4
    assert "Unable to find kernel headers" not in message


async def test_what_the_verifier_refuses() -> None:
    module = await compiler.compile("int hello(void *ctx) { return *(int *)(ctx + 100000); }")
    with pytest.raises(
        LoadError, match=r"the kernel refused the program 'hello': .*verifier's last lines"
    ) as caught:
        loaded(module, "hello")
    assert "R1=ctx()" in str(caught.value)
    assert caught.value.log


async def test_an_unknown_tracepoint() -> None:
    module = await compiler.compile(HELLO)
    program = loaded(module, "other")
    with pytest.raises(
        AttachError, match="other cannot be attached to the raw tracepoint 'nonsense': there is no such"
    ):
        Link.attach(program, RawTracepoint("nonsense"))


async def test_an_impostor_is_recognised_and_worked_around(tmp_path: Path) -> None:
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc/__init__.py").write_text("raise RuntimeError('a crystal lattice')")
    with pytest.raises(BccNotFoundError, match=r"bcc is another project's package that has the same name"):
        bcc.find([str(tmp_path)])
    real = bcc.find()
    assert bcc.find([str(tmp_path), str(real.parent)]) == real
    # Nor does one that comes first on the path stand in the way.
    code = (
        f"import sys, anyio; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ebpfstream.kernel import compiler\n"
        "print(list(anyio.run(compiler.compile, 'int hello(void *ctx) { return 0; }').functions))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "['hello']\n"


async def test_a_python_that_cannot_be_executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(CompileError, match=r"/python: No such file or directory; it is this Python"):
        await compiler.compile("int hello(void *ctx) { return 0; }")


def test_any_python_will_do(tmp_path: Path) -> None:
    """The child in a virtual environment of each Python that is installed here."""
    names = [f"python3.{minor}" for minor in range(11, 20)]
    pythons = [sys.executable, *filter(None, map(shutil.which, names))]
    pythons += [str(path) for name in names for path in Path.home().glob(f".pyenv/versions/*/bin/{name}")]
    for index, python in enumerate(pythons):
        if subprocess.run([python, "-c", "import venv"], capture_output=True).returncode:
            continue  # a version manager's stand-in for a Python that is not chosen
        venv = tmp_path / str(index)
        subprocess.run([python, "-m", "venv", "--without-pip", venv], check=True)
        code = (
            f"import sys; sys.path.append({str(Path(__file__).parents[2])!r})\n"
            "from ebpfstream.kernel import bcc\n"
            "bcc._compile_with_headers('int hello(void *ctx) { return 0; }', [])\n"
            "print('compiled')"
        )
        done = subprocess.run([venv / "bin/python", "-I", "-c", code], stdout=subprocess.PIPE, text=True)
        assert done.stdout == "compiled\n", python


def descriptors() -> list[str]:
    return sorted(os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


async def test_cancelled_when_the_maps_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are closed, and the child is gone."""
    await anyio.to_thread.run_sync(int)  # what the event loop opens for itself is open already
    came: list[int] = []
    with anyio.CancelScope() as scope:
        receive = socket.socket.recvmsg

        def cancelling(parent: socket.socket, *args: Any) -> Any:
            answer = receive(parent, *args)
            for _, _, fds in answer[1]:
                came.extend(array("i", fds))
            scope.cancel()
            return answer

        monkeypatch.setattr(socket.socket, "recvmsg", cancelling)
        await compiler.compile(HELLO)
    assert scope.cancelled_caught
    assert len(came) == 2
    for fd in came:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


async def test_cancelled_it_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is killed, not waited for."""
    monkeypatch.setattr(child, "_code", lambda _: "import time; time.sleep(30)")
    with anyio.fail_after(5):
        with anyio.move_on_after(0.1) as scope:
            await compiler.compile(HELLO)
    assert scope.cancelled_caught


async def test_maps_are_not_inherited() -> None:
    module = await compiler.compile(HELLO)
    assert [os.get_inheritable(made.fd) for made in module.maps.values()] == [False, False]


async def test_more_maps_than_one_message_carries() -> None:
    """SCM_MAX_FD is 253; each comes under its own name."""
    count = 260
    text = "".join(f"BPF_ARRAY(map{number}, u64, {number + 1});\n" for number in range(count))
    module = await compiler.compile(text + "int hello(void *ctx) { return 0; }")
    assert [module.maps[f"map{number}"].max_entries for number in range(count)] == list(range(1, count + 1))
    for number in (0, 252, 253, 259):
        last = number.to_bytes(4, "little")
        beyond = (number + 1).to_bytes(4, "little")
        made = module.maps[f"map{number}"]
        assert (made.lookup(last), made.lookup(beyond)) == (bytes(8), None)


async def test_a_child_that_dies_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, sys; print('last words', file=sys.stderr, flush=True); os._exit(3)"
    monkeypatch.setattr(child, "_code", lambda _: code)
    with pytest.raises(
        CompileError, match=r"the compiler ended with 3 and said nothing of it: last words"
    ) as caught:
        await compiler.compile(HELLO)
    assert caught.value.log == "last words\n"


def test_the_message_of_a_log() -> None:
    lines = [f"/virtual/main.c:{number}:1: error: no {number}\n  here {number}" for number in range(4)]
    assert compiler._message("Refused", "\n".join(["warning: x", *lines[:3]])) == (
        "Refused:\n  main.c:0:1: error: no 0\n    here 0\n  main.c:1:1: error: no 1\n    here 1"
        "\n  main.c:2:1: error: no 2\n    here 2"
    )
    assert compiler._message("Refused", "\n".join(lines)).endswith(
        "    here 2\n  (1 more errors are in the error's `log`)"
    )
    assert compiler._message("Refused", "1\n2\n3\n4\n5\n6\n") == "Refused:\n  2\n  3\n  4\n  5\n  6"
    assert compiler._message("Refused", "") == "Refused"


def test_the_message_of_the_verifier() -> None:
    message = bpf._verifier_message("hello", 13, "\n".join(map(str, range(15))))
    assert message.startswith(
        "the kernel refused the program 'hello': Permission denied; the verifier's last lines:\n"
        "  (3 lines before these are in the error's `log`)\n  3\n  4\n"
    )
    assert message.endswith("\n  14")
    assert "before these" not in bpf._verifier_message("hello", 13, "\n".join(map(str, range(12))))
    assert (
        bpf._verifier_message("hello", 13, "") == "the kernel refused the program 'hello': Permission denied"
    )


def test_waiting_where_membarrier_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on kernels with nohz_full CPUs; the other way gives back what it took."""
    real = bpf.libc()
    membarrier = bpf._SYSCALLS[platform.machine()]["membarrier"]
    refused: list[int] = []

    class Libc:
        def syscall(self, number: int, *args: Any) -> int:
            if number == membarrier:
                refused.append(number)
                return -1
            return int(real.syscall(number, *args))

    monkeypatch.setattr(bpf, "libc", Libc)
    created: list[int] = []
    create = bpf.bpf

    def noting(command: int, attributes: bytes) -> int:
        result = create(command, attributes)
        assert result >= 0
        if command == bpf._MAP_CREATE:
            created.append(result)
        return result

    monkeypatch.setattr(bpf, "bpf", noting)
    before = descriptors()
    wait_for_running_programs()
    assert (len(refused), len(created)) == (1, 2)
    assert descriptors() == before


def test_waiting_where_a_map_of_maps_is_refused_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    real, call = bpf.libc(), bpf.bpf

    class Libc:
        def syscall(self, number: int, *args: Any) -> int:
            refused = number == bpf._SYSCALLS[platform.machine()]["membarrier"]
            return -1 if refused else int(real.syscall(number, *args))

    def refusing(command: int, attributes: bytes) -> int:
        if command == bpf._MAP_CREATE and attributes[:4] == bytes([MapType.ARRAY_OF_MAPS, 0, 0, 0]):
            ctypes.set_errno(errno.ENOMEM)
            return -1
        return call(command, attributes)

    monkeypatch.setattr(bpf, "libc", Libc)
    monkeypatch.setattr(bpf, "bpf", refusing)
    before = descriptors()
    with pytest.raises(OSError, match="Cannot allocate memory"):
        wait_for_running_programs()
    assert descriptors() == before


@pytest.mark.parametrize(
    ("release", "numbers"),
    [
        ("6.18.44-fc-v769", (6, 18)),
        ("6.12-rc6-amd64", (6, 12)),
        ("5.10.0-8-amd64", (5, 10)),
        ("6.1+", (6, 1)),
        ("4.19", (4, 19)),
    ],
)
def test_releases(monkeypatch: pytest.MonkeyPatch, release: str, numbers: tuple[int, int]) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    assert bpf.kernel_release.__wrapped__() == numbers


def test_machines_that_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structs are little-endian."""
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    with pytest.raises(UnsupportedError, match=r"^s390x is not supported; supported are x86_64, aarch64, "):
        Map.create("probe", MapType.ARRAY, key_size=4, value_size=4, max_entries=1)


async def test_runs_are_not_misses() -> None:
    """`recursion_misses` lies behind `run_cnt` in struct bpf_prog_info, which is not 0 here."""
    module = await compiler.compile(HELLO)
    code, maps = module.functions["hello"], module.numbered
    program = Program.load("hello", ProgramType.RAW_TRACEPOINT, code, maps, license="GPL")
    counting = bpf.bpf(32, bytes(4))  # BPF_ENABLE_STATS, BPF_STATS_RUN_TIME: until it is closed
    assert counting >= 0
    link = Link.attach(program, RawTracepoint("sys_enter"))
    os.getppid()
    link.close()
    os.close(counting)
    fdinfo = Path(f"/proc/self/fdinfo/{program.fd}").read_text().split()
    assert program.recursion_misses() == int(fdinfo[fdinfo.index("recursion_misses:") + 1]) == 0


async def test_what_the_child_prints_and_how_it_is_started(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Into the log and nowhere else; isolated from the environment, and without site-packages."""
    code = "import sys; print('out', sys.flags.isolated, sys.flags.no_site, flush=True); sys.exit(3)"
    monkeypatch.setattr(child, "_code", lambda _: code)
    with pytest.raises(CompileError) as caught:
        await compiler.compile(HELLO)
    assert caught.value.log == "out 1 1\n"
    assert capfd.readouterr() == ("", "")
