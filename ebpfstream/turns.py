"""What all streams share: who may wait for what comes next, until it is closed; and what nobody may cut short."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

import anyio
from anyio import CancelScope
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled
from anyio.to_thread import run_sync

from ebpfstream.errors import StreamBusyError, StreamClosedError
from ebpfstream.waiting import end, is_asyncio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


async def to_the_end(function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """What the function returns or raises; cancelled meanwhile, it goes on, and that is raised after it.

    A CancelScope with a shield alone does not hold off `task.cancel()`, asyncio's own cancellation, as
    of `asyncio.timeout` and `asyncio.TaskGroup`: so the function runs in a task that nobody else knows.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    async def run() -> None:
        with CancelScope(shield=True):
            try:
                results.append(await function(*arguments))
            except BaseException as error:  # raised below, without a group around it
                errors.append(error)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
        await checkpoint_if_cancelled()  # trio does not raise that when a group ends
        if errors:
            raise errors.pop()
        return results.pop()
    finally:
        errors.clear()  # their frames refer to this one


async def in_thread(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """The same of a function that takes its time, in a thread; it has returned, or never begins."""
    await checkpoint()
    return await to_the_end(run_sync, function, *arguments)


class Turn:
    """Taken by whoever waits for the next `what`; once closed, nobody may wait any more."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = anyio.Lock()
        self._waiting: CancelScope | None = None
        self._pausing: asyncio.Future[None] | None = None
        self.closed = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Raises StreamBusyError if another task has it, StreamClosedError."""
        self.check_open()
        try:
            self._lock.acquire_nowait()
        except anyio.WouldBlock:
            raise StreamBusyError(
                f"another task is waiting for this stream's next {self._what}: "
                f"iterate it in one task, and hand {self._what}s on from there"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    def check_open(self) -> None:
        """Raises StreamClosedError."""
        if self.closed:
            raise StreamClosedError(
                "this stream is closed: call the function that made it again for a new one"
            )

    def waiting(self) -> CancelScope:
        """What to wait in, so that `interrupt` ends it at once."""
        self._waiting = CancelScope()
        return self._waiting

    async def pause(self, seconds: float) -> None:
        """Sleep for so long, or until `interrupt`.

        What `waiting` and `anyio.sleep` do as well, at half the cost, on asyncio: a stream does this a
        few hundred times a second.
        """
        if not is_asyncio():
            with self.waiting():
                await anyio.sleep(seconds)
            return
        loop = asyncio.get_running_loop()
        self._pausing = loop.create_future()
        timer = loop.call_later(seconds, end, self._pausing)
        try:
            await self._pausing
        finally:
            timer.cancel()
            self._pausing = None

    def interrupt(self) -> None:
        """Let who waits look again at how things are."""
        if self._waiting is not None:
            self._waiting.cancel()
        if self._pausing is not None:
            end(self._pausing)

    def close(self) -> anyio.Lock:
        """Nobody may wait from now on; whoever still does is interrupted, and gone when the lock is to be had."""
        self.closed = True
        self.interrupt()
        return self._lock


class Stream(ABC):
    """Entered, iterated by one task at a time, and closed to the end, whatever cancels that.

    A subclass writes `_open`, `_free` and `__anext__`, which takes its turn.
    """

    def __init__(self, what: str) -> None:
        self._turn = Turn(what)

    async def __aenter__(self) -> Self:
        with self._turn.taken():
            await self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    def __aiter__(self) -> Self:
        return self

    async def aclose(self) -> None:
        """Close it, and give everything back.

        A task that waits for what comes next gets StreamClosedError.  Raises that itself when it was closed before;
        leaving the `async with` block never does.
        """
        self._turn.check_open()
        await self._close()

    async def _close(self) -> None:
        if not self._turn.closed:
            await to_the_end(self._closing)

    async def _closing(self) -> None:
        async with self._turn.close():
            await self._free()

    @abstractmethod
    async def _open(self) -> None:
        """Begin, if that has not been done yet."""

    @abstractmethod
    async def _free(self) -> None:
        """Give everything back; nobody waits any more."""
