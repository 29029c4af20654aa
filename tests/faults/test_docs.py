"""Every code block of the documentation runs as printed, unless it needs more than this machine."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "launch/README.md", "dsv3/README.md", "kernels/README.md")
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)
# Commands that a test cannot run.
NOT_RUN = {
    "DeepSeek-V": "a large model",
    "--ckpt-path DIR": "a checkpoint of the reader's",
    "--hf-ckpt-path": "a checkpoint of the reader's",
    "v3-671b --world": "minutes, and many gigabytes",
    "context --config v3.2-671b": "minutes, and gigabytes",
    "--peer transformers": "minutes",
    "bench.py drafts --input-file tests": "minutes",
    "bench.py rank --device cpu": "a minute, and gigabytes",
    "scripts/": "installs",
    "source .venv": "installs",
}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        return self.language == "python" or not any(text in self.code for text in NOT_RUN)

    def __str__(self) -> str:
        return f"{self.page}: {self.code.splitlines()[0][:50]}"


def blocks() -> list[Block]:
    return [
        Block(page, language, code)
        for page in PAGES
        for language, code in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    ]


def test_every_exception_is_needed() -> None:
    left_out = [block.code for block in blocks() if not block.is_run]
    assert all(any(text in code for code in left_out) for text in NOT_RUN)
    assert sum(block.is_run for block in blocks()) >= 4


@pytest.mark.parametrize("block", [block for block in blocks() if block.is_run], ids=str)
def test_a_block_runs_as_printed(block: Block, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = programs.environment() | {"PATH": path, "HOME": str(tmp_path)}
    code = block.code.replace("/tmp/", f"{tmp_path}/")
    command = [sys.executable, "-c", code] if block.language == "python" else ["bash", "-ec", code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    want = "MLA is multi-head latent attention" if block.page == "README.md" else ""
    assert done.stdout and want in done.stdout
