"""tracefs found, mounted, or an error that says how: each in a mount namespace of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.kernel

FOLDER = (
    "from ebpfstream.errors import EbpfStreamError\n"
    "from ebpfstream.kernel import tracefs\n"
    "try:\n"
    "    print(tracefs.folder())\n"
    "    print(tracefs.tracepoint_id('syscalls', 'sys_exit_execve') > 0)\n"
    "    tracefs.tracepoint_id('syscalls', 'sys_exit_nonsense')\n"
    "except EbpfStreamError as error:\n"
    "    print(type(error).__name__, error)\n"
)
UNMOUNT = "while umount -t tracefs -a 2>/dev/null && grep -q ' tracefs ' /proc/mounts; do :; done"


def shown(prepare: str, *command: str) -> list[str]:
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{prepare}; exec "$@"',
            "sh",
            *command,
            sys.executable,
            "-c",
            FOLDER,
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_it_is_mounted_where_it_is_not() -> None:
    folder, found, error = shown(UNMOUNT)
    assert (folder, found) == ("/sys/kernel/tracing", "True")
    assert error.startswith("AttachError there is no tracepoint syscalls:sys_exit_nonsense in Linux ")


def test_it_is_found_wherever_it_is() -> None:
    place = "/run/é tracing"
    folder, found, _ = shown(
        f"{UNMOUNT}; mount -t tmpfs none /run; mkdir '{place}'; mount -t tracefs none '{place}'"
    )
    assert (folder, found) == (place, "True")


def test_it_cannot_be_mounted() -> None:
    (error,) = shown(UNMOUNT, "setpriv", "--bounding-set=-sys_admin")
    assert error == (
        "UnsupportedError tracefs is not mounted, and cannot be mounted here (Operation not permitted): "
        "as root, mount -t tracefs tracefs /sys/kernel/tracing"
    )
    (error,) = shown(UNMOUNT, "setpriv", "--reuid=65534", "--clear-groups")
    assert error.startswith("PrivilegeError tracefs is not mounted, and cannot be mounted here")
