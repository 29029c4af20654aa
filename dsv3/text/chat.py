"""Conversations as the prompts a model was trained on.

A checkpoint's own Jinja template decides, in a sandbox and within limits. Where it ships none
(V3.2 never does), one of DeepSeek's published formats stands in.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.errors import CheckpointError, RequestError
from dsv3.text.chat_template import ChatTemplate
from dsv3.text.detokenize import StopChecker
from dsv3.text.published_formats import END_THINK, THINK, published_format
from dsv3.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Message = Mapping[str, Any]  # {"role": ..., "content": ...} as in the OpenAI format
Tools = Sequence[Mapping[str, Any]]  # JSON schemas, as in the OpenAI format

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_FIELDS = {"role", "content", "name", "reasoning_content", "tool_calls", "tool_call_id"}


class ChatFormat:
    """How one checkpoint writes a conversation.

    Args:
        tokenizer: encodes the rendered text; its special tokens and template are used.
        model_type, name: of the model ("deepseek_v3", "DeepSeek-R1"); they choose a format
            where the checkpoint ships no template.
    """

    def __init__(self, tokenizer: Tokenizer, model_type: str = "", name: str = "") -> None:
        self._tokenizer = tokenizer
        source = tokenizer.chat_template
        if source is None:
            self._published, roles = published_format(model_type, name, tokenizer)
            self._template, self._roles = None, set(roles)
        else:
            self._template = ChatTemplate(source, tokenizer.template_name)
            self._roles = {role for role in ROLES if re.search(f"['\"]{role}['\"]", source)}

    @classmethod
    def load_optional(
        cls, tokenizer: Tokenizer | None, model_type: str = "", name: str = ""
    ) -> "ChatFormat | None":
        """Make the format if there is one: raw prompts and token ids need none."""
        try:
            return cls(tokenizer, model_type, name) if tokenizer else None
        except CheckpointError as error:
            log.warning("%s: no conversations can be served", error)
            return None

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
        variables = {
            "messages": plain,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "thinking": thinking,
            "enable_thinking": thinking,
        }
        return self._template.render(variables | self._tokenizer.special_tokens)

    def encode(self, text: str) -> list[int]:
        """Encode a rendered conversation: its special tokens are already written out."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _plain(self, where: str, message: Any) -> dict[str, Any]:
        """Check one message and bring it into the form templates expect: text content."""
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be an object with role and content")
        plain = {field: value for field, value in message.items() if value is not None}
        for field in plain:
            if field not in MESSAGE_FIELDS:
                raise RequestError(f"{where}.{field} is not supported")
        plain["role"] = self._role(where, plain.get("role"))
        if "content" in plain:
            plain["content"] = _text(f"{where}.content", plain["content"])
        elif "tool_calls" in plain:
            plain["content"] = None
        else:
            raise RequestError(f"{where}.content is missing")
        return plain

    def _role(self, where: str, role: Any) -> str:
        """Return the role under the name that this format knows."""
        if role not in ROLES:
            raise RequestError(f"{where}.role={role!r} is unknown; use one of {', '.join(ROLES)}")
        if role == "developer" and role not in self._roles:
            return "system"  # its older name
        if role == "tool" and role not in self._roles:
            raise RequestError(f"{where}.role='tool' is unknown to this model's chat format")
        return str(role)


def opens_thought(prompt: str) -> bool:
    """Tell whether a rendered prompt makes the answer begin within a thought."""
    return prompt.rstrip().endswith(THINK)


def split_reasoning(text: str) -> tuple[str, str]:
    """Split an answer that began within a thought into the thought and what follows it."""
    reasoning, _, answer = text.partition(END_THINK)
    return reasoning.strip(), answer.lstrip("\n")


class ThoughtStream:
    """`split_reasoning` of an answer while it comes.

    Args:
        inside: whether the answer begins within a thought.
    """

    def __init__(self, inside: bool) -> None:
        self._end = StopChecker((END_THINK,)) if inside else None
        self._begun = not inside  # the blank lines after a thought are not part of the answer

    def push(self, text: str) -> tuple[str, str]:
        """Take more text; return what it adds to the thought and to the answer."""
        thought = ""
        if self._end is not None:
            thought, ended = self._end.push(text)
            if not ended:
                return thought, ""
            text, self._end = self._end.rest, None
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return thought, text

    def finish(self) -> str:
        """Return the end of a thought that never ended."""
        return "" if self._end is None else self._end.finish()


def _text(where: str, content: Any) -> str:
    """Return the text of a message: a string, or the lines of a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestError(f'{where}[{i}] must be an object like {{"type": "text", ...}}')
        if part["type"] != "text":
            raise RequestError(f"{where}[{i}].type={part['type']!r} is not supported, only 'text'")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}].text must be a text")
        texts.append(part["text"])
    return "\n".join(texts)
