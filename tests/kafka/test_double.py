"""What a real broker does only by bad luck, on demand: see Double."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream.sinks import kafka_producer
from ebpfstream.sinks.kafka import KafkaSink
from tests.kafka.double import INVALID_RECORD, NOT_ENOUGH_REPLICAS, OUT_OF_ORDER, Double
from tests.kafka.flow import Flow, check, remains, until

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module", params=[False, True], ids=["asyncio", "asyncio+uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture
async def double() -> AsyncIterator[Double]:
    async with Double() as double:
        yield double
    assert remains() == []


def make(double: Double, topic: str = "events", **options: Any) -> KafkaSink:
    return KafkaSink(f"127.0.0.1:{double.port}", topic, **options)


def numbered(*numbers: int) -> Any:
    """Whether a record is of one of these events."""
    return lambda record: INVALID_RECORD if json.loads(record.value)["number"] in numbers else 0


async def test_nothing_happens(double: Double) -> None:
    async with Flow(make(double)) as flow:
        for _ in range(10):
            flow.submit(100)
        await flow.arrived()
    assert check(double.records, range(1000)) == 0
    assert double.producers == 1
    assert set(double.answered) == {0}


async def test_a_rejected_sequence_ends_a_producer(double: Double) -> None:
    """The broker has forgotten, or lost, what came before.  What it then does not take comes again: nothing twice."""
    async with Flow(make(double)) as flow:
        for _ in range(10):
            double.errors = [OUT_OF_ORDER] * 2
            flow.submit(100)
            await flow.arrived()
        assert (flow.statistics.acknowledged, flow.statistics.failed) == (1000, 0)
    assert check(double.records, range(1000)) == 0
    assert double.answered[OUT_OF_ORDER] == 20
    assert double.producers > 10


async def test_lost_responses(double: Double) -> None:
    """A producer that sends again what has arrived is known, and nothing comes twice."""
    async with Flow(make(double)) as flow:
        for _ in range(5):
            double.responses_to_lose = 2
            flow.submit(100)
            await flow.arrived()
    assert check(double.records, range(500)) == 0
    assert double.lost_responses == 10
    assert double.producers == 1


async def test_silence_is_said(
    double: Double, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and that it has ended; until then nothing is lost, and no other producer begins."""
    monkeypatch.setattr(kafka_producer, "_SILENT", 0.1)
    async with Flow(make(double)) as flow:
        flow.submit(100)
        await flow.arrived()
        double.is_leaderless = True
        flow.submit(100)
        with anyio.fail_after(10):
            await until(lambda: "does not acknowledge what is sent to 'events'" in caplog.text)
        double.is_leaderless = False
        await flow.arrived()
    assert caplog.text.count("does not acknowledge") == 1
    assert caplog.text.count("going on") == 1
    assert double.producers == 1
    assert check(double.records, range(200)) == 0


async def test_records_that_are_invalid_are_found(double: Double, tmp_path: Path) -> None:
    """Wherever in a batch they are; the others arrive, once and in order."""
    guilty = {0, 333, 334, 335, 700, 999}
    double.check = numbered(*guilty)
    dead = tmp_path / "dead"
    async with Flow(make(double, dead_letters=str(dead), batch_size=8192)) as flow:
        flow.submit(1000)
        await flow.arrived()
        assert (flow.statistics.acknowledged, flow.statistics.failed) == (994, 6)
        flow.submit(1000)
        await flow.arrived()
        assert (flow.statistics.acknowledged, flow.statistics.failed) == (1994, 6)
    letters = [json.loads(line) for line in dead.read_text().splitlines()]
    assert {letter["event"]["number"] for letter in letters} == guilty
    assert all("takes no such record" in letter["reason"] for letter in letters)
    assert check(double.records, set(range(2000)) - guilty) == 0


async def test_a_batch_that_is_too_large_though_its_records_are_not(double: Double) -> None:
    double.most = 4000
    async with Flow(make(double, compression="none")) as flow:
        flow.submit(1000)
        await flow.arrived()
        assert (flow.statistics.acknowledged, flow.statistics.failed) == (1000, 0)
    assert check(double.records, range(1000)) == 0


async def test_no_producer_comes_to_the_end_of_its_sequence_numbers(
    double: Double, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one goes on before, while there is no end of what is to be sent."""
    monkeypatch.setattr(kafka_producer, "_MOST_RECORDS", 1000)
    async with Flow(make(double, batch_size=8192)) as flow:
        for _ in range(20):
            flow.submit(1000)
        await flow.arrived()
    assert check(double.records, range(20_000)) == 0
    assert max(double.taken.values()) < 1100
    assert double.producers >= 7


async def test_nobody_leads_for_long(double: Double, caplog: pytest.LogCaptureFixture) -> None:
    """Longer than aiokafka and we try with one producer."""
    async with Flow(make(double, request_timeout=0.3)) as flow:
        flow.submit(100)
        await flow.arrived()
        double.is_leaderless = True
        for _ in range(20):
            flow.submit(100)
            await anyio.sleep(0.2)
        assert flow.statistics.acknowledged == 100
        double.is_leaderless = False
        await flow.arrived()
    assert check(double.records, range(2100)) == 0
    assert double.producers > 2


async def test_too_few_replicas_are_in_step_for_long(
    double: Double, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer than we try with one producer; aiokafka would never say so."""
    async with Flow(make(double, request_timeout=0.3)) as flow:
        flow.submit(100)
        await flow.arrived()
        double.errors = [NOT_ENOUGH_REPLICAS] * 1000
        for _ in range(15):
            flow.submit(100)
            await anyio.sleep(0.1)
        assert flow.statistics.acknowledged == 100
        double.errors.clear()
        await flow.arrived()
    assert check(double.records, range(1600)) == 0
    assert double.producers > 1
    assert any("does not acknowledge what is sent to 'events'" in line for line in caplog.messages)


async def test_a_broker_that_goes_before_it_was_asked_for_the_topic(double: Double) -> None:
    """That says nothing about the topic: aiokafka does not tell the one from the other."""
    async with Flow(make(double, topic="{type}s", request_timeout=0.3)) as flow:
        await until(lambda: double.producers)
        await double.stop()
        flow.submit(100)
        await anyio.sleep(2)
        await double.start()
        await flow.arrived()
    assert check(double.records, range(100)) == 0


async def test_it_closes_in_time_while_nothing_can_arrive(double: Double) -> None:
    """And leaves no task behind."""
    async with Flow(make(double), deadline=1) as flow:
        flow.submit(100)
        await flow.arrived()
        double.is_leaderless = True
        flow.submit(100)
        await until(lambda: flow.statistics.accepted == 200)
    assert (flow.statistics.acknowledged, flow.statistics.dropped) == (100, 100)
