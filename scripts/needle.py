"""Draw a needle-in-a-haystack heat map: codes found by context length and depth.

    python scripts/needle.py --ckpt-path DIR --lengths 1024 4096 8192 --json needle.json
    torchrun --nproc-per-node 8 scripts/needle.py --ckpt-path DIR --json F.json --plot F.png

A text of sentences from templates hides one code at a depth of 0 (its beginning) to 100 percent;
the model is asked for the code. Models with an indexer answer three times: with dense attention
(index_topk is set to the longest context), with sparse attention, and with the cache and the index
keys in FP8. The JSON file is written after every length; a run with the same flags and file adds
the missing lengths. On several hosts all ranks must be able to read it.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))

from dsv3 import LLM
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.distributed.launcher import environment_rank
from dsv3.distributed.mesh import before_joining
from dsv3.errors import ConfigError
from dsv3.files import Format, NamedFile, check_output, write_output
from dsv3.read_files import read_mapping
from dsv3.text.chat import AnyFormat, ChatFormat
from dsv3.text.messages import Message
from picture import check_picture, pyplot, write_picture
from program import Parser, run_program

_JSON = Format("the results of needle.py", re.compile(rb'\{\s*"needle":'))
_FP8 = {"kv_dtype": "fp8", "index_dtype": "fp8"}
# Settings of each form of attention; models without an indexer have the first and the last one.
FORMS: dict[str, dict[str, Any]] = {"dense": {}, "sparse": {}, "fp8": _FP8}
_ANSWER_LEN = 32

TEMPLATES = (
    "The {person} explained how the {thing} was made.",
    "They stored the old {thing} behind the {place}.",
    "The report listed {number} parts of the {thing}.",
    "Rain fell on the {place} for {number} hours.",
    "The boat reached the {place} after {number} days.",
    "The crew slept through the {adjective} {time}.",
    "Clouds moved {adverb} above the {place}.",
    "Fresh {food} cost {number} coins that {time}.",
    "People asked for {food}, but only {number} were left.",
    "The {person} sold {number} {food} at the {place}.",
    "Visitors looked {adverb} at the {adjective} {thing}.",
    "The museum at the {place} showed {number} pictures.",
    "One room held only a {adjective} {thing}.",
    "Add the {food} {adverb} and wait {number} minutes.",
    "A {adjective} wind came over the {place} and the {time} felt {adjective}.",
)
WORDS = {
    "person": "farmer baker painter captain teacher clerk porter judge musician traveller",
    "thing": "lamp chair bottle ladder drum rope coin basket candle map",
    "place": "harbour market village bridge river forest school station garden hill",
    "time": "morning evening night week month spring summer autumn winter",
    "food": "apples pears berries onions carrots potatoes beans eggs loaves",
    "adjective": "small large old new quiet bright warm cold narrow gentle",
    "adverb": "slowly quickly often again together carefully twice",
}
OWNERS = "box door clock castle museum station lighthouse workshop temple cabinet"
COLOURS = "red green blue wooden golden broken hidden striped northern second"


@dataclass(frozen=True, slots=True)
class Cell:
    """One square of a heat map.

    Attributes:
        form: key of `FORMS`.
        length: tokens of the context, answer included.
        depth: place of the code in the text, in percent.
        found: answers with the code.
        of: all answers.
    """

    form: str
    length: int
    depth: int
    found: int
    of: int


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that asks for a hidden code."""

    messages: list[Message]
    code: str


def draw_sentence(rng: random.Random) -> str:
    """Return a sentence of the hay."""

    def word(found: re.Match[str]) -> str:
        if found[1] == "number":
            return str(rng.randrange(2, 99))
        return rng.choice(WORDS[found[1]].split())

    return re.sub(r"\{(\w+)\}", word, rng.choice(TEMPLATES))


def draw_questions(
    chat: AnyFormat, length: int, depths: list[int], rng: random.Random
) -> Iterator[Question]:
    """Yield a question for each depth, all with one text; prompt and answer fill the length."""
    owner = f"{rng.choice(COLOURS.split())} {rng.choice(OWNERS.split())}"
    code = str(rng.randrange(10_000, 100_000))

    def question(hay: list[str], depth: int) -> Question:
        at = round(len(hay) * depth / 100)
        text = [*hay[:at], f"The secret code of the {owner} is {code}.", *hay[at:]]
        lines = [" ".join(text[i : i + 8]) for i in range(0, len(text), 8)]
        content = "\n".join(
            ["Read this text.\n", *lines, f"\nWhat is the secret code of the {owner}?"]
        )
        return Question([{"role": "user", "content": content}], code)

    def room(hay: list[str], depth: int) -> int:
        return length - _ANSWER_LEN - len(chat.prompt_ids(question(hay, depth).messages))

    hay: list[str] = []
    while (free := room(hay, 0)) > 0:
        hay += [draw_sentence(rng) for _ in range(1 + free // 32)]
    while hay and min(room(hay, depth) for depth in depths) < 0:
        hay.pop()
    if not hay:
        raise ConfigError(f"--lengths={length} leaves no room for a text; use a longer one")
    for depth in depths:
        yield question(hay, depth)


@contextmanager
def with_dense_attention(path: Path, config: ModelConfig) -> Iterator[Path]:
    """Yield a directory with the checkpoint's files, whose config.json selects all positions."""
    if config.index_topk is None:
        yield path
        return
    values = read_mapping(path / "config.json")
    values["index_topk"] = config.max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.resolve().name)
        copy.mkdir()
        for file in path.iterdir():
            if file.name != "config.json":
                (copy / file.name).symlink_to(file.resolve())
        (copy / "config.json").write_text(json.dumps(values))
        yield copy


class Results:
    """The cells so far, in a file that is replaced whole.

    Args:
        file: the JSON file; None keeps nothing.
        setting: flags that the cells depend on.
    """

    def __init__(self, file: Path | None, setting: dict[str, Any]) -> None:
        self._file = file
        self._setting = setting
        self.cells: list[Cell] = []
        if file is None:
            return
        check_output(NamedFile("--json", file), _JSON)
        if not file.exists() or not file.stat().st_size:
            return
        stored = read_mapping(file)
        if stored["needle"] != setting:
            raise ConfigError(f"--json={file} has results of other flags; name a new file")
        self.cells = [Cell(**cell) for cell in stored["cells"]]

    def has(self, form: str, length: int) -> bool:
        """Return True if the cells of this length are there."""
        return any((cell.form, cell.length) == (form, length) for cell in self.cells)

    def add(self, cells: list[Cell]) -> None:
        """Add the cells of a length, and write the file."""
        self.cells += cells
        if self._file is not None:
            data = {"needle": self._setting, "cells": [asdict(cell) for cell in self.cells]}
            write_output(NamedFile("--json", self._file), _JSON, json.dumps(data, indent=1) + "\n")


def ask(llm: LLM, chat: AnyFormat, form: str, length: int, args: argparse.Namespace) -> list[Cell]:
    """Return the cells of one length; none on other ranks than 0."""
    rng = random.Random(f"{args.seed} {length}")
    texts = [list(draw_questions(chat, length, args.depths, rng)) for _ in range(args.texts)]
    asked = [question for text in texts for question in text]
    params = {"max_tokens": _ANSWER_LEN, "temperature": 0.0}
    answers = llm.chat([question.messages for question in asked], params)
    if not llm.is_main:
        return []
    pairs = list(zip(asked, answers, strict=True))
    cells = []
    for i, depth in enumerate(args.depths):
        found = [question.code in answer.text for question, answer in pairs[i :: len(args.depths)]]
        cells.append(Cell(form, length, depth, sum(found), len(found)))
    return cells


def measure(args: argparse.Namespace, config: ModelConfig, results: Results) -> None:
    """Ask for all cells that are not there yet."""
    chat = ChatFormat.of_directory(args.ckpt_path, config.model_type)
    for form in args.forms:
        lengths = [length for length in args.lengths if not results.has(form, length)]
        if not lengths:
            continue
        with ExitStack() as stack:
            path = args.ckpt_path
            if form == "dense":
                path = stack.enter_context(with_dense_attention(path, config))
            llm = stack.enter_context(
                LLM(
                    path,
                    tp=args.tp,
                    device=args.device,
                    dtype=args.dtype,
                    max_seq_len=max(args.lengths),
                    **FORMS[form],
                )
            )
            for length in lengths:
                cells = ask(llm, chat, form, length, args)
                if llm.is_main:
                    results.add(cells)
                    found = " ".join(f"{cell.depth}%: {cell.found}/{cell.of}" for cell in cells)
                    print(f"{form:6} {length:7,} tokens  {found}", flush=True)


def draw(results: Results, args: argparse.Namespace) -> None:
    """Draw a heat map for each form, side by side."""
    figure, maps = pyplot().subplots(
        1,
        len(args.forms),
        figsize=(1.5 + 2.8 * len(args.forms), 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    share = {(c.form, c.length, c.depth): c.found / c.of for c in results.cells}
    for axes, form in zip(maps[0], args.forms, strict=True):
        rows = [[100 * share[form, n, depth] for n in args.lengths] for depth in args.depths]
        image = axes.imshow(rows, cmap="RdYlGn", alpha=0.8, vmin=0, vmax=100, aspect="auto")
        axes.set_xticks(range(len(args.lengths)), [f"{n:,}" for n in args.lengths], rotation=45)
        axes.set_yticks(range(len(args.depths)), [f"{depth}" for depth in args.depths])
        for y, row in enumerate(rows):
            for x, percent in enumerate(row):
                axes.text(x, y, f"{percent:.0f}", ha="center", va="center", fontsize=7)
        axes.set_xticks([x - 0.5 for x in range(1, len(args.lengths))], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, len(args.depths))], minor=True)
        axes.grid(which="minor", color="white")
        axes.tick_params(which="minor", length=0)
        axes.set(title=form, xlabel="context in tokens")
    maps[0][0].set_ylabel("depth of the code in %")
    figure.colorbar(image, ax=maps[0], label="codes found in %")
    figure.suptitle(f"{args.ckpt_path.resolve().name}: {args.texts} texts a square", fontsize=9)
    write_picture(figure, args.plot, dpi=80)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ckpt-path", type=Path, required=True, help="a checkpoint directory")
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens")
    add("--depths", type=int, nargs="+", default=[0, 25, 50, 75, 100], help="percent of the text")
    add("--forms", nargs="+", choices=list(FORMS), help="default: all that the model has")
    add("--texts", type=int, default=4, help="texts of each length (default: 4)")
    add("--seed", type=int, default=0, help="of texts and codes (default: 0)")
    add("--tp", type=int, default=0, help="tensor-parallel ranks (default: all)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="numerics: auto, float32, bfloat16 or fp8")
    add("--json", type=Path, help="file for the results; a second run adds missing ones")
    add("--plot", type=Path, help="file for the picture (PNG, SVG, PDF)")
    add("--debug", action="store_true", help="show where an error was raised")
    args = parser.parse_args()
    check_picture(args.plot)
    return args


def main() -> int:
    """Fill the heat map, and draw it."""
    with before_joining():
        args = parse_args()
        config = load_model_config(args.ckpt_path)
        has_indexer = config.index_topk is not None
        args.forms = args.forms or [form for form in FORMS if has_indexer or form != "sparse"]
        if "sparse" in args.forms and not has_indexer:
            raise ConfigError("--forms=sparse, but the model has no indexer; leave it out")
        setting = {
            "checkpoint": args.ckpt_path.resolve().name,
            "depths": args.depths,
            "texts": args.texts,
            "seed": args.seed,
            "dtype": args.dtype,
        }
        results = Results(args.json, setting)
    measure(args, config, results)
    if args.plot and environment_rank() == 0:
        draw(results, args)
    return 0


if __name__ == "__main__":
    run_program(main)
