"""JSON schemas as parts of a grammar, in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping
from typing import Any

TYPES = ("string", "null", "boolean", "number", "array", "object")
# As Python writes JSON, and thus most JSON that models were trained with. If white space were free,
# a model could write it without end.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Unbounded integers are limited to +-(2^53 - 1), the range that every JSON reader represents
# exactly; otherwise a model may write digits without end.
_MAX_INTEGER = 2**53 - 1
_LOWER = ("minimum", "exclusiveMinimum")
_UPPER = ("maximum", "exclusiveMaximum")
_DATA = {"const", "enum", "default", "examples"}  # their values are not schemas
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # schemas by any names


def json_expression(schema: Any) -> str:
    """Return the expression of a JSON value that follows a schema."""
    bounded = _bounded(schema)
    styled = {"x-guidance": _STYLE} if bounded is True else bounded | {"x-guidance": _STYLE}
    return f"%json {json.dumps(styled, ensure_ascii=False)}"


def with_root(schema: Any, pointer: str) -> Any:
    """Return a schema whose references are relative to the place that `pointer` names."""
    if isinstance(schema, list):
        return [with_root(item, pointer) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: with_root(value, pointer) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = pointer + target[1:]
    return moved


def target_of(reference: Any, root: Any) -> Any:
    """Return the schema that a reference into a schema names; None if there is none."""
    keys = reference.split("/") if isinstance(reference, str) else []
    value = root
    for key in keys[1:]:
        value = value.get(key.replace("~1", "/").replace("~0", "~"))
        if not isinstance(value, dict):
            return None
    return value if keys[:1] == ["#"] else None


def types_of(schema: Any, root: Any, seen: set[str] | None = None) -> set[str]:
    """Return the JSON types that a schema may allow; all of them if that is not clear.

    A stated `type` is not narrowed by alternatives beside it.

    Args:
        schema: the schema.
        root: schema to which its references are relative.
        seen: references that were followed before; they allow nothing more.
    """
    seen = set() if seen is None else seen
    if not isinstance(schema, dict):
        return set(TYPES)
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in seen:
            return set()
        seen.add(reference)
        return types_of(target_of(reference, root), root, seen)
    both = schema.get("allOf")
    several = both if _is_one(both) else schema.get("anyOf", schema.get("oneOf"))
    if isinstance(several, list) and several and "type" not in schema:
        return set.union(*(types_of(one, root, seen) for one in several))
    stated = stated_types(schema)
    types = set(stated if all(isinstance(one, str) for one in stated) else TYPES)
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {_type_of(value) for value in values if has_type(value, types)}
    return types


def stated_types(schema: Mapping[str, Any]) -> list[Any]:
    """Return the types that a schema states by `type`; all types if it states none."""
    stated = schema.get("type", list(TYPES))
    return stated if isinstance(stated, list) else [stated]


def _is_one(schemas: Any) -> bool:
    return isinstance(schemas, list) and len(schemas) == 1


def _type_of(value: Any) -> str:
    """Return the type of a JSON value."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names: dict[type, str] = {str: "string", list: "array", dict: "object", int: "integer"}
    return names.get(type(value), "number")


def has_type(value: Any, types: set[str]) -> bool:
    """Return True if a JSON value has one of some types."""
    own = _type_of(value)
    return own in types or (own == "integer" and "number" in types)


def _bounded(schema: Any) -> Any:
    """Return a JSON schema with bounds for all integers."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounded: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            bounded[key] = {name: _bounded(inner) for name, inner in value.items()}
        else:
            bounded[key] = value if key in _DATA else _bounded(value)
    return bounded | _integer_bounds(schema)


def _integer_bounds(schema: dict[str, Any]) -> dict[str, int]:
    """Return the bounds that the integers of a schema lack."""
    types = stated_types(schema)
    if "integer" not in types or "number" in types or not {"enum", "const"}.isdisjoint(schema):
        return {}
    bounds = {}
    # A bound beyond the range leaves the other side open.
    least = [schema[name] for name in _LOWER if name in schema]
    most = [schema[name] for name in _UPPER if name in schema]
    if not least and not any(_is_beyond(bound) for bound in most):
        bounds["minimum"] = -_MAX_INTEGER
    if not most and not any(_is_beyond(bound) for bound in least):
        bounds["maximum"] = _MAX_INTEGER
    return bounds


def _is_beyond(bound: Any) -> bool:
    return isinstance(bound, int | float) and abs(bound) > _MAX_INTEGER
