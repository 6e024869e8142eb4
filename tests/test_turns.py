"""What nobody may cut short: cancelled, it goes on, and the cancellation is raised after it, on every event loop."""

from __future__ import annotations

import threading

import anyio
import pytest
from anyio.lowlevel import checkpoint

from ebpfstream.testing.cancelling import cancelled_at, ways_to_cancel
from ebpfstream.turns import in_thread, to_the_end

pytestmark = pytest.mark.anyio


async def double(number: int) -> int:
    await checkpoint()
    if not number:
        raise LookupError("nothing")
    return 2 * number


async def test_not_cancelled_it_returns_or_raises() -> None:
    assert await to_the_end(double, 2) == 4
    assert await in_thread(divmod, 7, 2) == (3, 1)
    with pytest.raises(LookupError, match="nothing"):
        await to_the_end(double, 0)
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelled_it_goes_on_and_that_is_raised(fails: bool) -> None:
    """And not what it returns or raises, nor only at the caller's next await."""
    for way in ways_to_cancel():
        happened: list[str] = []

        async def work(happened: list[str] = happened) -> None:
            for _ in range(5):
                await checkpoint()
            happened.append("worked")
            if fails:
                raise LookupError

        async def run(happened: list[str] = happened) -> None:
            await to_the_end(work)
            happened.append("returned")

        outcome = await cancelled_at(0, run(), way)
        assert (outcome.reached, outcome.completed) == (True, False)
        assert happened == ["worked"]


async def test_cancelled_a_thread_goes_on_and_that_is_raised() -> None:
    began, go, happened = threading.Event(), threading.Event(), []

    def work() -> None:
        began.set()
        go.wait(10)
        happened.append("worked")

    async def run() -> None:
        await in_thread(work)
        happened.append("returned")

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            while not began.is_set():  # a thread sets it
                await anyio.sleep(0.001)
            scope.cancel()
            go.set()
    assert scope.cancelled_caught
    assert happened == ["worked"]


async def test_in_what_is_cancelled_already() -> None:
    """It is done, and that is raised; what is done in a thread is not begun."""
    happened: list[str] = []

    async def work() -> None:
        await checkpoint()
        happened.append("worked")

    with anyio.CancelScope() as scope:
        scope.cancel()
        await to_the_end(work)
        happened.append("returned")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await in_thread(happened.append, "worked in a thread")
    assert happened == ["worked"]
