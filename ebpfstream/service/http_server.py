"""A small HTTP server: one thread for all connections, each with one request.

A silent client costs a descriptor for some seconds, and nobody waits for it.  The servers of http.server have a thread
for each client, which would have to be bounded, and then a few silent clients could take them all.  What reads
requests and writes answers is taken from there.
"""

from __future__ import annotations

import errno
import re
import selectors
import socket
from collections.abc import Callable
from contextlib import ExitStack
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from time import monotonic, sleep
from typing import Final, NamedTuple

_PATIENCE: Final = 5.0  # seconds for a client to send its request, and again to take the answer
_LINGER: Final = 1.0  # seconds to read on after the answer: see `_Connection.finish`
_NO_DESCRIPTOR: Final = 0.1  # seconds that a client stays at the door when there is no descriptor for it
_MOST_CONNECTIONS: Final = 64
_MOST_BYTES: Final = 16 << 10  # of a request
_AT_ONCE: Final = 64 << 10  # bytes read or written in one go
_FULL: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_BLANK_LINE: Final = re.compile(rb"\r?\n\r?\n")


class Answer(NamedTuple):
    """What a request gets."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Answering = Callable[[str, Message], Answer]
"""What answers a request for a path, without what is behind a `?`, with these headers.  It must not raise."""


class _Request(BaseHTTPRequestHandler):
    """A request that has been read, and its answer as bytes, in `wfile`."""

    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # or what cannot be parsed would get an answer without a head

    def __init__(self, request: bytes, answer: Answering) -> None:
        self.rfile = BytesIO(request)
        self.wfile = self.written = BytesIO()
        self.client_address = "", 0
        self.raw_requestline = self.rfile.readline(_MOST_BYTES + 1)
        self.request_version = self.requestline = self.command = ""
        if len(request) > _MOST_BYTES:
            whole_line = self.raw_requestline.endswith(b"\n")
            self.send_error(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if whole_line else HTTPStatus.REQUEST_URI_TOO_LONG
            )
        elif self.parse_request():  # or that has written what is wrong
            self._write(self._answer(answer))

    def _answer(self, answer: Answering) -> Answer:
        if self.command not in ("GET", "HEAD"):
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD are possible\n")
        return answer(self.path.partition("?")[0], self.headers)

    def _write(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def version_string(self) -> str:
        """Who answers."""
        return "ebpfstream"

    def handle_expect_100(self) -> bool:
        """Nothing is said in between: what follows is not read."""
        return True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is logged for a request."""


class _Connection:
    """A client: what has been read of its request, then what is yet to be written of the answer."""

    def __init__(self, client: socket.socket) -> None:
        self.socket = client
        self.request = bytearray()
        self.answer: memoryview | None = None
        self.is_answered = False
        self.ends_at = monotonic() + _PATIENCE
        client.setblocking(False)

    def read(self) -> bool:
        """Whether to go on; what comes after the request is thrown away."""
        data = self.socket.recv(_AT_ONCE)
        if self.answer is None:
            self.request += data
        return bool(data)

    @property
    def is_writing(self) -> bool:
        """Whether some of the answer is yet to be sent."""
        return self.answer is not None and not self.is_answered

    def head(self) -> bytes | None:
        """The request without its body; more than `_MOST_BYTES` if it is longer than any may be; None if it goes on."""
        end = _BLANK_LINE.search(self.request)
        if end is None and len(self.request) <= _MOST_BYTES:
            return None
        return bytes(self.request[: end.end()] if end else self.request)

    def write(self) -> bool:
        """Whether to go on."""
        assert self.answer is not None
        self.answer = self.answer[self.socket.send(self.answer[:_AT_ONCE]) :]
        return bool(len(self.answer)) or self.finish()

    def finish(self) -> bool:
        """Say that this was all, and read on: closed with something unread, the kernel would take back the answer."""
        self.is_answered = True
        self.socket.shutdown(socket.SHUT_WR)
        self.ends_at = monotonic() + _LINGER
        return True


class Server:
    """Answers whoever comes to the listener, until there is something to read from `end`.

    Bounded: in connections, the oldest of which makes room for the next; in seconds for each; in bytes of a request.
    """

    def __init__(self, listener: socket.socket, end: socket.socket, answer: Answering) -> None:
        self._listener = listener
        self._end = end
        self._answer = answer
        self._connections: dict[socket.socket, _Connection] = {}  # the oldest first

    def serve(self) -> None:
        """Do so, and leave no connection behind."""
        with ExitStack() as stack:
            self._selector = stack.enter_context(selectors.DefaultSelector())
            stack.callback(self._close_all)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._end, selectors.EVENT_READ)
            while True:
                ready = [key for key, _ in self._selector.select(self._until_the_first_ends())]
                for key in ready:
                    if key.fileobj is self._end:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data.socket in self._connections:  # and has not just made room
                        self._attend(key.data)
                self._close_late()

    def _until_the_first_ends(self) -> float | None:
        ends = [connection.ends_at for connection in self._connections.values()]
        return max(min(ends) - monotonic(), 0) if ends else None

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone already
            return
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._close_oldest():
                sleep(_NO_DESCRIPTOR)
            return
        if len(self._connections) >= _MOST_CONNECTIONS:
            self._close_oldest()
        connection = self._connections[client] = _Connection(client)
        self._selector.register(client, selectors.EVENT_READ, connection)

    def _attend(self, connection: _Connection) -> None:
        try:
            goes_on = connection.write() if connection.is_writing else connection.read()
        except BlockingIOError:
            return
        except OSError:  # the client has gone
            goes_on = False
        if not goes_on:
            self._close(connection)
        elif connection.answer is None:
            head = connection.head()
            if head is not None:
                self._respond(connection, head)
        elif connection.is_answered:
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)

    def _respond(self, connection: _Connection, head: bytes) -> None:
        request = _Request(head, self._answer)
        connection.answer = memoryview(request.written.getvalue())
        connection.ends_at = monotonic() + _PATIENCE
        self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)

    def _close_late(self) -> None:
        now = monotonic()
        for connection in [one for one in self._connections.values() if one.ends_at <= now]:
            self._close(connection)

    def _close_oldest(self) -> bool:
        if not self._connections:
            return False
        self._close(next(iter(self._connections.values())))
        return True

    def _close_all(self) -> None:
        while self._close_oldest():
            pass

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.socket]
        self._selector.unregister(connection.socket)
        connection.socket.close()
