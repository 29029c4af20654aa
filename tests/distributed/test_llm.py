"""The library: a user's script alone and on two ranks, every rank in step with the others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dsv3
from tests.forked import run_forked

SCRIPT = str(Path(__file__).with_name("llm_script.py"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("alone"))[0]


def results(folder: Path, num_ranks: int = 1) -> list[dict[str, Any]]:
    """Return what each rank got."""
    done = run_forked([SCRIPT, str(folder)], num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    return [json.loads(file.read_text()) for file in sorted(folder.iterdir())]


def test_a_script_gets_its_answers(alone: dict[str, Any]) -> None:
    assert alone["main"]
    assert alone["chat"] == alone["after"] == ["Your name is Anna."]
    assert alone["chats"][0] == "Your name is Anna." and alone["chats"][1].startswith("M")
    assert [len(ids) for ids in alone["tokens"]] == [3, 3]
    assert "".join(alone["stream"]) == "Your name is Anna." and len(alone["stream"]) > 3
    assert len(alone["left early"]) == 1
    assert alone["none"] == []


def test_a_refused_prompt_is_named_and_harms_no_other_call(alone: dict[str, Any]) -> None:
    empty, unknown, long, params, number = alone["refusals"]
    assert empty == "prompts[1]: prompt is empty: it has no tokens"
    assert unknown.startswith("prompt[1]=4000 is not a token of this model")
    assert "it may have 511" in long
    assert params == "1 params for 2 prompts"
    assert number == "a prompt is a text or token ids, not 5"


def test_streams_may_be_open_at_once(alone: dict[str, Any]) -> None:
    answer, other = "Your name is Anna.", alone["newer"]
    assert "".join(piece for piece, _ in alone["zipped"]) == answer
    assert other.startswith("".join(piece for _, piece in alone["zipped"]))
    assert alone["between"] == [answer] and alone["older"] == answer
    assert {number for number, _ in alone["numbered"]} == {0, 1}
    parts = ["".join(piece for i, piece in alone["numbered"] if i == number) for number in (0, 1)]
    assert other.startswith(parts[0]) and len(parts[1]) == 2


def test_several_answers_are_beside_one_another(alone: dict[str, Any]) -> None:
    assert [index for index, _ in alone["several"]] == [0, 1]
    assert len({text for _, text in alone["several"]}) == 2


def test_a_closed_model_says_so(alone: dict[str, Any]) -> None:
    calls = ("generate()", "chat()", "stream()", "streams()", "drop_conversation()", "`with`")
    assert alone["closed"] == [f"this LLM is closed: {call} needs a new one" for call in calls]


def test_two_ranks_answer_as_one_and_only_the_first_returns_text(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = results(tmp_path, 2)
    at_once = first["at once"]
    assert at_once.startswith("torch.distributed is in use in this process: close the LLM")
    assert alone["at once"] == ""  # a world of one can have several
    assert first == alone | {"tp": "tp=3 x dp=1 is not world_size=2", "at once": at_once}
    same = {name: first[name] for name in ("refusals", "closed", "tp", "at once")}
    assert second == {name: type(value)() for name, value in first.items()} | same


def test_the_package_imports_torch_only_when_asked_for_the_model() -> None:
    code = "import dsv3, sys; dsv3.SamplingParams(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"LLM", "SamplingParams"} <= set(dsv3.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Llm'"):
        dsv3.Llm  # noqa: B018
