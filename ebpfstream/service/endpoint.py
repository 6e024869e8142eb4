"""Metrics and health over HTTP, from a thread of its own.

A thread, so that somebody is there to say it when the event loop no longer answers.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from email.message import Message
from functools import partial
from http import HTTPStatus
from threading import Event, Thread
from time import monotonic
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar, cast

import anyio
from anyio import CancelScope
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync

from ebpfstream.errors import ArgumentError
from ebpfstream.service.http_server import Answer, Server
from ebpfstream.service.metrics import Lag, exposition, process_metrics
from ebpfstream.turns import to_the_end
from ebpfstream.waiting import readable

DEFAULT_LISTEN: Final = "127.0.0.1:9435"
"""Where the endpoint is unless told otherwise: nobody on another machine reaches it."""

_LOOPBACK: Final = "127.0.0.1"
_TURN: Final = 1.0  # seconds that the event loop may take to answer

_REMEDIES: Final = {
    errno.EADDRINUSE: "end the process that has this port, or give another one",
    errno.EADDRNOTAVAIL: "this machine has no such address: give one that it has, or 0.0.0.0 for all",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE: give a higher one",
    errno.EAFNOSUPPORT: f"this kernel has no IPv6: give {DEFAULT_LISTEN}",
}

_log = logging.getLogger("ebpfstream")

T = TypeVar("T")


class Collected(Protocol):
    """What `/metrics` shows beside the process itself: a LedgerCollector."""

    def collect(self) -> Iterable[Any]:
        """The metrics now; called on the event loop's thread."""


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:9435`, `[::1]:9435`, `localhost:9435`, and `:9435`, which is loopback.

    Raises ArgumentError.
    """
    host, colon, port = listen.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]") and len(host) > 2
    plausible = bracketed or not set(host) & set("[]:/@ ")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else -1
    if not (colon and plausible and 0 <= number < 1 << 16):
        raise ArgumentError(
            f"listen={listen!r} is no address: write host:port, such as {DEFAULT_LISTEN} or [::1]:9435, "
            "or 0.0.0.0:9435 for all networks; a port is 0 to 65535, and 0 any that is free"
        )
    return (host[1:-1] if bracketed else host) or _LOOPBACK, number


def _bound(listen: str) -> socket.socket:
    host, port = parse_listen(listen)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"listen={listen!r}: {host!r} is not known: give an address of this machine, or {_LOOPBACK}"
        ) from error
    family, kind, protocol, _, address = found[0]
    with ExitStack() as opened:
        try:
            listener = opened.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # [::] is all networks
            listener.bind(address)
            listener.listen(128)
            listener.setblocking(False)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "give another address")
            raise ArgumentError(f"listen={listen!r}: {error.strerror}: {remedy}") from error
        opened.pop_all()
    return listener


# --- the event loop


class _Call(Generic[T]):
    """A function that the event loop's thread is to call, for another one."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self.asked = monotonic()
        self.answered = Event()
        self.is_wanted = True
        self.lag: float | None = None
        """Seconds that it waited for its turn; None if it had none yet."""
        self.result: T | None = None
        self.error: Exception | None = None

    def make(self) -> None:
        if self.is_wanted:
            try:
                self.result = self._function()
            except Exception as error:
                self.error = error
        self.answered.set()


class _HeldUpError(Exception):
    """The event loop does not answer in time; says so."""


class _Loop:
    """Calls on the event loop's thread, made by one other thread, which does not wait for ever.

    There is at most one at a time.  One that was not made in time stands until the loop has a turn again, and
    whoever asks meanwhile is told at once.  anyio's own ways (from_thread, BlockingPortal) wait until the loop answers.
    """

    def __init__(self) -> None:
        # A byte from this thread asks the loop to call; one from the loop asks this thread to end.
        self.near, self._far = socket.socketpair()
        self._far.setblocking(False)
        self._call: _Call[Any] | None = None
        self._most = 0.0
        self._attending = CancelScope(shield=True)  # what is cancelled around it may take its time to end
        self.left = anyio.Event()
        """Set when the loop makes no more calls."""

    def close(self) -> None:
        """Once both sides have ended."""
        self.near.close()
        self._far.close()

    # --- the other thread's side

    def call(self, function: Callable[[], T]) -> tuple[T, Lag]:
        """What the function returns or raises, and how long it waited for its turn.  Raises _HeldUpError."""
        held_up = _HeldUpError(f"the event loop has not answered for {_TURN:g} s")
        if self._call is not None and not self._call.answered.is_set():
            raise held_up
        call = self._call = _Call(function)
        self.near.send(b"\0")
        if not call.answered.wait(_TURN):
            call.is_wanted = False
            raise held_up
        if call.lag is None:
            raise _HeldUpError("the service is ending")
        if call.error is not None:
            raise call.error
        return cast("T", call.result), Lag(call.lag, self._most)

    # --- the loop's side

    async def attend(self) -> None:
        """Make the calls, until `leave`."""
        try:
            with self._attending:
                while True:
                    await readable(self._far.fileno())
                    with suppress(BlockingIOError):
                        self._far.recv(1)
                        self._make()
        finally:
            self.left.set()

    def _make(self) -> None:
        call = self._call
        if call is not None:
            call.lag = monotonic() - call.asked
            self._most = max(self._most, call.lag)
            call.make()

    def end_other(self) -> None:
        """Let the other thread end: it waits for no call any more."""
        self._far.send(b"\0")
        if self._call is not None:
            self._call.answered.set()

    def leave(self) -> None:
        """No more calls."""
        self._attending.cancel()


# --- what is answered


def _json(status: HTTPStatus, **content: object) -> Answer:
    return Answer(status, json.dumps(content).encode() + b"\n", "application/json")


_INDEX: Final = b"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>ebpfstream</title></head><body>
<h1>ebpfstream</h1>
<ul>
<li><a href="/metrics">/metrics</a>: the ledgers, for Prometheus</li>
<li><a href="/healthz">/healthz</a>: whether the event loop answers</li>
<li><a href="/readyz">/readyz</a>: whether everything is attached and forwarding, and every sink there</li>
</ul>
</body></html>
"""


class Endpoint:
    """Answers over HTTP while its block runs: `/metrics`, `/healthz`, `/readyz`, and `/` which names them.

        endpoint = Endpoint("127.0.0.1:9435", LedgerCollector(ledgers), ready)
        async with endpoint: ...

    **`/metrics`**: what `collector` collects, and this process.  **`/healthz`**: 200 if the event loop answers within a
    second.  **`/readyz`**: 200 if `ready()` is empty; it says what is not as it should be, a line for each.  Otherwise
    they are 503, and say why.  `collector` and `ready` are called on the event loop's thread.

    Made, it has the address and no thread yet, so that privileges may be given up before it is entered.  The real port
    is in `address`.  Cancelling what is around the block does not end it: it answers until the block is left.  Raises
    ArgumentError for what is no address, or one that cannot be had.
    """

    def __init__(self, listen: str, collector: Collected, ready: Callable[[], list[str]]) -> None:
        self._collector = collector
        self._ready = ready
        self._listener = _bound(listen)
        host, port, *_ = self._listener.getsockname()
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        """Where it really is, such as 127.0.0.1:9435."""
        self._loop: _Loop | None = None
        self._thread: Thread | None = None
        self._tasks: TaskGroup | None = None

    def close(self) -> None:
        """Give the address back, if it was never entered."""
        self._listener.close()

    async def __aenter__(self) -> Self:
        self._loop = loop = _Loop()
        self._thread = Thread(target=self._serve, args=(loop,), name="ebpfstream endpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            loop.close()
            self.close()
            raise
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(loop.attend)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._loop is not None
        assert self._tasks is not None
        self._loop.end_other()
        try:
            try:
                await to_the_end(self._end)
            finally:
                self._loop.close()
                self.close()
                await self._tasks.__aexit__(None, None, None)  # with the error, it would come out in a group
        except anyio.get_cancelled_exc_class():
            if error is None:  # or that would take the place of what the block raised
                raise

    async def _end(self) -> None:
        assert self._thread is not None
        assert self._loop is not None
        await run_sync(self._thread.join)
        self._loop.leave()
        await self._loop.left.wait()

    # --- in the thread

    def _serve(self, loop: _Loop) -> None:
        try:
            Server(self._listener, loop.near, partial(self._answer, loop)).serve()
        except Exception:
            _log.exception("the endpoint %s has ended: restart the service", self.address)

    def _answer(self, loop: _Loop, path: str, headers: Message) -> Answer:
        try:
            match path:
                case "/":
                    return Answer(HTTPStatus.OK, _INDEX, "text/html; charset=utf-8")
                case "/metrics":
                    return self._metrics(loop, headers)
                case "/healthz":
                    _, lag = loop.call(lambda: None)
                    return _json(HTTPStatus.OK, healthy=True, loop_lag_seconds=lag.last)
                case "/readyz":
                    reasons, _ = loop.call(self._ready)
                    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
                    return _json(status, ready=not reasons, reasons=reasons)
        except _HeldUpError as error:
            name = {"/healthz": "healthy", "/readyz": "ready"}.get(path, "collected")
            return _json(HTTPStatus.SERVICE_UNAVAILABLE, **{name: False}, reasons=[str(error)])
        except Exception:
            _log.exception("%s cannot be answered", path)
            return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, b"the log has the reason\n")
        return Answer(HTTPStatus.NOT_FOUND, b"there are /metrics, /healthz and /readyz\n")

    def _metrics(self, loop: _Loop, headers: Message) -> Answer:
        ledgers, lag = loop.call(lambda: list(self._collector.collect()))
        accept = ",".join(headers.get_all("Accept", []))
        content_type, text = exposition([*ledgers, *process_metrics(lag)], accept)
        return Answer(HTTPStatus.OK, text, content_type)
