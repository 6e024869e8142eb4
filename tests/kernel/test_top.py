"""The live views, as a person at a terminal has them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.test_cli import COMMAND, true

pytestmark = pytest.mark.kernel

TOP = [*COMMAND, "top"]
COUNT = [*COMMAND, "count"]
HOME = "\x1b[H"
SGR = re.compile(r"\x1b\[[0-9;]*m")
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
LEDGER = re.compile(r"ebpfstream: \d+ delivered; \d+ tried = \d+ submitted \+ 0 lost.*\r\n")


class Seat:
    """A terminal, a program that it controls, and what that has shown so far."""

    def __init__(self, command: Sequence[str], columns: int, **environment: str) -> None:
        self._keyboard, terminal = pty.openpty()
        self.resize(columns, 24)
        self.before = termios.tcgetattr(self._keyboard)
        self.said = ""
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TERM": "xterm-256color"} | environment,
        )
        os.close(terminal)

    @property
    def mode(self) -> list[Any]:
        return termios.tcgetattr(self._keyboard)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def read(self) -> bool:
        """More of what it says; False at the end."""
        if not select.select([self._keyboard], [], [], 30)[0]:
            raise TimeoutError(self.said[-4000:])
        try:
            data = os.read(self._keyboard, 1 << 16)
        except OSError:  # nobody has the terminal any more
            return False
        self.said += data.decode(errors="replace")
        return True

    def picture(self) -> list[str]:
        """The last one that is whole."""
        pictures = self.said.split(HOME)
        return (
            [line.rstrip("\r") for line in SGR.sub("", pictures[-2]).split("\r\n\r")] if pictures[2:] else []
        )

    def until(self, *patterns: str) -> list[str]:
        """The first picture that has all of them."""
        deadline = time.monotonic() + 60
        while not all(re.search(pattern, "\n".join(self.picture())) for pattern in patterns):
            assert time.monotonic() < deadline, "\n".join(self.picture())
            assert self.read(), self.said
        return self.picture()

    def end(self, *, interrupted: int = 0) -> str:
        """What it says after the view, once it has ended; that was interrupted so many times."""
        while self.read():
            pass
        self.process.wait(timeout=30)
        view, left, after = self.said.rpartition(LEAVE)
        assert left
        assert view.startswith(ENTER)
        assert view.count(LEAVE) == view.count(ENTER) - 1 == interrupted
        return after

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._keyboard)


@contextmanager
def seated(command: Sequence[str], columns: int = 80, **environment: str) -> Iterator[Seat]:
    seat = Seat(command, columns, **environment)
    try:
        yield seat
    finally:
        seat.close()


def test_what_is_executed_is_shown_and_q_ends_it(tmp_path: Path) -> None:
    """Whatever it is called."""
    peculiar = tmp_path / "\x1b[31m[b]pecul"
    shutil.copy("/bin/true", peculiar)
    with seated([*TOP, "--ppid", str(os.getpid())]) as seat:
        seat.until(r"0:00:0\d {10,}")
        for _ in range(7):
            subprocess.run([peculiar], check=True)
        shown = seat.until(r"\\u001b\[31m\[b\]p… +\S+ +7 ")
        assert {len(line) for line in shown} == {80}
        assert len(shown) == 24
        assert shown[0].endswith("q quit   p pause   t order")
        assert re.fullmatch(r"lost     0 +", shown[2])
        seat.until(r"  root +\S+ +7\b")
        seat.press("q")
        assert LEDGER.match(seat.end())
        assert seat.process.returncode == 0
        assert seat.mode == seat.before


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_signal_leaves_the_terminal_as_it_was(how: str) -> None:
    with seated(TOP) as seat:
        seat.until(r"0:00:0\d {10,}")
        assert seat.mode != seat.before
        true()  # of nothing there is no ledger
        if how == "Ctrl-C":
            seat.press("\x03")
        else:
            seat.process.send_signal(signal.SIGTERM)
        assert LEDGER.match(seat.end())
        assert seat.process.returncode == -(signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
        assert seat.mode == seat.before


def test_another_size_is_used() -> None:
    with seated(TOP) as seat:
        seat.until(r"0:00:0\d {10,}")
        seat.resize(200, 30)
        deadline = time.monotonic() + 30
        while {len(line) for line in seat.picture()} != {200} or len(seat.picture()) != 30:
            assert time.monotonic() < deadline
            seat.read()
        seat.press("q")
        seat.end()
        assert seat.process.returncode == 0


def test_sinks_get_everything_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "execs.jsonl"
    with seated([*TOP, "--to", f"file:{file}", "--ppid", str(os.getpid())], NO_COLOR="1") as seat:
        seat.until("SINK", r"0:00:0\d {10,}")
        pids = [true("beside", str(number)) for number in range(5)]
        seat.until(r"file:\S+ +[0-9.]+ \S+ +(0|\S+ s) +5 +0 +0 +0", r"true +\S+ +5")
        seat.press("q")
        after = seat.end()
        assert f"ebpfstream: file:{file}: 5 of 5 events\r\n" in re.sub(r"\r\n +", " ", after)  # it is broken
        assert [json.loads(line)["pid"] for line in file.read_text().splitlines()] == pids
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]", seat.said)


def test_losses_are_shown_in_red() -> None:
    with seated([*TOP, "--buffer-size", "4KiB", "--ppid", str(os.getpid())]) as seat:
        seat.until(r"0:00:0\d {10,}")
        seat.process.send_signal(signal.SIGSTOP)
        for _ in range(5):
            true("x" * 3000)
        seat.process.send_signal(signal.SIGCONT)
        seat.until(r"lost     4\b.*   4 buffer full")
        assert "\x1b[31m4 buffer full" in seat.said
        seat.press("q")
        seat.end(interrupted=1)
        assert seat.mode == seat.before


def test_a_job_is_stopped_and_goes_on() -> None:
    """The shell has the terminal as it was meanwhile, even if the job goes on in the background."""
    with seated(["bash", "--norc", "-i"], PS1="$ ") as seat:
        seat.press(shlex.join(TOP) + "; echo status $((40 + $?))\n")
        seat.until(r"0:00:0\d {10,}")
        seat.press("\x1a")
        while not re.search(r"\[1\]\+ +Stopped", seat.said):
            assert seat.read()
        assert seat.said.count(LEAVE) == 1
        seat.press("bg; stty -a; echo ba''ck\n")
        while "back" not in seat.said:
            assert seat.read()
        assert re.search(r"\bicanon\b.*\becho\b", seat.said, re.DOTALL)
        shown = len(seat.said)
        time.sleep(1.5)
        assert ENTER not in seat.said[shown:]
        seat.press("fg\n")
        while ENTER not in seat.said[shown:]:
            assert seat.read()
        seat.until(r"0:00:\d\d {10,}")
        seat.press("q")
        while seat.said.count(LEAVE) < 2:
            assert seat.read()
        seat.press("exit\n")
        seat.process.wait(timeout=30)


def test_counts_are_a_table() -> None:
    with seated([*COUNT, "--every", "500ms", "--ppid", str(os.getpid())]) as seat:
        seat.until(r"0:00:0\d {10,}")
        for _ in range(7):
            true("counted")
        shown = seat.until(r"root +\d+ +\S+ +7 +0 ", r"1 user +\d+ +\S+ +7 ")
        assert {len(line) for line in shown} == {80}
        seat.until(r"root +0 +0 +7 +0 ")
        seat.press("q")
        seat.end()
        assert seat.process.returncode == 0
        assert seat.mode == seat.before
