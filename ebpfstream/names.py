"""Names that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 3


def near(name: str, known: Iterable[str]) -> list[str]:
    """The few known names that are spelled most like this one, the nearest first."""
    return difflib.get_close_matches(name, list(known), n=_SHOWN, cutoff=0.7)


def did_you_mean(names: Iterable[str]) -> str:
    """What an error adds to an unknown name: "; did you mean x, y or z?", or nothing without names."""
    *others, last = list(dict.fromkeys(names))[:_SHOWN] or [""]
    if not last:
        return ""
    return f"; did you mean {', '.join(others)} or {last}?" if others else f"; did you mean {last}?"
