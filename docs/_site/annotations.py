"""How signatures are shown in the reference: values and types in place of names that nobody can look up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import griffe


class InPlace(griffe.Extension):
    """Fields as type checkers see them, defaults as values, aliases of Literal as what they allow."""

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """`Annotated[str, Computed(…)]` is a str to whoever uses it; the rest is for the decoder."""
        match attr.annotation:
            case griffe.ExprSubscript(left=left, slice=griffe.ExprTuple(elements=[shown, *_])) if str(
                left
            ) == "Annotated" and isinstance(shown, griffe.Expr):
                attr.annotation = shown

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Once every module has been read, names can be followed."""
        for function in _functions(pkg):
            for parameter in function.parameters:
                parameter.default = _value(pkg, parameter.default)
                parameter.annotation = _allowed(pkg, parameter.annotation)
            if function.overloads and str(function.returns) == "EventStream[Any]":
                function.returns = _plain(function.overloads)


def _functions(within: griffe.Module | griffe.Class) -> Iterator[griffe.Function]:
    for member in within.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Function):
            yield member
        elif isinstance(member, griffe.Module | griffe.Class):
            yield from _functions(member)


def _value(pkg: griffe.Module, name: Any) -> Any:
    """What a constant of ours is, if that is what the name means; else the name."""
    if not isinstance(name, griffe.ExprName) or not name.canonical_path.startswith(f"{pkg.path}."):
        return name
    try:
        found = pkg[name.canonical_path.removeprefix(f"{pkg.path}.")]
    except KeyError:
        return name
    return found.value if found.is_attribute and found.value is not None else name


def _allowed(pkg: griffe.Module, annotation: Any) -> Any:
    if isinstance(annotation, griffe.ExprBinOp):  # such as: Mechanism | None
        annotation.left = _allowed(pkg, annotation.left)
    alias = _value(pkg, annotation)
    return alias if str(alias).startswith("Literal[") else annotation


def _plain(overloads: list[griffe.Function]) -> Any:
    """What is returned if losses are not asked for."""
    return next(one.returns for one in overloads if "Lost" not in str(one.returns))
