"""Whatever becomes of brokers, topics, connections and ourselves while events flow: what was accepted arrives.

After each fault another client than ours finds every event that was accepted, none that was not sent, and each
process's in order.  Events come twice where a producer could not learn what had become of its last batch: after our own
death, after an end while the broker was away, and after an outage so long that a new producer had to take over.  Then
the same records come again, in the same order: as they came first, they are in order all the same.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio
import click
import pytest
from anyio.to_thread import run_sync

from ebpfstream.sinks.kafka import KafkaSink
from tests.kafka import client, jars
from tests.kafka.broker import Cluster, Listener
from tests.kafka.flow import Flow, check, remains, until
from tests.kafka.process import free_port

pytestmark = pytest.mark.kafka

TOPIC: Final = "events"
DEADLINE: Final = 5.0


class Ground:
    """What a fault has for itself."""

    def __init__(self, folder: Path, broker: Cluster) -> None:
        self.folder = folder
        self.broker = broker
        """Shared: not to be hurt."""

    @asynccontextmanager
    async def cluster(self, nodes: int = 1) -> AsyncIterator[Cluster]:
        """Brokers that may be hurt, with a topic."""
        cluster = Cluster(self.folder / "kafka", nodes, listeners=[Listener.PLAIN])
        await run_sync(cluster.start)
        try:
            await create(cluster, TOPIC, replication=nodes)
            yield cluster
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(cluster.close)

    def sink(self, servers: str, topic: str = TOPIC, **options: Any) -> KafkaSink:
        """One that soon has to spill."""
        given: dict[str, Any] = {
            "when_full": "spill",
            "spool": str(self.folder / topic),
            "queue_size": 16 << 10,
        } | options
        return KafkaSink(servers, topic, in_flight=128 << 10, **given)


async def create(cluster: Cluster, topic: str, **options: Any) -> None:
    await run_sync(partial(client.create_topic, cluster.servers, topic, **options))


async def found(cluster: Cluster, topic: str = TOPIC) -> list[client.Record]:
    return await run_sync(client.read_all, cluster.servers, topic)


# --- the faults


async def killed(ground: Ground) -> None:
    """By SIGKILL, for 10 s.  The producer stays the same, and so nothing comes twice."""
    async with ground.cluster() as cluster:
        async with Flow(ground.sink(cluster.servers)) as flow:
            flow.start()
            await flow.more(1000)
            await run_sync(cluster.kill)
            await anyio.sleep(10)
            assert flow.statistics.spooled > 5000
            await run_sync(cluster.start)
            await flow.more(20_000)
            await flow.arrived()
        assert check(await found(cluster), range(flow.next)) == 0


async def paused(ground: Ground) -> None:
    """By SIGSTOP, for 20 s: connections stay, and requests time out.  Nothing comes twice."""
    async with ground.cluster() as cluster:
        async with Flow(ground.sink(cluster.servers)) as flow:
            flow.start()
            await flow.more(1000)
            cluster.pause()
            await anyio.sleep(20)
            assert flow.statistics.spooled > 10_000
            cluster.resume()
            await flow.more(30_000)
            await flow.arrived()
        assert check(await found(cluster), range(flow.next)) == 0


async def leader_moved(ground: Ground) -> None:
    """To another of three nodes, by SIGKILL; back to the first; and by its orderly end."""
    async with ground.cluster(nodes=3) as cluster:
        async with Flow(ground.sink(cluster.servers)) as flow:
            flow.start()
            await flow.more(1000)
            first = await run_sync(client.leader, cluster.servers, TOPIC)
            await run_sync(cluster.kill, first)
            await flow.more(10_000)
            assert await run_sync(client.leader, cluster.servers, TOPIC) not in (first, -1)
            await run_sync(cluster.restart, first)
            await run_sync(client.elect_preferred_leaders, cluster.servers, TOPIC)
            await flow.more(5000)
            assert await run_sync(client.leader, cluster.servers, TOPIC) == first
            await run_sync(cluster.stop, first)
            await flow.more(10_000)
            await flow.arrived()
        assert check(await found(cluster), range(flow.next)) == 0


async def connections_cut(ground: Ground) -> None:
    """In the middle of responses: what was asked for has been done, and we cannot know.  Nothing comes twice."""
    (proxy,) = ground.broker.proxies.values()
    topic = f"cut-{secrets.token_hex(4)}"
    await create(ground.broker, topic)
    async with Flow(ground.sink(ground.broker.servers_at(Listener.PROXIED), topic)) as flow:
        flow.start()
        await flow.more(1000)
        for after in (0, 1, 3, 4, 10, 30, 50, 0, 20, 2):
            await until(proxy.cut_response(after).is_set)
            await flow.more(1000)
        await flow.arrived()
    assert check(await found(ground.broker, topic), range(flow.next)) == 0


async def topic_deleted(ground: Ground) -> None:
    """And created again, with fewer partitions.

    What had arrived is gone with it; the rest arrives, all of it where it belongs now.
    """
    topic = f"deleted-{secrets.token_hex(4)}"
    await create(ground.broker, topic)
    async with Flow(ground.sink(ground.broker.servers, topic, request_timeout=2)) as flow:
        flow.start()
        for partitions in (3, 2):
            await flow.more(1000)
            await run_sync(client.delete_topic, ground.broker.servers, topic)
            await anyio.sleep(5)
            gone = flow.statistics.acknowledged
            await create(ground.broker, topic, partitions=partitions)
            await flow.more(10_000)
        await flow.arrived()
    check(await found(ground.broker, topic), range(gone, flow.next))


async def started_before(ground: Ground) -> None:
    """We are, when there is no broker yet."""
    cluster = Cluster(ground.folder / "kafka", listeners=[Listener.PLAIN])
    async with Flow(ground.sink(cluster.servers)) as flow:
        flow.start()
        await until(lambda: flow.statistics.spooled > 10_000)
        assert flow.statistics.acknowledged == 0
        try:
            await run_sync(cluster.start)
            await create(cluster, TOPIC)
            await flow.more(20_000)
            await flow.arrived()
            assert check(await found(cluster), range(flow.next)) == 0
        finally:
            await run_sync(cluster.close)


async def ended_while_away(ground: Ground) -> None:
    """Killed, or silent.  With a spool the next life delivers the rest; without, it is counted as dropped."""
    async with ground.cluster() as cluster:
        await end_while(cluster, ground, cluster.kill, cluster.start, "killed")
        await end_while(cluster, ground, cluster.pause, cluster.resume, "paused")


async def end_while(
    cluster: Cluster, ground: Ground, away: Callable[[], None], back: Callable[[], None], name: str
) -> None:
    spilling, blocking = f"{name}-spilling", f"{name}-blocking"
    await create(cluster, spilling)
    await create(cluster, blocking)
    block = {"when_full": "block", "spool": None, "queue_size": 1 << 10}
    async with (
        Flow(ground.sink(cluster.servers, spilling), deadline=DEADLINE) as spilt,
        Flow(ground.sink(cluster.servers, blocking, **block), deadline=DEADLINE) as blocked,
    ):
        for flow in (spilt, blocked):
            flow.start()
            await flow.more(1000)
        await run_sync(away)
        await until(lambda: spilt.statistics.spooled > 3000)
    kept, dropped = spilt.statistics, blocked.statistics
    assert (kept.dropped, kept.spooled) == (0, kept.accepted - kept.acknowledged)
    assert (dropped.dropped, dropped.spooled) == (dropped.accepted - dropped.acknowledged, 0)
    assert dropped.dropped > 0
    await run_sync(back)
    async with Flow(ground.sink(cluster.servers, spilling), first=kept.accepted) as flow:
        flow.start()
        await flow.more(1000)
        await flow.arrived()
    assert flow.statistics.recovered == kept.spooled
    check(await found(cluster, spilling), range(flow.next))
    records = await found(cluster, blocking)
    check(records, range(max(len({record.value for record in records}), dropped.acknowledged)))


async def we_are_killed(ground: Ground) -> None:
    """By SIGKILL, several times, with durable=True; also when nothing can arrive.

    What had arrived, and the disk did not know that yet, comes again.
    """
    topic, spool = f"durable-{secrets.token_hex(4)}", ground.folder / "durable"
    await create(ground.broker, topic)
    servers, nowhere = ground.broker.servers, f"127.0.0.1:{free_port()}"
    accepted = {}
    for life, where in enumerate((servers, nowhere, servers, nowhere)):
        first = life * LIFE
        accepted[first] = await run_sync(killed_life, where, topic, spool, first, where == servers)
    async with Flow(durable_sink(servers, topic, spool), first=4 * LIFE) as flow:
        flow.start()
        await flow.more(10_000)
        await flow.arrived()
        assert flow.statistics.recovered > 3000
    accepted[flow.first] = flow.next - flow.first
    records = await found(ground.broker, topic)
    numbers = {json.loads(record.value or b"")["number"] for record in records}
    expected = set[int]()
    for first, count in accepted.items():  # what was accepted after it was said last is there as well
        expected |= set(
            range(first, first + max(count, sum(first <= number < first + LIFE for number in numbers)))
        )
    check(records, expected)


LIFE: Final = 1_000_000  # numbers of events


def durable_sink(servers: str, topic: str, spool: Path | str) -> KafkaSink:
    return KafkaSink(servers, topic, durable=True, spool=str(spool), in_flight=64 << 10)


def killed_life(servers: str, topic: str, spool: Path, first: int, is_broker_there: bool) -> int:
    """Let a process live, for some thousand events, and not end; how many it had accepted."""
    script = "import sys; from tests.kafka.test_faults import live; live(*sys.argv[1:])"
    command = [sys.executable, "-c", script, servers, topic, str(spool), str(first)]
    with subprocess.Popen(command, cwd=jars.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        accepted = acknowledged = 0
        try:
            while acknowledged < 3000 * is_broker_there or accepted < 3000:
                accepted, acknowledged = map(int, process.stdout.readline().split())
        finally:
            process.kill()
        for line in process.stdout:
            if line.endswith("\n"):
                accepted, acknowledged = map(int, line.split())
        return accepted


def live(servers: str, topic: str, spool: str, first: str) -> None:
    """Say how many events have been accepted, and how many have arrived, until killed."""

    async def live() -> None:
        async with Flow(durable_sink(servers, topic, spool), first=int(first)) as flow:
            flow.start()
            while True:
                click.echo(f"{flow.statistics.accepted} {flow.statistics.acknowledged}")
                await anyio.sleep(0.01)

    anyio.run(live)


FAULTS: Final[dict[str, Callable[[Ground], Awaitable[None]]]] = {
    fault.__name__: fault
    for fault in (
        killed,
        paused,
        leader_moved,
        connections_cut,
        topic_deleted,
        started_before,
        ended_while_away,
        we_are_killed,
    )
}


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "asyncio+uvloop"])
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, broker: Cluster
) -> dict[str, Exception | None]:
    """What became of each fault of which there is a test; all at once, as most of it is waiting."""
    outcomes: dict[str, Exception | None] = {}

    async def note(name: str) -> None:
        try:
            await FAULTS[name](Ground(tmp_path_factory.mktemp(name), broker))
        except Exception as error:
            outcomes[name] = error
        else:
            outcomes[name] = None

    async def everything() -> None:
        async with anyio.create_task_group() as tasks:
            for name in names:
                tasks.start_soon(note, name)
        assert remains() == []

    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names: set[Any] = {item.callspec.params["fault"] for item in items if item.function is test_after}
    anyio.run(everything, backend_options={"use_uvloop": request.param})
    return outcomes


@pytest.mark.timeout(400)
@pytest.mark.parametrize("fault", FAULTS)
def test_after(fault: str, outcomes: dict[str, Exception | None]) -> None:
    error = outcomes[fault]
    if error is not None:
        raise error
