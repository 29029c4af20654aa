"""Arguments of the library: taken where the meaning is plain, else refused by name and value."""

import re
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3 import LLM, SamplingParams
from dsv3.errors import ConfigError, Dsv3Error, RequestError

SHORT = {"max_tokens": 3}
USER = {"role": "user", "content": "What is MLA?"}
ANNA = {"role": "user", "content": "My name is Anna. What is my name?"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_seq_len=512, kv_cache_size="4096tok") as made:
        yield made


@pytest.mark.parametrize(
    ("prompts", "same"),
    [
        (np.array([3, 4, 5]), [[3, 4, 5]]),
        (torch.tensor([3, 4, 5]), [[3, 4, 5]]),
        ([np.array([3, 4, 5]), torch.tensor([6])], [[3, 4, 5], [6]]),
        (np.array([[3, 4], [5, 6]]), [[3, 4], [5, 6]]),
        ([[np.int64(7), torch.tensor(8)]], [[7, 8]]),
        ((7, 8.0), [[7, 8]]),
        (range(3, 6), [[3, 4, 5]]),
        (("a", "b"), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ((text for text in "ab"), ["a", "b"]),
        ({"a": 1, "b": 2}.keys(), ["a", "b"]),
        ([], []),
    ],
)
def test_prompts_with_a_plain_meaning_are_taken(llm: LLM, prompts: Any, same: list[Any]) -> None:
    got, want = llm.generate(prompts, SHORT), llm.generate(same, SamplingParams.of(SHORT))
    assert [done.prompt_ids for done in got] == [done.prompt_ids for done in want]
    assert [done.token_ids for done in got] == [done.token_ids for done in want]


@pytest.mark.parametrize(
    ("prompts", "error"),
    [
        (5, "a prompt is a text or token ids, not 5"),
        (None, "a prompt is a text or token ids, not None"),
        (b"a", "a prompt is a text or token ids, not b'a'"),
        (Path("a"), "a prompt is a text or token ids, not PosixPath('a')"),
        (["a", b"b"], "a prompt is a text or token ids, not b'b'"),
        ([["a"]], "prompt[0]='a' is not a token id"),
        ({"a"}, "prompts={'a'} is a set, which has no order: give a list"),
        ([True, False], "prompt[0]=True is not a token id"),
        ([1, "a"], "prompt[1]='a' is not a token id"),
        (np.array([0.5]), "prompt[0]=0.5 is not a token id"),
        ([-1], "prompt[0]=-1 is not a token of this model (0 to 2047)"),
        ([USER], "a prompt is a text or token ids; messages are for chat() and stream()"),
        (["a", []], "prompts[1]: prompt is empty: it has no tokens"),
    ],
)
def test_other_prompts_are_refused(llm: LLM, prompts: Any, error: str) -> None:
    with pytest.raises(RequestError) as refused:
        llm.generate(prompts, SHORT)
    assert str(refused.value) == error


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (5, "params=5 must be SamplingParams, or a dict such as"),
        ("hot", "params='hot' must be SamplingParams, or a dict such as"),
        ([SHORT, 5], "params[1]=5 must be SamplingParams, or a dict such as"),
        ([SHORT], "1 params for 2 prompts"),
        ({"max_token": 3}, "params: unknown parameter 'max_token'; did you mean 'max_tokens'?"),
        ({"max_tokens": "many"}, "max_tokens='many' must be a whole number, from 0 to"),
    ],
)
def test_wrong_params_are_refused(llm: LLM, params: Any, error: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(error)}"):
        llm.generate(["a", "b"], params)


def test_params_are_for_all_or_one_for_each(llm: LLM) -> None:
    each = llm.generate(["a", "b"], ({"max_tokens": count} for count in (1, 2)))
    assert [len(done.token_ids) for done in each] == [1, 2]
    params = {"n": 2, "temperature": 1.5, "max_tokens": 8, "seed": 3}
    done = llm.generate(["a", "b"], [params, None])
    assert [each.index for each in done] == [0, 1, 0]
    assert done[0].prompt_ids == done[1].prompt_ids != done[2].prompt_ids
    assert done[0].token_ids != done[1].token_ids


def test_a_stop_string_is_one_string(llm: LLM) -> None:
    whole, cut = llm.chat([[USER], [USER]], [None, SamplingParams.of({"stop": "latent"})])
    assert cut.text == whole.text.partition("latent")[0] != ""


def test_conversations_are_messages_or_lists_of_them(llm: LLM) -> None:
    one = llm.chat([USER], SHORT)[0].token_ids
    taken: tuple[Any, ...] = (USER, (USER,), [[USER]], iter([USER]), [(USER,)])
    for messages in taken:
        assert [done.token_ids for done in llm.chat(messages, SHORT)] == [one]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"messages": "hi"}, "messages='hi' must be a list of messages such as {\"role\""),
        ({"messages": ["hi"]}, "messages[0]='hi' must be a message such as {\"role\""),
        ({"messages": 5}, "messages=5 must be a list of messages such as"),
        ({"messages": [[]]}, "messages is empty"),
        ({"messages": {"content": "x"}}, "messages[0].role=None is unknown; use one of system"),
        ({"messages": {"role": ["user"], "content": "x"}}, "messages[0].role=['user'] is unknown"),
        ({"messages": {"role": "user"}}, "messages[0].content is missing"),
        ({"messages": [[USER], [{"role": "user"}]]}, "conversations[1]: messages[0].content is"),
        ({"messages": [USER], "thinking": "yes"}, "thinking='yes' must be True, False or None"),
        ({"messages": [USER], "conversation_id": 5}, "conversation_id=5 must be a text"),
        ({"messages": [USER], "system": 5}, "system=5 must be a text"),
        (
            {"messages": [{"role": "system", "content": "x"}, USER], "system": "y"},
            "system='y' is given, and messages[0] is a system message: leave one of them out",
        ),
    ],
)
def test_wrong_conversations_are_refused(llm: LLM, arguments: Any, error: str) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(error)}"):
        llm.chat(**arguments)


def test_system_is_a_message_in_front(llm: LLM) -> None:
    (wanted,) = llm.chat([{"role": "system", "content": "Be brief."}, USER], SHORT)
    (done,) = llm.chat([USER], SHORT, system="Be brief.")
    assert done.prompt_ids == wanted.prompt_ids
    assert "".join(llm.stream([USER], SHORT, system="Be brief.")) == wanted.text


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompt": 5}, "a prompt is a text or token ids, not 5"),
        ({"prompt": ["a", "b"]}, "stream() gives one answer, not 2: use streams()"),
        ({"prompt": []}, "stream() gives one answer, not 0: use streams()"),
        ({"prompt": "a", "params": {"n": 3}}, "stream() gives one answer, not 3: use streams()"),
        ({"prompt": "a", "system": "x"}, "system='x' is for conversations, not raw prompts"),
        ({"prompt": "a", "thinking": True}, "thinking=True is for conversations, not raw prompts"),
    ],
)
def test_wrong_streams_are_refused(llm: LLM, arguments: Any, error: str) -> None:
    with pytest.raises(RequestError) as refused:
        llm.stream(**arguments)
    assert str(refused.value) == error


def test_streams_are_of_prompts_and_conversations(llm: LLM) -> None:
    texts = ["", "", ""]
    prompts: list[str | list[dict[str, str]]] = [[USER], "1 + 1 ="]
    for number, piece in llm.streams(prompts, [SHORT, {"n": 2, **SHORT}]):
        texts[number] += piece
    wanted = [*llm.chat([USER], SHORT), *llm.generate("1 + 1 =", {"n": 2, **SHORT})]
    assert texts == [done.text for done in wanted]


def test_a_stream_goes_on_after_other_calls_and_stops_when_it_is_dropped(llm: LLM) -> None:
    wanted = [done.text for done in llm.chat([[ANNA], [USER]])]
    first, second = llm.stream([ANNA]), llm.stream([USER])
    begun = next(first)
    assert next(second)
    with pytest.raises(RequestError):
        llm.generate("x" * 10_000)
    assert [done.text for done in llm.chat([ANNA])] == wanted[:1]
    assert begun + "".join(first) == wanted[0]
    unread, engine = llm.stream([USER]), llm._started.engine
    assert engine is not None and engine.num_unfinished == 2
    del second, unread
    llm.generate([])
    llm.generate("a", SHORT)
    assert engine.num_unfinished == 0


def test_threads_read_streams_of_their_own(llm: LLM) -> None:
    wanted = [done.text for done in llm.chat([[ANNA], [USER]])]
    streams, texts = [llm.stream([ANNA]), llm.stream([USER])], ["", ""]

    def read(number: int) -> None:
        texts[number] = "".join(streams[number])

    threads = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == wanted


def test_a_stream_of_a_closed_model_ends_with_an_error() -> None:
    with LLM(max_seq_len=512, kv_cache_size="2048tok") as made:
        pieces = made.stream([USER])
        next(pieces)
    made.close()
    with pytest.raises(Dsv3Error, match=r"^this LLM is closed: stream\(\) needs a new one$"):
        list(pieces)


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_frees_the_model_though_the_script_keeps_it(fails: bool) -> None:
    with suppress(KeyError), LLM(max_seq_len=512, kv_cache_size="2048tok") as made:
        pieces = made.stream([USER])
        next(pieces)
        cache = weakref.ref(made._started.cache)
        if fails:
            raise KeyError
    assert cache() is None and made.is_main
    with pytest.raises(Dsv3Error, match=r"^this LLM is closed: generate\(\) needs a new one$"):
        made.generate("a")


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
def test_no_call_after_an_exception_within_a_step(error: type[BaseException]) -> None:
    """A script's signal handler may raise anything; a step that is cut leaves pages half done."""

    def fail(*_: Any) -> None:
        raise error

    with LLM(max_seq_len=512, kv_cache_size="2048tok") as made:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made._started.runner, "run", fail)
            with pytest.raises(error):
                made.generate("a")
        with pytest.raises(Dsv3Error, match=r"^this LLM was interrupted within a step: generate"):
            made.generate("a")


def test_two_models_of_a_world_of_one_work_at_once(llm: LLM) -> None:
    with LLM(max_seq_len=512, kv_cache_size="2048tok") as other:
        pairs = list(zip(llm.stream([USER]), other.stream([USER]), strict=True))
    assert pairs and all(one == two for one, two in pairs)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_seq_length": 5}, "LLM: unknown argument 'max_seq_length'; did you mean 'max_seq_l"),
        ({"seed": 1}, "LLM: unknown argument 'seed'; give it to SamplingParams"),
        ({"temperature": 1, "seed": 2}, "LLM: unknown arguments 'temperature', 'seed'"),
        ({"max_seq_len": "8k"}, "max_seq_len='8k' must be a whole number, at least 0"),
        ({"max_seq_len": 10**6}, "max_seq_len=1000000 exceeds max_position_embeddings=8192"),
        ({"kv_cache_size": "1B"}, "kv_cache_size=1B is 1 bytes on each rank, less than one page"),
        ({"kv_host_cache": "1B"}, "kv_host_cache=1B holds no page of"),
        ({"tp": 2.5}, "tp=2.5 must be a whole number"),
        ({"dp": "x"}, "dp='x' must be a whole number"),
        ({"tp": -1}, "tp=-1 must be at least 0"),
        ({"device": "tpu"}, "device=tpu is unknown; use auto, cpu or cuda"),
        ({"device": 5}, "device=5 is unknown; use auto, cpu or cuda"),
        ({"rank_timeout": "soon"}, "rank_timeout='soon' must be a number"),
        ({"rank_timeout": 1}, "rank_timeout=1 must be at least 3 seconds"),
        ({"path": 5}, "path=5 must be a path"),
        ({"path": ""}, "path='' must be a path"),
        ({"chat_template": 5}, "chat_template=5 must be a path"),
        ({"config": 5}, "config=5 must be a path or a preset's name"),
    ],
)
def test_wrong_settings_are_named_as_arguments(arguments: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(error)}") as refused:
        LLM(**arguments)
    assert "--" not in str(refused.value)


def test_errors_about_the_cache_name_the_argument(llm: LLM) -> None:
    with LLM(kv_cache_size="128tok") as small, pytest.raises(RequestError) as refused:
        small.generate("a", {"max_tokens": 300})
    assert str(refused.value).endswith("raise kv_cache_size or lower max_tokens")
