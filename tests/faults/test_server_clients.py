"""Real clients of the server: the packages openai and anthropic, and lm-eval."""

import asyncio
import importlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from dsv3.config_files import DEMO
from dsv3.llm import LLM
from dsv3.request import SamplingParams
from dsv3.text.tokenizer import Tokenizer
from tests.server import Server

openai = pytest.importorskip("openai", reason="needs the client: pip install openai")
anthropic = pytest.importorskip("anthropic", reason="needs the client: pip install anthropic")
pytestmark = pytest.mark.slow

TALK: list[Any] = [
    {"role": "user", "content": "My name is Ada and I live in Lima."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "Where do I live?"},
]
WANT = "You live in Lima."
PARAMETERS = {
    "type": "object",
    "properties": {"id": {"type": "integer"}},
    "required": ["id"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def gpt(server: Server) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="k", max_retries=0)


@pytest.fixture(scope="module")
def claude(server: Server) -> Any:
    url = f"http://127.0.0.1:{server.port}"
    return anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)


def test_chats_and_their_streams(gpt: Any) -> None:
    asked = {"model": gpt.models.list().data[0].id, "messages": TALK, "temperature": 0}
    whole = gpt.chat.completions.create(**asked, max_completion_tokens=32)
    assert whole.choices[0].message.content == WANT
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(
        gpt.chat.completions.create(
            **asked, stream=True, logprobs=True, stream_options={"include_usage": True}
        )
    )
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == WANT
    logprobs = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    assert len(logprobs) == chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_score_prompts(gpt: Any) -> None:
    asked = {"model": "demo-v3", "prompt": ["The code is", [60, 61, 62]], "temperature": 0}
    scored = gpt.completions.create(**asked, max_tokens=1, echo=True, logprobs=1)
    assert [choice.index for choice in scored.choices] == [0, 1]
    for choice in scored.choices:
        first, *others = choice.logprobs.token_logprobs
        assert first is None and all(value <= 0 for value in others) and others
        assert len(choice.logprobs.tokens) == len(others) + 1
    assert scored.choices[0].text.startswith("The code is")
    texts = ["", ""]
    for chunk in gpt.completions.create(**asked, max_tokens=5, echo=True, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    whole = gpt.completions.create(**asked, max_tokens=5, echo=True)
    assert texts == [choice.text for choice in whole.choices]


def test_streamed_calls_of_tools(gpt: Any) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
    chunks = gpt.chat.completions.create(
        model="demo-v3", messages=TALK, tools=[tool], tool_choice="required", stream=True,
        temperature=1, seed=1, max_tokens=120, parallel_tool_calls=False,
    )  # fmt: skip
    choices = [choice for chunk in chunks for choice in chunk.choices]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert (calls[0].type, calls[0].function.name) == ("function", "look") and calls[0].id
    assert all(call.id is None and call.function.name is None for call in calls[1:])
    assert isinstance(json.loads("".join(c.function.arguments for c in calls))["id"], int)
    assert choices[-1].finish_reason == "tool_calls"


def test_errors_have_the_classes_of_the_client(gpt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        gpt.chat.completions.create(model="demo-v3", messages=TALK, logit_bias={"x": 1})
    with pytest.raises(openai.BadRequestError, match=r"need .* cached tokens|context"):
        gpt.chat.completions.create(model="demo-v3", messages=TALK, max_tokens=10**8, stream=True)
    with pytest.raises(openai.NotFoundError, match="not served"):
        gpt.chat.completions.create(model="other", messages=TALK)


def test_messages_of_anthropic(claude: Any) -> None:
    greedy = {"model": "demo-v3", "max_tokens": 32, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(messages=TALK, **greedy)
    assert (whole.content[0].text, whole.stop_reason) == (WANT, "end_turn")
    with claude.messages.stream(messages=TALK, stop_sequences=["Lima"], **greedy) as stream:
        assert "".join(stream.text_stream) == "You live in "
        last = stream.get_final_message()
    assert (last.stop_reason, last.stop_sequence) == ("stop_sequence", "Lima")
    counted = claude.messages.count_tokens(model="demo-v3", messages=TALK).input_tokens
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens == counted
    picture: Any = {"role": "user", "content": [{"type": "image", "source": {}}]}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(messages=[picture], **greedy)


def test_clients_continue_an_answer(gpt: Any, claude: Any) -> None:
    begun = [*TALK, {"role": "assistant", "content": WANT[:8]}]
    prefix = [*TALK, {"role": "assistant", "content": WANT[:8], "prefix": True}]
    greedy: dict[str, Any] = {"model": "demo-v3", "max_tokens": 32}
    message = claude.messages.create(messages=begun, **greedy, extra_body={"temperature": 0})
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    by_vllm = gpt.chat.completions.create(
        messages=begun, temperature=0, **greedy, extra_body=continued
    )
    by_deepseek = gpt.chat.completions.create(messages=prefix, temperature=0, **greedy)
    texts = [message.content[0].text]
    texts += [answer.choices[0].message.content for answer in (by_vllm, by_deepseek)]
    assert texts == [WANT[8:]] * 3


def test_anthropic_calls_of_tools(claude: Any) -> None:
    asked: dict[str, Any] = {
        "model": "demo-v3",
        "max_tokens": 120,
        "messages": TALK,
        "tools": [{"name": "look", "input_schema": PARAMETERS}],
        "tool_choice": {"type": "tool", "name": "look"},
    }
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        last = stream.get_final_message()
    for message in (whole, last):
        (call,) = message.content
        assert (call.type, call.name, message.stop_reason) == ("tool_use", "look", "tool_use")
        assert isinstance(call.input["id"], int)
    history = [
        *TALK,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}]
         + [block.model_dump(include={"type", "id", "name", "input"}) for block in whole.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "4"}]},
    ]  # fmt: skip
    with pytest.raises(anthropic.BadRequestError, match="role='tool' is unknown to this model"):
        claude.messages.create(**asked | {"messages": history})


def test_lm_eval_scores_as_the_engine_does(server: Server) -> None:
    """local-completions with tokens of the server, of which it asks for the log-likelihoods."""
    completions = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval")
    instance = importlib.import_module("lm_eval.api.instance").Instance
    model = completions.LocalCompletionsAPI(
        model="demo-v3",
        base_url=f"http://127.0.0.1:{server.port}/v1/completions",
        tokenizer_backend="remote",
        max_length=512,
        num_concurrent=4,
    )
    asked = [
        ("The code is", " 123"),
        ("The code is", " 123"),
        ("a<｜User｜> 胡萝卜", " 🙂 </think>"),
    ]
    found = model.loglikelihood([instance("loglikelihood", {}, each, 0) for each in asked])
    tokenizer = Tokenizer.load(DEMO)
    pairs = [(len(tokenizer.encode(a, False)), tokenizer.encode(a + b, False)) for a, b in asked]
    with LLM(DEMO) as llm:
        scored = llm.generate(
            [ids for _, ids in pairs], SamplingParams(max_tokens=0, prompt_logprobs=1)
        )
    for (start, _), (got, is_greedy), one in zip(pairs, found, scored, strict=True):
        assert one.prompt_logprobs is not None
        entries = one.prompt_logprobs[start - 1 :]
        assert abs(sum(entry.logprob for entry in entries) - got) < 1e-4
        assert is_greedy == all(entry.top[0][0] == entry.token_id for entry in entries)
    until = {"until": [","], "max_gen_toks": 8, "temperature": 0}
    prompt = "My name is Ada"
    (text,) = model.generate_until([instance("generate_until", {}, (prompt, until), 0)])
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "stop": [","]}
    assert text == server.post("/v1/completions", body)[1]["choices"][0]["text"]


def test_many_clients_at_once(server: Server) -> None:
    async def ask() -> list[str]:
        url = f"http://127.0.0.1:{server.port}"
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as gpt,
            anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as claude,
        ):

            async def one(number: int) -> str:
                asked = {"model": "demo-v3", "messages": TALK, "max_tokens": 32}
                if number % 2:
                    answer = await claude.messages.create(**asked, extra_body={"temperature": 0})
                    return str(answer.content[0].text)
                chunks = await gpt.chat.completions.create(**asked, temperature=0, stream=True)
                return "".join(
                    [c.choices[0].delta.content or "" async for c in chunks if c.choices]
                )

            return await asyncio.gather(*map(one, range(32)))

    assert asyncio.run(ask()) == [WANT] * 32
