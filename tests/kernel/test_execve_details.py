"""What trace_execve tells of failures and of the process around an exec, and its filters."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from ebpfstream import ArgumentError, ExecEvent, Filters, trace_execve
from tests.kernel.test_execve import TRUE, execs_of

pytestmark = [pytest.mark.kernel, pytest.mark.anyio]

AT_EMPTY_PATH = 0x1000
SYS_EXECVEAT = {"x86_64": 322, "aarch64": 281}[os.uname().machine]


async def attempts(act: Callable[[], Any], **options: Any) -> list[ExecEvent]:
    """All execs, successful or not, of the child in which `act` runs."""
    pid = 0

    def fork() -> None:
        nonlocal pid
        pid = os.fork()
        if not pid:
            try:
                act()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    return await execs_of(fork, lambda event: event.pid == pid, failed=True, **options)


def execve(path: bytes | int | None, argv: Any, envp: Any = None) -> None:
    """execve(2) with whatever one likes; returns if it fails."""
    ctypes.CDLL(None).execve(path, argv, envp)


def strings(*words: bytes) -> Any:
    return (ctypes.c_char_p * (len(words) + 1))(*words, None)


@pytest.mark.parametrize("buffer", ["ring", "perf"])
async def test_each_step_of_a_path_walk(buffer: str, tmp_path: Path) -> None:
    (tmp_path / "denied").mkdir()
    (tmp_path / "denied/true").write_text("not a program")
    path = f"/nonexistent/a:{tmp_path}/denied:/nonexistent/b:/bin"

    def act() -> None:
        Path("/proc/self/comm").write_text("caller")
        os.environ["PATH"] = path
        os.execvp("true", ["true", "some arg"])

    events = await attempts(act, buffer=buffer)
    assert [(event.filename, event.retval, event.error, event.program) for event in events] == [
        ("/nonexistent/a/true", -2, "ENOENT", 1),
        (f"{tmp_path}/denied/true", -13, "EACCES", 1),
        ("/nonexistent/b/true", -2, "ENOENT", 1),
        ("/bin/true", 0, "", 0),
    ]
    assert all(event.args == ("true", "some arg") for event in events)
    assert all(event.message == "true 'some arg'" for event in events)
    assert [event.comm for event in events] == ["caller", "caller", "caller", "true"]
    assert all(not event.args_truncated and not event.args_unreadable for event in events)


async def test_success_only_attaches_to_no_system_call() -> None:
    def perf_events() -> int:
        fds = [path for path in Path("/proc/self/fd").iterdir() if path.exists() or path.is_symlink()]
        return sum("perf_event" in str(fd.readlink()) for fd in fds)

    async with trace_execve():
        assert perf_events() == 0
    async with trace_execve(failed=True):
        assert perf_events() == 2


async def test_no_executable_format(tmp_path: Path) -> None:
    script = tmp_path / "nothing"
    script.write_bytes(b"\0\0\0\0")
    script.chmod(0o755)
    (event,) = await attempts(lambda: execve(os.fsencode(script), strings(b"x")))
    assert (event.error, event.filename) == ("ENOEXEC", str(script))


async def test_what_cannot_be_read() -> None:
    def act() -> None:
        execve(b"/nonexistent/x", ctypes.c_void_p(8))
        execve(ctypes.c_void_p(8), strings(b"x"))  # type: ignore[arg-type]
        pointers = (ctypes.c_void_p * 3)(ctypes.cast(ctypes.c_char_p(b"readable"), ctypes.c_void_p), 8, None)
        execve(b"/nonexistent/y", pointers)
        execve(b"/nonexistent/z", None)

    events = await attempts(act)
    assert [(event.filename, event.args, event.args_unreadable) for event in events] == [
        ("/nonexistent/x", (), True),
        ("", ("x",), False),
        ("/nonexistent/y", ("readable",), True),
        ("/nonexistent/z", (), False),
    ]
    assert events[1].error == "EFAULT"


async def test_a_failed_execveat(tmp_path: Path) -> None:
    def act() -> None:
        call = ctypes.CDLL(None).syscall
        folder = os.open(tmp_path, os.O_RDONLY)
        call(SYS_EXECVEAT, folder, b"", strings(b"empty"), None, AT_EMPTY_PATH)
        call(SYS_EXECVEAT, folder, b"relative", strings(b"relative"), None, 0)
        call(SYS_EXECVEAT, folder, b"/nonexistent/absolute", strings(b"absolute"), None, 0)

    events = await attempts(act)
    assert [(event.filename, event.args, event.error, event.by_descriptor) for event in events] == [
        ("", ("empty",), "EACCES", True),
        ("relative", ("relative",), "ENOENT", True),
        ("/nonexistent/absolute", ("absolute",), "ENOENT", False),
    ]
    assert {event.program for event in events} == {2}
    assert [event.sequence for event in events] == sorted({event.sequence for event in events})


@pytest.mark.parametrize(
    "lengths", [[3] * 500, [5000, 10, 4095, 4096, 100], [16383], [16384], [100_000], [99] * 200]
)
async def test_long_arguments_of_a_failure(lengths: list[int]) -> None:
    words = [bytes([ord("a") + index % 26]) * length for index, length in enumerate(lengths)]
    (event,) = await attempts(lambda: execve(b"/nonexistent/x", strings(*words)))
    whole = b"".join(word + b"\0" for word in words)
    kept = "\0".join(event.args).encode()
    assert event.args_truncated == (len(whole) > 16384)
    if event.args_truncated:
        assert whole.startswith(kept)
        assert len(kept) >= 16383
    else:
        assert event.args == tuple(word.decode() for word in words)


async def one_exec(*argv: str, **options: Any) -> tuple[ExecEvent, int]:
    """The last exec of a process."""
    pid = 0

    def act() -> None:
        nonlocal pid
        with subprocess.Popen(argv, **options) as child:
            pid = child.pid

    return (await execs_of(act, lambda event: event.pid == pid))[-1], pid


@pytest.mark.parametrize("depth", [0, 1, 20, 36, 60])
async def test_working_directories(tmp_path: Path, depth: int) -> None:
    folder = tmp_path.joinpath(*[f"d{number}" for number in range(depth)])
    folder.mkdir(parents=True, exist_ok=True)
    event, _ = await one_exec(TRUE, cwd=folder)
    # From one mount to the one that it is mounted on is a step, too.
    most = 40 - sum(parent.is_mount() for parent in folder.parents if parent != Path("/"))
    if len(folder.parts) - 1 < most:
        assert (event.cwd, event.cwd_truncated) == (str(folder), False)
    else:
        assert event.cwd_truncated
        assert event.cwd == "/" + "/".join(folder.parts[-most:])


async def test_working_directories_across_mounts() -> None:
    for folder in ("/", "/proc", "/sys/fs/cgroup", "/dev"):
        event, _ = await one_exec(TRUE, cwd=folder)
        assert (event.cwd, event.cwd_truncated) == (folder, False)


async def test_a_long_working_directory(tmp_path: Path) -> None:
    folder = tmp_path
    while len(os.fsencode(folder)) < 3800:
        folder = folder / ("é" * 120)
        folder.mkdir()
    try:
        event, _ = await one_exec(
            "sh", "-c", f"cd {tmp_path}; while cd éé* 2>/dev/null; do :; done; exec {TRUE}"
        )
        assert event.cwd_truncated
        assert str(folder).endswith(event.cwd)
        assert len(event.cwd.encode()) > 3500
    finally:
        subprocess.run(["rm", "-rf", tmp_path / ("é" * 120)], check=True)


async def test_inside_a_chroot(tmp_path: Path) -> None:
    """As the process itself sees it."""
    (tmp_path / "inside").mkdir()
    for source in ("/bin", "/lib", "/lib64", "/usr"):
        (tmp_path / source[1:]).mkdir()
    code = "".join(f"mount --bind {s} {tmp_path}{s}; " for s in ("/bin", "/lib", "/lib64", "/usr"))
    shell = f"{code} exec chroot {tmp_path} sh -c 'cd /inside; exec {TRUE} in chroot'"
    event, _ = await one_exec("unshare", "--mount", "sh", "-c", shell)
    assert event.args == (TRUE, "in", "chroot")
    assert (event.cwd, event.cwd_truncated) == ("/inside", False)


async def test_inside_a_pid_namespace() -> None:
    command = ["unshare", "--pid", "--fork", "--kill-child", "sh", "-c", f"{TRUE} inner; exec {TRUE} first"]
    found: list[ExecEvent] = []

    def act() -> None:
        subprocess.run(command, check=True)

    found = await execs_of(act, lambda event: event.args[1:] in (("first",), ("inner",)))
    by_name = {event.args[1]: event for event in found}
    assert by_name["first"].namespace_pid == 1
    assert by_name["inner"].namespace_pid == 2
    assert by_name["inner"].pid_namespace == by_name["first"].pid_namespace
    assert by_name["first"].pid_namespace != Path("/proc/self/ns/pid").stat().st_ino
    assert by_name["inner"].ppid == by_name["first"].pid


async def test_the_terminal_and_the_session() -> None:
    leader, terminal = pty.openpty()
    name = os.ttyname(terminal).removeprefix("/dev/").replace("/", "")

    def become_leader() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    event, pid = await one_exec(TRUE, preexec_fn=become_leader, pass_fds=[terminal])
    os.close(leader)
    os.close(terminal)
    assert (event.tty, event.session) == (name, pid)


async def test_the_parent_by_name(tmp_path: Path) -> None:
    program = tmp_path / "the-parents-name"
    program.write_text(f"#!/bin/sh\n{TRUE} child\nexit 0\n")
    program.chmod(0o755)
    found = await execs_of(
        lambda: subprocess.run([program], check=True), lambda event: event.args[1:] == ("child",)
    )
    assert [event.parent_comm for event in found] == ["the-parents-nam"]


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A cgroup v2 of this name."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    folder = Path(next(point for _, point, kind, *_ in mounts if kind == "cgroup2")) / name
    folder.mkdir()
    try:
        yield folder
    finally:
        folder.rmdir()


def enter(folder: Path) -> Callable[[], None]:
    def enter_it() -> None:
        (folder / "cgroup.procs").write_text(str(os.getpid()))

    return enter_it


async def test_the_container() -> None:
    number = f"{os.getpid():064x}"
    with cgroup(f"docker-{number}.scope") as folder:
        event, _ = await one_exec(TRUE, preexec_fn=enter(folder))
        assert event.cgroup_id == folder.stat().st_ino
        assert event.container_id == number


def true(mark: str, **options: Any) -> None:
    subprocess.run([TRUE, mark], check=True, **options)


async def filtered(act: Callable[[], None], **filters: Any) -> list[str]:
    """The second arguments of what passes; everything is accounted for."""
    async with trace_execve(**filters) as events:
        await run_sync(act)
        events.detach()
        seen = [event.args[1] async for event in events if event.args[0] == TRUE]
    statistics = events.statistics()
    assert statistics.tried == statistics.submitted == statistics.delivered
    assert statistics.rejected
    return seen


async def test_filters_by_user_and_group() -> None:
    def act() -> None:
        for number in range(3):
            true(f"nobody{number}", user=65534, group=4242, extra_groups=[])
            true("root")

    nobody = [f"nobody{number}" for number in range(3)]
    assert await filtered(act, uid=65534) == nobody
    assert await filtered(act, gid=4242) == nobody
    assert await filtered(act, uid=65534, gid=4241) == []


async def test_filters_by_process() -> None:
    def act() -> None:
        true("mine")
        subprocess.run(["sh", "-c", f"{TRUE} of-a-shell; exit 0"], check=True)

    assert await filtered(act, ppid=os.getpid()) == ["mine"]
    assert "mine" not in await filtered(act, exclude_self=True)
    assert "of-a-shell" in await filtered(act, exclude_self=True)
    assert await filtered(act, pid=1) == []
    assert await filtered(act, comm="tru") == []
    assert set(await filtered(act, comm="true")) >= {"mine", "of-a-shell"}


async def test_filters_by_cgroup_with_descendants() -> None:
    with cgroup(f"ebpfstream-{os.getpid()}") as outer, cgroup(f"ebpfstream-{os.getpid()}/inner") as inner:

        def act() -> None:
            true("outside")
            true("outer", preexec_fn=enter(outer))
            true("inner", preexec_fn=enter(inner))

        assert await filtered(act, cgroup=str(outer)) == ["outer", "inner"]
        assert await filtered(act, cgroup=f"/ebpfstream-{os.getpid()}/inner") == ["inner"]
    with pytest.raises(ArgumentError, match="nonexistent"):
        async with trace_execve(cgroup="/nonexistent"):
            pass


async def test_filters_change_while_it_runs() -> None:
    async with trace_execve(uid=4242) as events:
        await run_sync(true, "before")
        events.set_filters(Filters(ppid=os.getpid()))
        await run_sync(true, "after")
        with anyio.fail_after(10):
            assert (await anext(events)).args == (TRUE, "after")
        events.set_filters(Filters(uid=4242))
        await run_sync(true, "later")
        events.detach()
        assert [event async for event in events] == []
    statistics = events.statistics()
    assert statistics.rejected is not None
    assert statistics.rejected >= 2
    assert (statistics.tried, statistics.delivered) == (1, 1)


async def test_failures_are_filtered_too() -> None:
    def act() -> None:
        os.setuid(4242)
        execve(b"/nonexistent/x", strings(b"x"))

    assert len(await attempts(act, uid=4242)) == 1
    assert await attempts(act, uid=0) == []


async def test_exclude_self_in_a_pid_namespace() -> None:
    """Where this process does not know the number that the kernel knows it by."""
    code = (
        "import anyio, subprocess, sys\n"
        "from ebpfstream import trace_execve\n"
        "async def main():\n"
        "    async with trace_execve(exclude_self=True) as events:\n"
        "        await anyio.to_thread.run_sync(subprocess.run, ['/bin/true', 'mine'])\n"
        "        await anyio.to_thread.run_sync(subprocess.run, ['sh', '-c', '/bin/true marked; exit 0'])\n"
        # In a namespace of its own it has the number that this process has in this one.
        "        await anyio.to_thread.run_sync(subprocess.run, ['unshare', '-pf', '/bin/true', 'namesake'])\n"
        "        events.detach()\n"
        "        words = [event.args[-1] async for event in events]\n"
        "        print(*[word for word in words if word in ('mine', 'marked', 'namesake')])\n"
        "anyio.run(main)\n"
    )
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    done = await run_sync(lambda: subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True))
    assert done.stdout == "marked namesake\n"


def test_impossible_filters() -> None:
    with pytest.raises(ArgumentError, match="uid=-1 is impossible: give a number from 0 to 4294967295"):
        trace_execve(uid=-1)
    with pytest.raises(ArgumentError, match="is too long: the kernel keeps 15 bytes"):
        Filters(comm="more-than-15-bytes")
