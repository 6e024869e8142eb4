"""The producer and the peers as processes, and what is measured of them from outside."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self


class Produced(NamedTuple):
    """What the producer did."""

    calls: int
    nanoseconds: int


class Consumed(NamedTuple):
    """What a peer has done so far; `lost` as far as it knows."""

    time: float
    events: float
    lost: int | None


class Producer:
    """producer.c, which calls getppid(2) on CPU 1."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [folder / "producer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._answer()

    def begin(self, how: str) -> None:
        """As producer.c says; returns at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{how}\n")
        self._process.stdin.flush()

    def end(self) -> Produced:
        """Wait for what was begun."""
        return Produced(*map(int, self._answer().split()))

    def run(self, how: str) -> Produced:
        """Both."""
        self.begin(how)
        return self.end()

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Running:
    """A peer, from its start.

    One that writes to `file` has consumed what is in there; others are asked, by the protocol of reporting.py.
    `events_of_perf`: bpftrace does not tell when it is ready, but then has so many descriptors of perf events.
    """

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], file: Path | None, events_of_perf: int = 0
    ) -> None:
        self._file = file
        self._asked = not events_of_perf
        start = time.perf_counter()
        with file.open("wb") if file and not self._asked else open(os.devnull, "wb") as output:  # noqa: PTH123
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE if self._asked else subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._asked else output,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        self.pid = self._process.pid
        try:
            if self._asked:
                self._read_until("ready")
            else:
                self._await_events(events_of_perf)
        except BaseException:
            self._process.kill()
            raise
        self.start = time.perf_counter() - start

    def consumed(self) -> Consumed:
        """So far."""
        told: dict[str, Any] = self._ask() if self._asked else {}
        if self._file is None:
            return Consumed(told["time"] / 1e9, told["consumed"], told["lost"])
        now, size = time.monotonic(), self._file.stat().st_size if self._file.exists() else 0
        return Consumed(now, size / self._bytes_per_event() if size else 0, told.get("lost"))

    def cpu(self) -> float:
        """Seconds of CPU time; unlike the others, this costs the peer nothing."""
        return time.clock_gettime(~self.pid << 3 | 2)  # CPUCLOCK_SCHED, include/linux/posix-timers.h

    def settled(self, most: float = 10) -> Consumed:
        """When nothing has come for a while, or after `most` seconds."""
        end, last = time.monotonic() + most, self.consumed()
        while time.monotonic() < end:
            time.sleep(0.25)
            now = self.consumed()
            if now.events == last.events:
                break
            last = now
        return last

    def switches(self) -> int:
        """How often its threads have been switched to."""
        return sum(
            int(line.split()[1])
            for task in Path(f"/proc/{self.pid}/task").iterdir()
            for line in (task / "status").read_text().splitlines()
            if "ctxt_switches" in line
        )

    def memory(self, which: str = "VmRSS") -> float:
        """MB resident; of VmHWM, the most so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition(f"{which}:")[2].split()[0]) / 1024

    def close(self) -> list[int]:
        """End it; the latencies that it noted, in nanoseconds."""
        latencies: list[int] = []
        try:
            if self._asked:
                assert self._process.stdin is not None
                self._process.stdin.close()
                latencies = json.loads(self._read_until('{"latencies"'))["latencies"]
        finally:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            if self._file is not None:
                self._file.unlink(missing_ok=True)
        return latencies

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.close()

    def _ask(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told: dict[str, Any] = json.loads(self._read_until('{"time"'))
        return told

    def _read_until(self, beginning: str) -> str:
        """BCC says other things on its standard output, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(beginning):
                return line
        raise RuntimeError(f"{self._process.args!r} has ended: try it by hand")

    def _await_events(self, count: int) -> None:
        descriptors = Path(f"/proc/{self.pid}/fd")
        end = time.monotonic() + 20
        while sum("perf_event" in target for target in _targets(descriptors)) < count:
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError(f"{self._process.args!r} did not attach: try it by hand")
            time.sleep(0.002)

    def _bytes_per_event(self) -> float:
        assert self._file is not None
        with self._file.open("rb") as file:
            beginning = file.read(1 << 16)
        whole = beginning[: beginning.rfind(b"\n") + 1]
        return len(whole) / max(whole.count(b"\n"), 1)


def _targets(folder: Path) -> Iterator[str]:
    for link in folder.iterdir():
        with suppress(FileNotFoundError):  # it has been closed meanwhile
            yield str(link.readlink())
