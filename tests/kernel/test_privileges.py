"""Privileges are gone: by what the kernel says, by what is tried, and with streams that go on meanwhile.

What drops them is a process of its own, which calls one of the functions below and prints what it found.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import anyio
import pytest

from ebpfstream import BPF, count_execve, trace_execve
from ebpfstream.errors import ArgumentError, EbpfStreamError, PrivilegeError
from ebpfstream.kernel import privileges
from ebpfstream.kernel.bpf import (
    Map,
    MapType,
    Program,
    ProgramType,
    kernel_release,
    libc,
    wait_for_running_programs,
)
from ebpfstream.kernel.perfbuf import PerfBuffer
from ebpfstream.kernel.privileges import Capability, drop, held
from ebpfstream.syscall_names import numbers

pytestmark = pytest.mark.kernel

ROOT: Final = Path(__file__).resolve().parents[2]
NOBODY: Final = pwd.getpwnam("nobody")
OTHER: Final = 12345
NONE: Final = "0" * 16
FIELDS: Final = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
USERS: Final = [None, "nobody", str(NOBODY.pw_uid)]

Status = dict[str, str]


def child(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a new process prints that calls a function of this file."""
    code = f"from {__name__} import *; print(json.dumps({function.__name__}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=100
    )
    assert done.returncode == 0
    return json.loads(done.stdout)


def bits(*capabilities: Capability) -> str:
    return f"{sum(1 << one for one in capabilities):016x}"


def status(path: str = "/proc/thread-self/status") -> Status:
    lines = Path(path).read_text().splitlines()
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {name: " ".join(fields[name].split()) for name in FIELDS}


def everybody() -> list[Status]:
    """This thread, one that it starts, and a program that it runs."""
    found = [status()]
    thread = threading.Thread(target=lambda: found.append(status()))
    thread.start()
    thread.join()
    text = subprocess.run(
        ["/bin/cat", "/proc/self/status"], check=True, capture_output=True, text=True
    ).stdout
    fields = dict(line.split(":", 1) for line in text.splitlines())
    found.append({name: " ".join(fields[name].split()) for name in FIELDS})
    return found


def names(kept: frozenset[Capability]) -> list[str]:
    return sorted(one.name for one in kept)


def message(function: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """What it raises, as text; "" if nothing."""
    try:
        function(*arguments, **more)
    except (OSError, EbpfStreamError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def only(*capabilities: Capability) -> None:
    """Be a process that has these alone: in a container, say.  The bounding set stays."""
    mask = sum(1 << one for one in capabilities)
    privileges._set(mask, mask)


def ordinary(*capabilities: Capability) -> None:
    """Be nobody, with these as ambient capabilities: what systemd makes of User= and AmbientCapabilities=."""
    mask = sum(1 << one for one in capabilities)
    libc().prctl(8, *privileges._longs(1))  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(*[NOBODY.pw_gid] * 3)
    os.setresuid(*[NOBODY.pw_uid] * 3)
    header = ctypes.create_string_buffer(privileges._HEADER.pack(privileges._VERSION_3, 0))
    assert libc().capset(header, privileges._SETS.pack(*[mask & 0xFFFFFFFF] * 3, *[mask >> 32] * 3)) == 0
    for one in capabilities:
        assert (
            libc().prctl(47, *[ctypes.c_ulong(value) for value in (2, one, 0, 0)]) == 0
        )  # PR_CAP_AMBIENT_RAISE
    assert status()["CapAmb"] == bits(*capabilities)


def expected(user: str | None, effective: str = NONE, bounding: str = NONE) -> Status:
    now = status()
    of_user = {
        "Uid": " ".join([str(NOBODY.pw_uid)] * 4),
        "Gid": " ".join([str(NOBODY.pw_gid)] * 4),
        "Groups": " ".join(map(str, sorted(os.getgrouplist("nobody", NOBODY.pw_gid)))),
    }
    return {
        **(of_user if user else {name: now[name] for name in of_user}),
        "CapInh": NONE,
        "CapPrm": effective,
        "CapEff": effective,
        "CapBnd": bounding,
        "CapAmb": NONE,
        "NoNewPrivs": "1",
    }


# --- what the kernel says


def dropped(user: str | None, keep: list[str]) -> Any:
    kept = drop(user=user, keep=[Capability[name] for name in keep])
    return names(kept), sorted(held()), everybody()


@pytest.mark.parametrize("user", USERS)
def test_everything_is_gone(user: str | None) -> None:
    assert child(dropped, user, []) == [[], [], [expected(user)] * 3]


@pytest.mark.parametrize("user", USERS)
def test_what_is_kept(user: str | None) -> None:
    """By this process and its threads; by no program that it runs."""
    keep = [Capability.CAP_BPF, Capability.CAP_KILL]
    known = [one.name for one in keep]
    ours, theirs = expected(user, bits(*keep)), expected(user)
    assert child(dropped, user, known) == [known, known, [ours, ours, theirs]]


def kept_without_having_it() -> Any:
    only(Capability.CAP_KILL, Capability.CAP_SETPCAP)
    return names(drop(keep=[Capability.CAP_BPF, Capability.CAP_KILL]))


def test_what_it_has_not_is_not_kept() -> None:
    assert child(kept_without_having_it) == ["CAP_KILL"]


def test_what_is_held() -> None:
    mask = int(status()["CapEff"], 16)
    assert held() == {one.name for one in Capability if mask >> one & 1} | {
        f"CAP_{number}" for number in range(len(Capability), 64) if mask >> number & 1
    }
    assert {"CAP_SETUID", "CAP_SETGID", "CAP_BPF"} <= held()


def twice() -> Any:
    drop(user="nobody", keep=[Capability.CAP_BPF])
    return names(drop(user="nobody")), names(drop()), everybody()


def test_again() -> None:
    assert child(twice) == [[], [], [expected("nobody")] * 3]


# --- as whom it may be started


def in_a_container(user: str | None) -> Any:
    only(Capability.CAP_SETUID, Capability.CAP_SETGID, Capability.CAP_BPF, Capability.CAP_PERFMON)
    return names(drop(user=user)), everybody()


@pytest.mark.parametrize("user", USERS)
def test_root_with_few_capabilities(user: str | None) -> None:
    """Without CAP_SETPCAP nobody may change the bounding set."""
    assert child(in_a_container, user) == [[], [expected(user, bounding=status()["CapBnd"])] * 3]


def by_systemd(user: str | None, capabilities: list[str]) -> Any:
    ordinary(*(Capability[name] for name in capabilities))
    before = status()
    kept = drop(user=user, keep=[Capability.CAP_BPF])
    return names(kept), before, everybody()


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("capabilities", [[], ["CAP_BPF", "CAP_PERFMON"]])
def test_an_ordinary_user(user: str | None, capabilities: list[str]) -> None:
    kept, before, after = child(by_systemd, user, capabilities)
    assert kept == capabilities[:1]
    nobody = expected("nobody", bounding=status()["CapBnd"]) | {"Groups": ""}
    ours = bits(*(Capability[name] for name in capabilities))
    assert before == nobody | {
        name: ours for name in before if name in ("CapInh", "CapPrm", "CapEff", "CapAmb")
    } | {"NoNewPrivs": "0"}
    kept_bits = bits(*(Capability[name] for name in kept))
    mine = nobody | {"CapPrm": kept_bits, "CapEff": kept_bits}
    assert after == [mine, mine, nobody]


def with_other_groups() -> Any:
    ordinary(Capability.CAP_SETGID)
    return names(drop(user="nobody")), everybody()


def test_an_ordinary_user_whose_groups_are_others() -> None:
    assert child(with_other_groups) == [[], [expected("nobody", bounding=status()["CapBnd"])] * 3]


def may_not(who: str) -> Any:
    if who == "root":
        only(Capability.CAP_BPF)
    else:
        ordinary(Capability.CAP_BPF)
    return message(drop, user="nobody" if who == "root" else "root")


@pytest.mark.parametrize(("who", "user", "uid"), [("root", "nobody", 0), ("nobody", "root", NOBODY.pw_uid)])
def test_a_user_that_it_may_not_become(who: str, user: str, uid: int) -> None:
    assert child(may_not, who) == (
        f"PrivilegeError: this process (uid {uid}) cannot become the user {user!r}: Operation not permitted: start it "
        "as root, or with CAP_SETUID and CAP_SETGID, or as that user itself, and then without user="
    )


def unknown(users: list[str]) -> Any:
    before = status()
    said = [message(drop, user=user) for user in users]
    return said, before == status()


def test_unknown_users_change_nothing() -> None:
    users = ["no-such-user", "", "4294967294", "99999999999999999999", "-1", "a\0b", "\u0663"]
    said, unchanged = child(unknown, users)
    assert unchanged
    assert said == [
        f"ArgumentError: there is no user {user!r}: give a user's name or number as `getent passwd` shows it, or make "
        "one (useradd --system --no-create-home NAME)"
        for user in users
    ]
    with pytest.raises(ArgumentError):
        privileges._find("no-such-user")


# --- threads


def with_a_thread() -> Any:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()
    before = status()
    said = message(drop, user="nobody")
    unchanged = before == status() and before["NoNewPrivs"] == "0"
    end.set()  # it ends while that is waited for
    return said, unchanged, names(drop(user="nobody")), everybody()


def test_another_thread_is_refused() -> None:
    said, unchanged, kept, after = child(with_a_thread)
    comm = Path(sys.executable).resolve().name[:15]
    assert said.startswith(
        "PrivilegeError: privileges can be dropped in a process with one thread only, and this one has 2 ("
    )
    assert said.count(",", said.index("("), said.index(")")) == 1, (said, comm)
    assert unchanged
    assert (kept, after) == ([], [expected("nobody")] * 3)


def with_a_thread_that_ends() -> Any:
    thread = threading.Thread(target=time.sleep, args=(0.3,))
    thread.start()
    return names(drop()), thread.is_alive()


def test_a_thread_that_ends_is_waited_for() -> None:
    assert child(with_a_thread_that_ends) == [[], False]


# --- what cannot be done any more


def attempts(ours: int, other: int, path: str) -> dict[str, str]:
    """What each of these raises; "" if it can be done."""

    def load() -> None:
        code = bytes((0xB7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0))  # r0 = 0; exit
        Program.load("probe", ProgramType.RAW_TRACEPOINT, code, {}, license="GPL").close()

    def trace() -> None:
        if libc().ptrace(16, ours, None, None) < 0:  # PTRACE_ATTACH
            raise PermissionError(ctypes.get_errno(), "ptrace")
        os.waitpid(ours, 0)
        libc().ptrace(17, ours, None, None)  # PTRACE_DETACH

    def become() -> None:
        os.setresuid(1, 1, 0)
        os.setresuid(0, 0, 0)

    return {
        "open": message(Path(path).read_text),
        "kill": message(os.kill, other, 0),
        "ptrace": message(trace),
        "load": message(load),
        "become": message(become),
    }


def tried(user: str | None, ours: int, other: int, path: str, program: str) -> Any:
    before = attempts(ours, other, path)
    drop(user=user)
    after = attempts(ours, other, path)
    kill = message(os.kill, ours, 0)
    return before, after, kill, set_user_id(program)


def set_user_id(program: str, **options: Any) -> list[list[str]]:
    done = subprocess.run(
        [program, "/proc/self/status"], check=True, capture_output=True, text=True, **options
    )
    fields = dict(line.split(":", 1) for line in done.stdout.splitlines())
    return [fields["Uid"].split(), fields["CapEff"].split()]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may look into."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("user", USERS)
def test_what_must_fail(user: str | None, place: Path) -> None:
    secret, program = place / "secret", place / "cat"
    secret.write_text("")
    os.chown(secret, OTHER, OTHER)
    secret.chmod(0o600)
    shutil.copy("/bin/cat", program)
    program.chmod(0o4755)
    if not os.statvfs(program).f_flag & os.ST_NOSUID:
        uids, effective = set_user_id(str(program), user=OTHER)
        assert (uids[:2], effective != [NONE]) == ([str(OTHER), "0"], True)
    ours, other = subprocess.Popen(["sleep", "1000"]), subprocess.Popen(["sleep", "1000"], user=OTHER)
    try:
        before, after, kill, found = child(tried, user, ours.pid, other.pid, str(secret), str(program))
    finally:
        for sleeper in (ours, other):
            sleeper.kill()
            sleeper.wait()
    assert before == dict.fromkeys(before, "")
    kinds = {name: text.partition(":")[0] for name, text in after.items()}
    assert kinds == dict.fromkeys(before, "PermissionError") | {"load": "PrivilegeError"}
    assert kill == ("PermissionError: [Errno 1] Operation not permitted" if user else "")
    assert found == [[str(NOBODY.pw_uid if user else 0)] * 4, [NONE]]


def looked_into(user: str | None) -> Any:
    """By another process of the same user, that has no capabilities either."""
    asked, ask = os.pipe()
    answered, answer = os.pipe()
    if not os.fork():
        drop(user=user)
        os.read(asked, 1)
        folder = Path(f"/proc/{os.getppid()}")
        found = [message((folder / "environ").read_bytes), message(os.listdir, folder / "fd")]
        os.write(answer, json.dumps(found).encode())
        os._exit(0)
    drop(user=user)
    os.write(ask, b"!")
    theirs = json.loads(os.read(answered, 1 << 16))
    os.wait()
    # What this library reads of itself.
    own = [
        message(Path("/proc/self", name).read_bytes)
        for name in ("status", "mountinfo", "mounts", "maps", f"fdinfo/{asked}")
    ]
    own += [message(os.listdir, f"/proc/self/{name}") for name in ("fd", "fdinfo", "task")]
    own += [message(os.stat, "/proc/self/ns/pid"), message(os.readlink, f"/proc/self/fd/{asked}")]
    return theirs, own, libc().prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE


def test_nobody_looks_into_it() -> None:
    """Not even the same user, unless the administrator wants that; itself it does."""
    theirs, own, dumpable = child(looked_into, "nobody")
    assert own == [""] * len(own)
    assert dumpable == int(Path("/proc/sys/fs/suid_dumpable").read_text())
    if dumpable != 1:
        assert [text.partition(" ")[0] for text in theirs] == ["PermissionError:"] * 2
    # A process that stays the same user is as it was.
    theirs, own, dumpable = child(looked_into, None)
    assert (theirs, own, dumpable) == (["", ""], [""] * len(own), 1)


# --- what has to work


def needs_bpf() -> None:
    """What has needed CAP_BPF, whatever unprivileged users may do (map_create(), kernel/bpf/syscall.c)."""
    Map.create("probe", MapType.LRU_HASH, key_size=4, value_size=4, max_entries=1).close()


def works(user: str | None, having: list[str], keep: list[str]) -> Any:
    if having:
        only(*(Capability[name] for name in having))
    tries = []

    def work() -> None:
        tries.append(sorted(held()))
        needs_bpf()

    said, kept = "", frozenset[Capability]()
    try:
        kept = drop(user=user, keep=[Capability[name] for name in keep], works=work)
    except PrivilegeError as error:
        said = str(error)
    return tries, names(kept), said, everybody()


@pytest.mark.parametrize("user", [None, "nobody"])
@pytest.mark.parametrize(
    ("having", "keep", "tries"),
    [
        ([], [], [[], ["CAP_BPF"]]),
        ([], ["CAP_BPF"], [["CAP_BPF"]]),
        ([], ["CAP_KILL"], [["CAP_KILL"], ["CAP_BPF", "CAP_KILL"]]),
        (["CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"], [], [[], ["CAP_SYS_ADMIN"]]),
    ],
)
def test_what_it_takes_is_kept(
    user: str | None, having: list[str], keep: list[str], tries: list[list[str]]
) -> None:
    tried, kept, said, (mine, thread, program) = child(works, user, having, keep)
    assert (tried, kept, said) == (tries, tries[-1], "")
    now = bits(*(Capability[name] for name in kept))
    assert (mine, thread) == (expected(user, now, mine["CapBnd"]),) * 2
    # Without CAP_SETPCAP the bounding set stays; from that root's programs get what their parent has.
    assert program == expected(user, now if having and not user else NONE, mine["CapBnd"])


def test_what_works_without_needs_nothing() -> None:
    assert child(harmless) == [[[]], []]


def harmless() -> Any:
    tries: list[list[str]] = []
    return tries, names(drop(works=lambda: tries.append(sorted(held()))))


def test_what_does_not_work_is_an_error() -> None:
    tried, kept, said, after = child(works, "nobody", ["CAP_SETUID", "CAP_SETGID"], [])
    assert (tried, kept) == ([[]], [])
    assert said.startswith(
        "what is attached cannot go on without privileges: the kernel refuses BPF to this process"
    )
    assert said.endswith(
        ": start this process with CAP_BPF as well, use Linux 5.19 or newer, or do not drop privileges"
    )
    assert after == [expected("nobody", bounding=status()["CapBnd"])] * 3


def needs_another() -> Any:
    tries = []

    def work() -> None:
        tries.append(sorted(held()))
        if "CAP_SYS_ADMIN" not in held():
            raise PermissionError(1, "not the administrator")

    return message(drop, works=work), tries, sorted(held())


def test_the_administrators_capability_is_not_kept_where_there_is_the_smaller_one() -> None:
    said, tries, after = child(needs_another)
    assert said.startswith(
        "PrivilegeError: what is attached cannot go on without privileges: [Errno 1] not the"
    )
    assert (tries, after) == ([[], ["CAP_BPF"]], [])


def fails() -> Any:
    def work() -> None:
        raise ZeroDivisionError

    with suppress(ZeroDivisionError):
        drop(works=work)
        return None
    return everybody()


def starts_a_thread() -> Any:
    end = threading.Event()
    said = message(drop, works=threading.Thread(target=end.wait).start)
    end.set()
    return said


def test_what_goes_wrong_otherwise_is_raised() -> None:
    assert child(fails) == [expected(None)] * 3
    assert "in a process with one thread only" in child(starts_a_thread)


# --- streams go on

TEXT: Final = """
struct call { u64 number; };
BPF_RINGBUF_OUTPUT(ring, 8);
BPF_PERF_OUTPUT(perf);
int submit(struct bpf_raw_tracepoint_args *ctx) {
    struct call call = {};
    if (bpf_get_current_pid_tgid() >> 32 != TARGET || ctx->args[1] != GETPPID) return 0;
    call.number = ctx->args[1];
    ring.ringbuf_output(&call, sizeof(call), 0);
    perf.perf_submit(ctx, &call, sizeof(call));
    return 0;
}
"""
BEFORE, AFTER, READ, LEFT, MANY = 20, 60, 5, 7, 500


def executed(times: int) -> list[int]:
    """One after the other, so that it is known in which order."""
    pids = []
    for _ in range(times):
        pids.append(os.posix_spawn("/bin/true", ["true"], {}))
        os.waitpid(pids[-1], 0)
    return pids


def streams(user: str | None, uvloop: bool) -> Any:
    """Attach, read a little; drop; and in another loop read on, detach one, close all."""
    own = os.getpid()
    kinds: tuple[Literal["ring", "perf"], ...] = ("ring", "perf")
    execs = {kind: trace_execve(ppid=own, comm="true", buffer=kind, on_lost="raise") for kind in kinds}
    counts = count_execve(ppid=own, comm="true", every=0.05)
    bpf = BPF(text=TEXT, cflags=[f"-DTARGET={own}", f"-DGETPPID={numbers()['getppid']}"])
    calls: dict[str, Any] = {}
    stack = AsyncExitStack()
    pids: list[int] = []
    found: dict[str, list[int]] = {kind: [] for kind in kinds}
    called = dict.fromkeys(kinds, 0)

    async def read(execs_until: int, calls_until: int) -> None:
        with anyio.fail_after(50):
            for kind in kinds:
                while len(found[kind]) < execs_until:
                    found[kind].append((await anext(execs[kind])).pid)
                while called[kind] < calls_until:
                    assert (await anext(calls[kind])).number == numbers()["getppid"]
                    called[kind] += 1

    async def attach() -> None:
        for stream in execs.values():
            await stack.enter_async_context(stream)
        await stack.enter_async_context(counts)
        await stack.enter_async_context(bpf)
        bpf.attach_raw_tracepoint(tp="sys_enter", fn_name="submit")
        for kind in kinds:
            calls[kind] = await stack.enter_async_context(bpf.events(kind))
        pids.extend(executed(BEFORE))
        for _ in range(BEFORE):
            os.getppid()
        await read(READ, READ)
        await anext(counts)

    async def go_on() -> dict[int, int]:
        pids.extend(executed(AFTER))
        for _ in range(MANY):
            os.getppid()
        # Of the perf buffers something is left when they are closed.
        await read(BEFORE + AFTER - LEFT, BEFORE + MANY - LEFT)
        execs["ring"].detach()
        found["ring"] += [event.pid async for event in execs["ring"]]
        await anyio.sleep(0.1)  # the perf buffers are quiet meanwhile
        pids.extend(executed(1))
        await read(BEFORE + AFTER - LEFT + 1, 0)
        await anext(counts)
        await stack.aclose()
        return dict(counts.read())

    def working() -> None:
        for stream in (*execs.values(), *calls.values()):
            stream.statistics()
        counts.read()
        counts.counters()
        wait_for_running_programs()

    options = {"use_uvloop": uvloop}
    anyio.run(attach, backend_options=options)
    kept = drop(user=user, works=working)
    after = status()
    final = anyio.run(go_on, backend_options=options)
    return (
        names(kept),
        after,
        [found[kind] == pids[: len(found[kind])] for kind in kinds],
        [asdict(stream.statistics()) for stream in (*execs.values(), *calls.values())],
        {str(uid): count for uid, count in final.items()},
        counts.counters()._asdict(),
    )


@pytest.mark.parametrize(
    ("user", "uvloop"), [(None, False), ("nobody", False), ("nobody", True)], ids=["root", "nobody", "uvloop"]
)
def test_streams_go_on(user: str | None, uvloop: bool) -> None:
    kept, after, in_order, (ring, perf, ring_calls, perf_calls), final, counters = child(
        streams, user, uvloop
    )
    # Reading maps by their descriptors needs nothing since Linux 5.19.
    free = kernel_release() >= (5, 19) or not int(
        Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text()
    )
    assert kept == ([] if free else ["CAP_BPF"])
    assert after == expected(user, NONE if free else bits(Capability.CAP_BPF))
    assert in_order == [True, True]
    execs, calls = BEFORE + AFTER, BEFORE + MANY
    for ledger, delivered, unread in ((ring, execs, 0), (perf, execs - LEFT + 1, LEFT)):
        total = delivered + unread
        assert (ledger["tried"], ledger["submitted"], ledger["received"]) == (total, total, total)
        assert (ledger["delivered"], ledger["unread"]) == (delivered, unread)
        assert (ledger["lost"], ledger["undecodable"], ledger["misses"], ledger["buffered"]) == (0, 0, 0, 0)
    for ledger in (ring_calls, perf_calls):
        assert (ledger["received"], ledger["delivered"], ledger["unread"]) == (calls, calls - LEFT, LEFT)
        assert (ledger["lost"] or 0, ledger["misses"]) == (0, 0)
    assert perf_calls["lost"] == 0
    assert final == ({"0": BEFORE, str(NOBODY.pw_uid): AFTER + 1} if user else {"0": execs + 1})
    assert (counters["tried"], counters["submitted"], counters["lost"]) == (execs + 1, execs + 1, 0)


def comes_online(keep: list[str]) -> Any:
    logged = io.StringIO()
    logging.basicConfig(stream=logged)
    buffer = PerfBuffer.create(1 << 20)
    drop(keep=[Capability[name] for name in keep])
    try:
        return message(buffer._came, 0) + logged.getvalue()
    finally:
        buffer.close()


def test_a_ring_for_a_cpu_that_comes_needs_a_capability() -> None:
    """What a service that reads perf buffers keeps; without it, what is lost is counted."""
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) > 0:
        assert "CPU 0 has come, and what happens on it is lost: " in child(comes_online, [])
    assert child(comes_online, ["CAP_PERFMON"]) == ""
