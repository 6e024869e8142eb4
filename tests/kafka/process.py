"""Processes that do not outlive this one, and the ports that they listen at."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_PORTS: Final = range(20_000, 32_768)  # below those that the kernel gives to whoever connects
_given: set[int] = set()


class Process:
    """A process that is killed when this one is gone, however that ends; its output goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        # A session of its own: Ctrl-C in the terminal is not for it.
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        # Its pipe ends with this process.  PR_SET_PDEATHSIG would kill when the thread has ended that
        # started it, and event loops let such threads end.
        self._guard = subprocess.Popen(
            ["sh", "-c", 'read _; kill -KILL "$0"', str(self.pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """Let it end by itself; returns its exit code."""
        code = self._process.wait()
        self.end()
        return code

    def end(self, patience: float = 0) -> None:
        """Kill it, unless it ends by itself before its time is up."""
        if patience:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._guard.kill()  # before its process's number can be another's
        self._guard.communicate()
        self._process.kill()
        self._process.wait()


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def free_port() -> int:
    """One that nobody listens at, nobody was given before, and nobody gets by connecting while a node is away."""
    while (port := random.choice(_PORTS)) in _given or not is_free(port):
        pass
    _given.add(port)
    return port


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether one can listen there; port 0: at any port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
