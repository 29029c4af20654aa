"""Separates the text of messages from the structure that a chat format writes around it.

A control token's name in a message (`<｜User｜>`, `</think>`) must not become that token. The name
is replaced by two private characters before a template sees the message, and turned back into
ordinary text when the rendered prompt is encoded. So a template may trim, split or join messages,
or write them as JSON, and never takes a user's text for one of its own marks.
"""

import re

from dsv3.text.thoughts import END_THINK, THINK
from dsv3.text.tokenizer import Tokenizer

# A private character, and the first of those behind it that stand for the names.
_ESCAPE, _FIRST = "\U0010fffd", 0x100000
_MAX_NAMES = ord(_ESCAPE) - _FIRST
_STANDS_FOR = re.compile(f"{_ESCAPE}([{chr(_FIRST)}-{chr(ord(_ESCAPE) - 1)}])")


class OrdinaryText:
    """Hides control tokens' names in messages, and encodes prompts that hold hidden ones.

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
        """Hide the names in a text; in an earlier answer of the model its think marks stay."""
        hidden = self._hidden_in_answers if in_answer else self._hidden
        text = hidden.pattern.sub(lambda match: self._mark(match[0]), text)
        # The text that a template writes next must not complete a name.
        begun = hidden.begun(text)
        return text[:begun] + self._mark(text[begun]) + text[begun + 1 :] if begun >= 0 else text

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
            ids += self._tokenizer.encode_ordinary(_STANDS_FOR.sub(self._name, part))
            plain = ""
        return ids + self._tokenizer.encode(plain, add_special_tokens=False)

    def _mark(self, name: str) -> str:
        return _ESCAPE + chr(_FIRST + self._index[name])

    def _name(self, mark: re.Match[str]) -> str:
        index = ord(mark[1]) - _FIRST
        return self._names[index] if index < len(self._names) else mark[0]


class _Hidden:
    """Names to look for in a text."""

    def __init__(self, names: list[str]) -> None:
        self.pattern = _one_of(names)
        self._beginnings = {name[:end] for name in names for end in range(1, len(name))}
        self._longest = max(map(len, names)) - 1

    def begun(self, text: str) -> int:
        """Return where a name begins that the end of the text cuts off; -1 if there is none."""
        start = max(0, len(text) - self._longest)
        return next((at for at in range(start, len(text)) if text[at:] in self._beginnings), -1)


def _one_of(names: list[str]) -> re.Pattern[str]:
    """Return a pattern that captures the longest of the names that begin at a place."""
    by_length = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, by_length))})" if names else r"(?!)")
