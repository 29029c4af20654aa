"""Answers that follow a JSON schema: the tokens that may come next, computed on rank 0.

A grammar is compiled once for each schema, with the library llguidance; a `Constraint` follows one
answer through it. The masks travel in the plan as words of 32 tokens (see `adjust.py`).
"""

import importlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv3.errors import RequestError, shorten
from dsv3.request import Request
from dsv3.text.thoughts import END_THINK, begins_in_thought
from dsv3.text.tokenizer import Tokenizer

Words = NDArray[np.int32]

_MAX_GRAMMARS = 256  # kept for later requests
# Bounds for the time of compiling a schema (about a second) and of its first mask (0.1 s); each is
# far above published schemas. A row of the parser has an item or more for each optional property.
_LIMITS = {"initial_lexer_fuel": 200_000, "max_grammar_size": 50_000, "max_items_in_row": 50_000}
_WORD_BITS = 32
# As Python writes JSON, and so most of what models have read. Free white space would let a model
# go on with it for ever.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Unbounded integers are limited to +-(2^53 - 1), the range that every JSON reader represents
# exactly; otherwise a model may write digits without end.
_MAX_INTEGER = 2**53 - 1
_LOWER = ("minimum", "exclusiveMinimum")
_UPPER = ("maximum", "exclusiveMaximum")
_DATA = {"const", "enum", "default", "examples"}  # their values are no schemas
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # schemas by any names


class Constraint:
    """The tokens that may come next in one answer.

    Args:
        matcher: an llguidance matcher at the start of its grammar.
        vocab_size: logits of a row.
        eos_ids: tokens that end an answer.
        num_before: tokens of the prompt.
        after: the token after which the grammar begins, since the answer begins with a thought; no
            end token comes before it. None if it begins at once.

    Attributes:
        error: after `finish`, the reason that the grammar gave up; empty if the model ended the
            answer.
    """

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        eos_ids: Sequence[int],
        num_before: int,
        after: int | None,
    ) -> None:
        self._start = matcher
        self._matcher = matcher.deep_copy()
        self._num_words = -(-vocab_size // _WORD_BITS)
        self._eos_ids = list(eos_ids)
        self._num_seen = num_before
        self._after = after
        self._num_free = num_before  # tokens before the grammar
        self.error = ""

    def masks(self, token_ids: Sequence[int], drafts: Sequence[int] = ()) -> list[bytes]:
        """Return the masks of the next token, and of the one after each draft, as int32 words.

        Args:
            token_ids: the prompt and the answer so far; it only grows from call to call.
            drafts: tokens that may come next.
        """
        self._follow(token_ids)
        after = self._after
        masks = [self._mask()]
        num_consumed = 0
        for draft in drafts:
            was_in_grammar = self._after is None
            if was_in_grammar and self._matcher.validate_tokens([draft]) == 0:
                break  # it cannot be sampled, so the rows after it do not count
            self._consume(draft)
            num_consumed += was_in_grammar
            masks.append(self._mask())
        self._after = after
        if num_consumed:
            self._take_back(num_consumed, token_ids)
        return masks + masks[-1:] * (1 + len(drafts) - len(masks))

    def finish(self, token_ids: Sequence[int]) -> str:
        """Return `error` of an answer that an end token ended after `token_ids`."""
        self._follow(token_ids)
        if self._after is None and self._allowed() is None:
            reason = _given_up(self._matcher) or "no token may come next"
            self.error = f"the JSON schema cannot be followed to its end: {reason}"
        return self.error

    def _follow(self, token_ids: Sequence[int]) -> None:
        for place in range(self._num_seen, len(token_ids)):
            if self._after is not None:
                self._num_free = place + 1
            self._consume(token_ids[place])
        self._num_seen = len(token_ids)

    def _consume(self, token_id: int) -> None:
        if self._after is None:
            self._matcher.consume_token(token_id)
        elif token_id == self._after:
            self._after = None

    def _take_back(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Undo the last tokens in the grammar, so that it has read `token_ids` only."""
        if not self._matcher.is_error():
            self._matcher.rollback(num_tokens)
            return
        # It gave up at a draft, which no rollback undoes.
        self._matcher = self._start.deep_copy()
        if self._after is None:
            self._matcher.consume_tokens(token_ids[self._num_free :])

    def _mask(self) -> bytes:
        if self._after is not None:
            return self._all_but_end().tobytes()
        words = self._allowed()
        return (~self._all_but_end() if words is None else words).tobytes()

    def _allowed(self) -> Words | None:
        """Return the mask of the grammar; None if it has given up."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._num_words]
        return words if words.any() and not self._matcher.is_error() else None

    def _all_but_end(self) -> Words:
        bits = np.ones(self._num_words * _WORD_BITS, np.uint8)
        bits[self._eos_ids] = 0
        return np.packbits(bits, bitorder="little").view(np.int32)


class Grammars:
    """Grammars of JSON schemas for one vocabulary; any thread may ask for them.

    Args:
        tokenizer: None refuses all schemas.
        vocab_size: logits of a row; tokens beyond the tokenizer's are never chosen.
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._matchers: OrderedDict[str, Any] = OrderedDict()  # by schema, the latest last
        self._library: Any = None
        self._vocabulary: Any = None
        self._lock = threading.Lock()  # of the matchers
        self._load_lock = threading.Lock()

    def constraint(self, request: Request) -> Constraint | None:
        """Return the constraint of a request; None if its answer is free.

        Raises:
            RequestError: its schema cannot be followed.
        """
        if request.schema is None:
            return None
        if request.params.ignore_eos:
            raise RequestError("ignore_eos=true excludes a schema: it would never end")
        after = None
        if request.is_chat and begins_in_thought(self._tokenizer, request.prompt_ids):
            after = None if self._tokenizer is None else self._tokenizer.id_of(END_THINK)
            if after is None:
                raise RequestError(f"a schema excludes thinking: {END_THINK} is no token here")
        matcher = self._matcher(request.schema)
        num_before = len(request.prompt_ids)
        return Constraint(matcher, self._vocab_size, self._eos_ids, num_before, after)

    def _matcher(self, schema: str) -> Any:
        """Return a new matcher at the start of a schema's grammar.

        A thread that compiles does not keep others from the grammars that are there.
        """
        with self._lock:
            matcher = self._matchers.get(schema)
        if matcher is None:
            matcher = self._compile(schema)
        with self._lock:
            self._matchers[schema] = matcher
            self._matchers.move_to_end(schema)
            if len(self._matchers) > _MAX_GRAMMARS:
                self._matchers.popitem(last=False)
            return matcher.deep_copy()

    def _compile(self, schema: str) -> Any:
        with self._load_lock:
            if self._library is None:
                self._load()
        try:
            bounded = json.dumps(_bounded(json.loads(schema)))
            grammar = self._library.LLMatcher.grammar_from_json_schema(bounded, overrides=_STYLE)
            limits = self._library.LLParserLimits(**_LIMITS, verbose_errors=False)
            matcher = self._library.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # patterns are compiled at their first use
            error = _given_up(matcher)
        except ValueError as raised:
            error = shorten(str(raised), 200)
        if error:
            raise RequestError(f"the JSON schema cannot be followed: {error}")
        return matcher

    def _load(self) -> None:
        """Load llguidance, and show it the vocabulary."""
        if find_spec("llguidance") is None:
            raise RequestError("this server has no llguidance, which schemas need")
        if self._tokenizer is None or self._tokenizer.piece(0) is None:
            raise RequestError("this model's vocabulary cannot be constrained to a schema")
        library = importlib.import_module("llguidance")
        wrapper = library.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
        self._vocabulary = library.LLTokenizer(wrapper, eos_token=self._eos_ids)
        self._library = library


def _given_up(matcher: Any) -> str:
    """Return the reason that a matcher has stopped with; empty if it goes on."""
    return shorten(str(matcher.get_error() or "").split("\n")[0], 200)


def _bounded(schema: Any) -> Any:
    """Return a JSON schema with bounds for all integers."""
    if isinstance(schema, list):
        return [_bounded(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bounded: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            bounded[key] = {name: _bounded(inner) for name, inner in value.items()}
        else:
            bounded[key] = value if key in _DATA else _bounded(value)
    return bounded | _integer_bounds(schema)


def _integer_bounds(schema: dict[str, Any]) -> dict[str, int]:
    """Return the bounds that the integers of a schema lack."""
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if "integer" not in kinds or "number" in kinds or not {"enum", "const"}.isdisjoint(schema):
        return {}
    bounds = {}
    # A bound beyond the range leaves the other side open.
    least = [schema[name] for name in _LOWER if name in schema]
    most = [schema[name] for name in _UPPER if name in schema]
    if not least and not any(_is_beyond(bound) for bound in most):
        bounds["minimum"] = -_MAX_INTEGER
    if not most and not any(_is_beyond(bound) for bound in least):
        bounds["maximum"] = _MAX_INTEGER
    return bounds


def _is_beyond(bound: Any) -> bool:
    return isinstance(bound, int | float) and abs(bound) > _MAX_INTEGER


class _Vocabulary:
    """A vocabulary in the form that llguidance takes."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        controls = (tokenizer.id_of(name) for name in tokenizer.control_tokens)
        special = {i for i in controls if i is not None}
        self.tokens = [
            tokenizer.token_text(i).encode() if i in special else tokenizer.token_bytes(i)
            for i in range(vocab_size)
        ]
        self.special_token_ids = sorted(special)
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id or 0
        self._encode: Callable[[str], list[int]] = tokenizer.encode_ordinary

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text."""
        return self._encode(text if isinstance(text, str) else text.decode())
