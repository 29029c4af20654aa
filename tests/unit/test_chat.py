from pathlib import Path
from typing import Any

import pytest

from dsv3.errors import CheckpointError, RequestError
from dsv3.request import SamplingParams
from dsv3.text.chat import ChatFormat, UnusableFormat
from dsv3.text.messages import PromptEnd
from dsv3.text.text_request import TextRequest, encode_prompt
from dsv3.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
BOS, EOS, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
SHORT = [{"role": "user", "content": "Hi"}]
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>easy</think>2"},
    {"role": "user", "content": "Sure?"},
]
TWO_SYSTEMS = [{"role": "system", "content": s} for s in ("One.", "Two.")] + SHORT

# Exercises what transformers' environment offers beyond plain Jinja.
RICH_TEMPLATE = """
{%- set seen = namespace(count=0) %}
{{ bos_token }}
{%- for m in messages %}
    {%- if m['role'] == 'assistant' and 'skip' in m['content'] %}{% continue %}{% endif %}
    {% if m['role'] == 'user' %}
    {{ U ~ m['content'] | trim }}
    {% else %}
<{{ m['role'] }}>{{ m | tojson }}
    {% endif %}
    {%- set seen.count = seen.count + 1 %}
{%- endfor %}
{{ tools | tojson(indent=1) if tools }} {{ seen.count }} {{ strftime_now('%Y') }}
{% if add_generation_prompt %}{{ '<think>' if enable_thinking else eos_token }}{% endif %}
"""
ROLE_TEMPLATE = """\
{%- for m in messages %}
{%- if m.role == 'user' %}{{ m.content + suffix }}
{%- elif m.role == 'system' %}{{ raise_exception('No system\n  messages, please.') }}
{%- endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.load(DEMO)


def chat(demo: Tokenizer, template: str | None, model_type: str = "", name: str = "") -> ChatFormat:
    """A checkpoint with the demo's vocabulary and another template, or none."""
    tokenizer = Tokenizer(demo._vocabulary, {}, template)
    tokenizer.special_tokens = demo.special_tokens
    return ChatFormat(tokenizer, model_type, name)


PUBLISHED = [
    ("deepseek_v2", "DeepSeek-V2-Lite-Chat", False, SHORT, f"{BOS}User: Hi\n\nAssistant:"),
    (
        "deepseek_v2",
        "DeepSeek-V2-Chat",
        False,
        LONG,
        f"{BOS}Be brief.\n\nUser: 1+1?\n\nAssistant: <think>easy</think>2{EOS}"
        "User: Sure?\n\nAssistant:",
    ),
    ("deepseek_v2", "DeepSeek-V2.5", False, SHORT, f"{BOS}{U}Hi{A}"),
    ("deepseek_v3", "DeepSeek-V3", False, SHORT, f"{BOS}{U}Hi{A}"),
    (
        "deepseek_v3",
        "DeepSeek-V3-0324",
        False,
        LONG,
        f"{BOS}Be brief.{U}1+1?{A}<think>easy</think>2{EOS}{U}Sure?{A}",
    ),
    ("deepseek_v3", "DeepSeek-V3", False, TWO_SYSTEMS, f"{BOS}One.\n\nTwo.{U}Hi{A}"),
    ("deepseek_v3", "DeepSeek-R1", False, SHORT, f"{BOS}{U}Hi{A}<think>\n"),
    (
        "deepseek_v3",
        "DeepSeek-R1-0528",
        True,
        LONG,
        f"{BOS}Be brief.{U}1+1?{A}2{EOS}{U}Sure?{A}<think>\n",
    ),
    ("deepseek_v3", "DeepSeek-V3.1", False, SHORT, f"{BOS}{U}Hi{A}</think>"),
    (
        "deepseek_v3",
        "DeepSeek-V3.1-Terminus",
        True,
        LONG,
        f"{BOS}Be brief.{U}1+1?{A}</think>2{EOS}{U}Sure?{A}<think>",
    ),
    (
        "deepseek_v3",
        "DeepSeek-V3.1",
        False,
        LONG[:3],  # nothing to answer: no generation prompt
        f"{BOS}Be brief.{U}1+1?{A}</think>2{EOS}",
    ),
    ("deepseek_v32", "DeepSeek-V3.2-Exp", False, SHORT, f"{BOS}{U}Hi{A}</think>"),
    (
        "deepseek_v32",
        "DeepSeek-V3.2",
        True,
        [*SHORT, {"role": "assistant", "content": "Yes?", "reasoning_content": "hm"}, *SHORT],
        f"{BOS}{U}Hi{A}</think>Yes?{EOS}{U}Hi{A}<think>",
    ),
    (
        "deepseek_v32",
        "DeepSeek-V3.2",
        True,
        [*SHORT, {"role": "assistant", "content": "Yes?", "reasoning_content": "hm"}],
        f"{BOS}{U}Hi{A}<think>hm</think>Yes?{EOS}",
    ),
    (
        "deepseek_v32",
        "DeepSeek-V3.2",
        False,
        [{"role": "developer", "content": "Do it."}],
        f"{BOS}{U}\n\n# The user's message is: Do it.{A}</think>",
    ),
]


@pytest.mark.parametrize(("model_type", "name", "thinking", "messages", "want"), PUBLISHED)
def test_published_formats(
    demo: Tokenizer,
    model_type: str,
    name: str,
    thinking: bool,
    messages: list[dict[str, Any]],
    want: str,
) -> None:
    assert chat(demo, None, model_type, name).render(messages, thinking) == want


BEGUN = {"role": "assistant", "content": [{"type": "text", "text": " So <｜User｜> is "}]}


@pytest.mark.parametrize(
    ("model_type", "name", "thinking", "want"),
    [
        ("deepseek_v2", "DeepSeek-V2-Chat", False, f"{BOS}User: Hi\n\nAssistant:  So "),
        ("deepseek_v3", "DeepSeek-V3", False, f"{BOS}{U}Hi{A} So "),
        ("deepseek_v3", "DeepSeek-R1", False, f"{BOS}{U}Hi{A} So "),
        ("deepseek_v3", "DeepSeek-V3.1", True, f"{BOS}{U}Hi{A}</think> So "),
        ("deepseek_v32", "DeepSeek-V3.2", True, f"{BOS}{U}Hi{A}<think></think> So "),
        ("template", "", False, f"{BOS}{U}Hi{A}So "),
    ],
)
def test_an_answer_is_continued_without_its_end(
    demo: Tokenizer, model_type: str, name: str, thinking: bool, want: str
) -> None:
    """The template trims messages; the end of the text stays, and names in it are text."""
    template = None
    if model_type == "template":
        template = (
            "{{ bos_token }}{% for m in messages %}{{ {'user': '<｜User｜>', "
            "'assistant': '<｜Assistant｜>'}[m.role] + m.content.strip() }}{% endfor %}"
            "{{ eos_token }}"
        )
    format_ = chat(demo, template, model_type, name)
    ids = format_.prompt_ids([*SHORT, BEGUN], thinking, end=PromptEnd.CONTINUED)
    text = demo.decode(ids, skip_special_tokens=False)
    assert text == f"{want}<｜User｜> is "
    assert ids.count(demo.id_of(U) or 0) == want.count(U)


@pytest.mark.parametrize(
    "last",
    [
        SHORT[0],
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "A", "tool_calls": [{"id": "x"}]},
    ],
)
def test_only_the_text_of_an_answer_is_continued(demo: Tokenizer, last: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="only an answer can be continued"):
        chat(demo, None, "deepseek_v3").prompt_ids([*SHORT, last], end=PromptEnd.CONTINUED)
    dropping = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}assistant"
    with pytest.raises(RequestError, match="leaves out the answer"):
        chat(demo, dropping).prompt_ids([*SHORT, BEGUN], end=PromptEnd.CONTINUED)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3"])
def test_without_generation_prompt_the_conversation_just_ends(
    demo: Tokenizer, model_type: str
) -> None:
    text = chat(demo, None, model_type).render(LONG[:3], end=PromptEnd.MESSAGE)
    assert text.endswith("2" + EOS)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template", ["demo", RICH_TEMPLATE])
def test_same_text_as_transformers(
    demo: Tokenizer, template: str, thinking: bool, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(DEMO)
    source = demo.chat_template if template == "demo" else template.replace("U ~", f"'{U}' ~")
    assert source is not None
    tools = [{"type": "function", "function": {"name": "Ü"}}] if template != "demo" else None
    messages = [*LONG, {"role": "assistant", "content": "skip & <b>"}, *SHORT]
    want = theirs.apply_chat_template(
        messages,
        chat_template=source,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        thinking=thinking,
        enable_thinking=thinking,
    )
    ours = chat(demo, source)
    end = PromptEnd.ANSWER if add_generation_prompt else PromptEnd.MESSAGE
    got = ours.render(messages, thinking, tools, end)
    assert got == want
    assert ours.encode(got) == theirs(want, add_special_tokens=False)["input_ids"]


def test_content_may_be_a_list_of_text_parts(demo: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = ChatFormat(demo).render([{"role": "user", "content": parts}])
    assert text == f"{BOS}{U}a\nb{A}"


def test_developer_is_the_newer_name_of_system(demo: Tokenizer) -> None:
    text = ChatFormat(demo).render([{"role": "developer", "content": "Be brief."}, *SHORT])
    assert text == f"{BOS}Be brief.{U}Hi{A}"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty; give at least one message"),
        (["hi"], "messages[0] must be an object with role and content"),
        ([{"content": "hi"}], "messages[0].role=None is unknown; use one of system, developer, "),
        ([{"role": "robot", "content": "hi"}], "messages[0].role='robot' is unknown; use one of"),
        ([{"role": ["user"], "content": "hi"}], "messages[0].role=['user'] is unknown"),
        ([*SHORT, {"role": "user"}], "messages[1].content is missing"),
        ([{"role": "user", "content": None}], "messages[0].content is missing"),
        ([{"role": "user", "content": 5}], "messages[0].content must be a text or a list of text"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0] must be an object like"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "messages[0].content[0].type='image_url' is not supported, only 'text'",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text must be a text",
        ),
        ([{"role": "user", "content": "a", "weight": 1}], "messages[0].weight is not supported"),
        (
            [{"role": "tool", "content": "4"}],
            "messages[0].role='tool' is unknown to this model's chat format",
        ),
    ],
)
def test_a_bad_message_is_named(demo: Tokenizer, messages: list[Any], error: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatFormat(demo).render(messages)
    assert str(caught.value).startswith(error)


def test_a_template_that_refuses_is_one_line(demo: Tokenizer) -> None:
    picky = chat(demo, ROLE_TEMPLATE)
    for messages, reason in (
        (LONG, "No system messages, please."),
        (SHORT, "line 2: 'suffix' is undefined"),
    ):
        with pytest.raises(RequestError) as caught:
            picky.render(messages)
        assert str(caught.value) == f"the chat template refuses these messages: {reason}"


def test_templates_run_in_a_sandbox(demo: Tokenizer) -> None:
    for source in ("{{ messages.clear() }}", "{{ ''.__class__.__mro__ }}"):
        with pytest.raises(RequestError, match=r"refuses these messages: .*unsafe"):
            chat(demo, source).render(SHORT)


def test_a_template_with_a_syntax_error_names_its_line(demo: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="chat template, line 2: "):
        chat(demo, "fine\n{% if %}")


def test_no_template_and_no_known_format(demo: Tokenizer) -> None:
    reason = "no chat template in this checkpoint, and no known format for model type 'kimi_k2'"
    with pytest.raises(CheckpointError, match=reason):
        chat(demo, None, "kimi_k2")
    unusable = ChatFormat.load_optional(Tokenizer(demo._vocabulary), "kimi_k2")
    assert unusable == UnusableFormat(reason)
    with pytest.raises(CheckpointError, match=reason):
        unusable.prompt_ids(SHORT)
    assert ChatFormat.load_optional(None) is None


def test_published_formats_refuse_tools(demo: Tokenizer) -> None:
    with pytest.raises(RequestError, match="tools need a chat template"):
        chat(demo, None, "deepseek_v3").render(SHORT, tools=[{"type": "function"}])


@pytest.mark.parametrize("template", [None, RICH_TEMPLATE])
def test_other_formats_refuse_a_schema(demo: Tokenizer, template: str | None) -> None:
    with pytest.raises(RequestError, match="no place for a schema of the answer"):
        chat(demo, template, "deepseek_v3").render(SHORT, schema={})


SWITCHED = "{{ messages[-1].content }}{{ '<think>' if thinking else '</think>' }}"
NO_THOUGHTS = "asking for thinking changes nothing: this model's chat format has no switch for it"
ALWAYS = "thinking cannot be switched off: this model's chat format always thinks"


@pytest.mark.parametrize(
    ("template", "asked", "refused"),
    [
        ("demo", NO_THOUGHTS, ""),
        (SWITCHED, "", ""),
        ("{{ messages[-1].content }}<think>\n", "", ALWAYS),
        (
            "{{ messages[-1].content.split('</think>')[-1] }}[assistant]",  # the model opens it
            NO_THOUGHTS,
            "thinking cannot be switched off: this model's chat format leaves it to the model",
        ),
        ("{{ nosuch.field }}", "", ""),  # each conversation reports the reason
    ],
)
def test_a_wish_for_thinking_without_effect_is_mentioned_once(
    demo: Tokenizer, template: str, asked: str, refused: str
) -> None:
    made = chat(demo, demo.chat_template if template == "demo" else template)
    remarks = [made.thinking_remark(wish) for wish in (None, True, False, True, False)]
    assert remarks == ["", asked, refused, "", ""]


def test_a_batch_mentions_it_once(demo: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    made, asked = ChatFormat(demo), SamplingParams()
    for thinking in (True, None, True):
        request = TextRequest(messages=SHORT, params=asked, thinking=thinking)
        encode_prompt(request, demo, made)
    assert caplog.messages == [NO_THOUGHTS]


def test_generation_tags_are_ignored(demo: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(DEMO)
    source = (
        "{%- set end = 'x' %}{% for m in messages %}\n{% if m.role == 'assistant' %}\n"
        "  {% generation %}\n{% set end = eos_token %}{{ m.content + end }}\n"
        "  {% endgeneration %}\n{{ end }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    want = theirs.apply_chat_template(LONG, chat_template=source, tokenize=False)
    assert "2<｜end▁of▁sentence｜>" in want
    assert chat(demo, source).render(LONG, end=PromptEnd.MESSAGE) == want


def test_a_template_is_tried_with_several_conversations(demo: Tokenizer) -> None:
    needs_system = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('No system message.') }}"
        "{% endif %}{{ messages[1].content }}"
    )
    chat(demo, needs_system).check()
    with pytest.raises(CheckpointError, match=r"chat template: No system message\.$"):
        chat(demo, needs_system.replace("!=", "!= 'x' or 'a' !=")).check()
    with pytest.raises(CheckpointError, match="chat template: line 2: No filter named 'nosuch'"):
        chat(demo, "\n{{ 'a' | nosuch }}").check()
