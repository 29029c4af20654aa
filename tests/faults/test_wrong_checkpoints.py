"""Both programs report a path without a supported model before any other error."""

from pathlib import Path

import pytest

from tests.checkpoint_files import TINY, write_file, write_hf
from tests.faults.converting import Convert
from tests.forked import run_forked
from tests.programs import GENERATE, our_lines

CHAT, BATCH = ["--interactive"], ["--input-file", "nowhere.txt"]


def adapter(path: Path) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    write_file(path / "adapter_model.safetensors", {})
    return path


@pytest.mark.parametrize("what", [CHAT, BATCH], ids=["chat", "batch"])
def test_generate(what: list[str], tmp_path: Path) -> None:
    """Also before an unknown preset."""
    path = adapter(tmp_path / "lora")
    done = run_forked([GENERATE, "--ckpt-path", str(path), "--config", "no-preset", *what])
    assert done.returncode == 2
    (line,) = our_lines(done.stderr)
    assert line.startswith(f"error: {path}: a LoRA adapter, not a model; merge it")


def test_convert(tmp_path: Path, convert: Convert) -> None:
    path = adapter(tmp_path / "lora")
    code, _, err = convert(path, tmp_path / "out", "--to", "hf", "--config", "no-preset")
    assert code == 2 and err.startswith(f"error: {path}: a LoRA adapter, not a model; merge it")
    assert not (tmp_path / "out").exists()


def test_a_form_that_is_not_read(tmp_path: Path, convert: Convert) -> None:
    """Before the missing tokenizer."""
    name = "model.layers.0.mlp.down_proj.weight"
    path = write_hf(tmp_path / "mlx", TINY, {name: ("U32", (2, 3), bytes(24))})
    (path / "tokenizer.json").unlink()
    done = run_forked([GENERATE, "--ckpt-path", str(path), *CHAT])
    (line,) = our_lines(done.stderr)
    code, _, err = convert(path, tmp_path / "out", "--to", "hf")
    assert done.returncode == code == 2 and err.splitlines() == [line]
    assert "packed weights (MLX 4-bit) are not supported" in line and f"tensor {name}" in line
