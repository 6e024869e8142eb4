"""A run of the service: its broker, itself, its producer, and what is done to them; see service.py."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple, Self

from benchmarks.service_check import Evidence, Fault, read_files, read_topic
from benchmarks.service_lives import BrokenError, Executed, Life, Producer, Sample, execute, program
from tests.kafka import client
from tests.kafka.broker import Cluster, Listener
from tests.kafka.process import free_port

TOPIC: Final = "exec"
SLACK: Final = 3_000_000_000
"""Nanoseconds before a fault in which what was acknowledged last may not be known to be."""
PAUSE: Final = 3.0
"""Seconds between two things that are done, at least."""
OTHERS: Final = 20
"""Executions that filters or `where` are to leave out, each time."""


class Done(NamedTuple):
    """Something that was done."""

    seconds: float
    """After the beginning."""
    what: str
    life: int
    """During which it began."""
    took: float
    """Seconds until all arrived at once again."""

    def __str__(self) -> str:
        return (
            f"{self.seconds:8.1f} s  {self.what:<16} life {self.life:<3} all arrived after {self.took:5.1f} s"
        )


class Run:
    """The broker, the service, the producer, and what is done to them.  Entered, the broker runs."""

    def __init__(self, folder: Path, *, rate: float = 200, outage: float = 10, durable: bool = True) -> None:
        """`outage` is how many seconds the broker is gone; it stands still for twice as long."""
        self.folder = folder.resolve()
        self.lives: list[Life] = []
        self.done: list[Done] = []
        self.began = 0.0
        self.executed = Executed(b"")
        self._problems: list[str] = []
        self._faults: list[Fault] = []
        self._expected: set[str] = set()
        self._forbidden: set[str] = set()
        self._token = secrets.token_hex(4)
        self._rate = rate
        self._outage = outage
        self._durable = durable
        self._port = free_port()
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as exits:
            self._cluster = exits.enter_context(Cluster(self.folder / "kafka", listeners=[Listener.PLAIN]))
            client.create_topic(self._cluster.servers, TOPIC)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def go(self, plan: Iterator[tuple[float, str]], seconds: float) -> None:
        """Do all of a plan, things by their seconds from the beginning; then drain, and end the service."""
        self.began = time.monotonic()
        producer = None
        self._configure()
        try:
            self._start()
            producer = Producer(self.folder, self._token, self._rate)
            for at, what in plan:
                self.life.pause(max(self.began + at - time.monotonic(), PAUSE))
                self._do(what)
            self.life.pause(max(self.began + seconds - time.monotonic(), PAUSE))
            self.executed = producer.stop()
            self._settle()
            self.life.end(signal.SIGTERM)
        except BrokenError as error:
            self._problems.append(str(error))
        finally:
            for life in self.lives:
                life.abandon()
            if producer is not None and not self.executed:
                self.executed = producer.abandon()

    def evidence(self) -> Evidence:
        """What it left, to be looked at while the broker runs."""
        return Evidence(
            read_topic(self._cluster.servers, TOPIC),
            read_files(self._file),
            self.lives,
            self._faults,
            self.executed,
            self._token,
            self._expected,
            self._forbidden,
            self._problems,
        )

    @property
    def life(self) -> Life:
        """The last one."""
        return self.lives[-1]

    @property
    def steady(self) -> list[Sample]:
        """Of the last life, after the first outage of the broker: it fills a queue, which takes memory once."""
        outages = [
            fault.end for fault in self._faults if fault.name in OUTAGES and fault.begin > self.life.began
        ]
        return [sample for sample in self.life.samples if outages and sample.time * 1e9 > min(outages)]

    @property
    def _file(self) -> Path:
        return self.folder / "execs.jsonl"

    @property
    def _configuration(self) -> Path:
        return self.folder / "service.toml"

    def _configure(self, *, filters: str = "", where: str = "") -> None:
        """Write the configuration, whole at any moment."""
        spool = f"durable = true\nspool = {str(self.folder / 'spool')!r}" if self._durable else ""
        text = f"""\
[service]
listen = "127.0.0.1:{self._port}"
lock_folder = {str(self.folder / "lock")!r}
log_format = "json"
[[source]]
kind = "execve"
{where}
[source.filters]
{filters}
[[source.sink]]
address = "kafka://{self._cluster.servers}/{TOPIC}"
{spool}
[[source.sink]]
address = "file:{self._file}?rotate=10MB&keep=100000"
"""
        new = self._configuration.with_suffix(".new")
        new.write_text(text)
        new.replace(self._configuration)

    def _start(self) -> None:
        number = len(self.lives) + 1
        self.lives.append(Life(number, self._port, self.folder / f"life-{number}.log"))
        self.life.start(self._configuration)

    def _settle(self) -> None:
        self.life.until(lambda: self.life.is_calm, "all arrives within a second")

    def _do(self, what: str) -> None:
        began, life = time.monotonic(), self.life.number
        ACTIONS[what](self)
        self._settle()
        self.done.append(Done(began - self.began, what, life, time.monotonic() - began))
        print(self.done[-1], flush=True)

    @contextmanager
    def _fault(self, name: str) -> Iterator[None]:
        """Something after which events may come twice."""
        begin = time.monotonic_ns() - int(self.life.look().lag * 1e9) - SLACK
        try:
            yield
            self._settle()
        finally:
            self._faults.append(Fault(name, begin, time.monotonic_ns()))

    @contextmanager
    def _away(self) -> Iterator[None]:
        """The broker stands still."""
        self._cluster.pause()
        try:
            yield
        finally:
            self._cluster.resume()

    # --- what is done

    def kill_broker(self) -> None:
        """SIGKILL the broker, start it again."""
        with self._fault("kill-broker"):
            self._cluster.kill()
            try:
                self.life.pause(self._outage)
            finally:
                self._cluster.start()

    def pause_broker(self) -> None:
        """SIGSTOP it, and let it go on."""
        with self._fault("pause-broker"), self._away():
            self.life.pause(2 * self._outage)

    def terminate(self) -> None:
        """SIGTERM the service, start it again."""
        self.life.end(signal.SIGTERM)
        self._start()

    def terminate_away(self) -> None:
        """The same while the broker stands still: what has not arrived stays in the spool."""
        with self._fault("terminate-away"), self._away():
            self.life.pause(PAUSE)
            self.terminate()
            self.life.pause(PAUSE)

    def kill(self) -> None:
        """SIGKILL the service, start it again."""
        with self._fault("kill"):
            self.life.end(signal.SIGKILL)
            self._start()

    def kill_away(self) -> None:
        """The same while the broker stands still."""
        with self._fault("kill-away"), self._away():
            self.life.pause(PAUSE)
            self.life.end(signal.SIGKILL)
            self._start()
            self.life.pause(PAUSE)

    def rename(self) -> None:
        """Move its file away, as logrotate does."""
        self._file.rename(self._file.with_name(f"{self._file.name}.moved-{len(self.done)}"))
        self.life.hang_up()
        self.life.until(self._file.exists, "it goes on in a new file")

    def filter(self) -> None:
        """Let the kernel leave out all but the numbers, and again nothing."""
        self._reload(filters='comm = "numbered"')
        self._forbidden |= self._execute("filtered")
        self._reload()
        self._expected |= self._execute("unfiltered")

    def where(self) -> None:
        """Let `where` leave out what we execute, and again nothing."""
        self._reload(where=f"where = \"not ('{self._token}' in args and 'left-out' in args)\"")
        before = self.life.look().filtered
        self._forbidden |= self._execute("left-out")
        self.life.left_out += OTHERS
        self.life.until(lambda: self.life.look().filtered >= before + OTHERS, "where leaves out")
        self._reload()
        # On the same CPU: what was left out has a number of that CPU, and is known to be missing by the next one.
        self._expected |= self._execute("taken-in")

    def break_configuration(self) -> None:
        """Give it a configuration that is none, and the right one again."""
        self._configuration.write_text("[service")
        self.life.hang_up()
        self.life.broken += 1
        self._reload()

    def _reload(self, **changed: str) -> None:
        self._configure(**changed)
        self.life.hang_up()

    def _execute(self, name: str) -> set[str]:
        """Some executions beside those of the producer, all on one CPU; what they are told by."""
        marks = [f"{name}-{len(self.done)}-{number}" for number in range(OTHERS)]
        for mark in marks:
            execute(program(self.folder, "other"), self._token, mark, name, cpu=min(os.sched_getaffinity(0)))
        return set(marks)


ACTIONS: Final[dict[str, Callable[[Run], None]]] = {
    "kill-broker": Run.kill_broker,
    "pause-broker": Run.pause_broker,
    "terminate": Run.terminate,
    "terminate-away": Run.terminate_away,
    "kill": Run.kill,
    "kill-away": Run.kill_away,
    "rename": Run.rename,
    "filter": Run.filter,
    "where": Run.where,
    "break": Run.break_configuration,
}
OUTAGES: Final = ("kill-broker", "pause-broker")
RESTARTS: Final = ("terminate", "terminate-away", "kill", "kill-away")
