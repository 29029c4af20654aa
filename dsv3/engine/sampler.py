"""From hidden states to tokens over a vocabulary that is split over ranks.

Greedy rows need no gathered logits: the ranks' best logits are compared. Rows that are sampled,
adjusted or scored are distributed over the ranks (all-to-all): each rank gets 1/tp of them as whole
rows, and the small results are gathered. Every rank returns the same.

A row with a logit that is NaN or infinite gives no token: its result is `NOT_FINITE`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsv3.distributed.collectives import Collectives
from dsv3.engine.adjust import Adjustments
from dsv3.engine.step_plan import NO_TARGET, NOT_FINITE, StepPlan
from dsv3.engine.step_result import StepResult
from dsv3.engine.transfer import all_to_device, to_device
from dsv3.model.transformer import Transformer
from dsv3_kernels import RowParams, sample

# Rows of logits held at a time: 512 rows of a 129,280 vocabulary are 256 MiB over tp ranks.
_ROWS = 512


class Choice(NamedTuple):
    """Sampling parameters of M rows; a row with a `target` is scored instead.

    The arrays of `StepPlan` on the device, int64 or float32; `seed` has both halves in one.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    answer: Tensor
    position: Tensor
    target: Tensor

    @staticmethod
    def arrays(plan: StepPlan, index: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the parameters of some of a plan's rows: [5, M] int64 and [3, M] float32."""
        longs = (plan.seed, plan.top_k, plan.answer, plan.position, plan.target)
        longs_5M = np.stack([a[index].astype(np.int64) for a in longs])
        floats_3M = np.stack([a[index] for a in (plan.temperature, plan.top_p, plan.min_p)])
        return longs_5M, floats_3M

    @classmethod
    def of(cls, longs_5M: Tensor, floats_3M: Tensor) -> "Choice":
        """Return the parameters that `arrays` has written."""
        seed_M, top_k, answer, position, target = longs_5M
        temperature, top_p, min_p = floats_3M
        return cls(temperature, top_k, top_p, min_p, seed_M, answer, position, target)

    def row_params(self) -> RowParams:
        """Return the parameters of `sample`."""
        return RowParams(
            temperature_B=self.temperature,
            top_k_B=self.top_k,
            top_p_B=self.top_p,
            min_p_B=self.min_p,
            seed_B=self.seed,
            answer_B=self.answer,
            position_B=self.position,
        )

    def part(self, start: int, stop: int) -> "Choice":
        """Return rows start to stop, as far as they exist."""
        return Choice(*(array[start:stop] for array in self))


def _is_finite(logits_MW: Tensor) -> Tensor:
    """Return [M] True where all logits of a row are finite: only then is a finite sum."""
    sum_M = logits_MW.sum(-1)
    return sum_M - sum_M == 0  # infinity minus infinity is NaN


class Sampler:
    """Chooses or scores the rows of a plan."""

    def __init__(self, model: Transformer, tp: Collectives, device: torch.device) -> None:
        self._model = model
        self._tp = tp
        self._device = device
        self._vocab = model.config.vocab_size

    def __call__(
        self,
        hidden_TD: Tensor,
        plan: StepPlan,
        width: int | None = None,
        fed_M: Tensor | None = None,
    ) -> StepResult:
        """Return tokens and probabilities of the plan's rows. A collective.

        Args:
            hidden_TD: [T, D] normalized hidden states of the plan's tokens.
            plan: of this rank's group.
            width: likeliest tokens to leave room for, -1 without room for probabilities; None for
                the largest number that the plan asks for.
            fed_M: tokens of the step before, where adjusted rows count one of them.
        """
        if width is None:
            width = int(plan.top_logprobs.max(initial=-1))
        plain = (plan.temperature <= 0) & (plan.target == NO_TARGET) & (plan.top_logprobs < 0)
        is_usual = width < 0 and len(plain) <= _ROWS and not len(plan.adjust)
        if is_usual and plain.all():  # in fewer calls
            row_M = to_device(plan.row.astype(np.int64), self._device)
            return StepResult(self.greedy(self._model.logits(hidden_TD.index_select(0, row_M))))
        token_M = torch.zeros(len(plan.row), dtype=torch.int64, device=self._device)
        adjust = Adjustments.unpack(plan.adjust, token_M if fed_M is None else fed_M)
        if adjust is not None:
            plain[adjust.row] = False
        scores = None
        if width >= 0:
            scores = token_M.new_zeros((len(plan.row), 1 + 2 * width), dtype=torch.float64)
        for chosen in (plain, ~plain):
            where = np.flatnonzero(chosen)
            for start in range(0, len(where), _ROWS):
                index = where[start : start + _ROWS]
                arrays = [index, plan.row[index].astype(np.int64)]
                if chosen is not plain:
                    arrays += Choice.arrays(plan, index)
                at, row_M, *choice = all_to_device(arrays, self._device)
                logits = self._model.logits(hidden_TD.index_select(0, row_M))
                if chosen is plain:
                    token_M[at] = self.greedy(logits)
                    continue
                columns = 1 if scores is None else 1 + scores.shape[1]
                some = None if adjust is None else adjust.select(index)
                result = self.whole_rows(logits, Choice.of(*choice), columns, some)
                token_M[at] = result[:, 0].long()
                if scores is not None:
                    scores[at] = result[:, 1:]
        return StepResult(token_M, scores)

    def greedy(self, logits_MW: Tensor) -> Tensor:
        """Return the best of the ranks' best, [M]; equal logits go to the lowest id."""
        best = logits_MW.max(-1)
        # Columns that pad the vocabulary are -inf.
        is_finite_M = _is_finite(logits_MW[:, : self._vocab - self._model.lm_head.start])
        if self._tp.size == 1:
            return best.indices.where(is_finite_M, NOT_FINITE)
        ids = best.indices + self._model.lm_head.start
        value_M = best.values.where(is_finite_M, torch.nan)
        # One exchange for both: ids below 2^24 are exact in float32.
        offers = self._tp.all_gather(torch.stack((value_M, ids.float())))
        # argmax takes NaN before any number, and the first of equals: the lowest rank, so the
        # lowest ids.
        winner = offers[:, 0].argmax(0, keepdim=True)
        value_M, ids = offers.gather(0, winner[:, None].expand(1, 2, -1))[0]
        return ids.long().where(value_M.isfinite(), NOT_FINITE)

    def whole_rows(
        self, logits_MW: Tensor, choice: Choice, columns: int, adjust: Adjustments | None = None
    ) -> Tensor:
        """Distribute whole rows over the ranks, sample each share there, and gather the results.

        Returns:
            [M, columns] float64: token, then the columns of `StepResult.scores`.
        """
        size = self._tp.size
        count = len(logits_MW)
        share = -(-count // size)
        padded = F.pad(logits_MW, (0, 0, 0, share * size - count))
        parts = self._tp.all_to_all(padded.view(size, share, -1))
        whole = parts.transpose(0, 1).flatten(1)[:, : self._vocab]
        first = self._tp.rank * share
        mine = choice.part(first, first + share)
        result = torch.zeros(share, columns, dtype=torch.float64, device=self._device)
        count_here = len(mine.target)
        if count_here:
            own = None if adjust is None else adjust.select(np.arange(first, first + count_here))
            self._choose(whole[:count_here], mine, own, result[:count_here])
        return self._tp.all_gather(result).flatten(0, 1)[:count]

    def _choose(
        self, logits_BW: Tensor, choice: Choice, adjust: Adjustments | None, result: Tensor
    ) -> None:
        """Fill result rows: token, then the columns of `StepResult.scores`."""
        is_finite_B = _is_finite(logits_BW)
        # Of the model itself, so before the rows are adjusted.
        logprob_BW = logits_BW.log_softmax(-1) if result.shape[1] > 1 else None
        if adjust is not None:
            adjust.apply(logits_BW)
        token = sample(logits_BW, choice.row_params())
        token = torch.where(choice.target == NO_TARGET, token, choice.target)
        result[:, 0] = token.where(is_finite_B, NOT_FINITE)
        if logprob_BW is None:
            return
        result[:, 1] = logprob_BW.gather(1, token[:, None])[:, 0]
        width = (result.shape[1] - 2) // 2
        top = logprob_BW.topk(min(width, self._vocab), -1)
        found = top.indices.shape[1]
        result[:, 2 : 2 + found] = top.indices
        result[:, 2 + width : 2 + width + found] = top.values
