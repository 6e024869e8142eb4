"""The endpoint over real sockets: with a loop that answers, with one that does not, with clients that misbehave."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager
from email.message import Message
from functools import partial
from http import HTTPStatus
from http.client import HTTPConnection, HTTPResponse
from typing import Any, NamedTuple

import anyio
import pytest
from anyio.to_thread import run_sync
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError, SinkUnavailableError
from ebpfstream.forwarding import Forwarding
from ebpfstream.service import endpoint as endpoint_module
from ebpfstream.service import http_server
from ebpfstream.service.endpoint import DEFAULT_LISTEN, Endpoint, parse_listen
from ebpfstream.service.http_server import Answer, _Request
from ebpfstream.service.metrics import LedgerCollector
from ebpfstream.statistics import ForwardStatistics
from tests.test_forwarding import Noting, until
from tests.test_service_metrics import LEDGER, samples
from tests.test_stream import Hand, hand, numbers

pytestmark = pytest.mark.anyio
__all__ = ["hand"]

PATIENCE = 30.0  # seconds until a test takes something to hang


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine every loop is held up now and then."""
    monkeypatch.setattr(endpoint_module, "_TURN", PATIENCE)


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


def request(address: str, path: str, method: str = "GET", **headers: str) -> Response:
    with closing(HTTPConnection(address, timeout=PATIENCE)) as connection:
        connection.request(method, path, headers=headers)
        return read(connection.getresponse())


def read(response: HTTPResponse) -> Response:
    return Response(
        response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    )


async def ask(endpoint: Endpoint, path: str, method: str = "GET", **headers: str) -> Response:
    return await run_sync(partial(request, endpoint.address, path, method, **headers))


def exchange(address: str, *sent: bytes) -> bytes:
    """What comes back, to the end."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        try:
            for data in sent:
                client.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        received = b""
        while data := client.recv(1 << 16):
            received += data
        return received


class Nothing:
    def collect(self) -> list[GaugeMetricFamily]:
        return []


def made(listen: str = "127.0.0.1:0", reasons: list[str] | None = None) -> Endpoint:
    return Endpoint(listen, Nothing(), lambda: reasons or [])


def held() -> tuple[list[str], list[str]]:
    """Descriptors and threads."""
    gc.collect()
    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # that of the listing
            continue
    threads = [thread.name for thread in threading.enumerate() if thread.name == "ebpfstream endpoint"]
    return sorted(files), threads


# --- what is answered


async def test_health() -> None:
    async with made() as endpoint:
        response = await ask(endpoint, "/healthz")
    assert (response.status, response.json["healthy"]) == (200, True)
    assert 0 <= response.json["loop_lag_seconds"] < PATIENCE
    assert response.headers["connection"] == "close"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["server"] == "ebpfstream"


async def test_readiness() -> None:
    reasons: list[str] = []
    async with Endpoint("127.0.0.1:0", Nothing(), lambda: reasons) as endpoint:
        assert await ask(endpoint, "/readyz") == (
            *(await ask(endpoint, "/readyz"))[:2],
            b'{"ready": true, "reasons": []}\n',
        )
        reasons += ["exec is not attached", 'a "b" \x1b \udcff é']
        response = await ask(endpoint, "/readyz")
        assert (response.status, response.json) == (503, {"ready": False, "reasons": reasons})
        reasons.clear()
        assert (await ask(endpoint, "/readyz")).status == 200


async def test_metrics_are_those_of_the_ledgers() -> None:
    collector = LedgerCollector(lambda: {"exec": LEDGER})
    expected = samples(collector.collect())
    async with Endpoint("127.0.0.1:0", collector, list) as endpoint:
        plain = await ask(endpoint, "/metrics")
        again = await ask(
            endpoint, "/metrics?name=x", Accept="application/openmetrics-text;version=1.0.0,*/*;q=0.1"
        )
    assert (plain.status, again.status) == (200, 200)
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert again.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    opened = parse_openmetrics(again.body.decode())  # type: ignore[no-untyped-call]
    for found in (samples(parse_text(plain.body.decode())), samples(opened)):
        assert {key: value for key, value in found.items() if dict(key[1]).get("source")} == expected
        assert found["process_open_fds", ()] > 0
        assert found["ebpfstream_loop_lag_most_seconds", ()] >= found["ebpfstream_loop_lag_seconds", ()] > 0


async def test_figures_are_read_on_the_thread_of_the_event_loop() -> None:
    threads = []

    class Noted(Nothing):
        def collect(self) -> list[GaugeMetricFamily]:
            threads.append(threading.get_ident())
            return []

    def ready() -> list[str]:
        threads.append(threading.get_ident())
        return []

    async with Endpoint("127.0.0.1:0", Noted(), ready) as endpoint:
        for path in ("/metrics", "/readyz"):
            assert (await ask(endpoint, path)).status == 200
    assert threads == [threading.get_ident()] * 2


async def test_the_index_and_what_there_is_not() -> None:
    async with made() as endpoint:
        index = await ask(endpoint, "/")
        assert (index.status, index.headers["content-type"]) == (200, "text/html; charset=utf-8")
        for path in ("/metrics", "/healthz", "/readyz"):
            assert f'href="{path}"'.encode() in index.body
            assert (await ask(endpoint, path)).status == 200
        for path in ("/health", "/metrics/", "/../metrics", "/%6detrics", "/" + "x" * 9000):
            response = await ask(endpoint, path)
            assert (response.status, response.body) == (404, b"there are /metrics, /healthz and /readyz\n")


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/readyz", "/none"])
async def test_head_is_get_without_a_body(path: str) -> None:
    async with made(reasons=["x"]) as endpoint:
        get, head = await ask(endpoint, path), await ask(endpoint, path, "HEAD")
        sent = f"HEAD {path} HTTP/1.1\r\n\r\n".encode()
        assert (await run_sync(exchange, endpoint.address, sent)).endswith(b"\r\n\r\n")
    assert (head.status, head.body) == (get.status, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(get.headers["content-length"]) == len(get.body) > 0
    if path in ("/", "/readyz", "/none"):  # the others hold figures
        assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "BREW"])
async def test_other_methods(method: str) -> None:
    async with made() as endpoint:
        response = await ask(endpoint, "/metrics", method)
        body = await run_sync(
            exchange,
            endpoint.address,
            f"{method} / HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n".encode(),
            bytes(5_000_000),
        )
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")
    assert body.startswith(
        b"HTTP/1.1 405 Method Not Allowed\r\n"
    )  # it arrives though nobody reads what was sent
    assert body.endswith(b"only GET and HEAD are possible\n")


async def test_an_error_while_answering_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> list[str]:
        raise ZeroDivisionError("in ready")

    async with Endpoint("127.0.0.1:0", Nothing(), fail) as endpoint:
        with caplog.at_level(logging.ERROR, "ebpfstream"):
            response = await ask(endpoint, "/readyz")
        assert (response.status, response.body) == (500, b"the log has the reason\n")
        assert (await ask(endpoint, "/healthz")).status == 200
    (record,) = caplog.records
    assert record.getMessage() == "/readyz cannot be answered"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def test_requests_say_nothing_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    async with made() as endpoint:
        for path in ("/metrics", "/none"):
            await ask(endpoint, path)
        await run_sync(exchange, endpoint.address, b"rubbish\r\n\r\n")
    assert capfd.readouterr() == ("", "")


# --- a loop that is held up


@contextmanager
def another_thread(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs it meanwhile; what it returned or raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield results
    finally:
        thread.join(PATIENCE)


async def test_a_loop_that_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is released only when all the answers are there: none of them waits for it."""
    monkeypatch.setattr(endpoint_module, "_TURN", 1)
    turns: list[str] = []
    calls: set[Any] = set()
    released = threading.Event()

    def ready() -> list[str]:
        turns.append("ready")
        return []

    def ask_for(path: str) -> Response:
        response = request(endpoint.address, path)
        assert endpoint._loop is not None
        calls.add(endpoint._loop._call)
        return response

    def ask_all() -> list[Response]:
        try:
            return [ask_for(path) for path in ("/readyz", "/healthz", "/metrics", "/readyz", "/")]
        finally:
            released.set()

    async with Endpoint("127.0.0.1:0", Nothing(), ready) as endpoint:
        with another_thread(ask_all) as results:
            assert released.wait(PATIENCE)  # this is the event loop's thread
        monkeypatch.setattr(endpoint_module, "_TURN", PATIENCE)
        await until(
            lambda: endpoint._loop and endpoint._loop._call and endpoint._loop._call.answered.is_set()
        )
        assert (await ask(endpoint, "/healthz")).status == 200
        assert (await ask(endpoint, "/readyz")).status == 200
        most = samples(parse_text((await ask(endpoint, "/metrics")).body.decode()))[
            "ebpfstream_loop_lag_most_seconds", ()
        ]
    (responses,) = results
    assert [response.status for response in responses] == [503, 503, 503, 503, 200]
    reasons = ["the event loop has not answered for 1 s"]
    assert [response.json for response in responses[:3]] == [
        {"ready": False, "reasons": reasons},
        {"healthy": False, "reasons": reasons},
        {"collected": False, "reasons": reasons},
    ]
    assert len(calls) == 1  # they do not pile up, however long that lasts
    assert turns == ["ready"]  # what nobody waits for any more is not done
    assert most >= 1


async def test_closing_does_not_wait_for_a_call_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_TURN", 3600)
    endpoint = made()
    with anyio.fail_after(PATIENCE):
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(endpoint)
            loop = endpoint._loop
            assert loop is not None
            monkeypatch.setattr(loop, "_make", lambda: None)  # its turn never comes
            with another_thread(lambda: request(endpoint.address, "/healthz")) as results:
                await until(lambda: loop._call is not None)
                await stack.aclose()
    if not isinstance(results[0], ConnectionError):  # it may have come too late for an answer
        assert results[0].json == {"healthy": False, "reasons": ["the service is ending"]}


# --- clients that misbehave


def connected(endpoint: Endpoint, sent: bytes = b"") -> socket.socket:
    host, _, port = endpoint.address.rpartition(":")
    client = socket.create_connection((host, int(port)), PATIENCE)
    client.sendall(sent)
    return client


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: x"])
async def test_a_hundred_silent_clients(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest make room: who asks is answered at once."""
    monkeypatch.setattr(http_server, "_PATIENCE", 3600)
    with ExitStack() as clients:
        async with made() as endpoint:
            silent = [clients.enter_context(connected(endpoint, sent)) for _ in range(100)]
            answered = 3
            for _ in range(answered):
                assert (await ask(endpoint, "/healthz")).status == 200
            closed = [is_closed(client) for client in silent]
            assert closed == sorted(closed, reverse=True)  # the oldest
            most = http_server._MOST_CONNECTIONS
            assert most - answered <= closed.count(False) < most
            assert held()[1] == ["ebpfstream endpoint"]
        assert all(map(is_closed, silent))


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_silent_client_is_left_after_some_time(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "_PATIENCE", 0.05)
    async with made() as endpoint:
        assert await run_sync(exchange, endpoint.address, sent) == b""


async def test_a_client_that_sends_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is for the whole request."""
    monkeypatch.setattr(http_server, "_PATIENCE", 0.2)
    async with made() as endpoint:
        client = connected(endpoint)
        with client, anyio.fail_after(PATIENCE):
            while True:
                try:
                    client.sendall(b"x")
                except (BrokenPipeError, ConnectionResetError):
                    break
                await anyio.sleep(0.01)


def is_served(client: socket.socket) -> bool:
    """Whether the other side still has it, which /proc/net/tcp says of every connection: 01 is ESTABLISHED."""
    ours, theirs = (f":{end[1]:04X}" for end in (client.getsockname(), client.getpeername()))
    with open("/proc/net/tcp") as table:
        found = [line.split()[1:4] for line in table]
    return any(local[8:] == theirs and remote[8:] == ours and state == "01" for local, remote, state in found)


async def test_a_client_that_takes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Much(Nothing):
        def collect(self) -> list[GaugeMetricFamily]:
            return [GaugeMetricFamily("much", "x" * (32 << 20), 1)]

    monkeypatch.setattr(http_server, "_PATIENCE", 0.2)
    async with Endpoint("127.0.0.1:0", Much(), list) as endpoint:
        with connected(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n") as client:
            assert is_served(client)
            await anyio.wait_readable(client)
            assert (await ask(endpoint, "/healthz")).status == 200
            await until(lambda: not is_served(client))
        monkeypatch.setattr(http_server, "_PATIENCE", PATIENCE)
        whole = await ask(endpoint, "/metrics")
    assert len(whole.body) == int(whole.headers["content-length"]) > 32 << 20


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ([b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n"], b"414 Request-URI Too Long"),
        ([b"G" * 65_536] * 64, b"414 Request-URI Too Long"),
        (
            [b"GET / HTTP/1.1\r\n", *[b"x: " + b"y" * 1000 + b"\r\n"] * 64],
            b"431 Request Header Fields Too Large",
        ),
        ([b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 150 + b"\r\n"], b"431 Too many headers"),
        ([b"GET / HTTP/2.0\r\n\r\n"], b"505 Invalid HTTP version (2.0)"),
        ([b"GET / HTTP/1.1 x\r\n\r\n"], b"400 Bad request version"),
        ([b"\x16\x03\x01\x02\x00\x01\r\n\r\n"], b"400 Bad request syntax"),  # TLS
        ([b"GET / HTTP/1.1\n\n"], b"200 OK"),
        ([b"GET / ", b"HTTP/1.1\r", b"\n\r", b"\n"], b"200 OK"),
        ([b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n"], b"200 OK"),
        ([b"GET / HTTP/1.0\r\n\r\nGET /none HTTP/1.0\r\n\r\n"], b"200 OK"),
    ],
)
async def test_requests_that_are_unusual(sent: list[bytes], status: bytes) -> None:
    async with made() as endpoint:
        received = await run_sync(exchange, endpoint.address, *sent)
        assert received.count(b"HTTP/1.1 ") == 1
        assert received.startswith(b"HTTP/1.1 " + status), received[:100]
        assert (await ask(endpoint, "/healthz")).status == 200


async def test_a_client_that_goes_at_once() -> None:
    async with made() as endpoint:
        for sent in (b"", b"GET", b"GET /healthz HTTP/1.1\r\n\r\n"):
            for _ in range(50):
                client = connected(endpoint, sent)
                # Closed with a reset.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()
        assert (await ask(endpoint, "/healthz")).status == 200


@given(
    st.lists(
        st.sampled_from([b"GET", b" ", b"/", b"HTTP/1.1", b"\r\n", b"\n", b":", b"\0", b"\xff"]) | st.binary()
    )
)
@settings(deadline=None)
def test_no_request_is_more_than_refused(parts: list[bytes]) -> None:
    """Nothing that is sent may end the thread."""
    asked: list[str] = []

    def answer(path: str, headers: Message) -> Answer:
        asked.append(path)
        return Answer(HTTPStatus.OK, b"body")

    written = _Request(b"".join(parts) + b"\r\n\r\n", answer).written.getvalue()
    if written and not asked:
        assert b" 200 " not in written.partition(b"\n")[0]


async def test_without_a_descriptor_for_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays at the door, and who was there before has to go for it."""
    monkeypatch.setattr(http_server, "_LINGER", 3600)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    ask_health = b"GET /healthz HTTP/1.1\r\n\r\n"
    async with made() as endpoint:
        with connected(endpoint, ask_health) as first, socket.socket() as second:
            assert (await run_sync(first.recv, 12)) == b"HTTP/1.1 200"
            second.settimeout(PATIENCE)
            filling = []
            try:
                highest = max(int(name) for name in os.listdir("/proc/self/fd"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
                with pytest.raises(OSError, match="Too many open files"):
                    while True:
                        filling.append(os.dup(0))
                second.connect(first.getpeername())
                second.sendall(ask_health)
                assert (await run_sync(second.recv, 12)) == b"HTTP/1.1 200"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for fd in filling:
                    os.close(fd)


# --- addresses


@pytest.mark.parametrize(
    ("listen", "expected"),
    [
        (DEFAULT_LISTEN, ("127.0.0.1", 9435)),
        ("[::1]:9435", ("::1", 9435)),
        (":9435", ("127.0.0.1", 9435)),
        (":0", ("127.0.0.1", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("localhost:80", ("localhost", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_addresses(listen: str, expected: tuple[str, int]) -> None:
    assert parse_listen(listen) == expected


@pytest.mark.parametrize(
    "listen",
    ["", ":", "9435", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:http", "::1:9435",
     "[::1]", "[]:80", "[::1:80", "::1]:80", "http://127.0.0.1:80", "a b:80", "x:" + "9" * 5000, "x:\uff11"],
)  # fmt: skip
def test_what_is_no_address(listen: str) -> None:
    with pytest.raises(
        ArgumentError, match=r"is no address: write host:port, such as 127\.0\.0\.1:9435 or \[::1\]:9435"
    ):
        made(listen)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", ""])
async def test_the_real_address_is_told(host: str) -> None:
    async with made(f"{host}:0") as endpoint:
        name, _, port = endpoint.address.rpartition(":")
        assert name == ("[::1]" if host == "[::1]" or "[" in endpoint.address else "127.0.0.1")
        assert 0 < int(port) < 65536
        assert (await ask(endpoint, "/healthz")).status == 200


def test_addresses_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    first = made()
    before = held()
    for listen, message in {
        first.address: "Address already in use: end the process that has this port, or give another one",
        "192.0.2.1:0": "Cannot assign requested address: this machine has no such address",
        "no-such-host.invalid:80": "'no-such-host.invalid' is not known: give an address of this machine",
        "x" * 100 + ":80": "is not known: give an address of this machine",
        "a\0b:80": "is not known: give an address of this machine",
    }.items():
        with pytest.raises(ArgumentError, match=f"listen=.*: .*{message}") as caught:
            made(listen)
        assert repr(listen) in str(caught.value)
    assert held() == before
    first.close()
    with closing(made(first.address)) as again:  # it is free again
        assert again.address == first.address


@pytest.mark.parametrize(
    ("error", "remedy"), [(errno.EACCES, "give a higher one"), (errno.EAFNOSUPPORT, "no IPv6")]
)
def test_other_refusals(error: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root of a machine with IPv6 one does not come to see them."""

    def refuse(self: socket.socket, address: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ArgumentError, match=f"{os.strerror(error)}: .*{remedy}"):
        made()


async def test_the_port_may_be_taken_again_at_once() -> None:
    """Though connections of the one before it linger in the kernel."""
    async with made() as endpoint:
        client = connected(endpoint, b"GET /healthz HTTP/1.1\r\n\r\n")
        await run_sync(client.recv, 1)
    with client:
        async with made(endpoint.address) as again:
            assert (await ask(again, "/healthz")).status == 200


# --- beginning and end


async def test_made_it_has_the_address_and_no_thread() -> None:
    """So that privileges may be given up in between."""
    before = held()
    endpoint = made()
    files, threads = held()
    assert (len(files) - len(before[0]), threads) == (1, [])
    client = connected(endpoint, b"GET /healthz HTTP/1.1\r\n\r\n")  # who comes early waits
    async with endpoint:
        assert (await run_sync(client.recv, 12)) == b"HTTP/1.1 200"
        assert held()[1] == ["ebpfstream endpoint"]
    client.close()
    assert held() == before


async def test_nothing_is_left() -> None:
    async def once() -> None:
        async with made() as endpoint:
            with connected(endpoint), connected(endpoint, b"GET"):
                assert (await ask(endpoint, "/metrics")).status == 200

    await once()
    before = held()
    for _ in range(20):
        await once()
    assert held() == before


async def test_what_the_block_raises_comes_out_as_it_is() -> None:
    before = held()
    for is_cancelled in (False, True):
        with pytest.raises(ZeroDivisionError), anyio.CancelScope() as scope:
            async with made():
                if is_cancelled:
                    scope.cancel()
                raise ZeroDivisionError
        assert held() == before


async def test_cancelled_it_answers_until_the_block_is_left() -> None:
    """A service that ends in good order is still asked how it is."""
    before = held()
    with anyio.CancelScope() as scope:
        async with made() as endpoint:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.01)
                assert (await ask(endpoint, "/healthz")).status == 200
                assert (await ask(endpoint, "/readyz")).status == 200
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert held() == before


async def test_a_task_of_asyncio_that_is_cancelled(anyio_backend_name: str) -> None:
    if anyio_backend_name != "asyncio":
        return
    before, entered = held(), asyncio.Event()

    async def serve() -> None:
        async with made():
            entered.set()
            await asyncio.sleep(PATIENCE)

    task = asyncio.create_task(serve())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert held() == before


# --- a real forwarding


class Fickle(Noting):
    """There or not, as the test says."""

    is_gone = False

    async def send(self, batch: EventBatch[Any]) -> Any:
        if self.is_gone:
            raise SinkUnavailableError("the disk is full")
        return await super().send(batch)


async def test_a_sink_that_is_away(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebpfstream.outlet._FIRST_DELAY", 0.001)
    monkeypatch.setattr("ebpfstream.outlet._LONGEST_DELAY", 0.01)
    sink = Fickle("file:exec.jsonl")
    forwarding = Forwarding(numbers(hand), sink, Noting("other"))

    def ledgers() -> dict[str, ForwardStatistics]:
        return {"exec": forwarding.statistics()}

    def ready() -> list[str]:
        sinks = forwarding.statistics().sinks
        away = [f"{sink.name} is away: {sink.last_error}" for sink in sinks if sink.away]
        return ([] if forwarding.attached.is_set() else ["exec is not attached"]) + away

    async def away() -> list[float]:
        found = samples(parse_text((await ask(endpoint, "/metrics")).body.decode()))
        return [value for (name, _), value in sorted(found.items()) if name == "ebpfstream_sink_away"]

    async with Endpoint("127.0.0.1:0", LedgerCollector(ledgers), ready) as endpoint:
        assert (await ask(endpoint, "/readyz")).json["reasons"] == ["exec is not attached"]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(forwarding.run)
            await forwarding.attached.wait()
            assert (await ask(endpoint, "/readyz")).status == 200
            assert await away() == [0, 0]
            sink.is_gone = True
            hand.submit(1, 2)
            await until(lambda: forwarding.statistics().sinks[0].retries)
            response = await ask(endpoint, "/readyz")
            assert response.status == 503
            assert response.json == {
                "ready": False,
                "reasons": ["file:exec.jsonl is away: the disk is full"],
            }
            assert (await ask(endpoint, "/healthz")).status == 200
            assert await away() == [1, 0]
            sink.is_gone = False
            await until(lambda: sink.numbers)
            assert (await ask(endpoint, "/readyz")).status == 200
            assert await away() == [0, 0]
            forwarding.end()
