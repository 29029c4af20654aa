"""Requests and answers: plain data types that all packages may import.

The engine takes a `Request`, returns a `RequestOutput` after every step, and a `Completion` at the
end of the request.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from dsv3.arguments import number, texts, token_ids, truth, whole
from dsv3.config_fields import describe_unknown, shown
from dsv3.errors import RequestError

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MAX_ANSWERS = 128
_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Rule:
    """Type and range of a field.

    Attributes:
        as_kind: converts a value to the type, and raises ValueError if it cannot.
        kind, limits: the rule in words, for errors.
    """

    as_kind: Callable[[Any], Any]
    kind: str
    least: float = -math.inf
    most: float = math.inf
    limits: str = ""

    def read(self, name: str, value: Any) -> Any:
        """Return the converted value, or raise RequestError."""
        try:
            converted = self.as_kind(value)
        except RequestError:
            raise
        except ValueError:
            rule = f"{self.kind}, {self.limits}" if self.limits else self.kind
            raise RequestError(f"{name}={shown(value)} must be {rule}") from None
        if self.limits and not self.least <= converted <= self.most:
            raise RequestError(f"{name}={shown(value)} must be {self.limits}")
        return converted


def _whole(least: int, most: int, limits: str = "") -> _Rule:
    return _Rule(whole, "a whole number", least, most, limits or f"from {least} to {most}")


def _number(least: float, most: float, limits: str) -> _Rule:
    return _Rule(number, "a number", least, most, limits)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(value)
    biases: dict[int, float] = {}
    for token_id, bias in value.items():
        try:
            key = whole(token_id)
            added = number(bias)
        except ValueError:
            key = 0
            added = math.nan
        if not -MAX_BIAS <= added <= MAX_BIAS:
            rule = "a token id, and a number between -100 and 100"
            raise RequestError(f"logit_bias[{shown(token_id)}]={shown(bias)} must be {rule}")
        biases[key] = added
    return biases


_RULES = {
    "n": _whole(1, MAX_ANSWERS),
    "max_tokens": _whole(0, _MOST),
    "temperature": _number(0, 100, "between 0 and 100"),
    "top_k": _whole(-1, _MOST, f"from 0 to {_MOST} (0 keeps all tokens)"),
    "top_p": _number(math.nextafter(0, 1), 1, "above 0 and at most 1"),
    "min_p": _number(0, 1, "between 0 and 1"),
    "repetition_penalty": _number(0.001, 1000, "from 0.001 to 1000"),
    "frequency_penalty": _number(-2, 2, "between -2 and 2"),
    "presence_penalty": _number(-2, 2, "between -2 and 2"),
    "logit_bias": _Rule(_biases, "a mapping of token ids to numbers"),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _Rule(texts, "a text or a list of texts, none empty"),
    "stop_token_ids": _Rule(token_ids, "a token id or a list of them"),
    "ignore_eos": _Rule(truth, "True or False"),
    "logprobs": _whole(0, MAX_LOGPROBS),
    "prompt_logprobs": _whole(0, MAX_LOGPROBS),
    "speculative_tokens": _whole(0, _MOST),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of an answer.

    They are applied in this order: bias, penalties, temperature, min_p, top_k, top_p. Greedy
    decoding applies the first two. Log-probabilities are the model's own, before all of these.
    Numbers may be NumPy's or strings; a value of another type is a RequestError.

    Attributes:
        n: number of answers to the prompt, each with its own random numbers.
        max_tokens: most tokens to generate; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 and -1 keep all.
        top_p: keep the smallest set of likeliest tokens with this probability; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one; 0 drops none.
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it, or
            multiplied if negative; 1 changes nothing.
        frequency_penalty: subtracted from a token's logit for each occurrence in the answer.
        presence_penalty: subtracted once from the logits of tokens in the answer.
        logit_bias: token -> added to its logit.
        seed: seed of the random numbers, which do not depend on the batch, the chunks or the world
            size. In float32 on CPUs the tokens do not either; in bfloat16 and FP8 the logits may
            differ in their last bits between batches.
        stop: one string or several that end the answer and are not part of it.
        stop_token_ids: one token or several that end the answer, besides the model's end tokens.
        ignore_eos: continue after the model's end tokens.
        logprobs: number of likeliest alternatives reported per generated token; None reports none.
        prompt_logprobs: the same for the tokens of the prompt.
        speculative_tokens: most tokens drafted ahead, within the engine's limit; None for this
            limit. The answer does not depend on it.
    """

    n: int = 1
    max_tokens: int = 200
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    speculative_tokens: int | None = None

    def __post_init__(self) -> None:
        """Convert each value to its field's type; None means the default.

        Raises:
            RequestError: a value has a wrong type or is out of range; the error names both.
        """
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if value is not None:
                value = _RULES[field_.name].read(field_.name, value)
            elif field_.default is not MISSING:
                value = field_.default
            else:
                value = {}
            object.__setattr__(self, field_.name, value)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)  # both mean "keep all"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Return the parameters of a mapping from names to values.

        Raises:
            RequestError: a name is unknown, or a value is wrong.
        """
        known = [field_.name for field_ in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise RequestError(f"params: {describe_unknown(unknown, known, 'parameter')}")
        return cls(**values)

    @property
    def has_penalties(self) -> bool:
        """True if a penalty changes the logits of earlier tokens."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        return penalties != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Grammar:
    """The language of an answer, after its thought.

    Attributes:
        lark: in llguidance's dialect of Lark; tokens are named by their ids.
        subject: where it comes from, for errors: "the JSON schema".
    """

    lark: str
    subject: str = "the grammar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for one answer to a prompt.

    Attributes:
        request_id: unique among the unfinished requests.
        priority: lower values go first, equal ones in order of arrival.
        conversation_id: common to the requests of one conversation.
        is_chat: the prompt is a conversation: a thought may come before the answer, and stop
            strings end only the answer.
        grammar: that the answer follows after its thought; None if it is free.
        has_tools: the answer may call tools: its text keeps the marks of calls.
        deadline: seconds after `Engine.add` at which the answer is cut; None is no limit.
        answer: index among the answers to one prompt and seed; each has its own random numbers.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    conversation_id: str | None = None
    is_chat: bool = False
    grammar: Grammar | None = None
    has_tools: bool = False
    deadline: float | None = None
    answer: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one token, and of the likeliest tokens at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class Completion:
    """The finished answer to one request.

    Attributes:
        token_ids: generated tokens without the end token.
        text: their text, cut before a stop string; with `LLM.chat`, the answer without its thought.
        reasoning: the thought, if `LLM.chat` has found one; otherwise None.
        index: index among the `n` answers to the prompt.
        finish_reason: "stop" (end token or stop string), "length", "deadline", or "error".
        stop_string: the stop string that ended it; None if another reason did.
        error: the reason of a missing or incomplete answer; only with "error".
        is_refused: the error is the request's, and comes again if it is repeated.
        logprobs: one entry per generated token, if requested.
        prompt_logprobs: one entry per prompt token except the first, if requested.
        cached_tokens: prompt tokens whose cache entries were reused instead of computed.
    """

    request_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    stop_string: str | None = None
    error: str = ""
    is_refused: bool = False
    reasoning: str | None = None
    index: int = 0


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The tokens and text that one step added to a request; the last one has `completion`.

    `new_logprobs` has an entry for each new token, if requested.
    """

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    new_text: str = ""
    new_logprobs: list[TokenLogprobs] = field(default_factory=list)
    completion: Completion | None = None
