"""Conversations as the prompts a model was trained on.

A checkpoint's own Jinja template decides, in a sandbox and within limits. Where it ships none
(V3.2 never does), one of DeepSeek's published formats stands in.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import CheckpointError, ConfigError, RequestError
from dsv3.read_files import read_text
from dsv3.text.chat_template import ChatTemplate
from dsv3.text.messages import ROLES, Message, Tools, check_message, map_strings
from dsv3.text.ordinary_text import OrdinaryText
from dsv3.text.published_formats import published_format
from dsv3.text.thoughts import END_THINK, begins_in_thought
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tokenizer_errors import NoTokenizer

log = logging.getLogger(__name__)

_QUESTION: list[Message] = [{"role": "user", "content": "Hello"}]
# A template that can write none of these writes nothing.
_PROBES: tuple[list[Message], ...] = (
    _QUESTION,
    [{"role": "system", "content": "Be brief."}, *_QUESTION],
    [*_QUESTION, {"role": "assistant", "content": "Hello"}, *_QUESTION],
)


class ChatFormat:
    """How one checkpoint writes a conversation.

    Args:
        tokenizer: encodes the rendered text; its special tokens and template are used.
        model_type, name: of the model ("deepseek_v3", "DeepSeek-R1"); they choose a format
            where there is no template.
        template: a file whose Jinja template takes the place of the checkpoint's own.

    Raises:
        CheckpointError: the template is damaged, or there is no format for the model.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_type: str = "",
        name: str = "",
        template: Path | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._ordinary = OrdinaryText(tokenizer)
        self._remarked: set[bool] = set()
        source, where = tokenizer.chat_template, tokenizer.template_name
        if template is not None:
            source, where = read_text(template, ConfigError), str(template)
        if source is None:
            self._published, roles = published_format(model_type, name, tokenizer)
            self._template, self._roles, self._knows_thoughts = None, set(roles), False
        else:
            self._template = ChatTemplate(source, where)
            self._roles = {role for role in ROLES if re.search(f"['\"]{role}['\"]", source)}
            self._knows_thoughts = END_THINK in source

    @classmethod
    def load_optional(
        cls,
        tokenizer: Tokenizer | None,
        model_type: str = "",
        name: str = "",
        template: Path | None = None,
    ) -> "ChatFormat | UnusableFormat | None":
        """Make the format and try it; a damaged one is no error, as raw prompts need none.

        Returns:
            the format; the reason where it cannot be used; None without a tokenizer.

        Raises:
            ConfigError, CheckpointError: a `template` that is given cannot be used.
        """
        if tokenizer is None:
            return None
        try:
            made = cls(tokenizer, model_type, name, template)
            made.check()
        except CheckpointError as error:
            if template is not None:
                raise
            return UnusableFormat(str(error))
        return made

    @classmethod
    def of_directory(
        cls, folder: Path, model_type: str, template: Path | None = None
    ) -> "ChatFormat | UnusableFormat":
        """Make and try the format of a checkpoint, before its weights are loaded."""
        try:
            tokenizer = Tokenizer.load(folder)
        except NoTokenizer as error:
            if template is not None:
                raise
            return UnusableFormat(str(error))
        made = cls.load_optional(tokenizer, model_type, folder.name, template)
        assert made is not None
        return made

    def check(self) -> None:
        """Write conversations of several forms, to see if the template can write one.

        Raises:
            CheckpointError: it can write none; the error is that of the simplest.
        """
        if self._template is not None:
            self._template.check([self._variables(probe, False) for probe in _PROBES])

    def prompt_ids(self, messages: Sequence[Message], thinking: bool | None = None) -> list[int]:
        """Return the tokens of a conversation, up to where the model is to answer."""
        return self.encode(self.render(messages, bool(thinking)))

    def thinking_remark(self, thinking: bool | None) -> str:
        """Return why asking for thoughts, or for none, changes nothing; each reason only once.

        Return an empty text if it changes something, or if `thinking` is None: nothing was asked.
        """
        if thinking is None or thinking in self._remarked:
            return ""
        self._remarked.add(thinking)
        try:
            prompt, other = (self.render(_QUESTION, each) for each in (thinking, not thinking))
        except (CheckpointError, RequestError):
            return ""  # every conversation fails with it
        if prompt != other:
            return ""
        opens = self.opens_thought(self.encode(prompt))
        if thinking:
            reason = "this model's chat format has no switch for it"
            return "" if opens else f"asking for thinking changes nothing: {reason}"
        if opens:
            return "thinking cannot be switched off: this model's chat format always thinks"
        reason = "this model's chat format leaves it to the model"
        return f"thinking cannot be switched off: {reason}" if self._knows_thoughts else ""

    def render(
        self,
        messages: Sequence[Message],
        thinking: bool = False,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Write the conversation, up to where the model is to answer.

        `thinking` reaches the template under both names in use; a template may know neither.
        """
        plain = [self._plain(f"messages[{i}]", message) for i, message in enumerate(messages)]
        if not plain:
            raise RequestError("messages is empty; give at least one message")
        if self._template is None:
            if tools or any("tool_calls" in message for message in plain):
                raise RequestError("tools need a chat template, and this checkpoint ships none")
            return self._published(plain, thinking, add_generation_prompt)
        tools = map_strings(tools, self._ordinary.hide)
        return self._template.render(self._variables(plain, thinking, tools, add_generation_prompt))

    def encode(self, prompt: str) -> list[int]:
        """Encode a rendered conversation: control tokens are those that the format has written."""
        return self._ordinary.encode(prompt)

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Return True if the answer to this prompt begins within a thought."""
        return begins_in_thought(self._tokenizer, prompt_ids)

    def hide_answer(self, text: str) -> str:
        """Write an answer of the model as it would stand in the next rendered prompt."""
        return self._ordinary.hide(text, in_answer=True)

    def _variables(
        self,
        messages: Sequence[Message],
        thinking: bool,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> dict[str, Any]:
        return {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "thinking": thinking,
            "enable_thinking": thinking,
        } | self._tokenizer.special_tokens

    def _plain(self, where: str, message: Any) -> dict[str, Any]:
        """Bring a message into the form that templates expect, control tokens' names hidden."""
        plain = check_message(where, message)
        role = self._role(where, plain["role"])
        hidden: dict[str, Any] = map_strings(plain, self._ordinary.hide)
        hidden["role"] = role
        if role == "assistant" and plain["content"] is not None:
            hidden["content"] = self.hide_answer(plain["content"])
        return hidden

    def _role(self, where: str, role: str) -> str:
        """Return the role under the name that this format knows."""
        if role == "developer" and role not in self._roles:
            return "system"  # its older name
        if role == "tool" and role not in self._roles:
            raise RequestError(f"{where}.role='tool' is unknown to this model's chat format")
        return role


@dataclass(frozen=True, slots=True)
class UnusableFormat:
    """Takes the place of a checkpoint's format that can write no conversation.

    Attributes:
        reason: what is wrong with it.
    """

    reason: str

    def prompt_ids(self, messages: Sequence[Message], thinking: bool | None = None) -> list[int]:
        """Raise the reason."""
        raise CheckpointError(self.reason)

    def thinking_remark(self, thinking: bool | None) -> str:
        """Return nothing: there are no thoughts to speak of."""
        return ""


AnyFormat = ChatFormat | UnusableFormat
