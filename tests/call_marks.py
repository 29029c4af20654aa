"""The demo model with a form of calls: some of its rarest tokens become the marks."""

import json
from collections.abc import Sequence
from pathlib import Path

from dsv3.config_files import DEMO
from dsv3.text.tokenizer import Tokenizer


def copy_demo(folder: Path, marks: Sequence[str]) -> Path:
    """Write the demo model to a folder, its weights as links, with marks as its last tokens."""
    folder.mkdir(exist_ok=True)
    for path in DEMO.iterdir():
        if path.name != "tokenizer.json":
            (folder / path.name).symlink_to(path.resolve())
    data = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    first = len(vocabulary) - len(marks)
    data["model"]["vocab"] = {name: i for name, i in vocabulary.items() if i < first}
    data["model"]["merges"] = data["model"]["merges"][: -len(marks)]
    for i, mark in enumerate(marks, first):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        data["added_tokens"].append({"id": i, "content": mark} | flags)
        data["model"]["vocab"][mark] = i
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def marked_tokenizer(folder: Path, marks: Sequence[str]) -> Tokenizer:
    """Return the demo model's tokenizer with marks as its last tokens."""
    return Tokenizer.load(copy_demo(folder, marks))
