"""The library: a user's script alone and on two ranks, every rank in step with the others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dsv3
from tests.programs import ALONE, run, torchrun

SCRIPT = str(Path(__file__).with_name("llm_script.py"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("alone"), ALONE)[0]


def results(folder: Path, how: list[str]) -> list[dict[str, Any]]:
    """Return what each rank got."""
    done = run([*how, SCRIPT, str(folder)])
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
    assert unknown.startswith("prompt[1]=4000 is no token of this model")
    assert "it may have 511" in long
    assert params == "1 params for 2 prompts"
    assert number == "a prompt is a text or token ids, not 5"


def test_two_ranks_answer_as_one_and_only_the_first_tells(
    alone: dict[str, Any], tmp_path: Path
) -> None:
    first, second = results(tmp_path, torchrun(2))
    assert first == alone | {"tp": "tp=3 x dp=1 is not world_size=2"}
    assert second["refusals"] == first["refusals"]
    assert not second["main"]
    for name in ("chat", "chats", "tokens", "stream", "left early", "none", "after"):
        assert second[name] == []


def test_the_package_imports_torch_only_when_asked_for_the_model() -> None:
    code = "import dsv3, sys; dsv3.SamplingParams(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"LLM", "SamplingParams"} <= set(dsv3.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Llm'"):
        dsv3.Llm  # noqa: B018
