"""`ebpfstream run`: a configuration as a process of its own, with real signals, files, users."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kernel import objects
from tests.kernel.test_cli import COMMAND, true, wait_until

pytestmark = pytest.mark.kernel

NOBODY = 65534
HELLO = Path(__file__).parents[2] / "examples" / "hello.c"


class Running:
    """The service, and how to ask it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.folder, self.process, self._log = folder, process, log

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["event"] == event]

    def wait_for(self, event: str, times: int = 1) -> dict[str, Any]:
        wait_until(lambda: len(self.said(event)) >= times, self.process)
        return self.said(event)[-1]

    def lines(self, name: str = "execs.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def hang_up(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def ledger(self, source: str = "execve") -> dict[str, Any]:
        (line,) = [
            line for line in self.log() if "ledger" in line and line["event"].startswith(f"{source}: ")
        ]
        found: dict[str, Any] = line["ledger"]
        return found

    def get(self, path: str) -> tuple[int, str]:
        address = self.said("forwarding")[0]["listen"]
        try:
            with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def configuration(folder: Path, source: str = "", sink: str = "", service: str = "") -> str:
    return f"""
[service]
listen = "127.0.0.1:0"
lock_folder = "{folder}/locks"
{service}
[[source]]
kind = "execve"
{source}
[[source.sink]]
address = "file:{folder}/execs.jsonl"
{sink}
"""


@contextmanager
def running(
    folder: Path,
    text: str,
    *,
    ready: bool = True,
    environment: dict[str, str] | None = None,
    stdout: int | None = None,
) -> Iterator[Running]:
    path, log = folder / "service.toml", folder / "log"
    path.write_text(text)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*COMMAND, "run", str(path)], stdout=stdout, stderr=stderr, env=os.environ | (environment or {})
        )
    with process:
        try:
            service = Running(folder, process, log)
            if ready:
                service.wait_for("forwarding")
            yield service
        finally:
            process.kill()


def ours(lines: list[dict[str, Any]], marker: str) -> list[tuple[int, str]]:
    return [(line["pid"], line["args"][2]) for line in lines if line["args"][1:2] == [marker]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_delivers_what_has_happened(tmp_path: Path, number: signal.Signals) -> None:
    with running(tmp_path, configuration(tmp_path)) as service:
        pids = [true("end", str(index)) for index in range(50)]
        assert service.end(number) == 0
    assert ours(service.lines(), "end") == [(pid, str(index)) for index, pid in enumerate(pids)]
    ledger = service.ledger()
    (sink,) = ledger["sinks"]
    assert (
        ledger["stream"]["tried"]
        == ledger["stream"]["delivered"]
        == sink["acknowledged"]
        == len(service.lines())
    )
    assert [line["signal"] for line in service.said("ending")] == [number.name]


def test_privileges_are_gone_in_every_thread(tmp_path: Path) -> None:
    """And what is attached goes on; the file is root's still."""
    with running(tmp_path, configuration(tmp_path)) as service:
        for thread in Path(f"/proc/{service.process.pid}/task").iterdir():
            status = (thread / "status").read_text()
            assert re.findall(r"^Cap(?:Prm|Eff|Bnd|Inh|Amb):\t(\w+)$", status, re.M) == ["0" * 16] * 5
            assert "\nNoNewPrivs:\t1\n" in status
            assert "\nUid:\t0\t0\t0\t0\n" in status
        pid = true("dropped", "0")
        wait_until(lambda: ours(service.lines(), "dropped"), service.process)
        assert service.end() == 0
    assert ours(service.lines(), "dropped") == [(pid, "0")]
    assert service.said("privileges dropped")[0]["kept"] == []


def test_it_goes_on_as_another_user(tmp_path: Path) -> None:
    """Whose the files are that it makes then; a folder that is not the user's is a clear error."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o011)
    os.chown(theirs, NOBODY, -1)
    text = configuration(theirs, service='user = "nobody"')
    with running(tmp_path, text) as service:
        for thread in Path(f"/proc/{service.process.pid}/task").iterdir():
            status = (thread / "status").read_text()
            assert f"\nUid:{f'{chr(9)}{NOBODY}' * 4}\n" in status
            assert re.findall(r"^Cap(?:Prm|Eff|Bnd):\t(\w+)$", status, re.M) == ["0" * 16] * 3
        pid = true("user", "0")
        assert service.end() == 0
    assert (theirs / "execs.jsonl").stat().st_uid == NOBODY
    service.folder = theirs
    assert ours(service.lines(), "user") == [(pid, "0")]
    with running(tmp_path, text.replace("/theirs/execs", "/execs"), ready=False) as service:
        assert service.process.wait(30) == 1
    (error,) = [line["event"] for line in service.log() if line["level"] == "error"]
    assert f"cannot open {tmp_path}/execs.jsonl: Permission denied" in error


def test_kept_privileges_are_asked_for(tmp_path: Path) -> None:
    with running(tmp_path, configuration(tmp_path, service="drop_privileges = false")) as service:
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert "\nCapEff:\t0000000000000000\n" not in status
        assert service.end() == 0


def test_hanging_up_opens_files_anew(tmp_path: Path) -> None:
    """As logrotate lets it do; each event is in one of both."""
    with running(tmp_path, configuration(tmp_path)) as service:
        before = true("rotated", "0")
        wait_until(lambda: ours(service.lines(), "rotated"), service.process)
        (tmp_path / "execs.jsonl").rename(tmp_path / "old.jsonl")
        service.hang_up()
        service.wait_for("reloaded")
        wait_until((tmp_path / "execs.jsonl").exists, service.process)
        after = true("rotated", "1")
        assert service.end() == 0
    assert ours(service.lines("old.jsonl"), "rotated") == [(before, "0")]
    assert ours(service.lines(), "rotated") == [(after, "1")]


def test_hanging_up_applies_what_has_changed(tmp_path: Path) -> None:
    """Filters in the kernel, the condition, the fields, the level; not the size of the buffer, which it says."""
    first = configuration(tmp_path, source="where = \"args[1:2] == ('changed',) and args[2] < '2'\"")
    second = configuration(
        tmp_path,
        source="""where = "args[1:2] == ('changed',) and args[2] != '2'"
fields = ["pid", "args"]
buffer_size = "1MiB"
[source.filters]
comm = "true"
""",
        service='log_level = "warning"',
    )
    with running(tmp_path, first) as service:
        for index in range(3):
            true("changed", str(index))
        wait_until(lambda: len(service.lines()) >= 2, service.process)
        (tmp_path / "service.toml").write_text(second)
        service.hang_up()
        service.wait_for("some of what has changed needs a restart")
        for index in range(4):
            true("changed", str(index))
        subprocess.run(["/bin/echo", "changed", "9"], check=True, stdout=subprocess.DEVNULL)
        service.hang_up()  # what needs a restart still does
        service.wait_for("some of what has changed needs a restart", times=2)
        assert service.end() == 0
    lines = service.lines()
    assert [line["args"][2] for line in lines] == ["0", "1", "0", "1", "3"]
    assert [len(line) > 2 for line in lines] == [True, True, False, False, False]
    assert service.said("some of what has changed needs a restart")[0]["keys"] == [
        "source.execve.buffer_size"
    ]
    assert not service.said("ending")  # below the new level


def test_a_broken_configuration_is_not_applied(tmp_path: Path) -> None:
    with running(tmp_path, configuration(tmp_path)) as service:
        (tmp_path / "service.toml").write_text(configuration(tmp_path, source="bufer = 3"))
        service.hang_up()
        wait_until(lambda: any(line["level"] == "error" for line in service.log()), service.process)
        true("goes on", "0")
        assert service.end() == 0
    (error,) = [line["event"] for line in service.log() if line["level"] == "error"]
    assert "there is no key 'bufer'; did you mean 'buffer'?" in error
    assert ours(service.lines(), "goes on")


def test_a_configuration_runs_once(tmp_path: Path) -> None:
    with running(tmp_path, configuration(tmp_path)) as service:
        second = subprocess.run(
            [*COMMAND, "run", str(tmp_path / "service.toml")], capture_output=True, text=True, timeout=60
        )
        assert service.end() == 0
    assert second.returncode == 1
    assert f"runs already, as process {service.process.pid}" in second.stderr


def test_health_and_metrics(tmp_path: Path) -> None:
    with running(tmp_path, configuration(tmp_path, source='name = "execs"')) as service:
        assert service.get("/healthz")[0] == 200
        assert service.get("/readyz")[0] == 200
        true("metrics", "0")
        wait_until(lambda: ours(service.lines(), "metrics"), service.process)
        status, metrics = service.get("/metrics")
        assert service.end() == 0
    assert status == 200
    assert re.search(
        r'^ebpfstream_sink_acknowledged_events_total\{sink="file",source="execs"\} [1-9]', metrics, re.M
    )


def test_systemd_is_told(tmp_path: Path) -> None:
    """Ready when everything is attached and open, that it lives, reloading, stopping; in this order."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(30)

        def told() -> str:
            while (message := systemd.recv(4096).decode()) == "WATCHDOG=1":
                pass
            return message

        environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"}
        with running(tmp_path, configuration(tmp_path), ready=False, environment=environment) as service:
            assert told() == "READY=1\nSTATUS=forwarding execve"
            assert objects.attached(service.process.pid) == 1
            assert [systemd.recv(4096) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            service.hang_up()
            assert told().startswith("RELOADING=1\nMONOTONIC_USEC=")
            assert told() == "READY=1"
            assert service.end() == 0
            assert told() == "STOPPING=1"


def test_a_program_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "hello.c").write_text(HELLO.read_text())
    text = f"""
[service]
listen = ""
lock_folder = "{tmp_path}/locks"
[[source]]
name = "hello"
kind = "program"
file = "hello.c"
attach = ["syscall:execve=hello"]
[[source.sink]]
address = "file:{tmp_path}/hello.jsonl"
[[source]]
kind = "syscalls"
calls = ["getpriority"]
[source.filters]
comm = "nice"
[[source.sink]]
address = "file:{tmp_path}/calls.jsonl"
"""
    with running(tmp_path, text) as service:
        pids = [true("own", str(index)) for index in range(5)]
        subprocess.run(["nice", "true"], check=True)
        assert service.end() == 0
    seen = [line["pid"] for line in service.lines("hello.jsonl") if line["pid"] in pids]
    assert seen == pids
    assert {(line["comm"], line["name"]) for line in service.lines("calls.jsonl")} == {
        ("nice", "getpriority")
    }
    assert objects.attached(os.getpid()) == 0


def test_a_sink_that_fails_ends_it_with_its_error(tmp_path: Path) -> None:
    """Here one whose queue is full, since nobody reads what it writes."""
    text = configuration(tmp_path, sink='when_full = "fail"\nqueue_size = 1')
    text = text.replace(f"file:{tmp_path}/execs.jsonl", "stdout:")
    with running(tmp_path, text, stdout=subprocess.PIPE) as service:
        deadline = time.monotonic() + 60
        while service.process.poll() is None:
            assert time.monotonic() < deadline
            true("x" * 3000)
        assert service.process.returncode == 1
    (error,) = [line["event"] for line in service.log() if line["level"] == "error"]
    assert "the queue of stdout is full" in error


def test_what_was_lost_at_the_end_is_its_status(tmp_path: Path) -> None:
    """A second signal ends it at once: what a slow disk did not take is dropped, and that is said."""
    os.mkfifo(tmp_path / "slow")
    reader = os.open(tmp_path / "slow", os.O_RDONLY | os.O_NONBLOCK)
    text = configuration(tmp_path).replace(f"file:{tmp_path}/execs.jsonl", "stdout:")
    path = tmp_path / "service.toml"
    path.write_text(text)
    writer = os.open(tmp_path / "slow", os.O_WRONLY)
    log = tmp_path / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen([*COMMAND, "run", str(path)], stdout=writer, stderr=stderr)
    with process:
        service = Running(tmp_path, process, log)
        service.wait_for("forwarding")
        for index in range(1000):
            true("x" * 200, str(index))
        process.send_signal(signal.SIGTERM)
        service.wait_for("ending")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 3
    os.close(reader)
    os.close(writer)
    (sink,) = service.ledger()["sinks"]
    assert sink["dropped"] > 0
    assert sink["accepted"] == sink["acknowledged"] + sink["dropped"]


def test_the_example_runs(tmp_path: Path) -> None:
    """As it is, but for the places where it writes."""
    made = subprocess.run([*COMMAND, "config", "init"], capture_output=True, text=True, check=True).stdout
    for source in tomllib.loads(made)["source"]:
        for sink in source["sink"]:
            made = made.replace(sink["address"], f"file:{tmp_path}/execs.jsonl")
    made = made.replace("[service]", f'[service]\nlock_folder = "{tmp_path}/locks"\nlisten = ""', 1)
    with running(tmp_path, made) as service:
        true("example", "0")
        assert service.end() == 0
    assert ours(service.lines(), "example")


def refused(*arguments: str, status: int = 1) -> str:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    return done.stderr


def test_configurations_are_made_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "new.toml"
    subprocess.run([*COMMAND, "config", "init", str(path)], check=True)
    done = subprocess.run(
        [*COMMAND, "config", "check", str(path)], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\w+: execve to \w+\n", done.stdout)
    assert f"{path} is there already" in refused("config", "init", str(path))
    text = path.read_text()
    for name in ([], ["-"]):
        printed = subprocess.run(
            [*COMMAND, "config", "init", *name], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert printed.stdout == text
    assert list(tmp_path.iterdir()) == [path]
    path.write_text(f"{text}\nnonsense = 1\n")
    said = refused("config", "check", str(path))
    assert f"{path}:{len(text.splitlines()) + 2}: " in said
    assert "'nonsense'" in said
    assert said == refused("run", str(path), status=os.EX_CONFIG)


def test_without_its_libraries_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pydantic'] = None; from ebpfstream import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "x.toml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "pip install 'ebpfstream[service]'" in done.stderr
