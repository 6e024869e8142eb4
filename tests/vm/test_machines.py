"""What needs another kernel: each test boots a machine, and runs tests in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.vm import machine

INSIDE = Path(__file__).parent / "inside"
LOGS = machine.ROOT / "build/vm"
MINUTES = 20
"""For one machine; its own tests take far less, even where others want the CPUs too."""

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(MINUTES * 60 + 60),
    pytest.mark.skipif(bool(machine.missing()), reason=machine.missing()),
]

# Those of the others that tell another kernel, or a machine with CPUs to be switched off.
KERNEL_TESTS = [
    "tests/kernel/test_execve.py",
    "tests/kernel/test_execve_details.py",
    "tests/kernel/test_execve_traced.py",
    "tests/kernel/test_perfbuf.py",
]
# One event loop will do: the kernel does not know which one it is.
SELECTED = "not uvloop and not trio"


def run_inside(name: str, *tests: str, arguments: str = "", selected: str = SELECTED) -> None:
    """Boot a machine, run these tests in it, and fail as they do."""
    command = ["python", "-m", "pytest", "--no-skips", "--timeout=600", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest", "--color=no", "--durations=5", "-k", selected, *tests]
    outcome = machine.run(command, LOGS / name, limit=MINUTES * 60, arguments=arguments)
    counts = re.search(r"^passed: (\d+) of (\d+)$", outcome.output, re.MULTILINE)
    if outcome.code or not counts or counts[1] != counts[2]:
        console = outcome.console.read_text(errors="replace").splitlines()
        pytest.fail(
            "\n".join(
                [
                    f"exit code {outcome.code}",
                    outcome.output,
                    f"The console's last lines (all of it is in {outcome.console}):",
                    *console[-30:],
                ]
            ),
            pytrace=False,
        )


def test_a_kernel_with_kprobes() -> None:
    run_inside("kprobes", *map(str, sorted(INSIDE.glob("test_*.py"))), *KERNEL_TESTS)


def test_full_preemption() -> None:
    run_inside("full_preemption", str(INSIDE / "full_preemption"), arguments="preempt=full")


def test_one_cpu_of_two() -> None:
    run_inside("one_cpu_of_two", str(INSIDE / "one_cpu_of_two"), arguments="maxcpus=1")
