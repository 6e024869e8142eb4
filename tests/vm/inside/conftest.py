"""For all that runs in a virtual machine, the tests from tests/kernel included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ebpfstream.kernel import compiler
from ebpfstream.kernel.compiler import Module

_compile = compiler.compile
_compiled: dict[tuple[str, ...], Module] = {}


async def _compile_once(text: str, cflags: Sequence[str] = ()) -> Module:
    """Compiling takes many seconds in here, and most tests want the same program."""
    key = (text, *cflags)
    if key in _compiled:
        return _compiled[key]
    module = await _compile(text, cflags)
    if not module.maps:  # else they belong to whoever had it compiled
        _compiled[key] = module
    return module


pytest.MonkeyPatch().setattr(compiler, "compile", _compile_once)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """For the test outside: how many there were, and how many of them passed."""
    passed = terminalreporter.stats.get("passed", [])
    session = terminalreporter._session
    assert session is not None
    terminalreporter.write_line(f"passed: {len(passed)} of {session.testscollected}")
