"""Text to token ids and back, from the tokenizer files of a checkpoint.

The vocabulary is a `tokenizer.json`, read with the `tokenizers` library, or Kimi-K2's
`tiktoken.model` (`dsv3/text/kimi.py`). Special tokens and chat template come from
`tokenizer_config.json` and related files. No remote code is run.
"""

import logging
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from dsv3.errors import CheckpointError, RequestError
from dsv3.read_files import TABLE_BYTES, read_bytes, read_mapping, read_text
from dsv3.text.kimi import TiktokenVocabulary
from dsv3.text.tokenizer_errors import NoTokenizer, rust_errors_as
from dsv3.text.tokenizer_limits import check_growth

log = logging.getLogger(__name__)

_CONFIG = "tokenizer_config.json"
_MARK = re.compile(r"<.+>|\[.+\]|｜.+｜", re.DOTALL)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>$")
# Longer texts are encoded by the library's function for many, the only one that lets other threads
# of the interpreter run: the streams of a server go on while a long prompt is encoded.
_LONG_TEXT = 4096


class Tokenizer:
    """The tokenizer of one checkpoint.

    Attributes:
        special_tokens: text of `bos_token`, `eos_token`, ... for the chat template.
        chat_template: the checkpoint's Jinja source; None if it has none.
        template_name: file of the template, for messages.
    """

    def __init__(
        self,
        vocabulary: "Vocabulary",
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        template_name: str = "chat template",
    ) -> None:
        config = config or {}
        self._vocabulary = vocabulary
        self._pieces: dict[int, bytes | None] = {}
        self._add_bos = _truth(config, "add_bos_token")
        self.chat_template = chat_template
        self.template_name = template_name
        self.special_tokens = {
            name: text
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (text := _token_text(config, name))
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint directory."""
        folder = Path(folder)
        config = _read_optional(folder / _CONFIG)
        template, file = _chat_template(folder, config)
        return cls(_vocabulary(folder, config), config, template, file)

    @classmethod
    def load_optional(cls, folder: str | Path) -> "Tokenizer | None":
        """Read the tokenizer of a directory, or return None: prompts of token ids need none.

        Raises:
            CheckpointError: the tokenizer's files are damaged.
        """
        try:
            return cls.load(folder)
        except NoTokenizer as error:
            log.warning("%s: only token ids can be served", error)
            return None

    @cached_property
    def bos_id(self) -> int | None:
        """The id of the token that begins a sequence."""
        return self.id_of(self.special_tokens.get("bos_token", ""))

    @cached_property
    def eos_id(self) -> int | None:
        """The id of the token that ends an answer; the model's config may have more of them."""
        return self.id_of(self.special_tokens.get("eos_token", ""))

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name; None if there is no such token."""
        return self._vocabulary.id_of(token)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode `text`; pass False for a rendered chat, which has its special tokens already."""
        _check_characters(text)
        return self._vocabulary.encode(text, add_special_tokens)

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Names of the tokens that structure a prompt; `encode` turns these names into tokens."""
        return tuple(self._vocabulary.control_tokens())

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode `text`; names of control tokens in it are ordinary text."""
        _check_characters(text)
        return self._vocabulary.encode_ordinary(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a raw prompt as in training: with exactly one BOS, if the model uses it."""
        ids = self.encode(text, add_special_tokens=True)
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids[1:] if ids[:2] == [self.bos_id, self.bos_id] else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens to text; incomplete characters become U+FFFD."""
        return self._vocabulary.decode(ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Return the text of one token; for a special token, its name."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character."""
        return self._vocabulary.token_bytes(token_id)

    def is_byte(self, token_id: int) -> bool:
        """Return True for a single byte in a vocabulary that spells rare characters in bytes."""
        return self._vocabulary.is_byte(token_id)

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes that a token adds to a text; none for special tokens.

        The result is None if these depend on the neighbouring tokens, as in some vocabularies.
        """
        if token_id not in self._pieces:
            self._pieces[token_id] = self._vocabulary.piece(token_id)
        return self._pieces[token_id]


class _BytePairs:
    """A `tokenizer.json`, read with the tokenizers library; unknown ids decode to nothing."""

    def __init__(self, path: Path) -> None:
        data = read_bytes(path, CheckpointError, TABLE_BYTES)
        with rust_errors_as(f"{path}: not a tokenizer file"):
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            # Settings of training in the file; a prompt must not be cut, padded or split at random.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            if isinstance(self._tokenizer.model, models.BPE):
                self._tokenizer.model.dropout = None
            self._added = self._tokenizer.get_added_tokens_decoder()
        check_growth(path, self._tokenizer)
        self._path = path
        decoder = self._tokenizer.decoder
        byte_level = isinstance(decoder, decoders.ByteLevel)
        with rust_errors_as(f"{path}: cannot decode its tokens"):
            self._has_bytes = decoder is not None and decoder.decode(["<0x41>"]) == "A"
        self._alphabet = _byte_alphabet() if byte_level else {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Encode `text`; names of special tokens in it become those tokens."""
        with rust_errors_as(f"{self._path}: cannot encode this text"):
            return _ids(self._tokenizer, text, add_special_tokens)

    def control_tokens(self) -> list[str]:
        """Return the names of added tokens that are special or look like marks (`<...>`).

        Other added tokens are ordinary text: vocabularies of V2 have added single letters.
        """
        added = (self._added[token_id] for token_id in sorted(self._added))
        return [t.content for t in added if t.special or _MARK.fullmatch(t.content)]

    def encode_ordinary(self, text: str) -> list[int]:
        """Encode `text` without control tokens: their names are ordinary text."""
        with rust_errors_as(f"{self._path}: cannot encode this text"):
            return _ids(self._ordinary, text, False)

    @cached_property
    def _ordinary(self) -> tokenizers.Tokenizer:
        """The same vocabulary, which does not look for control tokens in a text."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.add_special_tokens(self.control_tokens())
        copy.encode_special_tokens = True
        return copy

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Decode tokens to text; bytes that are not UTF-8 become U+FFFD."""
        with rust_errors_as(f"{self._path}: cannot decode its tokens"):
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token."""
        token = self._tokenizer.id_to_token(token_id) or ""
        if token_id not in self._added and all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        return self.decode([token_id], skip_special_tokens=False).encode()

    def is_byte(self, token_id: int) -> bool:
        """Return True if the decoder joins this token with its neighbours into characters."""
        return self._has_bytes and bool(_BYTE.match(self._tokenizer.id_to_token(token_id) or ""))

    def piece(self, token_id: int) -> bytes | None:
        """Return the bytes that a token adds to a text; None if that depends on its neighbours."""
        if not self._alphabet:
            return None
        if token_id in self._added:
            return self.decode([token_id], skip_special_tokens=True).encode()
        return self.token_bytes(token_id)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by its name."""
        return self._tokenizer.token_to_id(token)


Vocabulary = _BytePairs | TiktokenVocabulary


def _ids(tokenizer: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    if len(text) < _LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds half of a surrogate pair (character {error.start + 1}), "
            "which is not a character"
        ) from None


def _vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    if os.path.lexists(folder / "tokenizer.json"):
        return _BytePairs(folder / "tokenizer.json")
    if os.path.lexists(folder / "tiktoken.model"):
        return TiktokenVocabulary(folder / "tiktoken.model", config)
    raise NoTokenizer(f"{folder}: no tokenizer.json or tiktoken.model here")


def _token_text(config: dict[str, Any], name: str) -> str:
    """Return the text of a special token, written as a string or as an AddedToken."""
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise CheckpointError(f"{_CONFIG}: {name} must be a text or a token with its content")
    return text or ""


def _truth(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{_CONFIG}: {name} must be true or false")
    return bool(value)


def _chat_template(folder: Path, config: dict[str, Any]) -> tuple[str | None, str]:
    """Find the template: first its own file, as in transformers, then the configuration.

    Returns:
        the template, and its file.
    """
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        return read_text(file, CheckpointError), str(file)
    file = folder / _CONFIG
    template = config.get("chat_template")
    if template is None:
        file = folder / "chat_template.json"
        template = _read_optional(file).get("chat_template")
    if isinstance(template, list | dict):
        named = _named_templates(template)
        if "default" not in named:
            raise CheckpointError(f"{file}: chat templates {sorted(named)}, none is 'default'")
        template = named["default"]
    if not isinstance(template, str | None):
        raise CheckpointError(f"{file}: chat_template must be a text or a list of named ones")
    return template, str(file)


def _named_templates(templates: list[Any] | dict[str, Any]) -> dict[str, Any]:
    """Return templates by name; the file has one object, or a list with an object for each."""
    if isinstance(templates, dict):
        return templates
    entries = [entry for entry in templates if isinstance(entry, dict)]
    return {str(entry.get("name")): entry.get("template") for entry in entries}


def _read_optional(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file does not exist."""
    return read_mapping(path, CheckpointError) if os.path.lexists(path) else {}


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of a byte-level vocabulary.

    Printable Latin-1 characters are their own bytes; the other bytes, in order, are U+0100 and up.
    Source: GPT-2's `bytes_to_unicode`.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }
