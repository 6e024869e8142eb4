"""The command that ships to a file and shows as well: through rotations, full disks, logrotate and kill -9."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import anyio.to_thread
import jsonschema
import pytest
from anyio.from_thread import start_blocking_portal

from ebpfstream import BPF, EventBatch, Lost, SyscallEvent, trace_syscalls
from tests.disks import small_disk
from tests.kernel import objects
from tests.kernel.calling import Caller
from tests.kernel.test_cli import COMMAND, wait_until
from tests.test_schema import FORMATS

pytestmark = pytest.mark.kernel

PAGE = os.sysconf("SC_PAGE_SIZE")
LEDGERS = re.compile(
    r"ebpfstream: (?P<delivered>\d+) delivered; (?P<tried>\d+) tried = (?P<submitted>\d+) submitted \+ 0 lost"
    r"(, \d+ rejected by filters)?\n"
    r"ebpfstream: file:\S+: (?P<written>\d+) of (?P<to_file>\d+) events; "
    r"unavailable (?P<retries>\d+) times; last: .*No space left on device.*\n"
    r"ebpfstream: stdout: (?P<shown>\d+) of (?P<to_stdout>\d+) events\n\Z"
)


class Marker:
    """A process that executes `/bin/true marker-000001` and so on, one after the other."""

    _CODE = """
import os, sys
for line in sys.stdin:
    for number in range(*map(int, line.split())):
        child = os.posix_spawn("/bin/true", ["/bin/true", f"marker-{number:06}"], {})
        assert os.waitpid(child, 0)[1] == 0
    print("done", flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", self._CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.last = 0
        """The number of the last one that has been executed."""

    def execute(self, times: int) -> None:
        """Return when it has, so many times."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self.last + 1} {self.last + 1 + times}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"
        self.last += times

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


class Life:
    """The command from its start to its end; what it says goes to files of their own."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, errors: Path) -> None:
        self.process, self.output, self._errors = process, output, errors

    @property
    def said(self) -> str:
        """Its standard error."""
        return self._errors.read_text()

    def wait_until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, self.process)

    def wait_for(self, number: int, *files: Path) -> None:
        """Return when the marker of that number is the last one in each of the files."""
        self.wait_until(lambda: {last_of(file) for file in files} == {number})

    def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        assert self.process.wait(30) == -number


@contextmanager
def living(folder: Path, name: str, *options: str) -> Iterator[Life]:
    """The command, once it is attached."""
    output, errors = folder / f"{name}.out", folder / f"{name}.err"
    with (
        output.open("wb") as out,
        errors.open("wb") as err,
        subprocess.Popen([*COMMAND, "execve", *options], stdout=out, stderr=err) as process,
    ):
        try:
            wait_until(lambda: objects.held("link", process.pid), process)
            yield Life(process, output, errors)
        finally:
            process.kill()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """One of 2 MiB."""
    with small_disk(tmp_path / "disk", "2m") as folder:
        yield folder


def fill(disk: Path, leave: int = 0) -> None:
    """Let only so many pages be free."""
    found = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_bsize - leave * PAGE)


def make_room(disk: Path, pages: int | None = None) -> None:
    """So many pages more, or all that there is."""
    ballast = disk / "ballast"
    os.truncate(ballast, 0 if pages is None else ballast.stat().st_size - pages * PAGE)


@contextmanager
def killed_when_the_disk_is_full(pid: int) -> Iterator[None]:
    """SIGKILL comes before the write that found no room returns, so that nobody takes back what is not whole."""
    text = f"""
        int kill_it(struct bpf_raw_tracepoint_args *ctx) {{
            if (bpf_get_current_pid_tgid() >> 32 == {pid} && (long)ctx->args[1] == -{errno.ENOSPC})
                bpf_send_signal({int(signal.SIGKILL)});
            return 0;
        }}
    """
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(BPF(text=text)) as bpf:
        bpf.attach_raw_tracepoint(tp="sys_exit", fn_name="kill_it")
        yield


def rotated(path: Path) -> list[Path]:
    """The oldest first."""
    return sorted(path.parent.glob(f"{path.name}.*Z"))


def whole(data: bytes) -> bytes:
    """Without what stands behind the last newline."""
    return data[: data.rfind(b"\n") + 1]


def numbers(data: bytes) -> list[int]:
    """Those of the markers, each on a line of JSON of its own."""
    assert data == whole(data)
    arguments = [json.loads(line)["args"] for line in data.splitlines()]
    return [int(words[1].removeprefix("marker-")) for words in arguments]


def last_of(path: Path) -> int:
    """The last marker in the file; 0 while it is being rotated, or does not end with a whole line."""
    with suppress(FileNotFoundError):
        data = path.read_bytes()
        if data and data == whole(data):
            return numbers(data[data.rfind(b"\n", 0, -1) + 1 :])[0]
    return 0


def described(kind: str) -> jsonschema.Draft202012Validator:
    """Knows lines by the schema that the command prints."""
    printed = subprocess.run([*COMMAND, "schema", kind], capture_output=True, check=True).stdout
    schema = json.loads(printed)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema, format_checker=FORMATS)


def test_rotation_a_full_disk_logrotate_and_kill(tmp_path: Path, disk: Path) -> None:
    """All that happened while it lived is in the files once, in order; its last words say so."""
    path, moved = disk / "exec.jsonl", disk / "exec.jsonl.1"
    with Marker() as marker:
        options = ["--to", f"file:{path}?rotate={4 * PAGE}&keep=1000", "--to", "stdout:"]
        options += ["--ppid", str(marker.pid)]

        with living(tmp_path, "first", *options) as first:
            marker.execute(100)
            first.wait_for(marker.last, path)
            assert len(rotated(path)) >= 3

            fill(disk)
            marker.execute(200)
            first.wait_for(marker.last, first.output)
            first.wait_until(lambda: "No space left on device" in first.said)
            assert last_of(path) < marker.last
            assert first.said.count("\n") == 1  # it is said once, not each time that it is tried
            make_room(disk)
            first.wait_for(marker.last, path)
            first.wait_until(lambda: "going on" in first.said)

            marker.execute(50)
            first.wait_for(marker.last, path, first.output)
            path.rename(moved)
            first.process.send_signal(signal.SIGHUP)
            first.wait_until(path.exists)
            before, safe = [*rotated(path), moved], marker.last

            fill(disk, leave=2)
            with killed_when_the_disk_is_full(first.process.pid):
                marker.execute(100)
                assert first.process.wait(30) == -signal.SIGKILL

        left = path.read_bytes()
        assert len(left) == 2 * PAGE
        kept = [*numbers(b"".join(file.read_bytes() for file in before)), *numbers(whole(left))]
        assert kept == list(range(1, len(kept) + 1))
        assert safe < len(kept) < marker.last
        shown = whole(first.output.read_bytes())
        assert numbers(shown) == list(range(1, len(numbers(shown)) + 1))
        assert len(numbers(shown)) >= safe

        begin = marker.last + 1
        with living(tmp_path, "second", *options) as second:
            assert path.read_bytes() == whole(left)
            torn = len(left) - len(whole(left))  # 0 if a line happens to end where the page does
            assert (f"removed its {torn} bytes" in second.said) is (torn > 0)

            second.process.send_signal(signal.SIGSTOP)  # they shall come together: a page takes some of them
            marker.execute(100)
            second.process.send_signal(signal.SIGCONT)
            second.wait_for(marker.last, second.output)
            second.wait_until(lambda: "No space left on device" in second.said)
            assert last_of(path) < begin
            make_room(disk, pages=1)
            second.wait_until(lambda: last_of(path) >= begin)
            assert last_of(path) < marker.last
            make_room(disk)
            second.wait_for(marker.last, path)

            marker.execute(100)
            second.end(signal.SIGTERM)
            happened = list(range(begin, marker.last + 1))

    files = [*before, *(file for file in rotated(path) if file not in before), path]
    written = [file.read_bytes() for file in files]
    assert len(files) > len(before) + 5
    assert all(len(data) <= 4 * PAGE for data in written)
    assert [number for data in written for number in numbers(data)] == kept + happened
    assert numbers(second.output.read_bytes()) == happened
    ledgers = LEDGERS.search(second.said)
    assert ledgers is not None
    assert int(ledgers.group("retries")) >= 1
    counts = ["delivered", "tried", "submitted", "written", "to_file", "shown", "to_stdout"]
    assert {name: int(ledgers.group(name)) for name in counts} == dict.fromkeys(counts, len(happened))
    execve = described("execve")
    for data in [*written, shown, second.output.read_bytes()]:
        for line in data.splitlines():
            execve.validate(json.loads(line))


def test_successes_and_failures_are_as_the_schema_says(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\nexit 0\n")

    def fail(word: str) -> None:
        with pytest.raises(FileNotFoundError):
            subprocess.run(["/nonexistent/program", word])

    with living(tmp_path, "life", "--failed", "--ppid", str(os.getpid()), "--to", "stdout:") as life:
        while not life.output.stat().st_size:  # it is attached for successes first
            fail("begin")
        subprocess.run(["/bin/true", "", b"\xff", 'quo"te', "\x1b", "\u20ac", "x" * 20_000], check=True)
        with pytest.raises(PermissionError):
            subprocess.run([script])
        script.chmod(0o700)
        subprocess.run([script], check=True, cwd="/")
        fail("end")
        life.end(signal.SIGTERM)
    lines = [json.loads(line) for line in life.output.read_bytes().splitlines()]
    lines = [line for line in lines if line["args"][1:] != ["begin"]]
    assert [line["error"] for line in lines] == ["", "EACCES", "", "ENOENT"]
    execve = described("execve")
    for line in lines:
        execve.validate(line)
        assert not execve.is_valid(line | {"pid": -1})
        assert not execve.is_valid(line | {"time": "today"})


@pytest.mark.anyio
@pytest.mark.parametrize("result", [False, True])
async def test_system_calls_are_as_the_schema_says(result: bool) -> None:
    """Those of a process that makes more than a small buffer holds, so that there are losses among the lines."""
    batches: list[EventBatch[SyscallEvent | Lost]] = []
    with Caller() as caller:
        async with trace_syscalls(
            "getppid", "close", 999, result=result, pid=caller.pid, buffer_size=4096, on_lost="yield"
        ) as events:
            await anyio.to_thread.run_sync(lambda: caller.call("close", -1))
            await anyio.to_thread.run_sync(lambda: caller.call(999, *[2**64 - 1] * 6))
            await anyio.to_thread.run_sync(lambda: caller.call("getppid", times=1000))
            events.detach()
            while (batch := await events.next_batch()) is not None:
                batches.append(batch)
    lines = [json.loads(line) for batch in batches for line in batch.to_json_lines().splitlines()]
    found = [line for line in lines if "lost" not in line]
    assert {line["name"] for line in found} == {"close", "syscall_999", "getppid"}
    assert len(found) + sum(line["lost"]["count"] for line in lines if "lost" in line) == 1002
    assert len(found) < 1002
    assert {line["error"] for line in found} == ({"EBADF", "ENOSYS", ""} if result else {""})
    syscalls = described("syscalls")
    for line in lines:
        syscalls.validate(line)
        assert not syscalls.is_valid(line | {"another": 1})
