"""What the pages say of Kafka, as somebody who tries it would do it: a broker, what ships, and what reads.

guides/fleet.md and guides/analysis.md have tests of their own.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import pytest
from confluent_kafka import KafkaException

from tests.kafka import client
from tests.kafka.process import free_port
from tests.test_docs import BROKER, PAGES, ROOT, commands, fences, name, write_files

pytestmark = [pytest.mark.kafka, pytest.mark.kernel]

ELSEWHERE: Final = ("docs/guides/fleet.md", "docs/guides/analysis.md")
SHOWING: Final = [page for page in PAGES if name(page) not in ELSEWHERE]
WAIT: Final = 60.0  # seconds; less than ten are usual


def shown_commands(page: Path) -> list[str]:
    """Without what is said of them."""
    return [line.partition("  ")[0] for line in commands(page) if BROKER in line]


COMMANDS: Final = [
    pytest.param(page, command, id=f"{name(page)}-{command}")
    for page in SHOWING
    for command in shown_commands(page)
]
EXAMPLES: Final = [
    pytest.param(page, code, id=f"{name(page)}-{number}")
    for page in SHOWING
    for number, code in enumerate(code for code in fences(page, "python") if BROKER in code)
]
READING: Final = [example for example in EXAMPLES if "KafkaSource(" in str(example.values[1])]
SENDING: Final = [example for example in EXAMPLES if example not in READING]

# What an example that reads shows at its end, by its group; `{events}` are the lines before.  Which `true` it sees
# first is not known: others may run one, too.
HOST: Final = re.escape(socket.gethostname())
TIME: Final = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+\+00:00"
# It ends where it likes: what other partitions have, of other programs of this machine, it may not have read.
SHOWN: Final = {
    "watchers": r"\d+ true .+\n"
    rf"{HOST} [0-9a-f]{{16}}: {{events}} events(, (\d+) missing, \2 unexplained)?",
    "auditors": rf"{TIME} .*true.* /.*",
    "counters": rf"{HOST} [1-9]\d* came (\d+) missing \1 unexplained\ntrue",
    "readers": r"End\(pid=\d+, uid=0, lived=[1-9]\d*, status=0, comm='true'\)",
}


class Terminal:
    """A program that is told to end when its terminal is left; then there is all that it has shown."""

    def __init__(self, *command: str, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.program = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.output = self.errors = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.send_signal(signal.SIGINT)
        self.wait(30)

    def line(self) -> str:
        """The next line of its output."""
        assert self.program.stdout is not None
        return self.program.stdout.readline()

    def wait(self, seconds: float) -> None:
        """Until it has ended."""
        if self.program.returncode is None:
            self.output, self.errors = self.program.communicate(timeout=seconds)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a broker which `make kafka` starts, on a port of its own: somebody may have one already."""
    port = free_port()
    line = "@$(VENV)/python -m tests.kafka.broker --host $(HOST) --port $(PORT) --partitions $(PARTITIONS)\n"
    assert line in (ROOT / "Makefile").read_text()
    with Terminal(sys.executable, "-m", "tests.kafka.broker", "--port", str(port), folder=ROOT) as kafka:
        shown = kafka.line()
        assert f"127.0.0.1:{port}" in shown, shown
        yield f"127.0.0.1:{port}"
    assert kafka.program.returncode == 0, kafka.errors


@pytest.fixture
def address(started: str) -> Iterator[str]:
    """The same, without topics."""
    yield started
    for topic in ("exec", "ends"):
        with _unknown_is_fine():
            client.delete_topic(started, topic)


@contextmanager
def _unknown_is_fine() -> Iterator[None]:
    try:
        yield
    except KafkaException as error:
        if "UNKNOWN_TOPIC" not in str(error):
            raise


@contextmanager
def producer() -> Iterator[None]:
    """Programs are executed that are seen."""
    with subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true shipped; done"]) as process:
        try:
            yield
        finally:
            process.kill()


def topic_of(text: str) -> Any:
    return re.findall(rf'{BROKER}(?:/|", ")(\w+)', text)[0]


def values(address: str, topic: str) -> list[bytes]:
    """What is in a topic, without its losses; nothing if there is no such topic."""
    with _unknown_is_fine():
        records = client.read_all(address, topic)
        return [record.value or b"" for record in records if dict(record.headers)["schema"] != b"lost"]
    return []


def shipping(page: Path, command: str, address: str, folder: Path) -> Terminal:
    command = command.replace(BROKER, address).replace("/var/spool/ebpfstream", f"{folder}/spool")
    if not (folder / "examples").exists():
        write_files(page, folder)
    return Terminal(*shlex.split(command), folder=folder)


def check_shipped(terminal: Terminal, address: str, topic: str) -> None:
    """What it says at its end, and that it is so."""
    assert terminal.program.returncode == -signal.SIGINT, terminal.errors
    ledger, sent = terminal.errors.splitlines()
    delivered = re.match(r"ebpfstream: (\d+) delivered; ", ledger)
    assert delivered
    assert sent == f"ebpfstream: kafka://{address}/{topic}: {delivered[1]} of {delivered[1]} events"
    assert len(values(address, topic)) == int(delivered[1]) > 0


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command(page: Path, command: str, address: str, tmp_path: Path) -> None:
    topic = topic_of(command)
    with shipping(page, command, address, tmp_path) as terminal, producer():
        if " doctor " in command:
            terminal.wait(WAIT)
        until = time.monotonic() + WAIT
        while not any(b'"true"' in value for value in values(address, topic)) and time.monotonic() < until:
            assert terminal.program.poll() is None or " doctor " in command
            time.sleep(0.2)
    if " doctor " in command:
        assert terminal.program.returncode == 0, terminal.output
        assert "an exec arrives" in terminal.output
        assert len(values(address, topic)) == 1
    else:
        check_shipped(terminal, address, topic)


@pytest.mark.parametrize(("page", "code"), READING)
def test_three_terminals(page: Path, code: str, address: str, tmp_path: Path) -> None:
    """While what the page shows for it ships, an example reads."""
    topic = topic_of(code)
    command = next(line for line in shown_commands(page) if topic_of(line) == topic)
    example = [sys.executable, "-u", "-W", "error", "-c", code.replace(BROKER, address)]
    with shipping(page, command, address, tmp_path) as terminal:
        with producer(), Terminal(*example, folder=tmp_path) as reading:
            reading.wait(WAIT)
        assert (reading.program.returncode, reading.errors) == (0, "")
    check_shipped(terminal, address, topic)
    (group,) = re.findall(r'group="(\w+)"', code)
    lines = reading.output.splitlines()
    last = SHOWN[group].replace("{events}", str(len(lines) - 1))
    assert re.fullmatch(last, "\n".join(lines[-1 - last.count("\\n") :])), reading.output


@pytest.mark.parametrize(("page", "code"), SENDING)
def test_sending(page: Path, code: str, address: str, tmp_path: Path) -> None:
    """What an example has sent is in the topic; and what it shows as JSON is the same."""
    write_files(page, tmp_path)
    example = [sys.executable, "-W", "error", "-c", code.replace(BROKER, address)]
    with producer(), Terminal(*example, folder=tmp_path) as terminal:
        terminal.wait(WAIT)
    assert (terminal.program.returncode, terminal.errors) == (0, "")
    sent = values(address, topic_of(code))
    assert any(b'"true"' in value for value in sent)
    shown = [line.encode() for line in terminal.output.splitlines() if line.startswith("{")]
    if shown:
        assert sorted(shown) == sorted(sent)
    else:
        assert terminal.output.splitlines()[-1] == "true"


def test_there_are_examples() -> None:
    assert len(COMMANDS) >= 4
    assert len(READING) >= 4
    assert len(SENDING) >= 2
