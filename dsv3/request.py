"""What is asked and what is answered: plain data that every room may use.

`Request` goes into the engine, `RequestOutput` comes out after every step, `Completion` when the
request is done. Nothing here knows how tokens are made.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv3.errors import RequestError

MAX_LOGPROBS = 20
MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one answer.

    In this order: bias, penalties, temperature, min_p, top_k, top_p. Greedy decoding applies
    the first two. Log-probabilities are the model's own, before all of these.

    Attributes:
        max_tokens: tokens to generate at most; 0 only scores the prompt.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens with this probability; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one; 0 drops none.
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it, or
            multiplied if negative; 1 changes nothing.
        frequency_penalty: subtracted from a token's logit for each time it is in the answer.
        presence_penalty: subtracted once from the logits of tokens in the answer.
        logit_bias: token -> added to its logit.
        seed: names the random numbers; the same seed gives the same tokens in any batch, at any
            world size.
        stop: texts that end the answer (not part of it).
        stop_token_ids: tokens that end the answer, beside the model's own end tokens.
        ignore_eos: go on after the model's end tokens.
        logprobs: number of likeliest alternatives reported per generated token; None reports none.
        prompt_logprobs: the same for the tokens of the prompt.
    """

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

    def __post_init__(self) -> None:
        """Refuse values out of range, naming field and value."""
        asked = {name: getattr(self, name) for name in ("logprobs", "prompt_logprobs")}
        rules = (
            ("max_tokens", self.max_tokens >= 0, "at least 0"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            (
                "repetition_penalty",
                0.001 <= self.repetition_penalty <= 1000.0,
                "from 0.001 to 1000",
            ),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("seed", -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("stop", all(self.stop), "without empty strings"),
            *((n, top is None or 0 <= top <= MAX_LOGPROBS, "0 to 20") for n, top in asked.items()),
        )
        for name, holds, rule in rules:
            if not holds:
                raise RequestError(f"{name}={getattr(self, name)!r} must be {rule}")
        _check_bias(self.logit_bias)

    @property
    def has_penalties(self) -> bool:
        """Whether tokens that were seen before are less likely, or more."""
        penalties = self.repetition_penalty, self.frequency_penalty, self.presence_penalty
        return penalties != (1.0, 0.0, 0.0)


def _check_bias(logit_bias: object) -> None:
    if not isinstance(logit_bias, Mapping):
        raise RequestError(f"logit_bias={logit_bias!r:.60} must map token ids to numbers")
    for token_id, bias in logit_bias.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if type(token_id) is not int or not is_number or not -MAX_BIAS <= bias <= MAX_BIAS:
            rule = "a token id, and a number between -100 and 100"
            raise RequestError(f"logit_bias[{token_id!r}]={bias!r} must be {rule}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        request_id: unique among the unfinished requests.
        priority: lower goes first, equal ones in order of arrival.
        conversation_id: requests that share it are turns of one dialogue.
        is_chat: the prompt is a conversation: a thought may come before the answer, and stop
            strings end only the answer.
        deadline: seconds after `Engine.add` at which the answer ends as it is; None waits.
        answer: which of the answers to one prompt and seed this is: each has random numbers of
            its own.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    conversation_id: str | None = None
    is_chat: bool = False
    deadline: float | None = None
    answer: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one token, and of the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True, kw_only=True)
class Completion:
    """The finished answer to one request.

    Attributes:
        token_ids: generated tokens, the end token not included.
        text: their text, cut before a stop string. With `LLM.chat` the answer without its thought.
        reasoning: the thought, where `LLM.chat` has found one; None elsewhere.
        finish_reason: "stop" (end token or stop string), "length", "deadline", or "error".
        error: why there is no (whole) answer, with "error" only.
        logprobs: one entry per generated token when asked for.
        prompt_logprobs: one entry per prompt token but the first, when asked for.
        cached_tokens: prompt tokens whose cache entries were reused, not computed.
    """

    request_id: str
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    cached_tokens: int = 0
    error: str = ""
    reasoning: str | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What one step added to one request; `completion` is set by the last one."""

    request_id: str
    new_token_ids: list[int] = field(default_factory=list)
    new_text: str = ""
    completion: Completion | None = None
