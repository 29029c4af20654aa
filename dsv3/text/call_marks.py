r"""Marks of tool calls, in the forms of different models.

A call of `f` in each form, where `<calls>`, `<call>` and so on stand for the marks:

    V3, R1   <calls><call>function<sep>f\n```json\n{...}\n```</call>\n<call>...</call></calls>
    V3.1     <calls><call>f<sep>{...}</call></calls>
    V3.2     <｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n
             <｜DSML｜parameter name="x" string="true">...</｜DSML｜parameter>\n ...
    Kimi-K2  <calls><call>functions.f:0<sep>{...}</call></calls>
    GLM      <call>f<key>x</key><value>...</value>...</call><call>...</call>
    forced   [{"name": "f", "arguments": {...}}]

Each mark is one token. Of V3.2's tags only `｜DSML｜` is one.
"""

from typing import NamedTuple


class SectionMarks(NamedTuple):
    """Marks of a section of calls, each with the tool's name and its arguments in JSON."""

    calls: str
    end_calls: str
    call: str
    end_call: str
    sep: str


class PairMarks(NamedTuple):
    """Marks of calls whose arguments are pairs of key and value."""

    call: str
    end_call: str
    key: str
    end_key: str
    value: str
    end_value: str


class Tags(NamedTuple):
    """Tags of calls in DSML; attributes and ">" follow `call` and `parameter`."""

    calls: str
    end_calls: str
    call: str
    end_call: str
    parameter: str
    end_parameter: str


DEEPSEEK = SectionMarks(
    calls="<｜tool▁calls▁begin｜>",
    end_calls="<｜tool▁calls▁end｜>",
    call="<｜tool▁call▁begin｜>",
    end_call="<｜tool▁call▁end｜>",
    sep="<｜tool▁sep｜>",
)
# Around the arguments in V3 and R1; plain text.
FENCE = "```json"
END_FENCE = "```"
KIMI = SectionMarks(
    calls="<|tool_calls_section_begin|>",
    end_calls="<|tool_calls_section_end|>",
    call="<|tool_call_begin|>",
    end_call="<|tool_call_end|>",
    sep="<|tool_call_argument_begin|>",
)
GLM = PairMarks(
    call="<tool_call>",
    end_call="</tool_call>",
    key="<arg_key>",
    end_key="</arg_key>",
    value="<arg_value>",
    end_value="</arg_value>",
)
DSML = "｜DSML｜"
DSML_TAGS = Tags(
    calls=f"<{DSML}function_calls>",
    end_calls=f"</{DSML}function_calls>",
    call=f"<{DSML}invoke",
    end_call=f"</{DSML}invoke>",
    parameter=f"<{DSML}parameter",
    end_parameter=f"</{DSML}parameter>",
)
