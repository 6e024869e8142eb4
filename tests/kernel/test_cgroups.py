"""Cgroups made for the purpose: their ids to paths and back."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from ebpfstream import containers, trace_execve
from ebpfstream.errors import ArgumentError
from ebpfstream.kernel import cgroups

pytestmark = pytest.mark.kernel

ROOT = Path(__file__).resolve().parents[2]
DOCKER_ID = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970"
NAMES = [
    "plain",
    "nested/deep/deeper",
    "ünï-cödé-名前-🚀",
    "with blank\ttab",
    r"machine-my\x2dbox.scope",
    "back\\slash",
    "quote'\"$(x)",
    "is here (deleted)",
    "..dots",
    "l" * 255,
    os.fsdecode(b"not-\xff\xfe-utf8"),
]


@pytest.fixture
def mount() -> Path:
    found = cgroups._mounted()
    if found is None:
        pytest.skip("cgroup v2 is not mounted")
    return Path(found.path)


@pytest.fixture
def base(mount: Path) -> Iterator[Path]:
    """A cgroup for the test alone; whatever is in it goes with it."""
    made = mount / f"ebpfstream-test-{os.getpid()}"
    made.mkdir()
    try:
        yield made
    finally:
        for folder, _, _ in os.walk(made, topdown=False):
            os.rmdir(folder)


@pytest.fixture
def handle_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without CAP_DAC_READ_SEARCH, in this process."""

    def refused(*_: object) -> str | None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(cgroups, "_by_handle", refused)
    monkeypatch.setattr(cgroups, "_walked", {})


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def without_capability(code: str, *arguments: str) -> str:
    """What this code prints when the kernel refuses handles to it; it asserts that itself."""
    prelude = f"import sys, os; sys.path.insert(0, {str(ROOT)!r}); from ebpfstream.kernel import cgroups\n"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-dac_read_search", sys.executable, "-c", prelude + code, *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_mount_is_one_of_cgroup2(mount: Path) -> None:
    assert (mount / "cgroup.controllers").is_file()
    assert cgroups.path_of(mount.stat().st_ino) == "/"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["handle", "walk"])
def test_paths_and_ids(base: Path, mount: Path, name: str, way: str, request: pytest.FixtureRequest) -> None:
    if way == "walk":
        request.getfixturevalue("handle_refused")
    cgroup = base / name
    cgroup.mkdir(parents=True)
    relative = "/" + str(cgroup.relative_to(mount))
    number = cgroup.stat().st_ino
    before = descriptors()
    assert cgroups.path_of(number) == relative
    assert cgroups.id_of(relative) == cgroups.id_of(cgroup) == cgroups.id_of(relative[1:]) == number
    cgroup.rmdir()
    assert cgroups.path_of(number) is None
    cgroup.mkdir()  # the same name is another cgroup
    assert cgroups.path_of(number) is None
    assert cgroups.path_of(cgroup.stat().st_ino) == relative
    assert descriptors() == before


@pytest.mark.parametrize("way", ["handle", "walk"])
def test_what_is_no_cgroup_has_no_path(base: Path, way: str, request: pytest.FixtureRequest) -> None:
    if way == "walk":
        request.getfixturevalue("handle_refused")
    before = descriptors()
    for number in (0, -1, 1 << 64, (1 << 64) - 1, 1 << 40, (base / "cgroup.procs").stat().st_ino):
        assert cgroups.path_of(number) is None
    assert descriptors() == before


def test_the_id_is_what_the_kernel_calls_it(base: Path, mount: Path) -> None:
    """A process put there is shown there: the paths are those of /proc/<pid>/cgroup."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        (base / "cgroup.procs").write_text(str(child.pid))
        lines = Path(f"/proc/{child.pid}/cgroup").read_text().splitlines()
    finally:
        child.kill()
        child.wait()
    (shown,) = (line.removeprefix("0::") for line in lines if line.startswith("0::"))
    assert cgroups.path_of(cgroups.id_of(shown)) == shown == "/" + base.name


def test_removed_while_it_is_looked_up(base: Path) -> None:
    """Between opening the handle and reading the path."""
    mount = cgroups._mounted()
    assert mount
    cgroup = base / "short-lived"
    cgroup.mkdir()
    number = cgroup.stat().st_ino
    fd = os.open(cgroup, os.O_PATH)
    try:
        assert cgroups._path_of_descriptor(mount, number, fd) == f"/{base.name}/short-lived"
        cgroup.rmdir()
        assert cgroups._path_of_descriptor(mount, number, fd) is None
    finally:
        os.close(fd)


def test_a_path_that_is_too_long_is_none(base: Path) -> None:
    top = os.open(base, os.O_RDONLY)
    fd = top
    made = []
    try:
        for _ in range(20):
            os.mkdir("l" * 250, dir_fd=fd)
            fd = os.open("l" * 250, os.O_RDONLY, dir_fd=fd)
            made.append(fd)
        before = descriptors()
        assert cgroups.path_of(os.fstat(made[1]).st_ino) == f"/{base.name}" + ("/" + "l" * 250) * 2
        assert cgroups.path_of(os.fstat(fd).st_ino) is None
        assert descriptors() == before
    finally:
        for parent in reversed([top, *made[:-1]]):
            os.rmdir("l" * 250, dir_fd=parent)
        for each in (top, *made):
            os.close(each)


def test_running_out_of_descriptors_is_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    inside = base / f"docker-{DOCKER_ID}.scope"
    inside.mkdir()
    number = inside.stat().st_ino
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", full)
        with pytest.raises(OSError, match="Too many"):
            cgroups.path_of(number)
        assert containers.of_cgroup(number) is None
    assert containers.of_cgroup(number) == DOCKER_ID  # so None was not remembered


def test_without_the_capability_the_mount_is_walked(base: Path) -> None:
    inside = [base / name for name in NAMES]
    for cgroup in inside:
        cgroup.mkdir(parents=True)
    found = without_capability(
        """
mount = cgroups._mounted()
for number in map(int, sys.argv[1:]):
    try:
        cgroups._by_handle(mount, number)
    except PermissionError:
        pass
    else:
        raise AssertionError("the handle was not refused")
    before = len(os.listdir("/proc/self/fd"))
    print(ascii(cgroups.path_of(number)))
    assert len(os.listdir("/proc/self/fd")) == before
""",
        *(str(cgroup.stat().st_ino) for cgroup in inside),
        str(1 << 40),
    )
    assert found.splitlines() == [ascii(f"/{base.name}/{name}") for name in NAMES] + ["None"]


def test_one_walk_serves_many(base: Path, handle_refused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = 0
    walk = cgroups._walk

    def counted(mount: cgroups._Mount) -> dict[int, str]:
        nonlocal walks
        walks += 1
        return walk(mount)

    monkeypatch.setattr(cgroups, "_walk", counted)
    inside = [base / str(number) for number in range(50)]
    for cgroup in inside:
        cgroup.mkdir()
    for cgroup in inside:
        assert cgroups.path_of(cgroup.stat().st_ino) == f"/{base.name}/{cgroup.name}"
    assert walks == 1
    late = base / "late"
    late.mkdir()
    assert cgroups.path_of(late.stat().st_ino) == f"/{base.name}/late"
    assert walks == 2


def test_a_walk_ends(base: Path, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "a/b/c").mkdir(parents=True)
    (base / "x/y/z").mkdir(parents=True)
    part = cgroups._Mount(str(base), mount.stat().st_dev)
    nearest = ["/", "/a", "/a/b", "/x", "/x/y"]
    assert sorted(cgroups._walk(part).values()) == sorted([*nearest, "/a/b/c", "/x/y/z"])
    monkeypatch.setattr(cgroups, "_MOST_WALKED", len(nearest))
    assert sorted(cgroups._walk(part).values()) == nearest


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/no/such/cgroup",
        "/etc",
        "/sys",
        "..",
        "/../..",
        "cgroup.procs",
        "/cgroup.procs",
        "nul\0",
        os.curdir + "/no-such",
    ],
)
def test_what_is_no_cgroup_has_no_id(path: str, mount: Path) -> None:
    with pytest.raises(ArgumentError, match=f"is no cgroup of v2: give a directory in {mount}, or its path"):
        cgroups.id_of(path)


def test_ids_of_the_root(mount: Path) -> None:
    assert cgroups.id_of("/") == cgroups.id_of(mount) == cgroups.id_of(f"{mount}/") == mount.stat().st_ino


def test_a_relative_path_does_not_depend_on_the_working_directory(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "inner").mkdir()
    monkeypatch.chdir(base)
    with pytest.raises(ArgumentError):
        cgroups.id_of("inner")


def test_no_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_mount", None)
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"")
    assert cgroups._mounted() is None
    assert cgroups.path_of(1) is None
    with pytest.raises(ArgumentError, match="mount -t cgroup2"):
        cgroups.id_of("/")


def test_which_mount_is_taken(base: Path, mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "_is_there", lambda mount: "gone" not in mount.path)

    def line(root: str, path: str, kind: str = "cgroup2", optional: str = "") -> str:
        return f"36 35 0:38 {root} {path} rw,relatime {optional}- {kind} none rw\n"

    def taken(*lines: str) -> str | None:
        found = cgroups._widest("".join(lines).encode())
        assert found is None or found.device == os.makedev(0, 38)
        return found and found.path

    assert taken() is None
    assert taken(line("/", "/a", "cgroup"), line("/", "/b", "tmpfs")) is None
    assert taken(line("/", "/a", "cgroup"), line("/", "/b", optional="shared:9 master:1 ")) == "/b"
    assert taken(line("/part", "/a"), line("/", "/b"), line("/", "/c")) == "/b"
    assert taken(line("/", "/gone"), line("/part", "/a")) == "/a"
    assert taken(line("/", "/a"), line("/../..", "/b"), line("/..", "/c")) == "/b"  # in a namespace
    assert taken(line("/", r"/a\040b\011c\012d\134e\134040")) == "/a b\tc\nd\\e\\040"


def test_a_mount_in_an_odd_place_that_shows_a_part(base: Path, mount: Path, tmp_path: Path) -> None:
    """What lies outside of the part has no path, rather than a wrong one."""
    (base / "shown/inner").mkdir(parents=True)
    (base / "other").mkdir()
    odd = tmp_path / "odd \\040 place"
    odd.mkdir()
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from ebpfstream.kernel import cgroups
assert cgroups._mounted().path == sys.argv[1], cgroups._mounted()
print(*(cgroups.path_of(int(number)) for number in sys.argv[2:]))
assert cgroups.id_of("/inner") == cgroups.id_of(sys.argv[1] + "/inner") == int(sys.argv[2])
"""
    script = 'mount --bind "$1" "$2" && umount -l "$3" && shift 3 && exec "$@"'
    numbers = [str((base / name).stat().st_ino) for name in ("shown/inner", "shown", "other")]
    places = [str(base / "shown"), str(odd), str(mount)]
    command = [sys.executable, "-c", code, str(odd), *numbers]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *places, *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["/inner", "/", "None"]


def test_levels(base: Path, mount: Path) -> None:
    """Known where the root is to be seen; in a namespace it is not, and the level from there would be a wrong one."""
    (base / "inner").mkdir()
    levels = [cgroups.level_of(cgroups.id_of(path)) for path in (mount, base, base / "inner")]
    assert levels == [0, levels[1], levels[1] + 1]
    assert levels[1] == len(base.relative_to(mount).parts)
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from ebpfstream import Filters
Filters(cgroup="/inner").pack()
"""
    join = 'echo $$ >"$0/cgroup.procs" && exec unshare --mount --cgroup sh -c "$@"'
    remount = 'umount -l "$0" && mount -t cgroup2 none "$0" && exec "$@"'
    command = ["sh", "-c", join, str(base), remount, str(mount), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"the root of the hierarchy, which {mount} does not show" in done.stderr
    assert done.returncode == 1


def test_unmounted_and_mounted_elsewhere(mount: Path, tmp_path: Path) -> None:
    code = f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from ebpfstream.kernel import cgroups
first, second = sys.argv[1:]
assert cgroups._mounted().path == first
assert cgroups.path_of(1) == "/"
subprocess.run(["umount", "-l", first], check=True)
assert cgroups._mounted() is None
assert cgroups.path_of(1) is None
subprocess.run(["mount", "-t", "cgroup2", "none", second], check=True)
assert cgroups._mounted().path == second
assert cgroups.path_of(1) == "/"
"""
    subprocess.run(["unshare", "-m", sys.executable, "-c", code, mount, tmp_path], check=True)


def test_the_container_of_a_real_cgroup(base: Path) -> None:
    inside = base / "system.slice" / f"docker-{DOCKER_ID}.scope" / "init"
    inside.mkdir(parents=True)
    scope, init = cgroups.id_of(inside.parent), cgroups.id_of(inside)
    assert containers.of_cgroup(scope) == containers.of_cgroup(init) == DOCKER_ID
    assert containers.of_cgroup(cgroups.id_of(base)) is None
    inside.rmdir()
    inside.parent.rmdir()
    assert containers.of_cgroup(scope) == DOCKER_ID  # remembered
    del containers._ids[scope]
    assert containers.of_cgroup(scope) is None
    assert scope in containers._ids  # final: the id will not come again


@pytest.mark.anyio
async def test_the_container_of_an_exec(base: Path) -> None:
    """The id that a BPF program sees is the directory's."""
    inside = base / f"docker-{DOCKER_ID}.scope"
    inside.mkdir()
    async with trace_execve() as events:
        subprocess.run(["sh", "-c", 'echo $$ > "$1"; exec true', "sh", inside / "cgroup.procs"], check=True)
        with anyio.fail_after(30):
            async for event in events:
                if event.args == ("true",) and containers.of_cgroup(event.cgroup_id) == DOCKER_ID:
                    break
    assert event.cgroup_id == cgroups.id_of(inside)
