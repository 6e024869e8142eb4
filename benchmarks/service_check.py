"""What of the service's events has arrived, as another client and the files say; is it all? See service.py."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from benchmarks.service_lives import PATIENCE, UNREADABLE, Executed, Life
from ebpfstream.completeness import Completeness, Numbers, Received
from ebpfstream.lost import Lost
from ebpfstream.origin import Origin
from tests.kafka.client import Record

SKEW: Final = 50_000_000
"""Nanoseconds by which an event may be put into the buffer later than it was stamped, on a machine that is busy."""

Place = tuple[int, int]
"""CPU and program: sequence numbers are theirs."""


class Fault(NamedTuple):
    """Something after which events may come twice: those of this stretch of the monotonic clock, in nanoseconds.

    It begins with the oldest event that may not have been acknowledged, and ends when all arrive at once again.
    """

    name: str
    begin: int
    end: int


@dataclass
class Evidence:
    """All that a run left."""

    records: Iterable[Record]
    """The topic's."""
    files: Iterable[tuple[str, Iterable[bytes]]]
    """Their names and lines."""
    lives: list[Life]
    faults: list[Fault]
    executed: Executed
    token: str
    """What tells executions of this run from others."""
    expected: set[str]
    """Executions of ours, beside the producer's, that must have arrived."""
    forbidden: set[str]
    """Those that must not, since filters or `where` left them out."""
    problems: list[str]
    """What was found while it ran."""


@dataclass
class Found:
    """What has arrived of one life."""

    origins: list[Origin] = field(default_factory=list)
    received: Received = field(default_factory=Received)
    lines: int = 0
    """Of its events in the files."""
    in_files: dict[Place, Numbers] = field(default_factory=dict)
    unexplained: int = 0
    """Events that came twice, and no fault explains it."""
    last: int = 0
    """When the last event happened that is in the topic."""
    required: int = 0
    """Numbers of the producer that had to arrive."""
    absent: list[int] = field(default_factory=list)
    """Those of them that have not."""
    unaccepted: int = 0
    """Numbers that were executed before the SIGKILL, behind the last event that was accepted."""

    @property
    def missing(self) -> int:
        """Sequence numbers that are not in the topic, from 0 to each CPU's highest."""
        return sum(
            max(run.stop for run in numbers.ranges()) - numbers.count
            for numbers in self.received.numbers.values()
        )


def read_topic(servers: str, topic: str) -> Iterator[Record]:
    """All records by librdkafka; those of a partition in their order.  Raises KafkaException."""
    settings: dict[str, Any] = {
        "bootstrap.servers": servers,
        "group.id": "none",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "check.crcs": True,
        "auto.offset.reset": "error",
        "log_level": 0,
    }
    with Consumer(settings) as consumer:
        found = consumer.list_topics(topic, timeout=PATIENCE).topics[topic]
        unfinished = set(found.partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in unfinished])
        until = time.monotonic() + PATIENCE
        while unfinished:
            messages = consumer.consume(10_000, timeout=0.5)
            if messages:
                until = time.monotonic() + PATIENCE
            elif time.monotonic() > until:
                raise KafkaException(f"the end of {topic} {sorted(unfinished)} was not reached")
            for message in messages:
                if (error := message.error()) is None:
                    yield _record(message)
                elif error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001  # it is called so
                    unfinished.discard(message.partition() or 0)
                elif not error.retriable():
                    raise KafkaException(error)


def _record(message: Message) -> Record:
    headers: Any = message.headers() or ()
    partition, offset = message.partition(), message.offset()
    assert partition is not None
    assert offset is not None
    return Record(partition, offset, message.timestamp()[1], message.key(), message.value(), tuple(headers))


def read_files(path: Path) -> Iterator[tuple[str, Iterable[bytes]]]:
    """The file, and what it was rotated into, by whomever."""
    for one in sorted(path.parent.glob(f"{path.name}*")):
        with one.open("rb") as file:
            yield one.name, file


class Check:
    """Looks at all of it, once."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.found = [Found() for _ in evidence.lives]
        self.records = 0
        self._violations: Counter[str] = Counter()
        self._examples: dict[str, object] = {}
        self._begins = [life.began for life in evidence.lives]
        self._lives: dict[Origin, int] = {}
        self._completeness = Completeness()
        self._seen = bytearray(len(evidence.executed))
        self._marks: set[str] = set()
        for problem in evidence.problems:
            self._violate(problem)
        self._read_topic()
        self._read_files()
        self._compare_numbers()
        for life, found in zip(evidence.lives, self.found, strict=True):
            self._judge(life, found)
        self._judge_marks()

    @property
    def violations(self) -> list[str]:
        """What is not as it should be, a line for each kind."""
        return [
            what
            + (f" ({count} times" if count > 1 else " (once")
            + (f"; first: {self._examples[what]})" if what in self._examples else ")")
            for what, count in self._violations.items()
        ]

    def _violate(self, what: str, example: object = None) -> None:
        self._violations[what] += 1
        if example is not None:
            self._examples.setdefault(what, example)

    def _demand(self, right: bool, what: str) -> None:
        if not right:
            self._violate(what)

    def _life_at(self, moment: int) -> int | None:
        """The life during which something happened; there is one at a time."""
        number = bisect_right(self._begins, moment) - 1
        return number if number >= 0 and moment <= self.evidence.lives[number].ended else None

    # --- the topic

    def _read_topic(self) -> None:
        order: dict[tuple[Origin, int, Place], int] = {}
        times: dict[bytes | None, int] = {}
        partitions: dict[bytes | None, int] = {}
        for record in self.evidence.records:
            self.records += 1
            headers = dict(record.headers)
            origin = Origin(*(headers[name].decode() for name in Origin._fields))
            value = orjson.loads(record.value or b"")
            if headers["schema"] == b"lost":
                self._completeness.tell(origin, _lost(value["lost"]))
                continue
            cpu, program, number = map(int, headers["sequence"].split(b"/"))
            name, moment = f"{origin.stream} {cpu}/{program}/{number}", value["monotonic"]
            if (cpu, program, number) != (value["cpu"], value["program"], value["sequence"]):
                self._violate("headers and value tell of different events", name)
            if partitions.setdefault(record.key, record.partition) != record.partition:
                self._violate("a key in two partitions", record.key)
            found = self._of(origin, moment, name)
            if not self._completeness.add(origin, cpu, program, number):
                if not any(fault.begin <= moment <= fault.end for fault in self.evidence.faults):
                    found.unexplained += 1
                continue
            # As they came first, events are in order.
            place = origin, record.partition, (cpu, program)
            if number <= order.get(place, -1):
                self._violate("out of order in a partition", f"{name} after {order[place]}")
            if moment <= times.get(record.key, -1):
                self._violate("out of order for a key", f"{name}, {record.key!r}")
            order[place] = max(number, order.get(place, -1))
            times[record.key] = max(moment, times.get(record.key, -1))
            found.last = max(found.last, moment)
            if self.evidence.token in value["args"][1:2]:
                self._note(value["comm"], value["args"][2])
        for origin, received in self._completeness.items():
            if origin in self._lives:
                self.found[self._lives[origin]].received.update(received)

    def _of(self, origin: Origin, moment: int, name: str) -> Found:
        life = self._life_at(moment)
        if life is None:
            self._violate("an event of a time in which there was no service", name)
            return Found()
        if origin not in self._lives:
            self._lives[origin] = life
            self.found[life].origins.append(origin)
        elif self._lives[origin] != life:
            self._violate("a stream that has events of two lives", name)
        return self.found[life]

    def _note(self, comm: str, name: str) -> None:
        """An execution of ours."""
        if comm != "numbered":
            self._marks.add(name)
        elif int(name) >= len(self._seen):
            self._violate("a number that was never executed", name)
        elif self._seen[int(name)]:
            self._violate("one execution under two sequence numbers", name)
        else:
            self._seen[int(name)] = 1

    # --- the files

    def _read_files(self) -> None:
        for name, lines in self.evidence.files:
            order: dict[tuple[int, Place], int] = {}
            for at, line in enumerate(lines, 1):
                event = _event(line)
                if event is None:
                    self._violate("a line in a file that is no whole JSON object", f"{name}:{at}")
                elif "lost" not in event:
                    self._note_line(event, f"{name}:{at}", order)

    def _note_line(self, event: dict[str, Any], where: str, order: dict[tuple[int, Place], int]) -> None:
        life = self._life_at(event["monotonic"])
        if life is None:
            self._violate("an event of a time in which there was no service", where)
            return
        found, place, number = self.found[life], (event["cpu"], event["program"]), event["sequence"]
        found.lines += 1
        if not found.in_files.setdefault(place, Numbers()).add(number):
            self._violate("an event twice in the files", where)
        if number <= order.get((life, place), -1):
            self._violate("out of order in a file", where)
        order[life, place] = number

    # --- the producer

    def _compare_numbers(self) -> None:
        lives = self.evidence.lives
        for number, (before, after) in enumerate(self.evidence.executed):
            life = self._life_at(before)
            if life is None or not lives[life].ready or before < lives[life].ready:
                continue
            found = self.found[life]
            if after > (lives[life].signalled or lives[life].ended):
                continue
            if lives[life].how != "SIGTERM" and after > found.last - SKEW:
                found.unaccepted += not self._seen[number]
                continue
            found.required += 1
            if not self._seen[number]:
                found.absent.append(number)

    def _judge_marks(self) -> None:
        for mark in sorted(self.evidence.expected - self._marks):
            self._violate("an execution that had to arrive, and has not", mark)
        for mark in sorted(self.evidence.forbidden & self._marks):
            self._violate("an execution that was to be left out, and has arrived", mark)

    # --- the lives

    def _judge(self, life: Life, found: Found) -> None:
        kafka, file, who = life.sink("kafka"), life.sink("file"), f"life {life.number}"
        lost = max(life.of_stream("lost", "lost_events"), found.received.told)
        filtered = life.of_stream("filtered", "filtered_events")
        excused = lost + life.of_stream("misses", "missed_runs")
        self._demand(len(found.origins) <= 1, f"{who}: events of {len(found.origins)} streams")
        self._demand(filtered == life.left_out, f"{who}: where left out {filtered}, not {life.left_out}")
        self._demand(
            found.missing <= filtered + lost if lost else found.missing == filtered,
            f"{who}: {found.missing} sequence numbers are missing; {filtered} left out by where, {lost} told as lost",
        )
        self._demand(
            len(found.absent) <= excused,
            f"{who}: of {found.required} numbers that were executed while it was attached {len(found.absent)} have not "
            f"arrived, the first is {found.absent[:1]}; {excused} told as lost",
        )
        self._demand(
            not found.unexplained, f"{who}: {found.unexplained} events came twice, and no fault explains it"
        )
        for sink in (kafka, file):
            gone = {name: sink[name] for name in ("dropped", "failed") if sink[name]}
            self._demand(not gone, f"{who}: given up: {gone}")
        broken = life.said(UNREADABLE)
        self._demand(broken == life.broken, f"{who}: {broken} configurations were refused, not {life.broken}")
        for entry in life.entries():
            if entry["level"] in ("error", "critical", "none") and entry["logger"].startswith("ebpfstream"):
                self._demand(entry["event"].startswith(UNREADABLE), f"{who} logged: {entry['event'][:300]}")
        if life.how == "SIGTERM":
            self._judge_ended(life, found, kafka, file)
        else:
            events, lines = found.received.events, found.lines
            accepted, acknowledged = kafka["accepted"], file["acknowledged"]
            self._demand(events >= accepted, f"{who}: {accepted} were accepted, {events} are in the topic")
            self._demand(
                lines >= acknowledged, f"{who}: {acknowledged} were acknowledged, {lines} are in files"
            )

    def _judge_ended(self, life: Life, found: Found, kafka: dict[str, Any], file: dict[str, Any]) -> None:
        who, ledger = f"life {life.number}", life.ledger
        self._demand(life.status == 0, f"{who}: exit status {life.status}")
        if ledger is None:
            self._violate(f"{who}: it logged no final ledger")
            return
        stream = ledger["stream"]
        self._demand(
            stream["tried"] == stream["submitted"] + stream["lost"] + stream["skipped"]
            and stream["submitted"] == stream["received"] == stream["delivered"] + stream["undecodable"]
            and not stream["undecodable"],
            f"{who}: the stream's ledger does not balance: {stream}",
        )
        for sink in (kafka, file):
            self._demand(
                sink["accepted"] + sink["recovered"] == sink["acknowledged"] + sink["spooled"]
                and sink["accepted"] + ledger["filtered"] == stream["delivered"],
                f"{who}: a sink's ledger does not balance: {sink}",
            )
        events, lives = found.received.events, self.evidence.lives
        self._demand(
            events == kafka["accepted"],
            f"{who}: {kafka['accepted']} were accepted, {events} are in the topic",
        )
        self._demand(
            found.lines == file["acknowledged"],
            f"{who}: {file['acknowledged']} were acknowledged, {found.lines} are in files",
        )
        self._demand(
            found.in_files == found.received.numbers,
            f"{who}: files and topic do not hold the same events",
        )
        after = lives[life.number].sink("kafka")["recovered"] if life.number < len(lives) else 0
        self._demand(
            after == kafka["spooled"],
            f"{who}: {kafka['spooled']} were in its spool, the next life found {after}",
        )


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = orjson.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def _lost(told: dict[str, Any]) -> Lost:
    when = told.get("time")
    return Lost(
        told["cpu"],
        told["count"],
        told.get("first_sequence"),
        told.get("last_sequence"),
        datetime.fromisoformat(when) if when else None,
    )
