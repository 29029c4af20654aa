"""Requests in the OpenAI format: a body in, a checked `TextRequest` out.

Every field of a body is either supported or refused by name, except for the few below that do not
affect the answer. Fields beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
`stop_token_ids`, `return_token_ids`, `prompt_logprobs`, `speculative_tokens`,
`chat_template_kwargs` with `thinking`, `add_generation_prompt`, `continue_final_message`, and
DeepSeek's `thinking`, `reasoning_effort` and `prefix` of the last message.
"""

import re
from collections.abc import Mapping
from typing import Any

from dsv3.errors import RequestError
from dsv3.request import MAX_ANSWERS, MAX_BIAS, MAX_LOGPROBS, SamplingParams
from dsv3.text.defaults import CHAT_DEFAULTS, COMPLETION_DEFAULTS, Defaults, Sampling
from dsv3.text.messages import PromptEnd
from dsv3.text.openai_fields import Fields, is_number, is_whole, show
from dsv3.text.text_request import TextRequest, digest
from dsv3.text.tools import parse_tool_use

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

# Fields that do not affect the answer.
IGNORED = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
# Unsupported fields, and their values that have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "stream": (False,),
    "suffix": ("",),
}
# The engine looks for each of them after each token.
_MAX_STOPS = 64
_STOP_CHARS = 1024
_STOP_RULE = f"a text of 1 to {_STOP_CHARS} characters or a list of up to {_MAX_STOPS} such texts"
_STOP_IDS_RULE = f"a list of up to {_MAX_STOPS} ids"
# Chat formats have a switch for thinking, not levels.
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


def parse_request(url: str, body: Any, name: str, defaults: Defaults) -> TextRequest:
    """Parse and check the body of a request; without a seed, `name` determines it."""
    if url not in (CHAT, COMPLETIONS):
        raise RequestError(f"url={show(url)} is not served; use {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise RequestError("body must be an object")
    fields = Fields(body)
    requested = Sampling(
        max_tokens=_max_tokens(fields),
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        top_k=_top_k(fields),
        min_p=fields.number("min_p"),
        repetition_penalty=fields.number("repetition_penalty"),
        frequency_penalty=fields.number("frequency_penalty"),
        presence_penalty=fields.number("presence_penalty"),
    )
    if url == CHAT:
        specific = _chat_fields(fields, defaults)
        sampling = defaults.sampling(requested, CHAT_DEFAULTS)
    else:
        specific = _completion_fields(fields)
        sampling = defaults.sampling(requested, COMPLETION_DEFAULTS)
    logprobs = specific.pop("logprobs")
    listed = fields.integer("prompt_logprobs", 0, MAX_LOGPROBS)
    echoed = logprobs if specific.get("echo") else None
    prompt_logprobs = echoed if listed is None else max(listed, echoed or 0)
    stop = fields.take("stop", _is_stop, _STOP_RULE) or ()
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    request = TextRequest(
        params=SamplingParams(
            **sampling,
            n=fields.integer("n", 1, MAX_ANSWERS) or 1,
            logit_bias=_logit_bias(fields),
            seed=_seed_of(name, defaults) if seed is None else seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(
                map(int, fields.take("stop_token_ids", _is_stop_ids, _STOP_IDS_RULE) or ())
            ),
            ignore_eos=fields.truth("ignore_eos") or False,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            speculative_tokens=fields.integer("speculative_tokens", 0, 2**31 - 1),
        ),
        limit_is_default=requested.max_tokens is None,
        return_token_ids=fields.truth("return_token_ids") or False,
        list_prompt_logprobs=listed is not None,
        priority=fields.integer("priority", -(2**31), 2**31 - 1) or 0,
        conversation_id=fields.text("conversation_id"),
        model=fields.text("model") or "",
        **specific,
    )
    _refuse_unsupported(fields.remaining())
    return request


def plain_request(
    messages: list[dict[str, Any]], name: str, defaults: Defaults, fallback: Sampling
) -> TextRequest:
    """Return the request of messages without a body; `fallback` has all sampling values."""
    return TextRequest(
        messages=defaults.with_system(messages),
        params=SamplingParams(
            **defaults.sampling(Sampling(), fallback), seed=_seed_of(name, defaults)
        ),
        limit_is_default=True,
        thinking=defaults.thinking or None,
    )


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raise RequestError for unsupported fields, unless they have no effect."""
    for name, value in fields.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            only = " or ".join(map(show, NEUTRAL[name]))
            raise RequestError(f"{name}={show(value)} is not supported, only {only}")
        if name not in NEUTRAL and name not in IGNORED:
            raise RequestError(f"{name} is not a supported field")


def _chat_fields(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    messages = fields.take("messages", lambda v: isinstance(v, list), "a list of messages")
    if messages is None:
        raise RequestError("messages is missing")
    logprobs = fields.truth("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not logprobs:
        raise RequestError("top_logprobs needs logprobs=true")
    tools = parse_tool_use(
        fields.take("tools", lambda v: isinstance(v, list), "a list of tools"),
        fields.take("tool_choice", lambda v: isinstance(v, str | dict), "a text or an object"),
        fields.truth("parallel_tool_calls"),
    )
    schema = _schema(fields)
    end = _end(fields, messages)
    is_constrained = schema is not None or (tools is not None and tools.is_required)
    if end is PromptEnd.CONTINUED and is_constrained:
        raise RequestError("an answer that is continued excludes response_format and forced tools")
    return {
        "messages": defaults.with_system(_without_prefix(messages)),
        "end": end,
        "thinking": _thinking(fields, defaults),
        "logprobs": (top or 0) if logprobs else None,
        "tools": tools,
        "schema": schema,
    }


def _end(fields: Fields, messages: list[Any]) -> PromptEnd:
    """Return the end of the prompt, by vLLM's switches or DeepSeek's flag of the last message."""
    starts = fields.truth("add_generation_prompt")
    continues = fields.truth("continue_final_message")
    last = messages[-1] if messages else None
    has_prefix = isinstance(last, dict) and last.get("prefix") is True
    if has_prefix and continues is False:
        raise RequestError("prefix=true excludes continue_final_message=false")
    if starts and (continues or has_prefix):
        name = "continue_final_message" if continues else "prefix"
        raise RequestError(f"{name}=true excludes add_generation_prompt=true")
    if continues or has_prefix:
        return PromptEnd.CONTINUED
    return PromptEnd.MESSAGE if starts is False else PromptEnd.ANSWER


def _without_prefix(messages: list[Any]) -> list[Any]:
    """Return messages without DeepSeek's flag of the last one."""
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("prefix") is not True:
        return messages
    return [*messages[:-1], {name: value for name, value in last.items() if name != "prefix"}]


def _schema(fields: Fields) -> Mapping[str, Any] | None:
    """Parse `response_format`: return the JSON schema of the answer, or None for free text."""
    given = fields.take("response_format", lambda v: isinstance(v, dict), "an object")
    options = Fields(given or {"type": "text"})
    kind = options.text("type")
    schema: Mapping[str, Any] | None = None
    if kind == "json_schema":
        schema = _named_schema(options)
    elif kind == "json_object":
        schema = {"type": "object"}
    elif kind != "text":
        kinds = "text, json_object and json_schema"
        raise RequestError(f"response_format.type={show(kind)} is not supported, only {kinds}")
    options.refuse_rest("response_format")
    return schema


def _named_schema(options: Fields) -> Mapping[str, Any]:
    given = options.take("json_schema", lambda v: isinstance(v, dict), "an object")
    named = Fields(given or {})
    named.text("name")
    named.text("description")
    named.truth("strict")  # the answer always follows the schema
    schema: Mapping[str, Any] | None
    schema = named.take("schema", lambda v: isinstance(v, dict), "a JSON schema")
    if schema is None:
        raise RequestError("response_format.json_schema.schema is missing")
    named.refuse_rest("response_format.json_schema")
    return schema


def _thinking(fields: Fields, defaults: Defaults) -> bool | None:
    """Return the switch for thinking, which clients write in several ways."""
    switches = [_template_switch(fields), _deepseek_switch(fields), _effort(fields)]
    given = {switch for switch in switches if switch is not None}
    if len(given) > 1:
        names = "chat_template_kwargs, thinking and reasoning_effort"
        raise RequestError(f"{names} switch thinking both on and off: give one of them")
    return given.pop() if given else defaults.thinking or None


def _deepseek_switch(fields: Fields) -> bool | None:
    """Parse DeepSeek's `thinking`."""
    given = fields.take("thinking", lambda v: isinstance(v, dict), "an object")
    if given is None:
        return None
    options = Fields(given)
    kinds = {"enabled": True, "disabled": False}
    kind = options.take("type", lambda v: isinstance(v, str) and v in kinds, " or ".join(kinds))
    options.refuse_rest("thinking")
    return kinds.get(kind)


def _effort(fields: Fields) -> bool | None:
    """Parse `reasoning_effort`."""
    rule = f"one of {', '.join(_EFFORTS)}"
    effort = fields.take("reasoning_effort", lambda v: v in _EFFORTS, rule)
    return None if effort is None else effort != "none"


def _template_switch(fields: Fields) -> bool | None:
    """Parse `chat_template_kwargs`; templates use two names for the switch."""
    options = fields.take("chat_template_kwargs", lambda v: isinstance(v, dict), "an object")
    switches = Fields(options or {})
    thinking = switches.truth("thinking")
    enable_thinking = switches.truth("enable_thinking")
    for name in switches.remaining():
        raise RequestError(f"chat_template_kwargs.{name} is not supported, only thinking")
    return enable_thinking if thinking is None else thinking


def _completion_fields(fields: Fields) -> dict[str, Any]:
    rule = "a text or a list of token ids (one prompt a row)"
    prompt = fields.take("prompt", lambda value: _is_prompt(_unwrap(value)), rule)
    if prompt is None:
        raise RequestError("prompt is missing")
    prompt = _unwrap(prompt)
    if not prompt:
        raise RequestError("prompt is empty")
    return {
        "prompt": prompt if isinstance(prompt, str) else [int(token_id) for token_id in prompt],
        "echo": fields.truth("echo") or False,
        "logprobs": fields.integer("logprobs", 0, MAX_LOGPROBS),
    }


def _unwrap(prompt: Any) -> Any:
    """Return the only prompt of a list of one prompt; other values unchanged."""
    is_list = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list)
    return prompt[0] if is_list else prompt


def _max_tokens(fields: Fields) -> int | None:
    older = fields.integer("max_tokens", 0, 2**31 - 1)
    newer = fields.integer("max_completion_tokens", 0, 2**31 - 1)
    if older is not None and newer is not None and older != newer:
        raise RequestError(
            f"max_tokens={older} and max_completion_tokens={newer} mean the same: give one of them"
        )
    return newer if older is None else older


def _top_k(fields: Fields) -> int | None:
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    return 0 if top_k == -1 else top_k  # both are in use for "keep all"


def _logit_bias(fields: Fields) -> dict[int, float]:
    """Parse `logit_bias`, whose token ids are strings in JSON; the vocabulary is checked later."""
    biases = fields.take("logit_bias", lambda v: isinstance(v, dict), "an object") or {}
    for key, bias in biases.items():
        if not re.fullmatch("0|[1-9][0-9]{0,8}", key):
            raise RequestError(f"logit_bias has the field {show(key)}, which is not a token id")
        if not is_number(bias) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise RequestError(
                f"logit_bias[{key}]={show(bias)} must be a number between -100 and 100"
            )
    return {int(key): bias for key, bias in biases.items()}


def _seed_of(name: str, defaults: Defaults) -> int:
    """Return a seed that does not depend on other requests or on their order.

    The name of the row is hashed with --seed, not added to it, so that neighbouring rows and runs
    with neighbouring seeds have independent random numbers.
    """
    return int(digest(f"{defaults.seed}:{name}")[:15], 16)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_whole, value))


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or _is_ids(value)


def _is_stop(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    are_texts = all(isinstance(text, str) and 0 < len(text) <= _STOP_CHARS for text in texts)
    return are_texts and len(texts) <= _MAX_STOPS


def _is_stop_ids(value: Any) -> bool:
    return _is_ids(value) and len(value) <= _MAX_STOPS
