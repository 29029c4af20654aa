import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors

from dsv3.errors import CheckpointError, RequestError
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tokenizer_errors import rust_errors_as

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo-v3"
TEXTS = ["", "Hello, world", "x = 1234\n\n  y", "胡萝卜 🙂 naïve", "a<｜User｜>b"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def folder_with(path: Path, **config: object) -> Path:
    """The demo's tokenizer.json beside another tokenizer_config.json."""
    shutil.copy(DEMO / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_returns_the_encoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_same_tokens_as_transformers(tokenizer: Tokenizer, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(DEMO)
    ids = theirs(text)["input_ids"]
    assert tokenizer.encode_prompt(text) == ids
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.bos_id == theirs.bos_token_id
    assert tokenizer.eos_id == theirs.eos_token_id


def test_special_tokens_are_read_from_added_token_dictionaries_and_strings(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert "unk_token" not in tokenizer.special_tokens
    plain = Tokenizer.load(folder_with(tmp_path, eos_token="<｜User｜>", bos_token=None))
    assert (plain.bos_id, plain.eos_id) == (None, 3)
    assert plain.id_of("no such token") is None


def test_special_tokens_are_skipped_unless_wanted(tokenizer: Tokenizer) -> None:
    ids = [0, *tokenizer.encode("hi", add_special_tokens=False), 1]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.token_text(1) == "<｜end▁of▁sentence｜>"


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(2047)
    assert tokenizer.decode([99_999]) == tokenizer.token_text(99_999) == ""
    assert tokenizer.token_bytes(99_999) == b""


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("text", ["hi", "<｜begin▁of▁sentence｜>hi"])
def test_a_raw_prompt_begins_with_one_bos_if_the_model_wants_it(
    tmp_path: Path, adds_bos: bool, post_processor: bool, text: str
) -> None:
    folder = folder_with(tmp_path, bos_token="<｜begin▁of▁sentence｜>", add_bos_token=adds_bos)
    if post_processor:
        raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        bos = ("<｜begin▁of▁sentence｜>", 0)
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", special_tokens=[bos]
        )
        raw.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    num_bos = int(adds_bos or post_processor or text != "hi")
    hi = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode_prompt(text) == [0] * num_bos + hi


def test_chat_template_is_found_wherever_it_is_kept(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    assert Tokenizer.load(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Tokenizer.load(folder).chat_template == "from json"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "named"}]
    folder_with(tmp_path, chat_template=named)
    assert Tokenizer.load(folder).chat_template == "named"
    folder_with(tmp_path, chat_template={"default": "in an object", "rag": "x"})
    assert Tokenizer.load(folder).chat_template == "in an object"
    folder_with(tmp_path, chat_template="plain")
    assert Tokenizer.load(folder).chat_template == "plain"
    (folder / "chat_template.jinja").write_text("own file")
    assert Tokenizer.load(folder).chat_template == "own file"


def test_missing_tokenizer_is_an_error_only_where_text_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tiktoken\.model"):
        Tokenizer.load(tmp_path)
    assert Tokenizer.load_optional(tmp_path) is None
    assert "only token ids can be served" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: not a tokenizer file"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: not a mapping of field"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "rag", "template": ""}]}',
            "none is 'default'",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = folder_with(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(folder)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load_optional(folder)  # there is one, only damaged


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(special: int, texts: int) -> dict[str, Any]:
    return {
        "type": "TemplateProcessing",
        "single": [
            *[{"SpecialToken": {"id": "x", "type_id": 0}}] * special,
            *[{"Sequence": {"id": "A", "type_id": 0}}] * texts,
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"x": {"id": "x", "ids": [1] * 100, "tokens": ["x"] * 100}},
    }


DOUBLED = [replace({"String": "e"}, "ee")] * 40
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
EXPLOSIVE: dict[str, tuple[dict[str, Any], str]] = {
    "doubled again": (
        {"normalizer": {"type": "Sequence", "normalizers": DOUBLED}},
        "its normalizer can make a text 1,000 times as long",
    ),
    "long content": ({"normalizer": replace({"Regex": "."}, "x" * 2000)}, "its normalizer can"),
    "long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 99_999}}, "its normalizer"),
    "decoder": (
        {"decoder": {"type": "Sequence", "decoders": [BYTE_LEVEL, *DOUBLED]}},
        "its decoder can make a text 1,000 times as long",
    ),
    "many tokens": ({"post_processor": template(1000, 1)}, "its post_processor can add 65,536"),
    "many texts": ({"post_processor": template(0, 2000)}, "its post_processor can add 65,536"),
}


def changed(folder: Path, fields: dict[str, Any]) -> Path:
    """Write the demo's tokenizer.json with other fields."""
    data = json.loads((DEMO / "tokenizer.json").read_text()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("case", EXPLOSIVE)
def test_a_tokenizer_that_makes_texts_without_end_is_refused(tmp_path: Path, case: str) -> None:
    fields, message = EXPLOSIVE[case]
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {message}"):
        Tokenizer.load(changed(tmp_path, fields))


def test_usual_normalizers_and_post_processors_are_read(tmp_path: Path) -> None:
    normalizers = [
        {"type": "Prepend", "prepend": "\u2581"},
        replace({"String": " "}, "\u2581"),
        *[replace({"Regex": " {2,}"}, " ")] * 20,
    ]
    fields = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "post_processor": template(1, 2),
    }
    ids = Tokenizer.load(changed(tmp_path, fields)).encode("a b", add_special_tokens=True)
    assert ids[:100] == [1] * 100 and len(ids) > 102


LEFT_BY_TRAINING: dict[str, dict[str, Any]] = {
    "truncation": {
        "truncation": {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    },
    "truncation that fails": {
        "truncation": {
            "direction": "Left",
            "max_length": 3,
            "strategy": "OnlySecond",
            "stride": 9,
        }
    },
    "padding": {
        "padding": {
            "strategy": {"Fixed": 64},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    },
    "padding to multiples": {
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": 8,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    },
    "dropout": {"model": {"dropout": 0.9}},
}


def folder_changed(path: Path, changes: dict[str, Any]) -> Path:
    """The demo's tokenizer.json with other fields, those of `model` one by one."""
    data = json.loads((DEMO / "tokenizer.json").read_text())
    changes = changes | {"model": data["model"] | changes.get("model", {})}
    (path / "tokenizer.json").write_text(json.dumps(data | changes))
    return path


@pytest.mark.parametrize("kind", LEFT_BY_TRAINING)
def test_prompts_are_neither_cut_nor_padded_nor_split_at_random(
    tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    trained = Tokenizer.load(folder_changed(tmp_path, LEFT_BY_TRAINING[kind]))
    text = "My name is Anna and I live in Amsterdam."
    for add_special_tokens in (True, False):
        ids = tokenizer.encode(text, add_special_tokens)
        assert trained.encode(text, add_special_tokens) == ids


PANICS: dict[str, tuple[str, dict[str, Any]]] = {
    "load": ("not a tokenizer file", {"model": {"continuing_subword_prefix": "####"}}),
    "encode": (
        "cannot encode this text",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
    ),
    "encode of one text": (
        "cannot encode this text",
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(a+)+$"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ),
    "decode": (
        "cannot decode its tokens",
        {"decoder": {"type": "Strip", "content": "b", "start": 0, "stop": 100}},
    ),
}


def round_trip(folder: Path, text: str) -> str:
    damaged = Tokenizer.load(folder)
    return damaged.decode(damaged.encode(text, add_special_tokens=True))


@pytest.mark.parametrize("where", PANICS)
def test_a_tokenizer_that_panics_is_named(tmp_path: Path, where: str) -> None:
    reason, changes = PANICS[where]
    folder = folder_changed(tmp_path, changes)
    text = "b" if where == "decode" else "a" * 40 + "b"
    with pytest.raises(CheckpointError, match=rf"{folder}/tokenizer\.json: {reason}: "):
        round_trip(folder, text)
    if where == "encode of one text":
        assert round_trip(folder, "Hi") == "Hi"


def test_only_the_library_is_listened_to() -> None:
    with pytest.raises(KeyboardInterrupt), rust_errors_as("x"):
        raise KeyboardInterrupt


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"half of a surrogate pair \(character 3\)"):
        tokenizer.encode("ab\ud83d", add_special_tokens=False)


def test_long_texts_have_the_tokens_of_the_library(tokenizer: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    text = "What is MLA? <think>胡萝卜 🙂 naïve\n\t" * 400
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids == library.encode(text).ids and len(ids) > 4096
