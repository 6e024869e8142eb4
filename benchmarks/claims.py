"""What a benchmark found, in the form in which benchmarks/README.md says it.

A claim is a figure, or a ratio of two that were measured in the same round, for each round; and what was asked of it,
if anything was.  With `--json FILE` each benchmark writes its claims there, among whatever else it found.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ebpfstream.bench.results import machine

Claims = list[dict[str, Any]]


def claim(
    text: str, rounds: Sequence[float], limit: float | None = None, *, at_least: bool = True
) -> dict[str, Any]:
    """Of a figure of each round; `limit` is what the median is to be at least, or at most."""
    found = statistics.median(rounds)
    return {
        "target": text,
        "limit": limit,
        "at_least": at_least,
        "found": found,
        "least": min(rounds),
        "most": max(rounds),
        "met": limit is None or (found >= limit if at_least else found <= limit),
    }


def ratio(
    text: str, over: Sequence[float], under: Sequence[float], limit: float | None = None
) -> dict[str, Any]:
    """Of two figures of each round, to be at least `limit`."""
    return claim(text, [one / other for one, other in zip(over, under, strict=True)], limit)


def table(claims: Iterable[dict[str, Any]]) -> str:
    """Markdown: medians, the least and the most of the rounds, and whether it is as asked."""
    lines = ["| | asked | found (least to most) | |", "|---|--:|--:|---|"]
    for one in claims:
        found, limit = one["found"], one["limit"]
        asked = "" if limit is None else f"{'≥' if one['at_least'] else '≤'} {limit:g}"
        spread = "" if one["least"] == one["most"] else f" ({number(one['least'])} to {number(one['most'])})"
        by = f", by {abs(found / limit - 1):.0%}" if limit else ""
        said = "" if limit is None else "met" if one["met"] else f"**missed**{by}"
        lines.append(f"| {one['target']} | {asked} | {number(found)}{spread} | {said} |")
    return "\n".join(lines)


def number(value: float) -> str:
    """With three digits, or as many as there are before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def save(path: Path | None, claims: Claims, **more: Any) -> None:
    """Write them to a file, if there is to be one; the machine is told as well, unless `more` does."""
    if path is not None:
        found = {"machine": machine(), **more, "targets": claims}
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
