"""Kept programs: no compiler for what has been compiled, and nothing loaded but what was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ebpfstream import ExecEvent, LoadError, trace_execve
from ebpfstream.errors import BccNotFoundError
from ebpfstream.kernel import bcc, compiled, compiler, headers
from ebpfstream.kernel.compiled import Kept
from ebpfstream.kernel.compiler import Module
from ebpfstream.kernel.links import RawTracepoint
from ebpfstream.readymade import ReadyMade
from tests.disks import small_disk

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ebpfstream.stream import EventStream

pytestmark = pytest.mark.kernel

TEXT = '#include "own.h"\nint hello(void *ctx) { return ANSWER; }'
FLAGS = ("-DANSWER=1",)
MODULE = Module({"hello": bytes(range(16)), "other": bytes(8)}, {}, {}, "Dual BSD/GPL", 395826)
OTHER = MODULE.__class__({"other": bytes(24)}, {}, {}, "GPL", 1)
NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where things are kept: nothing yet."""
    root = tmp_path / "cache"
    monkeypatch.setenv("EBPFSTREAM_CACHE", str(root))
    return root


@pytest.fixture
def include(tmp_path: Path) -> Path:
    folder = tmp_path / "include"
    folder.mkdir()
    (folder / "own.h").write_text("typedef int own;\n")
    return folder


def of_text(include: Path, text: str = TEXT, flags: tuple[str, ...] = FLAGS) -> Kept:
    return Kept(text, [f"-I{include}", *flags])


def files(root: Path) -> list[Path]:
    return sorted((root / "programs").iterdir()) if (root / "programs").exists() else []


def descriptors() -> list[str]:
    return sorted(os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())


# --------------------------------------------------------------------------------------- streams


@pytest.fixture
async def compilers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Asked, how many compilers this process started since it was asked last: the kernel tells."""
    stream = trace_execve(ppid=os.getpid())
    with monkeypatch.context() as patch:
        patch.setenv("EBPFSTREAM_CACHE", "")
        await stream.__aenter__()

    async def since() -> int:
        # The last one that is executed ends what there is to be read.
        subprocess.run(["/bin/true", "the end"], check=True)
        others = 0
        async for event in stream:
            if event.args[-1:] == ("the end",):
                break
            others += not event.filename.endswith(("true", "mount"))
        return others

    try:
        yield since
    finally:
        await stream.aclose()


async def seen(stream: EventStream[ExecEvent]) -> list[str]:
    """What a stream of this process's children sees of one of them."""
    async with stream:
        subprocess.run(["/bin/true", "seen"], check=True)
        async for event in stream:
            if event.args[-1:] == ("seen",):
                return list(event.args)
    raise AssertionError


@pytest.mark.anyio
async def test_the_second_opening_starts_no_process(
    root: Path, compilers: Callable[[], Awaitable[int]]
) -> None:
    counts = []
    for _ in range(3):
        assert await seen(trace_execve(ppid=os.getpid())) == ["/bin/true", "seen"]
        counts.append(await compilers())
    assert counts == [1, 0, 0]
    assert len(files(root)) == 1
    assert await seen(trace_execve(ppid=os.getpid(), failed=True)) == ["/bin/true", "seen"]
    assert len(files(root)) == 2


TWO = """
#include "ebpfstream.h"
int first(void *ctx) { return scratch_of(0) != 0; }
int second(void *ctx) { return scratch_of(1) != 0; }
"""


@pytest.mark.anyio
async def test_a_kept_program_that_the_kernel_refuses(
    root: Path, tmp_path: Path, compilers: Callable[[], Awaitable[int]]
) -> None:
    """It is compiled anew, once, and replaced; nothing of the other is left in the kernel."""
    path = tmp_path / "two.c"
    path.write_text(TWO)
    exec_ = RawTracepoint("sched_process_exec")

    async def opened() -> list[str]:
        """What it has open."""
        source = ReadyMade(path, ExecEvent, {"first": exec_, "second": exec_})
        await source.open()
        found = descriptors()
        source.close()
        return found

    await opened()
    usual = await opened()
    (file,) = files(root)
    good = file.read_bytes()
    code = good.partition(b'"second": "')[2].partition(b'"')[0]
    kept = good.partition(b"\n")[2].replace(code, code.removesuffix(b"95" + b"0" * 14) + b"ff" * 8)
    with compiled._folder() as folder:
        compiled._write(folder, file.name, kept)
    assert file.read_bytes() != good
    assert await compilers() == 1
    assert await opened() == usual
    assert await compilers() == 1
    assert file.read_bytes() == good
    assert await opened() == usual
    assert await compilers() == 0


@pytest.mark.anyio
async def test_what_the_kernel_refuses_is_not_kept(
    root: Path, tmp_path: Path, compilers: Callable[[], Awaitable[int]]
) -> None:
    path = tmp_path / "refused.c"
    path.write_text("int refused(void *ctx) { return *(int *)(ctx + 100000); }")
    stream = ReadyMade(path, ExecEvent, {"refused": RawTracepoint("sys_enter")})
    for _ in range(2):
        with pytest.raises(LoadError, match="the kernel refused the program 'refused'"):
            await stream.open()
        assert await compilers() == 1
    assert files(root) == []


@pytest.mark.anyio
async def test_where_nothing_can_be_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compilers: Callable[[], Awaitable[int]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On a disk that is full, on one that is read-only, nowhere at all: a stream opens as well as ever."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "programs").mkdir(mode=0o700)
        (disk / "ballast").write_bytes(bytes(64 << 10))
        places = [str(disk), "/proc/nowhere", ""]
        for place in places:
            monkeypatch.setenv("EBPFSTREAM_CACHE", place)
            assert await seen(trace_execve(ppid=os.getpid())) == ["/bin/true", "seen"]
            assert await compilers() == 1
        (disk / "ballast").unlink()
        monkeypatch.setenv("EBPFSTREAM_CACHE", str(disk))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert await seen(trace_execve(ppid=os.getpid())) == ["/bin/true", "seen"]
        assert files(disk) == []
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------- key


def test_what_is_found_is_what_was_kept(root: Path, include: Path) -> None:
    assert of_text(include).find() is None
    of_text(include).keep(MODULE)
    assert of_text(include).find() == MODULE
    (file,) = files(root)
    assert [path.stat().st_mode & 0o7777 for path in (root, file.parent, file)] == [0o700, 0o700, 0o600]
    of_text(include).keep(OTHER)
    assert of_text(include).find() == OTHER
    assert files(root) == [file]


@pytest.mark.usefixtures("root")
def test_another_text_is_another_program(include: Path) -> None:
    of_text(include).keep(MODULE)
    assert of_text(include, TEXT + " ").find() is None
    assert of_text(include, flags=()).find() is None
    assert of_text(include, flags=("-DANSWER=2",)).find() is None
    assert of_text(include, flags=(*FLAGS, *FLAGS)).find() is None
    # The same bytes, with the borders elsewhere.
    assert of_text(include, flags=("-DANSWER=1-DX", "-DY")) is not None
    of_text(include, flags=("-DX-DY",)).keep(MODULE)
    assert of_text(include, flags=("-DX", "-DY")).find() is None
    assert of_text(include).find() == MODULE


@pytest.mark.usefixtures("root")
def test_another_header_is_another_program(include: Path) -> None:
    own, more = include / "own.h", include / "z.h"
    of_text(include).keep(MODULE)
    before = own.read_text()
    own.write_text(before.replace("int", "s32"))
    assert of_text(include).find() is None
    own.write_text(before)
    assert of_text(include).find() == MODULE
    more.write_text("")
    assert of_text(include).find() is None
    more.unlink()
    assert of_text(include).find() == MODULE
    more.write_text("second")
    of_text(include).keep(MODULE)
    own.rename(include / "a.h")  # the same contents in the same order
    more.rename(own)
    assert of_text(include).find() is None


def _another_library(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """BCC's is the same file as before, but written anew."""
    library = folder / "libbcc.so.0"
    library.write_bytes(b"b")
    os.utime(library, ns=(5, 5))


def _variable(name: str, value: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda _, patch: patch.setenv(name, value)


def _kernel(**fields: object) -> Callable[[Path, pytest.MonkeyPatch], None]:
    known = headers.Kernel()
    return lambda _, patch: patch.setattr(headers, "Kernel", lambda: known._replace(**fields))  # type: ignore[arg-type]


def _another_build(folder: Path, patch: pytest.MonkeyPatch) -> None:
    notes = folder / "notes"
    notes.write_bytes(bytes.fromhex("040000000400000003000000") + b"GNU\0" + b"abcd")
    _kernel(notes=notes)(folder, patch)


def _other_options(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "config").write_text("CONFIG_HZ=1\n")
    _kernel(configs=(folder / "config",))(folder, patch)


def _headers(folder: Path, patch: pytest.MonkeyPatch) -> None:
    tree = folder / os.uname().release / "build/include/linux"
    tree.mkdir(parents=True)
    (tree / "kconfig.h").touch()
    _kernel(modules=folder)(folder, patch)


def _version(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Of the kernel, as `uname -v` tells it."""
    name = os.uname()
    patch.setattr(os, "uname", lambda: os.uname_result((*name[:3], "#2", *name[4:])))


def _machine(folder: Path, patch: pytest.MonkeyPatch) -> None:
    name = os.uname()
    patch.setattr(os, "uname", lambda: os.uname_result((*name[:4], "pdp11")))


def _another_bcc(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.copytree(bcc.find(), folder / "bcc", symlinks=True)
    patch.setattr(bcc, "find", lambda: folder / "bcc")


def _other_sources(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Of this library's own compiling."""
    for name in compiled._SOURCES:
        shutil.copy(Path(compiled.__file__).parent / name, folder)
    with (folder / "shim.py").open("a") as file:
        file.write("# changed\n")
    patch.setattr(compiled, "__file__", str(folder / "compiled.py"))


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize(
    "change",
    [
        _another_build,
        _another_library,
        _another_bcc,
        _other_options,
        _other_sources,
        _headers,
        _version,
        _machine,
        _kernel(kheaders=Path("/")),
        _kernel(btf=Path("/proc/version")),
        _variable("BCC_LINUX_VERSION_CODE", "1"),
        _variable("ARCH", "arm64"),
        _variable("LD_PRELOAD", "libelse.so"),
        lambda _, patch: patch.setattr(compiled, "__version__", "0.0.0"),
    ],
)
def test_all_else_that_a_program_comes_from(
    include: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    library = folder / "libbcc.so.0"
    library.write_bytes(b"a")
    os.utime(library, ns=(1, 1))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    of_text(include).keep(MODULE)
    assert of_text(include).find() == MODULE
    with monkeypatch.context() as patch:
        change(folder, patch)
        assert of_text(include).find() is None
        library.write_bytes(b"a")
        os.utime(library, ns=(1, 1))
    assert of_text(include).find() == MODULE


def _no_btf(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The kernel still tells its build id."""
    patch.setattr(headers, "BTF", folder / "vmlinux")
    _kernel(btf=folder / "vmlinux")(folder, patch)


def _no_bcc() -> Path:
    raise BccNotFoundError("none")


@pytest.mark.parametrize(
    "change",
    [
        _no_btf,
        lambda _, patch: patch.setattr(bcc, "find", _no_bcc),
        lambda _, patch: patch.setattr(compiled, "_LIBRARY_FOLDERS", ("nonexistent",)),
    ],
)
def test_what_cannot_be_told_is_not_kept(
    root: Path,
    include: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    """No BTF; no BCC; or no library of its."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    change(tmp_path, monkeypatch)
    of_text(include).keep(MODULE)
    assert of_text(include).find() is None
    assert files(root) == []


def test_what_may_come_from_anywhere_is_not_kept(root: Path, include: Path) -> None:
    for text, *flags in (
        (TEXT, "-include", "/tmp/other.h"),
        ('#include "other.h"\n' + TEXT,),
        ('#include "/tmp/other.h"\n' + TEXT,),
    ):
        of_text(include, text, tuple(flags)).keep(MODULE)
        assert files(root) == []
    (include / "own.h").write_text('#include "other.h"\n')
    of_text(include).keep(MODULE)
    assert files(root) == []


def test_what_changed_while_it_was_compiled_is_not_kept(root: Path, include: Path) -> None:
    kept = of_text(include)
    (include / "own.h").write_text("")
    kept.keep(MODULE)
    assert files(root) == []


@pytest.mark.anyio
async def test_a_module_that_has_maps_is_not_kept(root: Path) -> None:
    text = "BPF_ARRAY(counts, u64, 1); int hello(void *ctx) { return 0; }"
    Kept(text, []).keep(await compiler.compile(text))
    assert files(root) == []


# ----------------------------------------------------------------------------------------- files


@pytest.fixture
def kept(root: Path, include: Path) -> Path:
    """The one file that is there."""
    of_text(include).keep(MODULE)
    (file,) = files(root)
    return file


def test_a_file_that_is_damaged(kept: Path, include: Path) -> None:
    text, whole = of_text(include), kept.read_bytes()
    assert text.find() == MODULE
    for length in range(len(whole)):
        kept.write_bytes(whole[:length])
        assert text.find() is None
    for position in range(len(whole)):
        kept.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        assert text.find() is None
    kept.write_bytes(whole + b" ")
    assert text.find() is None
    text.keep(MODULE)
    assert kept.read_bytes() == whole


def test_a_file_under_the_name_of_another(kept: Path, root: Path, include: Path) -> None:
    text = TEXT + "\n"
    of_text(include, text).keep(OTHER)
    (other,) = set(files(root)) - {kept}
    other.replace(kept)
    assert of_text(include).find() is None


def _symlinked(path: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir(0o700)


SPOILED: dict[str, Callable[[Path], object]] = {
    "for the group to write": lambda path: path.chmod(0o720),
    "for all to write": lambda path: path.chmod(0o702),
    "another user's": lambda path: os.chown(path, NOBODY, -1),
    "a link": _symlinked,
}


@pytest.mark.parametrize("how", [*SPOILED, "a pipe", "a folder"])
def test_a_file_that_another_may_have_written(kept: Path, include: Path, how: str) -> None:
    {**SPOILED, "a pipe": _pipe, "a folder": _folder}[how](kept)
    # A pipe that has a writer does not end.
    writer = os.open(kept, os.O_RDWR) if how == "a pipe" else None
    before = descriptors()
    assert of_text(include).find() is None
    of_text(include).keep(MODULE)
    assert of_text(include).find() == (None if how == "a folder" else MODULE)
    assert not list(kept.parent.glob(".*"))
    assert len(descriptors()) == len(before)
    if writer is not None:
        os.close(writer)


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("which", ["root", "programs", "above"])
def test_a_folder_that_another_may_have_written(
    kept: Path, include: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, which: str
) -> None:
    if which == "above":
        (tmp_path / "above").mkdir()
        kept.parents[1].rename(tmp_path / "above/cache")
        monkeypatch.setenv("EBPFSTREAM_CACHE", str(tmp_path / "above/cache"))
        kept = tmp_path / "above/cache/programs" / kept.name
        assert of_text(include).find() == MODULE
    folder = {"programs": kept.parent, "root": kept.parents[1], "above": kept.parents[2]}[which]
    SPOILED[how](folder)
    before, inside = descriptors(), list(kept.parent.iterdir())
    # A link above is one of the way's, such as /var/run: what counts is where it leads.
    trusted = MODULE if (which, how) == ("above", "a link") else None
    assert of_text(include).find() == trusted
    of_text(include).keep(OTHER)
    assert (of_text(include).find() is None) == (trusted is None)
    assert list(kept.parent.iterdir()) == inside
    assert descriptors() == before


def test_switched_off(kept: Path, include: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "cache_directory", lambda: kept.parents[1])
    assert of_text(include).find() == MODULE
    monkeypatch.setenv("EBPFSTREAM_CACHE", "")
    assert of_text(include).find() is None
    of_text(include, TEXT + " ").keep(MODULE)
    assert files(kept.parents[1]) == [kept]


def test_no_more_than_so_many(root: Path, include: Path) -> None:
    """Those used last; and nothing of killed processes, but what may be another's who still writes."""
    now = time.time()
    for number in range(compiled.KEEP):
        before = set(files(root))
        of_text(include, flags=(f"-DANSWER={number}",)).keep(MODULE)
        (file,) = set(files(root)) - before
        os.utime(file, (now - 1000 + number,) * 2)
    assert len(files(root)) == compiled.KEEP
    killed, writing = root / "programs/.killed", root / "programs/.writing"
    killed.touch()
    writing.touch()
    os.utime(killed, (now - 3700,) * 2)
    assert of_text(include, flags=("-DANSWER=0",)).find() == MODULE  # now it is used last
    of_text(include, flags=("-DANSWER=new",)).keep(MODULE)
    of_text(include, flags=("-DANSWER=newer",)).keep(MODULE)
    assert len(files(root)) == compiled.KEEP + 1
    assert writing.exists()
    assert not killed.exists()
    found = {
        answer: of_text(include, flags=(f"-DANSWER={answer}",)).find() is not None
        for answer in ("0", "1", "2", "3", "63", "new", "newer")
    }
    assert found == {"0": True, "1": False, "2": False, "3": True, "63": True, "new": True, "newer": True}


_AT_ONCE = """
import sys
from tests.kernel import test_compiled as tests
from pathlib import Path
modules = [tests.MODULE, tests.OTHER]
found = 0
for number in range(150):
    kept = tests.of_text(Path(sys.argv[1]), flags=(f"-DANSWER={number % 3}",))
    kept.keep(modules[number % 2])
    module = kept.find()
    assert module in modules, module
    found += 1
print(found)
"""


def test_processes_at_once(root: Path, include: Path) -> None:
    """Each finds one of what they keep, whole; never nothing."""
    command = [sys.executable, "-c", _AT_ONCE, str(include)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True)
        for _ in range(3)
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["150\n"] * 3
    assert len(files(root)) == 3
