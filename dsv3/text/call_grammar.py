"""Grammars of answers that may call tools in the form that a model was trained with.

An answer ends after its calls. Arguments of strict tools follow the schemas of the tools, those of
other tools are free. The marks of calls are tokens, which no text contains. The forms are shown in
`dsv3.text.call_marks`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsv3.text.call_marks import DEEPSEEK, DSML, END_FENCE, FENCE, GLM, KIMI
from dsv3.text.json_schema import json_expression
from dsv3.text.parameter_grammar import ANY, Parameter, literal, parameters_of
from dsv3.text.thoughts import END_THINK, THINK
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import CallForm, ToolUse, arguments_schema

_INTEGER = "-?(0|[1-9][0-9]*)"
_JSON = {  # these match at least all JSON texts of a type
    "null": "null",
    "boolean": "true|false",
    "integer": _INTEGER,
    "number": rf"{_INTEGER}(\.[0-9]+)?([eE][+-]?[0-9]+)?",
    "array": rf"\[{ANY}\]",
    "object": rf"\{{{ANY}\}}",
}
_BLANKS = r"\n{0,2}"
_ANY_PARAMETER = r'name="[^"<>\n]+" string="(true|false)">'
_TERMINALS = [r"TEXT: /(?s:.+)/", r"BLANK: /\n{1,2}/", r"INDEX: /[0-9]{1,4}/"]


def calls_lark(
    form: CallForm, tools: ToolUse, schema: Mapping[str, Any] | None, tokenizer: Tokenizer
) -> str:
    """Return the grammar of an answer that is free text, or JSON by a schema, or calls of tools.

    Args:
        form: of the calls.
        tools: that may be called.
        schema: None is free text, which may also come before calls.
        tokenizer: has the marks as tokens.

    Raises:
        RequestError: calls in this form cannot be constrained to the schema of a strict tool.
    """
    writer = _Writer(tools, tokenizer, is_free=schema is None)
    other = "TEXT?" if schema is None else f"BLANK? {json_expression(schema)}"
    writer.rule("start", f"{writer.thought()} ({other} | {writer.calls(form)})")
    return "\n".join(writer.rules + _TERMINALS)


class _Writer:
    """Writes rules.

    Args:
        tools: that may be called.
        tokenizer: has the marks as tokens.
        is_free: free text may come before calls.

    Attributes:
        rules: written so far.
    """

    def __init__(self, tools: ToolUse, tokenizer: Tokenizer, is_free: bool) -> None:
        self.rules: list[str] = []
        self._tools = tools
        self._tokenizer = tokenizer
        self._is_free = is_free

    def rule(self, name: str, expression: str) -> str:
        """Add a rule; return its name."""
        self.rules.append(f"{name}: {expression}")
        return name

    def thought(self) -> str:
        """Return the expression of a thought that an answer may begin with."""
        if not {THINK, END_THINK} <= set(self._tokenizer.control_tokens):
            return ""  # a part of the text
        return f"({self._mark(THINK)} TEXT? {self._mark(END_THINK)} BLANK?)?"

    def calls(self, form: CallForm) -> str:
        """Return the expression of the calls of an answer, and of the text before them."""
        before = "TEXT?" if self._is_free else "BLANK?"
        match form:
            case CallForm.DEEPSEEK:
                # V3's template leaves out the end of a section with one call.
                call = self._several(self._deepseek_call())
                end = self._mark(DEEPSEEK.end_calls)
                return f"{before} {self._mark(DEEPSEEK.calls)} {call} {end}?"
            case CallForm.KIMI:
                call = self._several(self._kimi_call())
                return f"{before} {self._mark(KIMI.calls)} {call} {self._mark(KIMI.end_calls)}"
            case CallForm.GLM:
                return f"{before} {self._several(self._glm_call())}"
            case CallForm.DSML:
                before = self._new("BEGIN", f"/{ANY if self._is_free else _BLANKS}</")
                call = self._several(self._dsml_call())
                tag = f'{self._mark(DSML)} "function_calls>'
                return f'{before} {tag}\\n" {call} "</" {tag}"'
        raise AssertionError(f"{form}: its calls follow a JSON schema")

    def _deepseek_call(self) -> str:
        plain, fenced = [], []
        for function in self._functions():
            name = function["name"]
            arguments = self._arguments(function)
            plain.append(f"{literal(name)} {self._mark(DEEPSEEK.sep)} {arguments or 'TEXT?'}")
            # Free text extends to the next mark, so its pattern includes the end of the fence.
            block = f'{arguments} "\\n{END_FENCE}"' if arguments else rf"/{ANY}\n{END_FENCE}/"
            head = literal(f"{name}\n{FENCE}\n")
            fenced.append(f"{head} {block}")
        older = f'"function" {self._mark(DEEPSEEK.sep)} ({_either(fenced)})'
        head = f"{self._mark(DEEPSEEK.call)} ({_either(plain)} | {older})"
        return self._new("call", f"{head} {self._mark(DEEPSEEK.end_call)}")

    def _kimi_call(self) -> str:
        calls = []
        for function in self._functions():
            name = literal(f"functions.{function['name']}:")
            calls.append(
                f"{name} INDEX {self._mark(KIMI.sep)} {self._arguments(function) or 'TEXT?'}"
            )
        mark, end = self._mark(KIMI.call), self._mark(KIMI.end_call)
        return self._new("call", f"{mark} ({_either(calls)}) {end}")

    def _dsml_call(self) -> str:
        dsml = self._mark(DSML)
        any_value = self._new("ANY", rf"/parameter {_ANY_PARAMETER}{ANY}<\//")
        any_parameter = f'"<" {dsml} {any_value} {dsml} "parameter>\\n"'
        calls = []
        for function in self._functions():
            head = literal(f'invoke name="{function["name"]}">\n')
            parameters = self._parameters(function, any_parameter, self._dsml_parameter)
            calls.append(f"{head} {parameters}")
        end = f'"</" {dsml} "invoke>\\n"'
        return self._new("call", f'"<" {dsml} ({_either(calls)}) {end}')

    def _dsml_parameter(self, parameter: Parameter) -> str:
        dsml = self._mark(DSML)
        head = f'parameter name="{parameter.name}" string='
        values = []
        if parameter.texts:
            text = self._new("VALUE", f'({_either(parameter.texts)}) "</"')
            values.append(literal(f'{head}"true">') + f" {text}")
        if parameter.schema is not None:
            values.append(literal(f'{head}"false">') + f' {json_expression(parameter.schema)} "</"')
        return f'"<" {dsml} ({_either(values)}) {dsml} "parameter>\\n"'

    def _glm_call(self) -> str:
        any_parameter = self._glm_pair("TEXT", "TEXT?")
        calls = []
        for function in self._functions():
            parameters = self._parameters(function, any_parameter, self._glm_parameter)
            calls.append(f"{literal(function['name'])} BLANK? {parameters}")
        mark, end = self._mark(GLM.call), self._mark(GLM.end_call)
        return self._new("call", f"{mark} ({_either(calls)}) {end}")

    def _glm_parameter(self, parameter: Parameter) -> str:
        values = []
        texts = _either(parameter.texts)
        if parameter.schema is not None:
            values.append(json_expression(parameter.schema))
            others = _either(text for name, text in _JSON.items() if name in parameter.types)
            texts = f"({texts}) & ~/{others}/"  # it would be parsed as another value
        if parameter.texts:
            values.append(self._new("VALUE", texts))
        return self._glm_pair(literal(parameter.name), f"({_either(values)})")

    def _glm_pair(self, key: str, value: str) -> str:
        key = f"{self._mark(GLM.key)} {key} {self._mark(GLM.end_key)}"
        return f"{key} BLANK? {self._mark(GLM.value)} {value} {self._mark(GLM.end_value)} BLANK?"

    def _parameters(
        self, function: Mapping[str, Any], any_parameter: str, write: Callable[[Parameter], str]
    ) -> str:
        """Return the expression of a tool's parameters; a strict tool's are in its schema's order.

        Args:
            function: the tool.
            any_parameter: expression of a parameter of a tool that is not strict.
            write: returns the expression of a parameter of a strict tool.
        """
        if not function.get("strict"):
            return f"({any_parameter})*"
        rules = []
        for parameter in parameters_of(function):
            rule = self._new("parameter", write(parameter))
            rules.append(rule if parameter.is_required else f"{rule}?")
        return " ".join(rules)

    def _arguments(self, function: Mapping[str, Any]) -> str:
        """Return the rule of a tool's arguments in JSON; empty if the tool is not strict."""
        if not function.get("strict"):
            return ""
        return self._new("arguments", json_expression(arguments_schema(function)))

    def _several(self, call: str) -> str:
        return f"{call} (BLANK? {call})*" if self._tools.is_parallel else call

    def _functions(self) -> list[Mapping[str, Any]]:
        return [tool["function"] for tool in self._tools.tools]

    def _new(self, prefix: str, expression: str) -> str:
        """Add a rule under a new name; return the name."""
        return self.rule(f"{prefix}{len(self.rules)}", expression)

    def _mark(self, name: str) -> str:
        return f"<[{self._tokenizer.id_of(name)}]>"


def _either(expressions: Iterable[str]) -> str:
    return " | ".join(expressions)
