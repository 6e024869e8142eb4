"""Conditions on events that are given as text: on a command line, in a configuration."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable
from typing import Any, Final

from ebpfstream.errors import ArgumentError
from ebpfstream.events import layout
from ebpfstream.names import did_you_mean, near

_FUNCTIONS: Final = ("abs", "all", "any", "bool", "int", "len", "max", "min", "set", "sorted", "str", "sum")
_EVENT: Final = "_event"


def condition(event_type: type[Any], text: str) -> Callable[[Any], bool]:
    """The condition that a Python expression in the names of an event's fields means: `uid == 0 and "-c" in args`.

    It may call methods of the fields, and a few of Python's own functions.  Whoever writes it is trusted like who
    writes a program.  Raises ArgumentError for what is no expression, and for names that there are not; so does
    the function that is returned, for an event of which it cannot be told.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ArgumentError(
            f"{text!r} is no condition ({error.args[0]}): write a Python expression in the names of fields, "
            "such as uid == 0"
        ) from error
    parameters = ast.arguments(
        posonlyargs=[], args=[ast.arg(arg=_EVENT)], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    function = ast.Lambda(args=parameters, body=_Fields(event_type, text, tree).visit(tree.body))
    code = compile(ast.fix_missing_locations(ast.Expression(body=function)), "<condition>", "eval")
    allowed = {name: getattr(builtins, name) for name in _FUNCTIONS}
    holds = eval(code, {"__builtins__": allowed})  # noqa: S307  # who writes it is trusted

    def checked(event: Any) -> bool:
        try:
            return bool(holds(event))
        except Exception as error:
            raise ArgumentError(
                f"{text!r} cannot be told of {event!r}: {type(error).__name__}: {error}"
            ) from error

    return checked


class _Fields(ast.NodeTransformer):
    """Makes of names the event's fields, but for those that comprehensions bind."""

    def __init__(self, event_type: type[Any], text: str, tree: ast.Expression) -> None:
        self._type, self._text = event_type, text
        self._fields = list(layout(event_type).kinds)
        self._bound = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._bound:
            return node
        if node.id in self._fields:
            return ast.Attribute(value=ast.Name(id=_EVENT, ctx=ast.Load()), attr=node.id, ctx=ast.Load())
        if node.id in _FUNCTIONS:
            return node
        raise ArgumentError(
            f"{self._text!r}: {self._type.__name__} has no field {node.id!r}"
            f"{did_you_mean(near(node.id, self._fields))} (it has {', '.join(self._fields)})"
        )

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr.startswith("_"):
            raise ArgumentError(
                f"{self._text!r}: {node.attr} is private: use fields and their public methods"
            )
        return self.generic_visit(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        raise ArgumentError(f"{self._text!r}: a condition has no functions of its own: write it out")

    def visit_Await(self, node: ast.Await | ast.Yield | ast.YieldFrom) -> ast.AST:
        raise ArgumentError(f"{self._text!r}: a condition is told at once: leave out await and yield")

    visit_Yield = visit_YieldFrom = visit_Await  # noqa: N815  # names of ast's
