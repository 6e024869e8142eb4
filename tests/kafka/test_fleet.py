"""docs/guides/fleet.md, as it stands there: its commands in their order, in two terminals, and what becomes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.kafka import client
from tests.test_docs import ROOT, fences

pytestmark = [pytest.mark.kafka, pytest.mark.kernel, pytest.mark.timeout(300)]

PAGE: Final = ROOT / "docs/guides/fleet.md"
FLEET: Final = ROOT / "examples/fleet"
NAMES: Final = ("web", "db", "mail")
SERVERS: Final = "198.51.100.1:9092"
MADE: Final = (Path("/var/lib/ebpfstream-fleet"), Path("/sys/class/net/fleet-bridge"))
NUMBERS: Final = 2000


def of_terminal(number: int) -> list[str]:
    return [text for text in fences(PAGE, "sh") if text.startswith(f"# terminal {number}\n")]


# What `make` does, in a folder where there is no Makefile.
(FIRST,) = (
    re.sub(
        r"make kafka HOST=(\S+) PARTITIONS=(\S+)",
        r"exec .venv/bin/python -m tests.kafka.broker --host \1 --port 9092 --partitions \2",
        text,
    )
    for text in of_terminal(1)
)
*SECOND, AFTERWARDS = of_terminal(2)


def hosts(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(FLEET / "hosts"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


def what_is_left() -> list[str]:
    """Of hosts, on this machine; a cgroup is there for as long as one of its processes, and namespaces no longer."""
    links = [path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith("fleet-")]
    (cgroups,) = re.findall(r"(?m)^\S+ (\S+) cgroup2 ", Path("/proc/mounts").read_text())[:1]
    places = [str(path) for path in (*MADE, Path(cgroups, "ebpfstream-fleet")) if path.exists()]
    return [*links, *places]


class Shell:
    """Runs commands as a terminal's shell does, one after another; Ctrl-C is for all of them."""

    def __init__(self, text: str, folder: Path, name: str) -> None:
        (folder / f"{name}.sh").write_text(text)
        self.log = folder / f"{name}.out"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", f"{name}.sh"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )

    def end(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        self.process.wait(60)


@dataclass
class Evidence:
    """What is there when the second terminal's commands have ended, but for the last."""

    folder: Path
    output: str
    records: list[client.Record]
    left: list[str]

    def execs(self) -> dict[str, list[tuple[str, int, int, int, str]]]:
        """By host: stream, CPU, program, sequence number, command line."""
        found = defaultdict(list)
        database = sqlite3.connect(self.folder / "build/fleet/execs.db")
        for host, *rest in database.execute(
            "SELECT host, stream, cpu, program, sequence, message FROM execs"
        ):
            found[host].append(tuple(rest))
        database.close()
        return found

    def log(self, host: str) -> list[dict[str, object]]:
        return [
            json.loads(line) for line in (self.folder / f"build/fleet/{host}.log").read_text().splitlines()
        ]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    assert what_is_left() == [], "somebody tries the fleet: `examples/fleet/hosts down` ends that"
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / ".venv").symlink_to(sys.prefix)
    first = second = None
    try:
        first = Shell(FIRST, folder, "first")
        until = time.monotonic() + 60
        while f"is at {SERVERS}" not in (shown := first.log.read_text()):
            assert first.process.poll() is None, shown
            assert time.monotonic() < until, shown
            time.sleep(0.1)
        script = "".join(f"{text}echo fence {number}: $?\n" for number, text in enumerate(SECOND))
        second = Shell(script, folder, "second")
        second.process.wait(180)
        records = client.read_all(SERVERS, "execs")
        os.killpg(first.process.pid, signal.SIGINT)
        assert first.process.wait(60) == 0, first.log.read_text()
        subprocess.run(["bash", "-c", AFTERWARDS], cwd=folder, check=True, timeout=60)
        yield Evidence(folder, second.log.read_text(), records, what_is_left())
    finally:
        hosts("down")
        for shell in (first, second):
            if shell is not None:
                shell.end(signal.SIGKILL)


def test_the_page_s_commands_do_what_they_should(evidence: Evidence) -> None:
    statuses = re.findall(r"(?m)^fence (\d+): (\d+)$", evidence.output)
    assert statuses == [(str(number), "0") for number in range(len(SECOND))], evidence.output
    assert evidence.left == []
    for host in NAMES:
        entries = evidence.log(host)
        assert [entry["event"] for entry in entries if entry["event"] in ("forwarding", "ending")] == [
            "forwarding",
            "ending",
        ]
        assert "ledger" in entries[-1]


def test_one_host_was_cut_off_and_one_worker_was_killed(evidence: Evidence) -> None:
    warned = [str(entry["event"]) for entry in evidence.log("db") if entry["level"] == "warning"]
    assert f"Kafka at {SERVERS} does not acknowledge what is sent to 'execs'" in warned[0]
    assert f"Kafka at {SERVERS}: going on" in warned
    # The page's `tail` has shown it.
    assert warned[0] in evidence.output
    assert re.search(r" Killed +\.venv/bin/python examples/fleet/worker\.py two\n", evidence.output)


def test_everything_is_there_once(evidence: Evidence) -> None:
    execs = evidence.execs()
    assert set(execs) == set(NAMES)
    for found in execs.values():
        numbered = Counter(message for *_, message in found if message.startswith("/bin/true "))
        assert numbered == Counter(f"/bin/true {number}" for number in range(1, NUMBERS + 1))
        sequences = defaultdict(list)
        for stream, cpu, program, sequence, _ in found:
            sequences[stream, cpu, program].append(sequence)
        assert {stream for stream, *_ in sequences} == {found[0][0]}
        for numbers in sequences.values():
            assert sorted(numbers) == list(range(len(numbers)))


def test_the_table_is_what_the_topic_has(evidence: Evidence) -> None:
    """As another client sees it; and what the hosts say that they have shipped."""
    topic: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for record in evidence.records:
        named = {key: value.decode() for key, value in record.headers}
        assert named["schema"].startswith("exec-event/")
        topic[named["host"]][named["stream"], named["sequence"]] += 1
    assert {record.partition for record in evidence.records} == set(range(6))
    for host, found in evidence.execs().items():
        table = {(stream, f"{cpu}/{program}/{sequence}") for stream, cpu, program, sequence, _ in found}
        assert len(table) == len(found)
        assert topic[host].keys() == table
        ledger = evidence.log(host)[-1]["ledger"]
        assert isinstance(ledger, dict)
        (sink,) = ledger["sinks"]
        assert sink["acknowledged"] == sink["accepted"] == ledger["stream"]["tried"] == len(table)


def test_the_page_shows_what_comes_of_it(evidence: Evidence) -> None:
    """But for how many execs there were beside those that are numbered, and which worker was the first."""
    rows = re.findall(r"(?m)^(\w+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", evidence.output)
    assert [row[0] for row in rows] == sorted(NAMES)
    for host, shipped, arrived, _, *rest in rows:
        assert shipped == arrived == str(len(evidence.execs()[host]))
        assert rest == ["0", "0", str(NUMBERS)]
    (shown,) = [text for text in fences(PAGE, "text") if text.startswith("host ")]
    printed = evidence.output[evidence.output.index("host ") :]
    printed = printed[: printed.index("\ncomplete\n")] + "\ncomplete\n"
    assert [re.sub(r" *\d+", " N", text) for text in (shown, printed)] == [re.sub(r" *\d+", " N", shown)] * 2
    (warning,) = [text for text in fences(PAGE, "text") if text.startswith("{")]
    assert json.loads(warning)["event"] in [entry["event"] for entry in evidence.log("db")]


def test_the_page_shows_what_there_is() -> None:
    assert fences(PAGE, "toml") == [(FLEET / "fleet.toml").read_text()]
    (fragment,) = re.findall(r"(?ms)^```\{ \.python \.no-test \}\n(.*?)^```$", PAGE.read_text())
    parts = [re.escape(part.strip()) for part in re.split(r"\n *…\n", fragment)]
    rest = r"\n(?:.*\n)*? *"
    worker = re.sub(r"(?m)^ +", "", (FLEET / "worker.py").read_text())
    assert re.search(rest.join(re.sub(r"\n(\\ )*", r"\n", part) for part in parts), worker)


# --- what is wrong is seen


def planted(evidence: Evidence, folder: Path, change: str) -> subprocess.CompletedProcess[str]:
    """What verify.py says when something else is in the table."""
    shutil.copytree(evidence.folder / "build/fleet", folder / "fleet")
    database = sqlite3.connect(folder / "fleet/execs.db")
    with database:
        assert database.execute(change).rowcount == 1
    database.close()
    command = [sys.executable, str(FLEET / "verify.py"), str(NUMBERS), "--folder", "fleet", "--wait", "0"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("which", "missing"), [("= 0", 1), ("= 500", 1), ("= LAST", 0)])
def test_an_event_that_is_missing_is_seen(
    which: str, missing: int, evidence: Evidence, tmp_path: Path
) -> None:
    """The first of a CPU and one in between by their numbers; the last by the host's ledger."""
    which = which.replace("LAST", "(SELECT max(sequence) FROM execs WHERE host = 'db' AND cpu = 0)")
    done = planted(
        evidence, tmp_path, f"DELETE FROM execs WHERE host = 'db' AND cpu = 0 AND sequence {which}"
    )
    assert (done.returncode, done.stderr) == (1, "")
    (row,) = re.findall(r"(?m)^db +(\d+) +(\d+) +\d+ +(\d+) +0 +(\d+)$", done.stdout)
    assert (int(row[0]) - int(row[1]), int(row[2])) == (1, missing)
    assert done.stdout.endswith("\nNOT COMPLETE\n")


@pytest.mark.parametrize(("message", "numbered"), [("/bin/false 7", NUMBERS - 1), ("/bin/true 8", NUMBERS)])
def test_an_event_that_is_another_s_is_seen(
    message: str, numbered: int, evidence: Evidence, tmp_path: Path
) -> None:
    change = f"UPDATE execs SET message = '{message}' WHERE host = 'web' AND message = '/bin/true 7'"
    done = planted(evidence, tmp_path, change)
    assert done.returncode == 1
    assert re.search(rf"(?m)^web .* {numbered}$", done.stdout)
    assert done.stdout.endswith("\nNOT COMPLETE\n")


def test_a_loss_that_was_told_is_seen(evidence: Evidence, tmp_path: Path) -> None:
    change = "INSERT INTO losses SELECT host, boot, stream, 0, 3, 1, 3, time FROM execs WHERE host = 'mail' LIMIT 1"
    done = planted(evidence, tmp_path, change)
    assert done.returncode == 1
    assert re.search(r"(?m)^mail +\d+ +\d+ +\d+ +0 +3 ", done.stdout)


# --- the hosts


@pytest.fixture
def no_hosts() -> Iterator[None]:
    assert what_is_left() == [], "somebody tries the fleet: `examples/fleet/hosts down` ends that"
    yield
    assert hosts("down").returncode == 0
    assert what_is_left() == []


@pytest.mark.usefixtures("no_hosts")
def test_hosts_are_not_made_twice() -> None:
    assert hosts("up").returncode == 0
    again = hosts("up")
    assert again.returncode == 1
    assert (
        f"hosts: there is /var/lib/ebpfstream-fleet already: `{FLEET}/hosts down` removes it" in again.stderr
    )
    # And they are there still, each for itself; what runs there goes with them.
    for name in NAMES:
        assert hosts("exec", name, "cat", "/proc/sys/kernel/hostname").stdout == f"{name}\n"
        assert hosts("exec", name, "pwd", cwd=FLEET).stdout == f"{FLEET}\n"
    with subprocess.Popen([str(FLEET / "hosts"), "exec", "db", "sleep", "infinity"]) as sleeping:
        assert hosts("down").returncode == 0
        assert sleeping.wait(10) == -signal.SIGKILL


@pytest.mark.usefixtures("no_hosts")
def test_what_is_half_made_is_removed(tmp_path: Path) -> None:
    """The third cable is not to be had."""
    (tmp_path / "ip").write_text(
        f'#!/bin/sh\ncase "$*" in *"add fleet-mail "*) exit 9 ;; esac\nexec {shutil.which("ip")} "$@"\n'
    )
    (tmp_path / "ip").chmod(0o755)
    failed = hosts("up", env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert failed.returncode == 9
    assert what_is_left() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cut", "db"], "there are no hosts"),
        (["exec", "db", "true"], "there are no hosts"),
        (["mend", "ftp"], "there is no host 'ftp': name one of web db mail"),
        (["exec"], "there is no host ''"),
    ],
)
@pytest.mark.usefixtures("no_hosts")
def test_what_hosts_refuses(arguments: list[str], said: str) -> None:
    done = hosts(*arguments)
    assert done.returncode == 1
    assert f"hosts: {said}" in done.stderr


def test_hosts_are_root_s() -> None:
    command = ["sh", "-s", "up"]
    with (FLEET / "hosts").open() as script:
        done = subprocess.run(command, stdin=script, capture_output=True, text=True, user=65534, cwd="/")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "hosts: only root can make hosts: say it with sudo\n"
