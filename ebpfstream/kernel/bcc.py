"""BCC's compiler, in a process of its own.  The only importer of bcc.

Compiling with BCC changes the process's working directory, writes to its standard output, leaves
100 MB of LLVM behind and cannot be interrupted; so it happens in a short-lived child, which hands
back what it made and ends: the maps as descriptors, the programs as instructions, the rest as JSON
(`compiler` is the parent's side).  The child runs without site-packages: only the standard library
and modules that need nothing else may be imported here.

BCC is the distribution's (`python3-bpfcc` and its likes), found by its folder, so that any virtual
environment will do.  PyPI's package of the same name is another thing altogether.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from ebpfstream.errors import BccNotFoundError, CompileError, EbpfStreamError
from ebpfstream.kernel import child, headers

_FOLDERS: Final = (
    "/usr/lib/python3/dist-packages",
    "/usr/lib/python3*/site-packages",
    "/usr/lib64/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
    "/usr/local/lib/python3*/site-packages",
    "/usr/local/lib64/python3*/site-packages",
)
_INSTALL: Final = (
    ("Debian, Ubuntu", "apt-get install python3-bpfcc"),
    ("Fedora", "dnf install python3-bcc"),
    ("Arch", "pacman -S python-bcc"),
    ("Alpine", "apk add py3-bcc"),
)

OWN_HEADER: Final = re.compile(r'(?m)^[ \t]*#[ \t]*include[ \t]*"([^"]+)"')
"""Where a text includes a header of its own."""

# include/uapi/linux/sched.h, include/uapi/linux/mount.h
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h

SCM_MAX_FD: Final = 253
"""As many descriptors go in one message (include/net/scm.h)."""


def find(patterns: Sequence[str] = _FOLDERS) -> Path:
    """The folder of the distribution's `bcc` package.

    Raises BccNotFoundError, with the line that installs it on each distribution.
    """
    impostor = None
    for folder in _folders(patterns):
        package = folder / "bcc"
        if (package / "libbcc.py").exists() and (package / "table.py").exists():
            return package
        if (package / "__init__.py").exists():
            impostor = package
    message = "BCC's Python binding is not installed. Install your distribution's package:"
    for distribution, command in _INSTALL:
        message += f"\n  {distribution}: {command}"
    if impostor:
        message += f"\n({impostor} is another project's package that has the same name)"
    raise BccNotFoundError(message)


def version(package: Path) -> str:
    """The version that the package says it has; "of an unknown version" if it does not."""
    try:
        found = re.search(r"""=\s*["']([^"']+)""", (package / "version.py").read_text())
    except OSError:
        found = None
    return found[1] if found else "of an unknown version"


def _folders(patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(Path("/").glob(pattern.lstrip("/")), reverse=True)


def load(package: Path) -> ctypes.CDLL:
    """The BCC library, with the argument types that its binding declares."""
    name = "_ebpfstream_bcc"  # a name of our own: `bcc` may be somebody else's
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        library: ctypes.CDLL = importlib.import_module(f"{name}.libbcc").lib
    except (ImportError, OSError, AttributeError) as error:
        raise BccNotFoundError(
            f"BCC's binding in {package} cannot be loaded: {error}. Reinstall it and its library "
            f"(Debian, Ubuntu: apt-get install --reinstall python3-bpfcc libbpfcc)"
        ) from error
    finally:
        sys.dont_write_bytecode = write_bytecode
    # The binding lacks the types of those it does not call itself.
    pointer, size, string = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
    types: dict[str, list[type]] = {  # the result's, then the arguments'
        "bpf_num_tables": [size, pointer],
        "bpf_table_name": [string, pointer, size],
        "bpf_table_fd_id": [ctypes.c_int, pointer, size],
        "bpf_table_key_size_id": [size, pointer, size],
        "bpf_table_leaf_size_id": [size, pointer, size],
        "bpf_table_key_desc_id": [string, pointer, size],
        "bpf_table_leaf_desc_id": [string, pointer, size],
        "bpf_perf_event_fields": [size, pointer, string],
        "bpf_perf_event_field": [string, pointer, string, size],
    }
    for function, (result, *arguments) in types.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


def _compile(library: ctypes.CDLL, text: str, cflags: Sequence[str]) -> int | None:
    flags = (ctypes.c_char_p * len(cflags))(*(flag.encode() for flag in cflags))
    module: int | None = library.bpf_module_create_c_from_string(
        text.encode(), 0, flags, len(flags), True, None
    )
    return module


def _describe(library: ctypes.CDLL, module: int) -> dict[str, Any]:
    """What the module holds; the maps' descriptors are this process's."""
    return {
        "license": (library.bpf_module_license(module) or b"GPL").decode(),
        "kernel_version": library.bpf_module_kern_version(module),
        "functions": {
            name.decode(): ctypes.string_at(
                library.bpf_function_start(module, name), library.bpf_function_size(module, name)
            ).hex()
            for index in range(library.bpf_num_functions(module))
            for name in [library.bpf_function_name(module, index)]
        },
        "maps": [
            {
                "name": library.bpf_table_name(module, index).decode(),
                "fd": library.bpf_table_fd_id(module, index),
                "type": library.bpf_table_type_id(module, index),
                "key_size": library.bpf_table_key_size_id(module, index),
                "value_size": library.bpf_table_leaf_size_id(module, index),
                "max_entries": library.bpf_table_max_entries_id(module, index),
                "key": (library.bpf_table_key_desc_id(module, index) or b"").decode(),
                "value": (library.bpf_table_leaf_desc_id(module, index) or b"").decode(),
                "fields": _submitted_fields(library, module, library.bpf_table_name(module, index)),
            }
            for index in range(library.bpf_num_tables(module))
        ],
    }


def _submitted_fields(library: ctypes.CDLL, module: int, output: bytes) -> list[str]:
    """The names of the fields of the struct that the program submits to an output, as far as BCC tells."""
    return [
        library.bpf_perf_event_field(module, output, index).decode().partition("#")[0]
        for index in range(library.bpf_perf_event_fields(module, output))
    ]


def _compile_with_headers(text: str, cflags: Sequence[str]) -> tuple[ctypes.CDLL, int]:
    library = load(find())
    if "TRACEPOINT_PROBE" in text:
        _describe_tracepoints()
    for tree in headers.trees(_all_text(text, cflags)):
        if tree is None:  # the kernel's own, which BCC finds by itself
            os.environ.pop("BCC_KERNEL_SOURCE", None)
        else:
            os.environ["BCC_KERNEL_SOURCE"] = str(tree)
        # The log of the attempt that counts is the last one's.
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        module = _compile(library, text, cflags)
        if module is not None:
            return library, module
    raise CompileError("BCC refused the program")


def _describe_tracepoints() -> None:
    """Put tracefs where BCC looks for it, for this process alone, if it is elsewhere or nowhere.

    If that cannot be, BCC says what it misses.
    """
    if any(
        Path(folder, "events").is_dir() for folder in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
    ):
        return
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNS) == 0 and libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0:
        libc.mount(b"tracefs", b"/sys/kernel/tracing", b"tracefs", 0, None)


def _all_text(text: str, cflags: Sequence[str]) -> str:
    """The text with its own headers and the flags: all that may name a type of the kernel's."""
    parts = [text]
    seen: set[Path] = set()
    folders = [Path(flag.removeprefix("-I")) for flag in cflags if flag.startswith("-I")]
    for part in parts:
        for name in OWN_HEADER.findall(part):
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is not None and path not in seen:
                seen.add(path)
                parts.append(path.read_text())
    return "\n".join([*parts, *cflags])


def main() -> None:
    """Run as the child: text and flags come on standard input, descriptors and JSON leave by a socket.

    The standard output and error are a file of the parent's.
    """
    # A parent that is killed cannot end this process, which nobody waits for then.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = socket.socket(fileno=int(sys.argv[2]))
    request = json.load(sys.stdin)
    descriptors: list[int] = []
    try:
        library, module = _compile_with_headers(request["text"], request["cflags"])
        result = _describe(library, module)
        descriptors = [table["fd"] for table in result["maps"]]
    except EbpfStreamError as error:
        result = child.answer(error)
    for start in range(0, len(descriptors), SCM_MAX_FD):
        socket.send_fds(parent, [b"\n"], descriptors[start : start + SCM_MAX_FD])
    parent.sendall(json.dumps(result).encode())
    headers.clean_up()
    os._exit(0)  # LLVM's destructors have nothing to add
