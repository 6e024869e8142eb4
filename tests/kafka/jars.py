"""Jars, as Apache Kafka's: got once with Maven, kept in .venv/kafka until pom.xml changes."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
_POM: Final = Path(__file__).with_name("pom.xml")
_CACHE: Final = ROOT / ".venv/kafka"
_COPY: Final = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_OLDEST_JAVA: Final = 17
_MINUTES: Final = 10
_INSTALL_JAVA: Final = (
    "as root, `make test` installs it on Debian and Ubuntu (apt-get install default-jre-headless); "
    "Fedora: dnf install java-latest-openjdk-headless; Arch: pacman -S jre-openjdk-headless"
)
_INSTALL_MAVEN: Final = (
    "as root, `make test` installs it on Debian and Ubuntu (apt-get install maven); "
    "Fedora: dnf install maven; Arch: pacman -S maven"
)


class JarsError(Exception):
    """What runs in Java cannot be started; the message says what to do about it."""


def missing() -> str:
    """What has to be installed before a broker can be started, and how; "" if nothing has."""
    if not (java := _java()):
        return f"no broker can be started without Java: {_INSTALL_JAVA}"
    if java < _OLDEST_JAVA:
        return f"Kafka needs Java {_OLDEST_JAVA} or later, and `java` here is {java}: {_INSTALL_JAVA}"
    if not _folder(_POM, _CACHE).exists() and not shutil.which("mvn"):
        return f"Kafka's jars cannot be fetched without Maven: {_INSTALL_MAVEN}"
    return ""


def version(pom: Path = _POM, name: str = "kafka") -> str:
    """The version that pom.xml names."""
    found = re.search(rf"<{name}\.version>(.+)</", pom.read_text())
    assert found, f"{pom} names no {name}.version"
    return found[1]


def get() -> Path:
    """The folder with Kafka's jars, fetched first if need be.

    Raises:
        JarsError: Java or Maven is missing, or Maven could not fetch them.
    """
    if reason := missing():
        raise JarsError(reason)
    return fetched(_POM, _CACHE)


def fetched(pom: Path, cache: Path) -> Path:
    """The folder with the jars that a pom.xml names; one process fetches, and others wait for it.

    Raises:
        JarsError: Maven could not fetch them.
    """
    folder = _folder(pom, cache)
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for old in filter(Path.is_dir, cache.iterdir()):  # of another pom.xml, or never finished
                shutil.rmtree(old)
            _fetch(pom, folder)
    return folder


def _fetch(pom: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        jars = Path(unfinished, "jars")
        command = ["mvn", "-q", "-B", "-f", str(pom), _COPY, "-DincludeScope=runtime"]
        try:
            mvn = subprocess.run(
                [*command, f"-DoutputDirectory={jars}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_MINUTES * 60,
            )
        except subprocess.TimeoutExpired:
            raise JarsError(
                f"Maven did not fetch the jars of {folder.parent.name} within {_MINUTES} minutes: try again"
            ) from None
        if mvn.returncode:
            last = "\n".join(mvn.stdout.splitlines()[-20:])
            raise JarsError(
                f"Maven could not fetch the jars of {folder.parent.name}: it needs its repository once, and "
                f"settings of a proxy or mirror are in ~/.m2/settings.xml. It says:\n{last}"
            )
        jars.rename(folder)


def _folder(pom: Path, cache: Path) -> Path:
    return cache / hashlib.sha256(pom.read_bytes()).hexdigest()[:16]


def _java() -> int:
    """The major version of `java`; 0 if there is none that runs."""
    try:
        said = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr
    except OSError:
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    try:
        get()
    except JarsError as error:
        raise SystemExit(f"kafka: {error}") from None
