"""DeepSeek's published chat formats, for checkpoints without a chat template.

Each one equals the training format of its model in every character; tools are not supported.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from dsv3.errors import CheckpointError
from dsv3.text.thoughts import END_THINK, THINK
from dsv3.text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# Arguments: messages, thinking, add_generation_prompt.
Renderer = Callable[[Messages, bool, bool], str]
_ROLES = ("system", "user", "assistant")


def published_format(
    model_type: str, name: str, tokenizer: Tokenizer
) -> tuple[Renderer, tuple[str, ...]]:
    """Return the format of a model and the roles it supports.

    V3, R1 and V3.1 have the same model type: the name distinguishes them, and V3.1's vocabulary has
    tokens for search.
    """
    words = re.split(r"[^a-z0-9.]+", name.lower())
    if model_type == "deepseek_v2":
        return (_v3 if "v2.5" in words else _v2), _ROLES
    if model_type == "deepseek_v32":
        return _v3_2, ("developer", *_ROLES)
    if model_type == "deepseek_v3":
        if "v3.1" in words or tokenizer.id_of("<｜search▁begin｜>") is not None:
            return _v3_1, _ROLES
        return (_r1 if "r1" in words else _v3), _ROLES
    raise CheckpointError(
        f"no chat template in this checkpoint, and no known format for model type {model_type!r}"
    )


def _v2(messages: Messages, thinking: bool, add_generation_prompt: bool) -> str:
    """Render the format of DeepSeek-V2: `User: ...` and `Assistant: ...` as ordinary text."""
    turn = {
        "system": "{}\n\n",
        "user": "User: {}\n\n",
        "assistant": "Assistant: {}" + EOS,
    }
    text = "".join(turn[message["role"]].format(message["content"]) for message in messages)
    return BOS + text + ("Assistant:" if add_generation_prompt else "")


def _v3(messages: Messages, thinking: bool, add_generation_prompt: bool) -> str:
    """Render the format of DeepSeek-V3 and V2.5: roles are tokens, system messages come first."""
    text = BOS + _system_text(messages)
    for message in messages:
        if message["role"] == "user":
            text += USER + message["content"]
        elif message["role"] == "assistant":
            text += ASSISTANT + message["content"] + EOS
    return text + (ASSISTANT if add_generation_prompt else "")


def _r1(messages: Messages, thinking: bool, add_generation_prompt: bool) -> str:
    """Render the format of DeepSeek-R1: V3's with a thought in each answer and no old thoughts."""
    answers_only = [
        message | {"content": message["content"].rsplit(END_THINK, 1)[-1]}
        if message["role"] == "assistant"
        else message
        for message in messages
    ]
    text = _v3(answers_only, thinking, add_generation_prompt)
    return text + (THINK + "\n" if add_generation_prompt else "")


def _v3_1(messages: Messages, thinking: bool, add_generation_prompt: bool) -> str:
    """Render the format of DeepSeek-V3.1: an answer begins with a think mark; no old thoughts."""
    text = BOS + _system_text(messages)
    turns = [message for message in messages if message["role"] != "system"]
    for before, message in pairwise([{"role": ""}, *turns]):
        if message["role"] == "user":
            text += USER + message["content"]
            continue
        if before["role"] == "user":
            text += ASSISTANT + END_THINK
        text += message["content"].split(END_THINK, 1)[-1] + EOS
    if add_generation_prompt and turns and turns[-1]["role"] == "user":
        text += ASSISTANT + (THINK if thinking else END_THINK)
    return text


def _v3_2(messages: Messages, thinking: bool, add_generation_prompt: bool) -> str:
    """Render the format of DeepSeek-V3.2 like its Python encoder.

    A user message is followed by the start of the answer. With thinking, thoughts are kept only
    after the last question, and `developer` messages before it are dropped.
    """
    last = len(messages) - 1
    while last >= 0 and messages[last]["role"] not in ("user", "developer"):
        last -= 1
    text = BOS
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system":
            text += content
        elif message["role"] == "assistant":
            if thinking and i > last:
                text += message.get("reasoning_content", "") + END_THINK
            text += content + EOS
        elif message["role"] == "user" or not thinking or i == last:
            if message["role"] == "developer":
                content = f"\n\n# The user's message is: {content}"
            text += USER + content + ASSISTANT + (THINK if thinking and i == last else END_THINK)
    return text


def _system_text(messages: Messages) -> str:
    return "\n\n".join(message["content"] for message in messages if message["role"] == "system")
