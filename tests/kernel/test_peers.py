"""That every peer of benchmarks/peers does its work, so that its figures are of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import build, catalogue, targets
from benchmarks.peers.catalogue import Peer
from benchmarks.peers.process import Producer
from benchmarks.peers.run import started

pytestmark = pytest.mark.kernel

_HELLO = [peer.name for peer in catalogue.hello(Path())]
_EXECS = [peer.name for peer in catalogue.execs()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if lack := build.missing("producer"):
        pytest.skip(lack)
    made = tmp_path_factory.mktemp("peers")
    build.build(made)
    return made


def _consumed(peer: Peer, folder: Path, how: str) -> tuple[float, int]:
    """What the peer took, and what there was."""
    if lack := build.missing(peer.part):
        pytest.skip(lack)
    producer = Producer(folder)
    try:
        with started(peer, peer.command, producer, folder / "events") as running:
            before = running.settled().events
            calls = producer.run(how).calls
            return running.settled().events - before, calls
    finally:
        producer.close()


@pytest.mark.parametrize("name", _HELLO)
def test_a_peer_takes_every_event(folder: Path, name: str) -> None:
    (peer,) = (peer for peer in catalogue.hello(folder) if peer.name == name)
    events, calls = _consumed(peer, folder, "paced 0.2 10000")
    if peer.writes or "a wakeup for 512" in name:  # the last ones are in its own buffer, or in the kernel's
        assert calls / 2 < events <= calls * 1.01
    else:
        assert events == calls > 1000


@pytest.mark.parametrize("name", _EXECS)
def test_a_peer_sees_what_is_executed(folder: Path, name: str) -> None:
    (peer,) = (peer for peer in catalogue.execs() if peer.name == name)
    events, calls = _consumed(peer, folder, "exec 0.3 /bin/true")
    assert events > calls / 2 > 10


def test_every_target_is_about_somebody_who_takes_part() -> None:
    assert {name for target in targets.TARGETS for name in (target.ours, target.peer) if name} <= {
        *_HELLO,
        *_EXECS,
    }


def test_a_ratio_is_of_figures_of_the_same_round() -> None:
    results = {
        "ebpfstream async for, ring": [{"rate": 20.0}, {"rate": 90.0}, {"rate": 50.0}],
        targets.BCC_RING: [{"rate": 10.0}, {"rate": 30.0}, {"rate": 25.0}],
    }
    (verdict,) = targets.judge(results, {})
    assert (verdict["least"], verdict["found"], verdict["most"]) == (2, 2, 3)
    assert not verdict["met"]
