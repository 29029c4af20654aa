"""A request as text, and how it becomes the engine's requests in tokens."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from dsv3.errors import CheckpointError, RequestError
from dsv3.request import Request, SamplingParams
from dsv3.text.chat import AnyFormat
from dsv3.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Sampling values that digests know only where they make a difference: results of versions without
# them resume.
_LATER = ("min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A request before it becomes tokens, with all defaults filled in.

    Attributes:
        messages, prompt: what to continue, one of the two.
        params: of all its `n` answers.
        thinking: whether the model is to think first; None if it does not say.
        limit_is_default: max_tokens was not asked for: it is cut to the room in the context.
        echo: the answer's text begins with the prompt.
        return_token_ids: the answer also tells its tokens and those of the prompt.
        priority, conversation_id: as in `Request`.
        model: name to answer under.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    params: SamplingParams
    limit_is_default: bool = False
    thinking: bool | None = None
    echo: bool = False
    return_token_ids: bool = False
    priority: int = 0
    conversation_id: str | None = None
    model: str = ""

    def digest(self) -> str:
        """Name this request by its content."""
        content, neutral = asdict(self), asdict(SamplingParams())
        for name in _LATER:
            if content["params"][name] == neutral[name]:
                del content["params"][name]
        content["n"] = content["params"].pop("n")
        content["thinking"] = bool(self.thinking)  # as it was before None had a meaning
        return digest(json.dumps(content, sort_keys=True, separators=(",", ":")))


def digest(data: str | bytes) -> str:
    """Return 32 hexadecimal digits that name `data`."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:32]


def encode_prompt(
    request: TextRequest, tokenizer: Tokenizer | None, chat: AnyFormat | None
) -> list[int]:
    """Make the tokens of a request's prompt; warn once if its wish about thinking has no effect."""
    if tokenizer is None and (request.params.stop or not isinstance(request.prompt, list)):
        raise CheckpointError(
            "this checkpoint has no tokenizer: give the prompt as token ids, and no stop strings"
        )
    if request.messages is not None:
        if chat is None:
            raise CheckpointError("this checkpoint has no chat template: use /v1/completions")
        ids = chat.prompt_ids(request.messages, request.thinking)
        if remark := chat.thinking_remark(request.thinking):
            log.warning("%s", remark)
    elif isinstance(request.prompt, list):
        ids = request.prompt
    else:
        assert tokenizer is not None
        ids = tokenizer.encode_prompt(request.prompt or "")
    if not ids:
        raise RequestError("prompt is empty: it has no tokens")
    return ids


def token_requests(
    request: TextRequest, prompt_ids: list[int], name: str, max_seq_len: int, vocab_size: int
) -> list[Request]:
    """Make the engine's requests, `name/0` and on: each answer has random numbers of its own."""
    params = request.params
    for field, ids in (("prompt", prompt_ids), ("stop_token_ids", params.stop_token_ids)):
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"{field}[{i}]={token_id} is no token of this model (0 to {vocab_size - 1})"
                )
    if request.limit_is_default:
        room = max(1, max_seq_len - len(prompt_ids))
        params = replace(params, max_tokens=min(params.max_tokens, room))
    return [
        Request(
            request_id=f"{name}/{i}",
            prompt_ids=prompt_ids,
            params=params,
            priority=request.priority,
            conversation_id=request.conversation_id,
            answer=i,
            is_chat=request.messages is not None,
        )
        for i in range(params.n)
    ]
