from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from dsv3.text.detokenize import (
    MAX_PARTIAL,
    REPLACEMENT,
    WINDOW,
    ByteDetokenizer,
    Detokenizer,
    StopChecker,
    TextStream,
    WindowDetokenizer,
    make_detokenizer,
)
from dsv3.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "demo-v3")
VOCAB_SIZE = 2048
BYTE = {
    TOKENIZER.token_bytes(i)[0]: i for i in range(VOCAB_SIZE) if len(TOKENIZER.token_bytes(i)) == 1
}
token_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=200)


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def byte_tokens(data: bytes) -> list[int]:
    return [BYTE[byte] for byte in data]


both_kinds = pytest.mark.parametrize("kind", [ByteDetokenizer, WindowDetokenizer])
Kind = Callable[[Tokenizer], Detokenizer]


class NotOfBytes(Tokenizer):
    """The same vocabulary, as if a token's text depended on its neighbours."""

    def piece(self, token_id: int) -> None:
        return None


def test_bytes_are_decoded_alone_where_tokens_are_bytes() -> None:
    assert type(make_detokenizer(TOKENIZER)) is ByteDetokenizer
    assert type(make_detokenizer(NotOfBytes(TOKENIZER._vocabulary))) is WindowDetokenizer


@both_kinds
@given(token_ids, st.data())
def test_pieces_join_to_the_decoding_of_all_tokens(
    kind: Kind, ids: list[int], data: st.DataObject
) -> None:
    detokenizer = kind(TOKENIZER)
    shown = ""
    at = 0
    while at < len(ids):
        num = data.draw(st.integers(1, 5))
        shown += detokenizer.push(ids[at : at + num])
        at += num
    assert shown + detokenizer.finish() == TOKENIZER.decode(ids)


@both_kinds
@given(st.text(alphabet="aé胡🙂👩‍🚀 \n", max_size=120))
def test_streamed_text_never_shows_half_a_character(kind: Kind, text: str) -> None:
    detokenizer, shown = kind(TOKENIZER), ""
    for token_id in byte_tokens(text.encode()):
        shown += detokenizer.push([token_id])
        assert text.startswith(shown)
    assert shown == text  # nothing of a whole text is held back


@both_kinds
@given(st.binary(max_size=400))
def test_bytes_that_are_no_text_come_out_as_they_decode(kind: Kind, data: bytes) -> None:
    detokenizer = kind(TOKENIZER)
    ids = byte_tokens(data)
    shown = "".join(detokenizer.push([i]) for i in ids)
    assert shown + detokenizer.finish() == TOKENIZER.decode(ids)
    assert len(TOKENIZER.decode(ids)) - len(shown) <= MAX_PARTIAL


def test_work_per_token_does_not_grow_with_the_answer() -> None:
    decoded: list[int] = []

    class Counting(NotOfBytes):
        def decode(self, ids, skip_special_tokens=True):  # type: ignore[no-untyped-def]
            decoded.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    counting = Counting(TOKENIZER._vocabulary)
    for ids in (encode("word " * 1000), byte_tokens(b"\xff" * 1000)):
        stream = TextStream(counting, ids)
        for token_id in ids:
            stream.push(token_id)
    assert max(decoded) <= 4 * WINDOW + 1
    assert len(decoded) < 2500


def test_text_goes_on_from_the_prompt() -> None:
    half, rest = byte_tokens("🙂".encode()[:2]), byte_tokens("🙂".encode()[2:])
    stream = TextStream(TOKENIZER, encode("Say ") + half)
    for token_id in rest + encode("!"):
        stream.push(token_id)
    stream.finish()
    assert stream.text == TOKENIZER.decode(rest + encode("!"))


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary that spells rare characters in tokens of one byte, like sentencepiece's."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "b", "<eos>"]
    vocab = {name: i for i, name in enumerate(names)}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    raw.add_special_tokens(["<eos>"])
    folder = tmp_path_factory.mktemp("spelling")
    raw.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


SPELT_A, SPELT_EOS = 257, 259


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["😀", "😁", "你好", "é"]).map(lambda c: [1 + b for b in c.encode()]),
            st.lists(st.integers(0, SPELT_EOS), max_size=3),
        ),
        max_size=60,
    ),
    st.sampled_from([[], [SPELT_A], [SPELT_A, 1 + 0xF0], [1 + b for b in "😀".encode()]]),
)
def test_spelt_characters_come_out_as_all_tokens_decode(
    spelling: Tokenizer, words: list[list[int]], prompt: list[int]
) -> None:
    ids = [token_id for word in words for token_id in word]
    stream = TextStream(spelling, prompt)
    shown = "".join(stream.push(token_id)[0] for token_id in ids) + stream.finish()
    assert shown == stream.text == spelling.decode(ids)


def test_a_spelt_character_is_shown_when_the_next_word_begins(spelling: Tokenizer) -> None:
    stream = TextStream(spelling, [SPELT_A])
    pieces = [stream.push(1 + byte)[0] for byte in "😀😁".encode()]
    assert pieces == [""] * 8
    assert stream.push(SPELT_A)[0] == "😀😁 a"


def run(stream: TextStream, ids: list[int]) -> tuple[list[str], bool]:
    shown = []
    for token_id in ids:
        new, stopped = stream.push(token_id)
        shown.append(new)
        if stopped:
            return shown, True
    shown.append(stream.finish())
    return shown, False


@given(st.text(alphabet="ab\n é", max_size=60), st.lists(st.text("ab\n é", min_size=1, max_size=4)))
def test_stop_strings_cut_wherever_tokens_begin_and_end(text: str, stop: list[str]) -> None:
    stream = TextStream(TOKENIZER, [], tuple(stop))
    shown, stopped = run(stream, byte_tokens(text.encode()))
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not ends:
        assert (stream.text, stopped) == (text, False)
    else:  # the stop string that is complete first; of several, the one that begins first
        first = min(ends)
        begin = min(text[:first].find(s) for s in stop if s in text[:first])
        assert (stream.text, stopped) == (text[:begin], True)
    assert "".join(shown) == stream.text


@pytest.mark.parametrize(
    ("pieces", "stop", "want"),
    [
        (["ab", "c", "d"], ("bcd",), ["a", "", ""]),  # spans pieces
        (["ab", "x"], ("bcd",), ["a", "bx"]),  # held back, then released
        (["aab", "aac"], ("aabaac",), ["", ""]),
        (["aabaab", "aac"], ("aabaac",), ["aab", ""]),  # overlaps itself
        (["stop"], ("op", "sto"), [""]),
        (["plain"], (), ["plain"]),
    ],
)
def test_the_beginning_of_a_stop_string_is_held_back(
    pieces: list[str], stop: tuple[str, ...], want: list[str]
) -> None:
    checker = StopChecker(stop)
    assert [checker.push(piece)[0] for piece in pieces] == want


def test_an_answer_that_ends_within_a_character_shows_it() -> None:
    stream = TextStream(TOKENIZER, [])
    shown, _ = run(stream, encode("so ") + byte_tokens("🙂".encode()[:3]))
    assert shown[-1] == REPLACEMENT
    assert stream.text == "so " + REPLACEMENT
