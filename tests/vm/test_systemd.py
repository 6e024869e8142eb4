"""The unit of deploy/, run by systemd: started, reloaded, watched, stopped; and what it may do meanwhile.

A machine is booted once, in which inside/systemd/trial.py does all that, and tells what it found.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from ebpfstream.kernel.privileges import Capability
from tests.vm import systemd_machine
from tests.vm.machine import ROOT

LOGS = ROOT / "build/vm/systemd"
MINUTES = 15  # it needs two where nobody else wants the CPUs

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(MINUTES * 60 + 60),
    pytest.mark.skipif(bool(systemd_machine.missing()), reason=systemd_machine.missing()),
]

NONE = "0" * 16


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [systemd_machine.PYTHON, "tests/vm/inside/systemd/trial.py"]
    outcome = systemd_machine.run(command, LOGS, limit=MINUTES * 60)
    lines = outcome.output.splitlines()
    if outcome.code or not lines:
        console = outcome.console.read_text(errors="replace").splitlines()
        pytest.fail("\n".join([f"exit code {outcome.code}", outcome.output, *console[-30:]]), pytrace=False)
    result: dict[str, Any] = json.loads(lines[0])
    if "error" in result:
        pytest.fail(
            "\n".join([result["error"], str(result.get("started")), *result["journal"]]), pytrace=False
        )
    return result


def test_it_starts(found: dict[str, Any]) -> None:
    assert found["started"]["ActiveState"] == "active"  # Type=notify: it has said so
    assert found["started"]["StatusText"] == "forwarding execs"
    assert found["health"] == [200, 200]
    assert 'ebpfstream_stream_delivered_events_total{source="execs"}' in found["metrics"]


def test_it_sees_the_whole_machine(found: dict[str, Any]) -> None:
    assert found["first"]["pid"] == found["pid"]
    assert found["first"]["uid"] == 0


def test_it_has_no_rights_any_more(found: dict[str, Any]) -> None:
    status = found["status"]
    assert [status[each] for each in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [NONE] * 4
    assert set(found["threads"]) == {NONE}
    assert status["Uid"].split()[0] != "0"
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_what_it_leaves_belongs_to_it(found: dict[str, Any]) -> None:
    assert [found[each] for each in ("/var/log/ebpfstream/execs.jsonl", "/var/log/ebpfstream")] == [
        "ebpfstream 600",
        "ebpfstream 750",
    ]
    assert found["/run/ebpfstream"] == "ebpfstream 755"
    assert found["/var/cache/ebpfstream"] == found["/var/lib/ebpfstream"] == "ebpfstream 700"
    assert found["cached"] > 0  # the next start need not compile


def test_it_reloads(found: dict[str, Any]) -> None:
    assert found["second"] is not None  # in the new file: the old one had been moved away
    assert found["reloaded"]["ActiveState"] == "active"
    assert found["reloaded"]["MainPID"] == found["started"]["MainPID"]
    assert sum('"event": "reloaded"' in line for line in found["journal"]) == 1


def test_it_feeds_the_watchdog(found: dict[str, Any]) -> None:
    assert found["watched"]["WatchdogUSec"] == "10s"
    assert found["seconds"] > 20
    assert found["watched"]["NRestarts"] == "0"
    assert found["watched"]["MainPID"] == found["started"]["MainPID"]


def test_it_stops(found: dict[str, Any]) -> None:
    stopped = found["stopped"]
    assert (stopped["ActiveState"], stopped["Result"], stopped["ExecMainStatus"]) == (
        "inactive",
        "success",
        "0",
    )
    assert found["last"] is not None  # what had happened before has been delivered
    assert not found["left"]


def test_more_rights_are_given_up_as_well(found: dict[str, Any]) -> None:
    """perf-events.conf, with failed = true and buffer = "perf"."""
    assert found["more"]["ActiveState"] == "active"
    assert found["failed"]["filename"] == "/nowhere"
    assert found["failed"]["error"] == "ENOENT"
    kept = f"{1 << Capability.CAP_PERFMON:016x}"  # for a CPU that comes
    assert [found["more_status"][each] for each in ("CapPrm", "CapEff", "CapAmb")] == [kept, kept, NONE]
