"""Measure the effect of a cache format or numerics mode on accuracy and perplexity.

    python launch/quality.py --eval EVAL.jsonl --tokens HELDOUT.npz --kv-dtype fp8

EVAL has dialogues {messages, expected, n_tokens}: a greedy answer must match `expected` exactly;
`n_tokens` is the dialogue's number of tokens, for --longest. HELDOUT has `tokens`, `offsets`
(starts of the texts) and `answer` (1 for tokens of answers). The output is one JSON line
with accuracy, perplexity of all tokens and perplexity of answers. All engine flags are accepted.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np

from common import start_model
from dsv3.distributed.launcher import environment_world_size
from dsv3.distributed.mesh import before_joining
from dsv3.engine.engine import Engine
from dsv3.errors import ConfigError, Dsv3Error
from dsv3.read_files import read_text
from dsv3.request import Completion, Request, SamplingParams
from dsv3.text.chat import ChatFormat
from program import (
    Parser,
    add_engine_flags,
    join_engine_ranks,
    run_program,
    set_up_logging,
)

_MOST_BYTES = 1 << 30  # of a file of dialogues


def finish(engine: Engine) -> dict[str, Completion]:
    """Run the engine until all requests are answered; return the completions by request id.

    Raises:
        Dsv3Error: a request could not be answered, such as one whose logits are not finite.
    """
    completions: dict[str, Completion] = {}
    while engine.has_work():
        for output in engine.step():
            if output.completion is None:
                continue
            if output.completion.error:
                raise Dsv3Error(f"request {output.request_id}: {output.completion.error}")
            completions[output.request_id] = output.completion
    return completions


def accuracy(engine: Engine, path: str, model_type: str, longest: int) -> float:
    """Return the share of correct answers to the dialogues of at most `longest` tokens."""
    if engine.tokenizer is None:
        raise ConfigError("--eval needs a checkpoint with a tokenizer")
    chat = ChatFormat(engine.tokenizer, model_type)
    rows = []
    for i, line in enumerate(read_text(Path(path), limit=_MOST_BYTES).splitlines(), start=1):
        try:
            row = json.loads(line)
            messages = row["messages"]
            expected = row["expected"]
            num_tokens = row["n_tokens"]
        except (ValueError, KeyError, TypeError):
            rule = "must be an object with messages, expected and n_tokens"
            raise ConfigError(f"{path}: line {i} {rule}") from None
        if num_tokens <= longest:
            rows.append((messages, expected))
    if not rows:
        raise ConfigError(f"{path}: no dialogue of up to --longest={longest} tokens")
    params = SamplingParams(max_tokens=96)
    for i, (messages, _) in enumerate(rows):
        ids = chat.encode(chat.render(messages))
        engine.add(Request(request_id=str(i), prompt_ids=ids, params=params))
    done = finish(engine)
    right = [done[str(i)].text.strip() == text.strip() for i, (_, text) in enumerate(rows)]
    return sum(right) / len(right)


def perplexity(engine: Engine, path: str) -> tuple[float, float]:
    """Return the perplexity of all tokens, and that of the answers' tokens."""
    data = np.load(path)
    bounds = [*data["offsets"].tolist(), len(data["tokens"])]
    texts = [(a, b) for a, b in pairwise(bounds) if b - a > 1]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for a, b in texts:
        ids = data["tokens"][a:b].tolist()
        engine.add(Request(request_id=str(a), prompt_ids=ids, params=params))
    done = finish(engine)
    scores = np.array([t.logprob for a, _ in texts for t in done[str(a)].prompt_logprobs or []])
    is_answer = np.concatenate([data["answer"][a + 1 : b] for a, b in texts]).astype(bool)
    return math.exp(-scores.mean()), math.exp(-scores[is_answer].mean())


def main() -> int:
    """Measure accuracy and perplexity according to the flags."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--eval", help="dialogues with expected answers, JSONL")
    parser.add_argument("--longest", type=int, default=10**9, help="skip longer dialogues")
    parser.add_argument("--tokens", help="texts to score, npz")
    add_engine_flags(parser)
    with before_joining():
        args = parser.parse_args()
        set_up_logging(args.debug, args.log_dir)
        if not (args.eval or args.tokens):
            raise ConfigError("nothing to measure: give --eval FILE, --tokens FILE, or both")
        if environment_world_size() > 1:
            raise ConfigError(
                "quality.py runs on one rank; start it with python, not with torchrun"
            )
    with join_engine_ranks(args, "cpu" if args.device == "auto" else args.device) as mesh:
        started = start_model(args, mesh)
        assert started.engine is not None  # there is one rank
        result: dict[str, object] = {"dtype": args.dtype, "kv_dtype": args.kv_dtype}
        if args.eval:
            model_type = started.config.model_type
            result["accuracy"] = round(
                accuracy(started.engine, args.eval, model_type, args.longest), 4
            )
        if args.tokens:
            all_tokens, answers = perplexity(started.engine, args.tokens)
            result |= {"perplexity": round(all_tokens, 5), "answer_perplexity": round(answers, 6)}
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    run_program(main)
