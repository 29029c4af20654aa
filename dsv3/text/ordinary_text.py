"""Escape names of control tokens in messages, so that they stay ordinary text in a prompt.

A control token's name in a message (`<｜User｜>`, `</think>`) must not become that token. The name
is replaced by two private characters before the template is rendered, and becomes ordinary text
again when the rendered prompt is encoded. So a template may trim, split or join messages, or write
them as JSON, and never confuses a user's text with its own marks.
"""

import re

from dsv3.text.thoughts import END_THINK, THINK
from dsv3.text.tokenizer import Tokenizer

# An escaped name is a private character and a second one, `_FIRST` plus the index of the name.
_ESCAPE = "\U0010fffd"
_FIRST = 0x100000
_MAX_NAMES = ord(_ESCAPE) - _FIRST
_ESCAPED = re.compile(f"{_ESCAPE}([{chr(_FIRST)}-{chr(ord(_ESCAPE) - 1)}])")


class OrdinaryText:
    """Escapes names of control tokens in messages, and encodes prompts with escaped names.

    Text without such names is encoded exactly as by the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokens = [name for name in tokenizer.control_tokens if name][: _MAX_NAMES // 2]
        hidden = dict.fromkeys([*tokens, THINK, END_THINK, _ESCAPE])
        self._names = list(hidden | dict.fromkeys(name[0] for name in hidden))
        self._index = {name: i for i, name in enumerate(self._names)}
        self._tokens = _one_of(tokens)
        self._hidden = _Hidden(list(hidden))
        self._hidden_in_answers = _Hidden([n for n in hidden if n not in (THINK, END_THINK)])

    def hide(self, text: str, in_answer: bool = False) -> str:
        """Return a text with names escaped; in an answer of the model, think marks are kept."""
        hidden = self._hidden_in_answers if in_answer else self._hidden
        text = hidden.pattern.sub(lambda match: self._mark(match[0]), text)
        # Text that the template writes after the message must not complete a name.
        start = hidden.unfinished(text)
        if start < 0:
            return text
        return text[:start] + self._mark(text[start]) + text[start + 1 :]

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt."""
        if _ESCAPE not in prompt:
            return self._tokenizer.encode(prompt, add_special_tokens=False)
        ids: list[int] = []
        plain = ""
        for part in self._tokens.split(prompt):
            if _ESCAPE not in part:
                plain += part
                continue
            ids += self._tokenizer.encode(plain, add_special_tokens=False)
            ids += self._tokenizer.encode_ordinary(_ESCAPED.sub(self._name, part))
            plain = ""
        return ids + self._tokenizer.encode(plain, add_special_tokens=False)

    def _mark(self, name: str) -> str:
        return _ESCAPE + chr(_FIRST + self._index[name])

    def _name(self, mark: re.Match[str]) -> str:
        index = ord(mark[1]) - _FIRST
        return self._names[index] if index < len(self._names) else mark[0]


class _Hidden:
    """A set of names to escape."""

    def __init__(self, names: list[str]) -> None:
        self.pattern = _one_of(names)
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._longest = max(map(len, names)) - 1

    def unfinished(self, text: str) -> int:
        """Return the start of an incomplete name at the end of a text; -1 if there is none."""
        for start in range(max(0, len(text) - self._longest), len(text)):
            if text[start:] in self._beginnings:
                return start
        return -1


def _one_of(names: list[str]) -> re.Pattern[str]:
    """Return a pattern that captures the longest matching name."""
    by_length = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, by_length))})" if names else r"(?!)")
