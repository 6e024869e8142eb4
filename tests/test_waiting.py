"""Waiting for time and for descriptors, and between attempts, on every event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import anyio
import pytest

from ebpfstream.errors import StreamBusyError
from ebpfstream.turns import Turn
from ebpfstream.waiting import BackOff, is_asyncio, readable

pytestmark = pytest.mark.anyio


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


async def test_which_loop(anyio_backend_name: str) -> None:
    assert is_asyncio() == (anyio_backend_name == "asyncio")


def test_no_loop_at_all() -> None:
    assert not is_asyncio()


async def test_pauses_between_attempts_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(anyio, "sleep", sleep)
    back_off = BackOff(1, 6)
    for _ in range(5):
        await back_off.pause()
    back_off.reset()
    await back_off.pause()
    for pause, longest in zip(pauses, (1, 2, 4, 6, 6, 1), strict=True):
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == 6


async def test_returns_when_there_is_something_to_read(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    returned = False

    async def wait() -> None:
        nonlocal returned
        await readable(reader)
        returned = True

    for _ in range(3):
        returned = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            assert not returned
            os.write(writer, b"x")
        assert os.read(reader, 10) == b"x"


@pytest.mark.parametrize("number", [1, 2, 4])
async def test_returns_when_a_look_finds_something(pipe: tuple[int, int], number: int) -> None:
    """The last look of them as well, and then no more is looked."""
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return looks == number

    with anyio.fail_after(10):
        await readable(pipe[0], look)
    await anyio.sleep(0.05)
    assert looks == number


async def test_looking_ends(pipe: tuple[int, int]) -> None:
    """By itself, and when nobody waits any more."""
    looks = 0

    def look() -> bool:
        nonlocal looks
        looks += 1
        return False

    with anyio.move_on_after(0.3) as scope:
        await readable(pipe[0], look)
    assert scope.cancelled_caught
    assert looks == 4
    with anyio.CancelScope() as scope:
        scope.cancel()
        await readable(pipe[0], look)
    await anyio.sleep(0.05)
    assert looks in (4, 5)  # asyncio cancels after one turn, with the first look in it


async def test_a_wait_that_is_cancelled_leaves_nothing_behind(pipe: tuple[int, int]) -> None:
    with anyio.move_on_after(0.01):
        await readable(pipe[0])
    if is_asyncio():
        assert not asyncio.get_running_loop().remove_reader(pipe[0])
    os.write(pipe[1], b"x")
    await anyio.sleep(0.01)
    await readable(pipe[0])


async def test_a_pause_takes_its_time() -> None:
    began = anyio.current_time()
    await Turn("event").pause(0.05)
    assert anyio.current_time() - began >= 0.048  # uvloop counts milliseconds


async def test_a_pause_is_interrupted_and_the_next_one_is_not() -> None:
    turn = Turn("event")
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(turn.pause, 60)
        await anyio.wait_all_tasks_blocked()
        turn.interrupt()
        turn.interrupt()
    assert anyio.current_time() - began < 30
    turn.interrupt()  # nobody is waiting
    with anyio.move_on_after(0.05) as scope:
        await turn.pause(60)
    assert scope.cancelled_caught


async def test_a_pause_that_is_cancelled_gives_the_turn_back() -> None:
    turn = Turn("event")

    async def pause() -> None:
        with turn.taken():
            await turn.pause(60)

    with anyio.move_on_after(0.01) as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pause)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(StreamBusyError):
                await pause()
            await anyio.sleep(1)
    assert scope.cancelled_caught
    with turn.taken():
        pass
