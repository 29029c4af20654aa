"""Grammars compiled for the model's vocabulary, with the library llguidance."""

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from dsv3.engine.constraint import Constraint, error_of
from dsv3.errors import RequestError
from dsv3.request import Grammar, Request
from dsv3.text.thoughts import END_THINK, begins_in_thought
from dsv3.text.tokenizer import Tokenizer
from dsv3.text.tools import CallForm

_MAX_GRAMMARS = 256  # kept for later requests
# Bounds for the time of compiling a grammar (about a second) and of its first mask (0.1 s); each is
# far above published schemas and 128 strict tools, as many as OpenAI takes. A row of the parser has
# an item or more for each optional property.
_LIMITS = {"initial_lexer_fuel": 1_000_000, "max_grammar_size": 50_000, "max_items_in_row": 50_000}


class Grammars:
    """Compiled grammars of one vocabulary; any thread may ask for them.

    Args:
        tokenizer: None refuses all grammars.
        vocab_size: logits of a row; tokens beyond the tokenizer's are never chosen.
        eos_ids: tokens that end an answer.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._matchers: OrderedDict[str, Any] = OrderedDict()  # by their text, the latest last
        self._library: Any = None
        self._vocabulary: Any = None
        self._lock = threading.Lock()  # of the matchers
        self._load_lock = threading.Lock()

    def prepare(self, request: Request) -> None:
        """Compile the grammar of a request, if it has one, so that `constraint` need not.

        Raises:
            RequestError: its grammar cannot be followed.
        """
        self.constraint(request)

    def constraint(self, request: Request) -> Constraint | None:
        """Return the constraint of a request; None if its answer is free.

        Raises:
            RequestError: its grammar cannot be followed.
        """
        grammar = request.grammar
        if grammar is None:
            return None
        if request.params.ignore_eos:
            raise RequestError(f"ignore_eos=true excludes {grammar.subject}: it would never end")
        after = None
        if request.is_chat and begins_in_thought(self._tokenizer, request.prompt_ids):
            after = None if self._tokenizer is None else self._tokenizer.id_of(END_THINK)
            if after is None:
                raise RequestError(
                    f"{grammar.subject} excludes thinking: {END_THINK} is no token here"
                )
        matcher = self._matcher(grammar)
        num_before = len(request.prompt_ids)
        return Constraint(
            matcher, grammar.subject, self._vocab_size, self._eos_ids, num_before, after
        )

    def _matcher(self, grammar: Grammar) -> Any:
        """Return a new matcher at the start of a grammar.

        A thread that compiles does not keep others from the grammars that are there.
        """
        with self._lock:
            matcher = self._matchers.get(grammar.lark)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            self._matchers[grammar.lark] = matcher
            self._matchers.move_to_end(grammar.lark)
            if len(self._matchers) > _MAX_GRAMMARS:
                self._matchers.popitem(last=False)
            return matcher.deep_copy()

    def _compile(self, grammar: Grammar) -> Any:
        with self._load_lock:
            if self._library is None:
                self._load()
        matchers = self._library.LLMatcher
        limits = self._library.LLParserLimits(**_LIMITS, verbose_errors=False)
        try:
            lark = matchers.grammar_from_lark(grammar.lark)
        except UnicodeEncodeError:
            reason = "it holds half of a surrogate pair, which is not a character"
            raise RequestError(f"{grammar.subject} cannot be followed: {reason}") from None
        matcher = matchers(self._vocabulary, lark, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # patterns are compiled at their first use
        if error := error_of(matcher):
            raise RequestError(f"{grammar.subject} cannot be followed: {error}")
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


class _Vocabulary:
    """A vocabulary in the form that llguidance takes.

    Control tokens and marks of calls are not text: a grammar names them by their ids.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        form = CallForm.of(tokenizer)
        names = (*tokenizer.control_tokens, *(form.marks if form else ()))
        special = {i for i in map(tokenizer.id_of, names) if i is not None}
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
