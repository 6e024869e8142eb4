"""The contract between a stream and what it is forwarded to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from ebpfstream.batch import EventBatch


class Sink(ABC):
    """Where events go.

    A sink is used by one task: entered, given batches one after the other, flushed, left.  Entering
    and leaving may be written as `open` and `aclose`, which do nothing unless overridden.

    A batch is the sink's from `send` on: it may keep it, and nobody changes it.  When `send` returns
    the sink answers for the batch; when `flush` returns, whatever was sent has left this process.
    Both may wait for as long as the other end makes them, and be cancelled at any await; what was
    being sent then may have arrived in part.
    """

    async def open(self) -> None:
        """Get ready; called once, before anything is sent."""

    @abstractmethod
    async def send(self, batch: EventBatch[Any]) -> None:
        """Take a batch.

        Raises SinkClosedError when the other end is gone for good, SinkError when this batch
        cannot be taken; the message says what to do about it.
        """

    async def flush(self) -> None:
        """Return when all that was sent has left this process."""

    async def aclose(self) -> None:
        """Give up what `open` took; what has not been flushed may be lost.  Called once, last."""

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
