"""What runs in a virtual machine, and only there."""

from __future__ import annotations

import os

import pytest

if "EBPFSTREAM_VM" not in os.environ:
    collect_ignore_glob = ["*"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """For the test outside: how many there were, and how many of them passed."""
    passed = terminalreporter.stats.get("passed", [])
    session = terminalreporter._session
    assert session is not None
    terminalreporter.write_line(f"passed: {len(passed)} of {session.testscollected}")
