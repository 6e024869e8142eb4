"""What is fuzzed: a function that takes any bytes and raises if something is wrong, and inputs to begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from fuzz import buffers, events, texts


class Target(NamedTuple):
    """One of them."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    generated: Callable[[], list[Callable[..., object]]] = list
    """Functions that were written at run time, so that the fuzzer cannot find them by itself."""


TARGETS: Final = {
    "ring": Target(buffers.ring, buffers.ring_seeds),
    "perf_part": Target(buffers.perf_part, buffers.perf_part_seeds),
    "perf": Target(buffers.perf, buffers.perf_seeds),
    "codecs": Target(events.codecs, events.codec_seeds, events.generated),
    "described": Target(events.described, events.description_seeds),
    "trace_pipe": Target(texts.trace_pipe, texts.trace_pipe_seeds),
    "program": Target(texts.program, texts.program_seeds),
    "names": Target(texts.names, texts.name_seeds),
}
