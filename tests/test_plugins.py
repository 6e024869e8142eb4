"""Sinks of other packages: the example is installed and used, and mistakes in a package are told."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ebpfstream.errors import ArgumentError
from ebpfstream.sink import open_sink

ROOT = Path(__file__).parents[1]

_USE = """
import anyio, sys
from ebpfstream import open_sink
from ebpfstream.lost import Lost
from ebpfstream.testing import ExampleEvent, make_batch

async def main():
    async with open_sink(f"sqlite:{sys.argv[1]}?table=execs&queue_size=1MB") as sink:
        print(type(sink).__module__, sink.queue_size)
        await sink.send(make_batch([ExampleEvent(number, "sh", "%s \\\\xff") for number in (1, 2)], lost=[Lost(3, 4)]))

anyio.run(main)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, copied so that its tests see nothing of this repository, and installed from the copy."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(
        ROOT / "examples/sqlite_sink", folder / "source", ignore=shutil.ignore_patterns("__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    options = ["--no-index", "--no-build-isolation", "--target", str(folder / "target")]
    subprocess.run([*pip, *options, str(source)], check=True, cwd=folder)
    return folder


def run(folder: Path, *arguments: str) -> str:
    """With this package and the plugin to be found, and nothing else of this folder."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env={**os.environ, "PYTHONPATH": f"{folder / 'target'}:{ROOT}"},
        cwd=folder / "source",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_found_by_its_address(installed: Path, tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    assert run(installed, "-c", _USE, str(path)) == "ebpfstream_sqlite 1000000\n"
    database = sqlite3.connect(path)
    rows = database.execute("SELECT kind, event FROM execs ORDER BY rowid").fetchall()
    database.close()
    assert [kind for kind, _ in rows] == ["lost", "ExampleEvent", "ExampleEvent"]
    assert rows[1][1] == '{"number":1,"comm":"sh","message":"%s \\\\xff"}'


@pytest.mark.timeout(300)
def test_the_example_stands_what_every_sink_must(installed: Path) -> None:
    shown = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert " passed" in shown
    assert "skipped" not in shown
    assert int(shown.split(" passed")[0].split()[-1]) >= 60  # on two event loops, or more


# --- mistakes


def offer(folder: Path, package: str, entry_point: str, code: str = "") -> None:
    """Install a package that offers a sink."""
    info = folder / f"{package}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[ebpfstream.sinks]\n{entry_point}\n")
    if code:
        (folder / f"{entry_point.split('=')[1].split(':')[0].strip()}.py").write_text(code)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_unknown_schemes() -> None:
    with pytest.raises(ArgumentError, match=r"there is no sink 'carrier-pigeon'.*blackhole.*file.*stdout"):
        open_sink("carrier-pigeon:")
    with pytest.raises(ArgumentError, match=r"'stdut:': there is no sink 'stdut'; did you mean stdout:\?$"):
        open_sink("stdut:")


def test_unknown_options() -> None:
    with pytest.raises(
        ArgumentError, match=r"no option 'xyz'; there are: format \(json or text\), when_full"
    ):
        open_sink("stdout:?xyz=1")
    with pytest.raises(ArgumentError, match="no option 'formt'; did you mean 'format'"):
        open_sink("stdout:?formt=text")


def test_a_package_that_cannot_be_imported(packages: Path) -> None:
    offer(packages, "half-there", "halfthere = sink_half_there:A", "import what_is_not_installed")
    message = (
        r"sink halfthere: cannot be loaded .*what_is_not_installed.*pip install 'half-there\[halfthere\]'"
    )
    with pytest.raises(ArgumentError, match=message):
        open_sink("halfthere:")


def test_a_module_without_what_is_offered(packages: Path) -> None:
    offer(packages, "other-version", "otherversion = sink_other_version:A", "B = 1")
    message = (
        r"sink otherversion: cannot be loaded \(module 'sink_other_version' has no attribute 'A'\): "
        r"pip install 'other-version\[otherversion\]'"
    )
    with pytest.raises(ArgumentError, match=message):
        open_sink("otherversion:")


def test_what_is_no_sink(packages: Path) -> None:
    offer(packages, "wrong-class", "wrongclass = sink_wrong:A", "class A: pass\nf = len")
    with pytest.raises(
        ArgumentError, match="sink wrongclass: cannot be used: sink_wrong:A is no subclass of Sink"
    ):
        open_sink("wrongclass:")
    offer(packages, "wrong-thing", "wrongthing = sink_wrong:f")
    with pytest.raises(ArgumentError, match="sink_wrong:f is no subclass of Sink"):
        open_sink("wrongthing:")


def test_two_packages_with_one_scheme(packages: Path) -> None:
    offer(packages, "one", "twice = sink_one:A")
    offer(packages, "two", "twice = sink_two:A")
    with pytest.raises(ArgumentError, match="the packages one and two both offer it: uninstall one"):
        open_sink("twice:")
