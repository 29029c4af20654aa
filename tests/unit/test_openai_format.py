import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3.errors import CheckpointError, RequestError
from dsv3.text.chat import ChatFormat
from dsv3.text.defaults import LINE_DEFAULTS, NO_TOKEN_LIMIT, Defaults, Sampling
from dsv3.text.messages import PromptEnd
from dsv3.text.openai_format import CHAT, COMPLETIONS, parse_request, plain_request
from dsv3.text.text_request import TextRequest, encode_prompt, token_requests
from dsv3.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "demo-v3")
VOCAB_SIZE = 2048
CHAT_FORMAT = ChatFormat(TOKENIZER)
HI = [{"role": "user", "content": "Hi"}]
NONE = Defaults()


def line_request(defaults: Defaults) -> TextRequest:
    """A bare prompt."""
    return plain_request([{"role": "user", "content": "Hi"}], "row", defaults, LINE_DEFAULTS)


def chat(defaults: Defaults = NONE, **body: Any) -> TextRequest:
    return parse_request(CHAT, {"messages": HI} | body, "row", defaults)


def complete(defaults: Defaults = NONE, **body: Any) -> TextRequest:
    return parse_request(COMPLETIONS, {"prompt": "Hi"} | body, "row", defaults)


def test_every_field_arrives() -> None:
    request = complete(
        model="m",
        prompt=[5, 6],
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        seed=-1,
        stop="a",
        stop_token_ids=[8],
        min_p=0.1,
        repetition_penalty=1.2,
        frequency_penalty=-0.5,
        presence_penalty=1,
        logit_bias={"7": -100, "0": 2.5},
        ignore_eos=True,
        logprobs=2,
        echo=True,
        n=2,
        return_token_ids=True,
        user=None,
    )
    params = request.params
    assert (request.prompt, request.messages, request.model) == ([5, 6], None, "m")
    assert (request.params.n, request.echo, request.return_token_ids) == (2, True, True)
    assert (params.max_tokens, params.temperature, params.top_p) == (3, 0.5, 0.9)
    assert (params.top_k, params.seed, params.ignore_eos) == (7, -1, True)
    assert (params.min_p, params.repetition_penalty) == (0.1, 1.2)
    assert (params.frequency_penalty, params.presence_penalty) == (-0.5, 1)
    assert params.logit_bias == {7: -100, 0: 2.5}
    assert (params.stop, params.stop_token_ids) == (("a",), (8,))
    assert (params.logprobs, params.prompt_logprobs) == (2, 2)


def test_harmless_fields_are_accepted() -> None:
    body: dict[str, Any] = {
        "stream": False,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "user": "u",
    }
    assert chat(metadata={"a": 1}, response_format={"type": "text"}, **body) == chat()


@pytest.mark.parametrize(
    ("asked", "want"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
    ],
)
def test_logprobs_of_a_chat(asked: dict[str, Any], want: int | None) -> None:
    assert chat(**asked).params.logprobs == want


def test_whole_numbers_may_be_written_as_floats() -> None:
    names = ("max_tokens", "top_k", "seed", "n", "priority")
    floats: dict[str, Any] = dict.fromkeys(names, 5.0)
    ints: dict[str, Any] = dict.fromkeys(names, 5)
    assert chat(**floats) == chat(**ints)
    assert chat(logprobs=True, top_logprobs=2.0) == chat(logprobs=True, top_logprobs=2)
    assert chat(max_completion_tokens=5.0) == chat(max_completion_tokens=5)
    ids = complete(prompt=[5.0, 6], stop_token_ids=[7.0], logprobs=3.0)
    assert ids == complete(prompt=[5, 6], stop_token_ids=[7], logprobs=3)
    assert ids.digest() == complete(prompt=[5, 6], stop_token_ids=[7], logprobs=3).digest()
    for name in names:
        with pytest.raises(RequestError, match=f"{name}=10.5 must be a whole number from"):
            parse_request(CHAT, {"messages": HI, name: 10.5}, "row", NONE)


def test_fields_that_say_the_same_go_together() -> None:
    assert chat(logprobs=False, top_logprobs=0) == chat(top_logprobs=0) == chat()
    assert chat(max_tokens=5, max_completion_tokens=5.0) == chat(max_tokens=5)
    assert chat(max_tokens=5, max_completion_tokens=None) == chat(max_tokens=5)


def test_a_prompt_may_be_the_only_one_of_a_list() -> None:
    assert complete(prompt=["Hi"]) == complete()
    assert complete(prompt=[[5, 6]]) == complete(prompt=[5, 6])


NUMBERS = {"max_tokens": 7, "top_k": 7, "temperature": 0.5, "top_p": 0.5, "min_p": 0.5}
NUMBERS |= dict.fromkeys(("repetition_penalty", "frequency_penalty", "presence_penalty"), 0.5)


@pytest.mark.parametrize("name", NUMBERS)
def test_body_goes_before_flag_before_model_before_format(name: str) -> None:
    number = NUMBERS[name]
    other, third = number / 2 if number < 1 else 8, number / 4 if number < 1 else 9

    def value(request: TextRequest) -> Any:
        return getattr(request.params, name)

    of_flags: dict[str, Any] = {name: other}
    of_model: dict[str, Any] = {name: third}
    flags = Sampling(**of_flags)
    model = Sampling(**of_model)
    assert value(complete(Defaults(flags=flags, model=model), **{name: number})) == number
    assert value(complete(Defaults(flags=flags, model=model))) == other
    assert value(complete(Defaults(model=model))) == third
    assert value(line_request(Defaults(model=model))) == third


def test_zero_is_a_value() -> None:
    greedy = Defaults(flags=Sampling(temperature=0.0), model=Sampling(temperature=0.6))
    assert chat(greedy).params.temperature == 0
    assert complete(max_tokens=0, echo=True).params.max_tokens == 0


def test_defaults_of_the_formats() -> None:
    line = line_request(Defaults())
    assert (line.params.max_tokens, line.params.temperature) == (200, 0.2)
    assert (complete().params.max_tokens, complete().params.temperature) == (16, 1.0)
    assert (chat().params.max_tokens, chat().params.temperature) == (NO_TOKEN_LIMIT, 1.0)


def test_generation_config() -> None:
    config = {"do_sample": False, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 128}
    assert Sampling.from_generation_config(config) == Sampling(
        max_tokens=128, temperature=0.0, top_p=0.95
    )
    assert Sampling.from_generation_config({"do_sample": True, "temperature": 0.6}) == Sampling(
        temperature=0.6
    )
    assert Sampling.from_generation_config({"min_p": 0.1, "repetition_penalty": 1.05}) == Sampling(
        min_p=0.1, repetition_penalty=1.05
    )
    assert Sampling.from_generation_config({}) == Sampling()
    assert Sampling.from_generation_config({"top_k": None, "do_sample": None}) == Sampling()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_p": "high"}, "top_p='high' is not a number"),
        ({"temperature": True}, "temperature=True is not a number"),
        ({"do_sample": False, "temperature": [0.6]}, r"temperature=\[0.6\] is not a number"),
        ({"top_k": 50.0}, r"top_k=50\.0 is not an integer"),
        ({"max_new_tokens": "x" * 10**6}, "max_new_tokens='x.* is not an integer"),
        ({"max_new_tokens": 10**400}, r"max_new_tokens=10+\.\.\.0+ is not an integer"),
        ({"temperature": float("nan")}, "not JSON: NaN is not a number"),
        ({"top_p": 0}, "top_p=0 is not a number above 0"),
        ({"min_p": 1.5}, "min_p=1.5 is not a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not a number from 0.001"),
        ({"top_k": -1}, "top_k=-1 is not an integer, at least 0"),
        ({"do_sample": "false"}, "do_sample='false' is not true or false"),
    ],
)
def test_generation_config_with_wrong_values(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(change))
    with pytest.raises(CheckpointError, match=words) as caught:
        Sampling.of_checkpoint(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < len(str(file)) + 200


def test_a_seed_not_given_depends_on_the_flag_and_the_name_only() -> None:
    def seed(name: str, flag: int, **body: Any) -> int:
        defaults = Defaults(seed=flag)
        return parse_request(CHAT, {"messages": HI} | body, name, defaults).params.seed

    assert seed("a", 0) == seed("a", 0, temperature=0.5)
    assert len({seed("a", 0), seed("b", 0), seed("a", 1), seed("\ud800", 0)}) == 4
    assert seed("a", 5, seed=17) == 17


def test_thinking_and_system_come_from_the_row_or_from_the_flags() -> None:
    defaults = Defaults(thinking=True, system="Be brief.")
    assert chat(defaults).thinking
    assert not chat(defaults, chat_template_kwargs={"thinking": False}).thinking
    assert chat(chat_template_kwargs={"enable_thinking": True}).thinking
    assert chat(defaults).messages == [{"role": "system", "content": "Be brief."}, *HI]
    own = [{"role": "system", "content": "Sing."}, *HI]
    assert chat(defaults, messages=own).messages == own


def test_digest_names_the_effective_request() -> None:
    assert chat().digest() == chat(user="someone", temperature=1.0).digest()
    others = [
        chat(temperature=0.9),
        chat(messages=[{"role": "user", "content": "Ho"}]),
        chat(Defaults(flags=Sampling(temperature=0.9)), n=2),
        chat(Defaults(seed=1)),
        chat(Defaults(system="Be brief.")),
        chat(max_tokens=NO_TOKEN_LIMIT),
        complete(),
    ]
    assert len({request.digest() for request in [chat(), *others]}) == len(others) + 1


def test_digest_of_older_versions_holds_where_newer_values_change_nothing() -> None:
    """Their result files resume."""
    older = "1e312adfbfc94682206e70e9289f7331", "a500c13ce0d9a46cede66ed9f4d610f8"
    row: dict[str, Any] = {"seed": 7, "n": 2, "temperature": 0.5, "top_k": 5, "stop": ["a"]}
    assert (chat().digest(), complete(**row).digest()) == older
    neutral: dict[str, Any] = {
        "min_p": 0,
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "logit_bias": {},
    }
    assert complete(**row, **neutral, frequency_penalty=0.0).digest() == older[1]
    assert complete(**row, speculative_tokens=2).digest() == older[1]
    newer = [
        complete(**row, min_p=0.1),
        complete(**row, repetition_penalty=1.1),
        complete(**row, frequency_penalty=0.1),
        complete(**row, presence_penalty=0.1),
        complete(**row, logit_bias={"5": 1}),
        complete(**row, logit_bias={"6": 1}),
    ]
    assert len({older[1], *(request.digest() for request in newer)}) == 7


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"min_p": 1.5}, "min_p=1.5 must be between 0 and 1"),
        ({"min_p": "0.1"}, 'min_p="0.1" must be a number'),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be from 0.001 to 1000"),
        ({"frequency_penalty": 2.5}, "frequency_penalty=2.5 must be between -2 and 2"),
        ({"presence_penalty": True}, "presence_penalty=true must be a number"),
        ({"logit_bias": [1]}, "logit_bias=[1] must be an object"),
        ({"logit_bias": {"a": 1}}, 'logit_bias has the field "a", which is not a token id'),
        ({"logit_bias": {"-1": 1}}, 'logit_bias has the field "-1", which is not a token id'),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]=101 must be a number between -100 and 100"),
        ({"logit_bias": {"5": None}}, "logit_bias[5]=null must be a number between -100 and 100"),
    ],
)
def test_wrong_penalties_are_named(body: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError) as caught:
        complete(**body)
    assert str(caught.value) == error


def tokens(request: TextRequest, max_seq_len: int = 100) -> list[Any]:
    ids = encode_prompt(request, TOKENIZER, CHAT_FORMAT)
    model = SimpleNamespace(tokenizer=TOKENIZER, vocab_size=VOCAB_SIZE, max_seq_len=max_seq_len)
    return token_requests(request, ids, "row", model)


BEGUN = {"role": "assistant", "content": "Ye"}


@pytest.mark.parametrize(
    ("body", "last", "end"),
    [
        ({}, {}, PromptEnd.ANSWER),
        ({"add_generation_prompt": True}, {"prefix": False}, PromptEnd.ANSWER),
        ({"add_generation_prompt": False}, {}, PromptEnd.MESSAGE),
        ({"add_generation_prompt": False, "continue_final_message": True}, {}, PromptEnd.CONTINUED),
        ({"continue_final_message": True}, {}, PromptEnd.CONTINUED),
        ({}, {"prefix": True}, PromptEnd.CONTINUED),
    ],
)
def test_the_end_of_a_prompt(body: dict[str, Any], last: dict[str, Any], end: PromptEnd) -> None:
    hi = {"role": "user", "content": "Hi"}
    request = chat(messages=[hi, BEGUN | last], **body)
    assert request.end is end
    begin = [0, 3, *TOKENIZER.encode("Hi", False), 4, *TOKENIZER.encode("Ye", False)]
    after = {PromptEnd.ANSWER: [1, 4], PromptEnd.MESSAGE: [1], PromptEnd.CONTINUED: []}
    assert tokens(request)[0].prompt_ids == begin + after[end]
    assert (request.digest() == chat(messages=[hi, BEGUN]).digest()) == (not last and not body)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "excludes add_gener"),
        ({"continue_final_message": True, "response_format": {"type": "json_object"}}, "excludes"),
    ],
)
def test_answers_that_cannot_be_continued(body: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError, match=error):
        chat(messages=[BEGUN], **body)


@pytest.mark.parametrize(
    "body", [{"add_generation_prompt": True}, {"continue_final_message": False}]
)
def test_a_prefix_excludes_switches_against_it(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="prefix=true excludes"):
        chat(messages=[BEGUN | {"prefix": True}], **body)


def test_prompts_become_tokens() -> None:
    assert tokens(chat())[0].prompt_ids == [0, 3, *TOKENIZER.encode("Hi", False), 4]
    assert tokens(complete())[0].prompt_ids == TOKENIZER.encode("Hi", False)
    assert tokens(complete(prompt=[9, 9]))[0].prompt_ids == [9, 9]


def test_only_a_default_limit_is_cut_to_the_context() -> None:
    prompt = [5] * 90
    flags = Defaults(flags=Sampling(max_tokens=50))
    assert tokens(complete(prompt=prompt))[0].params.max_tokens == 10
    assert tokens(complete(flags, prompt=prompt))[0].params.max_tokens == 10
    assert tokens(complete(prompt=prompt, max_tokens=50))[0].params.max_tokens == 50
    assert tokens(complete(prompt=[5] * 100))[0].params.max_tokens == 1  # the engine refuses


def test_n_answers_draw_from_streams_of_their_own() -> None:
    top = 2**63 - 1
    answers = tokens(complete(n=3, seed=top))
    assert [request.request_id for request in answers] == ["row/0", "row/1", "row/2"]
    assert [request.answer for request in answers] == [0, 1, 2]
    assert {request.params.seed for request in answers} == {top}


def test_no_two_answers_have_the_key_of_their_random_numbers_in_common() -> None:
    rows = [complete(n=5, seed=seed) for seed in (-1, 0, 1, 2)]
    keys = [(request.params.seed, request.answer) for row in rows for request in tokens(row)]
    assert len(set(keys)) == 20


def test_token_ids_need_no_tokenizer_and_text_says_that_it_does() -> None:
    assert encode_prompt(complete(prompt=[5, 6]), None, None) == [5, 6]
    for request in (chat(), complete(), complete(prompt=[5], stop="a")):
        with pytest.raises(CheckpointError, match="this checkpoint has no tokenizer"):
            encode_prompt(request, None, None)
    with pytest.raises(CheckpointError, match="no chat template: use /v1/completions"):
        encode_prompt(chat(), TOKENIZER, None)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"prompt": [5, 2048]}, "prompt[1]=2048 is not a token of this model (0 to 2047)"),
        ({"prompt": [-1]}, "prompt[0]=-1 is not a token of this model (0 to 2047)"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]=1099511627776 is not a token of this"),
        ({"prompt": "a\udfff"}, "the text holds half of a surrogate pair (character 2)"),
    ],
)
def test_errors_found_after_tokenization(body: dict[str, Any], error: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokens(complete(**body))
    assert str(caught.value).startswith(error)
