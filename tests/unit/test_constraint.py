"""Answers that follow a JSON schema: masks on rank 0, and their effect on rows of logits."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3.engine import grammars as grammars_module
from dsv3.engine.adjust import AdjustedRow, Adjuster, Adjustments, pack_adjustments
from dsv3.engine.constraint import Constraint
from dsv3.engine.grammars import Grammars
from dsv3.errors import RequestError
from dsv3.request import Grammar, Request, SamplingParams
from dsv3.text.grammar import answer_grammar
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import ToolUse

pytest.importorskip("llguidance", reason="schemas need llguidance: pip install llguidance")
TOKENIZER = Tokenizer.load(Path(__file__).parents[2] / "checkpoints" / "demo-v3")
VOCAB, EOS = 2050, 1  # two more rows of logits than tokens
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
GRAMMARS = Grammars(TOKENIZER, VOCAB, [EOS])


def constraint(
    schema: Any, prompt: str = "Hi", grammars: Grammars = GRAMMARS, **more: Any
) -> Constraint:
    ids = TOKENIZER.encode(prompt, add_special_tokens=False)
    params = SamplingParams(**more)
    grammar = answer_grammar(None, schema, None)
    asked = Request(request_id="r", prompt_ids=ids, params=params, grammar=grammar, is_chat=True)
    made = grammars.constraint(asked)
    assert made is not None
    return made


def allowed(mask: bytes) -> set[int]:
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_all_texts_that_the_masks_allow_follow_the_schema() -> None:
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    for seed in range(10):
        draw = np.random.default_rng(seed)
        made = constraint(SCHEMA)
        ids: list[int] = []
        while EOS not in ids:
            (mask,) = made.masks(prompt + ids)
            ids.append(int(draw.choice(sorted(allowed(mask)))))
            assert len(ids) < 60
        value = json.loads(TOKENIZER.decode(ids[:-1]))
        assert list(value) == ["a", "b"]
        assert abs(value["a"]) < 2**53 and value["b"] in ("x", "yy")


def test_drafts_get_the_masks_of_their_places_and_leave_no_trace() -> None:
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    answer = TOKENIZER.encode_ordinary('{"a": 12, "b": "yy"}')
    steps = constraint(SCHEMA)
    want = [steps.masks(prompt + answer[:i])[0] for i in range(len(answer) + 1)]
    drafting = constraint(SCHEMA)
    for i in range(len(answer) - 3):
        assert drafting.masks(prompt + answer[:i], answer[i : i + 3]) == want[i : i + 4]
        wrong = drafting.masks(prompt + answer[:i], [answer[i], 3, 3])
        assert wrong[:2] == want[i : i + 2] and len(wrong) == 4


def test_a_thought_comes_before_the_schema() -> None:
    prompt = TOKENIZER.encode("Hi<think>", add_special_tokens=False)
    end = TOKENIZER.id_of("</think>")
    assert end is not None
    made = constraint(SCHEMA, "Hi<think>")
    (mask,) = made.masks([*prompt, 60, 61])
    assert EOS not in allowed(mask) and len(allowed(mask)) > 2000
    masks = made.masks([*prompt, 60, 61], [62, end, 63])
    assert len(allowed(masks[1])) > 2000
    assert {TOKENIZER.token_text(i)[0] for i in allowed(masks[2])} == {"{"}
    (mask,) = made.masks([*prompt, 60, 61, end])
    assert mask == masks[2]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no such type"},
        {"not": {}},
        {"$ref": "#/x"},
        {"enum": []},
        {"properties": 3},
        {"const": "\ud800"},
        {"\ud800": 1},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match="the JSON schema cannot be followed"):
        constraint(schema)


def optional_texts(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(number)}}


def test_a_schema_that_takes_long_is_refused() -> None:
    with pytest.raises(RequestError, match=r"the JSON schema cannot be followed: .* too big"):
        constraint(optional_texts(10_000))


def test_a_large_schema_is_followed() -> None:
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    made = constraint(optional_texts(1000))
    (mask,) = made.masks([*prompt, *TOKENIZER.encode_ordinary('{"p998": "x", ')])
    assert {TOKENIZER.token_text(i)[0] for i in allowed(mask)} == {'"'} and not made.error


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, ""),
        ({"type": ["null", "integer"]}, ""),
        ({"type": "object", "properties": {"enum": {"type": "integer"}}}, '{"enum": '),
        ({"$defs": {"default": {"type": "integer"}}, "$ref": "#/$defs/default"}, ""),
        ({"type": "integer", "minimum": 0}, ""),
        ({"type": "integer", "exclusiveMaximum": 0}, "-"),
    ],
)
def test_integers_end_within_those_of_a_double(schema: Any, text: str) -> None:
    made = constraint(schema)
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    ids = [*prompt, *TOKENIZER.encode_ordinary(text + "9007199254740991")]
    (mask,) = made.masks(ids)
    assert not any(TOKENIZER.token_text(i)[0].isdigit() for i in allowed(mask) - {EOS})


def test_integers_may_be_beyond_those_of_a_double_if_the_schema_says_so() -> None:
    made = constraint({"type": "integer", "minimum": 10**16})
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    (mask,) = made.masks([*prompt, *TOKENIZER.encode_ordinary(str(10**17))])
    assert EOS in allowed(mask)


@pytest.mark.parametrize("pattern", ["^(((a{30}){30}){30}){30}$", "^a{1000000000}$"])
def test_a_grammar_that_gives_up_says_so(pattern: str) -> None:
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    made = constraint({"type": "string", "pattern": pattern})
    assert EOS not in allowed(made.masks(prompt)[0]) and not made.error
    quote = TOKENIZER.encode_ordinary('"')
    assert allowed(made.masks([*prompt, *quote])[0]) == {EOS}
    error = made.finish([*prompt, *quote])
    assert "the JSON schema cannot be followed to its end: lexer error" in error == made.error


@pytest.mark.parametrize("thought", [[], ["</think>"]])
def test_a_grammar_that_gives_up_at_a_draft_goes_on(
    thought: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammars_module._LIMITS, "max_items_in_row", 50)
    grammars = Grammars(TOKENIZER, VOCAB, [EOS])
    wide = {f"p{i}": {"type": "boolean"} for i in range(300)}
    inner = {"type": "object", "properties": wide, "additionalProperties": False}
    outer = {"type": "object", "properties": {"k": inner}, "required": ["k"]}
    schema = {"type": "array", "items": {"anyOf": [{"enum": ["yes", "no"]}, outer]}}
    start = "Hi<think>" if thought else "Hi"
    prompt = TOKENIZER.encode(start, add_special_tokens=False)
    end = [TOKENIZER.id_of(mark) or 0 for mark in thought]
    answer = TOKENIZER.encode_ordinary('["yes", "no"]')
    drafts = [*end, *TOKENIZER.encode_ordinary('[{"k": {"p1": true')]
    plain = constraint(schema, start, grammars)
    drafting = constraint(schema, start, grammars)
    masks = drafting.masks(prompt, drafts)
    assert allowed(masks[-1]) == {EOS}, "the drafts are too few for the grammar to give up"
    ids = [*prompt, *end]
    for token in answer:
        want = plain.masks(ids)
        assert drafting.masks(ids, drafts[len(end) + 1 :])[:1] == want
        ids.append(token)
    assert drafting.masks(ids) == plain.masks(ids)
    assert not drafting.finish(ids)


def test_a_schema_that_compiles_does_not_keep_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grammars = Grammars(TOKENIZER, VOCAB, [EOS])
    compiles = grammars._compile
    slow, quick = Grammar('start: "slow"'), Grammar('start: "quick"')
    begun, may_end = threading.Event(), threading.Event()

    def compile_slowly(grammar: Grammar) -> Any:
        if grammar == slow:
            begun.set()
            assert may_end.wait(60)
        return compiles(grammar)

    monkeypatch.setattr(grammars, "_compile", compile_slowly)

    def ask(grammar: Grammar) -> Constraint | None:
        params = SamplingParams()
        return grammars.constraint(
            Request(request_id="r", prompt_ids=[60], params=params, grammar=grammar)
        )

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(ask, slow)
        assert begun.wait(60)
        try:
            assert pool.submit(ask, quick).result(60) is not None
        finally:
            may_end.set()
        assert waiting.result(60) is not None


def test_references_within_the_parameters_of_a_tool() -> None:
    """As Pydantic writes nested models, with one that refers to itself."""
    place = {"type": "object", "properties": {"city": {"enum": ["Lima"]}}, "required": ["city"]}
    place["properties"]["near"] = {"$ref": "#/$defs/Place"}  # type: ignore[index]
    parameters = {
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "$defs": {"Place": place | {"additionalProperties": False}},
    }
    tools = [{"function": {"name": name, "parameters": parameters}} for name in ("f", "g.h")]
    schema = ToolUse(tools=tuple(tools), is_required=True).forced_schema()
    arguments = {"at": {"city": "Lima", "near": {"city": "Lima"}}}
    prompt = TOKENIZER.encode("Hi", add_special_tokens=False)
    for value, is_right in ((arguments, True), ({"at": {"city": "Rome"}}, False), ([1], False)):
        text = json.dumps([{"name": "g.h", "arguments": value}])
        ids = [*TOKENIZER.encode_ordinary(text), EOS]
        made = constraint(schema)
        follows = all(ids[i] in allowed(made.masks(prompt + ids[:i])[0]) for i in range(len(ids)))
        assert follows == is_right, text


def test_ignore_eos_excludes_a_schema() -> None:
    with pytest.raises(RequestError, match="ignore_eos"):
        constraint(SCHEMA, ignore_eos=True)


def test_masks_forbid_tokens_of_their_rows() -> None:
    draw = np.random.default_rng(0)
    width = 70
    bits = draw.integers(0, 2, (2, 96)).astype(np.uint8)
    masks = [np.packbits(row, bitorder="little").tobytes() for row in bits]
    biased = Adjuster(SamplingParams(logit_bias={3: 5.0}), [])
    plain = Adjuster(SamplingParams(), [])
    rows = [
        AdjustedRow(0, -1, plain, [], masks[0]),
        AdjustedRow(2, -1, biased, []),
        AdjustedRow(3, -1, biased, [], masks[1]),
    ]
    unpacked = Adjustments.unpack(pack_adjustments(rows), torch.zeros(4, dtype=torch.int64))
    assert unpacked is not None
    logits = torch.zeros(4, width)
    unpacked.apply(logits)
    want = torch.zeros(4, width)
    want[2:, 3] = 5
    for row, mask in ((0, bits[0]), (3, bits[1])):
        want[row, torch.from_numpy(mask[:width] == 0)] = -torch.inf
    assert torch.equal(logits, want)
    some = unpacked.select(np.array([1, 3]))
    assert some is not None
    part = torch.zeros(2, width)
    some.apply(part)
    assert torch.equal(part, want[[1, 3]])
