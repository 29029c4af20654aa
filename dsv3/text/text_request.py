"""A request as text, and its conversion to the engine's requests in tokens."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

from dsv3.errors import CheckpointError, RequestError
from dsv3.request import Request, SamplingParams
from dsv3.text.chat import AnyFormat
from dsv3.text.grammar import answer_grammar
from dsv3.text.messages import PromptEnd
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import ToolUse

log = logging.getLogger(__name__)

# Sampling values that a digest covers only if they differ from the default, so that results of
# versions without them can be resumed.
_NEWER_PARAMS = (
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A request before it becomes tokens, with all defaults filled in.

    Attributes:
        messages, prompt: the input, one of the two.
        params: parameters of all `n` answers.
        thinking: let the model think first; None if not specified.
        end: of the prompt of messages.
        limit_is_default: max_tokens was not specified and is reduced to the rest of the context.
        echo: the answer's text begins with the prompt.
        return_token_ids: return the tokens of answer and prompt.
        list_prompt_logprobs: return the log-probabilities of the prompt's tokens in a list.
        tools: tools that the model may or must call.
        schema: JSON schema that the answer follows if it is no call; None is free text.
        priority, conversation_id: as in `Request`.
        model: model name of the response.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] | None = None
    params: SamplingParams
    limit_is_default: bool = False
    thinking: bool | None = None
    end: PromptEnd = PromptEnd.ANSWER
    echo: bool = False
    return_token_ids: bool = False
    list_prompt_logprobs: bool = False
    tools: ToolUse | None = None
    schema: Mapping[str, Any] | None = None
    priority: int = 0
    conversation_id: str | None = None
    model: str = ""

    def digest(self) -> str:
        """Return a digest of the request's content."""
        content = asdict(self)
        default_params = asdict(SamplingParams())
        for name in _NEWER_PARAMS:
            if content["params"][name] == default_params[name]:
                del content["params"][name]
        content["n"] = content["params"].pop("n")
        del content["params"]["speculative_tokens"]  # changes no answer
        content["thinking"] = bool(self.thinking)  # None was added later, and counts as False
        content["end"] = "" if self.end is PromptEnd.ANSWER else self.end.value
        for name in ("tools", "schema", "list_prompt_logprobs", "end"):
            if not content[name]:
                del content[name]
        return digest(json.dumps(content, sort_keys=True, separators=(",", ":")))


class EncodedRequest(NamedTuple):
    """The request of one answer, as text and in tokens."""

    text: TextRequest
    tokens: Request


def digest(data: str | bytes) -> str:
    """Return a digest of `data` with 32 hexadecimal digits."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).hexdigest()[:32]


def encode_prompt(
    request: TextRequest, tokenizer: Tokenizer | None, chat: AnyFormat | None
) -> list[int]:
    """Return the tokens of a request's prompt; warn once if its `thinking` has no effect."""
    if tokenizer is None and (request.params.stop or not isinstance(request.prompt, list)):
        raise CheckpointError(
            "this checkpoint has no tokenizer: give the prompt as token ids, and no stop strings"
        )
    if request.messages is not None:
        if chat is None:
            raise CheckpointError("this checkpoint has no chat template: use /v1/completions")
        ids = chat.prompt_ids(
            request.messages, request.thinking, request.tools, request.schema, request.end
        )
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


class ServedModel(Protocol):
    """The facts about a model that requests depend on; the engine has them."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the checkpoint has none."""

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller than this."""

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a prompt and its answer."""


def token_requests(
    request: TextRequest, prompt_ids: list[int], name: str, model: ServedModel
) -> list[Request]:
    """Return the engine's requests, `name/0` and on, one per answer.

    Raises:
        RequestError: a token is not one of the model's, or the model's form of calls cannot be
            constrained to the schema of a strict tool.
    """
    params = request.params
    for field, ids in (("prompt", prompt_ids), ("stop_token_ids", params.stop_token_ids)):
        for i, token_id in enumerate(ids):
            if not 0 <= token_id < model.vocab_size:
                last = model.vocab_size - 1
                raise RequestError(
                    f"{field}[{i}]={token_id} is not a token of this model (0 to {last})"
                )
    if request.limit_is_default:
        num_free = max(1, model.max_seq_len - len(prompt_ids))
        params = replace(params, max_tokens=min(params.max_tokens, num_free))
    grammar = answer_grammar(request.tools, request.schema, model.tokenizer)
    return [
        Request(
            request_id=f"{name}/{i}",
            prompt_ids=prompt_ids,
            params=params,
            priority=request.priority,
            conversation_id=request.conversation_id,
            answer=i,
            is_chat=request.messages is not None,
            grammar=grammar,
            has_tools=request.tools is not None,
        )
        for i in range(params.n)
    ]
