"""What docs/guides/analysis.md shows, as it stands there: ClickHouse and Flink read a topic of real events.

Of twelve events that a stream shipped two are left out, of one of which the topic tells that it was lost, and three
come twice; so the results are known to the row.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import anyio
import pytest
from confluent_kafka import Producer

from ebpfstream import ExecEvent, KafkaSink, Lost, forward, trace_execve
from ebpfstream.origin import Origin
from ebpfstream.testing import make_batch
from tests.kafka import client, jars
from tests.kafka.analysis import clickhouse, flink
from tests.kafka.analysis.clickhouse import ClickHouse
from tests.kafka.analysis.flink import Flink
from tests.kafka.broker import Cluster, Listener
from tests.test_docs import BROKER, FENCE, ROOT

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.kernel,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"{name} is missing: `make test` installs it"
        )
        for name in (clickhouse.PACKAGE, flink.BRIDGE)
    ),
]

PAGE: Final = ROOT / "docs/guides/analysis.md"
SHOWN: Final = {title: text for _, shown, title, text in FENCE.findall(PAGE.read_text()) if shown == "sql"}
USERS: Final = {0: 7, 65534: 5}
COUNT: Final = sum(USERS.values())
DOUBLES: Final = 3
LATER: Final = "exec-event/2"
ORIGIN: Final = ("host", "boot", "stream")
WAIT: Final = 60.0

Record = client.Record


@dataclass
class Topic:
    """A topic `exec`, and what is in it."""

    servers: str
    events: dict[tuple[int, int, int], dict[str, Any]]
    """By CPU, program and number; each once."""
    headers: dict[str, str]
    """Of all of them, beside `sequence`; and `schema` but for the last one's."""
    missing: list[dict[str, Any]]
    """The first of them was told as lost."""
    loss: Lost
    doubles: list[Record]
    doubled: bool = False

    def double(self) -> None:
        """Let three events and the loss come another time."""
        if not self.doubled:
            everything = client.read_all(self.servers, "exec")
            losses = [record for record in everything if dict(record.headers)["schema"] == b"lost"]
            produce(self.servers, [*self.doubles, *losses])
            self.doubled = True

    def statements(self, title: str) -> list[str]:
        """What the page shows by this name, for this broker."""
        text = SHOWN[title].replace(BROKER, self.servers)
        return [statement for part in text.split(";") if (statement := part.strip())]


@pytest.fixture(scope="module")
def topic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topic]:
    """Of a broker of its own, for the page has a name for it; the doubles are not in it yet."""
    with Cluster(tmp_path_factory.mktemp("kafka"), listeners=[Listener.PLAIN]) as cluster:
        for name in ("shipped", "exec"):
            client.create_topic(cluster.servers, name)
        anyio.run(ship, cluster.servers)
        records = client.read_all(cluster.servers, "shipped")
        assert len(records) == COUNT
        yield fill(cluster.servers, records)


async def ship(servers: str) -> None:
    """Real events, by the real sink; each user's on one CPU."""
    sink = KafkaSink(servers, "shipped")
    async with trace_execve(ppid=os.getpid()) as events:
        allowed = os.sched_getaffinity(0)
        for (user, count), cpu in zip(USERS.items(), (min(allowed), max(allowed)), strict=True):
            os.sched_setaffinity(0, {cpu})
            for number in range(count):
                subprocess.run(["/bin/true", "documented", str(number)], user=user, check=True)
        os.sched_setaffinity(0, allowed)
        events.detach()
        ledgers = await forward(events, sink)
    assert ledgers.sinks[0].acknowledged == COUNT


def fill(servers: str, records: list[Record]) -> Topic:
    """All but two within their sequence, a loss, and one of a later version that has a field more."""
    numbered = {number(record): record for record in records}
    (cpu, program, last) = max(numbered, key=lambda key: key[2])
    assert last + 1 >= USERS[0]
    gone = [numbered.pop((cpu, program, place)) for place in (1, 3)]
    headers = {name: value.decode() for name, value in records[0].headers if name != "sequence"}
    later = event(numbered[cpu, program, last]) | {"sequence": last + 1, "planet": "earth"}
    produce(servers, [*numbered.values()])
    changed = {"schema": LATER, "sequence": f"{cpu}/{program}/{last + 1}"}
    original = numbered[cpu, program, last]
    produce(
        servers,
        [
            original._replace(
                value=json.dumps(later).encode(),
                headers=tuple((name, changed.get(name, value)) for name, value in original.headers),  # type: ignore[misc]
            )
        ],
    )
    loss = Lost(cpu, 1, 1, 1, datetime.now(UTC))
    anyio.run(tell, servers, loss, Origin(headers["host"], headers["boot"], headers["stream"]))
    events = {key: event(record) for key, record in numbered.items()}
    events[cpu, program, last + 1] = later
    doubles = [*numbered.values()][:DOUBLES]
    return Topic(servers, events, headers, [event(record) for record in gone], loss, doubles)


async def tell(servers: str, loss: Lost, origin: Origin) -> None:
    batch = make_batch([], lost=[loss], type=ExecEvent)
    batch.origin = origin
    async with KafkaSink(servers, "exec") as sink:
        arrived = await sink.send(batch)
        assert arrived is not None
        await arrived


def produce(servers: str, records: list[Record]) -> None:
    """Let them be in the topic as they were in the other one."""
    with Producer({"bootstrap.servers": servers}) as producer:
        for record in records:
            producer.produce(
                "exec",
                record.value,
                record.key,
                record.partition,
                timestamp=record.timestamp,
                headers=list(record.headers),
            )
        assert producer.flush(WAIT) == 0


def event(record: Record) -> dict[str, Any]:
    assert record.value is not None
    decoded: dict[str, Any] = json.loads(record.value)
    return decoded


def number(record: Record) -> tuple[int, int, int]:
    cpu, program, sequence = dict(record.headers)["sequence"].split(b"/")
    return int(cpu), int(program), int(sequence)


def per_minute(topic: Topic) -> Counter[tuple[str, int]]:
    """How many events there are by minute and user."""
    return Counter((one["time"][:16], one["uid"]) for one in topic.events.values())


@pytest.fixture(scope="module")
def database(topic: Topic, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    """It has read everything, and then the doubles."""
    with ClickHouse(tmp_path_factory.mktemp("clickhouse")) as database:
        for statement in topic.statements("clickhouse.sql"):
            assert database.run(statement) == []
        for table in ("execs", "losses"):  # so that doubles stay what they are
            database.run(f"SYSTEM STOP MERGES {table}")
        assert len(topic.events) == COUNT - 2 + 1
        holds(database, "execs", len(topic.events))
        holds(database, "losses", 1)
        topic.double()
        holds(database, "execs", len(topic.events) + DOUBLES)
        holds(database, "losses", 2)
        yield database


def holds(database: ClickHouse, table: str, count: int) -> None:
    """Wait until a table has so many rows, doubles included."""
    database.wait(f"SELECT count() AS count FROM {table}", lambda rows: rows[0]["count"] >= count)
    assert database.run(f"SELECT count() AS count FROM {table}") == [{"count": count}]


def test_every_row(topic: Topic, database: ClickHouse) -> None:
    rows = database.run("SELECT * FROM execs FINAL ORDER BY cpu, program, sequence")
    assert [row.pop("schema") for row in rows].count(LATER) == 1
    for row, expected in zip(rows, (topic.events[key] for key in sorted(topic.events)), strict=True):
        assert [row.pop(name) for name in ORIGIN] == [topic.headers[name] for name in ORIGIN]
        row["time"] = row["time"].replace(" ", "T") + "Z"
        assert len(row) == 15
        assert row == {name: expected[name] for name in row}
    loss = topic.loss
    assert loss.time is not None
    (row,) = database.run("SELECT * FROM losses FINAL")
    assert row == {
        **{name: topic.headers[name] for name in ORIGIN},
        "cpu": loss.cpu,
        "count": 1,
        "first_sequence": 1,
        "last_sequence": 1,
        "time": f"{loss.time:%Y-%m-%d %H:%M:%S.%f}",
    }


def test_queries(topic: Topic, database: ClickHouse) -> None:
    def rows(title: str) -> list[dict[str, Any]]:
        (query,) = topic.statements(title)
        return database.run(query)

    host, stream = topic.headers["host"], topic.headers["stream"]
    assert rows("per-minute.sql") == [
        {"minute": f"{minute.replace('T', ' ')}:00", "host": host, "uid": uid, "execs": count}
        for (minute, uid), count in sorted(per_minute(topic).items())
    ]
    counted = {"events": len(topic.events), "missing": 2, "told": 1, "unexplained": 1}
    assert rows("streams.sql") == [{"host": host, "stream": stream, **counted}]
    gaps = [
        (gap["cpu"], gap["program"], gap["first_missing"], gap["last_missing"], gap["missing"])
        for gap in rows("gaps.sql")
    ]
    assert gaps == [
        (one["cpu"], one["program"], one["sequence"], one["sequence"], 1) for one in topic.missing
    ]
    assert [(row["schema"], row["events"]) for row in rows("versions.sql")] == [
        (topic.headers["schema"], len(topic.events) - 1),
        (LATER, 1),
    ]


def test_flink(topic: Topic, tmp_path: Path) -> None:
    topic.double()
    with Flink(tmp_path) as session:
        for statement in topic.statements("flink.sql"):
            session.run(statement)
        # The one thing that the page does not say: there is an end to it.
        session.run("ALTER TABLE exec_topic SET ('scan.bounded.mode' = 'latest-offset')")
        (query,) = topic.statements("flink-per-minute.sql")
        assert sorted(session.run(query)) == [
            ("+I", minute, topic.headers["host"], uid, count)
            for (minute, uid), count in sorted(per_minute(topic).items())
        ]
        names = ["pid", "ppid", "uid", "comm", "message", "cwd", "parent_comm"]
        names += ["retval", "cpu", "program", "sequence", "weight"]
        rows = session.run(f"SELECT {', '.join(names)}, CARDINALITY(args) FROM execs")
        assert sorted(rows) == sorted(
            ("+I", *(one[name] for name in names), len(one["args"])) for one in topic.events.values()
        )


def test_versions(database: ClickHouse) -> None:
    """The page names those that it is checked with."""
    (row,) = database.run("SELECT version() AS version")
    shown = PAGE.read_text()
    assert f"| Flink {flink.version()} (" in shown
    assert f"Apache Kafka {jars.version()} " in shown
    assert f"| ClickHouse {row['version'].rsplit('.', 1)[0]} |" in shown
