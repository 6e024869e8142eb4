"""What is done with the unit in a machine that systemd runs; what came of it, as JSON on standard output.

Only this machine's Python: whatever the service needs, this must not have brought in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

UNIT = "ebpfstream@execs.service"
CHECKOUT = Path(__file__).resolve().parents[4]
CONFIGURATION = Path("/etc/ebpfstream/execs.toml")
LOG = Path("/var/log/ebpfstream/execs.jsonl")
WATCHDOG = 10  # seconds
PATIENCE = 60.0  # seconds, for what takes a fraction of one elsewhere

found: dict[str, Any] = {}


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said = done.stdout if done.returncode else ""
    sys.stderr.write(f"{time.monotonic():7.1f} $ {' '.join(command)}: {done.returncode}\n{said}")
    return done.stdout


def properties() -> dict[str, str]:
    names = "ActiveState,SubState,Result,MainPID,ExecMainStatus,NRestarts,StatusText,WatchdogUSec,MemoryPeak"
    return dict(line.split("=", 1) for line in run("systemctl", "show", "-p", names, UNIT).splitlines())


def execute(marker: str) -> int:
    process = subprocess.Popen(["/bin/true", marker])
    process.wait()
    return process.pid


def arrived(marker: str, log: Path = LOG) -> dict[str, Any] | None:
    """The event whose arguments have the marker, once it is in the log."""
    ends_at = time.monotonic() + PATIENCE
    while time.monotonic() < ends_at:
        if log.exists():
            for line in log.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n") and marker in (event := json.loads(line)).get("args", []):
                    return dict(event)
        time.sleep(0.2)
    return None


def get(path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:9435{path}", timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def status(pid: str) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def install() -> None:
    """As deploy/README.md says, but for the virtual environment, which is there."""
    systemd = CHECKOUT / "deploy/systemd"
    Path("/etc/sysusers.d").mkdir(exist_ok=True)
    shutil.copy(systemd / "ebpfstream.sysusers", "/etc/sysusers.d/ebpfstream.conf")
    run("systemd-sysusers", "/etc/sysusers.d/ebpfstream.conf")
    CONFIGURATION.parent.mkdir()
    shutil.copy(systemd / "execs.toml", CONFIGURATION)
    shutil.copy(systemd / "ebpfstream@.service", "/etc/systemd/system")
    drop_in = Path(f"/etc/systemd/system/{UNIT}.d")
    drop_in.mkdir()
    (drop_in / "emulated.conf").write_text(
        f"[Service]\nWatchdogSec={WATCHDOG}s\nTimeoutStartSec=5min\nEnvironment=LD_LIBRARY_PATH=/opt/python/lib\n"
    )
    run("systemctl", "daemon-reload")


def allow_more() -> None:
    """What takes perf-events.conf, with it."""
    shutil.copy(CHECKOUT / "deploy/systemd/perf-events.conf", f"/etc/systemd/system/{UNIT}.d")
    text = CONFIGURATION.read_text()
    CONFIGURATION.write_text(text.replace("#failed = true", 'failed = true\nbuffer = "perf"'))
    run("systemctl", "daemon-reload")


def trial() -> None:
    install()
    run("systemctl", "start", UNIT)
    started = time.monotonic()
    found["started"] = before = properties()
    pid = before["MainPID"]
    found["status"] = status(pid)
    found["threads"] = [status(f"{pid}/task/{each}")["CapEff"] for each in os.listdir(f"/proc/{pid}/task")]
    found["pid"] = execute("first")
    found["first"] = arrived("first")
    found["health"] = [get(path)[0] for path in ("/healthz", "/readyz")]
    found["metrics"] = get("/metrics")[1]

    LOG.rename(LOG.with_suffix(".1"))
    CONFIGURATION.write_text(CONFIGURATION.read_text() + "#\n")
    run("systemctl", "reload", UNIT)
    execute("second")
    found["second"] = arrived("second")
    found["reloaded"] = properties()

    time.sleep(max(0, started + 2.5 * WATCHDOG - time.monotonic()))
    found["watched"] = properties()
    found["seconds"] = time.monotonic() - started

    execute("last")
    run("systemctl", "stop", UNIT)
    found["stopped"] = properties()
    found["left"] = Path(f"/proc/{pid}").exists()
    found["last"] = arrived("last")
    for path in (
        LOG,
        LOG.parent,
        Path("/run/ebpfstream"),
        Path("/var/cache/ebpfstream"),
        Path("/var/lib/ebpfstream"),
    ):
        found[str(path)] = f"{path.owner()} {path.stat().st_mode & 0o777:o}"
    found["cached"] = len(list(Path("/var/cache/ebpfstream/programs").iterdir()))

    allow_more()
    run("systemctl", "start", UNIT)
    found["more"] = properties()
    found["more_status"] = status(found["more"]["MainPID"])
    with suppress(FileNotFoundError):
        os.execv("/nowhere", ["/nowhere", "failed"])
    found["failed"] = arrived("failed")
    run("systemctl", "stop", UNIT)


try:
    trial()
except BaseException:
    found["error"] = traceback.format_exc()
found["journal"] = run("journalctl", "--no-pager", "-o", "cat", "-u", UNIT).splitlines()
sys.stdout.write(json.dumps(found) + "\n")
