"""ClickHouse's own engine, the Kafka table engine included, in a child process."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT: Final = Path(__file__).resolve().parents[3]
PACKAGE: Final = "chdb"
_SECONDS: Final = 60.0  # for what takes eight: ClickHouse writes what it has read within 7.5 s


class ClickHouseError(Exception):
    """A statement failed; the message is ClickHouse's."""


class ClickHouse:
    """An empty database, its data in `folder`, while it is open."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder / "data")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        self.run("CREATE DATABASE analysis ENGINE = Atomic")
        self.run("USE analysis")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_SECONDS)

    def run(self, statement: str) -> list[dict[str, Any]]:
        """The rows of its result; 64-bit numbers as numbers.

        Raises:
            ClickHouseError: ClickHouse refuses it, or could not do it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(statement) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise ClickHouseError(f"the process of ClickHouse has ended at: {statement}")
        error, rows = json.loads(answer)
        if error:
            raise ClickHouseError(error)
        return [json.loads(row) for row in rows.splitlines()]

    def wait(self, query: str, enough: Callable[[list[dict[str, Any]]], bool]) -> None:
        """Until what has been read from the topic makes the result so."""
        until = time.monotonic() + _SECONDS
        while not enough(rows := self.run(query)):
            if time.monotonic() > until:
                raise TimeoutError(f"{query} still gives {rows}")
            time.sleep(0.2)


def _engine() -> Any:
    """The package's compiled module without the package.

    The package opens a connection when it is imported, to ask for the version, and closes it.  With that the process
    has shut ClickHouse down once, and after that no table of the Kafka engine can be made.
    """
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None
    assert package.submodule_search_locations
    (path,) = Path(package.submodule_search_locations[0]).glob("_chdb.*so")
    spec = importlib.util.spec_from_file_location(
        "_chdb", path, loader=importlib.machinery.ExtensionFileLoader("_chdb", str(path))
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(folder: str) -> None:
    """Answer each statement, a line of JSON, with a line of JSON: the error, and the rows."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is written is no answer
    connection = _engine().connect(folder)
    connection.query("SET output_format_json_quote_64bit_integers = 0", "CSV")
    for line in sys.stdin:
        try:
            answer = "", connection.query(json.loads(line), "JSONEachRow").bytes().decode()
        except RuntimeError as error:
            answer = str(error), ""
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    connection.close()


if __name__ == "__main__":
    _serve(sys.argv[1])
