from typing import Any

import pytest

from dsv3.errors import RequestError
from dsv3.text.messages import check_message, map_strings

SAID = {"role": "assistant", "content": "Noted."}
# Fields that servers and clients add to an answer.
SENT_BACK: dict[str, dict[str, Any]] = {
    "OpenAI": {"refusal": None, "annotations": [], "audio": None, "function_call": None},
    "OpenAI's client": {"tool_calls": None, "parsed": None},
    "vLLM": {"tool_calls": [], "reasoning": None, "reasoning_content": None, "refusal": None},
    "SGLang": {"reasoning_content": "", "tool_calls": None},
    "DeepSeek": {"prefix": False, "index": 0},
    "a choice's number": {"index": 3},
    "others": {"provider_specific_fields": {}, "images": [], "audio": {}},
}


@pytest.mark.parametrize("sender", SENT_BACK)
def test_answers_can_be_sent_back(sender: str) -> None:
    assert check_message("messages[1]", SAID | SENT_BACK[sender]) == SAID


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning": "It told a name."},
        {"reasoning_content": "It told a name."},
        {"reasoning": "It told a name.", "reasoning_content": "It told a name."},
        {"reasoning": "It told a name.", "reasoning_content": None},
    ],
)
def test_reasoning_has_two_names(fields: dict[str, Any]) -> None:
    want = SAID | {"reasoning_content": "It told a name."}
    assert check_message("messages[1]", SAID | fields) == want


def test_an_answer_cut_within_its_thought_has_an_empty_text() -> None:
    said = {"role": "assistant", "content": None, "reasoning": "Let me"}
    want = {"role": "assistant", "content": "", "reasoning_content": "Let me"}
    assert check_message("messages[1]", said) == want
    assert check_message("messages[1]", {"role": "user", "content": ""})["content"] == ""


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"annotations": [{"type": "url_citation"}]}, "messages[1].annotations is not supported"),
        ({"prefix": True}, "messages[1].prefix is not supported"),
        ({"function_call": {"name": "f"}}, "messages[1].function_call is not supported"),
        ({"reasoning": 5}, "messages[1].reasoning_content must be a text"),
        ({"name": ["a"]}, "messages[1].name must be a text"),
        (
            {"reasoning": "a", "reasoning_content": "b"},
            "messages[1]: reasoning and reasoning_content differ: give one of them",
        ),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_message("messages[1]", SAID | fields)
    assert str(caught.value) == error


def test_strings_are_changed_at_any_depth_that_json_has() -> None:
    assert map_strings({"a": ["b", 1, None, ("c",)]}, str.upper) == {"A": ["B", 1, None, ["C"]]}
    deep: Any = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        map_strings(deep, str.upper)
