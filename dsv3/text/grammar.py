"""The grammar of an answer: JSON by a schema, or calls of tools with free text before them.

Other answers are free. Arguments of tools with `strict: true` follow their schemas; the calls have
the form that the model was trained with, and the text before them is free. Calls that are required
have the form FORCED.
"""

from collections.abc import Mapping
from typing import Any

from dsv3.request import Grammar
from dsv3.text.call_grammar import calls_lark
from dsv3.text.json_schema import json_expression
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import CallForm, ToolUse

_SCHEMA = "the JSON schema"
_TOOLS = "the schema of a tool"


def answer_grammar(
    tools: ToolUse | None, schema: Mapping[str, Any] | None, tokenizer: Tokenizer | None
) -> Grammar | None:
    """Return the grammar of an answer; None if it is free.

    Args:
        tools: that the model may or must call.
        schema: JSON schema that the answer follows if it is no call.
        tokenizer: of the model, whose vocabulary shows the form of its calls.

    Raises:
        RequestError: calls in this form cannot be constrained to the schema of a strict tool.
    """
    if tools is not None and tools.is_required:
        return Grammar(lark=f"start: {json_expression(tools.forced_schema())}", subject=_TOOLS)
    if tools is None or (schema is None and not tools.has_strict):
        if schema is None:
            return None
        return Grammar(lark=f"start: {json_expression(schema)}", subject=_SCHEMA)
    form = CallForm.of(tokenizer)
    assert form is not None and tokenizer is not None, "the prompt was made with the tools"
    subject = _TOOLS if schema is None else f"{_SCHEMA} or {_TOOLS}"
    return Grammar(lark=calls_lark(form, tools, schema, tokenizer), subject=subject)
