"""A TCP proxy between clients and a broker that cuts connections, and holds them up."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import ExitStack
from functools import partial
from typing import Final, Self

import anyio
from anyio.abc import Listener, SocketAttribute, SocketStream
from anyio.from_thread import start_blocking_portal

_NO_FAREWELL: Final = struct.pack("ii", 1, 0)  # struct linger: on, for no time


class Proxy:
    """Carries what comes to 127.0.0.1:`port` to 127.0.0.1:`target` and back, from start() to close().

    It works in a thread of its own; every method may be called from any thread, and is done when it
    returns.  Connections end by a reset, also those whose other side has ended or cannot be reached.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self.target = target
        self._exits = ExitStack()
        self._connections: set[anyio.CancelScope] = set()
        self._flowing = anyio.Event()
        self._left = 0
        self._cut_off: threading.Event | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Listen."""
        with ExitStack() as exits:
            self._portal = exits.enter_context(start_blocking_portal("asyncio"))
            listen = partial(anyio.create_tcp_listener, local_host="127.0.0.1", local_port=self.port)
            listener = self._portal.call(listen)
            serving = self._portal.start_task_soon(self._listen, listener)
            exits.callback(serving.cancel)
            self.release()
            self._exits = exits.pop_all()

    def close(self) -> None:
        """Reset every connection, and listen no more."""
        self._exits.close()

    @property
    def connections(self) -> int:
        """How many there are at this moment."""
        return self._portal.call(lambda: len(self._connections))

    def cut(self) -> None:
        """Reset every connection, to both sides; what was on its way is lost.  New ones are carried.

        A response that was to be cut, and has not come yet, will not be.
        """
        self._portal.call(self._cut)

    def cut_response(self, after: int = 0) -> threading.Event:
        """Pass on `after` bytes more of what the broker says, on whatever connection, and then `cut`.

        The broker has then done what it was asked to, and the client cannot know.  What is returned is
        set once that has happened.
        """
        done = threading.Event()

        def arm() -> None:
            self._left, self._cut_off = after, done

        self._portal.call(arm)
        return done

    def hold(self) -> None:
        """Carry nothing more and end nothing: to each side the other one has fallen silent."""

        def hold() -> None:
            self._flowing = anyio.Event()

        self._portal.call(hold)

    def release(self) -> None:
        """Carry on after `hold`, with everything that came in meanwhile."""

        def release() -> None:
            self._flowing.set()

        self._portal.call(release)

    async def _listen(self, listener: Listener[SocketStream]) -> None:
        async with listener:
            await listener.serve(self._serve)

    async def _serve(self, client: SocketStream) -> None:
        with anyio.CancelScope() as scope:
            self._connections.add(scope)
            try:
                await self._connect(client)
            except (OSError, anyio.BrokenResourceError):
                pass
            finally:
                self._connections.discard(scope)
                await anyio.aclose_forcefully(client)

    async def _connect(self, client: SocketStream) -> None:
        _end_by_reset(client)
        async with await anyio.connect_tcp("127.0.0.1", self.target) as broker:
            _end_by_reset(broker)
            async with anyio.create_task_group() as both:

                async def requests() -> None:
                    await self._carry(client, broker)
                    both.cancel_scope.cancel()

                async def responses() -> None:
                    await self._carry(broker, client, are_responses=True)
                    both.cancel_scope.cancel()

                both.start_soon(requests)
                both.start_soon(responses)

    async def _carry(self, source: SocketStream, to: SocketStream, *, are_responses: bool = False) -> None:
        try:
            async for data in source:
                await self._flowing.wait()
                if are_responses and self._cut_off:
                    await self._carry_some(data, to)
                else:
                    await to.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # either side has ended it

    async def _carry_some(self, data: bytes, to: SocketStream) -> None:
        some = data[: self._left]
        self._left -= len(some)
        if some:
            await to.send(some)
        if len(some) < len(data) and self._cut_off:
            self._cut_off.set()
            self._cut()

    def _cut(self) -> None:
        for scope in self._connections:
            scope.cancel()
        self._connections.clear()
        self._cut_off = None


def _end_by_reset(stream: SocketStream) -> None:
    stream.extra(SocketAttribute.raw_socket).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_FAREWELL)
