"""A request in progress: its tokens, how far it is computed, the pages it holds."""

from dataclasses import dataclass, field

from dsv3.request import Request, TokenLogprobs
from dsv3.text.detokenize import TextStream


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request between steps.

    Attributes:
        token_ids: the prompt, then what was generated.
        num_computed: leading tokens whose cache entries exist.
        pages: its page table.
        reserved_pages: pages it may come to need; admission has set them aside.
        stream: turns tokens into text; None where there is no tokenizer.
    """

    request: Request
    reserved_pages: int
    stream: TextStream | None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start from the prompt."""
        self.token_ids = list(self.request.prompt_ids)

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_len
