"""DeepSeek's published chat formats, for checkpoints without a chat template.

Each one equals the training format of its model in every character. V3.2's, the only one with
tools, is in `dsv3.text.deepseek_v32`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

from dsv3.errors import CheckpointError
from dsv3.text.deepseek_v32 import ASSISTANT, BOS, EOS, USER, render_v32
from dsv3.text.messages import ROLES, ChatInput
from dsv3.text.thoughts import END_THINK, THINK
from dsv3.text.tokenizer import Tokenizer

_PLAIN_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class PublishedFormat:
    """A chat format.

    Attributes:
        render: returns the prompt of a conversation.
        roles: names of the roles that it knows.
        has_tools: True if it has a place for tools, their calls, and a schema of the answer.
    """

    render: Callable[[ChatInput], str]
    roles: tuple[str, ...] = _PLAIN_ROLES
    has_tools: bool = False


def published_format(model_type: str, name: str, tokenizer: Tokenizer) -> PublishedFormat:
    """Return the format of a model.

    V3, R1 and V3.1 have the same model type: the name distinguishes them, and V3.1's vocabulary has
    tokens for search.
    """
    words = re.split(r"[^a-z0-9.]+", name.lower())
    if model_type == "deepseek_v2":
        return PublishedFormat(_v3 if "v2.5" in words else _v2)
    if model_type == "deepseek_v32":
        return PublishedFormat(render_v32, ROLES, has_tools=True)
    if model_type == "deepseek_v3":
        if "v3.1" in words or tokenizer.id_of("<｜search▁begin｜>") is not None:
            return PublishedFormat(_v3_1)
        return PublishedFormat(_r1 if "r1" in words else _v3)
    raise CheckpointError(
        f"no chat template in this checkpoint, and no known format for model type {model_type!r}"
    )


def _v2(chat: ChatInput) -> str:
    """Render the format of DeepSeek-V2: `User: ...` and `Assistant: ...` as ordinary text."""
    turn = {
        "system": "{}\n\n",
        "user": "User: {}\n\n",
        "assistant": "Assistant: {}" + EOS,
    }
    text = "".join(turn[message["role"]].format(message["content"]) for message in chat.messages)
    return BOS + text + ("Assistant:" if chat.add_generation_prompt else "")


def _v3(chat: ChatInput) -> str:
    """Render the format of DeepSeek-V3 and V2.5: roles are tokens, system messages come first."""
    text = BOS + _system_text(chat)
    for message in chat.messages:
        if message["role"] == "user":
            text += USER + message["content"]
        elif message["role"] == "assistant":
            text += ASSISTANT + message["content"] + EOS
    return text + (ASSISTANT if chat.add_generation_prompt else "")


def _r1(chat: ChatInput) -> str:
    """Render the format of DeepSeek-R1: V3's with a thought in each answer and no old thoughts."""
    answers_only = [
        {**message, "content": message["content"].rsplit(END_THINK, 1)[-1]}
        if message["role"] == "assistant"
        else message
        for message in chat.messages
    ]
    text = _v3(replace(chat, messages=answers_only))
    return text + (THINK + "\n" if chat.add_generation_prompt else "")


def _v3_1(chat: ChatInput) -> str:
    """Render the format of DeepSeek-V3.1: an answer begins with a think mark; no old thoughts."""
    text = BOS + _system_text(chat)
    turns = [message for message in chat.messages if message["role"] != "system"]
    for before, message in pairwise([{"role": ""}, *turns]):
        if message["role"] == "user":
            text += USER + message["content"]
            continue
        if before["role"] == "user":
            text += ASSISTANT + END_THINK
        text += message["content"].split(END_THINK, 1)[-1] + EOS
    if chat.add_generation_prompt and turns and turns[-1]["role"] == "user":
        text += ASSISTANT + (THINK if chat.thinking else END_THINK)
    return text


def _system_text(chat: ChatInput) -> str:
    texts = (message["content"] for message in chat.messages if message["role"] == "system")
    return "\n\n".join(texts)
