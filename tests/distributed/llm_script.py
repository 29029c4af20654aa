"""A user's script: the same calls on every rank; what each got goes to FOLDER/RANK.json.

Usage: [torchrun ...] llm_script.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from dsv3 import LLM, SamplingParams
from dsv3.errors import ConfigError, RequestError

ANNA = [
    {"role": "user", "content": "My name is Anna."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "What is my name?"},
]
MLA = [{"role": "user", "content": "What is MLA?"}]
SHORT = SamplingParams(max_tokens=3)


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
    got["tokens"] = [done.token_ids for done in llm.generate([[0, 3, 50, 60], "1 + 1 ="], SHORT)]
    got["stream"] = list(llm.stream(ANNA))
    pieces = []
    for piece in llm.stream(MLA):
        pieces.append(piece)
        break
    got["left early"] = pieces
    llm.stream("a prompt whose answer nobody reads")
    got["refusals"] = [
        refusal(llm, ["fine", ""]),
        refusal(llm, [[5, 4000]]),
        refusal(llm, "long " * 600),
        refusal(llm, ["one", "two"], [SHORT]),
        refusal(llm, 5),
    ]
    got["none"] = llm.generate([])
    # Other ranks than 0 need not know what is asked.
    got["after"] = [done.text for done in llm.chat(ANNA if llm.is_main else None)]
    return got


def main() -> None:
    try:
        LLM(tp=3)
    except ConfigError as error:
        reason = str(error)
    with LLM(max_seq_len=512, kv_cache_size="2048tok") as llm:
        got = talk(llm) | {"tp": reason}
    rank = os.environ.get("RANK", "0")
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    main()
