"""`needle.py`: texts of the asked length, codes at their depth, results that a second run keeps."""

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv3.config_files import DEMO, load_model_config
from dsv3.errors import ConfigError
from dsv3.text.chat import AnyFormat, ChatFormat
from scripts import needle
from scripts.needle import Cell, Results, draw_questions, with_dense_attention
from tests.checkpoint_files import TINY, random_tensors, write_hf
from tests.forked import run_forked
from tests.programs import our_lines

SPARSE = dataclasses.replace(
    TINY, model_type="deepseek_v32", index_n_heads=4, index_head_dim=32, index_topk=16
)
CELLS = [
    Cell(form, length, depth, depth // 100, 2)
    for form in ("dense", "fp8")
    for length in (160, 256)
    for depth in (0, 100)
]
FLAGS = f"--ckpt-path {DEMO} --lengths 160 256 --depths 0 100 --texts 1"


@pytest.fixture(scope="module")
def chat() -> AnyFormat:
    return ChatFormat.of_directory(DEMO, "deepseek_v3")


@pytest.mark.parametrize("length", [160, 1000])
def test_texts_fill_the_context(chat: AnyFormat, length: int) -> None:
    depths = [0, 50, 100]
    questions = list(draw_questions(chat, length, depths, random.Random("a seed")))
    assert questions == list(draw_questions(chat, length, depths, random.Random("a seed")))
    for depth, question in zip(depths, questions, strict=True):
        (message,) = question.messages
        num_tokens = len(chat.prompt_ids([message])) + 32
        assert length - 40 < num_tokens <= length
        text = message["content"]
        at = text.index(f" is {question.code}.")
        assert abs(100 * at / len(text) - depth) < (45 if length == 160 else 12)
        assert text.count(question.code) == 1


def test_a_length_without_room(chat: AnyFormat) -> None:
    with pytest.raises(ConfigError, match="--lengths=40 leaves no room"):
        list(draw_questions(chat, 40, [0], random.Random(0)))


def test_a_dense_copy_selects_all_positions(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "model", SPARSE, random_tensors(SPARSE))
    with with_dense_attention(path, SPARSE) as copy:
        config = load_model_config(copy)
        assert config.index_topk == SPARSE.max_position_embeddings and copy.name == path.name
        assert {file.name for file in copy.iterdir()} == {file.name for file in path.iterdir()}
    assert not copy.exists() and load_model_config(path).index_topk == SPARSE.index_topk
    plain = load_model_config(DEMO)
    with with_dense_attention(DEMO, plain) as same:
        assert same == DEMO


def run(monkeypatch: pytest.MonkeyPatch, flags: str, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["needle.py", *flags.split(), *more])
    return needle.main()


def test_the_demo_model_finds_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "needle.json"
    assert run(monkeypatch, FLAGS, "--json", str(file)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].split() == [
        "dense",
        "160",
        "tokens",
        "0%:",
        "1/1",
        "100%:",
        "1/1",
    ]
    stored = json.loads(file.read_text())
    cells = [Cell(**cell) for cell in stored["cells"]]
    assert [(c.form, c.length, c.depth) for c in cells] == [
        (form, n, depth) for form in ("dense", "fp8") for n in (160, 256) for depth in (0, 100)
    ]
    assert all(cell.found == cell.of == 1 for cell in cells)
    # The next run computes the missing cells: the longest context in both forms.
    stored["cells"] = [cell for cell in stored["cells"] if cell["length"] == 160]
    file.write_text(json.dumps(stored))
    assert run(monkeypatch, FLAGS, "--json", str(file)) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert {Cell(**cell) for cell in json.loads(file.read_text())["cells"]} == set(cells)

    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("all cells are there")

    monkeypatch.setattr(needle, "LLM", no_model)
    assert run(monkeypatch, FLAGS, "--json", str(file)) == 0
    with pytest.raises(ConfigError, match=r"has results of other flags; name a new file"):
        run(monkeypatch, f"{FLAGS} --seed 1", "--json", str(file))
    with pytest.raises(ConfigError, match="--forms=sparse, but the model has no indexer"):
        run(monkeypatch, f"{FLAGS} --forms sparse")


def test_results_do_not_replace_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("a text")
    with pytest.raises(ConfigError, match="--json="):
        Results(tmp_path / "other", {})
    results = Results(None, {})
    results.add([Cell("dense", 160, 0, 1, 1)])
    assert results.has("dense", 160) and not results.has("sparse", 160)


def test_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(needle, "measure", lambda _args, _config, results: results.add(CELLS))
    flags = FLAGS.replace("--texts 1", "--texts 2")
    assert run(monkeypatch, flags, "--plot", str(tmp_path / "needle.png")) == 0
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other").write_text("a text")
    with pytest.raises(ConfigError, match="--plot="):
        run(monkeypatch, flags, "--plot", str(tmp_path / "other"))


def test_a_wrong_flag_is_one_line_of_all_ranks() -> None:
    done = run_forked([needle.__file__, *FLAGS.split(), "--forms", "sparse"], num_ranks=2)
    assert done.returncode == 2
    assert our_lines(done.stderr) == [
        "error: --forms=sparse, but the model has no indexer; leave it out"
    ]
