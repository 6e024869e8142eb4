"""What is cancelled at a certain await: at each one, if that is done for all numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import anyio

from ebpfstream.waiting import is_asyncio

Way = Literal["scope", "task", "again and again"]
"""How something is cancelled: by anyio; by asyncio itself, which knows no shield; so, and whenever it waits again."""


class Outcome(NamedTuple):
    """What became of something that was to be cancelled."""

    reached: bool
    """Whether it came to the await at which it was to be cancelled."""
    completed: bool
    """Whether it came to its end nevertheless."""


class Steps:
    """Awaits a coroutine; calls a function while it waits for the `at`th time, and perhaps whenever it does later."""

    def __init__(
        self, coroutine: Coroutine[Any, Any, None], at: int, call: Callable[[], object], again: bool
    ) -> None:
        self._coroutine, self._at, self._call, self._again = coroutine, at, call, again
        self.outcome = Outcome(reached=False, completed=False)

    def __await__(self) -> Generator[Any, Any, None]:
        number = 0
        resume: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            try:
                waited_for = resume(value)
            except StopIteration:
                self.outcome = self.outcome._replace(completed=True)
                return
            if number == self._at or (self._again and number > self._at):
                self.outcome = self.outcome._replace(reached=True)
                self._call()
            number += 1
            try:
                value, resume = (yield waited_for), self._coroutine.send
            except BaseException as error:  # the event loop's cancellation is one
                value, resume = error, self._coroutine.throw


def ways_to_cancel() -> tuple[Way, ...]:
    """Those that the running event loop knows."""
    return ("scope", "task", "again and again") if is_asyncio() else ("scope",)


async def cancelled_at(step: int, coroutine: Coroutine[Any, Any, None], way: Way = "scope") -> Outcome:
    """Await it, cancelled while it waits for the `step`th time, from 0.  What else it raises is raised."""
    if way == "scope":
        with anyio.CancelScope() as scope:
            steps = Steps(coroutine, step, scope.cancel, again=False)
            await steps
        return steps.outcome

    async def run() -> None:
        nonlocal steps
        task = asyncio.current_task()
        assert task is not None
        steps = Steps(coroutine, step, task.cancel, again=way == "again and again")
        await steps

    with suppress(asyncio.CancelledError):
        await asyncio.create_task(run())
    return steps.outcome
