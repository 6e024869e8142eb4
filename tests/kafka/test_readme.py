"""What the README says of Kafka, as somebody who tries it would do it: three terminals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.test_docs import BROKER, ROOT, commands, fences

pytestmark = [pytest.mark.kafka, pytest.mark.kernel]

README = ROOT / "README.md"
(COMMAND,) = [line.partition("  ")[0] for line in commands(README) if BROKER in line]
EXAMPLES = [code for code in fences(README, "python") if BROKER in code]


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
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """That of a broker which `make kafka` starts, on a port of its own: somebody may have one already."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "@$(VENV)/python -m tests.kafka.broker --port $(PORT)\n" in (ROOT / "Makefile").read_text()
    with Terminal(sys.executable, "-m", "tests.kafka.broker", "--port", str(port), folder=ROOT) as kafka:
        shown = kafka.line()
        assert f"127.0.0.1:{port}" in shown, shown
        yield f"127.0.0.1:{port}"
    assert kafka.program.returncode == 0, kafka.errors


@pytest.mark.parametrize("code", EXAMPLES)
def test_three_terminals(address: str, code: str, tmp_path: Path) -> None:
    command = COMMAND.replace(BROKER, address).split()
    example = [sys.executable, "-u", "-W", "error", "-c", code.replace(BROKER, address)]
    with Terminal(*command, folder=tmp_path) as shipping:
        with (
            subprocess.Popen(["sh", "-c", "while sleep 0.1; do /bin/true shipped; done"]) as producer,
            Terminal(*example, folder=tmp_path) as reading,
        ):
            reading.wait(60)
            producer.kill()
        assert (reading.program.returncode, reading.errors) == (0, "")
        *events, completeness = reading.output.splitlines()
        assert " true /bin/true" in events[-1]
        # It ends where it likes: what other partitions have, of other programs of this machine, it may not have read.
        missing = r"(, (\d+) missing, \2 unexplained)?"
        assert re.fullmatch(
            rf"{socket.gethostname()} [0-9a-f]{{16}}: {len(events)} events{missing}", completeness
        )
    assert shipping.program.returncode == -signal.SIGINT, shipping.errors
    ledger, sent = shipping.errors.splitlines()
    delivered = re.match(r"ebpfstream: (\d+) delivered; ", ledger)
    assert delivered
    assert sent == f"ebpfstream: kafka://{address}/exec: {delivered[1]} of {delivered[1]} events"
