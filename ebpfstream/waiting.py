"""Waiting for descriptors, at as little cost to the event loop as can be; pauses between attempts; which loop it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

import anyio
from anyio.lowlevel import checkpoint

_LOOKS: Final = (0, 0, 0.02)  # seconds after each other, the first at once


def is_asyncio() -> bool:
    """Whether who asks is a task of asyncio (or uvloop); trio is the other one."""
    # Not whether there is a loop: trio as a guest of asyncio runs within one, but in no task of it.
    try:
        return asyncio.current_task() is not None
    except RuntimeError:
        return False


def end(wait: asyncio.Future[None]) -> None:
    """Let who waits for it go on."""
    if not wait.done():
        wait.set_result(None)


class BackOff:
    """Pauses between attempts: each twice the last, less a random part, so that many hosts do not come back in step."""

    def __init__(self, first: float, longest: float) -> None:
        self._first, self._longest = first, longest
        self._next = first

    def reset(self) -> None:
        """Let the next pause be the first again."""
        self._next = self._first

    async def pause(self) -> None:
        """Wait before the next attempt."""
        await anyio.sleep(self._next * random.uniform(0.5, 1))  # noqa: S311  # no secret depends on it
        self._next = min(2 * self._next, self._longest)


async def readable(fd: int, look: Callable[[], object] | None = None) -> None:
    """Return when the descriptor, which nobody else waits for, is readable, or `look` has found something.

    It looks once the descriptor is registered, for kinds whose readiness registering takes away: that is some
    turns of the loop later (uvloop).
    """
    if not is_asyncio():
        await _readable_on_trio(fd, look)
        return
    # As anyio.wait_readable() does, without what it must do for sockets and for Windows.
    loop = asyncio.get_running_loop()
    wait: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, end, wait)
    next_look: asyncio.Handle | None = None

    def look_again(pauses: tuple[float, ...]) -> None:
        nonlocal next_look
        if look is not None and look():
            end(wait)
        elif pauses:
            next_look = loop.call_later(pauses[0], look_again, pauses[1:])

    try:
        if look is not None:
            next_look = loop.call_soon(look_again, _LOOKS)
        await wait
    finally:
        loop.remove_reader(fd)
        if next_look is not None:
            next_look.cancel()


async def _readable_on_trio(fd: int, look: Callable[[], object] | None) -> None:
    if look is None:
        await anyio.wait_readable(fd)
        return
    try:
        async with anyio.create_task_group() as tasks:

            async def looking() -> None:
                for pause in (0, *_LOOKS):
                    await (anyio.sleep(pause) if pause else checkpoint())
                    if look():
                        tasks.cancel_scope.cancel()

            tasks.start_soon(looking)
            await anyio.wait_readable(fd)
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # That there is a group is our affair: a Ctrl-C is to arrive as what it is.
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
