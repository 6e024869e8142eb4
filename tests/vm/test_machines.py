"""What needs another kernel: each test boots a machine, and runs tests in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.vm import machine

INSIDE = Path(__file__).parent / "inside"
LOGS = machine.ROOT / "build/vm"
MINUTES = 20  # for one machine; it needs a fraction of that where nobody else wants the CPUs

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(MINUTES * 60 + 60),
    pytest.mark.skipif(bool(machine.missing()), reason=machine.missing()),
]

# What may come out differently with another kernel, once each: opening a stream takes seconds in there, and
# one that sees failures half a minute.
EXECVE = """
    test_execve.py::test_what_the_parent_knows
    test_execve.py::test_proc_agrees
    test_execve.py::test_a_script_has_its_interpreter_in_its_arguments
    test_execve.py::test_no_arguments_at_all
    test_execve.py::test_many_arguments
    test_execve.py::test_a_long_path_and_a_long_name
    test_execve.py::test_exec_by_descriptor
    test_execve.py::test_exec_by_another_thread_than_the_leader
    test_execve.py::test_sequence_numbers_count_each_cpu
    test_execve_details.py::test_each_step_of_a_path_walk[asyncio-perf]
    test_execve_details.py::test_what_cannot_be_read
    test_execve_details.py::test_a_failed_execveat
    test_execve_details.py::test_long_arguments_of_a_failure[asyncio-lengths1]
    test_execve_details.py::test_working_directories[asyncio-36]
    test_execve_details.py::test_working_directories_across_mounts
    test_execve_details.py::test_a_long_working_directory
    test_execve_details.py::test_inside_a_chroot
    test_execve_details.py::test_inside_a_pid_namespace
    test_execve_details.py::test_the_terminal_and_the_session
    test_execve_details.py::test_the_parent_by_name
    test_execve_details.py::test_the_container
    test_execve_details.py::test_filters_by_cgroup_with_descendants
    test_execve_details.py::test_filters_change_while_it_runs
    test_execve_details.py::test_exclude_self_in_a_pid_namespace
    test_execve_traced.py
    test_perfbuf.py::test_two_cpus_are_merged_by_time
    test_perfbuf.py::test_no_wakeup_is_missed[asyncio-0.001]
    test_perfbuf.py::test_a_busy_producer_is_not_interrupted_for_each_record
    test_perfbuf.py::test_a_cpu_that_goes_and_comes_back
"""


def run_inside(name: str, *tests: str, arguments: str = "") -> None:
    """Boot a machine, run these tests in it on asyncio alone, and fail as they do."""
    command = ["python", "-m", "pytest", "--no-skips", "--timeout=600", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest", "--color=no", "--durations=10", "-k", "not uvloop and not trio"]
    outcome = machine.run([*command, *tests], LOGS / name, limit=MINUTES * 60, arguments=arguments)
    counts = re.search(r"^passed: (\d+) of (\d+)$", outcome.output, re.MULTILINE)
    if outcome.code or not counts or counts[1] != counts[2]:
        console = outcome.console.read_text(errors="replace").splitlines()
        log = f"The console's last lines (all of it is in {outcome.console}):"
        report = [f"exit code {outcome.code}", outcome.output, log, *console[-30:]]
        pytest.fail("\n".join(report), pytrace=False)


def test_a_kernel_with_kprobes() -> None:
    own = [str(path) for path in sorted(INSIDE.glob("test_*.py"))]
    run_inside("kprobes", *own, *(f"tests/kernel/{test}" for test in EXECVE.split()))


def test_full_preemption() -> None:
    run_inside("full_preemption", str(INSIDE / "full_preemption"), arguments="preempt=full")


def test_one_cpu_of_two() -> None:
    run_inside("one_cpu_of_two", str(INSIDE / "one_cpu_of_two"), arguments="maxcpus=1")


def test_one_cpu() -> None:
    run_inside("one_cpu", str(INSIDE / "one_cpu"), arguments="nr_cpus=1")


def test_a_locked_down_kernel() -> None:
    run_inside("locked_down", str(INSIDE / "locked_down"), arguments="lockdown=confidentiality")
