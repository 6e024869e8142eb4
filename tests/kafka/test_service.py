"""The service through faults of its broker and ends of its own, for a minute; `make service` goes on for an hour."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from benchmarks.service_check import Check, Evidence
from benchmarks.service_run import OTHERS, Run
from tests.kafka.client import Record

pytestmark = [pytest.mark.kafka, pytest.mark.kernel, pytest.mark.timeout(400)]

OUTAGE: Final = (
    3.0  # seconds; a request may take longer, so what was on its way arrives when the broker is back
)
PLAN: Final = ((2, "kill-broker"), (16, "terminate"), (20, "where"), (22, "kill-away"), (36, "rename"))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evidence]:
    """What a run leaves, in lists: to be looked at again and again."""
    with Run(tmp_path_factory.mktemp("service"), outage=OUTAGE) as run:
        run.go(iter(PLAN), 40)
        assert [done.what for done in run.done] == [what for _, what in PLAN]
        found = run.evidence()
        files = [(name, list(lines)) for name, lines in found.files]
        yield replace(found, records=list(found.records), files=files)


def test_nothing_that_was_accepted_is_lost(evidence: Evidence) -> None:
    check = Check(evidence)
    assert check.violations == []
    lives = evidence.lives
    assert [(life.how, life.status) for life in lives] == [("SIGTERM", 0), ("SIGKILL", -9), ("SIGTERM", 0)]
    assert [life.left_out for life in lives] == [0, OTHERS, 0]
    for life, found in zip(lives, check.found, strict=True):
        assert found.received.events >= life.sink("kafka")["accepted"] > found.required > 0
        assert found.lines > 0
    # What was accepted while the broker was away, before SIGKILL.
    assert lives[2].sink("kafka")["recovered"] > 0
    assert sum(found.required + found.unaccepted for found in check.found) <= len(evidence.executed)
    assert {"execs.jsonl", "execs.jsonl.moved-4"} <= {name for name, _ in evidence.files}
    assert len(evidence.faults) == 2


# --- each violation is found


def records(evidence: Evidence) -> list[Record]:
    """A list of its own."""
    assert isinstance(evidence.records, list)
    evidence.records = list(evidence.records)
    return evidence.records


def of_life(evidence: Evidence, life: int) -> list[int]:
    """Which records tell of events of a life."""
    began, ended = evidence.lives[life - 1].began, evidence.lives[life - 1].ended
    return [
        at
        for at, record in enumerate(evidence.records)
        if began < json.loads(record.value or b"")["monotonic"] < ended
    ]


def a_record_is_missing(evidence: Evidence) -> None:
    del records(evidence)[of_life(evidence, 2)[1000]]


def the_last_ones_are_missing(evidence: Evidence) -> None:
    """No gap tells of them."""
    which = of_life(evidence, 2)
    kept = sorted(which, key=lambda at: json.loads(records(evidence)[at].value or b"")["monotonic"])[:500]
    dropped = set(which) - set(kept)
    evidence.records = [one for at, one in enumerate(evidence.records) if at not in dropped]


def a_record_is_doubled(evidence: Evidence) -> None:
    found = records(evidence)
    found.append(found[of_life(evidence, 3)[500]])
    evidence.faults = []


def two_change_places(evidence: Evidence) -> None:
    found = records(evidence)
    last: dict[tuple[int, bytes], int] = {}
    for at in of_life(evidence, 3):
        cpu = found[at].partition, dict(found[at].headers)["sequence"].partition(b"/")[0]
        if cpu in last:
            found[at], found[last[cpu]] = found[last[cpu]], found[at]
            return
        last[cpu] = at


def a_number_is_missing(evidence: Evidence) -> None:
    """It has a sequence number, but is another's."""
    found, token = records(evidence), f'"{evidence.token}"'.encode()
    at = next(at for at in of_life(evidence, 1)[500:] if token in (found[at].value or b""))
    found[at] = found[at]._replace(value=(found[at].value or b"").replace(token, b'"another"'))


def what_was_left_out_is_there(evidence: Evidence) -> None:
    evidence.forbidden = {min(evidence.expected)}


def what_was_taken_in_is_not(evidence: Evidence) -> None:
    evidence.expected = evidence.expected | {"never"}


def a_line_is_torn(evidence: Evidence) -> None:
    evidence.files = [(name, [lines[0][:-2], *lines[1:]]) for name, lines in _lists(evidence)]


def a_line_is_missing(evidence: Evidence) -> None:
    evidence.files = [(name, lines[1:]) for name, lines in _lists(evidence)]


def a_line_is_doubled(evidence: Evidence) -> None:
    evidence.files = [(name, [*lines, lines[-1]]) for name, lines in _lists(evidence)]


def _lists(evidence: Evidence) -> list[tuple[str, list[bytes]]]:
    return [(name, list(lines)) for name, lines in evidence.files]


def it_ended_with_another_status(evidence: Evidence) -> None:
    evidence.lives[0].status = 3


def its_ledger_does_not_balance(evidence: Evidence) -> None:
    relog(evidence, '"acknowledged": ', '"acknowledged": 1')


def its_spool_lost_something(evidence: Evidence) -> None:
    relog(evidence, '"spooled": 0', '"spooled": 7')


def it_logged_an_error(evidence: Evidence) -> None:
    relog(evidence, '"level": "info", "event": "ending"', '"level": "error", "event": "sorry"')


def it_logged_no_json(evidence: Evidence) -> None:
    relog(evidence, '{"timestamp"', "Traceback")


def relog(evidence: Evidence, right: str, wrong: str) -> None:
    """Let the first life have logged something else."""
    life = evidence.lives[0]
    text = life.log.read_text()
    assert right in text
    evidence.lives[0] = replace(life, log=life.log.with_suffix(".planted"))
    evidence.lives[0].log.write_text(text.replace(right, wrong))


PLANTED: Final[dict[Callable[[Evidence], None], str]] = {
    a_record_is_missing: "life 2: 21 sequence numbers are missing; 20 left out by where, 0 told as lost",
    the_last_ones_are_missing: "500 are in the topic",
    a_record_is_doubled: "life 3: 1 events came twice, and no fault explains it",
    two_change_places: "out of order in a partition",
    a_number_is_missing: "numbers that were executed while it was attached 1 have not arrived",
    what_was_left_out_is_there: "an execution that was to be left out, and has arrived",
    what_was_taken_in_is_not: "an execution that had to arrive, and has not (once; first: never)",
    a_line_is_torn: "a line in a file that is no whole JSON object",
    a_line_is_missing: "life 1: files and topic do not hold the same events",
    a_line_is_doubled: "an event twice in the files",
    it_ended_with_another_status: "life 1: exit status 3",
    its_ledger_does_not_balance: "life 1: a sink's ledger does not balance",
    its_spool_lost_something: "life 1: 7 were in its spool, the next life found 0",
    it_logged_an_error: "life 1 logged: sorry",
    it_logged_no_json: "life 1 logged: Traceback",
}


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_it_is_seen_when(plant: Callable[[Evidence], None], evidence: Evidence) -> None:
    planted = replace(evidence, lives=[replace(life) for life in evidence.lives])
    plant(planted)
    violations = Check(planted).violations
    assert any(PLANTED[plant] in violation for violation in violations), violations


def test_a_sink_that_keeps_nothing_on_disk_loses_what_it_had_accepted(tmp_path: Path) -> None:
    with Run(tmp_path, durable=False) as run:
        run.go(iter([(2, "kill-away")]), 10)
        violations = Check(run.evidence()).violations
    assert any("were accepted" in violation for violation in violations), violations
