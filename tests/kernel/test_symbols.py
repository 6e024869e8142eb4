"""Where functions are in ELF files: BCC's rules, near names, and nothing of LLVM in this process."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ebpfstream.errors import ArgumentError, AttachError, BccNotFoundError, EbpfStreamError
from ebpfstream.kernel import bcc, child, symbols
from ebpfstream.kernel.symbols import matching, resolve
from tests.test_house import _modules_after

pytestmark = pytest.mark.kernel


def mapped(function: str) -> tuple[str, int]:
    """A function of this process's libc: its file, and how far into it it begins."""
    libc = ctypes.CDLL(None)
    address = ctypes.cast(getattr(libc, function), ctypes.c_void_p).value or 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, _, _, *path = line.split(maxsplit=5)
        first, last = (int(number, 16) for number in span.split("-"))
        if first <= address < last:
            return path[0], address - first + int(offset, 16)
    raise AssertionError(f"{function} is mapped nowhere")


def refusal(
    kind: type[Exception], *arguments: object, function: Callable[..., object] = resolve, **more: object
) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments, **more)
    return str(caught.value)


def test_by_a_librarys_short_name_or_its_path() -> None:
    path, offset = mapped("getppid")
    found, at = resolve("c", "getppid")
    assert os.path.samefile(found, path)
    assert at == offset
    assert resolve(path, "getppid") == (path, offset)
    assert resolve("c", "getppid", offset=4) == (found, offset + 4)
    assert "libbcc" not in Path("/proc/self/maps").read_text()


def test_a_relative_path_is_this_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    path, offset = mapped("getppid")
    monkeypatch.chdir(Path(path).parent)
    assert resolve(f"./{Path(path).name}", "getppid") == (path, offset)


def test_by_address() -> None:
    path, offset = mapped("getppid")
    # A library's addresses begin at 0, but need not be equal to its file's offsets.
    assert resolve(path, address=offset) == (path, offset)
    error = refusal(AttachError, path, address=1 << 40)
    assert error == f"there is no code at 0x10000000000 in {path} (`objdump -d` shows addresses)"


def test_what_a_process_has_loaded() -> None:
    path, offset = mapped("getppid")
    root = f"/proc/{os.getpid()}/root"
    assert resolve("c", "getppid", pid=os.getpid()) == (f"{root}{path}", offset)
    assert resolve(path, "getppid", pid=os.getpid()) == (f"{root}{path}", offset)
    assert refusal(AttachError, "c", "getppid", pid=1 << 22) == f"there is no process {1 << 22}"
    error = refusal(AttachError, "nonsense", "f", pid=os.getpid())
    assert error == (
        f"process {os.getpid()} has loaded no library 'nonsense'; others are given by their path"
    )


def test_a_process_in_another_root() -> None:
    """A library that only that process's mount namespace has."""
    path, offset = mapped("getppid")
    script = f"mount -t tmpfs none /mnt && cp {path} /mnt/libelsewhere.so && echo ready && read end"
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert resolve("/mnt/libelsewhere.so", "getppid", pid=process.pid) == (
        f"/proc/{process.pid}/root/mnt/libelsewhere.so",
        offset,
    )
    assert refusal(AttachError, "/mnt/libelsewhere.so", "getppid") == (
        "there is no file /mnt/libelsewhere.so"
    )
    process.communicate(b"\n")


def test_all_that_match() -> None:
    path, offset = mapped("getppid")
    places = matching("c", "getppid$|getpid$")
    assert {position for _, position in places} == {offset, mapped("getpid")[1]}
    assert all(os.path.samefile(found, path) for found, _ in places)
    assert len(matching("c", "getppid$|__getppid$|__GI___getppid$|getppi")) == 1  # one place, many names
    error = refusal(AttachError, "c", "no_such_thing", function=matching)
    assert error.startswith("no function of /")
    assert error.endswith(" matches 'no_such_thing'")
    assert "no regular expression: " in refusal(ArgumentError, "c", "(", function=matching)


def test_unknown_functions() -> None:
    path, _ = resolve("c", "getppid")
    assert refusal(AttachError, "c", "getpppid").startswith(
        f"{path} has no function getpppid of its own; did you mean getppid"
    )
    assert refusal(AttachError, "c", "zzz") == f"{path} has no function zzz of its own"
    assert "has no function environ of its own" in refusal(AttachError, "c", "environ")  # a variable
    assert "; did you mean _ZN4ebpf3BPF10detach_allEv" in refusal(AttachError, "bcc", "BPF::detach_all")


def test_a_function_that_chooses_another() -> None:
    """STT_GNU_IFUNC: a probe on it would never see a call."""
    error = refusal(AttachError, "c", "strlen")
    assert "is never called: it only chooses a function for this CPU when a program starts" in error


def test_a_stripped_binary() -> None:
    path = os.path.realpath(shutil.which("true") or "")
    missing = (
        f"which has no symbols (it is stripped): install its debug symbols, or give an address "
        f"(`objdump -d {path}` shows them)"
    )
    assert refusal(AttachError, path, "main") == f"there is no function main in {path}, {missing}"
    error = refusal(AttachError, path, "m", function=matching)
    assert error == f"no function of {path} matches 'm', {missing}"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("libc", "c"), ("libc.so.6", "c"), ("libbcc", "bcc"), ("env", shutil.which("env"))],
)
def test_unknown_libraries(name: str, remedy: str) -> None:
    error = refusal(AttachError, name, "f")
    unknown = f"the dynamic loader knows no library '{name}'; others are given by their path; did you mean "
    assert error.startswith(unknown + remedy)


def test_a_library_that_is_loaded_by_another_name() -> None:
    ctypes.CDLL("libz.so.1")
    assert "did you mean z" in refusal(AttachError, "libz", "f", pid=os.getpid())


def test_files_that_hold_no_functions(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    (tmp_path / "text").write_text("text")
    for name, reason in (
        ("script", "/script is no ELF file but a script: probe its interpreter"),
        ("text", "/text is no ELF file"),
        ("", " cannot be read: Is a directory"),
        ("scripd", "/script?"),
    ):
        error = refusal(AttachError, f"{tmp_path}/{name}", "f")
        assert error.endswith(reason)
    assert refusal(AttachError, "/no/such/thing", "f") == "there is no file /no/such/thing"


def test_arguments_that_cannot_be_meant() -> None:
    assert "either a symbol or an address" in refusal(ArgumentError, "c")
    assert "either a symbol or an address" in refusal(ArgumentError, "c", "f", 1)
    for wrong in ({"symbol": "f", "offset": -1}, {"address": -1}, {"address": 1, "offset": 1}):
        assert "an offset is counted from a symbol" in refusal(ArgumentError, "c", **wrong)


def test_the_reader_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_code", lambda _: "import os; os.write(2, b'no luck\\n'); os._exit(3)")
    assert refusal(AttachError, "c", "f") == "the reader of c's symbols ended with 3: no luck"
    monkeypatch.setattr(child, "_code", lambda _: "import time; time.sleep(100)")
    monkeypatch.setattr(symbols, "_TIME_LIMIT", 0.1)
    assert "were not read within 0.1 s" in refusal(AttachError, "c", "f")


def test_errors_keep_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that of a binding that is not there."""
    code = child._code("symbols").replace("symbols.main()", "bcc.find.__defaults__ = ((),); symbols.main()")
    code = code.replace("import symbols", "import bcc, symbols")
    monkeypatch.setattr(child, "_code", lambda _: code)
    assert "apt-get install python3-bpfcc" in refusal(BccNotFoundError, "c", "getppid")
    assert issubclass(BccNotFoundError, EbpfStreamError)
    assert bcc.find()


def test_the_process_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(os.listdir("/proc/self/fd"))
    resolve("c", "getppid")
    assert capfd.readouterr() == ("", "")
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_child_needs_the_standard_library_alone() -> None:
    assert "ebpfstream.kernel.bcc" in _modules_after("ebpfstream.kernel.symbols", "-I", "-S")


def test_what_a_library_prints_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    code = child._code("symbols").replace(
        "symbols.main()",
        "symbols.json.load = lambda file, load=symbols.json.load: (__import__('os').write(1, b'{'), load(file))[1];"
        "symbols.main()",
    )
    monkeypatch.setattr(child, "_code", lambda _: code)
    assert resolve("c", "getppid")[1] == mapped("getppid")[1]
