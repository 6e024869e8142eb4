"""What a peer in Python tells the one who measures it: how many events it has consumed, when it is asked.

A line on standard input asks; at the end of it the peer ends, and tells how late events were, if it noted that.
For all that is measured, a thread of the peer waits there and does nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence


def ready(
    consumed: Callable[[], int],
    lost: Callable[[], int | None] = lambda: None,
    latencies: Sequence[int] = (),
    finish: Callable[[], object] = lambda: None,
) -> None:
    """Say that all is attached, and answer from now on; `finish` is called at the end."""
    threading.Thread(target=_answer, args=(consumed, lost, latencies, finish), daemon=True).start()
    print("ready", flush=True)


def _answer(
    consumed: Callable[[], int],
    lost: Callable[[], int | None],
    latencies: Sequence[int],
    finish: Callable[[], object],
) -> None:
    for _ in sys.stdin:
        print(
            json.dumps({"time": time.monotonic_ns(), "consumed": consumed(), "lost": lost()}),
            flush=True,
        )
    finish()
    print(json.dumps({"latencies": list(latencies)}), flush=True)
    os._exit(0)
