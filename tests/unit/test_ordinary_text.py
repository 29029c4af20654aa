"""Control tokens' names in messages are text; those that the format writes are tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import RequestError
from dsv3.text.chat import ChatFormat
from dsv3.text.ordinary_text import OrdinaryText
from dsv3.text.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
TOKENIZER = Tokenizer.load(DEMO)
ORDINARY = OrdinaryText(TOKENIZER)
BOS, EOS, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
THINK, END = "<think>", "</think>"
NAMES = (BOS, EOS, U, A, THINK, END)
CONTROL = {TOKENIZER.id_of(name) for name in TOKENIZER.control_tokens}
# As published templates treat messages: trimmed, split, replaced, joined, written as JSON.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content | trim }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content.strip().replace('  ', ' ') }}"
    "{% elif m.role == 'tool' %}{{ '<｜User｜>' ~ {'result': m.content} | tojson }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name ~ (m.tool_calls | tojson) }}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}{{ tools | tojson if tools }}{{ '<｜Assistant｜>' }}"
)


def with_template(template: str | None, model_type: str = "", name: str = "") -> ChatFormat:
    tokenizer = Tokenizer(TOKENIZER._vocabulary, {}, template)
    tokenizer.special_tokens = TOKENIZER.special_tokens
    return ChatFormat(tokenizer, model_type, name)


def written(ids: list[int]) -> list[str]:
    """The control tokens among ids, by name."""
    return [TOKENIZER.token_text(i) for i in ids if i in CONTROL]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_no_message_makes_control_tokens(role: str, name: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": role, "content": f" x {name}  y{name}"}]
    ids = with_template(TEMPLATE).prompt_ids(messages)
    first = [BOS, U, A] if role == "system" else [BOS, U, U, A]
    assert written(ids) == first
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert text.count(name) == 2 + first.count(name)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
@pytest.mark.parametrize("name", ["V3", "R1", "V3.1"])
def test_published_formats_write_messages_as_text(model_type: str, name: str) -> None:
    chat = with_template(None, model_type, f"DeepSeek-{name}")

    def tokens(text: str) -> list[str]:
        messages = [{"role": role, "content": text} for role in ("system", "user")]
        return written(chat.prompt_ids(messages))

    assert tokens("hi " + "".join(NAMES)) == tokens("hi")


def test_an_earlier_answer_keeps_its_think_marks_only() -> None:
    said = {"role": "assistant", "content": f"so{END}4 {U}{EOS}"}
    asked = [{"role": "user", "content": f"1{END}2"}, said, {"role": "user", "content": "b"}]
    text = TOKENIZER.decode(with_template(TEMPLATE).prompt_ids(asked), False)
    assert text == f"{BOS}{U}1{END}2{A}4 {U}{EOS}{EOS}{U}b{A}"
    assert written(with_template(TEMPLATE).prompt_ids(asked)) == [BOS, U, A, EOS, U, A]
    whole = with_template("{{ messages[1].content }}").prompt_ids(asked)
    assert written(whole) == [END]


def test_tools_and_calls_of_them_are_text() -> None:
    function = {"name": f"f{U}", "arguments": {f"k{EOS}": [f"v{A}", 1]}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    chat = with_template(TEMPLATE)
    prompt = chat.render([call], tools=[{"type": "function", "description": f"d{BOS}"}])
    ids = chat.encode(prompt)
    assert written(ids) == [BOS, A, EOS, A]
    text = TOKENIZER.decode(ids, skip_special_tokens=False)
    assert json.dumps([{"function": function}], ensure_ascii=False) in text
    assert f"d{BOS}" in text


def test_messages_that_meet_make_no_control_token() -> None:
    halves = [{"role": "system", "content": part} for part in ("a <｜Us", "er｜> b <", "｜User｜>")]
    ids = ChatFormat(TOKENIZER).prompt_ids([*halves, {"role": "user", "content": "c"}])
    assert written(ids) == [BOS, U, A]
    assert TOKENIZER.decode(ids, False) == f"{BOS}a {U} b {U}{U}c{A}"


@given(
    st.lists(
        st.sampled_from([*NAMES, " ", "a", "12", "\n", "<", "<｜", "é", "\U0010fffd", "\U00100001"])
    )
)
def test_any_text_is_encoded_as_it_is(parts: list[str]) -> None:
    text = "".join(parts)
    ids = ORDINARY.encode(U + ORDINARY.hide(text) + A)
    assert written(ids) == [U, A]
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == U + text + A
    assert ids[1:-1] == TOKENIZER.encode_ordinary(text)


@given(st.text(alphabet="ab 12\n.<>é胡🙂｜'", max_size=80))
def test_text_without_control_tokens_has_the_tokens_it_always_had(text: str) -> None:
    prompt = f"{BOS}{U}{ORDINARY.hide(text)}{A}{THINK}\n"
    assert ORDINARY.encode(prompt) == TOKENIZER.encode(f"{BOS}{U}{text}{A}{THINK}\n", False)


def test_half_a_character_is_named_beside_a_control_token() -> None:
    with pytest.raises(RequestError, match=r"half of a surrogate pair \(character 12\)"):
        ORDINARY.encode(U + ORDINARY.hide(f"a {U} \ud83d"))


def test_single_letters_that_are_added_tokens_stay_parts_of_text(tmp_path: Path) -> None:
    data = json.loads((DEMO / "tokenizer.json").read_text())
    entry: dict[str, Any] = {
        **data["added_tokens"][-1],
        "id": 2100,
        "content": "ü",
        "special": False,
    }
    data["added_tokens"].append(entry)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.load(tmp_path)
    letter = tokenizer.id_of("ü")
    assert "ü" not in tokenizer.control_tokens
    ordinary = OrdinaryText(tokenizer)
    assert ordinary.encode(ordinary.hide("ü")) == [letter] == tokenizer.encode("ü", False)
    assert letter in ordinary.encode(ordinary.hide(f"ü {U}"))


def test_tokens_that_are_not_special_are_control_tokens_if_written_like_marks(
    tmp_path: Path,
) -> None:
    text = (DEMO / "tokenizer.json").read_text().replace('"special": true', '"special": false')
    (tmp_path / "tokenizer.json").write_text(text)
    tokenizer = Tokenizer.load(tmp_path)
    ordinary = OrdinaryText(tokenizer)
    assert tokenizer.control_tokens == TOKENIZER.control_tokens
    assert ordinary.encode(ordinary.hide(U)) == TOKENIZER.encode_ordinary(U)
    assert tokenizer.encode(U, False) == [TOKENIZER.id_of(U)]
