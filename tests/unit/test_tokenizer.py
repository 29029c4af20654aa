import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import processors

from dsv3.errors import CheckpointError, RequestError
from dsv3.text.tokenizer import Tokenizer

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


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"half of a surrogate pair \(character 3\)"):
        tokenizer.encode("ab\ud83d", add_special_tokens=False)
