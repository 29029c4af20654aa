"""A template that fails is reported before the model loads, by its own error."""

import json
import os
from pathlib import Path

import pytest

from dsv3.config_files import DEMO
from tests.forked import run_forked
from tests.programs import GENERATE

BROKEN = "{{ bos_token }}\n{% for m in messages %}\n{{ m.content + suffix }}{% endfor %}"
REASON = "chat template: line 3: 'suffix' is undefined"
GOOD = "{{ bos_token }}{{ '<｜User｜>' + messages[-1].content + '<｜Assistant｜>' }}"
CHAT = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}}
RAW = {"url": "/v1/completions", "body": {"prompt": "One", "max_tokens": 2}}
LOADED = "memory per rank"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in DEMO.iterdir():
        os.symlink(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(BROKEN)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"custom_id": str(i)} | row) + "\n" for i, row in enumerate((CHAT, RAW)))
    )
    (folder / "lines.txt").write_text("What is MLA?\n")
    return folder


def generate(checkpoint: Path, *flags: str) -> tuple[int, str, str]:
    done = run_forked([GENERATE, "--ckpt-path", str(checkpoint), *flags])
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("what", ["--interactive", "--input-file"])
def test_a_job_of_conversations_ends_before_the_model_loads(checkpoint: Path, what: str) -> None:
    file = [str(checkpoint / "lines.txt")] if what == "--input-file" else []
    code, out, err = generate(checkpoint, what, *file)
    assert (code, out) == (2, "")
    assert err == f"error: {checkpoint / 'chat_template.jinja'}: {REASON}\n"


def test_raw_prompts_need_no_template(checkpoint: Path) -> None:
    code, out, err = generate(checkpoint, "--input-file", str(checkpoint / "rows.jsonl"))
    name = checkpoint / "chat_template.jinja"
    assert code == 0
    assert err.index(f"{name}: {REASON}: rows with conversations fail") < err.index(LOADED)
    assert f"Error: row 1: {name}: {REASON}" in out
    assert "Prompt: One\nCompletion: " in out


def test_another_template_takes_the_place_of_the_checkpoints(checkpoint: Path) -> None:
    (checkpoint / "good.jinja").write_text(GOOD)
    lines, flag = str(checkpoint / "lines.txt"), "--chat-template"
    code, out, _ = generate(checkpoint, "--input-file", lines, flag, str(checkpoint / "good.jinja"))
    assert code == 0
    assert "Completion: MLA is multi-head latent attention" in out


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("chat_template.jinja", REASON),
        ("none.jinja", "cannot be read: No such file or directory"),
    ],
)
def test_a_given_template_must_be_valid_for_any_task(
    checkpoint: Path, name: str, reason: str
) -> None:
    rows, file = str(checkpoint / "rows.jsonl"), checkpoint / name
    code, _, err = generate(checkpoint, "--input-file", rows, "--chat-template", str(file))
    assert code == 2
    assert err == f"error: {file}: {reason}\n"
