"""`ebpfstream doctor` on this machine, and on one that lacks things."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from ebpfstream.doctor import examine
from ebpfstream.kernel.kprobes import kprobes_available
from tests.kernel import objects
from tests.kernel.test_cli import COMMAND, WITHOUT_BCC

pytestmark = pytest.mark.kernel

NEEDED = [
    "kernel",
    "rights",
    "lockdown",
    "kernel's types",
    "BCC",
    "compiling",
    "raw tracepoints",
    "an exec arrives",
]
OTHERS = ["locked memory", "cache", "tracepoints", "kprobes", "ring buffer", "perf buffer"]


def doctor(*options: str, before: Sequence[str] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *COMMAND, "doctor", *options],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=100,
    )


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    return {finding["name"]: finding for finding in told["findings"]}


def test_on_this_machine() -> None:
    done = doctor("--json")
    found = findings(done)
    assert done.returncode == 0, done.stderr
    assert sorted(found) == sorted(NEEDED + OTHERS)
    assert all(found[name]["state"] in ("ok", "unknown") for name in NEEDED)
    assert all(found[name]["needed"] for name in NEEDED if name != "lockdown")
    assert not any(found[name]["needed"] for name in OTHERS)
    assert found["kprobes"]["state"] == ("ok" if kprobes_available() else "missing")
    assert all(found[name]["state"] == "ok" for name in OTHERS if name != "kprobes")
    assert re.fullmatch(r"at this process, \d+\.\d ms after it was begun", found["an exec arrives"]["found"])


@pytest.mark.anyio
async def test_nothing_of_it_stays() -> None:
    def held() -> list[int]:
        return [len(objects.held(kind, os.getpid())) for kind in ("prog", "map", "link")]

    async for _ in examine():  # for what the event loop keeps
        pass
    before, descriptors = held(), len(os.listdir("/proc/self/fd"))
    assert [finding.name async for finding in examine()][-1] == "an exec arrives"
    assert held() == before
    await anyio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("width", [80, 200])
def test_for_people(width: int) -> None:
    """A line for each, in the width that there is; what is missing has its remedy."""
    done = doctor(COLUMNS=str(width))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(len(line) <= width for line in lines)
    first = [line for line in lines if not line.startswith(" ")]
    assert len(first) == len(NEEDED + OTHERS)
    assert all(re.match(r"(ok|none|unknown) +\S", line) for line in first)
    assert "\x1b" not in done.stdout
    if not kprobes_available():
        assert "→ programs of yours use tracepoints" in done.stdout


def test_an_event_at_a_sink(tmp_path: Path) -> None:
    file = tmp_path / "execs.jsonl"
    done = doctor("--json", "--to", f"file:{file}")
    assert findings(done)["an exec arrives"]["found"].startswith("at file")
    (line,) = file.read_text().splitlines()
    assert re.fullmatch(r"ebpfstream-doctor-[0-9a-f]{16}", json.loads(line)["args"][1])


def test_a_sink_that_cannot_be(tmp_path: Path) -> None:
    done = doctor("--json", "--to", f"file:{tmp_path}/missing/execs.jsonl")
    found = findings(done)["an exec arrives"]
    assert done.returncode == 1
    assert (found["state"], found["found"][:11]) == ("missing", "not at file")
    assert "No such file or directory" in found["remedy"]


def test_without_rights() -> None:
    found = findings(doctor("--json", before=("setpriv", "--bounding-set=-all")))
    assert found["rights"]["state"] == found["an exec arrives"]["state"] == "missing"
    assert found["rights"]["found"] == "user 0, without capabilities for it"
    assert "run it as root, or give it the capabilities CAP_BPF and CAP_PERFMON" in found["rights"]["remedy"]
    for name in ("raw tracepoints", "ring buffer"):  # not that the kernel were too old
        assert (found[name]["state"], found[name]["found"]) == ("missing", "the kernel refuses it")
        assert "run it as root" in found[name]["remedy"]


def test_without_a_compiler(tmp_path: Path) -> None:
    found = findings(doctor("--json", before=WITHOUT_BCC, EBPFSTREAM_CACHE=str(tmp_path)))
    assert found["BCC"]["state"] == found["compiling"]["state"] == "missing"
    assert "apt-get install python3-bpfcc" in found["BCC"]["remedy"]
    assert found["raw tracepoints"]["state"] == "unknown"
    assert found["rights"]["state"] == found["ring buffer"]["state"] == "ok"
    assert found["an exec arrives"]["state"] == "missing"


def test_without_a_folder_to_keep_things_in() -> None:
    found = findings(doctor("--json", EBPFSTREAM_CACHE="/proc/none"))
    assert found["cache"]["state"] == "missing"
    assert found["an exec arrives"]["state"] == "ok"
