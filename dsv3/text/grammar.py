"""The grammar of an answer: JSON by a schema, or calls of tools in the form FORCED."""

from collections.abc import Mapping
from typing import Any

from dsv3.request import Grammar
from dsv3.text.json_schema import json_rule
from dsv3.text.tools import ToolUse

_SCHEMA = "the JSON schema"
_TOOLS = "the schema of a tool"


def answer_grammar(tools: ToolUse | None, schema: Mapping[str, Any] | None) -> Grammar | None:
    """Return the grammar of an answer with tools, or with a schema; None if it is free."""
    if tools is not None and tools.is_required:
        return Grammar(f"start: {json_rule(tools.schema())}", _TOOLS)
    return None if schema is None else Grammar(f"start: {json_rule(schema)}", _SCHEMA)
