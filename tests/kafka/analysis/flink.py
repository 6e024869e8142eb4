"""Flink SQL: one Java process that is client and cluster in one."""

from __future__ import annotations

import importlib
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self

from tests.kafka import jars
from tests.kafka.jars import JarsError
from tests.kafka.process import Process, accepts, free_port

ROOT: Final = Path(__file__).resolve().parents[3]
BRIDGE: Final = "py4j"
"""The package by which Python calls Java's methods; it brings a jar."""
_POM: Final = Path(__file__).with_name("pom.xml")
_LOGGING: Final = Path(__file__).parents[1] / "log4j2.properties"
_CACHE: Final = ROOT / ".venv/flink"
_JAVA: Final = ("java", "-Xms64m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_START_SECONDS: Final = 60.0  # takes one
_SETTING: Final = re.compile(r"SET '([^']+)' = '([^']*)'")


class Flink:
    """A session of Flink SQL, as its client would be, while it is open; `folder` is for its log."""

    def __init__(self, folder: Path) -> None:
        log, port = folder / "flink.log", free_port()
        (bridge,) = (file.locate() for file in metadata.files(BRIDGE) or () if file.suffix == ".jar")
        command = [*_JAVA, f"-Dlog4j2.configurationFile={_LOGGING}", "-cp", f"{_jars()}/*:{bridge}"]
        self._process = Process([*command, "py4j.GatewayServer", "--enable-auth", str(port)], log)
        try:
            _wait(self._process, port, log)
            token = log.read_text().splitlines()[1]
            java: Any = importlib.import_module("py4j.java_gateway")
            # Without its memory management Java keeps everything to the end; with it, whatever Python collects after
            # that is told to a process that is no more.
            parameters = java.GatewayParameters(port=port, auth_token=token, enable_memory_management=False)
            self._gateway = java.JavaGateway(gateway_parameters=parameters)
            api = self._gateway.jvm.org.apache.flink.table.api
            settings = api.EnvironmentSettings.newInstance().inStreamingMode().build()
            self._session = api.TableEnvironment.create(settings)
        except BaseException:
            self._process.end()
            raise
        self.run("SET 'parallelism.default' = '1'")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._gateway.close()
        self._process.end()

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """The rows of its result, each after how it changes what came before: +I if it is only added.

        What is no number is as Java writes it.
        """
        if setting := _SETTING.fullmatch(statement.strip()):  # these are for the client
            self._session.getConfig().set(*setting.groups())
            return []
        found = self._session.executeSql(statement).collect()
        rows: list[tuple[Any, ...]] = []
        try:
            while found.hasNext():
                row = found.next()
                values = [row.getField(place) for place in range(row.getArity())]
                plain = [value if isinstance(value, int) else str(value) for value in values]
                rows.append((row.getKind().shortString(), *plain))
        finally:
            found.close()
        return rows


def _wait(process: Process, port: int, log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while not accepts(port) or log.read_text().count("\n") < 2:
        if process.ended or time.monotonic() > until:
            raise JarsError(f"Flink did not start:\n{log.read_text()[-2000:]}")
        time.sleep(0.05)


def version() -> str:
    """The version of Flink that pom.xml names."""
    return jars.version(_POM, "flink")


def _jars() -> Path:
    return jars.fetched(_POM, _CACHE)


if __name__ == "__main__":
    try:
        _jars()
    except JarsError as error:
        raise SystemExit(f"flink: {error}") from None
