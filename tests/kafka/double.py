"""A node of Kafka that is none: it does to producers, on demand, what a real one does only by bad luck."""

from __future__ import annotations

import asyncio
import io
import struct
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Self

from aiokafka.protocol.admin import ApiVersionResponse_v0
from aiokafka.protocol.metadata import MetadataResponse_v5
from aiokafka.protocol.produce import ProduceRequest_v7, ProduceResponse_v7
from aiokafka.protocol.transaction import InitProducerIdResponse_v0
from aiokafka.record.memory_records import MemoryRecords

from tests.kafka.client import Record

if TYPE_CHECKING:
    from collections.abc import Callable

# What a producer asks for, each in one version.
_PRODUCE: Final = 0
_METADATA: Final = 3
_API_VERSIONS: Final = 18
_INIT_PRODUCER_ID: Final = 22
_VERSIONS: Final = {_PRODUCE: 7, _METADATA: 5, _API_VERSIONS: 0, _INIT_PRODUCER_ID: 0}

LEADER_NOT_AVAILABLE: Final = 5
NOT_LEADER: Final = 6
TOO_LARGE: Final = 10
NOT_ENOUGH_REPLICAS: Final = 19
OUT_OF_ORDER: Final = 45
INVALID_RECORD: Final = 87
_REMEMBERED: Final = 5  # batches of a producer that a broker knows again


class Double:
    """Listens at 127.0.0.1:`port`, and leads every partition of a topic, whatever its name.

    Like a broker it takes a producer's batches only in the order of their sequence numbers, and each once: except for
    the first one of a producer, which may have any number.
    """

    def __init__(self, partitions: int = 3) -> None:
        self.port = 0
        self.check: Callable[[Record], int] = lambda record: 0
        """The error for a record, and so for its batch; 0: it is taken."""
        self.most = 1 << 20
        """Bytes that a batch may have."""
        self.errors: list[int] = []
        """For the batches that come next, in place of taking them."""
        self.responses_to_lose = 0
        """How many batches will be taken without a response: the connection ends instead."""
        self.is_leaderless = False
        self.producers = 0
        """How many there have been."""
        self.taken: Counter[tuple[int, int]] = Counter()
        """How many records, of which producer and for which partition."""
        self.answered: Counter[int] = Counter()
        """How often which error was the answer."""
        self.lost_responses = 0
        self._log: dict[int, list[Record]] = {number: [] for number in range(partitions)}
        self._known: dict[tuple[int, int], list[tuple[int, int]]] = {}  # first and next sequence number
        self._connections: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; with what was taken before, if there was that."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End all connections."""
        self._server.close()
        for writer in self._connections:
            writer.transport.abort()
        await self._server.wait_closed()

    @property
    def records(self) -> list[Record]:
        """What it has taken: partition by partition, each in its order."""
        return [record for records in self._log.values() for record in records]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (size,) = struct.unpack(">i", await reader.readexactly(4))
                request = await reader.readexactly(size)
                api, _, correlation, name = struct.unpack_from(">hhih", request)
                response = self._response(api, io.BytesIO(request[10 + max(name, 0) :]))
                if api == _PRODUCE and self.responses_to_lose:
                    self.responses_to_lose -= 1
                    self.lost_responses += 1
                    writer.transport.abort()
                writer.write(struct.pack(">ii", 4 + len(response), correlation) + response)
                await writer.drain()
        self._connections.discard(writer)
        writer.close()

    def _response(self, api: int, body: io.BytesIO) -> bytes:
        if api == _API_VERSIONS:
            versions = [(number, version, version) for number, version in _VERSIONS.items()]
            return _encode(ApiVersionResponse_v0, 0, versions)
        if api == _METADATA:
            return _encode(
                MetadataResponse_v5, 0, [(1, "127.0.0.1", self.port, None)], "double", 1, self._topics(body)
            )
        if api == _INIT_PRODUCER_ID:
            self.producers += 1
            return _encode(InitProducerIdResponse_v0, 0, 0, self.producers, 0)
        assert api == _PRODUCE, api
        answers = [
            (topic, [self._answer(partition, bytes(data)) for partition, data in partitions])
            for topic, partitions in ProduceRequest_v7.decode(body).topics
        ]
        return _encode(ProduceResponse_v7, answers, 0)

    def _topics(self, body: io.BytesIO) -> list[Any]:
        (count,) = struct.unpack(">i", body.read(4))
        names = [body.read(*struct.unpack(">h", body.read(2))).decode() for _ in range(count)]
        error, leader = (LEADER_NOT_AVAILABLE, -1) if self.is_leaderless else (0, 1)
        partitions: list[Any] = [(error, number, leader, [1], [1], []) for number in self._log]
        return [(0, name, False, partitions) for name in names]

    def _answer(self, partition: int, data: bytes) -> tuple[int, int, int, int, int]:
        errors = [NOT_LEADER] if self.is_leaderless else self.errors
        error = errors.pop(0) if errors else self._take(partition, data)
        self.answered[error] += 1
        return partition, error, -1 if error else 0, -1, 0

    def _take(self, partition: int, data: bytes) -> int:
        """Append a batch, unless it was before; the error if it cannot be."""
        producer, _, first, count = struct.unpack_from(">qhii", data, 43)
        batches = self._known.setdefault((producer, partition), [])
        if (first, first + count) in batches:
            return 0
        if batches and batches[-1][1] != first:
            return OUT_OF_ORDER
        log = self._log[partition]
        records = list(_records(data, partition, len(log)))
        assert len(records) == count
        if error := TOO_LARGE if len(data) > self.most else next(filter(None, map(self.check, records)), 0):
            return error
        log += records
        batches.append((first, first + count))
        del batches[:-_REMEMBERED]
        self.taken[producer, partition] += count
        return 0


def _encode(kind: Any, *values: Any) -> bytes:
    encoded: bytes = kind(*values).encode()
    return encoded


def _records(data: bytes, partition: int, offset: int) -> Any:
    batches = MemoryRecords(data)
    while (batch := batches.next_batch()) is not None:
        for number, one in enumerate(batch, offset):
            yield Record(partition, number, one.timestamp, one.key, one.value, tuple(one.headers))
