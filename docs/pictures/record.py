"""The pictures of the documentation, made anew from the real program: `make docs-pictures` (as root).

Each is what a terminal showed, as an SVG that needs no script and no font of another host; one that moves shows its
frames in turn, again and again.  What is seen is a workload made here, in a cgroup of its own.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import pyte

HERE: Final = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "_site"))
from terminal_svg import Frame, frame, svg  # type: ignore[import-not-found]  # noqa: E402

CGROUPS: Final = Path("/sys/fs/cgroup")
SHOP: Final = CGROUPS / "shop"
CLONE_NEWNS: Final = 0x20000  # include/uapi/linux/sched.h
CLONE_NEWUTS: Final = 0x4000000
HELD: Final = 2.5
"""Seconds that the last frame is shown before it begins anew."""
FRAMES_A_SECOND: Final = 4
CTRL_C: Final = b"\x03"

# Who does what in the shop: a user that every Debian has, and a line for sh, done again and again.
WORKLOAD: Final = {
    "www-data": "date +%H:%M; sleep 0.7; cat orders.csv; gzip -kf orders.csv; sleep 1.2",
    "backup": "sleep 1.6; tar -cf shop.tar orders.csv; sha256sum shop.tar; sleep 1.4",
    "nobody": "wc -l orders.csv; sleep 1.5; sort -t, -k2 orders.csv; sleep 2.3",
}


class Picture(NamedTuple):
    """A command, and how it is shown."""

    command: str
    columns: int = 96
    lines: int = 24
    seconds: float = 8
    """When it is told to end, unless it has."""
    moves: bool = False
    draws: bool = False
    """Whether the command makes the picture itself, in a file of that name."""


PICTURES: Final = {
    "execve.svg": Picture("ebpfstream execve --cgroup /sys/fs/cgroup/shop", lines=26, seconds=5, moves=True),
    "top.svg": Picture("ebpfstream top --cgroup /sys/fs/cgroup/shop", lines=26, seconds=10, moves=True),
    "count.svg": Picture("ebpfstream count --cgroup /sys/fs/cgroup/shop", lines=12, seconds=12, moves=True),
    "doctor.svg": Picture("ebpfstream doctor", columns=84, lines=24, seconds=30),
    "bench.svg": Picture("ebpfstream bench buffers --quick --plot bench.svg", draws=True),
}


def enter_namespace() -> None:
    """Have a host's name, cgroup v2 where users have it, and a folder for the shop, which nobody else sees."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWUTS):
        sys.exit(f"no namespaces: {os.strerror(ctypes.get_errno())} (root is needed)")
    socket.sethostname("shop")
    run = subprocess.run
    run(["mount", "--make-rprivate", "/"], check=True)
    run(["mount", "-t", "cgroup2", "none", CGROUPS], check=True)
    run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/srv"], check=True)
    os.chdir("/srv")


@contextmanager
def shop() -> Iterator[None]:
    """The workload, while the block lasts."""
    SHOP.mkdir(exist_ok=True)
    workers = []
    for user, line in WORKLOAD.items():
        folder = Path(user)
        folder.mkdir(exist_ok=True)
        (folder / "orders.csv").write_text("".join(f"{n},{n * 7919 % 100}\n" for n in range(200)))
        folder.chmod(0o777)
        begin = f"echo $$ > {SHOP}/cgroup.procs; cd {folder}; exec setpriv --reuid={user} --clear-groups "
        command = begin + f"sh -c 'while :; do {line}; done'"
        workers.append(subprocess.Popen(["sh", "-c", command], stdout=subprocess.DEVNULL))
    try:
        time.sleep(0.5)
        yield
    finally:
        (SHOP / "cgroup.kill").write_text("1")
        for worker in workers:
            worker.wait()
        while (SHOP / "cgroup.procs").read_text():
            time.sleep(0.1)
        SHOP.rmdir()


def neutral(output: bytes) -> bytes:
    """Without what only this machine's kernel is called."""
    return re.sub(rb"(Linux \d+\.\d+\.\d+)-[\w.+-]+", rb"\1", output)


def drawn(name: str, picture: Picture) -> str:
    """What the command draws, with less digits, and without what is said of its making."""
    Path("matplotlibrc").write_text("svg.fonttype: none\n")
    words = [sys.executable, "-m", *picture.command.split()]
    subprocess.run(
        words, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"MATPLOTLIBRC": str(Path.cwd())}
    )
    text = neutral(Path(name).read_bytes()).decode()
    text = re.sub(r"(?s)<metadata>.*?</metadata>", f"<title>{picture.command}</title>", text)
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d)\d+", r"\1", tag[0]), text)
    return re.sub(r"\s*\n\s*", "\n", text)


def recorded(picture: Picture) -> list[tuple[float, Frame]]:
    """What the terminal shows, with the seconds at which it changed."""
    screen = pyte.Screen(picture.columns, picture.lines)
    stream = pyte.ByteStream(screen)
    shown: list[tuple[float, Frame]] = []
    pid, terminal = pty.fork()
    if pid == 0:
        size = struct.pack("HHHH", picture.lines, picture.columns, 0, 0)
        fcntl.ioctl(0, termios.TIOCSWINSZ, size)
        environment = {
            "PATH": os.environ["PATH"],
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "HOME": "/root",
        }
        os.execvpe(sys.executable, [sys.executable, "-m", *picture.command.split()], environment)  # noqa: S606
    begun = time.monotonic()
    due, told = 0.0, False
    with suppress(OSError):  # EIO: it has ended
        while True:
            now = time.monotonic() - begun
            if now >= picture.seconds and not told:
                os.write(terminal, CTRL_C)
                told = True
            if select.select([terminal], [], [], 0.05)[0]:
                stream.feed(neutral(os.read(terminal, 1 << 16)))
            if now >= due and not told:
                due = now + 1 / FRAMES_A_SECOND
                seen = frame(screen)
                if any(seen) and (not shown or seen != shown[-1][1]):
                    shown.append((now, seen))
    os.close(terminal)
    os.waitpid(pid, 0)
    if not told or not picture.moves:
        shown.append((time.monotonic() - begun, frame(screen)))
    return [(when - shown[0][0], seen) for when, seen in shown]


def main() -> None:
    """Make those named, or all."""
    names = sys.argv[1:] or list(PICTURES)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    enter_namespace()
    for name in names:
        picture = PICTURES[name]
        if picture.draws:
            text = drawn(name, picture)
        else:
            with shop():
                frames = recorded(picture)
            text = svg(picture.command, frames if picture.moves else frames[-1:], picture.seconds + HELD)
        (HERE / name).write_text(text)
        print(f"{name}: {len(text) >> 10} KiB")  # noqa: T201


if __name__ == "__main__":
    main()
