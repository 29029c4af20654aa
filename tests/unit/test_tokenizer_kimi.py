import base64
import json
import re
import sys
from pathlib import Path

import pytest

from dsv3.errors import CheckpointError
from dsv3.text.kimi import MAX_PIECE, MAX_RUN, _pieces
from dsv3.text.ordinary_text import OrdinaryText
from dsv3.text.tokenizer import Tokenizer

pytest.importorskip("tiktoken")
MERGES = [b"th", b"the", b" the", "胡".encode()[:2], "胡".encode(), b"'s", b"  ", b"12", b"123"]
BASE = 256 + len(MERGES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokens = [bytes([i]) for i in range(256)] + MERGES
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    added = {
        BASE: {"content": "[BOS]", "special": True},
        BASE + 1: {"content": "[EOS]", "special": True},
        BASE + 2: {"content": "<think>", "special": False},
    }
    config = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_special_and_reserved_tokens(folder: Path) -> None:
    kimi = Tokenizer.load(folder)
    assert (kimi.bos_id, kimi.eos_id) == (BASE, BASE + 1)
    assert kimi.id_of(f"<|reserved_token_{BASE + 256}|>") is None
    assert kimi.id_of(f"<|reserved_token_{BASE + 9}|>") == BASE + 9
    assert kimi.encode("[BOS]the", add_special_tokens=True) == [BASE, 257]
    assert kimi.decode([BASE, 257, BASE + 2, BASE + 1]) == "the<think>"
    assert kimi.decode([BASE, 257], skip_special_tokens=False) == "[BOS]the"
    assert [kimi.piece(i) for i in (BASE, 257, BASE + 2, BASE + 4000)] == [
        b"",
        b"the",
        b"<think>",
        b"",
    ]


def test_control_tokens_in_messages_are_text(folder: Path) -> None:
    kimi = Tokenizer.load(folder)
    ordinary = OrdinaryText(kimi)
    names = ("[BOS]", "[EOS]", "<think>", f"<|reserved_token_{BASE + 9}|>")
    assert set(names) <= set(kimi.control_tokens)
    text = "the 123" + "the".join(names) + " [B"
    ids = ordinary.encode("[BOS]" + ordinary.hide(text) + "OS]")
    assert [i for i in ids if i >= BASE] == [BASE]
    assert kimi.decode(ids, skip_special_tokens=False) == "[BOS]" + text + "OS]"
    assert ids[1:] == kimi.encode_ordinary(text + "OS]")


@pytest.mark.parametrize("text", ["", "the cat's 1234\r\n  胡胡b the", "🙂é ​", "\t\t x"])
def test_decoding_returns_the_encoded_text(folder: Path, text: str) -> None:
    kimi = Tokenizer.load(folder)
    ids = kimi.encode(text, add_special_tokens=False)
    assert kimi.decode(ids) == text
    assert b"".join(map(kimi.token_bytes, ids)) == text.encode()


def test_words_numbers_and_han_are_split_before_merging(folder: Path) -> None:
    kimi = Tokenizer.load(folder)
    ids = kimi.encode("1234胡the's", add_special_tokens=False)
    assert [kimi.token_text(i) for i in ids] == ["123", "4", "胡", "the", "'s"]


def test_half_characters_and_unknown_ids_decode(folder: Path) -> None:
    kimi = Tokenizer.load(folder)
    assert kimi.token_text("胡".encode()[0]) == "\ufffd"
    assert kimi.token_bytes("胡".encode()[0]) == "胡".encode()[:1]
    assert kimi.decode([BASE + 4000]) == ""


def test_overlong_runs_are_cut_where_moonshot_cuts() -> None:
    text = "a" * (MAX_RUN + 5) + " " + "b" * 3 * MAX_RUN + " " * (2 * MAX_RUN + 1) + "c d"
    text += "e f " * (MAX_PIECE // 4)
    pieces = list(_pieces(text))
    assert "".join(pieces) == text
    assert pieces[0] == "a" * MAX_RUN
    assert max(len(run) for piece in pieces for run in re.findall(r"\s+|\S+", piece)) == MAX_RUN
    assert max(map(len, pieces)) <= MAX_PIECE
    assert list(_pieces("short text")) == ["short text"]


def test_without_the_library_one_line_names_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(CheckpointError, match="pip install tiktoken"):
        Tokenizer.load(folder)
    assert Tokenizer.load_optional(folder) is None


LINES = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
DAMAGED = {
    "no rank": ([*LINES, "Ig=="], "line 257 is not 'base64 rank'"),
    "no base64": ([*LINES, "???? 256"], "line 257 is not 'base64 rank'"),
    "no number": ([*LINES, "AAA= x"], "line 257 is not 'base64 rank'"),
    "digits": ([*LINES, "AAA= " + "9" * 5000], "line 257 is not 'base64 rank'"),
    "token twice": ([*LINES, "AA== 256"], "line 257 gives a token a second time"),
    "rank twice": ([*LINES, "AAA= 255"], "the ranks are not the numbers from 0 to 256"),
    "rank huge": ([*LINES, "AAA= 99999999999"], "the ranks are not the numbers from 0 to 256"),
    "rank negative": ([*LINES, "AAA= -1"], "the ranks are not the numbers from 0 to 256"),
    "truncated": (LINES[:200], "truncated: not all single bytes are tokens"),
    "empty": ([], "truncated: not all single bytes are tokens"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_vocabulary_names_its_line(folder: Path, kind: str) -> None:
    lines, reason = DAMAGED[kind]
    (folder / "tiktoken.model").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.load(folder)
    assert str(caught.value) == f"{folder / 'tiktoken.model'}: {reason}"


@pytest.mark.parametrize(
    "added",
    [
        [{"content": "x"}],
        {"300": "x"},
        {"300": {"content": 5}},
        {"300": {}},
        {"x": {"content": "x"}},
        {"-1": {"content": "x"}},
        {"5": {"content": "x"}},
        {"9" * 5000: {"content": "x"}},
        {"4294967296": {"content": "x"}},
    ],
)
def test_damaged_added_tokens_name_their_file(folder: Path, added: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder must"):
        Tokenizer.load(folder)
