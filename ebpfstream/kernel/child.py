"""Children that run a module of this folder with the standard library alone: how they are called, and their errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebpfstream import errors
from ebpfstream.errors import EbpfStreamError


def command(module: str, *arguments: str) -> list[str]:
    """The command line that calls a module's `main`; its arguments begin at `sys.argv[2]`."""
    return [
        sys.executable or "python3",
        "-I",
        "-S",
        "-c",
        _code(module),
        str(Path(__file__).parents[2]),
        *arguments,
    ]


def _code(module: str) -> str:
    # Appended, so that no module of site-packages can stand in for one of the standard library.
    return (
        f"import sys; sys.path.append(sys.argv[1]); from ebpfstream.kernel import {module}; {module}.main()"
    )


def answer(error: EbpfStreamError) -> dict[str, Any]:
    """An error as what a child hands back."""
    return {"error": type(error).__name__, "message": str(error)}


def error_of(answered: Mapping[str, Any]) -> EbpfStreamError | None:
    """The error that a child handed back; None if it handed back something else."""
    if "error" not in answered:
        return None
    made: EbpfStreamError = getattr(errors, answered["error"])(answered["message"])
    return made
