"""Parameters of strict tools, in the forms of calls that write them one by one.

These forms write strings without quotes, other values as JSON. So the schema of a parameter is
split: into Lark terminals of the texts that it allows, and a JSON schema of its other values.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.errors import RequestError, shorten
from dsv3.text.json_schema import stated_types, target_of, types_of, with_root
from dsv3.text.openai_fields import show

_LONGEST = 1 << 20  # characters; higher limits count as none
_LONGEST_PATTERN = 1000
ANY = r"(?s:.*)"  # in a terminal: any text
_UNIONS = ("anyOf", "oneOf")
_REMARKS = {"title", "description", "default", "examples", "deprecated", "$comment"}
_OF_TEXTS = {"minLength", "maxLength", "pattern"}
_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_OF_OTHERS = {
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    *("properties", "required", "additionalProperties"),
}
# Parts of a pattern that Lark writes otherwise; in schemas, \d and \w are ASCII.
_IN_LARK = {"/": r"\/", "\n": r"\n", r"\d": "[0-9]", r"\D": "[^0-9]"}
_IN_LARK |= {r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}
_ROOT = "#/$defs/parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter of a tool.

    Attributes:
        texts: Lark terminals of the texts that are allowed; none allows no text.
        schema: JSON schema of the other values; None allows none.
        types: JSON types of all these values.
    """

    name: str
    is_required: bool
    texts: tuple[str, ...]
    schema: Any
    types: set[str]


def parameters_of(function: Mapping[str, Any]) -> Iterator[Parameter]:
    """Return the parameters of a strict tool, in the order of its schema.

    Raises:
        RequestError: calls cannot be constrained to its schema.
    """
    root = function.get("parameters") or {}
    for key in root.keys() - _OF_OBJECTS - _REMARKS - {"$schema"}:
        raise _unsupported(function["name"], f"parameters.{shorten(key)}")
    properties = root.get("properties", {})
    required = root.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise _unsupported(function["name"], "malformed properties or required")
    if not all(isinstance(name, str) and name in properties for name in required):
        raise _unsupported(function["name"], "a required parameter that is not in properties")
    for name, schema in properties.items():
        if not re.fullmatch(r'[^"<>\n]+', name) or name != name.strip():
            raise _unsupported(function["name"], f"the parameter name {show(name)}")
        where = f"{function['name']}, parameter {shorten(name)}"
        allowed = _AllowedValues(where, root)
        allowed.add_schema(schema)
        types = types_of(schema, root)
        others = allowed.schema_of_others() if types - {"string"} else None
        if not allowed.texts and others is None:
            raise _unsupported(where, "a schema that allows no value")
        yield Parameter(
            name=name,
            is_required=name in required,
            texts=tuple(allowed.texts),
            schema=others,
            types=types,
        )


def _unsupported(where: str, what: str) -> RequestError:
    return RequestError(
        f"tools: strict=true of {where}: {what} is not supported in this model's form of calls"
    )


class _AllowedValues:
    """Collects the values that a parameter's schema allows: texts, and others.

    Args:
        where: the parameter, for errors.
        root: schema of all parameters, to which references are relative.

    Attributes:
        texts: Lark terminals of texts.
    """

    def __init__(self, where: str, root: Mapping[str, Any]) -> None:
        self.texts: list[str] = []
        self._where = where
        self._root = root
        self._others: list[Any] = []
        self._seen: set[str] = set()

    def schema_of_others(self) -> Any:
        """Return the schema of values other than texts; None if there are none."""
        if not self._others:
            return None
        joined = {"anyOf": with_root(self._others, _ROOT)}
        if '"$ref"' not in json.dumps(joined):
            return joined
        return joined | {"$defs": {"parameters": with_root(self._root, _ROOT)}}

    def add_schema(self, schema: Any) -> None:
        """Add the values that a schema allows."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise _unsupported(self._where, show(schema))
        rules = {key: value for key, value in schema.items() if key not in _REMARKS}
        several = next((rules[key] for key in _UNIONS if rules.keys() == {key}), None)
        if rules.keys() == {"allOf"} and isinstance(rules["allOf"], list):
            several = rules["allOf"] if len(rules["allOf"]) == 1 else None
        if rules.keys() == {"$ref"}:
            reference = rules["$ref"]
            target = target_of(reference, self._root)
            if target is None:
                raise _unsupported(self._where, f"$ref={show(reference)}")
            if reference not in self._seen:  # each one is followed once, also if it is recursive
                self._seen.add(reference)
                self.add_schema(target)
        elif isinstance(several, list):
            for one in several:
                self.add_schema(one)
        elif "enum" in rules or "const" in rules:
            self._add_listed(rules)
        else:
            self._add_types(rules)

    def _add_listed(self, rules: dict[str, Any]) -> None:
        """Add the values that a schema lists."""
        values = rules["enum"] if "enum" in rules else [rules["const"]]
        types = stated_types(rules)
        known = {"enum" if "enum" in rules else "const", "type"}
        if rules.keys() - known or not isinstance(values, list):
            raise _unsupported(self._where, "more than type and one of enum and const in a schema")
        if "string" in types:
            self.texts += [literal(value) for value in values if isinstance(value, str)]
        others = [value for value in values if not isinstance(value, str)]
        other_types = [name for name in types if name != "string"]
        if others and other_types:
            self._others.append({"enum": others, "type": other_types})

    def _add_types(self, rules: dict[str, Any]) -> None:
        """Add the values of a schema's types."""
        types = stated_types(rules)
        if "string" in types:
            for key in rules.keys() - _OF_TEXTS - _OF_OTHERS - {"type"}:
                raise _unsupported(self._where, shorten(key))
            self.texts.append(self._terminal(rules))
        other_types = [name for name in types if name != "string"]
        if other_types:
            rest = {key: value for key, value in rules.items() if key not in _OF_TEXTS}
            self._others.append(rest | {"type": other_types})

    def _terminal(self, rules: dict[str, Any]) -> str:
        """Return the terminal of the texts that the rules for strings allow."""
        parts = []
        if "pattern" in rules:
            parts.append(self._matching(rules["pattern"]))
        lengths = [rules.get("minLength", 0), rules.get("maxLength", _LONGEST)]
        if not all(type(length) is int and length >= 0 for length in lengths):
            raise _unsupported(self._where, "a length that is no integer from 0 on")
        least, most = (min(length, _LONGEST) for length in lengths)
        if least > most:
            raise _unsupported(self._where, "minLength above maxLength")
        if not parts or least or most < _LONGEST:
            parts.append(f"/(?s:.{{{least},{'' if most == _LONGEST else most}}})/")
        return f"({' & '.join(parts)})"

    def _matching(self, pattern: Any) -> str:
        """Return the terminal of the texts in which a pattern is found."""
        is_short = isinstance(pattern, str) and len(pattern) <= _LONGEST_PATTERN
        found = (
            re.fullmatch(r"(\^?)((?:\\.|[^\\])*?)(\$?)", pattern, re.DOTALL) if is_short else None
        )
        if found is None or _has_alternatives(pattern):
            raise _unsupported(self._where, f"pattern={show(pattern)}")
        begin, body, end = found.groups()
        body = "".join(_IN_LARK.get(part, part) for part in re.findall(r"(?s)\\.|.", body))
        return f"/{'' if begin else ANY}(?:{body}){'' if end else ANY}/"


def literal(text: str) -> str:
    """Return the terminal of one text."""
    return json.dumps(text, ensure_ascii=False)


def _has_alternatives(pattern: str) -> bool:
    """Return True if a pattern has alternatives outside of groups: each has anchors of its own."""
    outside = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", pattern, flags=re.DOTALL)
    while (inner := re.sub(r"\([^()]*\)", "", outside)) != outside:
        outside = inner
    return "|" in outside
