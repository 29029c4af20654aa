"""A user's script that asks for thoughts; what rank 0 got goes to FOLDER/RANK.json.

Usage: [torchrun ...] thoughts_script.py FOLDER
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from dsv3 import LLM, SamplingParams

MLA = [{"role": "user", "content": "What is MLA?<｜User｜>"}]
# Hot enough that any token comes soon, the one that ends a thought among them.
HOT: dict[str, Any] = {"temperature": 60.0, "seed": 3, "max_tokens": 200, "ignore_eos": True}


def ask(llm: LLM) -> dict[str, Any]:
    """Make the calls; other ranks than 0 get nothing."""
    whole = llm.chat(MLA, SamplingParams(**HOT))
    reasoning, text = (whole[0].reasoning or "", whole[0].text) if whole else ("", "")
    params = SamplingParams(**HOT, stop=(reasoning[3:6], text[20:24])) if whole else None
    cut = llm.chat(MLA, params)
    pieces = list(llm.stream(MLA, params))
    raw = llm.generate([done.prompt_ids for done in cut], params)
    brief = llm.chat(MLA, SamplingParams(max_tokens=5), thinking=False)
    calls = {"whole": whole, "cut": cut, "raw": raw, "brief": brief}
    got: dict[str, Any] = {
        name: [(done.reasoning, done.text, done.finish_reason) for done in completions]
        for name, completions in calls.items()
    }
    got["stop"] = None if params is None else params.stop
    got["prompt"] = [done.prompt_ids for done in whole]
    got["thought"] = "".join(piece for piece in pieces if piece.is_thought)
    got["answer"] = "".join(piece for piece in pieces if not piece.is_thought)
    return got


def main() -> None:
    folder = Path(sys.argv[1])
    with LLM(max_seq_len=512, kv_cache_size="2048tok", chat_template=folder / "t.jinja") as llm:
        got = ask(llm)
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    main()
