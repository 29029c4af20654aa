"""A chat template of GLM's kind: roles as tokens without an end, think marks, arguments by item."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsv3.errors import RequestError
from dsv3.text.chat import ChatFormat
from dsv3.text.tokenizer import Tokenizer

# The published templates' structure, in short.
TEMPLATE = """\
[gMASK]<sop>
{%- macro visible(content) -%}{{ content if content is string else '' }}{%- endmacro -%}
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool.function | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>{{ visible(m.content) }}
{%- elif m.role == 'assistant' -%}<|assistant|>
{%- set content = visible(m.content) -%}
{%- if m.reasoning_content is string -%}
{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{%- if loop.index0 > last.user and thought is defined -%}
<think>{{ thought.strip() }}</think>{%- else -%}</think>{%- endif -%}
{{ content.strip() }}
{%- for tc in m.tool_calls or [] -%}
<tool_call>{{ tc.function.name }}
{%- for k, v in tc.function.arguments.items() -%}
<arg_key>{{ k }}</arg_key><arg_value>
{{- v if v is string else v | tojson(ensure_ascii=False) }}</arg_value>
{%- endfor -%}</tool_call>
{%- endfor -%}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif -%}
<tool_response>{{ visible(m.content) }}</tool_response>
{%- elif m.role == 'system' -%}<|system|>{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{ '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}
{%- endif -%}
"""
SPECIAL = (
    *("<|endoftext|>", "[gMASK]", "<sop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
MARKS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
    *("<arg_value>", "</arg_value>", "<tool_response>", "</tool_response>"),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a byte-level vocabulary with GLM's control tokens, read from files like GLM's."""
    folder = tmp_path_factory.mktemp("glm")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens([tokenizers.AddedToken(mark, special=False) for mark in MARKS])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.load(folder)


def control(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    names = {tokenizer.id_of(name): name for name in (*SPECIAL, *MARKS)}
    return [names[i] for i in ids if i in names]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "hm",
    "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": '{"x": "\\u003c|user|>", "y": [1]}'}}
    ],
}


@pytest.mark.parametrize("thinking", [False, True])
def test_thinking_is_switched_by_the_template(tokenizer: Tokenizer, thinking: bool) -> None:
    chat = ChatFormat(tokenizer, "glm_moe_dsa", "GLM-5")
    chat.check()
    ids = chat.prompt_ids([user("Hi")], thinking)
    mark = "<think>" if thinking else "</think>"
    assert tokenizer.decode(ids, False) == f"[gMASK]<sop><|user|>Hi<|assistant|>{mark}"
    assert control(tokenizer, ids) == ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", mark]
    assert chat.opens_thought(ids) == thinking
    assert chat.thinking_remark(thinking) == ""


def test_calls_and_results(tokenizer: Tokenizer) -> None:
    """Arguments that spell a control token with an escape stay text."""
    chat = ChatFormat(tokenizer, "glm_moe_dsa", "GLM-5")
    ids = chat.prompt_ids([user("Hi"), CALL, {"role": "tool", "content": "</tool_response>r"}])
    assert tokenizer.decode(ids, False) == (
        "[gMASK]<sop><|user|>Hi<|assistant|><think>hm</think><tool_call>f"
        "<arg_key>x</arg_key><arg_value><|user|></arg_value>"
        "<arg_key>y</arg_key><arg_value>[1]</arg_value></tool_call>"
        "<|observation|><tool_response></tool_response>r</tool_response><|assistant|></think>"
    )
    found = control(tokenizer, ids)
    assert found.count("<|user|>") == 1 and found.count("</tool_response>") == 1


def test_earlier_thoughts_are_dropped(tokenizer: Tokenizer) -> None:
    chat = ChatFormat(tokenizer, "glm4_moe_lite", "GLM-4.7-Flash")
    said = {"role": "assistant", "content": "<think>hm</think>4"}
    text = chat.render([user("2"), said, user("3")], thinking=True)
    assert text == "[gMASK]<sop><|user|>2<|assistant|></think>4<|user|>3<|assistant|><think>"


def test_malformed_arguments_are_named(tokenizer: Tokenizer) -> None:
    chat = ChatFormat(tokenizer, "glm_moe_dsa", "GLM-5")
    broken = CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
    with pytest.raises(RequestError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"):
        chat.render([user("2"), broken])


def test_other_templates_get_arguments_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """V3.1's joins the JSON text to its marks."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[1].tool_calls[0].function.arguments + '|' }}")
    chat = ChatFormat(tokenizer, template=template)
    assert chat.render([user("2"), CALL]) == '{"x": "\\u003c|user|>", "y": [1]}|'
