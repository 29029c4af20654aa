"""A user's script: the same calls on every rank; what each got goes to FOLDER/RANK.json.

Usage: [torchrun ...] llm_script.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv3 import LLM, SamplingParams
from dsv3.errors import ConfigError, Dsv3Error, RequestError

ANNA = [
    {"role": "user", "content": "My name is Anna."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What is my name?"},
]
MLA = [{"role": "user", "content": "What is MLA?"}]
SHORT = SamplingParams(max_tokens=3)
SIZES: dict[str, Any] = {"max_seq_len": 512, "kv_cache_size": "2048tok"}


def refusal(llm: LLM, prompts: Any, params: Any = None) -> str:
    """Return the reason for which all of these prompts are refused."""
    try:
        llm.generate(prompts, params)
    except RequestError as error:
        return str(error)
    return "taken"


def talk(llm: LLM) -> dict[str, Any]:
    """Make every kind of call."""
    got: dict[str, Any] = {"main": llm.is_main}
    got["chat"] = [done.text for done in llm.chat(ANNA)]
    got["chats"] = [done.text for done in llm.chat([ANNA, MLA], [SamplingParams(), SHORT])]
    prompts: list[str | list[int]] = [[0, 3, 50, 60], "1 + 1 ="]
    got["tokens"] = [done.token_ids for done in llm.generate(prompts, SHORT)]
    got["stream"] = list(llm.stream(ANNA))
    pieces = []
    for piece in llm.stream(MLA):
        pieces.append(piece)
        break
    got["left early"] = pieces
    llm.stream("a prompt whose answer is not read")
    got["refusals"] = [
        refusal(llm, ["fine", ""]),
        refusal(llm, [[5, 4000]]),
        refusal(llm, "long " * 600),
        refusal(llm, ["one", "two"], [SHORT]),
        refusal(llm, 5),
    ]
    got["none"] = llm.generate([])
    got |= streams_at_once(llm)
    several = llm.generate("1 + 1 =", {"n": 2, "temperature": 1.5, "max_tokens": 4, "seed": 5})
    got["several"] = [(done.index, done.text) for done in several]
    got["system"] = [done.prompt_ids for done in llm.chat(MLA, SHORT, system="Be brief.")]
    # Other ranks than 0 need no prompt.
    got["after"] = [done.text for done in llm.chat(ANNA if llm.is_main else None)]
    return got


def streams_at_once(llm: LLM) -> dict[str, Any]:
    """Read streams that are open at the same time, with other calls in between."""
    got: dict[str, Any] = {}
    got["zipped"] = list(zip(llm.stream(ANNA), llm.stream(MLA), strict=False))
    older = llm.stream(ANNA)
    pieces = [next(older, "")]
    newer = llm.stream(MLA)
    pieces.append(next(older, ""))
    got["between"] = [done.text for done in llm.chat(ANNA)]
    got["older"] = "".join([*pieces, *older])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # another stream is open
    got["newer"] = "".join(newer)
    mixed: list[str | list[dict[str, str]]] = [MLA, "1 + 1 ="]
    got["numbered"] = list(llm.streams(mixed, [SHORT, {"max_tokens": 2}]))
    return got


def failure(make: Callable[[], Any], kind: type[Dsv3Error]) -> str:
    """Return the error of a call, or nothing."""
    try:
        make()
    except kind as error:
        return str(error)
    return ""


def closed(llm: LLM) -> list[str]:
    """Make every call on a model that is closed."""
    llm.close()
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("x"),
        lambda: llm.chat(ANNA),
        lambda: llm.stream("x"),
        lambda: llm.streams(["x"]),
        lambda: llm.drop_conversation("x"),
        llm.__enter__,
    ]
    return [failure(call, Dsv3Error) for call in calls]


def main() -> None:
    reason = failure(lambda: LLM(tp=3), ConfigError)
    with LLM(**SIZES) as llm:
        got = talk(llm) | {"tp": reason}
        got["at once"] = failure(lambda: LLM(**SIZES).close(), ConfigError)
        got["still there"] = [done.text for done in llm.chat(ANNA)]
    got["closed"] = closed(llm)
    with LLM(**SIZES) as llm:
        got["next"] = [done.text for done in llm.chat(ANNA)]
        llm.close()
    rank = os.environ.get("RANK", "0")
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    main()
