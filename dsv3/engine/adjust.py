"""Biases and penalties of single requests, applied to whole rows of logits before sampling.

In this order: `logit_bias` is added; logits of tokens in the prompt or the answer are divided by
the repetition penalty, or multiplied if negative; of tokens in the answer, the frequency penalty is
subtracted once for each occurrence, and the presence penalty once; last, logits of tokens that a
mask does not allow become minus infinity.

Rank 0 writes the tokens of such rows into the plan, so that the result depends on neither the world
size nor the schedule. The token that a step in flight samples is known on the device only: it is
counted there.
"""

from array import array
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.engine.masks import forbid
from dsv3.engine.transfer import to_device
from dsv3.request import SamplingParams

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

NOT_FED = -1
_IN_PROMPT = 1
_ONCE = 2  # a token's uses: twice its count in the answer, plus one if it is in the prompt


class Adjuster:
    """The biases of one request, and the tokens that its penalties concern so far.

    Args:
        params: of the request.
        prompt_ids: its prompt.
    """

    def __init__(self, params: SamplingParams, prompt_ids: list[int]) -> None:
        self.factors = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
        self.bias_token = list(params.logit_bias)
        self.bias = list(params.logit_bias.values())
        self._is_penalized = params.has_penalties
        self._num_counted = len(prompt_ids)
        # Penalties of the answer's tokens need none of the prompt.
        distinct = np.unique(prompt_ids).tolist() if params.repetition_penalty != 1 else []
        self._place = {token: i for i, token in enumerate(distinct)}
        self._token = array("i", distinct)
        self._uses = array("i", [_IN_PROMPT] * len(distinct))

    @classmethod
    def of(
        cls, params: SamplingParams, prompt_ids: list[int], is_masked: bool = False
    ) -> "Adjuster | None":
        """Return the adjuster of a request; None if its logits stay as they are."""
        is_needed = params.has_penalties or params.logit_bias or is_masked
        return cls(params, prompt_ids) if is_needed else None

    def seen(self, token_ids: list[int]) -> tuple[bytes, bytes]:
        """Return the distinct tokens that penalties concern, and their uses, as int32 words.

        Args:
            token_ids: the prompt and the answer so far; it only grows from call to call.
        """
        if not self._is_penalized:
            return b"", b""
        for token in token_ids[self._num_counted :]:
            place = self._place.setdefault(token, len(self._token))
            if place == len(self._token):
                self._token.append(token)
                self._uses.append(0)
            self._uses[place] += _ONCE
        self._num_counted = len(token_ids)
        return self._token.tobytes(), self._uses.tobytes()


class AdjustedRow(NamedTuple):
    """A row of a plan whose logits are adjusted.

    Attributes:
        row: number of the result row.
        fed: result row of the previous step whose token is part of the answer too, or NOT_FED.
        adjuster: of its request.
        token_ids: the prompt and the answer so far.
        mask: the bytes of a mask (`masks.py`); empty allows all tokens.
    """

    row: int
    fed: int
    adjuster: Adjuster
    token_ids: list[int]
    mask: bytes = b""


def pack_adjustments(rows: list[AdjustedRow]) -> Ints:
    """Return the adjusted rows of a plan as words, in ascending order; empty without any."""
    if not rows:
        return np.zeros(0, np.int32)
    adjusters = [row.adjuster for row in rows]
    seen = [row.adjuster.seen(row.token_ids) for row in rows]
    row = [row.row for row in rows]
    fed = [row.fed for row in rows]
    num_seen = [len(tokens) // 4 for tokens, _ in seen]
    num_biased = [len(adjuster.bias) for adjuster in adjusters]
    is_masked = [bool(row.mask) for row in rows]
    factors_3K = np.array([adjuster.factors for adjuster in adjusters], np.float32).T
    bias_token = np.array([t for adjuster in adjusters for t in adjuster.bias_token], np.int32)
    bias = np.array([b for adjuster in adjusters for b in adjuster.bias], np.float32)
    return np.concatenate(
        [
            np.array([len(rows), sum(num_seen)], np.int32),
            np.array([row, fed, num_seen, num_biased, is_masked], np.int32).ravel(),
            factors_3K.ravel().view(np.int32),
            *(np.frombuffer(b"".join(words), np.int32) for words in zip(*seen, strict=True)),
            bias_token,
            bias.view(np.int32),
            np.frombuffer(b"".join(row.mask for row in rows), np.int32),
        ]
    )


@dataclass(frozen=True)
class Adjustments:
    """Adjusted rows of logits, [K] of them, ascending.

    Attributes:
        row: their places among the logits.
        fed: of each the row of the step before whose token is part of the answer too, or NOT_FED.
        num_seen: of each its entries in `seen_2E`.
        num_biased: of each its entries in `bias`.
        is_masked: of each 1 if it has a row of `masks_LX`, otherwise 0.
        factors_3K: repetition, frequency and presence penalties.
        seen_2E: tokens that penalties concern, distinct in each row, and their uses.
        bias_token, bias: [N] tokens, and the numbers to add to their logits.
        masks_LX: words of masks.
        fed_M: [M] tokens of the step before, on the device; negative if there is none.
    """

    row: Ints
    fed: Ints
    num_seen: Ints
    num_biased: Ints
    is_masked: Ints
    factors_3K: Floats
    seen_2E: Ints
    bias_token: Ints
    bias: Floats
    masks_LX: Ints
    fed_M: Tensor

    @classmethod
    def unpack(cls, words: Ints, fed_M: Tensor) -> "Adjustments | None":
        """Undo `pack_adjustments`; None of no words."""
        if not len(words):
            return None
        K, E = words[:2].tolist()
        N = int(words[2 + 3 * K : 2 + 4 * K].sum())
        rows, factors, seen, bias_token, bias, masks = np.split(
            words[2:], np.cumsum([5 * K, 3 * K, 2 * E, N, N])
        )
        row, fed, num_seen, num_biased, is_masked = rows.reshape(5, K)
        L = int(is_masked.sum())
        return cls(
            row=row,
            fed=fed,
            num_seen=num_seen,
            num_biased=num_biased,
            is_masked=is_masked,
            factors_3K=factors.view(np.float32).reshape(3, K),
            seen_2E=seen.reshape(2, E),
            bias_token=bias_token,
            bias=bias.view(np.float32),
            masks_LX=masks.reshape(L, len(masks) // max(1, L)),
            fed_M=fed_M,
        )

    def select(self, index: Longs) -> "Adjustments | None":
        """Keep the rows in `index` (ascending), and number them by their places there."""
        is_kept = np.isin(self.row, index)
        if not is_kept.any():
            return None
        is_seen = np.repeat(is_kept, self.num_seen)
        is_biased = np.repeat(is_kept, self.num_biased)
        return Adjustments(
            row=np.searchsorted(index, self.row[is_kept]).astype(np.int32),
            fed=self.fed[is_kept],
            num_seen=self.num_seen[is_kept],
            num_biased=self.num_biased[is_kept],
            is_masked=self.is_masked[is_kept],
            factors_3K=self.factors_3K[:, is_kept],
            seen_2E=self.seen_2E[:, is_seen],
            bias_token=self.bias_token[is_biased],
            bias=self.bias[is_biased],
            masks_LX=self.masks_LX[is_kept[self.is_masked > 0]],
            fed_M=self.fed_M,
        )

    def apply(self, logits_BW: Tensor) -> None:
        """Adjust whole rows of logits in place; nothing here asks the device for anything."""
        if len(self.bias):
            row_N = np.repeat(self.row, self.num_biased)
            at = self._send(np.stack((row_N, self.bias_token)))
            logits_BW[tuple(at)] += to_device(self.bias, self.fed_M.device)
        if (self.factors_3K != [[1], [0], [0]]).any():
            self._penalize(logits_BW)
        if len(self.masks_LX):
            self._forbid(logits_BW)

    def _forbid(self, logits_BW: Tensor) -> None:
        """Set the logits of tokens that masks do not allow to minus infinity."""
        row_L = self._send(self.row[self.is_masked > 0])
        words_LX = to_device(self.masks_LX, self.fed_M.device)
        logits_BW[row_L] = forbid(logits_BW[row_L], words_LX)

    def _send(self, values: Ints) -> Tensor:
        return to_device(values.astype(np.int64), self.fed_M.device)

    def _penalize(self, logits_BW: Tensor) -> None:
        row = self.row
        fed = self.fed
        factors_3K = to_device(self.factors_3K, self.fed_M.device)
        row_K, fed_K = self._send(np.stack((row, fed)))
        k_E, token_E, uses_E = self._send(
            np.stack((np.repeat(np.arange(len(row), dtype=np.int32), self.num_seen), *self.seen_2E))
        )
        token_K = torch.full_like(fed_K, NOT_FED)
        if (fed != NOT_FED).any():
            token_K = self.fed_M[fed_K.clamp_min(0)].where(fed_K >= 0, NOT_FED)
        # A fed token that was seen before counts once more; another one is seen for the first time.
        is_fed_E = token_E == token_K[k_E]
        at = row_K[k_E], token_E
        logits_BW[at] = _penalized(logits_BW[at], uses_E // _ONCE + is_fed_E, factors_3K[:, k_E])
        was_seen_K = torch.zeros_like(token_K).index_add_(0, k_E, is_fed_E.long()) > 0
        at = row_K, token_K.clamp_min(0)
        before_K = logits_BW[at]
        after_K = _penalized(before_K, torch.ones_like(token_K), factors_3K)
        logits_BW[at] = torch.where(was_seen_K | (token_K < 0), before_K, after_K)


def _penalized(logit: Tensor, count: Tensor, factors_3: Tensor) -> Tensor:
    """Return logits of tokens in the prompt or, `count` times, in the answer."""
    repetition, frequency, presence = factors_3
    logit = torch.where(logit > 0, logit / repetition, logit * repetition)
    return logit - frequency * count - presence * (count > 0)
