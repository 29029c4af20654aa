"""`quality.py`: one line of figures, and no figures of texts that were not scored."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import quality
from dsv3.errors import ConfigError, Dsv3Error
from dsv3.request import Completion
from tests.forked import run_forked
from tests.programs import our_lines


def texts(path: Path, *lengths: int) -> str:
    """Write texts of these lengths; the last half of each is an answer."""
    tokens = np.concatenate([np.arange(10, 10 + n) for n in lengths])
    answer = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    offsets = np.cumsum([0, *lengths[:-1]])
    np.savez(path, tokens=tokens, offsets=offsets, answer=answer)
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    fixed = ("--max-seq-len", "128", "--kv-cache-size", "1024tok", "--device", "cpu")
    monkeypatch.setattr("sys.argv", ["quality.py", *flags, *fixed])
    monkeypatch.setattr(quality, "set_up_logging", lambda *_: None)
    return quality.main()


def test_figures_of_the_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dialogues = tmp_path / "eval.jsonl"
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    rows = [
        {"messages": messages, "expected": text, "n_tokens": 12} for text in ("Paris.", "Rome.")
    ]
    dialogues.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = texts(tmp_path / "texts.npz", 20, 30)
    assert run(monkeypatch, "--eval", str(dialogues), "--tokens", scored) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"dtype", "kv_dtype", "accuracy", "perplexity", "answer_perplexity"}
    assert figures["perplexity"] > 1


def test_a_request_that_fails_is_an_error() -> None:
    failed = Completion(
        request_id="7",
        prompt_ids=[5],
        token_ids=[],
        text="",
        finish_reason="error",
        error="logits that are not finite",
    )
    engine = Mock(has_work=Mock(side_effect=[True, False]))
    engine.step.return_value = [Mock(request_id="7", completion=failed)]
    with pytest.raises(Dsv3Error, match="request 7: logits that are not finite"):
        quality.finish(engine)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "environment_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="runs on one rank; start it with python"):
        run(monkeypatch, "--tokens", "texts.npz")


def test_several_ranks_are_refused_once() -> None:
    done = run_forked([quality.__file__, "--tokens", "texts.npz"], num_ranks=2)
    assert done.returncode == 2
    assert our_lines(done.stderr) == [
        "error: quality.py runs on one rank; start it with python, not with torchrun"
    ]
