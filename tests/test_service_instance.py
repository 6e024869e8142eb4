"""One service for each configuration: by processes that really hold the lock, die, and fork."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ebpfstream.service.instance import FOLDER, Instance, InstanceError

ROOT = Path(__file__).resolve().parents[1]

HOLD = """
import sys
from ebpfstream.service.instance import Instance
with Instance(sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(configuration: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(configuration), str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    path = tmp_path / "exec events.toml"
    path.write_text("")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ebpfstream"


def lock_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def test_where_it_is() -> None:
    assert Path("/run/ebpfstream") == FOLDER


def test_a_second_one_is_refused(configuration: Path, folder: Path) -> None:
    with holder(configuration, folder) as first:
        with pytest.raises(InstanceError) as caught, Instance(configuration, folder):
            pass
        assert str(caught.value) == (
            f"{configuration} runs already, as process {first.pid}: stop that one, or give this one a "
            "configuration of its own"
        )
        assert first.stdin is not None
        first.stdin.close()
        first.wait()
        with Instance(configuration, folder):
            pass


def test_in_one_process_too(configuration: Path, folder: Path) -> None:
    with Instance(configuration, folder):
        with (
            pytest.raises(InstanceError, match=f"as process {os.getpid()}:"),
            Instance(configuration, folder),
        ):
            pass
        # Whoever was refused has not taken it away.
        with pytest.raises(InstanceError, match="runs already"), Instance(configuration, folder):
            pass
    with Instance(configuration, folder):
        pass


def test_what_is_in_the_file(configuration: Path, folder: Path) -> None:
    old = os.umask(0o022)
    try:
        with Instance(configuration, folder):
            path = lock_file(folder)
            assert re.fullmatch(r"exec_events\.toml-[0-9a-f]{16}\.lock", path.name)
            assert path.read_text() == f"{os.getpid()}\n{configuration.resolve()}\n"
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
            assert stat.S_IMODE(folder.stat().st_mode) == 0o755
        assert path.read_text() == ""
    finally:
        os.umask(old)


def test_a_shorter_content_replaces_a_longer_one(configuration: Path, folder: Path) -> None:
    with Instance(configuration, folder):
        pass
    lock_file(folder).write_text("123456789\n/a/path/that/is/longer/than/any\n" * 20)
    with Instance(configuration, folder):
        assert lock_file(folder).read_text() == f"{os.getpid()}\n{configuration.resolve()}\n"


@pytest.mark.parametrize("content", ["", "no number\n", "\udcff\n"])
def test_a_holder_that_has_not_said_who_it_is(configuration: Path, folder: Path, content: str) -> None:
    with Instance(configuration, folder):
        lock_file(folder).write_bytes(os.fsencode(content))
        with (
            pytest.raises(InstanceError, match="runs already, as another process: stop that one"),
            Instance(configuration, folder),
        ):
            pass


def test_paths_to_one_file_are_one(
    configuration: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(configuration)
    monkeypatch.chdir(tmp_path)
    with Instance(configuration, folder):
        for path in (link, Path(configuration.name), tmp_path / "run" / ".." / configuration.name):
            with pytest.raises(InstanceError, match="runs already"), Instance(path, folder):
                pass
    assert len(list(folder.iterdir())) == 1


def test_two_configurations(tmp_path: Path, folder: Path) -> None:
    # Names that differ only where the lock's name does not show it.
    names = ["a b.toml", "a_b.toml", "x" * 250 + "1", "x" * 250 + "2", "a\udcff"]
    for path in (tmp_path / name for name in names):
        path.touch()
    with Instance(tmp_path / names[0], folder), Instance(tmp_path / names[1], folder):
        with Instance(tmp_path / names[2], folder), Instance(tmp_path / names[3], folder):
            with Instance(tmp_path / names[4], folder):
                assert len(list(folder.iterdir())) == 5


def test_nothing_holds_it_after_sigkill(configuration: Path, folder: Path) -> None:
    with holder(configuration, folder) as first:
        first.kill()
        first.wait()
        assert lock_file(folder).read_text().startswith(f"{first.pid}\n")
        with Instance(configuration, folder):
            assert lock_file(folder).read_text().startswith(f"{os.getpid()}\n")


def test_children_do_not_hold_it(configuration: Path, folder: Path) -> None:
    with Instance(configuration, folder):
        child = subprocess.Popen(["sleep", "1000"], close_fds=False)
    try:
        with Instance(configuration, folder):
            pass
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_an_error_within_gives_it_up(configuration: Path, folder: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), Instance(configuration, folder):
        raise ZeroDivisionError
    with Instance(configuration, folder):
        with pytest.raises(InstanceError), Instance(configuration, folder):
            pass
    assert len(os.listdir("/proc/self/fd")) == descriptors


# --- folders and files that it cannot have


REMEDY = "give another folder, which this user may write to (systemd makes one with RuntimeDirectory=)"

OTHER = """
import os, sys
from ebpfstream.service.instance import Instance, InstanceError
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
try:
    with Instance(sys.argv[1], sys.argv[2]):
        print("had it")
except InstanceError as error:
    print(error)
"""


def test_a_folder_that_cannot_be_written_to(configuration: Path) -> None:
    # /sys/kernel is root's, and not even root may make a file there.
    for folder in (Path("/sys/kernel"), Path("/proc/ebpfstream")):
        with pytest.raises(InstanceError) as caught, Instance(configuration, folder):
            pass
        assert str(caught.value).startswith(f"cannot make {folder}/exec_events.toml-")
        assert str(caught.value).endswith(REMEDY)


def test_a_folder_of_somebody_elses(configuration: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", OTHER, "/etc/passwd", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert re.fullmatch(
        re.escape(f"cannot make {folder}/passwd-")
        + r"[0-9a-f]{16}\.lock, by which a configuration runs once only: Permission denied: "
        + re.escape(REMEDY),
        done.stdout.strip(),
    )
    assert list(folder.iterdir()) == []


def refused(configuration: Path, folder: Path) -> str:
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InstanceError) as caught, Instance(configuration, folder):
        pass
    assert len(os.listdir("/proc/self/fd")) == descriptors
    return str(caught.value)


@pytest.fixture
def planted(configuration: Path, folder: Path) -> Path:
    """Where the lock file would be; somebody else can put there what they like."""
    with Instance(configuration, folder):
        path = lock_file(folder)
    path.unlink()
    return path


def test_a_link_is_not_followed(configuration: Path, folder: Path, planted: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted.symlink_to(victim)
    assert "a symbolic link, or no folder, is in its place" in refused(configuration, folder)
    assert victim.read_text() == "precious"
    # Nor one to what is not there yet.
    planted.unlink()
    planted.symlink_to(tmp_path / "new")
    refused(configuration, folder)
    assert not (tmp_path / "new").exists()


def test_another_name_of_a_file_is_not_written_to(
    configuration: Path, folder: Path, planted: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted.hardlink_to(victim)
    assert "is not a file that this user made" in refused(configuration, folder)
    assert victim.read_text() == "precious"


def test_a_pipe_is_not_waited_for(configuration: Path, folder: Path, planted: Path) -> None:
    os.mkfifo(planted)
    assert "is not a file that this user made" in refused(configuration, folder)


def test_a_file_of_another_users(
    configuration: Path, folder: Path, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.write_text("theirs")
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    message = refused(configuration, folder)
    assert message == (
        f"{planted}, by which a configuration runs once only, is not a file that this user made: look who did, "
        "and remove it"
    )
    assert planted.read_text() == "theirs"


def test_a_linked_folder_is_not_followed(configuration: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "run"
    link.symlink_to("elsewhere")
    assert "a symbolic link, or no folder, is in its place" in refused(configuration, link)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_file_in_the_folders_place(configuration: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert "a symbolic link, or no folder, is in its place" in refused(configuration, tmp_path / "run")
