"""What is public, as a list that is kept: whoever changes it sees that users will notice.

`python -m tests.test_public` writes the list anew.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ebpfstream
from ebpfstream import testing

LIST = Path(__file__).with_name("public.txt")
_OURS = "ebpfstream"


def listed() -> Iterator[str]:
    """A line for each public name and each public member of a class, with its parameters."""
    ours = [name for names in ebpfstream._HOMES.values() for name in names]
    for module, names in ((ebpfstream, ours), (testing, testing.__all__)):
        for name in sorted(names):
            value = getattr(module, name)
            yield f"{module.__name__}.{name}{_shape(value)}"
            if inspect.isclass(value):
                yield from (f"    {line}" for line in _members(value))


def _shape(value: Any) -> str:
    if inspect.isclass(value):
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        return f"({bases})" if issubclass(value, Exception) else _signature(value)
    return _signature(value) if inspect.isroutine(value) else ""  # types for annotations are no functions


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    # Names and defaults: types are what mypy looks at, and Python's versions write them differently.
    bare = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else _Default(parameter.default),
        )
        for parameter in signature.parameters.values()
    ]
    shape = str(inspect.Signature(bare))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in bare):
        shape += _options(value.__init__ if inspect.isclass(value) else value, bare[-1].name)
    return shape


def _options(function: Any, name: str) -> str:
    """What may be given as `**name`, if that is annotated."""
    options = typing.get_args(typing.get_type_hints(function).get(name))
    return f" {', '.join(sorted(typing.get_type_hints(options[0])))}" if options else ""


class _Default:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        value = self._value
        return repr(value) if isinstance(value, str | int | float | tuple | None) else "…"


def _members(of: type) -> Iterator[str]:
    found: dict[str, Any] = {}
    for base in reversed(of.__mro__):
        if base.__module__.startswith(_OURS):
            found |= dict.fromkeys(inspect.get_annotations(base)) | vars(base)
    for name in sorted(name for name in found if not name.startswith("_")):
        value = getattr(of, name, None)
        yield name + (_signature(value) if inspect.isroutine(value) else "")


def test_public_names_are_those_that_are_kept() -> None:
    assert LIST.read_text().splitlines() == list(listed()), (
        "`python -m tests.test_public` writes the list anew"
    )


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in listed()))
