"""What the peers are made of: what is missing of it, and the programs in C."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.peers.program import GETPPID

FOLDER: Final = Path(__file__).parent
DISTRIBUTION: Final = "/usr/lib/python3/dist-packages"
INSTALL: Final = (
    "as root, `make bench` installs it on Debian and Ubuntu (clang libbpf-dev bpftool bpftrace python3-bpfcc)"
)


def missing(part: str) -> str:
    """What a part of the peers lacks here, and how to have it; "" if it lacks nothing."""
    needed = {
        "producer": ["clang"],
        "bcc": ["bcc"],
        "libbpf": ["clang", "bpftool", "bpf/libbpf.h"],
        "bpftrace": ["bpftrace"],
    }.get(part, [])
    absent = [what for what in needed if not _is_there(what)]
    return f"{', '.join(absent)} not found: {INSTALL}" if absent else ""


def _is_there(what: str) -> bool:
    if what == "bcc":
        return Path(DISTRIBUTION, "bcc", "libbcc.py").exists() or importlib.util.find_spec("bcc") is not None
    if what.endswith(".h"):
        return Path("/usr/include", what).exists()
    return shutil.which(what) is not None


def build(folder: Path) -> None:
    """Compile what can be: `producer`, and `reader` on libbpf.  Raises CalledProcessError."""
    _run("clang", "-O2", "-Wall", "-o", folder / "producer", FOLDER / "producer.c")
    if missing("libbpf"):
        return
    include = [f"-I{folder}", f"-I{FOLDER / 'libbpf'}"]
    program, skeleton = folder / "hello.bpf.o", folder / "hello.skel.h"
    types = _run("bpftool", "btf", "dump", "file", "/sys/kernel/btf/vmlinux", "format", "c")
    (folder / "vmlinux.h").write_text(types)
    options = ["-O2", "-g", "-Wall", "-target", "bpf", f"-DGETPPID={GETPPID}", *include]
    _run("clang", *options, "-c", FOLDER / "libbpf/hello.bpf.c", "-o", program)
    skeleton.write_text(_run("bpftool", "gen", "skeleton", program, "name", "hello_bpf"))
    libraries = ["-lbpf", "-lelf", "-lz", "-lpthread"]
    _run("clang", "-O2", "-Wall", *include, "-o", folder / "reader", FOLDER / "libbpf/reader.c", *libraries)


def versions() -> dict[str, str]:
    """Of all others that take part."""
    found: dict[str, str] = {}
    if not missing("bcc"):
        version = f"import sys; sys.path.append({DISTRIBUTION!r}); import bcc; print(bcc.__version__)"
        found["BCC"] = _run(sys.executable, "-c", version).strip()
    if not missing("libbpf"):
        library = ctypes.CDLL("libbpf.so.1")
        library.libbpf_version_string.restype = ctypes.c_char_p
        found["libbpf"] = library.libbpf_version_string().decode()
        found["clang"] = _run("clang", "--version").splitlines()[0].split("version ")[-1]
    if not missing("bpftrace"):
        found["bpftrace"] = _run("bpftrace", "--version").split()[-1]
    return found


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
