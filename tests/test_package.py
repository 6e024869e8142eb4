"""The distribution: what is in it, and that what is installed from it works anywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from stat import S_ISLNK

import pytest

import ebpfstream

ROOT = Path(__file__).resolve().parents[1]
NAME = f"ebpfstream-{ebpfstream.__version__}"

# What has gone missing from a distribution before, or easily would.
ESSENTIAL = {
    "ebpfstream/__init__.py",
    "ebpfstream/__main__.py",
    "ebpfstream/bpf/ebpfstream.h",
    "ebpfstream/bpf/execve.c",
    "ebpfstream/cli/__init__.py",
    "ebpfstream/kernel/bcc.py",
    "ebpfstream/py.typed",
    "ebpfstream/sinks/__init__.py",
    "ebpfstream/sinks/stdout.py",
    "ebpfstream/tracers/execve.py",
}
LICENCES = {"LICENSE", "LICENSES/BSD-2-Clause.txt", "LICENSES/GPL-2.0-only.txt"}


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout as it is now: both wheels must be built from the same files."""
    leave_out = shutil.ignore_patterns(".git", ".venv", "dist", "__pycache__", ".*_cache", ".hypothesis")
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("source") / "checkout", symlinks=True, ignore=leave_out
    )


@pytest.fixture(scope="session")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The sdist, the wheel made of it, and the wheel made directly."""
    through, direct = tmp_path_factory.mktemp("through"), tmp_path_factory.mktemp("direct")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    _run(*build, through, cwd=source)
    _run(*build, direct, "--wheel", cwd=source)
    (sdist,), (wheel,), (other,) = through.glob("*.tar.gz"), through.glob("*.whl"), direct.glob("*.whl")
    return sdist, wheel, other


@pytest.fixture(scope="session")
def expected(source: Path) -> set[str]:
    """The package's files by the names that they have when installed."""
    names = set()
    for top, inside in (
        ("ebpfstream", "ebpfstream"),
        ("sinks", "ebpfstream/sinks"),
        ("bpf", "ebpfstream/bpf"),
    ):
        for folder, _, files in os.walk(source / top):  # does not follow links
            names |= {f"{inside}/{(Path(folder) / name).relative_to(source / top)}" for name in files}
    assert names >= ESSENTIAL
    return names


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            assert not S_ISLNK(entry.external_attr >> 16), f"{entry.filename} is a link"
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def test_wheel_holds_the_package_and_nothing_else(built: tuple[Path, Path, Path], expected: set[str]) -> None:
    contents = _contents(built[1])
    about = f"{NAME}.dist-info/"
    assert {name for name in contents if not name.startswith(about)} == expected
    assert {name for name in contents if name.startswith(about)} == {
        about + name
        for name in (
            "METADATA",
            "WHEEL",
            "RECORD",
            "entry_points.txt",
            *(f"licenses/{name}" for name in LICENCES),
        )
    }


def test_wheel_is_the_same_directly_and_through_the_sdist(built: tuple[Path, Path, Path]) -> None:
    assert _contents(built[1]) == _contents(built[2])


def test_sdist_holds_what_the_wheel_is_made_of(built: tuple[Path, Path, Path], expected: set[str]) -> None:
    real_places = {
        name.removeprefix("ebpfstream/")
        if name.startswith(("ebpfstream/sinks/", "ebpfstream/bpf/"))
        else name
        for name in expected
    }
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not member.isreg() and not member.isdir()] == []
    names = {member.name.removeprefix(f"{NAME}/") for member in members if member.isreg()}
    assert {name for name in names if name.startswith(("ebpfstream/", "sinks/", "bpf/"))} == real_places
    assert names >= LICENCES | {"pyproject.toml", "README.md"}


def test_metadata_names_the_licences(built: tuple[Path, Path, Path]) -> None:
    metadata = _contents(built[1])[f"{NAME}.dist-info/METADATA"].decode()
    assert "License-Expression: Apache-2.0 AND (GPL-2.0-only OR BSD-2-Clause)\n" in metadata
    for name in LICENCES:
        assert f"License-File: {name}\n" in metadata
        assert (ROOT / name).read_text().strip()


def _environment(folder: Path, *requirements: str | Path) -> Path:
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    _install(folder, *requirements)
    return folder


def _install(environment: Path, *requirements: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    _run(*pip, "--disable-pip-version-check", *requirements, cwd=environment)


@pytest.fixture(scope="session")
def with_dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the dependencies alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return _environment(tmp_path_factory.mktemp("dependencies") / "env", *project["dependencies"])


@pytest.fixture(scope="session")
def with_wheel(built: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel, and what came with it."""
    return _environment(tmp_path_factory.mktemp("wheel") / "env", built[1])


def test_wheel_brings_a_command(with_wheel: Path, tmp_path: Path) -> None:
    version = f"ebpfstream {ebpfstream.__version__}"
    assert _run(with_wheel / "bin/ebpfstream", "--version", cwd=tmp_path).splitlines()[0] == version


STREAM = """
import json, os, subprocess
import anyio, ebpfstream

async def main():
    async with ebpfstream.trace_execve() as events:
        for number in range(10):
            subprocess.run(["/bin/true", str(number)], check=True)
        events.detach()
        received = [event.args async for event in events if event.ppid == os.getpid()]
    print(json.dumps([ebpfstream.__file__, received]))

anyio.run(main)
"""


@pytest.mark.kernel
def test_wheel_streams_from_anywhere(with_wheel: Path, tmp_path: Path) -> None:
    home, received = json.loads(_run(with_wheel / "bin/python", "-I", "-c", STREAM, cwd=tmp_path))
    assert Path(home).is_relative_to(with_wheel)
    assert received == [["/bin/true", str(number)] for number in range(10)]


FIND = """
import json
from pathlib import Path
import ebpfstream, ebpfstream.sinks.stdout
folder = Path(ebpfstream.__file__).parent
print(json.dumps([str(folder), ebpfstream.sinks.stdout.__file__, (folder / "bpf/execve.c").read_text()]))
"""


def test_editable_install_finds_sinks_and_programs(with_dependencies: Path, tmp_path: Path) -> None:
    environment = shutil.copytree(with_dependencies, tmp_path / "env", symlinks=True)
    _install(environment, "--editable", ROOT)
    folder, sink, program = json.loads(_run(environment / "bin/python", "-I", "-c", FIND, cwd=tmp_path))
    assert folder == str(ROOT / "ebpfstream")
    assert sink == str(ROOT / "ebpfstream/sinks/stdout.py")
    assert program == (ROOT / "bpf/execve.c").read_text()


def test_checkout_runs_uninstalled(with_dependencies: Path) -> None:
    version = f"ebpfstream {ebpfstream.__version__}"
    assert (
        _run(with_dependencies / "bin/python", "-m", "ebpfstream", "--version", cwd=ROOT).splitlines()[0]
        == version
    )
