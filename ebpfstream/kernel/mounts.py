"""The lists of mounts in /proc."""

from __future__ import annotations

import re
from typing import Final

_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


def unescaped(field: bytes) -> bytes:
    """Blanks, tabs, newlines and backslashes are octal there (mangle(), fs/proc_namespace.c)."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
