"""What systemd gets to hear, on real sockets: gone, full, and back again."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebpfstream.service.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """As it stands in NOTIFY_SOCKET."""
    return str(tmp_path / "notify") if request.param == "path" else f"@ebpfstream-test-{os.getpid()}"


def listening(address: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind("\0" + address[1:] if address.startswith("@") else address)
    return made


@pytest.fixture
def systemd(address: str) -> Iterator[socket.socket]:
    with listening(address) as made:
        yield made


def heard(systemd: socket.socket) -> list[str]:
    """The messages that are there."""
    messages = []
    while True:
        try:
            messages.append(systemd.recv(1 << 16, socket.MSG_DONTWAIT).decode())
        except BlockingIOError:
            return messages


def test_each_message(systemd: socket.socket, address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready()
    notifier.ready("3 sources")
    notifier.status("17 events")
    notifier.alive()
    notifier.alive()
    notifier.stopping()
    notifier.close()
    notifier.close()
    notifier.status("too late")
    assert heard(systemd) == [
        "READY=1",
        "READY=1\nSTATUS=3 sources",
        "STATUS=17 events",
        "WATCHDOG=1",
        "WATCHDOG=1",
        "STOPPING=1",
    ]


def test_reloading_says_when(systemd: socket.socket, address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.reloading()
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    (message,) = heard(systemd)
    state, moment = message.split("\n")
    assert state == "RELOADING=1"
    assert moment.startswith("MONOTONIC_USEC=")
    assert before <= int(moment.partition("=")[2]) <= after
    notifier.close()


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        ("one\nSTOPPING=1", "one STOPPING=1"),
        ("a\r\nb\x0bc\u2028d", "a b c d"),
        ("\x1b[31mred\x9b", "\\u001b[31mred\\u009b"),
        ("\udcff", "\\udcff"),
        ("é" * 600, "é" * 500),
    ],
)
def test_a_status_is_one_line(status: str, sent: str, tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with listening(path) as systemd:
        notifier = Notifier({"NOTIFY_SOCKET": path})
        notifier.status(status)
        notifier.ready(status)
        assert heard(systemd) == [f"STATUS={sent}", f"READY=1\nSTATUS={sent}"]
        notifier.close()


def say_everything(notifier: Notifier) -> None:
    for say in (notifier.ready, notifier.reloading, notifier.stopping, notifier.alive, notifier.close):
        say()
    notifier.status("nobody hears it")


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234"])
def test_without_systemd(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"} if address else {})
    assert notifier.watchdog_interval is None
    say_everything(notifier)


def test_nobody_is_there(address: str) -> None:
    say_everything(Notifier({"NOTIFY_SOCKET": address}))


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    say_everything(Notifier({"NOTIFY_SOCKET": str(tmp_path / ("x" * 200))}))


def test_who_comes_later_hears_all_that_still_holds(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("first")
    notifier.status("old")
    notifier.alive()
    notifier.reloading()
    notifier.status("new")
    notifier.ready("second")
    with listening(address) as systemd:
        assert heard(systemd) == []
        notifier.alive()
        reloading, *others = heard(systemd)
        assert reloading.startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert others == ["STATUS=new", "READY=1\nSTATUS=second", "WATCHDOG=1"]
        notifier.alive()
        assert heard(systemd) == ["WATCHDOG=1"]
    notifier.close()


def fill(address: str) -> int:
    """Fill the socket's queue: how many messages that takes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        count = 0
        while True:
            try:
                other.sendto(
                    b"X=1", socket.MSG_DONTWAIT, "\0" + address[1:] if address[0] == "@" else address
                )
            except BlockingIOError:
                return count
            count += 1


def test_a_full_socket_is_not_waited_for(systemd: socket.socket, address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    count = fill(address)
    assert count > 0
    for number in range(100):
        notifier.status(f"{number}")
    notifier.ready()
    assert heard(systemd) == ["X=1"] * count
    notifier.alive()
    assert heard(systemd) == ["STATUS=99", "READY=1", "WATCHDOG=1"]
    notifier.close()


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getppid())}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog(variables: dict[str, str], interval: float | None) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "@nobody", **variables})
    assert notifier.watchdog_interval == interval
    notifier.close()


@pytest.mark.parametrize("start", [Notifier, lambda: Notifier(os.environ)])
def test_children_inherit_nothing(start: Callable[[], Notifier], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NOTIFY_SOCKET": "@nobody", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}

    def inherited() -> set[str]:
        lines = subprocess.run(["env"], check=True, capture_output=True, text=True).stdout.splitlines()
        return {line.partition("=")[0] for line in lines} & set(names)

    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert inherited() == set(names)
    notifier = start()
    assert inherited() == set()
    assert notifier.watchdog_interval == 0.5
    # Nor its socket.
    assert notifier._socket is not None
    assert not os.get_inheritable(notifier._socket.fileno())
    notifier.close()
