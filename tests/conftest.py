"""What all tests share: what the kernel must offer, the event loops, and --no-skips."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from ebpfstream.errors import EbpfStreamError
from ebpfstream.kernel import bcc
from ebpfstream.kernel.bpf import Map, MapType

if TYPE_CHECKING:
    from collections.abc import Sequence

_BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "asyncio+uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@pytest.fixture(scope="module", params=list(_BACKENDS.values()), ids=list(_BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """Each `@pytest.mark.anyio` test runs once on each of these."""
    backend: tuple[str, dict[str, Any]] = request.param
    return backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail if any test was skipped, and say which")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-skips"):
        config.pluginmanager.register(_NoSkips(), "no-skips")


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("kernel") and (missing := _missing_for_kernel_tests()):
            item.add_marker(pytest.mark.skip(reason=missing))


@cache
def _missing_for_kernel_tests() -> str:
    try:
        Map.create("probe", MapType.ARRAY, key_size=4, value_size=4, max_entries=1).close()
        bcc.find()
    except EbpfStreamError as error:
        return str(error)
    return ""


class _NoSkips:
    """A machine that is meant to run everything must not pass by running less."""

    def __init__(self) -> None:
        self._skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)  # a whole module, by importorskip or skip(allow_module_level=True)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self._skipped.append(f"{report.nodeid}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._skipped:
            terminalreporter.section("failed: skipped, with --no-skips", red=True, bold=True)
            for line in self._skipped:
                terminalreporter.line(line)
