"""The service and a producer as processes, and what is known of them from outside: see service.py."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.kafka.process import Process

PATIENCE: Final = 120.0
"""Seconds after which something hangs."""
EVERY: Final = 2.0
"""Seconds between two looks at the metrics."""

_METRIC: Final = re.compile(r'^(\w+)(?:\{(?:cause="\w+",)?(?:sink="(\w+)",)?source="\w+"\})? (\S+)$', re.M)
_TIMES: Final = struct.Struct("<QQ")
_PRODUCER: Final = """
import os, signal, sys, time
path, token, rate, log = sys.argv[1:]
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
clock, step, number = time.monotonic_ns, 1e9 / float(rate), 0
with open(log, "wb") as file:
    start = clock()
    while going:
        begun = clock()
        status = os.waitpid(os.posix_spawn(path, ["true", token, str(number)], {}), 0)[1]
        assert not status, status
        file.write(begun.to_bytes(8, "little") + clock().to_bytes(8, "little"))
        number += 1
        time.sleep(max(start + number * step - clock(), 0) / 1e9)
"""


class BrokenError(Exception):
    """Something hangs, or has ended by itself: there is no going on."""


class Sample(NamedTuple):
    """How the service was at one moment."""

    time: float
    """By the monotonic clock."""
    metrics: dict[tuple[str, str], float]
    """By name, and name of the sink, or ""; those that differ by their cause are added up."""
    threads: int

    def of(self, name: str, sink: str = "") -> float:
        """A metric, without `ebpfstream_` before its name."""
        return self.metrics[name if name.startswith("process_") else f"ebpfstream_{name}", sink]

    @property
    def delivered(self) -> int:
        """Events that the stream has handed on."""
        return int(self.of("stream_delivered_events_total"))

    @property
    def lag(self) -> float:
        """Seconds that the oldest event has waited that is not in the topic."""
        return self.of("sink_lag_seconds", "kafka")

    @property
    def filtered(self) -> int:
        """Events that `where` left out."""
        return int(self.of("stream_filtered_events_total"))

    @property
    def rss(self) -> int:
        """KB."""
        return int(self.of("process_resident_memory_bytes")) >> 10

    @property
    def fds(self) -> int:
        """Open descriptors."""
        return int(self.of("process_open_fds"))

    @property
    def cpu(self) -> float:
        """Seconds so far."""
        return self.of("process_cpu_seconds_total")


@dataclass
class Life:
    """One process of the service.  Times are nanoseconds of the monotonic clock, 0 while they are not known."""

    number: int
    port: int
    log: Path
    began: int = 0
    ready: int = 0
    """When it was known to be attached."""
    signalled: int = 0
    ended: int = 0
    how: str = ""
    """The signal that ended it; "" if it ended by itself."""
    status: int | None = None
    samples: list[Sample] = field(default_factory=list)
    left_out: int = 0
    """Executions, known to us, that `where` left out."""
    broken: int = 0
    """How often it was given a configuration that is none."""
    _process: Process | None = field(default=None, repr=False)

    def start(self, configuration: Path) -> None:
        """Return when it forwards.  Raises BrokenError."""
        self.began = time.monotonic_ns()
        self._process = Process([sys.executable, "-m", "ebpfstream", "run", str(configuration)], self.log)
        self.until(lambda: self.said("forwarding"), "forwards")
        self.ready = time.monotonic_ns()

    def end(self, number: signal.Signals) -> None:
        """Send a signal, and return when it has ended.  Raises BrokenError."""
        assert self._process is not None
        self.look()
        self.signalled = time.monotonic_ns()
        self._process.send(number)
        ends_at = time.monotonic() + PATIENCE
        while not self._process.ended:
            if time.monotonic() > ends_at:
                raise BrokenError(f"life {self.number} goes on after {number.name}")
            time.sleep(0.01)
        self.how = number.name
        self._note_end()

    def abandon(self) -> None:
        """Kill it, if it is there."""
        if self._process is not None and not self.ended:
            self._process.end()
            self.ended = time.monotonic_ns()

    def _note_end(self) -> None:
        assert self._process is not None
        self.status = self._process.wait()
        self.ended = time.monotonic_ns()

    def hang_up(self) -> None:
        """Send SIGHUP, and return when it has done what it does then.  Raises BrokenError."""
        assert self._process is not None
        before = self.said("reloaded"), self.said(UNREADABLE)
        self._process.send(signal.SIGHUP)
        self.until(lambda: (self.said("reloaded"), self.said(UNREADABLE)) != before, "heeds SIGHUP")

    def until(self, condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
        """Wait, and look at the metrics meanwhile.  Raises BrokenError if it never is so, or the process ended."""
        assert self._process is not None
        ends_at = time.monotonic() + patience
        while not condition():
            if self._process.ended:
                raise BrokenError(f"life {self.number} ended by itself: {self.log.read_text()[-2000:]}")
            if time.monotonic() > ends_at:
                raise BrokenError(f"life {self.number}: after {patience:g} s it is not so: {what}")
            if self.ready and (not self.samples or time.monotonic() > self.samples[-1].time + EVERY):
                self.look()
            time.sleep(0.05)

    def pause(self, seconds: float) -> None:
        """Let it go on for so long.  Raises BrokenError."""
        ends_at = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= ends_at, "it runs", seconds + PATIENCE)

    def look(self) -> Sample:
        """Read the metrics, now.  Raises BrokenError."""
        assert self._process is not None
        status, text = self.get("/metrics")
        if status != http.HTTPStatus.OK:
            raise BrokenError(f"life {self.number}: /metrics: {status} {text}")
        metrics: dict[tuple[str, str], float] = {}
        for name, sink, value in _METRIC.findall(text):
            metrics[name, sink] = metrics.get((name, sink), 0) + float(value)
        threads = len(list(Path(f"/proc/{self._process.pid}/task").iterdir()))
        self.samples.append(Sample(time.monotonic(), metrics, threads))
        return self.samples[-1]

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of what the service answers.  Raises BrokenError."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise BrokenError(f"life {self.number}: {path}: {error!r}") from error
        finally:
            connection.close()

    @property
    def is_calm(self) -> bool:
        """Whether everything arrives within a second.  Takes a moment."""
        time.sleep(0.3)
        return self.get("/readyz")[0] == http.HTTPStatus.OK and self.look().lag < 1

    # --- what it logged

    def said(self, beginning: str) -> int:
        """How often it logged a message that begins so."""
        return self.log.read_text().count(f'"event": "{beginning}') if self.log.exists() else 0

    def entries(self) -> Iterator[dict[str, Any]]:
        """What it logged; a line that is no JSON is an entry of level "none"."""
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                yield {"level": "none", "event": line, "logger": "ebpfstream"}

    @property
    def ledger(self) -> dict[str, Any] | None:
        """The final one, if it ended in good order."""
        return next((entry["ledger"] for entry in self.entries() if "ledger" in entry), None)

    def sink(self, name: str) -> dict[str, Any]:
        """The ledger of a sink: the final one, or what the metrics said last."""
        if self.ledger is not None:
            return next(sink for sink in self.ledger["sinks"] if sink["name"] == name)
        counts = ("accepted", "recovered", "acknowledged", "dropped", "failed")
        if not self.samples:
            return dict.fromkeys((*counts, "spooled"), 0)
        last = self.samples[-1]
        found = {count: int(last.of(f"sink_{count}_events_total", name)) for count in counts}
        return {**found, "spooled": int(last.of("sink_spooled_events", name))}

    def of_stream(self, name: str, metric: str) -> int:
        """A figure of the stream: the final one, or what the metrics said last."""
        if self.ledger is not None:
            return int((self.ledger if name == "filtered" else self.ledger["stream"])[name] or 0)
        said = self.samples[-1].metrics if self.samples else {}
        return int(said.get((f"ebpfstream_stream_{metric}_total", ""), 0))


UNREADABLE: Final = "the configuration is not applied"


@dataclass(frozen=True)
class Executed:
    """When the producer executed each of its numbers, from 0: not before, and not after, on the monotonic clock."""

    times: bytes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return _TIMES.iter_unpack(self.times[: len(self.times) // _TIMES.size * _TIMES.size])

    def __len__(self) -> int:
        return len(self.times) // _TIMES.size

    @property
    def seconds(self) -> float:
        """From the first to the last."""
        begin, end = (
            _TIMES.unpack_from(self.times),
            _TIMES.unpack_from(self.times, (len(self) - 1) * _TIMES.size),
        )
        return float(end[1] - begin[0]) / 1e9


class Producer:
    """Executes a program at a steady rate, with a running number as its argument, in a process of its own."""

    def __init__(self, folder: Path, token: str, rate: float) -> None:
        self._times = folder / "executed"
        arguments = (str(program(folder, "numbered")), token, str(rate), str(self._times))
        self._process = Process(
            [sys.executable, "-I", "-S", "-c", _PRODUCER, *arguments], folder / "producer.log"
        )
        self._ended = False

    def stop(self) -> Executed:
        """What it has done.  Raises BrokenError if it ended before."""
        ended = self._process.ended
        self._process.send(signal.SIGTERM)
        status = self._process.wait()
        self._ended = True
        if ended or status:
            raise BrokenError(f"the producer ended by itself, with status {status}: see producer.log")
        return Executed(self._times.read_bytes())

    def abandon(self) -> Executed:
        """Kill it, if it is there; what it has noted."""
        if not self._ended:
            self._process.end()
        return Executed(self._times.read_bytes())


def program(folder: Path, name: str) -> Path:
    """One that does nothing and is called so."""
    path = folder / name
    if not path.is_symlink():
        path.symlink_to("/bin/true")
    return path


def execute(path: Path, *arguments: str, cpu: int) -> None:
    """Execute a program on one CPU, and wait for its end."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        os.waitpid(os.posix_spawn(path, ["true", *arguments], {}), 0)
    finally:
        os.sched_setaffinity(0, before)
