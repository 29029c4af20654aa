import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.request import Completion, TokenLogprobs
from dsv3.text.defaults import Defaults
from dsv3.text.openai_answer import LOWEST, ResponseHead, response_body
from dsv3.text.openai_format import CHAT, COMPLETIONS, parse_request
from dsv3.text.text_request import TextRequest, encode_prompt
from dsv3.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "demo-v3")


def request(**body: Any) -> TextRequest:
    url = CHAT if "messages" in body else COMPLETIONS
    return parse_request(url, body, "row", Defaults())


def completion(prompt: str | list[int], answer: str, **fields: Any) -> Completion:
    prompt_ids = TOKENIZER.encode(prompt, False) if isinstance(prompt, str) else prompt
    token_ids = TOKENIZER.encode(answer, False)
    values = {"text": answer, "token_ids": token_ids, "finish_reason": "stop"} | fields
    return Completion(request_id="row/0", prompt_ids=prompt_ids, **values)


def scores(ids: list[int], top: tuple[tuple[int, float], ...] = ()) -> list[TokenLogprobs]:
    return [TokenLogprobs(token_id, -float(i), top) for i, token_id in enumerate(ids)]


def body(asked: TextRequest, *done: Completion, tokenizer: Tokenizer | None = TOKENIZER) -> Any:
    head = ResponseHead(name="abc", created=17, model=asked.model)
    return json.loads(json.dumps(response_body(head, [asked] * len(done), done, tokenizer)))


def test_chat_answer() -> None:
    asked = request(messages=[{"role": "user", "content": "Hi"}], model="m", n=2)
    first = completion("Hi", "Hello you", cached_tokens=1)
    second = completion("Hi", "Ho", finish_reason="length")
    got = body(asked, first, second)
    assert got["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello you"},
            "logprobs": None,
            "finish_reason": "stop",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "Ho"},
            "logprobs": None,
            "finish_reason": "length",
        },
    ]
    num_prompt, num_new = len(first.prompt_ids), len(first.token_ids) + len(second.token_ids)
    assert got["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": 1},
        "prompt_cache_hit_tokens": 1,
        "prompt_cache_miss_tokens": num_prompt - 1,
    }
    assert (got["id"], got["object"], got["model"]) == ("chatcmpl-abc", "chat.completion", "m")
    assert got["created"] == 17


def test_an_answer_within_a_thought_has_reasoning_and_content() -> None:
    asked = request(messages=[{"role": "user", "content": "Hi"}])
    text = "Greet.</think>Hello"
    thinking = body(asked, completion("Hi<｜Assistant｜><think>", "", text=text))
    message = thinking["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Greet.", "Hello")
    plain = body(asked, completion("Hi<｜Assistant｜></think>", "", text=text))
    assert plain["choices"][0]["message"]["content"] == text


def test_chat_logprobs_carry_the_bytes_of_half_characters() -> None:
    asked = request(
        messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=1, n=1
    )
    ids = TOKENIZER.encode("a🙂", False)
    done = completion("Hi", "a🙂", logprobs=scores(ids, ((ids[0], -0.5),)))
    content = body(asked, done)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "a🙂".encode()
    assert content[0]["token"] == "a"
    assert content[0]["top_logprobs"] == [{"token": "a", "logprob": -0.5, "bytes": [97]}]


def test_scoring_echoes_the_prompt_and_its_logprobs() -> None:
    asked = request(prompt="One 胡 two", max_tokens=0, echo=True, logprobs=1)
    ids = encode_prompt(asked, TOKENIZER, None)
    done = completion(
        ids, "", finish_reason="length", prompt_logprobs=scores(ids[1:], ((ids[0], -0.5),))
    )
    choice = body(asked, done)["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "One 胡 two"
    assert logprobs["tokens"] == [TOKENIZER.token_text(i) for i in ids]
    assert logprobs["token_logprobs"] == [None, *(-float(i) for i in range(len(ids) - 1))]
    assert logprobs["top_logprobs"] == [None] + [{"One": -0.5}] * (len(ids) - 1)
    for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"].startswith(token, at)


def test_offsets_stay_within_a_text_that_a_stop_string_cut() -> None:
    asked = request(prompt="x", logprobs=0, stop="l")
    ids = TOKENIZER.encode("Hello you", False)
    choice = body(asked, completion("x", "Hello you", text="He", logprobs=scores(ids)))["choices"][
        0
    ]
    assert max(choice["logprobs"]["text_offset"]) == 2
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids)


def test_of_alternatives_with_the_same_text_the_likelier_stays() -> None:
    halves = [i for i in range(300) if TOKENIZER.token_text(i) == "\ufffd"][:2]
    asked = request(prompt="x", logprobs=2)
    top = ((halves[0], -3.0), (halves[1], -1.0))
    done = completion("x", "y", logprobs=[TokenLogprobs(5, float("-inf"), top)])
    logprobs = body(asked, done)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] == [{"\ufffd": -1.0}]
    assert logprobs["token_logprobs"] == [LOWEST]


@pytest.mark.parametrize("echo", [True, False])
def test_without_a_tokenizer_tokens_are_named_by_their_ids(echo: bool) -> None:
    asked = request(prompt=[5, 6], echo=echo, logprobs=1, return_token_ids=True)
    done = completion([5, 6], "", token_ids=[7], logprobs=scores([7], ((8, -0.5),)))
    done.prompt_logprobs = scores([6]) if echo else None
    choice = body(asked, done, tokenizer=None)["choices"][0]
    assert choice["text"] == ""
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([7], [5, 6])
    prompt = ["token_id:5", "token_id:6"] if echo else []
    assert choice["logprobs"]["tokens"] == [*prompt, "token_id:7"]
    assert choice["logprobs"]["top_logprobs"][-1] == {"token_id:8": -0.5}


def test_prompt_logprobs_are_listed_by_token() -> None:
    asked = parse_request(COMPLETIONS, {"prompt": "Hi", "prompt_logprobs": 1}, "row", Defaults())
    assert (asked.params.prompt_logprobs, asked.params.logprobs) == (1, None)
    done = completion("Hi you", "Ho")
    done.prompt_logprobs = [
        TokenLogprobs(i, -float("inf"), ((7, -0.5),)) for i in done.prompt_ids[1:]
    ]
    listed = body(asked, done)["choices"][0]["prompt_logprobs"]
    assert listed[0] is None and len(listed) == len(done.prompt_ids)
    own = str(done.prompt_ids[1])
    assert list(listed[1]) == [own, "7"]
    assert listed[1][own]["logprob"] == LOWEST and listed[1][own]["rank"] is None
    assert listed[1]["7"] == {
        "logprob": -0.5,
        "rank": 1,
        "decoded_token": TOKENIZER.token_text(7),
    }
