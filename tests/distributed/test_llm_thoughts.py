"""Thoughts in the library: apart from the answer, the same on one rank and on two."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.config_files import DEMO
from dsv3.text.tokenizer import Tokenizer
from tests.forked import run_forked

SCRIPT = str(Path(__file__).with_name("thoughts_script.py"))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}"
    "{{ '<｜Assistant｜><think>\\n' }}"
)


def results(folder: Path, num_ranks: int = 1) -> tuple[list[Any], str]:
    (folder / "t.jinja").write_text(TEMPLATE)
    done = run_forked([SCRIPT, str(folder)], num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))], done.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    (got,), stderr = results(tmp_path_factory.mktemp("alone"))
    return got, stderr


def test_the_thought_is_apart_and_stop_strings_end_only_the_answer(
    alone: tuple[dict[str, Any], str],
) -> None:
    got, _ = alone
    ((thought, text, reason),), ((same, cut, ended),) = got["whole"], got["cut"]
    assert reason == "length" and ended == "stop"
    in_thought, in_answer = got["stop"]
    assert same == thought and in_thought in thought
    ends = [text.find(stop) for stop in (in_thought, in_answer) if stop in text]
    assert cut == text[: min(ends)]
    assert (got["answer"], got["thought"].partition("</think>")[0].strip()) == (cut, thought)
    ((reasoning, raw, _),) = got["raw"]
    assert reasoning is None and raw.strip() == thought[:3].strip()  # raw prompts know no thoughts
    ((thought, text, reason),) = got["brief"]
    assert thought and (text, reason) == ("", "length")


def test_a_message_is_text_and_a_wish_without_effect_is_mentioned_once(
    alone: tuple[dict[str, Any], str],
) -> None:
    (prompt,), stderr = alone[0]["prompt"], alone[1]
    tokenizer = Tokenizer.load(DEMO)
    assert prompt.count(tokenizer.id_of("<｜User｜>")) == 1
    assert tokenizer.decode(prompt, False).count("<｜User｜>") == 2
    assert stderr.count("thinking cannot be switched off") == 1


def test_two_ranks_think_as_one(alone: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    (first, second), _ = results(tmp_path, 2)
    assert first == alone[0]
    assert second["whole"] == [] and second["answer"] == ""
