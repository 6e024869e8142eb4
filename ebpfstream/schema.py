"""JSON Schema of the lines that events become."""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin

from ebpfstream.codec import selection
from ebpfstream.events import Array, Event, Integer, Kind, layout, schema_version
from ebpfstream.text import hyphenated

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_TIME: Final = {"type": "string", "format": "date-time"}
_PLAIN: Final[dict[Any, dict[str, Any]]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "null"]},  # there is no infinity in JSON
    str: {"type": "string"},
    bytes: {"type": "string"},
    tuple: {"type": "array"},
    datetime: _TIME,
    NoneType: {"type": "null"},
}
_COUNT: Final = {"type": ["integer", "null"], "minimum": 0}
_LOST: Final = {
    "title": "Lost",
    "description": "Events for which the kernel's buffer, or a sink's queue (cpu is null), had no room.",
    "type": "object",
    "properties": {
        "lost": {
            "type": "object",
            "properties": {
                "cpu": _COUNT,
                "count": _COUNT,
                "first_sequence": _COUNT,
                "last_sequence": _COUNT,
                "time": {**_TIME, "type": ["string", "null"]},
            },
            "required": ["cpu", "count", "first_sequence", "last_sequence", "time"],
            "additionalProperties": False,
        }
    },
    "required": ["lost"],
    "additionalProperties": False,
}


def json_schema(
    event_type: type[Event], fields: Mapping[str, str] | Sequence[str] | None = None
) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of each line that `to_json_lines` makes of such events: an event, or a loss.

    `fields` are those that are chosen, as for `EventBatch.select`; with them it has no `$id`.  Where the type has a
    version, the `$id` ends with it: within one version fields are only added.  Raises EventTypeError, ArgumentError
    for unknown fields.
    """
    kinds = layout(event_type).kinds
    event = _object(
        event_type, {name: name for name in kinds} if fields is None else selection(event_type, fields)
    )
    name = hyphenated(event_type.__name__)
    version = schema_version(event_type)
    identity = {} if version is None or fields is not None else {"$id": f"urn:ebpfstream:{name}:{version}"}
    return {"$schema": _DIALECT, **identity, "title": event_type.__name__, "oneOf": [event, _LOST]}


def _object(event_type: type[Event], fields: Mapping[str, str]) -> dict[str, Any]:
    plan = layout(event_type)
    said = _descriptions(event_type)
    properties = {}
    for name, shown in fields.items():
        described = {"description": said[name]} if name in said else {}
        properties[shown] = described | _field(plan.kinds[name], plan.types[name])
    return {
        "title": event_type.__name__,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _field(kind: Kind, type: Any) -> dict[str, Any]:
    if isinstance(kind, Integer) and type is not bool:
        return _integer(kind)
    if isinstance(kind, Array):
        return {"type": "array", "items": _integer(kind.item), "minItems": kind.count, "maxItems": kind.count}
    return _value(type)


def _integer(kind: Integer) -> dict[str, Any]:
    return {"type": "integer", "minimum": kind.limits[0], "maximum": kind.limits[-1]}


def _value(type: Any) -> dict[str, Any]:
    if get_origin(type) in (Union, UnionType):
        return {"anyOf": [_value(part) for part in get_args(type)]}
    match get_origin(type), get_args(type):
        case builtins.tuple, [item, builtins.Ellipsis]:
            return {"type": "array", "items": _value(item)}
        case builtins.tuple, items:
            each = [_value(item) for item in items]
            return {"type": "array", "prefixItems": each, "minItems": len(each), "maxItems": len(each)}
    if inspect.isclass(type) and issubclass(type, Event):
        return _object(type, {name: name for name in layout(type).kinds})
    return dict(_PLAIN.get(type, {}))


def _descriptions(event_type: type[Any]) -> dict[str, str]:
    """What the source says below each field."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(event_type)))
    except (OSError, TypeError, SyntaxError):  # made at run time
        return {}
    (body,) = tree.body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found
