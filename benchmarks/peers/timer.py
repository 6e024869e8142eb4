"""What asyncio itself takes: a loop with nothing but a timer of 2 ms, about as often as our drains at 1,000 events/s.

`timer.py`: no events, no BPF.  "Consumed" are the turns.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers import reporting

PERIOD = 0.002


async def run() -> None:
    """For ever."""
    turns = 0
    reporting.ready(lambda: turns)
    while True:
        await asyncio.sleep(PERIOD)
        turns += 1


if __name__ == "__main__":
    asyncio.run(run())
