"""A user's script that leaves its model early, on one rank or on all.

Usage: torchrun leaving.py WAY RANK

WAY: exit, abort, return, die or forget. RANK: a number or "all".
"""

import os
import sys

from dsv3 import LLM, SamplingParams


class Aborted(BaseException):
    """An error that is no `Exception`, such as the interpreter's own."""


def main() -> None:
    way, rank = sys.argv[1:3]
    params = SamplingParams(max_tokens=2)
    with LLM(kv_cache_size="2048tok", rank_timeout=5.0) as llm:
        llm.generate(["x"], params)
        if rank in (os.environ["RANK"], "all"):
            if way == "exit":
                sys.exit(7)
            if way == "abort":
                raise Aborted("enough")
            if way == "return":
                return
            if way == "die":
                os._exit(0)
        llm.generate(["x"], params)


def forget_to_close(rank: str) -> None:
    llm = LLM(kv_cache_size="2048tok", rank_timeout=5.0)
    llm.generate(["x"])
    if rank in (os.environ["RANK"], "all"):
        sys.exit(0)
    llm.generate(["x"])


if __name__ == "__main__":
    if sys.argv[1] == "forget":
        forget_to_close(sys.argv[2])
    else:
        main()
