"""For tests of sinks, and of code that is given events: recorded or made ones, and what every sink must stand.

    class TestMySink(SinkCompliance):
        @pytest.fixture(autouse=True)
        def destination(self, tmp_path):
            self.path = tmp_path / "events"

        def make(self, **delivery):
            return MySink(self.path, **delivery)

        def arrived(self):
            return [json.loads(line) for line in self.path.read_bytes().splitlines()]

Needs pytest.  With blockbuster installed, calls that block the event loop are found as well.
"""

from __future__ import annotations

from ebpfstream.testing.batches import ExampleEvent, make_batch
from ebpfstream.testing.cancelling import Outcome, Way, cancelled_at, ways_to_cancel
from ebpfstream.testing.compliance import SinkCompliance
from ebpfstream.testing.harness import Other
from ebpfstream.testing.recorded import Replay, load_batches, read_events, save_batches

__all__ = [
    "ExampleEvent",
    "Other",
    "Outcome",
    "Replay",
    "SinkCompliance",
    "Way",
    "cancelled_at",
    "load_batches",
    "make_batch",
    "read_events",
    "save_batches",
    "ways_to_cancel",
]
