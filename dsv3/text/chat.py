"""Chat formats: render a conversation as the prompt that a model was trained on.

A checkpoint's own Jinja template is rendered in a sandbox and within limits. A checkpoint without a
template (all of V3.2) uses one of DeepSeek's published formats.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.errors import CheckpointError, ConfigError, RequestError
from dsv3.read_files import read_text
from dsv3.text.call_marks import FENCE
from dsv3.text.chat_template import ChatTemplate
from dsv3.text.messages import (
    ROLES,
    ChatInput,
    Message,
    PromptEnd,
    Tools,
    check_message,
    map_strings,
    order_results,
    parse_tool_calls,
)
from dsv3.text.ordinary_text import OrdinaryText
from dsv3.text.published_formats import PublishedFormat, published_format
from dsv3.text.thoughts import END_THINK, begins_in_thought
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tokenizer_errors import NoTokenizer
from dsv3.text.tools import CallForm, ToolUse, describe_tools

log = logging.getLogger(__name__)

# A template that loops over the items of arguments (GLM's) needs them as objects; others (V3.1's)
# write them as the JSON text that clients send.
_LOOPS_OVER_ITEMS = re.compile(r"\.items\(\)|\|\s*items\b")
_CUT = "\U0010fffc"  # at the end of an answer that is continued
_QUESTION: list[Message] = [{"role": "user", "content": "Hello"}]
# A template that can render none of these is unusable.
_PROBES: tuple[list[Message], ...] = (
    _QUESTION,
    [{"role": "system", "content": "Be brief."}, *_QUESTION],
    [*_QUESTION, {"role": "assistant", "content": "Hello"}, *_QUESTION],
)


class ChatFormat:
    """The chat format of one checkpoint.

    Args:
        tokenizer: encodes the rendered text; its special tokens and template are used.
        model_type, name: type and name of the model ("deepseek_v3", "DeepSeek-R1"); they select a
            published format if there is no template.
        template: a file with a Jinja template to use instead of the checkpoint's own.

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
        source = tokenizer.chat_template
        file = tokenizer.template_name
        if template is not None:
            source = read_text(template, ConfigError)
            file = str(template)
        if source is None:
            self._published: PublishedFormat | None = published_format(model_type, name, tokenizer)
            self._template = None
            self._roles = set(self._published.roles)
            self._knows_thoughts = self._reads_tools = self._fences_calls = False
            self._parses_calls = self._published.has_tools
        else:
            self._published = None
            self._template = ChatTemplate(source, file)
            self._roles = {role for role in ROLES if re.search(f"['\"]{role}['\"]", source)}
            self._knows_thoughts = END_THINK in source
            self._parses_calls = _LOOPS_OVER_ITEMS.search(source) is not None
            self._reads_tools = re.search(r"\btools\b", source) is not None
            self._fences_calls = FENCE in source

    @classmethod
    def load_optional(
        cls,
        tokenizer: Tokenizer | None,
        model_type: str = "",
        name: str = "",
        template: Path | None = None,
    ) -> "ChatFormat | UnusableFormat | None":
        """Create and check the format; a damaged one is not an error, since raw prompts need none.

        Returns:
            the format; an `UnusableFormat` with the reason; None without a tokenizer.

        Raises:
            ConfigError, CheckpointError: the given `template` cannot be used.
        """
        if tokenizer is None:
            return None
        try:
            chat_format = cls(tokenizer, model_type, name, template)
            chat_format.check()
        except CheckpointError as error:
            if template is not None:
                raise
            return UnusableFormat(str(error))
        return chat_format

    @classmethod
    def of_directory(
        cls, folder: Path, model_type: str, template: Path | None = None
    ) -> "ChatFormat | UnusableFormat":
        """Create and check the format of a checkpoint directory, without loading weights."""
        try:
            tokenizer = Tokenizer.load(folder)
        except NoTokenizer as error:
            if template is not None:
                raise
            return UnusableFormat(str(error))
        chat_format = cls.load_optional(tokenizer, model_type, folder.name, template)
        assert chat_format is not None
        return chat_format

    def check(self) -> None:
        """Check that the template can render at least one of several simple conversations.

        Raises:
            CheckpointError: it can render none; the error is that of the simplest.
        """
        if self._template is not None:
            self._template.check([self._variables(ChatInput(messages=p)) for p in _PROBES])

    def prompt_ids(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        tools: ToolUse | None = None,
        schema: Any = None,
        end: PromptEnd = PromptEnd.ANSWER,
    ) -> list[int]:
        """Return the tokens of a conversation, by default up to the start of the model's answer.

        A schema, and tools that must be called, are enforced while the answer is generated: they
        are left out of the prompt if the format has no place for them.

        Raises:
            RequestError: the messages or tools cannot be rendered.
        """
        given: Tools = ()
        if tools is not None and (self._has_place_for_tools or not tools.is_required):
            if not tools.is_required and CallForm.of(self._tokenizer) is None:
                reason = "the calls of this model have no form that is known"
                raise RequestError(f"tools: {reason}; use tool_choice=required")
            given = tools.tools
        schema = schema if self._has_place_for_schema else None
        return self.encode(self.render(messages, bool(thinking), given, end, schema))

    @property
    def _has_place_for_schema(self) -> bool:
        return self._published is not None and self._published.has_tools

    @property
    def _has_place_for_tools(self) -> bool:
        if self._published is not None:
            return self._published.has_tools
        return self._reads_tools or self._describes_tools

    @property
    def _describes_tools(self) -> bool:
        """True if a system message tells the model about tools, since its template does not."""
        if self._template is None or self._reads_tools:
            return False
        return CallForm.of(self._tokenizer) is CallForm.DEEPSEEK

    def thinking_remark(self, thinking: bool | None) -> str:
        """Return a remark if the format ignores `thinking`; each remark is returned only once.

        The remark is empty if `thinking` has an effect or is None.
        """
        if thinking is None or thinking in self._remarked:
            return ""
        self._remarked.add(thinking)
        try:
            prompt = self.render(_QUESTION, thinking)
            other = self.render(_QUESTION, not thinking)
        except (CheckpointError, RequestError):
            return ""  # every conversation fails with this error
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
        end: PromptEnd = PromptEnd.ANSWER,
        schema: Any = None,
    ) -> str:
        """Return the text of a conversation, by default up to the start of the model's answer.

        Args:
            messages: in the OpenAI format.
            thinking: let the model think; a template gets it under both names in use.
            tools: that the model may call, in the OpenAI format.
            end: of the text, where the format allows it.
            schema: JSON schema that the answer has to follow.

        Raises:
            RequestError: the format has no place for one of them.
        """
        plain = [self._plain(f"messages[{i}]", message) for i, message in enumerate(messages)]
        if not plain:
            raise RequestError("messages is empty; give at least one message")
        if end is PromptEnd.CONTINUED:
            plain[-1] = _with_cut(plain[-1])
        plain = order_results(plain)
        hidden_tools = map_strings(tools or (), self._ordinary.hide)
        if hidden_tools and self._describes_tools:
            plain = _with_system(plain, describe_tools(hidden_tools, self._fences_calls))
        chat = ChatInput(
            messages=plain,
            thinking=thinking,
            tools=hidden_tools,
            schema=map_strings(schema, self._ordinary.hide),
            add_generation_prompt=end is PromptEnd.ANSWER,
        )
        if self._published is not None:
            text = _render_published(self._published, chat)
        elif schema is not None:
            raise RequestError("this model's chat format has no place for a schema of the answer")
        else:
            assert self._template is not None
            text = self._template.render(self._variables(chat))
        return _before_cut(text) if end is PromptEnd.CONTINUED else text

    def encode(self, prompt: str) -> list[int]:
        """Encode a rendered conversation; only control tokens written by the format count."""
        return self._ordinary.encode(prompt)

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Return True if the answer to this prompt begins within a thought."""
        return begins_in_thought(self._tokenizer, prompt_ids)

    def hide_answer(self, text: str) -> str:
        """Return an answer of the model as it appears in the next rendered prompt."""
        return self._ordinary.hide(text, in_answer=True)

    def _variables(self, chat: ChatInput) -> dict[str, Any]:
        return {
            "messages": chat.messages,
            "tools": chat.tools or None,
            "documents": None,
            "add_generation_prompt": chat.add_generation_prompt,
            "thinking": chat.thinking,
            "enable_thinking": chat.thinking,
        } | self._tokenizer.special_tokens

    def _plain(self, where: str, message: Any) -> dict[str, Any]:
        """Return a checked message in a template's form, with names of control tokens hidden."""
        plain = check_message(where, message)
        role = self._role(where, plain["role"])
        if self._parses_calls and "tool_calls" in plain:
            # Before names are hidden: in a JSON text, they may be written with escapes.
            plain["tool_calls"] = parse_tool_calls(f"{where}.tool_calls", plain["tool_calls"])
        hidden: dict[str, Any] = map_strings(plain, self._ordinary.hide)
        hidden["role"] = role
        if role == "assistant" and plain["content"] is not None:
            hidden["content"] = self.hide_answer(plain["content"])
        return hidden

    def _role(self, where: str, role: str) -> str:
        """Return the name of a role in this format."""
        if role == "developer" and role not in self._roles:
            return "system"  # its older name
        if role == "tool" and role not in self._roles:
            raise RequestError(f"{where}.role='tool' is unknown to this model's chat format")
        return role


def _with_cut(message: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with a private character at its end, which no template trims."""
    if message["role"] != "assistant" or not message["content"] or "tool_calls" in message:
        raise RequestError(
            "only an answer can be continued: the last message must be the text of one"
        )
    return {**message, "content": message["content"] + _CUT}


def _before_cut(text: str) -> str:
    before, cut, _ = text.rpartition(_CUT)
    if not cut:
        raise RequestError("this model's chat format leaves out the answer that is to be continued")
    return before


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return messages with a text at the end of the last system message, or of a new one."""
    systems = [i for i, message in enumerate(messages) if message["role"] == "system"]
    if not systems:
        return [{"role": "system", "content": f"\n\n{text}"}, *messages]
    last = messages[systems[-1]]
    longer = {**last, "content": f"{last['content']}\n\n{text}"}
    return [*messages[: systems[-1]], longer, *messages[systems[-1] + 1 :]]


def _render_published(published: PublishedFormat, chat: ChatInput) -> str:
    if not published.has_tools:
        if chat.tools or any("tool_calls" in message for message in chat.messages):
            raise RequestError("tools need a chat template, and this checkpoint ships none")
        if chat.schema is not None:
            raise RequestError("this model's chat format has no place for a schema of the answer")
    return published.render(chat)


@dataclass(frozen=True, slots=True)
class UnusableFormat:
    """Substitute for a checkpoint's format that can render no conversation.

    Attributes:
        reason: the error of the format.
    """

    reason: str

    def prompt_ids(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        tools: ToolUse | None = None,
        schema: Any = None,
        end: PromptEnd = PromptEnd.ANSWER,
    ) -> list[int]:
        """Raise CheckpointError with the reason."""
        raise CheckpointError(self.reason)

    def thinking_remark(self, thinking: bool | None) -> str:
        """Return an empty remark."""
        return ""


AnyFormat = ChatFormat | UnusableFormat
